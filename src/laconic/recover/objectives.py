"""Objectives: what training minimises, and their sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field
from torch import Tensor, nn

from laconic.step import Value

if TYPE_CHECKING:
    import torch

    from laconic.models.capture import Features
    from laconic.tasks import Batch, Task

__all__ = ["Label", "Objective", "Sum", "Taught", "Wants"]


@dataclass(frozen=True)
class Wants:
    """Which features of a forward an objective reads, by name.

    Attributes:
        student: of the network that is trained.
        teachers: of each teacher, by its index.

    >>> wants = Wants({"hidden.1"}) | Wants({"hidden.2"}, {0: {"hidden.4"}})
    >>> sorted(wants.student), wants.teachers
    (['hidden.1', 'hidden.2'], {0: {'hidden.4'}})
    """

    student: set[str] = field(default_factory=set)
    teachers: Mapping[int, set[str]] = field(default_factory=dict)

    def __or__(self, other: Wants) -> Wants:
        """Return what either of them reads."""
        indices = sorted({*self.teachers, *other.teachers})
        joined = {i: self.teachers.get(i, set()) | other.teachers.get(i, set()) for i in indices}
        return Wants(self.student | other.student, joined)


class Objective(Value, ABC):
    """A scalar to minimise, from the features of the student and of its teachers.

    Objectives add up and may be weighed: ``0.5 * Label() + 0.5 * Logits(temperature=4.0)``.
    A recipe writes a sum as a list.

    Attributes:
        weight: factor of this term.
        needs_targets: whether it reads the targets of training examples.
    """

    needs_targets: ClassVar[bool] = False

    weight: Annotated[float, Field(ge=0)] = 1.0

    @property
    def words(self) -> str:
        """Return what a curve of its losses is called."""
        return self.name.replace("_", " ")

    @property
    def teachers(self) -> frozenset[int]:
        """Return the indices of the teachers it learns from."""
        return frozenset()

    @property
    def peers(self) -> frozenset[int]:
        """Return the indices of those of its teachers that learn as well."""
        return frozenset()

    def wants(self, student: int, teachers: Sequence[int]) -> Wants:
        """Return which features it reads; logits and masks are always there.

        Args:
            student: blocks of the student; 0 where it has none.
            teachers: blocks of each teacher.
        """
        return Wants()

    def build(
        self, student: Features, teachers: Sequence[Features], generator: torch.Generator
    ) -> nn.Module | None:
        """Return what is learned beside the student; it is trained with it and never shipped.

        Args:
            student: features of a few examples, for their shapes.
            teachers: those of each teacher.
            generator: all initial values are drawn from it.
        """
        return None

    @abstractmethod
    def __call__(
        self,
        student: Features,
        teachers: Sequence[Features],
        batch: Batch,
        *,
        task: Task,
        learned: nn.Module | None = None,
        progress: float = 0.0,
    ) -> Tensor:
        """Return the mean over the batch, a scalar, times ``weight``.

        Args:
            student: named features of the batch; gradients flow through them.
            teachers: those of each teacher, without gradients but for peers.
            batch: inputs and targets.
            task: its loss.
            learned: what ``build`` returned.
            progress: of the training, 0 to 1.
        """

    def __add__(self, other: Objective) -> Sum:
        """Return the sum of both."""
        return Sum(terms=(*_terms(self), *_terms(other)))

    def __rmul__(self, factor: float) -> Self:
        """Return the same with ``factor`` times the weight."""
        return type(self)(**{**dict(self), "weight": factor * self.weight})

    __mul__ = __rmul__

    @classmethod
    def shorthand(cls, value: Any) -> tuple[str, Any] | None:
        """Return the meaning of a list: its sum, or the only objective in it."""
        if not isinstance(value, (list, tuple)):
            return None
        only = value[0] if len(value) == 1 else None
        if isinstance(only, str):
            return only, None
        if isinstance(only, Mapping) and len(only) == 1:
            return next(iter(only.items()))
        return "sum", {"terms": value}


class Taught(Objective, ABC):
    """An objective that compares features of the student with those of one teacher.

    Attributes:
        weight: factor of this term.
        teacher: which of several teachers, from 0.
    """

    teacher: Annotated[int, Field(ge=0)] = 0

    @property
    def teachers(self) -> frozenset[int]:
        """Return the index of its teacher."""
        return frozenset({self.teacher})

    @abstractmethod
    def pairs(self, student: int, teacher: int) -> tuple[tuple[str, str], ...]:
        """Return what is compared: pairs of a student's and the teacher's feature, by name.

        Args:
            student: blocks of the student.
            teacher: blocks of the teacher.

        Raises:
            FeatureError: a network has too few blocks.
        """

    def wants(self, student: int, teachers: Sequence[int]) -> Wants:
        """Return the features of its pairs."""
        pairs = self.pairs(student, teachers[self.teacher])
        return Wants({own for own, _ in pairs}, {self.teacher: {name for _, name in pairs}})

    @abstractmethod
    def compare(
        self,
        student: Features,
        teacher: Features,
        *,
        learned: nn.Module | None = None,
        progress: float = 0.0,
    ) -> Tensor:
        """Return the mean over the batch, a scalar, before it is weighed."""

    def __call__(
        self,
        student: Features,
        teachers: Sequence[Features],
        batch: Batch,
        *,
        task: Task,
        learned: nn.Module | None = None,
        progress: float = 0.0,
    ) -> Tensor:
        """Return ``weight`` times the loss; see Objective."""
        # A teacher that learns as well learns from its own term alone.
        taught = teachers[self.teacher].detached()
        return self.weight * self.compare(student, taught, learned=learned, progress=progress)


class Label(Objective):
    """The task's own loss against the labels.

    >>> Label(weight=0.5)
    Label(weight=0.5)
    """

    needs_targets: ClassVar[bool] = True

    def __call__(
        self,
        student: Features,
        teachers: Sequence[Features],
        batch: Batch,
        *,
        task: Task,
        learned: nn.Module | None = None,
        progress: float = 0.0,
    ) -> Tensor:
        """Return ``weight`` times the task's loss."""
        return self.weight * task.loss(student["logits"], batch)


class Sum(Objective):
    """Objectives added up.

    Attributes:
        terms: what is added, each with its own weight.

    >>> 0.5 * (Label() + Label(weight=3.0))
    Sum((Label(weight=0.5), Label(weight=1.5)))
    """

    positional: ClassVar[tuple[str, ...]] = ("terms",)

    terms: Annotated[tuple[Objective, ...], Field(min_length=1)]

    @property
    def words(self) -> str:
        """Return what its terms are called, each kind of them once."""
        return " + ".join(dict.fromkeys(term.words for term in self.terms))

    @property
    def teachers(self) -> frozenset[int]:
        """Return the indices of all teachers of its terms."""
        return frozenset().union(*(term.teachers for term in self.terms))

    @property
    def peers(self) -> frozenset[int]:
        """Return the indices of all teachers that learn with one of its terms."""
        return frozenset().union(*(term.peers for term in self.terms))

    def wants(self, student: int, teachers: Sequence[int]) -> Wants:
        """Return what its terms read."""
        joined = Wants()
        for term in self.terms:
            joined |= term.wants(student, teachers)
        return joined

    def build(
        self, student: Features, teachers: Sequence[Features], generator: torch.Generator
    ) -> nn.Module | None:
        """Return what its terms learn, by their positions; None: they learn nothing."""
        built = {
            str(index): module
            for index, term in enumerate(self.terms)
            if (module := term.build(student, teachers, generator)) is not None
        }
        return nn.ModuleDict(built) if built else None

    def __call__(
        self,
        student: Features,
        teachers: Sequence[Features],
        batch: Batch,
        *,
        task: Task,
        learned: nn.Module | None = None,
        progress: float = 0.0,
    ) -> Tensor:
        """Return ``weight`` times the sum of the terms."""
        parts = dict(learned.named_children()) if learned is not None else {}
        values = [
            term(
                student,
                teachers,
                batch,
                task=task,
                learned=parts.get(str(index)),
                progress=progress,
            )
            for index, term in enumerate(self.terms)
        ]
        total = values[0]
        for value in values[1:]:
            total = total + value
        return self.weight * total

    def __rmul__(self, factor: float) -> Self:
        """Return the sum of the terms, each with ``factor`` times its weight."""
        weighed = tuple(factor * term for term in self.terms)
        return type(self)(terms=weighed, weight=self.weight)

    __mul__ = __rmul__

    def to_data(self) -> Any:
        """Return what a recipe writes: a list."""
        if self.weight != 1 or len(self.terms) == 1:
            return super().to_data()
        return [term.to_data() for term in self.terms]


def _terms(objective: Objective) -> tuple[Objective, ...]:
    """Return the terms of a plain sum, or the objective alone."""
    if isinstance(objective, Sum) and objective.weight == 1:
        return objective.terms
    return (objective,)
