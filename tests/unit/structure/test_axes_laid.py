"""Axes of laid weights: masks, codebooks and tables are sliced and widened with them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from helpers.axes import CLOSE, example, free, mlp, mlp_axis
from laconic.errors import AxisError, ModelError
from laconic.structure.axes import find_axes, slice_, widen_
from laconic.structure.surgery import edits_of
from laconic.weights import Float, KMeans, Symmetric, Ternary, bake, lay
from laconic.weights.laid import latent_of, mask_of, swap_


def test_a_mask_is_sliced_with_its_weight() -> None:
    model = mlp()
    mask = torch.rand(8, 5) > 0.5
    lay(model, "0.weight", Float(), mask=mask)
    lay(model, "2.weight", Float(), mask=mask.t()[:3])
    baked = copy.deepcopy(model)
    bake(baked)
    axis = mlp_axis(model)
    slice_(model, {axis: [6, 1, 2]})
    slice_(baked, {axis: [6, 1, 2]})
    assert torch.equal(mask_of(model, "0.weight"), mask[[6, 1, 2]])
    assert torch.equal(model(example()), baked(example()))
    assert edits_of(model) == edits_of(baked)
    model(example()).sum().backward()
    assert latent_of(model, "0.weight")[1].grad.shape == (3, 5)


def test_assignments_to_a_codebook_are_sliced_and_the_codebook_stays() -> None:
    model = mlp()
    lay(model, "2.weight", KMeans(2))
    baked = copy.deepcopy(model)
    bake(baked)
    codebook = latent_of(model, "2.weight")[0].state["codebook"].clone()
    axis = mlp_axis(model)
    slice_(model, {axis: [0, 7, 3]})
    slice_(baked, {axis: [0, 7, 3]})
    laid, _ = latent_of(model, "2.weight")
    assert laid.state["index"].shape == (3, 3) and isinstance(laid.codebook, nn.Parameter)
    assert torch.equal(laid.state["codebook"], codebook)
    assert torch.equal(model(example()), baked(example()))


def test_tables_of_rows_are_sliced_with_the_rows() -> None:
    model = mlp()
    lay(model, "0.weight", Symmetric(4, granularity="row", range="mse"))
    lay(model, "2.weight", Symmetric(4, granularity="row", range="mse"))
    first, last = (latent_of(model, f"{n}.weight")[0].state["scale"].clone() for n in (0, 2))
    slice_(model, {mlp_axis(model): [4, 2]})
    assert torch.equal(latent_of(model, "0.weight")[0].state["scale"], first[[4, 2]])
    assert torch.equal(latent_of(model, "2.weight")[0].state["scale"], last)


def test_tables_of_groups_are_sliced_where_groups_stay_whole() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    lay(model, "0.weight", Symmetric(4, granularity=3, range="mse"))
    scale = latent_of(model, "0.weight")[0].state["scale"].clone()
    (axis,) = free(find_axes(model, torch.ones(1, 6)))
    slice_(model, {axis: [3, 1]})
    assert torch.equal(latent_of(model, "0.weight")[0].state["scale"], scale[[6, 7, 2, 3]])


def test_tables_of_groups_that_break_are_fitted_anew() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    lay(model, "2.weight", Symmetric(4, granularity=2, range="mse"))
    (axis,) = free(find_axes(model, torch.ones(1, 6)))
    slice_(model, {axis: [0, 2]})
    laid, latent = latent_of(model, "2.weight")
    fitted = laid.representation.fit(latent.detach())["scale"]
    assert torch.equal(laid.state["scale"], fitted)


def test_a_granularity_that_no_longer_fits_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    lay(model, "2.weight", Symmetric(4, granularity=4))
    before = model(torch.ones(1, 6))
    (axis,) = free(find_axes(model, torch.ones(1, 6)))
    with pytest.raises(AxisError, match=r"laid on '2.weight' does not fit \[2, 3\].*groups of 4"):
        slice_(model, {axis: [0, 1, 2]})
    assert torch.equal(model(torch.ones(1, 6)), before) and edits_of(model) == {}


def test_a_tied_laid_weight_keeps_one_representation() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.scores = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.scores.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.scores(self.table(x))

    model, tokens = Tied(), torch.ones(2, 3).long()
    lay(model, "table.weight", Ternary())
    (axis,) = free(find_axes(model, tokens))
    slice_(model, {axis: [3, 1]})
    one, other = (latent_of(model, f"{name}.weight") for name in ("table", "scores"))
    assert one[0] is other[0] and one[1] is other[1] and one[1].shape == (9, 2)
    assert torch.equal(model.table.weight, model.scores.weight)


def test_quantised_weights_can_be_sliced_but_not_divided_among_copies() -> None:
    model = mlp()
    lay(model, "0.weight", Ternary())
    axis = mlp_axis(model)
    before = model(example())
    axis = widen_(model, axis, [*range(8), 0]).axes[0]
    assert torch.unique(model[0].weight).numel() == 3 and model(example()).shape == before.shape
    lay(model, "2.weight", Ternary())
    with pytest.raises(AxisError, match=r"'2\.weight' is quantised"):
        widen_(model, axis, [*range(9), 0])
    slice_(model, {axis: [0, 1]})
    assert model[2].weight.shape == (3, 2)


def test_masked_weights_are_divided_among_copies() -> None:
    model = mlp()
    lay(model, "2.weight", Float(), mask=torch.rand(3, 8) > 0.3)
    before = model(example())
    widen_(model, mlp_axis(model), [*range(8), 3, 3])
    torch.testing.assert_close(model(example()), before, **CLOSE)


def test_swapping_needs_something_laid() -> None:
    with pytest.raises(ModelError, match=r"no tensor '5\.weight'"):
        latent_of(mlp(), "5.weight")
    model = mlp()
    lay(model, "0.weight", Float())
    laid, latent = latent_of(model, "0.weight")
    swapped = laid.sliced(0, torch.arange(8), latent)
    swap_(model, "0.weight", swapped)
    assert latent_of(model, "0.weight")[0] is swapped
