"""Networks on text tasks: how a batch becomes a call, scores, training, refusals."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers.text_tasks import WORDS, Mean, plain_tokenizer, rows, texts
from laconic.errors import TaskError
from laconic.recover import AdamW, Train
from laconic.step import State, run_step
from laconic.tasks import Batch, Task, accuracy
from laconic.tasks.task import call_model, cross_entropy


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


def code(text):
    encoded = plain_tokenizer().encode(text)
    ids = torch.tensor([encoded.ids])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


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
