"""The prune step: which weights, channels, heads, neurons survive, at once or bit by bit."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from laconic.errors import ChainError, ModelError, RecipeError, ScopeError
from laconic.step import Count, During, Share, State, Step, inside, run_step
from laconic.structure.axes import Axis
from laconic.structure.criteria import Criterion, Magnitude
from laconic.structure.elements import (
    alive,
    apart,
    axes_of,
    hide_,
    mask_,
    slice_masked_,
    zero_,
)
from laconic.structure.ranking import Over, Ranking, best_elements
from laconic.structure.schedules import EPSILON, Gradual, Schedule
from laconic.weights.laid import latent_of, mask_of, narrow, weights_of
from laconic.weights.representation import full_mask

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["Prune", "survivors"]

logger = logging.getLogger(__name__)

# How often a gradual prune ranks weights during one training, unless told.
MOMENTS = 100

# The axes that each prune step found when it first pruned a network in training: they stay.
_AXES: weakref.WeakKeyDictionary[nn.Module, dict[Prune, Sequence[Axis]]] = (
    weakref.WeakKeyDictionary()
)


class Prune(During):
    """Remove by score: single weights, or whole channels, heads, neurons.

    One-shot (``rounds=1``), iterative (``rounds`` and ``retrain``; Han et al. 2015) or, inside
    ``Train(during=...)``, gradual. Only survivors are ranked, so masks are nested.

    Of weights, exactly round(keep * size) are left in every tensor (or over all of them).

    Of the channels, heads, ... that this step finds, round(keep * size) are left in every axis
    (or over all of them), and no axis loses all. They are found by a forward of two training
    examples, so there must be a task; an axis belongs to the scope if all the matrices and
    kernels that compute it do. Where channels are a product, as in convolutions in groups, its
    largest factor is cut, the inner one of equals, and the others stay. Elements are masked in
    all rounds but the last, in which the network becomes smaller. Training cannot go on with
    other tensors: inside ``Train`` elements are masked, and a ``Prune`` with ``keep=1`` after it
    slices what is masked.

    Attributes:
        scope: modules whose matrices and kernels are pruned, or compute what is pruned.
        axes: what is removed: single "weights", or "channels", "heads", "neurons" or "hidden"
            dimensions.
        keep: fraction left, (0, 1].
        by: the criterion that ranks.
        ranking: "local": the same fraction of each tensor or axis; "global": over all of them;
            ``Ranking``: besides, in multiples.
        schedule: how the fraction falls over rounds or over training; ``Soft``: how what is
            removed may come back.
        rounds: prune-retrain rounds (default 1); inside training, how many times weights are
            removed (default 100).
        retrain: what follows each round; inside training nothing does.

    >>> Prune("weights", keep=0.1)
    Prune('weights', keep=0.1)
    """

    positional: ClassVar[tuple[str, ...]] = ("axes",)

    axes: Literal["weights", "channels", "heads", "neurons", "hidden"]
    keep: Share
    by: Criterion = Magnitude()
    ranking: Over | Ranking = "local"
    schedule: Schedule = Gradual()
    rounds: Count | None = None
    retrain: Step | None = None

    @property
    def settled(self) -> float:
        """Return the progress at which the goal is reached: the first moment at or after it."""
        return math.ceil(self.schedule.end * self._moments - EPSILON) / self._moments

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse a scope without weights or axes, and to keep more than an earlier prune left."""
        self.by.check(task, self.axes)
        if self.axes == "weights":
            self._check_weights(model, earlier)
        else:
            self._check_axes(model, task)
        if self.retrain is not None:
            self.retrain.check(model, task, (*earlier, self))

    def _check_weights(self, model: nn.Module, earlier: tuple[Step, ...]) -> None:
        if self._order.multiple_of > 1:
            raise RecipeError("ranking: multiples are of channels, heads, ...; weights have none")
        weights = weights_of(model, self.scope)
        if not weights:
            raise ScopeError(f"'{self.scope}' selects no weight of two or more dimensions")
        for name, weight in weights.items():
            mask_of(model, name)  # refuses what nothing can be laid on
            if self._order.over == "local":
                self._refuse_none(f"'{name}'", weight.numel())
        self.by.check_weights(model, weights, earlier)
        for step in inside(earlier, Prune):
            if (step.axes, step.scope) != (self.axes, self.scope):
                continue
            if step.keep < self.keep:
                raise ChainError(
                    f"keep {self.keep:g} after an earlier prune of '{self.scope}' that keeps "
                    f"{step.keep:g}: pruned weights do not come back; swap them or lower this one"
                )

    def _check_axes(self, model: nn.Module, task: Task | None) -> None:
        axes = apart(axes_of(model, task, self.axes, self.scope))
        self.by.check_axes(model, axes)
        for axis in axes:
            if self._order.over == "local":
                self._refuse_none(str(axis), axis.size)

    def _refuse_none(self, what: str, size: int) -> None:
        if not round(self.keep * size):
            raise RecipeError(
                f"keep {self.keep:g} of {what} rounds to none; keep more than {0.5 / size:g}, or "
                "leave it out of the scope"
            )

    @property
    def repeats(self) -> int:
        """Return the rounds, in each of which it is retrained."""
        return self.rounds or 1

    def abridged(self, repeats: int = 1) -> tuple[Step, ...]:
        """Return the same in so many rounds, and what the retraining does besides."""
        rounds = min(repeats, self.repeats)
        bare = self.model_copy(update={"rounds": rounds, "retrain": None})
        return (bare, *(() if self.retrain is None else self.retrain.abridged()))

    def apply(self, state: State) -> None:
        """Prune in rounds, retraining after each."""
        for index in state.rounds(self.repeats):
            # A round that is taken up again inside its training has pruned already.
            if not (state.training or state.saved):
                axes = self._axes(state)
                self._prune(state, (index + 1) / self.repeats, axes)
                if axes and index + 1 == self.repeats:
                    self._slice(state, axes)
            if self.retrain is not None:
                run_step(self.retrain, state, key=index)

    def update(self, state: State, progress: float, *, since: float) -> None:
        """Prune to the fraction due at this progress of a training."""
        moment, before = self._moment(progress), self._moment(since)
        found = _AXES.setdefault(state.model, {})
        if not since:  # a training begins
            found.pop(self, None)
        if moment == before:
            return
        if self not in found:
            found[self] = self._axes(state)
        self._prune(state, moment / self._moments, found[self])

    def _moment(self, progress: float) -> int:
        return math.floor(progress * self._moments + EPSILON)

    @property
    def _moments(self) -> int:
        return self.rounds or MOMENTS

    @property
    def _order(self) -> Ranking:
        return self.ranking if isinstance(self.ranking, Ranking) else Ranking(over=self.ranking)

    def _axes(self, state: State) -> Sequence[Axis]:
        """Return the axes to prune; none where single weights are pruned."""
        if self.axes == "weights":
            return ()
        return apart(axes_of(state.model, state.task, self.axes, self.scope))

    def _prune(self, state: State, progress: float, axes: Sequence[Axis] = ()) -> None:
        keep, revives = self.schedule.keep(progress, self.keep), self.schedule.revives(progress)
        if self.axes == "weights":
            self._prune_weights(state, keep, revives=revives)
        else:
            self._prune_axes(state, keep, axes, revives=revives)

    def _prune_weights(self, state: State, keep: float, *, revives: bool) -> None:
        weights = weights_of(state.model, self.scope)
        masks = {n: full_mask(mask_of(state.model, n), weight) for n, weight in weights.items()}
        if not _due(masks, keep, self._order):
            return
        kept = survivors(self.by.scores(state, weights), masks, keep, self._order.over)
        if revives:
            for name, mask in kept.items():
                hide_(latent_of(state.model, name)[1], mask)
            return
        for name, mask in kept.items():
            narrow(state.model, name, mask)
        self.by.compensate_(state, weights, kept)

    def _prune_axes(
        self, state: State, keep: float, axes: Sequence[Axis], *, revives: bool
    ) -> None:
        left = {axis: alive(state.model, axis) for axis in axes}
        if not _due(left, keep, self._order):
            return
        kept = best_elements(self.by.axis_scores(state, axes), left, keep, self._order)
        change = zero_ if revives else mask_
        change(state.model, kept)

    def _slice(self, state: State, axes: Sequence[Axis]) -> None:
        """Take what is masked out of the network."""
        kept = slice_masked_(state.model, axes, multiple_of=self._order.multiple_of)
        left = sum(int(mask.sum()) for mask in kept.values())
        total = sum(mask.numel() for mask in kept.values())
        logger.info("prune: %d of %d %s are left (axes: %d)", left, total, self.axes, len(kept))
        for axis, mask in kept.items():
            logger.debug("prune: %s: %d left", axis, int(mask.sum()))


def _due(masks: Mapping[Any, Tensor], keep: float, ranking: Ranking) -> bool:
    """Return whether more is left than the fraction to keep."""
    sizes = {key: (mask.numel(), int(mask.sum())) for key, mask in masks.items()}
    if ranking.over == "global":
        total, left = (sum(counts) for counts in zip(*sizes.values(), strict=True))
        return round(total * keep) < left
    return any(round(size * keep) < left for size, left in sizes.values())


def survivors(
    scores: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    keep: float,
    ranking: Over,
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
