"""Batches of texts: against the tokenizer's own, the law of splits, padding and buckets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from helpers.text_tasks import (
    NAMES,
    assert_same,
    pairs,
    plain_tokenizer,
    rows,
    sentences,
    texts,
    wasted,
)
from laconic.errors import TaskError
from laconic.tasks import Task, Texts
from laconic.tasks.tokens import as_tokenizer


@pytest.mark.parametrize("rows", [sentences(), pairs()], ids=["single", "pair"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": 7},
        {"max_length": 16, "multiple": 8},
        {"max_length": 12, "padding": "max_length"},
    ],
    ids=str,
)
def test_a_batch_is_what_the_tokenizer_itself_makes(rows, options):
    tokenizer = as_tokenizer(plain_tokenizer(), **options)
    data = Texts(rows, range(len(rows)), tokenizer)
    for batch in [*data.batches(8), *data.batches(8, seed=1), *data.any_order(8)]:
        expected = tokenizer.encode_batch([rows[place] for place in batch.targets.tolist()])
        assert list(batch.inputs) == NAMES
        for name, field in zip(NAMES, ("ids", "attention_mask", "type_ids"), strict=True):
            given = batch.inputs[name]
            assert given.dtype == torch.int64
            assert given.tolist() == [getattr(code, field) for code in expected]


def test_storage_is_flat_and_without_padding():
    data = texts()
    assert data.ids.dtype == torch.int32 and data.ids.ndim == 1
    assert len(data.ids) == int(data.lengths.sum()) == sum(len(s.split()) + 2 for s in sentences())


@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_a_batch_is_a_pure_function_of_seed_epoch_and_index(padding):
    data = texts(padding=padding, max_length=14)
    whole = list(data.batches(7, seed=7, epoch=2))
    assert len(whole) == data.batch_count(7) == 8
    for start in (0, 3, 8):
        torch.rand(start)
        again = texts(padding=padding, max_length=14).batches(7, seed=7, epoch=2, start=start)
        assert_same(list(again), whole[start:])
    orders = [
        torch.cat([batch.targets for batch in data.batches(7, seed=seed, epoch=epoch)]).tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


DATA = texts(53)


@given(st.integers(1, 60), st.integers(0, 2**62), st.integers(0, 60), st.integers(0, 9))
def test_every_example_comes_once_and_an_epoch_resumes_anywhere(size, seed, start, epoch):
    whole = list(DATA.batches(size, seed=seed, epoch=epoch))
    found = torch.cat([batch.targets for batch in whole]).tolist()
    assert sorted(found) == list(range(53)) and len(whole) == DATA.batch_count(size)
    assert [len(batch.targets) for batch in whole[:-1]] == [size] * (len(whole) - 1)
    assert_same(list(DATA.batches(size, seed=seed, epoch=epoch, start=start)), whole[start:])


def test_buckets_save_padding_and_still_mix():
    data = texts(800)
    assert wasted(data.any_order(8)) < 0.02
    assert wasted(data.batches(8, seed=0)) < 0.1 < 0.3 < wasted(data.batches(8))
    together = [
        {frozenset(batch.targets.tolist()) for batch in data.batches(8, seed=0, epoch=epoch)}
        for epoch in (0, 1)
    ]
    assert len(together[0] & together[1]) == 0
    widths = [batch.inputs["input_ids"].shape[1] for batch in data.batches(8, seed=0)]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)


def test_batches_leave_the_global_generator_as_found():
    before = torch.get_rng_state()
    list(texts().batches(5, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_examples_come_in_order():
    found = torch.cat([batch.targets for batch in texts().batches(8)])
    assert found.tolist() == list(range(50))


def test_a_padded_batch_can_be_cut_mapped_and_moved():
    (batch,) = texts(4).batches(4)
    first = batch.first(2)
    assert first.targets.tolist() == [0, 1]
    assert all(torch.equal(first.inputs[name], batch.inputs[name][:2]) for name in NAMES)
    moved = batch.to("meta")
    assert list(moved.inputs) == NAMES and all(each.is_meta for each in moved.inputs.values())


def test_the_example_that_costs_are_stated_for_has_the_longest_length():
    data = texts(max_length=32)
    batch = data.example(3)
    assert batch.inputs["input_ids"].shape == (3, 32)
    assert batch.inputs["attention_mask"].sum(dim=1).tolist() == data.lengths[:3].tolist()
    task = Task.from_texts(rows(), rows(), plain_tokenizer(), max_length=24)
    assert task.example_batch(2).inputs["input_ids"].shape == (2, 24)


def test_subsets_share_tokens_and_compose():
    data = texts()
    inner = data.subset(range(10, 20)).subset([1, 3])
    assert inner.targets().tolist() == [11, 13] and len(inner) == 2
    assert inner.ids.data_ptr() == data.ids.data_ptr()
    (batch,) = inner.batches(2)
    assert batch.inputs["attention_mask"].sum(dim=1).tolist() == data.lengths[[11, 13]].tolist()
    with pytest.raises(TaskError, match="no example"):
        data.subset([])


@pytest.mark.parametrize(
    ("given", "targets", "message"),
    [
        (["a", ""], [0, 1], "example 1: the text '' is empty"),
        (["a", " \t"], [0, 1], "example 1: the text .* is empty"),
        ([("a", "b"), ("a", "")], [0, 1], "example 1: the text '' is empty"),
        (["a", None], [0, 1], "example 1, None, is neither a text nor a pair"),
        ([("a", float("nan"))], [0], "example 0: nan is not a text"),
        ([("a", "b", "c")], [0], "is neither a text nor a pair"),
        (["a", "\ud800"], [0, 1], "example 1: .* not Unicode"),
        (["a"], [0, 1], "there are 1 texts and 2 targets"),
        (["a"], [float("nan")], "targets hold 1 NaN"),
        ([], [], "hold no example"),
    ],
)
def test_texts_that_cannot_be_used_are_refused(given, targets, message):
    with pytest.raises(TaskError, match=message):
        Texts(given, targets, as_tokenizer(plain_tokenizer()))


def test_a_text_without_a_token_is_refused():
    tokenizer = plain_tokenizer()
    tokenizer.post_processor = None
    tokenizer.normalizer = normalizers.Replace("good", "")
    with pytest.raises(TaskError, match="example 1, 'good', has no token"):
        Texts(["bad", "good"], [0, 1], as_tokenizer(tokenizer))
