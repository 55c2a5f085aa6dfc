"""Slicing, permuting and widening axes: what follows in the network, and errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.axes import CLOSE, FOLLOWED, Network, example, free, mlp, mlp_axis
from laconic.errors import AxisError
from laconic.ship import load, save
from laconic.structure.axes import Axis, Use, find_axes, permute_, slice_, sliced_shapes, widen_
from laconic.structure.surgery import edits_of

# ------------------------------------------------------------------ slicing


def test_modules_remember_their_new_sizes() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 1),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 12, 1, groups=6),
        nn.GroupNorm(6, 12),
        nn.Conv2d(12, 4, 1),
    )
    (channels,) = free(find_axes(model, torch.randn(1, 1, 2, 2)))
    slice_(model, {channels: [0, 2, 3, 5]})
    assert (model[0].out_channels, model[1].num_features) == (4, 4)
    assert (model[2].groups, model[2].in_channels, model[2].out_channels) == (4, 4, 8)
    assert (model[3].num_groups, model[3].num_channels, model[4].in_channels) == (4, 8, 8)


def test_a_transposed_convolution_remembers_its_new_sizes() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(1, 6, 2), nn.ConvTranspose2d(6, 4, 2))
    (channels,) = free(find_axes(model, torch.randn(1, 1, 2, 2)))
    assert [(use.name, use.dim, use.consumed) for use in channels.uses] == [
        ("0.weight", 1, False),
        ("0.bias", 0, False),
        ("1.weight", 0, True),
    ]
    slice_(model, {channels: [0, 2, 5]})
    assert (model[0].in_channels, model[0].out_channels) == (1, 3)
    assert (model[1].in_channels, model[1].out_channels) == (3, 4)


def test_an_embedding_a_norm_and_a_recurrent_layer_remember_too() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(9, 4), nn.LayerNorm(4)
            self.layer, self.last = nn.LSTM(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.layer(self.norm(self.table(x)))[0])

    model = Reader().eval()
    (axis,) = free(find_axes(model, torch.ones(5, 2).long()))
    slice_(model, {axis: [3, 0]})
    assert (model.table.embedding_dim, model.norm.normalized_shape) == (2, (2,))
    assert model.layer.input_size == 2 and model.layer.weight_hh_l0.shape == (12, 3)
    assert model(torch.ones(5, 2).long()).shape == (5, 2, 2)


def test_parameters_are_new_and_keep_their_kind() -> None:
    model = mlp().double()
    model[0].weight.requires_grad_(False)
    old = model[0].weight
    slice_(model, {mlp_axis(mlp()): [0, 1]})
    assert model[0].weight is not old and old.shape == (8, 5)
    assert (model[0].weight.requires_grad, model[2].weight.requires_grad) == (False, True)
    assert isinstance(model[0].weight, nn.Parameter) and model[0].weight.dtype == torch.float64


def test_the_order_of_what_is_kept_counts() -> None:
    model, sorted_model = mlp(), mlp()
    sorted_model.load_state_dict(model.state_dict())
    slice_(model, {mlp_axis(model): [5, 1]})
    slice_(sorted_model, {mlp_axis(sorted_model): [1, 5]})
    assert torch.equal(model[0].weight, sorted_model[0].weight.flip(0))


def test_a_tied_parameter_is_sliced_once_for_all_owners() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mix, self.scores = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
            self.scores.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.scores(self.table(x) + self.mix(self.table(x)))

    model = Tied()
    (axis,) = free(find_axes(model, torch.ones(2, 3).long()))
    assert {"table.weight", "scores.weight"} <= {use.name for use in axis.uses}
    assert not any(use.consumed for use in axis.uses if "table" in use.name or "sc" in use.name)
    slice_(model, {axis: [0, 2, 3]})
    assert model.scores.weight is model.table.weight and model.table.weight.shape == (9, 3)
    assert (model.table.embedding_dim, model.scores.in_features) == (3, 3)


def test_a_module_in_two_places_is_sliced_once() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(5, 8), shared, nn.ReLU(), shared, nn.Linear(8, 3))
    axis = mlp_axis(model)
    assert {"1.weight", "3.weight"} <= {use.name for use in axis.uses}
    slice_(model, {axis: [0, 2, 5]})
    assert model[1] is model[3] and model(example()).shape == (6, 3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_part_is_sliced_and_saved(tmp_path: Path) -> None:
    def build() -> nn.Module:
        part = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
        return nn.Sequential(nn.Linear(5, 8), torch.jit.script(part), nn.Linear(4, 3)).eval()

    model = build()
    axes = free(find_axes(model, example()))
    assert [axis.size for axis in axes] == [8, 6, 4]
    slice_(model, {axis: range(axis.size // 2) for axis in axes})
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", model=build())
    assert torch.equal(again(example()), model(example()))


def test_an_edit_returns_the_axes_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    axes = find_axes(model, example())
    first, second = free(axes)
    edit = slice_(model, {first: [0, 1, 2]})
    assert edit.axes == find_axes(model, example())
    assert edit.replaced[second].uses[0].length == 6 and list(edit.replaced) == axes
    edit = slice_(model, {edit.replaced[second]: [1], edit.replaced[first]: [0, 2]})
    assert model(example()).shape == (6, 2) and [a.size for a in edit.axes] == [2, 5, 1, 2]


def test_an_axis_made_by_hand_can_be_sliced() -> None:
    model = mlp()
    uses = (Use("0.weight", 0, (8,), 0), Use("0.bias", 0, (8,), 0), Use("2.weight", 1, (8,), 0))
    edit = slice_(model, {Axis(8, "neuron", uses, None): [1, 2, 3]})
    assert model(example()).shape == (6, 3)
    assert [axis.size for axis in edit.axes] == [3]


def test_shapes_are_predicted_without_slicing() -> None:
    model = mlp()
    shapes = sliced_shapes(model, {mlp_axis(model): [1, 2, 3]})
    assert shapes == {"0.weight": (3, 5), "0.bias": (3,), "2.weight": (3, 3)}
    assert model[0].weight.shape == (8, 5)


def test_slicing_nothing_changes_nothing() -> None:
    model = mlp()
    assert slice_(model, {}).axes == [] and edits_of(model) == {}


# ------------------------------------------------------------------ widening


def test_copies_share_what_read_them() -> None:
    model = nn.Sequential(
        nn.Conv1d(1, 4, 2), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    ).eval()
    before, x = model(example()[:, None]), example()[:, None]
    (axis,) = (axis for axis in find_axes(model, x) if axis.kind == "channel")
    widen_(model, axis, [0, 1, 2, 3, 3, 0, 3])
    assert model[0].out_channels == 7
    torch.testing.assert_close(model(x), before, **CLOSE)


@pytest.mark.parametrize(
    "read",
    [
        lambda hidden, weight: F.linear(hidden, weight.clone()),
        lambda hidden, weight: F.linear(hidden.double(), weight.double()),
        lambda hidden, weight: torch.einsum("bi,ohi->boh", hidden, weight[:, None]),
    ],
)
def test_copies_of_a_weight_read_as_the_weight_does(read: Callable[[Tensor, Tensor], Any]) -> None:
    parts = {"a": nn.Linear(5, 8), "b": nn.Linear(8, 3)}
    model = Network(lambda m, x: read(m.a(x).relu(), m.b.weight), **parts).eval()
    before = model(example())
    axis = mlp_axis(model)
    assert axis.kind == "neuron" and [use.name for use in axis.uses if use.consumed] == ["b.weight"]
    widen_(model, axis, [*range(8), 1, 1])
    torch.testing.assert_close(model(example()), before, **CLOSE)


@pytest.mark.parametrize(
    "read",
    [
        lambda hidden, weight: F.linear(hidden, 0.5 * weight),
        lambda hidden, weight: hidden @ (weight + weight.square()).mT,
        lambda hidden, weight: F.conv1d(hidden[..., None], 2 * weight[..., None]),
        lambda hidden, weight: hidden @ hidden.mT,
    ],
)
def test_copies_that_nothing_can_be_divided_among_are_refused(
    read: Callable[[Tensor, Tensor], Any],
) -> None:
    parts = {"a": nn.Linear(5, 8), "b": nn.Linear(8, 3, bias=False)}
    # Run all of it: what is not run might read the axis.
    model = Network(lambda m, x: (read(m.a(x).relu(), m.b.weight), m.b(m.a(x))), **parts).eval()
    axis = next(axis for axis in find_axes(model, example()) if axis.size == 8)
    with pytest.raises(AxisError, match="would grow with the copies"):
        widen_(model, axis, [*range(8), 1, 1])


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([], "no element is named"),
        ([0, 8], "elements 0 to 7; 8 is none"),
        ([-1], "elements 0 to 7; -1 is none"),
        ([1, 2, 1], "kept twice"),
    ],
)
def test_what_cannot_be_kept(kept: list[int], message: str) -> None:
    model = mlp()
    axis = mlp_axis(model)
    with pytest.raises(AxisError, match=message):
        slice_(model, {axis: kept})
    assert model[0].weight.shape == (8, 5) and edits_of(model) == {}


def test_a_number_with_a_fraction_is_no_element() -> None:
    model = mlp()
    axis = mlp_axis(model)
    with pytest.raises(TypeError):
        slice_(model, {axis: [0.5]})


def test_a_frozen_axis_says_why() -> None:
    model = mlp()
    frozen = next(axis for axis in find_axes(model, example()) if axis.frozen == "an output")
    with pytest.raises(AxisError, match=r"other axis of 3 in '2.weight' and 1 more is frozen: an"):
        slice_(model, {frozen: [0]})
    with pytest.raises(AxisError, match="frozen"):
        permute_(model, frozen, [2, 1, 0])
    with pytest.raises(AxisError, match="frozen"):
        widen_(model, frozen, [0, 1, 2, 2])
    with pytest.raises(AxisError, match="frozen"):
        sliced_shapes(model, {frozen: [0]})


def test_a_stale_axis_is_refused() -> None:
    model = mlp()
    axis = mlp_axis(model)
    slice_(model, {axis: [0, 1, 2]})
    with pytest.raises(AxisError, match=r"stale: '0.weight' is \[3, 5\].*was 8; use Edit.axes"):
        slice_(model, {axis: [0, 1]})


def test_an_axis_is_stale_too_where_another_part_changed() -> None:
    forward, parts, _ = FOLLOWED["joined"]
    model = Network(forward, **copy.deepcopy(parts)).eval()
    first, second = free(find_axes(model, example()))
    slice_(model, {first: [0]})
    with pytest.raises(AxisError, match="stale"):
        slice_(model, {second: [0]})


def test_an_axis_of_another_model_is_refused() -> None:
    with pytest.raises(AxisError, match=r"another model: the model has no tensor '0.weight'"):
        slice_(nn.ReLU(), {mlp_axis(mlp()): [0]})


@pytest.mark.parametrize("order", [[0, 1], [0] * 8, [*range(7)]])
def test_what_is_no_order_is_refused(order: list[int]) -> None:
    model = mlp()
    with pytest.raises(AxisError, match="names every one, once"):
        permute_(model, mlp_axis(model), order)


def test_widening_loses_no_element() -> None:
    model = mlp()
    with pytest.raises(AxisError, match="element 7 has no copy"):
        widen_(model, mlp_axis(model), [*range(7), 0, 0])
