"""Objectives: what training minimises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from laconic.step import Value

if TYPE_CHECKING:
    import torch

    from laconic.tasks import Batch, Task

__all__ = ["Features", "Label", "Objective"]

# Named results of one forward; "output" is what the task's call returned.
Features = Mapping[str, Tensor]


class Objective(Value, ABC):
    """A scalar to minimise, from the features of the student and of the teacher.

    Attributes:
        wants: names of the teacher's features; empty: the teacher is not run.
        weight: factor of this term.
    """

    wants: ClassVar[frozenset[str]] = frozenset()

    weight: Annotated[float, Field(ge=0)] = 1.0

    def build(
        self, student: Features, teacher: Features, generator: torch.Generator
    ) -> nn.Module | None:
        """Return what is learned beside the student (projections); it is never shipped."""
        return None

    @abstractmethod
    def __call__(
        self,
        student: Features,
        teacher: Features,
        batch: Batch,
        *,
        task: Task,
        learned: nn.Module | None = None,
        progress: float = 0.0,
    ) -> Tensor:
        """Return the mean over the batch, a scalar, times ``weight``."""

    @classmethod
    def shorthand(cls, value: Any) -> tuple[str, Any] | None:
        """Return the meaning of a list of one objective: that objective."""
        if isinstance(value, (list, tuple)) and len(value) == 1:
            only = value[0]
            return (only, None) if isinstance(only, str) else next(iter(only.items()))
        return None


class Label(Objective):
    """The task's own loss against the labels.

    >>> Label(weight=0.5)
    Label(weight=0.5)
    """

    def __call__(
        self,
        student: Features,
        teacher: Features,
        batch: Batch,
        *,
        task: Task,
        learned: nn.Module | None = None,
        progress: float = 0.0,
    ) -> Tensor:
        """Return ``weight`` times the task's loss."""
        return self.weight * task.loss(student["output"], batch)
