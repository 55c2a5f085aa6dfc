"""Inner problems of reconstruct: how the numbers of one part are found."""

from __future__ import annotations

from abc import ABC
from typing import Annotated, ClassVar

from pydantic import Field

from laconic.recover.optimize import Adam, Milestones, Optimizer
from laconic.step import Value

__all__ = ["Gradient", "Solve"]


class Solve(Value, ABC):
    """How the numbers of a part are found so that it answers as the teacher's."""


class Gradient(Solve):
    """Descend on the part's loss, straight through masks and representations.

    Attributes:
        steps: updates of every part.
        batch: examples of each; a layer's loss is always that of all examples.
        optimizer: how the parameters move.

    >>> Gradient(250).steps
    250
    """

    positional: ClassVar[tuple[str, ...]] = ("steps",)

    steps: Annotated[int, Field(ge=1)] = 3000
    batch: Annotated[int, Field(ge=1)] = 32
    optimizer: Optimizer = Adam(5e-4, decay=Milestones((1 / 3,)))
