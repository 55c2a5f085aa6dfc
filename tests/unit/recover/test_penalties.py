"""Penalties: values, gradients and how a recipe writes them."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from laconic.errors import RecipeError, ScopeError
from laconic.recover.penalties import L1, L2, Penalty, Slimming, absolute_sum, square_sum
from laconic.scope import Scope
from laconic.step import members
from laconic.weights.codebook import KMeans
from laconic.weights.laid import lay, weights_of


def test_sums_run_over_every_weight_of_every_shape() -> None:
    weights = {"a": torch.tensor([[1.0, -2.0]]), "b": torch.tensor([[[3.0]], [[-4.0]]])}
    assert absolute_sum(weights).item() == 10.0
    assert square_sum(weights).item() == 30.0


@pytest.mark.parametrize("penalty", [L1(0.5), L2(0.5)])
def test_no_weight_costs_nothing(penalty: Penalty) -> None:
    assert penalty({}).item() == 0.0
    assert penalty({"a": torch.zeros(3)}).item() == 0.0


def test_factor_scales_the_term() -> None:
    weights = {"a": torch.tensor([1.0, -2.0])}
    assert L1(0.25)(weights).item() == 0.75
    assert L2(0.25)(weights).item() == 1.25
    assert L1(0.0)(weights).item() == 0.0


def test_gradient_reaches_the_codebook_behind_a_laid_weight() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 1.0], [-3.0, 1.0]])
    lay(model, "0.weight", KMeans(1))
    L1(1.0)(weights_of(model, Scope("*"))).backward()
    codebook = model[0].parametrizations.weight[0].codebook
    assert codebook.detach().tolist() == [-3.0, 1.0]
    assert codebook.grad.tolist() == [-1.0, 3.0]  # sign, summed over each cluster


def test_recipe_writes_a_penalty_in_one_key() -> None:
    adapter = TypeAdapter(Penalty)
    assert adapter.validate_python({"l1": "1e-5"}) == L1(1e-5)
    assert adapter.validate_python({"l2": {"weight": 0.1}}) == L2(0.1)
    assert L1(0.1).to_data() == {"l1": {"weight": 0.1}}
    assert adapter.validate_python(L2(0.1).to_data()) == L2(0.1)
    assert repr(L1(0.1)) == "L1(0.1)"
    assert {"l1", "l2"} <= set(members(Penalty))


def test_wrong_factors_are_refused() -> None:
    with pytest.raises(RecipeError, match="weight"):
        L1(-1.0)
    with pytest.raises(RecipeError, match="required"):
        L2()


def normed() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, affine=False)
    )
    model[1].weight.data = torch.tensor([0.5, -2.0])
    return model


def test_batch_norms_term_is_of_its_scales_alone() -> None:
    model, penalty = normed(), Slimming(0.1)
    scales = penalty.tensors(model, Scope("*"))
    assert list(scales) == ["1.weight"]
    term = penalty(scales)
    assert term.item() == pytest.approx(0.25)
    term.backward()
    assert torch.allclose(model[1].weight.grad, torch.tensor([0.1, -0.1]))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "1.weight")


def test_a_scope_without_scales_is_refused() -> None:
    with pytest.raises(ScopeError, match="'0' selects no BatchNorm with scales"):
        Slimming(0.1).tensors(normed(), Scope("0"))


def test_other_terms_are_of_matrices_and_kernels() -> None:
    assert list(L1(0.1).tensors(normed(), Scope("*"))) == ["0.weight", "2.weight"]
