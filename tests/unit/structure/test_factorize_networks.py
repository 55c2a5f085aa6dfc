"""Factorize on whole networks: image networks and BERT run with every layer split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from helpers.factorize import DATA, images
from laconic.models import resnet, vgg
from laconic.scope import Scope
from laconic.step import State, run_step
from laconic.structure.factorization import Factorization
from laconic.structure.factorize import Factorize
from laconic.structure.kernels import CP, DepthwiseSeparable, Separable, Tucker2
from laconic.structure.matrices import SVD, BlockDiagonal, BlockTerm, Embedding, TensorTrain
from laconic.structure.surgery import edits_of
from laconic.tasks import Task


@pytest.mark.parametrize(
    "method",
    [SVD(), Tucker2(sweeps=1), CP(sweeps=1), Separable(), DepthwiseSeparable(), BlockDiagonal()],
    ids=repr,
)
@pytest.mark.parametrize("build", [lambda: resnet(8), lambda: vgg("small")], ids=["resnet", "vgg"])
def test_image_networks_run_with_every_layer_split(method: Factorization, build: Any) -> None:
    model = build().eval()
    first = next(name for name, part in model.named_modules() if isinstance(part, nn.Conv2d))
    scope = f"kind:conv, !{first}"
    before = sum(p.numel() for p in model.parameters())
    run_step(Factorize(method, scope=Scope(scope)), State(model))
    assert sum(p.numel() for p in model.parameters()) < 0.6 * before
    assert bool(model(images(2, 3, 32, 32)).isfinite().all())


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def text_task() -> Task:
    tokens = torch.randint(0, 64, (12, 7), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 3
    data = (tokens, labels)
    return Task(data, data, data, call=lambda model, batch: model(input_ids=batch.inputs[0]).logits)


@pytest.mark.parametrize(
    "method",
    [SVD(), DATA, TensorTrain(4), BlockTerm(2, sweeps=1), BlockDiagonal(2, order="energy")],
    ids=repr,
)
def test_bert_runs_with_every_linear_layer_split(method: Factorization) -> None:
    model = bert()
    step = Factorize(method, scope=Scope("kind:linear, !classifier"))
    state = State(model, text_task())
    step.check(model, state.task)
    run_step(step, state)
    assert len(edits_of(model)["modules"]) == 2 * 6 + 1
    tokens = text_task().train.plain().batches(4)
    assert state.task.call(model, next(tokens)).shape == (4, 3)


def test_bert_runs_with_a_factorized_embedding() -> None:
    model, data = bert(), text_task()
    run_step(Factorize(Embedding(4), scope=Scope("*.word_embeddings")), State(model, data))
    table, wide = model.bert.embeddings.word_embeddings
    assert (table.weight.shape, wide.weight.shape) == ((64, 4), (16, 4))
    assert table.padding_idx == 0
    assert data.call(model, data.example_batch(2)).shape == (2, 3)
