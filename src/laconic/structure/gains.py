"""Gains: which parts of a network get a second bit, under a budget."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

import torch
from torch import nn

from laconic.budget import knapsack
from laconic.errors import ModelError
from laconic.progress import progress
from laconic.step import Count, State, Value
from laconic.tasks.task import labelled, needed
from laconic.weights.laid import Laid, swap_

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = [
    "Gain",
    "MaximalGain",
    "MeasuredGain",
    "MinimalGain",
    "Part",
    "RandomGain",
    "affordable",
    "put_",
]

# Cells of the table that a knapsack is solved with, a byte each.
CELLS = 1 << 28


@dataclass(frozen=True, eq=False)
class Part:
    """Weights that become ternary together, or stay binary together.

    Attributes:
        binary: name of each weight -> what is laid on it while it is binary.
        ternary: name of each weight -> what is laid on it while it is ternary.
        cost: bytes that a second binary copy of them takes.
    """

    binary: Mapping[str, Laid]
    ternary: Mapping[str, Laid]
    cost: int


def put_(model: nn.Module, laid: Mapping[str, Laid]) -> None:
    """Lay these instead of what is laid on the weights; the latent weights stay."""
    for name, layer in laid.items():
        swap_(model, name, layer)


def affordable(order: Sequence[int], costs: Sequence[int], room: int) -> tuple[int, ...]:
    """Return, ascending, the parts that still fit when they are taken in this order.

    Args:
        order: places in the costs, each once.
        costs: of each part.
        room: largest total cost.

    >>> affordable([2, 0, 1], (2, 3, 4), 6)
    (0, 2)
    """
    taken = []
    for place in order:
        if costs[place] <= room:
            taken.append(place)
            room -= costs[place]
    return tuple(sorted(taken))


class Gain(Value, ABC):
    """Which parts of a binary network become ternary, as many as the budget holds."""

    def check(self, task: Task | None) -> None:
        """Refuse to choose without the data that the choice needs."""

    def abridged(self) -> Gain:
        """Return a choice that spends about as much, and measures nothing."""
        return RandomGain()

    def measured(self, state: State, parts: Sequence[Part]) -> list[float]:
        """Return what each part gains by being ternary, where the choice needs it."""
        return [0.0] * len(parts)

    @abstractmethod
    def order(
        self, gains: Sequence[float], costs: Sequence[int], room: int, generator: torch.Generator
    ) -> Sequence[int]:
        """Return the places of all parts, those to be taken first in front.

        Args:
            gains: of each part.
            costs: of each part, bytes.
            room: bytes to be spent.
            generator: of what is drawn.
        """

    @final
    def chosen(self, state: State, parts: Sequence[Part], room: int) -> tuple[int, ...]:
        """Return the places of the parts that become ternary, ascending.

        Args:
            state: the network, with all parts binary; left so.
            parts: to choose from.
            room: bytes to be spent.
        """
        costs = [part.cost for part in parts]
        order = self.order(self.measured(state, parts), costs, room, state.generator("order"))
        return affordable(order, costs, room)


class RandomGain(Gain):
    """Choose parts at random: the paper's middle baseline (Bai et al. 2021).

    >>> generator = torch.Generator().manual_seed(0)
    >>> sorted(RandomGain().order((0.0, 0.0, 0.0), (1, 1, 1), 2, generator))
    [0, 1, 2]
    """

    def order(
        self, gains: Sequence[float], costs: Sequence[int], room: int, generator: torch.Generator
    ) -> Sequence[int]:
        """Return all places in random order."""
        drawn: list[int] = torch.randperm(len(costs), generator=generator).tolist()
        return drawn


class MeasuredGain(Gain, ABC):
    """A choice by what each part gains when it alone is ternary and all else is binary.

    Every part is scored on the same examples, drawn by the step's seed and not augmented.

    Attributes:
        batches: at most so many; all examples if the split has fewer.
        batch: examples per batch.
        split: where the examples are from.
        by: "metric": the task's first one; "loss": how much it falls, which tells parts apart
            where a binary network predicts no better than by chance.
    """

    batches: Count = 8
    batch: Count = 64
    split: Literal["train", "validate"] = "train"
    by: Literal["metric", "loss"] = "metric"

    def check(self, task: Task | None) -> None:
        """Refuse to run without a task, or with examples that cannot be scored."""
        needed(task, f"{self.name} scores the network with each part ternary")
        if self.split == "train":
            labelled(task, f"{self.name} scores examples of train", "split: validate")

    def measured(self, state: State, parts: Sequence[Part]) -> list[float]:
        """Return u_i >= 0 of every part."""
        sample = self._sample(state)
        before, gains = self._score(state.model, sample), []
        for part in progress(parts, "gains", len(parts)):
            put_(state.model, part.ternary)
            gains.append(max(0.0, self._score(state.model, sample) - before))
            put_(state.model, part.binary)
        return gains

    def _sample(self, state: State) -> Task:
        """Return the task with the examples to be scored for its test."""
        sample = copy.copy(needed(state.task, f"{self.name} needs examples"))
        examples = sample.split(self.split)
        drawn = torch.randperm(len(examples), generator=state.generator("examples"))
        sample.test = examples.subset(drawn[: self.batches * self.batch].tolist())
        return sample

    def _score(self, model: nn.Module, sample: Task) -> float:
        scores = sample.score(model, batch=self.batch)
        found = -scores["loss"] if self.by == "loss" else scores[sample.main_metric]
        if not math.isfinite(found):
            raise ModelError(
                f"{self.name}: the {self.by} of {self.split} is {found}, so no part can be said to "
                "gain; look for such values in the data, or in what the steps before made"
            )
        return found


class MaximalGain(MeasuredGain):
    """Choose the parts that gain most together: adaptive splitting (Bai et al. 2021).

    ``max_s u^T s`` subject to ``c^T s <= C - C_0``, s in {0, 1}, solved exactly as a knapsack;
    what is left of the budget goes to parts without a gain. The gain of part i is
    ``u_i = max(0, metric(all binary but part i ternary) - metric(all binary))`` before any
    training; how the paper measures it is not published.

    >>> MaximalGain().order((0.0, 3.0, 4.0), (1, 5, 6), 6, torch.Generator())
    [2, 1, 0]
    """

    def order(
        self, gains: Sequence[float], costs: Sequence[int], room: int, generator: torch.Generator
    ) -> Sequence[int]:
        """Return the best set that fits, then the others by falling gain."""
        best = knapsack(*_solvable(costs, gains, room))
        return [*best, *sorted(set(range(len(costs))) - {*best}, key=lambda place: -gains[place])]


class MinimalGain(MeasuredGain):
    """Choose the parts that gain least: the paper's lower baseline (Bai et al. 2021).

    Gains are measured as ``MaximalGain`` does.

    >>> MinimalGain().order((0.0, 4.0, 3.0), (1, 5, 6), 6, torch.Generator())
    [0, 2, 1]
    """

    def order(
        self, gains: Sequence[float], costs: Sequence[int], room: int, generator: torch.Generator
    ) -> Sequence[int]:
        """Return all places by rising gain."""
        return sorted(range(len(costs)), key=lambda place: gains[place])


def _solvable(
    costs: Sequence[int], gains: Sequence[float], room: int
) -> tuple[list[int], Sequence[float], int]:
    """Return a knapsack whose table fits in memory: costs are rounded up if they must be."""
    room = min(room, sum(costs))
    grain = math.gcd(*costs) or 1
    if len(costs) * (room // grain) <= CELLS:
        return list(costs), gains, room
    grain = math.ceil(len(costs) * room / CELLS)
    return [math.ceil(cost / grain) for cost in costs], gains, room // grain
