"""Splits of a task: the law of batches, over arrays and over loaders."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from laconic.errors import TaskError
from laconic.tasks import Arrays, Batch, Loader, Normalize, PadCropFlip, Task
from laconic.tasks.split import as_batch, map_tensors, to_float


class Noisy(Dataset):
    """A data set that draws from torch's global generator, as transforms do."""

    def __len__(self):
        return 23

    def __getitem__(self, position):
        return torch.rand(2) + position, position % 3


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(2), 0)] * 5)


def images(count=23, side=8):
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=generator)
    return pixels.to(torch.uint8)


def split(kind):
    if kind == "arrays":
        return Arrays(images(), torch.arange(23), augment=PadCropFlip(2), normalize=((0.5,), (1,)))
    generator = torch.Generator() if kind == "loader with its own generator" else None
    workers = 1 if "worker" in kind else 0
    kept = {"persistent_workers": kind == "loader that keeps its worker"}
    own = {"generator": torch.Generator()}
    if kind == "loader whose sampler has its own":
        weighted = WeightedRandomSampler([1.0] * 23, 23, **own)
        return Loader(DataLoader(Noisy(), 5, sampler=weighted))
    if kind == "loader whose batches have one":
        drawn = BatchSampler(RandomSampler(range(23), **own), 5, drop_last=False)
        return Loader(DataLoader(Noisy(), batch_sampler=drawn))
    loader = DataLoader(Noisy(), 5, shuffle=True, generator=generator, num_workers=workers, **kept)
    return Loader(loader)


def assert_same(one, other):
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert torch.equal(left.targets, right.targets)
        assert torch.equal(left.inputs[0], right.inputs[0])


KINDS = ["arrays", "loader", "loader with its own generator", "loader with a worker"]
KINDS += [
    "loader that keeps its worker",
    "loader whose sampler has its own",
    "loader whose batches have one",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_a_pure_function_of_seed_epoch_and_index(kind):
    data = split(kind)
    whole = list(data.batches(5, seed=7, epoch=2))
    assert len(whole) == data.batch_count(5) == 5
    for start in (0, 3, 5):
        torch.rand(start)  # what the loop draws in between must not matter
        rest = []
        for batch in split(kind).batches(5, seed=7, epoch=2, start=start):
            torch.rand(1)
            rest.append(batch)
        assert_same(rest, whole[start:])


@pytest.mark.parametrize("kind", KINDS[:2])
def test_seed_and_epoch_change_the_batches(kind):
    data = split(kind)
    orders = [
        torch.cat([batch.targets for batch in data.batches(5, seed=seed, epoch=epoch)]).tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])


@pytest.mark.parametrize("kind", KINDS)
def test_batches_leave_the_global_generator_as_found(kind):
    before = torch.get_rng_state()
    list(split(kind).batches(5, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(0, 2**62), st.integers(0, 40), st.integers(0, 9))
def test_resuming_anywhere_continues_the_epoch(size, seed, start, epoch):
    data = split("arrays")
    whole = list(data.batches(size, seed=seed, epoch=epoch))
    assert_same(list(data.batches(size, seed=seed, epoch=epoch, start=start)), whole[start:])
    assert sorted(torch.cat([batch.targets for batch in whole]).tolist()) == list(range(23))


# -- arrays ---------------------------------------------------------------------------------------


def test_without_a_seed_examples_come_in_order_and_unaugmented():
    data = split("arrays")
    batches = list(data.batches(10))
    assert torch.cat([batch.targets for batch in batches]).tolist() == list(range(23))
    expected = images().float() / 255 - 0.5
    assert torch.equal(torch.cat([batch.inputs[0] for batch in batches]), expected)


def test_augmentation_changes_training_batches_only_where_it_is_set():
    data = Arrays(images(), torch.arange(23), augment=PadCropFlip(2))
    (augmented,) = data.batches(23, seed=0)
    (plain,) = data.plain().batches(23, seed=0)
    assert torch.equal(augmented.targets, plain.targets)
    assert not torch.equal(augmented.inputs[0], plain.inputs[0])
    order = augmented.targets
    assert torch.equal(plain.inputs[0], images()[order].float() / 255)


def test_to_float_follows_its_formula():
    pixels = images(4)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    result = to_float(pixels, Normalize((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    expected = (pixels.float() / 255 - mean[:, None, None]) / std[:, None, None]
    assert torch.equal(result, expected)
    values = torch.rand(4, 3)
    assert torch.equal(to_float(values, Normalize((0.5,), (2.0,))), (values - 0.5) / 2)
    tokens = torch.arange(6).reshape(2, 3)
    assert to_float(tokens) is tokens


@pytest.mark.parametrize(
    ("normalize", "message"),
    [
        (((0.5, 0.5), (1.0, 1.0)), "2 values for inputs of shape"),
        (((0.5,), (0.0,)), "std above zero"),
        (((0.5,), (1.0, 1.0)), "mean has 1 values and std 2"),
        (((float("nan"),), (1.0,)), "must be finite"),
    ],
)
def test_normalize_is_checked(normalize, message):
    with pytest.raises(TaskError, match=message):
        Arrays(images(), torch.arange(23), normalize=normalize)


def test_subsets_share_memory_and_compose():
    data = split("arrays")
    inner = data.subset(range(10, 20)).subset([1, 3])
    assert inner.targets().tolist() == [11, 13]
    assert inner.inputs.data_ptr() == data.inputs.data_ptr()
    assert inner.normalize == data.normalize
    with pytest.raises(TaskError, match="no example"):
        data.subset([])


def test_map_tensors_keeps_structure():
    nested = {"a": [torch.ones(2), ("b", torch.zeros(3))]}
    result = map_tensors(lambda tensor: tensor.numel(), nested)
    assert result == {"a": [2, ("b", 3)]}


# -- loaders --------------------------------------------------------------------------------------


def test_a_loader_reads_pairs_mappings_and_tensors():
    assert as_batch((1, 2, torch.ones(1))).inputs == (1, 2)
    named = as_batch({"x": torch.zeros(2), "label": torch.ones(2)})
    assert list(named.inputs) == ["x"] and named.targets.sum() == 2
    assert as_batch(torch.ones(1)).targets is None
    assert as_batch([torch.ones(1)]).inputs == (torch.ones(1),)
    batch = Batch((), torch.ones(1))
    assert as_batch(batch) is batch
    with pytest.raises(TaskError, match="yields str, not"):
        as_batch("text")


def test_a_loader_counts_chooses_and_lists_its_examples():
    loader = Loader(DataLoader(Noisy(), 5, shuffle=True, drop_last=True))
    assert (len(loader), loader.batch_count(99)) == (20, 4)
    assert loader.targets().tolist() == [position % 3 for position in range(23)]
    assert sorted(loader.subset([1, 2, 5]).targets().tolist()) == [1, 2, 2]


def pairs_by_class():
    """Return 1,000 pairs of two classes, the second after the first."""
    return TensorDataset(torch.randn(1000, 2), (torch.arange(1000) >= 512).long())


def test_a_loader_that_drops_its_last_batch_is_held_out_of_as_a_whole():
    loader = DataLoader(pairs_by_class(), 512, shuffle=True, drop_last=True)
    task = Task.from_loaders(loader, DataLoader(pairs_by_class(), 256))
    kept = torch.cat([task.train.targets(), task.validate.targets()])
    assert kept.bincount().tolist() == [512, 488] and len(task.validate.targets()) == 50
    assert (len(task.train), task.train.batch_count(512)) == (512, 1)  # as the loader drops
    assert sum(batch.size for batch in task.validate.batches(512)) == 50  # nothing to drop
    assert sum(batch.size for batch in task.train.plain().batches(512)) == 950
    assert set(task.few(total=900).train.targets().tolist()) == {0, 1}


@pytest.mark.parametrize("options", [{"replacement": True}, {"num_samples": 128}])
def test_a_loader_that_samples_in_its_own_way_needs_validate(options):
    data = pairs_by_class()
    loader = DataLoader(data, 64, sampler=RandomSampler(data, **options), drop_last=True)
    with pytest.raises(TaskError, match=r"a sampler or a class of its own.*give validate="):
        Task.from_loaders(loader, loader)
    task = Task.from_loaders(loader, loader, DataLoader(data, 64))
    assert next(task.train.plain().batches(64)).size == 64


class Scaled(DataLoader):
    def __iter__(self):
        return ((inputs / 100, targets) for inputs, targets in super().__iter__())


def test_a_loader_of_a_class_or_over_a_part_is_taken_as_it_is():
    data = pairs_by_class()
    for loader in (
        Scaled(data, 64, drop_last=True),
        DataLoader(data, 64, sampler=SequentialSampler(range(50))),
    ):
        with pytest.raises(TaskError, match="give validate= yourself"):
            Task.from_loaders(loader, loader)
        kept = Task.from_loaders(loader, loader, loader).train
        assert kept.plain() is kept


def test_a_stream_may_know_its_length():
    class Counted(Stream):
        def __len__(self):
            return 7

    assert len(Loader(DataLoader(Counted(), 2))) == 7


@pytest.mark.parametrize("place", ["inputs", "targets"])
def test_a_loader_says_which_of_its_batches_is_broken(place):
    found = {"inputs": torch.zeros(10, 2), "targets": torch.zeros(10)}
    found[place][7] = float("nan")
    loader = Loader(DataLoader(TensorDataset(*found.values()), 4))
    with pytest.raises(TaskError, match=f"{place} of the DataLoader's batch 1, .* in example 3;"):
        list(loader.batches(4))


def test_a_stream_has_no_length_and_needs_validate():
    stream = DataLoader(Stream(), 2)
    with pytest.raises(TaskError, match="Stream has no length"):
        len(Loader(stream))
    with pytest.raises(TaskError, match=r"a stream, .*; give validate= yourself"):
        Task(stream, stream)
    task = Task(stream, stream, stream)
    assert task.score(nn.Linear(2, 2), "validate").keys() == {"accuracy", "loss"}
