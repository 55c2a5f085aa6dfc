"""Text tasks: batches against the tokenizer's own, the law of splits, GLUE files, refusals."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

from laconic.cli.shared import task_of
from laconic.errors import MissingExtra, TaskError
from laconic.recover import AdamW, Logits, Train
from laconic.ship import save
from laconic.step import State, run_step
from laconic.tasks import Batch, Task, Texts, accuracy, read_glue, task_from_dict, tokenizer_of
from laconic.tasks.glue_files import TASKS, glue_name
from laconic.tasks.task import call_model, cross_entropy, squared_error
from laconic.tasks.tokens import as_tokenizer

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a the good bad film was never dull very . \" ' ##s".split()
NAMES = ["input_ids", "attention_mask", "token_type_ids"]


def plain_tokenizer():
    """Return a small tokenizer of BERT's kind."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer


def sentences(count=50, seed=0):
    """Return texts of 1 to 12 words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 13, (count,), generator=generator).tolist()
    words = WORDS[5:14]
    picks = [torch.randint(len(words), (n,), generator=generator).tolist() for n in lengths]
    return [" ".join(words[number] for number in pick) for pick in picks]


def pairs(count=50):
    return list(zip(sentences(count), sentences(count, seed=1), strict=True))


def texts(count=50, **options):
    return Texts(sentences(count), range(count), as_tokenizer(plain_tokenizer(), **options))


def wasted(batches):
    """Return the share of padding."""
    masks = [batch.inputs["attention_mask"] for batch in batches]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def assert_same(one, other):
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert torch.equal(left.targets, right.targets)
        assert all(torch.equal(left.inputs[name], right.inputs[name]) for name in NAMES)


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


# Tokenizers


def test_the_given_tokenizer_stays_as_it_is():
    tokenizer = plain_tokenizer()
    tokenizer.enable_padding(length=99, pad_id=4, pad_token="[MASK]")
    before = tokenizer.to_str()
    prepared = as_tokenizer(tokenizer, max_length=20)
    Texts(["a"], [0], prepared)
    assert tokenizer.to_str() == before
    assert prepared.padding["length"] is None and prepared.padding["pad_id"] == 4
    assert prepared.truncation["max_length"] == 20


def saved(folder, tokenizer=None, **settings):
    folder.mkdir(exist_ok=True)
    (tokenizer or plain_tokenizer()).save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_every_kind_of_tokenizer_gives_the_same_inputs(tmp_path):
    from transformers import BertTokenizer

    folder = saved(tmp_path / "new", pad_token="[PAD]")
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.txt").write_text("\n".join(WORDS))
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 64}
    (old / "tokenizer_config.json").write_text(json.dumps(settings))
    sources = [
        *(plain_tokenizer(), folder, str(folder), folder / "tokenizer.json", old),
        BertTokenizer.from_pretrained(old),
    ]
    prepared = [as_tokenizer(source, max_length=10) for source in sources]
    one, *others = [next(Texts(pairs(), range(50), each).batches(50)) for each in prepared]
    for other in others:
        assert_same([other], [one])


def test_the_padding_token_is_the_folders_own(tmp_path):
    for named in ("[MASK]", {"content": "[MASK]", "special": True}):
        assert as_tokenizer(saved(tmp_path, pad_token=named)).padding["pad_id"] == 4
    assert as_tokenizer(plain_tokenizer()).padding["pad_id"] == 0


def without_padding():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (plain_tokenizer(), {"max_length": 3}, "leaves no room beside 3 special tokens"),
        (plain_tokenizer(), {"max_length": 0}, "max_length 0 must be a number of tokens"),
        (plain_tokenizer(), {"max_length": "64"}, "max_length '64' must be"),
        (plain_tokenizer(), {"max_length": True}, "max_length True must be"),
        (plain_tokenizer(), {"multiple": 0}, "multiple 0 must be"),
        (plain_tokenizer(), {"max_length": 30, "multiple": 8}, "30 is no multiple of 8"),
        (plain_tokenizer(), {"padding": "longst"}, "'longst' is not known; did you mean 'longest'"),
        (without_padding(), {}, "has no padding token"),
        (3, {}, "int is no tokenizer that can be stored"),
        ("nowhere", {}, "nowhere is not there; give the folder of a Hugging Face model"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused(source, options, message):
    with pytest.raises(TaskError, match=message):
        as_tokenizer(source, **options)


def test_a_folder_with_a_damaged_tokenizer_is_refused(tmp_path):
    with pytest.raises(TaskError, match=r"tokenizer.json is not there"):
        as_tokenizer(tmp_path)
    saved(tmp_path, model_max_length=32)
    with pytest.raises(TaskError, match="max_length 64 is above the 32 tokens"):
        as_tokenizer(tmp_path, max_length=64)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TaskError, match=r"tokenizer_config.json: no JSON"):
        as_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    for content in (b'{"version": "1.0"', b"\xff\xfe", b"{}"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(TaskError, match=r"tokenizer.json: cannot be read"):
            as_tokenizer(tmp_path)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(MissingExtra, match=r"pip install '\.\[hf\]'"):
        tokenizer_of(b"{}")


def rows(count=40):
    """Return sentences and whether they hold the word good."""
    return [(sentence, int("good" in sentence)) for sentence in sentences(count)]


def test_the_tokenizer_travels_with_the_task():
    task = Task.from_texts(rows(), rows(), plain_tokenizer(), max_length=9)
    again = Task.from_texts(rows(), rows(), plain_tokenizer(), max_length=9)
    assert task.tokenizer == again.tokenizer and isinstance(task.tokenizer, bytes)
    coder = tokenizer_of(task.tokenizer)
    batch = next(task.test.batches(8))
    codes = coder.encode_batch([text for text, _ in rows()[:8]])
    assert batch.inputs["input_ids"].tolist() == [code.ids for code in codes]
    assert task.few(total=4).tokenizer == task.tokenizer
    other = Task.from_texts(rows(), rows(), plain_tokenizer(), max_length=10)
    assert task.describe() == again.describe() != other.describe()
    assert json.loads(json.dumps(task.describe())) == task.describe()
    with pytest.raises(TaskError, match=r"no tokenizer.json"):
        tokenizer_of(b"[1, 2]")


# Tasks over texts in memory


class Columns:
    """What a data set of Hugging Face offers: columns by name, and features with label names."""

    def __init__(self, **columns):
        self.columns, self.features = columns, dict.fromkeys(columns)

    @property
    def column_names(self):
        return list(self.columns)

    def __getitem__(self, name):
        return iter(self.columns[name])


class Frame(dict):
    """What a data frame offers."""

    @property
    def columns(self):
        return self.keys()


class ClassLabel:
    names = ("negative", "positive")


def table(kind):
    columns = {
        "idx": list(range(40)),
        "text": [text for text, _ in rows()],
        "label": [label for _, label in rows()],
    }
    return kind(columns) if kind in (dict, Frame) else kind(**columns)


@pytest.mark.parametrize("kind", [dict, Frame, Columns])
def test_tables_are_read_by_their_columns(kind):
    task = Task.from_texts(table(kind), table(kind), plain_tokenizer())
    listed = Task.from_texts(rows(), rows(), plain_tokenizer())
    assert_same(list(task.test.batches(8)), list(listed.test.batches(8)))
    named = Task.from_texts(
        table(kind), table(kind), plain_tokenizer(), columns=("text", "text", "label")
    )
    assert int(named.test.lengths.sum()) > int(task.test.lengths.sum())


def test_a_data_set_of_hugging_face_brings_its_label_names():
    data = table(Columns)
    data.features["label"] = ClassLabel()
    task = Task.from_texts(data, data, plain_tokenizer())
    assert task.classes == ("negative", "positive")
    assert task.test.targets().tolist() == [label for _, label in rows()]


def test_pairs_and_named_labels():
    train = [("a film", "the film", "yes"), ("bad", "good", "no"), ("a", "a", "yes")] * 4
    task = Task.from_texts(train, train[:2], plain_tokenizer(), validate=train[:1])
    assert task.classes == ("no", "yes") and task.test.targets().tolist() == [1, 0]
    assert next(task.test.batches(2)).inputs["token_type_ids"].sum() == 5
    assert (len(task.train), len(task.validate), len(task.test)) == (12, 1, 2)
    other = Task.from_texts(train, train, plain_tokenizer(), classes=("yes", "no"))
    assert other.test.targets()[:2].tolist() == [0, 1] and other.main_metric == "accuracy"


def test_values_are_a_regression():
    values = [(text, len(text) / 7) for text, _ in rows()]
    whole = [(text, len(text)) for text, _ in rows()]
    task = Task.from_texts(values, whole, plain_tokenizer())
    assert list(task.metrics) == ["pearson", "spearman"] and task.classes == ()
    assert task.loss is squared_error
    assert task.test.targets().dtype == torch.float32
    scores = task.score(Mean(1))
    assert scores.keys() == {"pearson", "spearman", "loss"} and -1 <= scores["pearson"] <= 1
    assert len(task.few(total=5).train) == 5
    with pytest.raises(TaskError, match="values have no classes to draw from; give total="):
        task.few(per_class=1)


def test_few_examples_of_texts():
    task = Task.from_texts(rows(80), rows(), plain_tokenizer())
    few = task.few(per_class=3, seed=1)
    assert few.train.targets().bincount().tolist() == [3, 3]
    assert set(task.few(per_class=2, seed=1).drawn) < set(few.drawn)
    assert len(few.validate) == len(task.validate) == 4
    assert len(list(few.train.batches(4, seed=0))) == 2


ALONE = {
    "texts": sentences(),
    "texts without a label": [(text, None) for text in sentences()],
    "mappings": [{"text": text} for text in sentences()],
    "table": {"text": sentences(), "idx": list(range(50))},
}


@pytest.mark.parametrize("given", ALONE.values(), ids=ALONE)
def test_training_texts_may_be_without_labels(given):
    task = Task.from_texts(given, rows(), plain_tokenizer(), validate=rows(8), max_length=16)
    assert not task.train.labelled and len(task.train) == 50 and task.classes == ("0", "1")
    listed = Texts(sentences(), range(50), as_tokenizer(plain_tokenizer(), max_length=16))
    for batch, other in zip(task.train.batches(8, seed=1), listed.batches(8, seed=1), strict=True):
        assert batch.targets is None and torch.equal(batch.index, other.index)
        assert torch.equal(batch.inputs["input_ids"], other.inputs["input_ids"])
    assert len(task.few(total=7).train) == 7
    assert json.loads(json.dumps(task.describe())) == task.describe()
    with pytest.raises(TaskError, match="the batches have no targets"):
        task.train.targets()
    with pytest.raises(TaskError, match="label reads targets, and the training examples of task"):
        Train().check(Mean(2), task)
    network = Mean(2)
    Train(Logits()).check(network, task)
    before = network.head.weight.clone()
    run_step(Train(Logits(), batch=8), State(network, task, teacher=(Mean(2),)))
    assert not torch.equal(network.head.weight, before)


PAIRS = [("good film", "bad film", "no"), ("film", "a film", "yes")] * 4


@pytest.mark.parametrize(
    "given",
    [
        pairs(),
        [(*pair, None) for pair in pairs()],
        {"sentence1": sentences(), "sentence2": sentences(50, seed=1)},
        [{"premise": one, "hypothesis": other} for one, other in pairs()],
    ],
    ids=["pairs", "pairs without a label", "table", "mappings"],
)
def test_training_pairs_may_be_without_labels(given):
    task = Task.from_texts(given, PAIRS, plain_tokenizer(), validate=PAIRS)
    assert not task.train.labelled and task.classes == ("no", "yes")
    (batch,) = task.train.batches(50)
    expected = as_tokenizer(plain_tokenizer()).encode_batch(pairs())
    assert batch.inputs["input_ids"].tolist() == [e.ids for e in expected]


def test_values_are_a_regression_without_labels_in_train_too():
    values = [(text, len(text) / 7) for text in sentences(8)]
    task = Task.from_texts(sentences(), values, plain_tokenizer(), validate=values)
    assert task.loss is squared_error and list(task.metrics) == ["pearson", "spearman"]


def test_a_table_may_be_a_list_of_mappings():
    listed = [{"text": text, "label": label} for text, label in rows()]
    task = Task.from_texts(listed, listed, plain_tokenizer())
    wanted = Task.from_texts(rows(), rows(), plain_tokenizer())
    assert_same(list(task.test.batches(8)), list(wanted.test.batches(8)))
    named = [{"review": text, "kind": label} for text, label in rows()]
    alone = [{"review": text} for text, _ in rows()]
    task = Task.from_texts(
        alone, named, plain_tokenizer(), validate=named, columns=("review", "kind")
    )
    assert not task.train.labelled and task.test.labelled


def test_label_names_come_from_test_where_train_has_none():
    data = table(Columns)
    data.features["label"] = ClassLabel()
    alone = Columns(text=sentences())
    task = Task.from_texts(alone, data, plain_tokenizer(), validate=data)
    assert task.classes == ("negative", "positive")


BAD_ROWS = [
    ("text", "train: str is no data; give a list"),
    (3, "train: int is no data"),
    ([], "train: there is no example"),
    (["only text"], "train: the texts have no labels.* give validate="),
    ([("a", 0), ("a",)], r"train: example 1, \('a',\), has no label; only training examples may"),
    ([("a", 0), 3], r"train: example 1, 3, is not \(text, label\)"),
    ([("a", "b", "c", 0)], r"train: example 0, .* is not \(text, label\)"),
    ([("a", 0), ("", 1)], "train: example 1: the text '' is empty"),
    ([("a", 0), (float("nan"), 1)], "train: example 1: nan is not a text"),
    ([("a", 0.5), ("a", float("nan"))], "train: the label of example 1 is nan"),
    ([("a", 0), ("a", None)], "train: example 1, .* has no label; .* and then all of them"),
    ([("a", 0), ("a", "yes")], "train: labels are int, str"),
    ([("a", [1]), ("a", [1, 2])], "train: labels are list"),
    ([("a", -1), ("a", 0)], "train: label -1"),
    ({"text": ["a", "b"]}, r"train: the texts have no labels.* columns=\(text, label\)"),
    ({"words": ["a"], "label": [0]}, "train: which of the columns words, label are text and"),
    ({"text": ["a", "b"], "label": [0]}, "train: there are 2 texts and 1 targets"),
]


@pytest.mark.parametrize(("data", "message"), BAD_ROWS)
def test_data_that_cannot_be_used_are_refused(data, message):
    with pytest.raises(TaskError, match=message):
        Task.from_texts(data, rows(), plain_tokenizer())


@pytest.mark.parametrize(
    ("test", "options", "message"),
    [
        ([("a", "maybe")], {}, "test: label 'maybe' of example 0 is not one of no, yes"),
        ([("a", 1)], {}, "names in one split and numbers in another"),
        ([("a", "no")], {"classes": ["no"]}, "train: label 'yes' of example 0 is not one of no"),
        ({"text": ["a"], "label": ["no"]}, {"columns": ("txt", "label")}, "did you mean 'text'"),
        ({"text": ["a"], "label": ["no"]}, {"columns": ("label",)}, "must name one or two texts"),
        ({"text": ["a"], "label": ["no"]}, {"columns": "ab"}, "must name one or two texts"),
        (["a"], {}, "test: example 0, .* has no label; only training examples may be without"),
        ([("a", None)], {}, "test: example 0, .* has no label"),
        ({"text": ["a"]}, {}, "test: which of the columns text are text and label"),
        ([], {}, "test: there is no example"),
        ([("a", "no")], {"validate": ["a", "b"]}, "validate: example 0, .* has no label"),
        ([{"text": "a", "label": "no"}, {"text": "a"}], {}, "test: example 1, .* has no label"),
    ],
)
def test_splits_that_do_not_belong_together_are_refused(test, options, message):
    train = [("a", "yes"), ("bad", "no")] * 3
    with pytest.raises(TaskError, match=message):
        Task.from_texts(train, test, plain_tokenizer(), **options)


# How a batch becomes a call


class Mean(nn.Module):
    """The mean embedding of a text's tokens, and a line of outputs."""

    def __init__(self, outputs):
        super().__init__()
        self.embedding, self.head = nn.Embedding(len(WORDS), 8), nn.Linear(8, outputs)

    def forward(self, input_ids, attention_mask):
        hidden = self.embedding(input_ids) * attention_mask[..., None]
        return self.head(hidden.sum(dim=1) / attention_mask.sum(dim=1, keepdim=True))


class Echo(nn.Module):
    def forward(self, **inputs):
        return {"names": tuple(inputs)}


class Answers(nn.Module):
    def forward(self, input_ids, token_type_ids):
        return {"loss": None, "logits": input_ids + token_type_ids}


def test_named_inputs_fit_the_network():
    batch = Batch({"input_ids": torch.ones(1, 2), "token_type_ids": torch.ones(1, 2)})
    assert call_model(Echo(), batch) == {"names": ("input_ids", "token_type_ids")}
    assert call_model(Answers(), batch).tolist() == [[2, 2]]
    assert list(batch.inputs) == ["input_ids", "token_type_ids"]
    data = texts()
    (whole,) = data.batches(50)
    assert call_model(Mean(2), whole).shape == (50, 2)  # takes no token_type_ids
    with pytest.raises(TypeError, match="attention_mask"):
        call_model(Answers(), whole)  # nothing else is ever left out


def test_scores_do_not_depend_on_padding_or_order():
    task = Task.from_texts(rows(), rows(), plain_tokenizer(), max_length=16)
    fixed = Task.from_texts(rows(), rows(), plain_tokenizer(), max_length=16, padding="max_length")
    model = Mean(2)
    outputs = torch.cat([model(**code(text)) for text, _ in rows()]).detach()
    labels = torch.tensor([label for _, label in rows()])
    expected = {
        "accuracy": accuracy(outputs, labels),
        "loss": float(cross_entropy(outputs, Batch((), labels))),
    }
    # Sums of padded and of shorter rows differ in the last bits of float32.
    assert task.score(model, batch=7) == pytest.approx(expected, rel=1e-5)
    assert fixed.score(model, batch=7) == pytest.approx(expected, rel=1e-5)
    assert 0 < expected["accuracy"] < 1


def code(text):
    encoded = plain_tokenizer().encode(text)
    ids = torch.tensor([encoded.ids])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_networks_of_transformers_answer_with_logits(kind):
    import transformers

    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8, num_labels=2,
        )  # fmt: skip
        model = transformers.BertForSequenceClassification(config)
    else:
        config = transformers.DistilBertConfig(
            vocab_size=len(WORDS), dim=8, n_layers=1, n_heads=2, hidden_dim=8, num_labels=2
        )
        model = transformers.DistilBertForSequenceClassification(config)
    task = Task.from_texts(rows(), rows(), plain_tokenizer())
    scores = task.score(model.eval())
    logits = torch.cat([model(**code(text)).logits for text, _ in rows()]).detach()
    labels = torch.tensor([label for _, label in rows()])
    assert scores["loss"] == pytest.approx(
        float(cross_entropy(logits, Batch((), labels))), rel=1e-4
    )


def test_an_answer_without_logits_is_refused():
    task = Task.from_texts(rows(), rows(), plain_tokenizer())
    with pytest.raises(TaskError, match="the model returns dict, not a tensor"):
        task.score(Echo())


def test_training_on_texts_learns_and_repeats():
    task = Task.from_texts(rows(200), rows(200), plain_tokenizer())
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        states.append(State(Mean(2), task))
        run_step(Train(epochs=8, batch=16, optimizer=AdamW(lr=0.05)), states[-1])
    assert task.score(states[0].model)["accuracy"] > 0.95
    for one, other in zip(*(state.model.parameters() for state in states), strict=True):
        assert torch.equal(one, other)


# GLUE files

PAIR = "index\tsentence1\tsentence2\tlabel\n"
SCORED = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
FILES = {
    "CoLA": ("", "gj04\t{1}\t*\tthe film was never dull\n", ("0", "1")),
    "MNLI": (
        "premise\thypothesis\tlabel\n",
        "the film\ta film\t{}\n",
        ("neutral", "entailment", "contradiction"),
    ),
    "MRPC": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n",
        '{}\t1\t2\the said "good\tgood\n',
        ("1", "0"),
    ),
    "QNLI": (
        "index\tquestion\tsentence\tlabel\n",
        "0\twas the film good\tnever\t{}\n",
        ("not_entailment", "entailment"),
    ),
    "QQP": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n",
        "\t\t\twas the film good\twas a film bad\t{}\n",
        ("0", "1"),
    ),
    "RTE": (PAIR, "0\tthe film\ta film\t{}\n", ("entailment", "not_entailment")),
    "SST-2": ("sentence\tlabel\n", "the film was never dull \t{}\n", ("0", "1")),
    "STS-B": (SCORED, "0\tg\tf\t2012\t1\tn\tn\tgood film\tbad film\t{}\n", ("2.500", "5.000")),
    "WNLI": (PAIR, "0\tthe film\ta film\t{}\n", ("0", "1")),
}
FILES["CoLA"] = ("", "gj04\t{}\t*\tthe film was never dull\n", ("0", "1"))


def glue_folder(root, name, files=("train.tsv", "dev.tsv"), times=4, change=lambda text: text):
    """Write the files of a GLUE task and return their folder."""
    folder = root / name
    folder.mkdir(exist_ok=True)
    header, line, labels = FILES[name]
    text = change(header + "".join(line.format(label) for label in labels) * times)
    for file in files:
        content = text.encode()
        (folder / file).write_bytes(gzip.compress(content) if file.endswith(".gz") else content)
    return folder


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", ["tsv", "tsv.gz"])
def test_every_task_is_read_as_it_is_published(tmp_path, name, suffix):
    folder = glue_folder(tmp_path, name, (f"train.{suffix}", f"dev.{suffix}"))
    task = Task.from_glue(folder, plain_tokenizer(), max_length=32)
    count = 4 * len(FILES[name][2])
    assert (len(task.train) + len(task.validate), len(task.test)) == (count, count)
    assert task.name == name and list(task.metrics) == list(TASKS[name].metrics)
    wanted = [
        task.classes.index(label) if task.classes else float(label) for label in FILES[name][2]
    ]
    assert task.test.targets()[: len(wanted)].tolist() == wanted
    two = name not in ("CoLA", "SST-2")
    assert bool(next(task.test.batches(2)).inputs["token_type_ids"].any()) == two
    model = Mean(max(1, len(task.classes)))
    assert task.score(model).keys() == {*TASKS[name].metrics, "loss"}
    assert torch.isfinite(
        task.loss(call_model(model, task.example_batch(4)), task.example_batch(4))
    )


def test_main_metrics_and_label_orders_are_the_official_ones(tmp_path):
    mains = {name: next(iter(layout.metrics)) for name, layout in TASKS.items()}
    assert mains.pop("CoLA") == "matthews" and mains.pop("STS-B") == "pearson"
    assert set(mains.values()) == {"accuracy"}
    assert "f1" in TASKS["MRPC"].metrics and "f1" in TASKS["QQP"].metrics
    folder = glue_folder(tmp_path, "MNLI")
    task = Task.from_glue(folder, plain_tokenizer())
    assert task.classes == ("entailment", "neutral", "contradiction")
    order = ["contradiction", "entailment", "neutral"]
    other = Task.from_glue(folder, plain_tokenizer(), classes=order)
    assert other.classes == tuple(order)
    assert task.test.targets()[:3].tolist() == [1, 0, 2]
    assert other.test.targets()[:3].tolist() == [2, 1, 0]
    with pytest.raises(TaskError, match="are not its labels; give"):
        Task.from_glue(folder, plain_tokenizer(), classes=["yes", "no", "maybe"])


def test_files_are_found_in_the_documented_order(tmp_path):
    folder = glue_folder(tmp_path, "MNLI", ("train_subset.tsv.gz", "dev_matched.tsv"), times=3)
    glue_folder(tmp_path, "MNLI", ("dev_mismatched.tsv.gz", "heldout_subset.tsv"), times=2)
    sizes = [
        len(Task.from_glue(folder, plain_tokenizer(), **options).test)
        for options in (
            {},
            {"test": "dev_mismatched"},
            {"test": "dev_mismatched.tsv.gz"},
            {"test": "heldout_subset"},
        )
    ]
    assert sizes == [9, 6, 6, 6]
    given = Task.from_glue(folder, plain_tokenizer(), validate="heldout_subset")
    assert (len(given.train), len(given.validate)) == (9, 6)
    glue_folder(tmp_path, "MNLI", ("train.tsv", "dev.tsv"), times=1)
    task = Task.from_glue(folder, plain_tokenizer())
    assert (len(task.train) + len(task.validate), len(task.test)) == (3, 3)


def test_names_of_tasks_are_read_kindly(tmp_path):
    for name in ("SST-2", "sst2", "Sst_2"):
        assert glue_name(Path("x") / name) == "SST-2"
    folder = glue_folder(tmp_path, "SST-2").rename(tmp_path / "films")
    assert Task.from_glue(folder, plain_tokenizer(), name="sst-2").name == "SST-2"
    with pytest.raises(TaskError, match=r"no task is called 'films'; choose one of: CoLA.*name="):
        Task.from_glue(folder, plain_tokenizer())
    with pytest.raises(TaskError, match="no task is called 'SST-3'; did you mean 'SST-2'"):
        Task.from_glue(folder, plain_tokenizer(), name="SST-3")


def read(tmp_path, name, content, file="dev.tsv"):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_glue(folder / file)


def test_a_file_reads_texts_by_its_own_tokenizer(tmp_path):
    """On the command line, where ``--task`` names none."""
    folder, file = glue_folder(tmp_path, "SST-2"), tmp_path / "model.safetensors"
    task = Task.from_glue(folder, plain_tokenizer(), max_length=32)
    save(nn.Embedding(4, 2), file, task=task)
    found = task_of(f"{{glue: {folder}, max_length: 32}}", file)
    assert found.describe() == task.describe()
    save(nn.Embedding(4, 2), file)
    with pytest.raises(TaskError, match="needs a tokenizer"):
        task_of(f"{{glue: {folder}}}", file)


def test_line_ends_marks_and_quotes_are_taken_literally(tmp_path):
    content = '\ufeffsentence\tlabel\r\n"good\t1\r\na\u2028b\x85c" \t0\r\n\r\n'
    texts, labels = read(tmp_path, "SST-2", content)
    assert texts == [('"good',), ('a\u2028b\x85c" ',)] and labels == [1, 0]
    # No line feed after the last line.
    assert read(tmp_path, "SST-2", "sentence\tlabel\ngood\t1")[0] == [("good",)]


def test_official_variants_of_columns_are_known(tmp_path):
    official = "index\tsentence1_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
    line = "0\t(a)\tthe film\ta film\tneutral\tentailment\n"
    assert read(tmp_path, "MNLI", official + line) == ([("the film", "a film")], [0])
    bare = "captions\tf\t2012\t1\t3.600\tgood\tbad\ncaptions\tf\t2012\t1\t0\ta\tb\tleft\tright\n"
    assert read(tmp_path, "STS-B", bare) == ([("good", "bad"), ("a", "b")], [3.6, 0.0])


SENTENCE = "sentence\tlabel\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("SST-2", SENTENCE + "good\t1\na\tb\t0\n", r"dev.tsv:3: 3 columns instead of 2 \(a tab"),
        ("SST-2", SENTENCE + "good\t1\n\nbad\t0\n", "dev.tsv:3: 1 columns instead of 2"),
        ("SST-2", SENTENCE + "good\t1\n \t0\n", "dev.tsv:3: an empty text"),
        ("SST-2", SENTENCE + "good\t2\n", "dev.tsv:2: label '2' is not one of 0, 1"),
        ("SST-2", "sentence\tlabl\ngood\t1\n", "dev.tsv:1: no column 'label'"),
        ("SST-2", SENTENCE, "dev.tsv: no example; the file is empty"),
        ("SST-2", "", "dev.tsv:1: no column 'sentence'; the first line is ''"),
        ("SST-2", SENTENCE.encode() + b"good\t1\n\xff\xfe\t0\n", "dev.tsv:3: not UTF-8"),
        ("CoLA", "gj04\t1\t\tgood\ngj04\t1\tgood\n", "dev.tsv:2: 3 columns instead of 4"),
        ("CoLA", "gj04\tx\t\tgood\n", "dev.tsv:1: label 'x' is not one of 0, 1"),
        ("CoLA", "index\tsentence\n0\tgood\n", "dev.tsv:1: no column 'label'"),
        ("RTE", PAIR + "0\ta\tb\t1\n", "dev.tsv:2: label '1' is not one of entailment, not_ent"),
        ("RTE", PAIR + "0\ta\t\tentailment\n", "dev.tsv:2: an empty text"),
        ("RTE", "index\tsentence1\tlabel\n", "dev.tsv:1: no column 'sentence2'"),
        ("STS-B", SCORED + "0\tg\tf\t1\t1\tn\tn\ta\tb\tnan\n", "score 'nan' is not a number from"),
        ("STS-B", SCORED + "0\tg\tf\t1\t1\tn\tn\ta\tb\t5.1\n", "score '5.1' is not a number from"),
        ("STS-B", SCORED + "0\tg\tf\t1\t1\tn\tn\ta\tb\thigh\n", "score 'high' is not a number"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_its_line(tmp_path, name, content, message):
    with pytest.raises(TaskError, match=message):
        read(tmp_path, name, content)


def test_the_broken_lines_of_the_official_qqp_are_left_out(tmp_path, caplog):
    header, line, _ = FILES["QQP"]
    lines = [line.format(1)] * 300
    lines[100], lines[200] = (
        "7\t8\t9\thalf a question\n",
        line.format(1).replace("was a film bad", ""),
    )
    with caplog.at_level(logging.WARNING):
        texts, labels = read(tmp_path, "QQP", header + "".join(lines))
    assert len(texts) == len(labels) == 298
    assert "2 broken lines are left out" in caplog.text
    lines[:5] = ["7\t8\n"] * 5
    with pytest.raises(TaskError, match=r"dev.tsv:5: 2 columns instead of 6"):
        read(tmp_path, "QQP", header + "".join(lines))


UNLABELLED = {
    "SST-2": "sentence\n" + "the film was never dull\n" * 5,
    "CoLA": "index\tsentence\n" + "3\tthe film was never dull\n" * 5,
    "MRPC": "#1 String\t#2 String\n" + 'he said "good\tgood\n' * 5,
    "STS-B": "sentence1\tsentence2\n" + "good film\tbad film\n" * 5,
}


@pytest.mark.parametrize("name", UNLABELLED)
def test_a_training_file_may_be_without_labels(tmp_path, name):
    folder = glue_folder(tmp_path, name, ("dev.tsv", "held.tsv"))
    (folder / "texts.tsv").write_text(UNLABELLED[name])
    saved(tmp_path / "bert")
    line = {"glue": name, "train": "texts", "validate": "held", "tokenizer": "bert"}
    task = task_from_dict(line, base=tmp_path)
    assert not task.train.labelled and len(task.train) == 5
    whole = Task.from_glue(folder, plain_tokenizer(), train="held", validate="held")
    ids = [each.example_batch(1).inputs["input_ids"].tolist() for each in (task, whole)]
    assert ids[0] == ids[1]
    assert task.describe()["classes"] == whole.describe()["classes"]
    assert len(task_from_dict(line | {"few": {"total": 3}}, base=tmp_path).train) == 3
    with pytest.raises(TaskError, match=r"train: .* no targets.*give validate="):
        task_from_dict(line | {"validate": None}, base=tmp_path)
    for part in ("test", "validate"):
        with pytest.raises(TaskError, match=r"texts.tsv:1: no column .*only training examples "):
            task_from_dict(line | {part: "texts"}, base=tmp_path)
    assert read_glue(folder / "texts.tsv", unlabelled=True)[1] is None


def test_damaged_and_missing_files_are_refused(tmp_path):
    folder = glue_folder(tmp_path, "SST-2", ("train.tsv.gz", "dev.tsv.gz"))
    whole = (folder / "train.tsv.gz").read_bytes()
    for content in (whole[:-12], whole[:20] + b"xxxx" + whole[24:], b"sentence\tlabel\ngood\t1\n"):
        (folder / "train.tsv.gz").write_bytes(content)
        with pytest.raises(TaskError, match=r"train.tsv.gz: cannot be read .*download it again"):
            Task.from_glue(folder, plain_tokenizer())
    (folder / "train.tsv.gz").unlink()
    with pytest.raises(TaskError, match=r"no file for train; .*dev.tsv.gz is there; name one with"):
        Task.from_glue(folder, plain_tokenizer())
    (folder / "train.tsv.gz").write_bytes(whole)
    with pytest.raises(TaskError, match="no file for test; nothing-like-it"):
        Task.from_glue(folder, plain_tokenizer(), test="nothing-like-it")
    with pytest.raises(TaskError, match="no such folder"):
        Task.from_glue(tmp_path / "CoLA", plain_tokenizer())


def test_a_recipe_names_folder_and_tokenizer(tmp_path):
    glue_folder(tmp_path, "SST-2")
    saved(tmp_path / "bert")
    forms = [
        {"glue": {"path": "SST-2", "tokenizer": "bert", "max_length": 16}},
        {"glue": "SST-2", "tokenizer": "bert", "max_length": 16},
    ]
    one, other = (task_from_dict(form, base=tmp_path) for form in forms)
    lent = task_from_dict(
        {"glue": "SST-2", "max_length": 16}, base=tmp_path, tokenizer=tmp_path / "bert"
    )
    assert one.describe() == other.describe() == lent.describe() and one.name == "SST-2"
    assert one.example_batch().inputs["input_ids"].shape == (1, 16)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"glue": "SST-2"}, "SST-2 needs a tokenizer; name the folder of the model"),
        ({"glue": {}}, "glue: 'path' is missing"),
        ({"glue": "SST-2", "max_len": 16}, "'max_len' is not an option; did you mean 'max_length'"),
        ({"glue": "SST-2", "tokenizer": 3}, "'tokenizer' must be a path, got 3"),
        ({"glue": "SST-2", "tokenizer": "no"}, "no/tokenizer.json is not there|no is not there"),
        ({"glue": "SST-2", "tokenizer": "bert", "max_length": "64"}, "max_length '64' must be"),
    ],
)
def test_a_recipe_line_that_is_wrong_is_refused(tmp_path, spec, message):
    glue_folder(tmp_path, "SST-2")
    saved(tmp_path / "bert")
    with pytest.raises(TaskError, match=message):
        task_from_dict(spec, base=tmp_path)


# Examples of the official files, and of the subsets kept beside them.
COUNTS = {
    "CoLA": {"train": 8551, "dev": 1043},
    "MNLI": {"train_subset": 19625, "dev_matched": 9815, "dev_mismatched_1000": 1000},
    "MRPC": {"train": 3668, "dev": 408, "msr_paraphrase_test-labeled": 1725},
    "QNLI": {"train_subset": 9999, "dev": 5463},
    "QQP": {"train_subset": 27388, "heldout_subset": 4000},
    "RTE": {"train": 2490, "dev": 277},
    "SST-2": {"train": 67349, "dev": 872, "test-labeled": 1821},
    "STS-B": {"train": 5749, "dev": 1500, "stsbenchmark-test-labeled": 1379},
    "WNLI": {"train": 635, "dev": 71},
}


@pytest.mark.parametrize("name", COUNTS)
def test_real_files_have_their_examples(laconic_data, name):
    folder = laconic_data / "glue" / name
    found = {stem: len(read_glue(folder / f"{stem}.tsv.gz")[0]) for stem in COUNTS[name]}
    assert found == COUNTS[name]


def test_a_real_task_with_a_real_tokenizer(laconic_data):
    source = laconic_data / "encoder_minilm_l6_h384"
    task = Task.from_glue(laconic_data / "glue" / "MRPC", source)
    assert task.describe()["examples"] == {"train": 3485, "validate": 183, "test": 408}
    assert task.test.targets().bincount().tolist() == [129, 279]
    assert wasted(task.train.batches(32, seed=0)) < 0.05 < 0.3 < wasted(task.train.batches(32))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("bert", {}, ""),
        (
            "bert",
            {"max_position_embeddings": 7},
            "may have 8 tokens .* places for 7; give max_length: 7",
        ),
        ("bert", {"vocab_size": 3}, "gives token .* knows 3, counted from 0"),
        ("bert", {"num_labels": 2}, ""),
        ("bert", {"num_labels": 3}, "has 3 outputs and .* has 2 classes; .* num_labels: 2"),
        ("bert", {"id2label": {0: "LABEL_0", 1: "LABEL_1"}}, ""),
        ("bert", {"id2label": {0: "1", 1: "0"}}, r"in the order 1, 0 .* classes: \[1, 0\]"),
        ("roberta", {"max_position_embeddings": 10, "pad_token_id": 1}, ""),
        ("roberta", {"max_position_embeddings": 9, "pad_token_id": 1}, "places for 7"),
    ],
)
def test_a_network_that_cannot_read_the_texts_is_refused(kind, fields, message):
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            plain = {"vocab_size": 1000, "max_position_embeddings": 8, "model_type": kind}
            self.config = SimpleNamespace(**(plain | fields))

    rows = [("a good film", 1), ("a bad film", 0)] * 4
    task = Task.from_texts(rows, rows, plain_tokenizer(), validate=rows, max_length=8)
    task.check(torch.nn.Linear(1, 1))  # says nothing of itself
    with pytest.raises(TaskError, match=message) if message else contextlib.nullcontext():
        task.check(Network())
