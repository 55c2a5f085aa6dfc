"""Ranking: how many elements of each axis are left, and which."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from laconic.errors import ModelError
from laconic.step import Count, Value

__all__ = ["Over", "Ranking", "best_elements", "padded"]

Key = TypeVar("Key", bound=Hashable)
Over = Literal["local", "global"]


class Ranking(Value):
    """How elements are chosen from their scores.

    Attributes:
        over: "local": the same fraction of each axis; "global": over all of them.
        multiple_of: of elements that each axis keeps, where hardware asks for it; never more
            than the fraction asked for, and never less than one multiple.

    >>> Ranking("global", multiple_of=8)
    Ranking('global', multiple_of=8)
    """

    positional: ClassVar[tuple[str, ...]] = ("over",)

    over: Over = "local"
    multiple_of: Count = 1

    def count(self, size: int, keep: float) -> int:
        """Return how many of an axis's elements a local ranking keeps.

        >>> Ranking(multiple_of=8).count(64, 0.7), Ranking().count(64, 0.7)
        (40, 45)
        """
        wanted = round(size * keep)
        if wanted >= size:
            return size
        return min(max(wanted // self.multiple_of, 1) * self.multiple_of, size)


def best_elements(
    scores: Mapping[Key, Tensor],
    alive: Mapping[Key, Tensor],
    keep: float,
    ranking: Ranking,
) -> dict[Key, Tensor]:
    """Return the best-scored of what is alive in every axis, bool [size] on the CPU.

    Local: ``ranking.count(size, keep)`` of each axis. Global: round(keep * all) over all axes,
    each keeping at least one multiple. Ties go to the earlier axis and the lower index, so
    counts are exact.

    Args:
        scores: axis -> [size]; larger = keep.
        alive: axis -> bool [size].
        keep: fraction of all elements left.
        ranking: local or global, and in which multiples.

    Raises:
        ModelError: a score is NaN.

    >>> scores = {"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([3.0, 2.0])}
    >>> alive = {axis: torch.tensor([True, True]) for axis in scores}
    >>> found = best_elements(scores, alive, 0.5, Ranking())
    >>> found["a"], found["b"]
    (tensor([False,  True]), tensor([ True, False]))
    """
    ordered = {}
    for axis, score in scores.items():
        if bool(torch.isnan(score).any()):
            raise ModelError(f"the scores of {axis} hold NaN; check the weights and the data")
        plain = score.detach().float().cpu()
        order = torch.sort(plain, descending=True, stable=True).indices
        # What is gone is not ranked.
        order = order[alive[axis][order]]
        ordered[axis] = order, plain[order].tolist()
    if ranking.over == "local":
        counts = {axis: ranking.count(len(score), keep) for axis, score in scores.items()}
    else:
        total = round(keep * sum(len(score) for score in scores.values()))
        ranked = {axis: values for axis, (_, values) in ordered.items()}
        counts = _shared(ranked, total, ranking.multiple_of)
    kept = {}
    for axis, (order, _) in ordered.items():
        kept[axis] = torch.zeros(len(scores[axis]), dtype=torch.bool)
        kept[axis][order[: counts[axis]]] = True
    return kept


def padded(alive: Tensor, multiple_of: int) -> Tensor:
    """Return the elements alive and, up to the next multiple, the first of the others.

    Args:
        alive: bool [size].
        multiple_of: the count that results is one, or the whole axis.

    >>> padded(torch.tensor([False, False, True, True, True]), 4)
    tensor([ True, False,  True,  True,  True])
    """
    missing = max(-(-int(alive.sum()) // multiple_of), 1) * multiple_of - int(alive.sum())
    kept = alive.clone()
    kept[(~alive).nonzero()[:missing, 0]] = True
    return kept


def _shared(ranked: Mapping[Key, list[float]], total: int, multiple: int) -> dict[Key, int]:
    """Return how many of each axis are in the best ``total``, taken in multiples.

    Whole multiples are taken by their mean score and none beyond the total, so the choice does
    not depend on the scores once no more than ``total`` are left.

    Args:
        ranked: axis -> scores, best first.
        total: elements over all axes.
        multiple: elements taken at once.
    """
    counts = {axis: min(multiple, len(values)) for axis, values in ranked.items()}
    left = total - sum(counts.values())
    pieces = [
        (-sum(piece) / len(piece), place, start, axis)
        for place, (axis, values) in enumerate(ranked.items())
        for start in range(multiple, len(values), multiple)
        if (piece := values[start : start + multiple])
    ]
    for _, _, start, axis in sorted(pieces, key=lambda piece: piece[:3]):
        size = min(multiple, len(ranked[axis]) - start)
        # What ranks below a multiple that did not fit stays out with it.
        if counts[axis] == start and size <= left:
            counts[axis] += size
            left -= size
    return counts
