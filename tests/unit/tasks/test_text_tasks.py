"""Text tasks over texts in memory: lists, tables, labels, values, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.text_tasks import Mean, assert_same, pairs, plain_tokenizer, rows, sentences
from laconic.errors import TaskError
from laconic.recover import Logits, Train
from laconic.step import State, run_step
from laconic.tasks import Task, Texts
from laconic.tasks.task import squared_error
from laconic.tasks.tokens import as_tokenizer


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


def test_a_data_set_of_hugging_face_brings_its_label_names():
    data = table(Columns)
    data.features["label"] = ClassLabel()
    task = Task.from_texts(data, data, plain_tokenizer())
    assert task.classes == ("negative", "positive")
    assert task.test.targets().tolist() == [label for _, label in rows()]


def test_label_names_come_from_test_where_train_has_none():
    data = table(Columns)
    data.features["label"] = ClassLabel()
    alone = Columns(text=sentences())
    task = Task.from_texts(alone, data, plain_tokenizer(), validate=data)
    assert task.classes == ("negative", "positive")


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


def test_values_are_a_regression_without_labels_in_train_too():
    values = [(text, len(text) / 7) for text in sentences(8)]
    task = Task.from_texts(sentences(), values, plain_tokenizer(), validate=values)
    assert task.loss is squared_error and list(task.metrics) == ["pearson", "spearman"]


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
