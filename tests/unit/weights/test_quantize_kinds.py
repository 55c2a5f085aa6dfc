"""What of a network quantize takes: kinds of layers, shapes, precisions, modes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from laconic import load, save
from laconic.errors import ModelError
from laconic.measure import measure
from laconic.models import digits_cnn
from laconic.scope import Scope
from laconic.step import State, run_step
from laconic.structure import PlanSplit
from laconic.tasks import Task
from laconic.weights import (
    Float,
    KMeans,
    LearnedClip,
    LearnedStep,
    MinMax,
    MixedPrecision,
    MovingAverage,
    Quantize,
    Quantizer,
    Representation,
    Symmetric,
    activations_of,
    attach_,
    lay,
)
from laconic.weights.laid import laid_tensors, mask_of, weights_of

ALL = Scope("*")
ATTENTION = "*.attention.self"


def test_norms_and_biases_of_several_dimensions_stay_float() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.LayerNorm([4, 6, 6]), nn.Flatten())
    network.append(nn.MultiheadAttention(144, 2, add_bias_kv=True))
    Quantize("ternary").apply(State(network))
    found = set(laid_tensors(network))
    assert found == {"0.weight", "3.in_proj_weight", "3.out_proj.weight"}


def test_a_table_is_an_embedding_under_whatever_name() -> None:
    """Tied to a head that comes first; and that of a bag."""
    network = nn.ModuleDict({"head": nn.Linear(4, 9, bias=False), "words": nn.Embedding(9, 4)})
    network["bag"] = nn.EmbeddingBag(5, 4)
    network["words"].weight = network["head"].weight
    Quantize("ternary", embedding=8).apply(State(network))
    found = {name: laid.representation for name, (laid, _) in laid_tensors(network).items()}
    assert found == dict.fromkeys(("head.weight", "words.weight", "bag.weight"), Symmetric(8))


@pytest.mark.parametrize(
    "kind", ["binary", "ternary", "affine", "kmeans", "gobo", "loss_aware", 4, {"product": 4}]
)
@pytest.mark.parametrize("table", [nn.Embedding, nn.EmbeddingBag])
def test_a_padding_row_of_zeros_stays_so(kind: Any, table: type[nn.Module], tmp_path: Path) -> None:
    network = nn.Sequential(table(50, 8, padding_idx=3))
    Quantize(kind).apply(State(network))
    assert not network[0].weight[3].any() and network[0].weight[4].any()
    save(network, tmp_path / "table.safetensors")
    again = load(tmp_path / "table.safetensors", model=nn.Sequential(table(50, 8, padding_idx=3)))
    assert torch.equal(again[0].weight, network[0].weight)


def test_a_padding_row_that_was_pruned_or_learned_is_left_alone() -> None:
    network = nn.Sequential(nn.Embedding(50, 8, padding_idx=0))
    with torch.no_grad():
        network[0].weight[0] = 1.0
    Quantize("binary").apply(State(network))
    assert network[0].weight[0].all() and mask_of(network, "0.weight") is None
    half = torch.arange(400).reshape(50, 8) % 2 == 0
    network = nn.Sequential(nn.Embedding(50, 8, padding_idx=0))
    lay(network, "0.weight", Float(), mask=half)
    Quantize("binary").apply(State(network))
    assert torch.equal(network[0].weight[1:] != 0, half[1:]) and not network[0].weight[0].any()


def test_kinds_of_layers() -> None:
    layers = {
        "linear": [nn.Linear(2, 2)],
        "conv": [nn.Conv1d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1)],
        "embedding": [nn.Embedding(2, 2), nn.EmbeddingBag(2, 2)],
        "norm": [nn.LayerNorm(2), nn.RMSNorm([2, 2]), nn.InstanceNorm1d(2), nn.BatchNorm1d(2)],
    }
    network = nn.Sequential(*[layer for each in layers.values() for layer in each])
    for kind, own in layers.items():
        assert [*Scope(f"kind:{kind}").select(network).values()] == own
    assert not any("RMSNorm" in repr(network[int(name[0])]) for name in weights_of(network, ALL))


def test_inputs_of_transposed_convolutions_are_rounded() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ConvTranspose2d(2, 1, 3))
    Quantize(4, activation=4).apply(State(network))
    assert activations_of(network) == {path: {"input": MinMax(4)} for path in "01"}
    assert network(torch.rand(1, 1, 8, 8)).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ranges_stay_exact_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    network = digits_cnn()
    attach_(network, {"conv1": {"input": MovingAverage()}, "fc1": {"input": LearnedClip()}})
    for _ in range(3):
        network(torch.rand(4, 1, 8, 8))
    before = [each.state for each in network.modules() if isinstance(each, Quantizer)]
    half = network.to(dtype).eval()
    after = [each.state for each in half.modules() if isinstance(each, Quantizer)]
    assert [{k: v.item() for k, v in state.items()} for state in after] == [
        {k: v.item() for k, v in state.items()} for state in before
    ]
    assert {v.dtype for state in after for v in state.values()} == {torch.float32}
    inputs = torch.rand(4, 1, 8, 8).to(dtype)
    save(half, tmp_path / "half.safetensors")
    assert torch.equal(load(tmp_path / "half.safetensors")(inputs), half(inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [Symmetric(8), KMeans(8)], ids=repr)
def test_codes_of_half_precision_are_the_nearest(kind: Representation, dtype: torch.dtype) -> None:
    """A quotient, or the middle of two words, of a few bits may be off by whole codes."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes = kind.encode(weight, state=kind.fit(weight))
    found = codes.streams["index" if kind.name == "kmeans" else "code"].tensor.long()
    tables = {name: table.float() for name, table in codes.tables.items()}
    if kind.name == "kmeans":
        words = tables["codebook"].expand(64, -1)
    else:
        words = (torch.arange(-127, 128) * tables["scale"]).expand(64, -1)
    best = (weight.float()[..., None] - words[:, None]).abs().min(dim=2).values
    off = (weight.float() - words.gather(1, found)).abs() - best
    assert float(off.max()) <= 1e-5 * float(weight.abs().max())


def test_what_was_made_in_inference_mode_can_be_trained(tmp_path: Path) -> None:
    network = digits_cnn()
    save(network, tmp_path / "model.safetensors")
    with torch.inference_mode():
        loaded = load(tmp_path / "model.safetensors")
        for model in (network, loaded):
            lay(model, "fc1.weight", LearnedStep(4))
            attach_(model, {"fc1": {"input": LearnedClip()}})
    for model in (network, loaded):
        model(torch.rand(2, 1, 8, 8)).sum().backward()
        assert model.fc1.parametrizations.weight.original.grad is not None


def test_a_group_that_does_not_divide_is_refused_before_any_work() -> None:
    network = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))
    words = r"'1\.weight': groups of 8 do not divide"
    with pytest.raises(ModelError, match=words):
        Quantize(Symmetric(4, granularity=8)).check(network, None)
    task = Task(*[(torch.zeros(4, 8), torch.arange(4) % 3)] * 3)
    with pytest.raises(ModelError, match=words):
        MixedPrecision(low=Symmetric(2, granularity=8)).check(network, task)
    with pytest.raises(ModelError, match=words):
        PlanSplit("size <= 1 MB", choose="random_gain", weight=8).check(network, None)


def test_operands_that_are_not_rounded_count_as_floats() -> None:
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    model = BertForSequenceClassification(BertConfig(num_attention_heads=4, vocab_size=9, **sizes))
    ids = torch.arange(8).reshape(2, 4)
    pair = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.arange(2)
    task, found = Task(pair, pair, pair), []
    for step in (None, Quantize(probabilities=MinMax(8)), Quantize(activation=8, scope=ATTENTION)):
        state = State(copy.deepcopy(model), task)
        if step is not None:
            run_step(step, state)
        found.append(measure(state.model, task, latency=False).bit_operations)
    assert found[0] == found[1] > found[2]
