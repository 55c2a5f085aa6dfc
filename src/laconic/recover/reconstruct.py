"""The reconstruct step: parts of the network learn to answer as the teacher's, on few data."""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field
from torch import nn

from laconic.recover.feeding import Feed, Student
from laconic.recover.solve import Gradient, Solve
from laconic.step import State, Step, Value
from laconic.tasks.task import needed

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["Order", "Parallel", "Reconstruct", "Sequential"]


class Order(Value, ABC):
    """Which part learns when."""


class Sequential(Order):
    """One part after the other, each on what those before it have become.

    >>> Sequential()
    Sequential()
    """


class Parallel(Order):
    """All parts at once, each on what its predecessor sent lately (MREM-P; Bai et al. 2022).

    Attributes:
        queue: how many batches of features a part keeps of what it was sent.

    >>> Parallel(8)
    Parallel(8)
    """

    positional: ClassVar[tuple[str, ...]] = ("queue",)

    queue: Annotated[int, Field(ge=1)] = 16


class Reconstruct(Step):
    """Fit parts of the network to the same parts of the teacher, without labels.

    Attributes:
        scope: modules whose parameters move.
        parts: "layer": every linear layer and convolution by itself; "block": every block of the
            network; a number: so many modules of consecutive blocks.
        feed: what a part is fed, in the teacher and in the student.
        order: which part learns when.
        solve: how a part's numbers are found.

    >>> Reconstruct(parts=3)
    Reconstruct(parts=3)
    """

    parts: Literal["layer", "block"] | Annotated[int, Field(ge=1)] = "layer"
    feed: Feed = Student()
    order: Order = Sequential()
    solve: Solve = Gradient()

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse to run without a task."""
        super().check(model, task, earlier)
        needed(task, "reconstruct needs examples")

    def apply(self, state: State) -> None:
        """Fit every part."""
