"""Feeding rules: what a part of the teacher and a part of the student see while one learns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from laconic.step import UpToOne, Value

__all__ = ["Cross", "Feed", "Mixed", "Mixture", "SoftCross", "Student", "Teacher"]


@dataclass(frozen=True)
class Mixture:
    """One term of a loss: ``w ||f_T(a h_T + (1-a) h_S) - f_S((1-b) h_T + b h_S)||^2``.

    ``h_T`` and ``h_S`` are what enters the part in the teacher and in the student, ``f_T`` and
    ``f_S`` are the part itself in both.

    Attributes:
        weight: w, of the term.
        teacher: a, the share of ``h_T`` in what the teacher's part is fed.
        student: b, the share of ``h_S`` in what the student's part is fed.

    >>> Mixture(1.0, teacher=0.75, student=1.0)
    Mixture(weight=1.0, teacher=0.75, student=1.0)
    """

    weight: float
    teacher: float
    student: float


def mixed(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Return ``share * first + (1 - share) * second``; where the two are equal, exactly them."""
    if share in (0, 1):
        return first if share else second
    return torch.lerp(second, first, share)


class Feed(Value, ABC):
    """What parts of the teacher and the student are fed while the student's learns."""

    @abstractmethod
    def mixtures(self, progress: float) -> tuple[Mixture, ...]:
        """Return the terms of the loss at this progress of a part's training, 0 to 1."""

    @property
    def settled(self) -> float:
        """Return the progress from which the terms stay the same."""
        return 0.0


class Student(Feed):
    """Feed each side its own: ``||w_T h_T - w_S h_S||^2``.

    The student learns the clean answer from what it will see: layer-wise regression, REM, MREM.

    >>> Student().mixtures(0.0)
    (Mixture(weight=1.0, teacher=1.0, student=1.0),)
    """

    def mixtures(self, progress: float) -> tuple[Mixture, ...]:
        """Return the one term."""
        return (Mixture(1.0, teacher=1.0, student=1.0),)


class Teacher(Feed):
    """Feed both the teacher's: ``||w_T h_T - w_S h_T||^2``.

    Parts do not depend on each other, nor on their order.

    >>> Teacher().mixtures(0.0)
    (Mixture(weight=1.0, teacher=1.0, student=0.0),)
    """

    def mixtures(self, progress: float) -> tuple[Mixture, ...]:
        """Return the one term."""
        return (Mixture(1.0, teacher=1.0, student=0.0),)


class Mixed(Feed):
    """Feed by teacher forcing that fades (Bai et al. 2022, MREM).

    The student is fed ``l h_T + (1-l) h_S`` with ``l = start * max(1 - progress / end, 0)``, the
    teacher its own.

    Attributes:
        start: the teacher's share at first.
        end: the progress at which it has become 0; 0: it is 0 from the beginning.

    >>> [1 - Mixed(end=0.5).mixtures(t / 8)[0].student for t in range(6)]
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    positional: ClassVar[tuple[str, ...]] = ("start", "end")

    start: UpToOne = 1.0
    end: UpToOne = 0.5

    def mixtures(self, progress: float) -> tuple[Mixture, ...]:
        """Return the one term, whose shares change."""
        left = 0.0 if progress >= self.end else 1 - progress / self.end
        return (Mixture(1.0, teacher=1.0, student=1 - self.start * left),)

    @property
    def settled(self) -> float:
        """Return when the student is fed its own alone."""
        return self.end


class Cross(Feed):
    """Feed by cross distillation: correction and imitation (Bai et al. 2020, CD).

    ``c ||w_T h_T - w_S h_T||^2 + (1-c) ||w_T h_S - w_S h_S||^2``.

    Attributes:
        correction: c; the rest is imitation. The paper takes 0.6 for VGG and 0.9 for ResNets.

    >>> [(each.weight, each.teacher, each.student) for each in Cross(0.75).mixtures(0.0)]
    [(0.75, 1.0, 0.0), (0.25, 0.0, 1.0)]
    """

    positional: ClassVar[tuple[str, ...]] = ("correction",)

    correction: UpToOne = 0.6

    def mixtures(self, progress: float) -> tuple[Mixture, ...]:
        """Return correction and imitation, without one whose weight is 0."""
        terms = (Mixture(self.correction, 1.0, 0.0), Mixture(1 - self.correction, 0.0, 1.0))
        return tuple(term for term in terms if term.weight)


class SoftCross(Feed):
    """Feed both sides a mixture: soft cross distillation (Bai et al. 2020, SCD).

    ``||w_T (a h_T + (1-a) h_S) - w_S ((1-b) h_T + b h_S)||^2``. With (1, 1) it is ``Student``,
    with (1, 0) ``Teacher``, with (0, 1) pure imitation.

    Attributes:
        teacher: a, the share of its own that the teacher is fed.
        student: b, the share of its own that the student is fed.

    >>> SoftCross(0.9, 0.8).mixtures(0.0)
    (Mixture(weight=1.0, teacher=0.9, student=0.8),)
    """

    positional: ClassVar[tuple[str, ...]] = ("teacher", "student")

    teacher: UpToOne = 0.9
    student: UpToOne = 0.9

    def mixtures(self, progress: float) -> tuple[Mixture, ...]:
        """Return the one term."""
        return (Mixture(1.0, teacher=self.teacher, student=self.student),)
