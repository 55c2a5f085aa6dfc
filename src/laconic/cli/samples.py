"""The first examples of a task, for what need not see all of them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from laconic.tasks.split import Batch, Split, required

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["First", "glance"]


class First(Split):
    """The first examples of every epoch of a split, whichever they are.

    Unlike a subset it asks nothing of the examples but that they come in batches.

    Args:
        split: has at least as many.
        size: examples of a batch, where the split does not decide that.
        batches: how many.
        most: examples of a batch, even of one that the split makes larger; None: all of them.

    >>> from laconic.tasks import digits
    >>> [batch.size for batch in First(digits().test, 20, batches=2).batches(256)]
    [20, 20]
    """

    def __init__(
        self, split: Split, size: int, *, batches: int = 1, most: int | None = None
    ) -> None:
        self.split, self.size, self.count, self.most = split, size, batches, most
        self.normalize, self.labelled = split.normalize, split.labelled

    def __len__(self) -> int:
        return min(len(self.split), self.size * self.count)

    def batches(
        self,
        size: int,
        *,
        seed: int | None = None,
        epoch: int = 0,
        start: int = 0,
        device: str | torch.device = "cpu",
    ) -> Iterator[Batch]:
        """Yield the first batches of one epoch; see Split."""
        size = min(size, self.size)
        drawn = self.split.batches(size, seed=seed, epoch=epoch, start=start, device=device)
        for batch in itertools.islice(drawn, max(self.count - start, 0)):
            yield batch if self.most is None else batch.first(self.most)

    def batch_count(self, size: int) -> int:
        """Return how many batches one epoch has."""
        return min(self.count, self.split.batch_count(min(size, self.size)))

    def example(self, count: int = 1) -> Batch:
        """Return the first examples, as the split shows them."""
        return self.split.example(count)

    def subset(self, index: Sequence[int]) -> Split:
        """Return the examples at these positions of the split."""
        return self.split.subset(index)

    def plain(self) -> First:
        """Return the first examples, never augmented."""
        return First(self.split.plain(), self.size, batches=self.count, most=self.most)

    def targets(self) -> Tensor:
        """Return the targets of these examples, in order."""
        return torch.cat([required(batch.targets) for batch in self.batches(self.size)])


def glance(task: Task) -> Task:
    """Return the task with two examples to score: costs are measured, metrics are not.

    >>> from laconic.tasks import digits
    >>> len(glance(digits()).test)
    2
    """
    small = copy.copy(task)
    small.test = First(task.test, 2, most=2)
    return small
