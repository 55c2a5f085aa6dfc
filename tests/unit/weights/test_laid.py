"""Laid weights: exact gradients, masks, laying again, narrowing, codebooks, noise, the step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.laid import checkerboard, latent
from laconic.errors import ScopeError
from laconic.scope import Scope
from laconic.step import State
from laconic.weights import (
    Binary,
    DynamicFixedPoint,
    FixedPoint,
    Float,
    Gobo,
    Groups,
    KMeans,
    Laid,
    LearnedStep,
    Product,
    Quantize,
    Representation,
    Symmetric,
    Ternary,
    bake,
    lay,
    ste,
)
from laconic.weights.laid import laid_tensors, mask_of, narrow, weights_of

# Hazard 8: the straight-through form.


def test_ste_is_exact_where_the_usual_form_is_not() -> None:
    weight, decoded = torch.randn(10_000), torch.randn(10_000)
    assert torch.equal(ste(decoded, weight), decoded)
    assert not torch.equal(weight + (decoded - weight), decoded)


def test_ste_passes_the_surrogates_gradient_and_detaches_the_decoded() -> None:
    weight = torch.randn(5, requires_grad=True)
    decoded = torch.randn(5, requires_grad=True)
    (ste(decoded, 3 * weight) * torch.arange(5.0)).sum().backward()
    assert weight.grad.tolist() == [0, 3, 6, 9, 12]
    assert decoded.grad is None


def test_ste_is_twice_differentiable() -> None:
    weight = torch.randn(5, requires_grad=True)
    output = ste(torch.zeros(5), weight**3).mul(2).sum()
    (first,) = torch.autograd.grad(output, weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    assert torch.allclose(second, 12 * weight)


def test_a_hessian_vector_product_passes_through_a_laid_weight() -> None:
    model = nn.Linear(3, 1)
    lay(model, "weight", Symmetric(4))
    inputs = torch.randn(8, 3)
    loss = model(inputs).square().mean()
    (gradient,) = torch.autograd.grad(loss, latent(model), create_graph=True)
    (product,) = torch.autograd.grad(gradient[0, 0], latent(model))
    assert torch.allclose(product[0], 2 * (inputs[:, :1] * inputs).mean(0), atol=1e-6)


def test_no_laid_weight_is_minus_zero() -> None:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.copy_(-torch.rand(4, 4))
        model.weight[0] = -0.0
    for representation in (Float(), Symmetric(4), Ternary(), FixedPoint(4), KMeans(2)):
        lay(model, "weight", representation, mask=checkerboard(4, 4))
        weight = model.weight.detach()
        assert not bool(weight[weight == 0].signbit().any())


# Hazard 10: the class changes.


def test_a_laid_module_is_still_found_by_its_kind() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Conv2d(1, 1, 1))
    lay(model, "0.weight", Ternary())
    lay(model, "2.weight", Ternary())
    assert type(model[0]) is not nn.Linear and isinstance(model[0], nn.Linear)
    assert list(Scope("kind:linear").select(model)) == ["0"]
    assert list(Scope("kind:conv").select(model)) == ["2"]
    assert list(weights_of(model, Scope("kind:linear"))) == ["0.weight"]


# Hazard 12: binary and ternary are not idempotent, and a mask must come last.


def test_encoding_a_pruned_binary_weight_without_its_mask_revives_it() -> None:
    weight, mask = torch.randn(4, 4), checkerboard(4, 4)
    shipped = Binary().decode(Binary().encode(weight, mask=mask))
    again = Binary().decode(Binary().encode(shipped))
    assert bool(again.all())
    assert torch.allclose(again.abs(), shipped[mask].abs().mean() / 2)


@pytest.mark.parametrize("representation", [Binary(), Ternary()], ids=repr)
def test_encoding_a_baked_weight_again_may_change_it(representation: Binary | Ternary) -> None:
    shipped = representation.decode(representation.encode(torch.randn(999)))
    again = representation.decode(representation.encode(shipped))
    assert torch.allclose(again, shipped) and not torch.equal(again, shipped)
    assert not representation.idempotent


def test_a_mask_comes_last_and_the_scale_skips_the_pruned() -> None:
    model, mask = nn.Linear(4, 4), checkerboard(4, 4)
    latent_before = model.weight.detach().clone()
    lay(model, "weight", Binary(), mask=mask)
    assert not bool(model.weight[~mask].any())
    assert torch.allclose(model.weight[mask].abs(), latent_before[mask].abs().mean())


def test_pruned_weights_never_revive_under_momentum_and_decay() -> None:
    model, mask = nn.Linear(4, 4), checkerboard(4, 4)
    lay(model, "weight", Float())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    for step in range(6):
        if step == 3:
            narrow(model, "weight", mask)
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    assert not bool(model.weight[~mask].any())
    assert bool(model.weight[mask].all())


# Laying again, narrowing, learned tables, noise.


def test_laying_again_starts_from_the_shipped_value_and_keeps_the_mask() -> None:
    model, mask = nn.Linear(4, 4), checkerboard(4, 4)
    lay(model, "weight", Ternary(), mask=mask)
    shipped = model.weight.detach().clone()
    lay(model, "weight", Float())
    assert torch.equal(model.weight, shipped)
    assert torch.equal(mask_of(model, "weight"), mask)
    assert len(model.parametrizations.weight) == 1


def test_narrowing_keeps_a_trained_codebook() -> None:
    model = nn.Linear(6, 6)
    lay(model, "weight", KMeans(2))
    with torch.no_grad():
        model.parametrizations.weight[0].codebook.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    narrow(model, "weight", checkerboard(6, 6))
    assert set(model.weight.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}
    narrow(model, "weight", torch.zeros(6, 6, dtype=torch.bool))
    assert not bool(model.weight.any())


def test_autocast_is_given_no_weight_to_keep_by_a_network_that_is_only_used() -> None:
    """Of a weight that is learned it keeps the cast until its context ends, at every forward."""
    model = nn.Linear(4, 4)
    lay(model, "weight", Ternary())
    with torch.no_grad():
        assert model.weight.requires_grad
        with torch.autocast("cpu", torch.bfloat16):
            assert not model.weight.requires_grad


def test_narrowing_copies_the_mask_it_is_given() -> None:
    model, mask = nn.Linear(4, 4), checkerboard(4, 4)
    narrow(model, "weight", mask)
    mask.fill_(True)
    assert torch.equal(mask_of(model, "weight"), checkerboard(4, 4))


def test_a_state_that_was_learned_can_be_laid_again() -> None:
    model, other = nn.Linear(6, 6), nn.Linear(6, 6)
    lay(model, "weight", KMeans(2))
    state = model.parametrizations.weight[0].state
    lay(other, "weight", KMeans(2), state=state)
    assert torch.equal(other.weight, model.weight)
    assert other.parametrizations.weight[0].codebook is not state["codebook"]


def test_training_a_codebook_leaves_the_assignments() -> None:
    model = nn.Linear(6, 6)
    lay(model, "weight", KMeans(2))
    laid = model.parametrizations.weight[0]
    index, codebook = laid.index.clone(), laid.codebook.detach().clone()
    assert {name for name, _ in laid.named_parameters()} == {"codebook"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()
    assert torch.equal(laid.index, index) and not torch.equal(laid.codebook, codebook)
    assert torch.equal(model.weight, laid.codebook[index.long()])


def test_noise_changes_with_update_only() -> None:
    model = nn.Linear(30, 30)
    lay(model, "weight", Symmetric(2, rounding="stochastic"))
    laid: Laid = model.parametrizations.weight[0]
    before, noise = model.weight.detach().clone(), int(laid.noise)
    assert torch.equal(model.weight, before)
    laid.update()
    assert int(laid.noise) == noise + 1
    assert not torch.equal(model.weight, before)


def test_weights_of_one_shape_do_not_share_their_noise() -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    with torch.no_grad():
        model[1].weight.copy_(model[0].weight)
    for name in ("0.weight", "1.weight"):
        lay(model, name, Symmetric(2, rounding="stochastic"))
    assert not torch.equal(model[0].weight, model[1].weight)


def test_groups_that_slicing_leaves_whole_keep_their_scale() -> None:
    weight = torch.randn(4, 6)
    representation = Symmetric(2, range="mse", granularity=Groups(2))
    scale = torch.tensor([5.0, 7.0])
    laid = Laid(representation, None, {"scale": scale})
    kept = {
        "a row of each": (0, [0, 2], [5.0, 7.0]),
        "the rows of one": (0, [0, 1], [5.0, 5.0]),
        "some columns": (1, [5, 0, 3], [5.0, 7.0]),
    }
    for name, (dim, places, expected) in kept.items():
        assert laid.sliced(dim, torch.tensor(places), weight).scale.tolist() == expected, name
    mixed = torch.tensor([0, 1, 2])
    fitted = representation.fit(weight[mixed])["scale"]
    assert torch.equal(laid.sliced(0, mixed, weight).scale, fitted)


def test_a_codebook_as_long_as_its_weight_is_not_sliced_with_it() -> None:
    weight, kept = torch.randn(8), torch.tensor([6, 1])
    laid = Laid(KMeans(3), None, KMeans(3).fit(weight))
    sliced = laid.sliced(0, kept, weight)
    assert torch.equal(sliced.codebook, laid.codebook)
    assert torch.equal(sliced(weight[kept]), laid(weight)[kept])


def test_a_frozen_weight_stays_frozen() -> None:
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    lay(model, "weight", Ternary())
    assert not latent(model).requires_grad
    bake(model)
    assert not model.weight.requires_grad


def test_a_representation_may_be_what_a_recipe_writes() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    lay(model, "0.weight", "ternary")
    assert laid_tensors(model)["0.weight"][0].representation == Ternary()
    lay(model, "0.weight", {"symmetric": {"bits": 4}})
    assert laid_tensors(model)["0.weight"][0].representation == Symmetric(4)
    with pytest.raises(ValueError, match="ternary"):
        lay(model, "0.weight", "ternery")


# The step.


def two_scales() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.linspace(-0.2, 0.2, 16).reshape(4, 4))
        model[1].weight.copy_(torch.linspace(-3, 3, 16).reshape(4, 4))
    return model


def representations(model: nn.Module) -> list[object]:
    return [laid.representation for laid, _ in laid_tensors(model).values()]


def test_fixed_point_is_one_split_for_the_scope_and_dynamic_one_each() -> None:
    fixed, dynamic = two_scales(), two_scales()
    Quantize(FixedPoint(8)).apply(State(fixed))
    Quantize(DynamicFixedPoint(8)).apply(State(dynamic))
    assert representations(fixed) == [FixedPoint(8, 5), FixedPoint(8, 5)]
    assert representations(dynamic) == [FixedPoint(8, 9), FixedPoint(8, 5)]


def test_the_scope_looks_at_survivors_only() -> None:
    model = two_scales()
    lay(model, "1.weight", Float(), mask=model[1].weight.abs() < 0.25)
    Quantize(FixedPoint(8)).apply(State(model))
    assert representations(model) == [FixedPoint(8, 9), FixedPoint(8, 9)]


def test_quantize_needs_a_matrix() -> None:
    with pytest.raises(ScopeError, match="no weight"):
        Quantize(8).check(nn.Sequential(nn.BatchNorm1d(3)), None)


@pytest.mark.parametrize("representation", [KMeans(2), LearnedStep(4), Gobo(2), Product(2)])
def test_what_is_laid_on_a_frozen_weight_does_not_move(representation: Representation) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2))
    model[0].weight.requires_grad_(False)
    for name in ("0.weight", "1.weight"):
        lay(model, name, representation)
    before = [layer.weight.detach().clone() for layer in model]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(torch.ones(4, 16)).square().sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, before[0]) and not torch.equal(model[1].weight, before[1])
    rows = torch.arange(8)
    for name, learns in (("0.weight", False), ("1.weight", True)):
        layer, latent = laid_tensors(model)[name]
        sliced = layer.sliced(1, rows, latent)
        assert all(table.requires_grad is learns for table in sliced.parameters())
