"""Schedules: how the kept fraction falls from 1 to its goal, and whether pruning is final."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar

from pydantic import Field

from laconic.step import Share, Value

__all__ = ["EPSILON", "Geometric", "Gradual", "Schedule", "Soft"]

# Progress is a quotient: a moment that it misses by rounding has come.
EPSILON = 1e-9


class Schedule(Value, ABC):
    """How the kept fraction falls from 1 to its goal.

    Attributes:
        end: the progress at which the goal is reached.
    """

    end: Share = 1.0

    def keep(self, progress: float, goal: float) -> float:
        """Return the fraction kept at this progress, 0 to 1; exactly ``goal`` from ``end`` on."""
        return goal if self.ended(progress) else self.curve(max(progress / self.end, 0.0), goal)

    def ended(self, progress: float) -> bool:
        """Return whether the goal is reached at this progress."""
        return progress / self.end >= 1 - EPSILON

    @abstractmethod
    def curve(self, t: float, goal: float) -> float:
        """Return the fraction kept at t in [0, 1)."""

    def revives(self, progress: float) -> bool:
        """Return whether what is removed at this progress may come back later."""
        return False


class Gradual(Schedule):
    """Sparsity rises as ``s_f (1 - (1 - t)^power)`` (Zhu and Gupta 2017).

    Attributes:
        power: 3 is the paper's; 1 is linear.

    >>> round(1 - Gradual().keep(0.1, 0.1), 4)
    0.2439
    """

    positional: ClassVar[tuple[str, ...]] = ("power",)

    power: Annotated[float, Field(gt=0)] = 3.0

    def curve(self, t: float, goal: float) -> float:
        """Return 1 - s_f + s_f (1 - t)^power."""
        sparsity = 1 - goal
        return 1 - sparsity * (1 - (1 - t) ** self.power)


class Geometric(Schedule):
    """Every round removes the same share of the survivors: ``keep = goal^t``.

    >>> Geometric().keep(0.5, 0.25)
    0.5
    """

    def curve(self, t: float, goal: float) -> float:
        """Return goal ** t."""
        return float(goal**t)


class Soft(Schedule):
    """Zero what ranks last time and again, and let it learn on (SFP; He et al. 2018).

    The goal is due from the first round on, but until ``end`` nothing is masked: what was
    zeroed is trained with the rest and may rank high the next time. From ``end`` on it is
    removed for good. The paper zeroes once an epoch: as many rounds as epochs.

    >>> Soft().keep(0.1, 0.7), Soft().revives(0.1), Soft().revives(1.0)
    (0.7, True, False)
    """

    def curve(self, t: float, goal: float) -> float:
        """Return the goal."""
        return goal

    def revives(self, progress: float) -> bool:
        """Return True until the end."""
        return not self.ended(progress)
