"""A split from the user's own DataLoader, and from whatever else a task is given."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from laconic.errors import TaskError
from laconic.step import derive
from laconic.tasks.split import (
    Batch,
    Split,
    as_arrays,
    as_batch,
    refuse_infinite,
    required,
    tensors_in,
)

__all__ = ["Loader", "as_split"]


class Loader(Split):
    """The user's own DataLoader, seeded before every batch it makes.

    The loader decides batch size and order; ``size`` is ignored. torch's global generator is
    seeded from (seed, epoch, index) around each batch and then restored, and generators of the
    loader's and its samplers' own are seeded once an epoch, so that the law of Split holds; a
    dataset that draws from other generators (``random``, numpy) breaks it. Skipped batches are
    made and dropped. Workers are started for every epoch (``persistent_workers`` would go on where
    they stopped), and what the data set augments is augmented wherever its examples are read.

    Args:
        loader: yields pairs, mappings, inputs alone or whatever ``read`` understands.
        read: from an item of the loader to a Batch.

    Raises:
        TaskError: it is no DataLoader, it yields nothing, or its first batch cannot be read.

    >>> pairs = torch.utils.data.TensorDataset(torch.zeros(10, 2), torch.arange(10))
    >>> len(Loader(DataLoader(pairs, batch_size=4, shuffle=True)))
    10
    """

    def __init__(self, loader: DataLoader[Any], *, read: Callable[[Any], Batch] = as_batch) -> None:
        if not isinstance(loader, DataLoader):
            raise TaskError(
                f"{type(loader).__name__} is no DataLoader; wrap a data set in one, "
                "DataLoader(data, batch_size=32), or a list of whole batches, "
                "DataLoader(batches, batch_size=None), or give arrays to Task.from_arrays"
            )
        self.loader, self.read = loader, read
        first = next(self.batches(1), None)
        if first is None:
            raise TaskError("the DataLoader yields no batch; it needs at least one example")
        self.labelled = first.targets is not None

    def __len__(self) -> int:
        size, dataset = self.loader.batch_size, self.loader.dataset
        # A custom batch sampler leaves `sampler` at its default, the whole data set; a stream has
        # one without a length.
        counted: Any = dataset if isinstance(dataset, IterableDataset) else self.loader.sampler
        try:
            count = len(counted)
        except TypeError as error:
            raise TaskError(
                f"the DataLoader's {type(dataset).__name__} has no length; "
                "use a data set with __len__"
            ) from error
        return count - count % size if self.loader.drop_last and size else count

    @property
    def choosable(self) -> int:
        """Return the number of examples of the data set.

        Raises:
            TaskError: it is a stream, or of a class or with a sampler of its own.
        """
        return len(self._dataset())

    def batch_count(self, size: int) -> int:
        """Return how many batches one epoch has: the loader's own number."""
        return len(self.loader)

    def batches(
        self,
        size: int,
        *,
        seed: int | None = None,
        epoch: int = 0,
        start: int = 0,
        device: str | torch.device = "cpu",
    ) -> Iterator[Batch]:
        """Yield the batches of one epoch; see Split."""
        base = derive(seed or 0, "loader", epoch)
        for generator in self._generators():
            generator.manual_seed(base)
        with _seeded(base):
            items = iter(self._fresh())
        end, number = object(), 0
        while True:
            with _seeded(derive(base, number)):
                item = next(items, end)
            if item is end:
                return
            if number >= start:
                yield self._checked(item, number).to(device)
            number += 1

    def _checked(self, item: Any, number: int) -> Batch:
        """Return the batch that an item is, whose numbers are finite."""
        batch = self.read(item)
        for name, found in (("inputs", batch.inputs), ("targets", batch.targets)):
            for tensor in () if found is None else tensors_in(found):
                refuse_infinite(
                    tensor, f"{name} of the DataLoader's batch {number}, counted from 0,"
                )
        return batch

    def subset(self, index: Sequence[int]) -> Loader:
        """Return the examples at these positions of the loader's data set.

        The last batch is dropped as the loader does, unless it is the only one.

        Raises:
            TaskError: it is a stream, or of a class or with a sampler of its own.
        """
        kept: Any = Subset(self._dataset(), [int(position) for position in index])
        drops = self.loader.drop_last and len(kept) >= (self.loader.batch_size or 1)
        return Loader(self._like(kept, shuffle=self._shuffles, drop_last=drops), read=self.read)

    def plain(self) -> Loader:
        """Return the same examples, the last incomplete batch included."""
        if not self.loader.drop_last or not self._plain_order:
            return self
        whole = self._like(self._dataset(), shuffle=self._shuffles, drop_last=False)
        return Loader(whole, read=self.read)

    def targets(self) -> Tensor:
        """Return the targets of all examples, in order; see Split."""
        ordered = self._like(self._dataset(), shuffle=False, drop_last=False)
        found = Loader(ordered, read=self.read).batches(1)
        return torch.cat([required(batch.targets) for batch in found])

    def _fresh(self) -> DataLoader[Any]:
        """Return the loader; a copy of one that keeps its workers, and one iterator for all."""
        if not self.loader.persistent_workers:
            return self.loader
        fresh = copy.copy(self.loader)
        vars(fresh)["persistent_workers"] = False
        return fresh

    def _generators(self) -> Iterator[torch.Generator]:
        """Yield what the loader, and the samplers inside each other, draw from by themselves."""
        asked: list[Any] = [self.loader, self.loader.sampler, self.loader.batch_sampler]
        seen: set[int] = set()
        while asked:
            each = asked.pop()
            if each is None or id(each) in seen:
                continue
            seen.add(id(each))
            if isinstance(generator := getattr(each, "generator", None), torch.Generator):
                yield generator
            asked.append(getattr(each, "sampler", None))

    @property
    def _shuffles(self) -> bool:
        return isinstance(self.loader.sampler, RandomSampler)

    @property
    def _plain_order(self) -> bool:
        """Return whether every epoch goes through the whole data set, each example once."""
        sampler, dataset = self.loader.sampler, self.loader.dataset
        own = type(self.loader).__iter__ is not DataLoader.__iter__
        if own or isinstance(dataset, IterableDataset) or self.loader.batch_size is None:
            return False
        if isinstance(sampler, RandomSampler) and sampler.replacement:
            return False
        known = isinstance(sampler, RandomSampler | SequentialSampler)
        return known and len(sampler) == len(dataset)  # type: ignore[arg-type]

    def _dataset(self) -> Any:
        if not self._plain_order:
            raise TaskError(
                "examples cannot be chosen from this DataLoader (a stream, or with a sampler or a "
                "class of its own); give validate= yourself, and a DataLoader over a Subset for "
                "few examples"
            )
        return self.loader.dataset

    def _like(self, dataset: Any, *, shuffle: bool, drop_last: bool) -> DataLoader[Any]:
        loader = self.loader
        return DataLoader(
            dataset,
            batch_size=loader.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            pin_memory=loader.pin_memory,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            worker_init_fn=loader.worker_init_fn,
        )


def as_split(value: Any, name: str) -> Split:
    """Return a Split from a Split, a DataLoader or arrays (see as_arrays).

    Args:
        value: what the user gave.
        name: "train", "validate" or "test", for messages.

    Raises:
        TaskError: another kind of value, or data that cannot be used.

    >>> len(as_split((np.zeros((3, 2)), [0, 1, 0]), "train"))
    3
    """
    try:
        if isinstance(value, DataLoader):
            value = Loader(value)
        elif isinstance(value, tuple | Mapping | Tensor | np.ndarray):
            value = as_arrays(value)
    except TaskError as error:
        raise TaskError(f"{name}: {error}") from error
    if not isinstance(value, Split):
        raise TaskError(
            f"{name}: {type(value).__name__} is not data; "
            "give a DataLoader, a pair (inputs, targets) or a Split"
        )
    return value


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # The CPU generator alone: data sets and samplers draw from no other, and it is cheap.
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
