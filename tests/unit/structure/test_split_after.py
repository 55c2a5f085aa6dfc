"""What comes after a split: files, costs, later steps, training and axes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import laconic
from helpers.split import after, images, network, task, ternary_network
from laconic.measure import macs, measure
from laconic.models.halves import Halves
from laconic.recover import SGD, Train
from laconic.scope import Scope
from laconic.step import Step
from laconic.structure import Prune, Split, find_axes, slice_
from laconic.structure.surgery import apply_edits_, edits_of
from laconic.weights import Quantize


def test_a_file_brings_it_back_bit_for_bit(tmp_path: Path) -> None:
    model = after(Split(), ternary_network())
    laconic.save(model, tmp_path / "split.safetensors")
    again = laconic.load(tmp_path / "split.safetensors", model=network())
    assert torch.equal(again(images()), model(images()))
    assert isinstance(again[6], Halves)
    twin = network()
    apply_edits_(twin, edits_of(model), {})
    assert list(twin.state_dict()) == list(again.state_dict())


def test_costs_count_both_halves() -> None:
    model = ternary_network()
    before = macs(model, images(1))[""]
    plain = measure(model, task(), latency=False).layers
    after(Split(), model)
    counted = measure(model, task(), latency=False)
    assert counted.macs == 2 * before == sum(layer.macs or 0 for layer in counted.layers)
    assert {layer.bits for layer in counted.layers} == {1.0}
    assert {layer.bits for layer in plain} == {2.0}


@pytest.mark.parametrize(
    "step",
    [
        Train(batch=8, optimizer=SGD(0.1)),
        Quantize("float"),
        Prune("weights", keep=0.5),
        Prune("channels", keep=0.5),
        Prune("neurons", keep=0.5),
        Prune("neurons", keep=0.5, scope=Scope("6")),
    ],
    ids=repr,
)
def test_steps_afterwards(step: Step, tmp_path: Path) -> None:
    model = after(Split(), ternary_network())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after(step, model, task())
    now = model.state_dict()
    same = now.keys() == before.keys()
    assert not same or any(not torch.equal(now[name], before[name]) for name in before)
    laconic.save(model, tmp_path / "model.safetensors")
    again = laconic.load(tmp_path / "model.safetensors", model=network())
    assert torch.equal(again(images()), model.eval()(images()))


def test_training_keeps_halves_binary_and_lets_them_part() -> None:
    model = after(Split(), ternary_network())
    after(Train(batch=8, epochs=3, optimizer=SGD(0.1)), model, task())
    for half in (model[6].first, model[6].second):
        assert half.weight.detach().abs().unique().numel() == 1
    sums = (model[6].first.weight + model[6].second.weight).detach()
    assert not bool((sums == 0).any())  # their scales differ now


def test_axes_go_through_both_halves() -> None:
    model = after(Split(), ternary_network())
    axes = find_axes(model, images(1))
    kinds = [axis.kind for axis in find_axes(network(), images(1))]
    assert [axis.kind for axis in axes if axis.frozen is None] == [
        axis.kind for axis in find_axes(network(), images(1)) if axis.frozen is None
    ]
    assert "neuron" in kinds
    (neurons,) = (axis for axis in axes if axis.kind == "neuron")
    names = {use.name for use in neurons.uses}
    assert names == {f"{place}.{half}.weight" for place in "68" for half in ("first", "second")} | {
        f"6.{half}.bias" for half in ("first", "second")
    }
    slice_(model, {neurons: [0, 2, 5]})
    assert model[6].first.out_features == model[6].second.out_features == 3
    assert model[8].second.in_features == 3
    assert model(images()).shape == (4, 3)
