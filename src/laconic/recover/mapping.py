"""Layer maps: which layer of the teacher teaches which layer of the student."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar

from pydantic import Field

from laconic.errors import FeatureError
from laconic.step import Count, Value

__all__ = ["Chosen", "Final", "First", "Last", "LayerMap", "Pairs", "Skip", "Uniform"]

# (layer of the student, layer of the teacher), both counted from 1.
Pairs = tuple[tuple[int, int], ...]


class LayerMap(Value, ABC):
    """Pairs of layers, from how many layers student and teacher have."""

    def pairs(self, student: int, teacher: int) -> Pairs:
        """Return (student's layer, teacher's layer) for every layer that is taught.

        Args:
            student: its layers, M.
            teacher: its layers, N.

        Raises:
            FeatureError: a network has no layers, or a pair is out of range.
        """
        found = self.layers(student, teacher) if student and teacher else ()
        if not found or any(not 1 <= layer <= teacher for _, layer in found):
            raise FeatureError(
                f"{self!r}: {student} layers of the student cannot learn from {teacher} of the "
                f"teacher (pairs {list(found)}); choose another map, or features of modules by "
                "path where a network has no list of blocks"
            )
        return found

    @classmethod
    def shorthand(cls, value: Any) -> tuple[str, Any] | None:
        """Return the meaning of a list of layers: these."""
        return ("chosen", {"teachers": value}) if isinstance(value, (list, tuple)) else None

    @abstractmethod
    def layers(self, student: int, teacher: int) -> Pairs:
        """Return the pairs, which ``pairs`` checks."""


class Uniform(LayerMap):
    """Layer m learns from layer floor(m N / M) (Jiao et al. 2020, TinyBERT).

    >>> Uniform().pairs(4, 12)
    ((1, 3), (2, 6), (3, 9), (4, 12))
    """

    def layers(self, student: int, teacher: int) -> Pairs:
        """Return (m, floor(m N / M))."""
        return tuple((m, m * teacher // student) for m in range(1, student + 1))


class Skip(LayerMap):
    """Layer m learns from layer k m, every k-th (Sun et al. 2019, PKD-Skip).

    Attributes:
        every: k.

    >>> Skip(2).pairs(6, 12)
    ((1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12))
    """

    positional: ClassVar[tuple[str, ...]] = ("every",)

    every: Count = 2

    def layers(self, student: int, teacher: int) -> Pairs:
        """Return (m, k m)."""
        return tuple((m, self.every * m) for m in range(1, student + 1))


class First(LayerMap):
    """Layer m learns from layer m: the lowest M layers.

    >>> First().pairs(2, 12)
    ((1, 1), (2, 2))
    """

    def layers(self, student: int, teacher: int) -> Pairs:
        """Return (m, m)."""
        return tuple((m, m) for m in range(1, student + 1))


class Last(LayerMap):
    """Layer m learns from layer N - M + m, the highest (Sun et al. 2019, PKD-Last).

    >>> Last().pairs(2, 12)
    ((1, 11), (2, 12))
    """

    def layers(self, student: int, teacher: int) -> Pairs:
        """Return (m, N - M + m)."""
        return tuple((m, teacher - student + m) for m in range(1, student + 1))


class Final(LayerMap):
    """Only the last layer learns, from the last layer (MiniLM, DistilBERT).

    >>> Final().pairs(2, 12)
    ((2, 12),)
    """

    def layers(self, student: int, teacher: int) -> Pairs:
        """Return (M, N)."""
        return ((student, teacher),)


class Chosen(LayerMap):
    """One layer of the teacher for each layer, 0 for none (Jiao et al. 2021, ELM).

    Attributes:
        teachers: layers of the teacher, one for each of the student's.

    >>> Chosen((0, 0, 5, 10)).pairs(4, 12)
    ((3, 5), (4, 10))
    """

    positional: ClassVar[tuple[str, ...]] = ("teachers",)

    teachers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]

    def layers(self, student: int, teacher: int) -> Pairs:
        """Return (m, its layer) wherever that is not 0."""
        if len(self.teachers) != student:
            raise FeatureError(
                f"{self!r} has {len(self.teachers)} entries and the student {student} layers; "
                "give one for each, 0 for a layer that is not taught"
            )
        return tuple((m, layer) for m, layer in enumerate(self.teachers, 1) if layer)
