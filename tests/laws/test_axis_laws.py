"""Laws of axes, for every family of networks; run as a script, this file writes docs/axes.md."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from laconic.ship import load, save
from laconic.structure import surgery
from laconic.structure.axes import Axis, find_axes, permute_, slice_, sliced_shapes, widen_

if __name__ == "__main__":  # pytest puts it on the path
    sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.axis_families import (
    FAMILIES,
    TOLERANCE,
    axes_of,
    called,
    free,
    masked_layer_norm,
    network,
    run,
    some,
    zero_,
)

PAGE = Path(__file__).parents[2] / "docs" / "axes.md"
by_family = pytest.mark.parametrize("name", list(FAMILIES))


# ------------------------------------------------------------------ the laws


@by_family
def test_slicing_everything_is_the_identity(name: str) -> None:
    model = copy.deepcopy(network(name))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    edit = slice_(model, {axis: range(axis.size) for axis in free(name)})
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert edit.axes == list(axes_of(name)) and surgery.edits_of(model).get("shapes") is None


@by_family
def test_permuting_computes_the_same(name: str) -> None:
    model = copy.deepcopy(network(name))
    before = run(model, name)
    for axis in free(name):
        order = torch.randperm(axis.size, generator=torch.Generator().manual_seed(axis.size))
        permute_(model, axis, order.tolist())
    torch.testing.assert_close(run(model, name), before, rtol=TOLERANCE, atol=TOLERANCE)


@by_family
def test_slicing_is_zeroing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A norm over a sliced axis averages fewer numbers: compare with one that looks away.
    before = run(network(name), name)
    every = {axis.kind for axis in free(name)}
    for kinds in [every, *({kind} for kind in sorted(every) if len(every) > 1)]:
        kept = {axis: some(axis) for axis in free(name) if axis.kind in kinds}
        model, zeroed = copy.deepcopy(network(name)), copy.deepcopy(network(name))
        slice_(model, kept)
        zero_(zeroed, kept)
        with monkeypatch.context() as patched:
            patched.setattr(F, "layer_norm", masked_layer_norm)
            expected = run(zeroed, name)
        torch.testing.assert_close(run(model, name), expected, rtol=TOLERANCE, atol=TOLERANCE)
        assert not torch.allclose(expected, before), "the law would hold for anything"


@by_family
def test_every_axis_is_as_predicted_and_found_again(name: str) -> None:
    model = copy.deepcopy(network(name))
    kept = {axis: some(axis) for axis in free(name)}
    predicted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    predicted |= sliced_shapes(model, kept)
    edit = slice_(model, kept)
    assert {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} == predicted
    args, kwargs = called(name)
    again = find_axes(model, *args, **kwargs)
    # Axes of one element are not told from dimensions of size 1.
    found = {axis.uses: axis.kind for axis in again if axis.frozen is None}
    left = [axis for axis in edit.axes if axis.frozen is None and axis.size > 1]
    if not any(axis.size == 1 for axis in edit.axes):
        assert {axis.uses: axis.kind for axis in left} == found
    assert {edit.replaced[axis].size for axis in kept} == {len(each) for each in kept.values()}


@by_family
def test_axis_after_axis_is_all_at_once(name: str) -> None:
    model, at_once = copy.deepcopy(network(name)), copy.deepcopy(network(name))
    slice_(at_once, {axis: some(axis) for axis in free(name)})
    axes = list(axes_of(name))
    for place in range(len(axes)):
        if axes[place].frozen is None:
            axes = slice_(model, {axes[place]: some(axes[place])}).axes
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in at_once.state_dict().items())
    assert surgery.edits_of(model) == surgery.edits_of(at_once)


@by_family
def test_half_of_everything_runs_and_learns(name: str) -> None:
    model = copy.deepcopy(network(name)).train()
    slice_(model, {axis: some(axis) for axis in free(name)})
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    outputs = run(model, name)
    assert outputs.shape == run(network(name), name).shape
    outputs.square().mean().backward()
    optimizer.step()
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    moved = [bool((new != old).any()) for new, old in zip(model.parameters(), before, strict=True)]
    assert sum(moved) > len(moved) / 2


@by_family
def test_a_sliced_network_is_saved_and_loaded_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = copy.deepcopy(network(name))
    slice_(model, {axis: some(axis) for axis in free(name)})
    save(model, tmp_path / "model.safetensors")
    fresh = FAMILIES[name].build().double()
    loaded = load(tmp_path / "model.safetensors", model=fresh)
    assert torch.equal(run(loaded, name), run(model, name))


# What a norm averages over, and products of two activations, do change.
WIDENED = ("CIFAR ResNet", "DenseNet", "groups", "MobileNetV2", "squeeze and excitation", "LeNet-5")


HEADS = ("BERT", "ViT", "ALBERT", "fused attention", "gated linear unit", "LSTM")


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        *((name, {"channel", "neuron"}) for name in WIDENED),
        *((name, {"head", "neuron", "other"}) for name in HEADS),
    ],
)
def test_widening_computes_the_same(name: str, kinds: set[str]) -> None:
    model, axes = copy.deepcopy(network(name)), list(axes_of(name))
    before = run(model, name)
    for place in range(len(axes)):
        axis = axes[place]
        if axis.frozen is None and axis.kind in kinds:
            source = [*range(axis.size), *(element % axis.size for element in (1, 2, 1))]
            axes = widen_(model, axis, source).axes
    torch.testing.assert_close(run(model, name), before, rtol=TOLERANCE, atol=TOLERANCE)
    assert sum(axis.size for axis in axes) > sum(axis.size for axis in axes_of(name))


# ------------------------------------------------------------------ what must be found

EXPECTED: dict[str, dict[str, int]] = {
    "BERT": {"hidden": 1, "head": 2, "head_dim": 2, "neuron": 3},
    "BERT, eager attention": {"hidden": 1, "head": 2, "head_dim": 2, "neuron": 3},
    "BERT, language model": {"hidden": 1, "head": 2, "head_dim": 2, "neuron": 2},
    "RoBERTa": {"hidden": 1, "head": 2, "head_dim": 2, "neuron": 3},
    "DistilBERT": {"hidden": 1, "head": 2, "head_dim": 2, "neuron": 3},
    "ALBERT": {"hidden": 2, "head": 1, "head_dim": 1, "neuron": 2},
    "ELECTRA": {"hidden": 2, "head": 2, "head_dim": 2, "neuron": 3},
    "MobileBERT": {"hidden": 5, "head": 2, "head_dim": 2, "neuron": 5, "other": 1},
    "ViT": {"hidden": 1, "head": 2, "head_dim": 2, "neuron": 2},
    "ConvNeXt": {"hidden": 4, "neuron": 5},
    "ResNet, bottlenecks": {"channel": 12},
    "LeNet-5": {"channel": 2, "neuron": 1},
    "CIFAR ResNet": {"channel": 4},
    "CIFAR ResNet, pre-activation": {"channel": 10},
    "VGG": {"channel": 6},
    "DenseNet": {"channel": 9},
    "MobileNet": {"channel": 13},
    "MobileNetV2": {"channel": 5},
    "squeeze and excitation": {"channel": 1, "neuron": 1},
    "groups": {"channel": 4},
    "LSTM": {"other": 1, "neuron": 1},
    "GRU": {"other": 1, "neuron": 1},
    "fused attention": {"hidden": 1, "head": 1, "head_dim": 1},
    "fused attention, heads written down": {"hidden": 1, "head_dim": 1},
    "torch's encoder layer": {"neuron": 1},
    "torch's encoder layer, unpacked": {"head": 1, "head_dim": 1, "neuron": 1, "hidden": 1},
    "gated linear unit": {"neuron": 1, "hidden": 1},
}


@by_family
def test_so_many_axes_of_each_kind_are_free(name: str) -> None:
    kinds = [axis.kind for axis in free(name)]
    assert {kind: kinds.count(kind) for kind in kinds} == EXPECTED[name]


# ------------------------------------------------------------------ the page in the docs

INTRODUCTION = """# Axes

<!-- Written by `python tests/laws/test_axis_laws.py`, and checked by the same file as a test. -->

An *axis* is a set of coupled dimensions: a channel, a head, a neuron stands in several tensors, and
comes and goes in all of them at once. `laconic.structure.find_axes(model, example)` runs a network
and finds them, without a rule for any one network. What it cannot vouch for is *frozen*, with
a reason: an operation it has no rule for, an input or an output, a size that is written in the code
of the forward. So an unusual network is pruned less, never wrongly.

The table is a test: for each of these tiny networks, slicing is compared with zeroing, permuting
with the network as it was; half of everything is cut off, trained a step, saved and loaded.
Each entry is a size, or `count x size`.
"""


def sizes(axes: list[Axis]) -> str:
    counts: dict[int, int] = {}
    for axis in axes:
        counts[axis.size] = counts.get(axis.size, 0) + 1
    return ", ".join(f"{n} x {size}" if n > 1 else f"{size}" for size, n in counts.items())


def listing(axes: Iterator[Axis], key: Callable[[Axis], str]) -> str:
    groups: dict[str, list[Axis]] = {}
    for axis in axes:
        groups.setdefault(key(axis), []).append(axis)
    return "; ".join(f"{word}: {sizes(group)}" for word, group in sorted(groups.items()))


def page() -> str:
    """Return docs/axes.md."""
    lines = ["| network | prunable | frozen |", "| --- | --- | --- |"]
    for name in FAMILIES:
        prunable = listing(iter(free(name)), lambda axis: axis.kind)
        frozen = (axis for axis in axes_of(name) if axis.frozen is not None)
        reasons = listing(frozen, lambda axis: str(axis.frozen).partition(":")[0])
        lines.append(f"| {name} | {prunable} | {reasons} |")
    return INTRODUCTION + "\n" + "\n".join(lines) + "\n"


def test_the_table_in_the_docs_is_true() -> None:
    stale = "docs/axes.md is stale: run python tests/laws/test_axis_laws.py"
    assert PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page(), stale


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
