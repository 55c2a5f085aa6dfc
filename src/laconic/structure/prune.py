"""The prune step: which weights survive, at once, in rounds or while training."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from laconic.errors import ChainError, ModelError, ScopeError
from laconic.step import During, State, Step, Value, run_step
from laconic.structure.criteria import Criterion, Magnitude
from laconic.weights.laid import mask_of, narrow, weights_of

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["Geometric", "Gradual", "Prune", "Schedule", "survivors"]

logger = logging.getLogger(__name__)

# How often a gradual prune ranks weights during one training, unless told.
MOMENTS = 100
# Progress is a quotient: a moment that it misses by rounding has come.
_EPSILON = 1e-9

Share = Annotated[float, Field(gt=0, le=1)]


class Schedule(Value, ABC):
    """How the kept fraction falls from 1 to its goal.

    Attributes:
        end: the progress at which the goal is reached.
    """

    end: Share = 1.0

    def keep(self, progress: float, goal: float) -> float:
        """Return the fraction kept at this progress, 0 to 1; exactly ``goal`` from ``end`` on."""
        t = progress / self.end
        return goal if t >= 1 - _EPSILON else self.curve(max(t, 0.0), goal)

    @abstractmethod
    def curve(self, t: float, goal: float) -> float:
        """Return the fraction kept at t in [0, 1)."""


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


class Prune(During):
    """Remove weights by score: masked now, absent from the file.

    One-shot (``rounds=1``), iterative (``rounds`` and ``retrain``; Han et al. 2015) or, inside
    ``Train(during=...)``, gradual. Only survivors are ranked, so masks are nested. In every
    tensor (or over all of them) exactly round(keep * size) weights are left.

    Attributes:
        scope: modules whose matrices and kernels are pruned.
        axes: what is removed: single weights.
        keep: fraction left, (0, 1].
        by: the criterion that ranks.
        ranking: "local": the same fraction of each tensor; "global": over all of them.
        schedule: how the fraction falls over rounds or over training.
        rounds: prune-retrain rounds (default 1); inside training, how many times weights are
            removed (default 100).
        retrain: what follows each round; inside training nothing does.

    >>> Prune("weights", keep=0.1)
    Prune('weights', keep=0.1)
    """

    positional: ClassVar[tuple[str, ...]] = ("axes",)

    axes: Literal["weights"]
    keep: Share
    by: Criterion = Magnitude()
    ranking: Literal["local", "global"] = "local"
    schedule: Schedule = Gradual()
    rounds: Annotated[int, Field(ge=1)] | None = None
    retrain: Step | None = None

    @property
    def settled(self) -> float:
        """Return the progress at which the goal is reached: the first moment at or after it."""
        return math.ceil(self.schedule.end * self._moments - _EPSILON) / self._moments

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse a scope without weights, and to keep more than an earlier prune left."""
        weights = weights_of(model, self.scope)
        if not weights:
            raise ScopeError(f"'{self.scope}' selects no weight of two or more dimensions")
        for name in weights:
            mask_of(model, name)  # refuses what nothing can be laid on
        for step in _with_nested(earlier):
            if isinstance(step, Prune) and step.scope == self.scope and step.keep < self.keep:
                raise ChainError(
                    f"keep {self.keep:g} after an earlier prune of '{self.scope}' that keeps "
                    f"{step.keep:g}: pruned weights do not come back; swap them or lower this one"
                )
        self.by.check(task)
        if self.retrain is not None:
            self.retrain.check(model, task, (*earlier, self))

    def apply(self, state: State) -> None:
        """Prune in rounds, retraining after each."""
        rounds = self.rounds or 1
        for index in state.rounds(rounds):
            self._prune(state, (index + 1) / rounds)
            if self.retrain is not None:
                run_step(self.retrain, state, key=index)

    def update(self, state: State, progress: float) -> None:
        """Prune to the fraction due at this progress of a training."""
        reached = math.floor(progress * self._moments + _EPSILON)
        if reached:
            self._prune(state, reached / self._moments)

    @property
    def _moments(self) -> int:
        return self.rounds or MOMENTS

    def _prune(self, state: State, progress: float) -> None:
        weights = weights_of(state.model, self.scope)
        masks = {name: _mask(state.model, name, weight) for name, weight in weights.items()}
        keep = self.schedule.keep(progress, self.keep)
        if self.ranking == "global":
            total = sum(weight.numel() for weight in weights.values())
            alive = sum(int(mask.sum()) for mask in masks.values())
            due = round(total * keep) < alive
        else:
            due = any(round(w.numel() * keep) < int(masks[n].sum()) for n, w in weights.items())
        if due:
            scores = self.by.scores(state, weights)
            for name, mask in survivors(scores, masks, keep, self.ranking).items():
                narrow(state.model, name, mask)


def _with_nested(steps: Iterable[Step]) -> Iterator[Step]:
    """Yield the steps and every step that is a field of theirs, such as what retrains."""
    for step in steps:
        yield step
        for value in dict(step).values():
            inner = value if isinstance(value, tuple) else (value,)
            yield from _with_nested(item for item in inner if isinstance(item, Step))


def _mask(model: nn.Module, name: str, weight: Tensor) -> Tensor:
    mask = mask_of(model, name)
    return torch.ones_like(weight, dtype=torch.bool) if mask is None else mask


def survivors(
    scores: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    keep: float,
    ranking: Literal["local", "global"],
) -> dict[str, Tensor]:
    """Return the new masks: the best-scored round(keep * size) of what is alive.

    Ties go to the lower index, so counts are exact.

    Args:
        scores: name -> score per weight [its shape]; larger = keep.
        masks: name -> bool [its shape], what is alive.
        keep: fraction of all weights left.
        ranking: within each tensor, or over all of them.

    Raises:
        ModelError: a score is NaN.
    """
    ranked = {}
    for name, score in scores.items():
        if bool(torch.isnan(score).any()):
            raise ModelError(
                f"prune: the scores of '{name}' hold NaN; check the weights and the data"
            )
        ranked[name] = torch.where(masks[name], score.detach().float(), -torch.inf).flatten()
    groups = [list(ranked)] if ranking == "global" else [[name] for name in ranked]
    kept: dict[str, Tensor] = {}
    for names in groups:
        joined = torch.cat([ranked[name] for name in names])
        alive = int((joined > -torch.inf).sum())
        best = torch.sort(joined, descending=True, stable=True).indices
        chosen = torch.zeros(joined.numel(), dtype=torch.bool, device=joined.device)
        chosen[best[: min(round(joined.numel() * keep), alive)]] = True
        for name, part in zip(names, chosen.split([ranked[n].numel() for n in names]), strict=True):
            kept[name] = part.reshape(scores[name].shape)
            if not bool(part.any()):
                logger.warning("prune: nothing is left of '%s'", name)
    return kept
