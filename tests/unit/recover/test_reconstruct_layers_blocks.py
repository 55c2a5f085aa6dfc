"""Reconstruction of layers inside blocks: reached from the block before, or shared by several."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from helpers.reconstruct_layers import FAST, layer, state_of
from laconic.models import resnet
from laconic.recover import Cross, Gradient, LeastSquares, ProximalWeights, Reconstruct, Student
from laconic.recover.inflow import Inflow
from laconic.recover.layers import fitted_layers
from laconic.recover.stream import Stored
from laconic.scope import Scope
from laconic.step import State, run_step
from laconic.tasks import Task


def bert() -> nn.Module:
    """Return a BERT of two layers with a head, of random weights."""
    transformers = pytest.importorskip("transformers", reason="encoders need transformers")
    config = transformers.BertConfig(
        hidden_size=8,
        num_attention_heads=2,
        intermediate_size=16,
        num_hidden_layers=2,
        vocab_size=20,
        num_labels=3,
        initializer_range=0.5,
    )
    network: nn.Module = transformers.BertForSequenceClassification(config).eval()
    return network


def texts() -> Task:
    """Return a task whose texts are padded."""
    tokens = torch.randint(1, 20, (24, 6))
    mask = (torch.arange(6) < torch.randint(2, 7, (24, 1))).long()
    items = [
        {"input_ids": ids, "attention_mask": kept, "labels": torch.tensor(index % 3)}
        for index, (ids, kept) in enumerate(zip(tokens, mask, strict=True))
    ]
    split = DataLoader(cast("Any", items), batch_size=8)
    return Task(split, split, split)


def images() -> Task:
    targets = torch.arange(12) % 3
    data = torch.randn(12, 3, 8, 8), targets
    return Task(data, data, data)


@pytest.mark.parametrize("kind", ["convolutions", "encoder"])
def test_a_layer_is_reached_from_the_block_before(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, data = (resnet(8).eval(), images()) if kind == "convolutions" else (bert(), texts())
    step = Reconstruct(
        feed=Cross(0.5), solve=Gradient(5, optimizer=FAST, penalty=ProximalWeights(0.5))
    )
    stored: list[Path] = []
    write = Stored.__init__

    def note(self: Stored, folder: Path, *rest: Any) -> None:
        stored.append(folder)
        write(self, folder, *rest)

    monkeypatch.setattr(Stored, "__init__", note)
    near = state_of(network, data)
    run_step(step, near)
    assert len(stored) == (2 if kind == "convolutions" else 1)
    assert not any(folder.exists() for folder in stored)
    monkeypatch.setattr("laconic.recover.inflow._names_of_blocks", lambda *_: [])
    far = state_of(network, data)
    run_step(step, far)
    assert near.curves.keys() == far.curves.keys()
    for path, losses in far.curves.items():
        assert near.curves[path] == pytest.approx(losses, rel=1e-3, abs=1e-7), path


class Adds(nn.Module):
    """A block: a layer of its own, then one that it may share, around which the input goes."""

    def __init__(self, last: nn.Linear) -> None:
        super().__init__()
        self.own, self.last = nn.Linear(4, 4), last

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", inputs + self.last(self.own(inputs).relu()))


class Chain(nn.Module):
    """Two blocks and a head: [batch, 4] -> [batch, 3]."""

    def __init__(self, *lasts: nn.Linear) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Adds(last) for last in lasts)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            inputs = block(inputs)
        return cast("torch.Tensor", self.head(inputs))


def vectors() -> Task:
    data = torch.randn(24, 4), torch.arange(24) % 3
    return Task(data, data, data)


def test_a_layer_of_several_blocks_learns_from_all_of_them(tmp_path: Path) -> None:
    shared = nn.Linear(4, 4)
    state = state_of(Chain(shared, shared), vectors())
    pair = fitted_layers(state, Scope("*"), Student())["layers.0.last"]
    assert pair.calls == 2
    assert Inflow(state, tmp_path).moments("layers.0.last", pair).rows == 2 * 24


def test_a_layer_that_the_teacher_calls_less_often_stays() -> None:
    shared = nn.Linear(4, 4)
    state = State(Chain(shared, shared), vectors(), (Chain(nn.Linear(4, 4), nn.Linear(4, 4)),))
    run_step(Reconstruct(solve=LeastSquares()), state)
    assert list(state.curves) == ["layers.0.own", "layers.1.own", "head"]


def test_layers_that_share_a_weight_stay() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    state = state_of(Chain(first, second), vectors())
    penalty = ProximalWeights(0.5)
    run_step(Reconstruct(solve=Gradient(3, penalty=penalty)), state)
    assert list(state.curves) == ["layers.0.own", "layers.1.own", "head"]
    assert torch.equal(layer(state.model, "layers.1.last").weight, first.weight)
