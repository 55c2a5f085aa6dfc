"""Laying, narrowing and baking representations: the hazards that were measured, and errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from laconic import compress, load
from laconic.errors import ModelError, RecipeError, ScopeError
from laconic.scope import Scope
from laconic.step import State
from laconic.weights import (
    Binary,
    DynamicFixedPoint,
    FixedPoint,
    Float,
    Groups,
    KMeans,
    Laid,
    Quantize,
    Symmetric,
    Ternary,
    bake,
    lay,
    ste,
)
from laconic.weights.laid import laid_tensors, mask_of, narrow, owner, weights_of


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Two(nn.Module):
    """Two matrices in one module, as in an LSTM or a multi-head attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 3))
        self.second = nn.Parameter(torch.randn(3, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.first @ self.second


class Keeps(nn.Module):
    """A network that keeps what it computed, as many do for plots."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.seen: dict[str, list[Tensor]] = {"inner": []}

    def forward(self, inputs: Tensor) -> Tensor:
        self.last = self.inner(inputs)
        self.seen["inner"].append(self.last)
        return self.last


class Tied(nn.Module):
    """An embedding whose table is also the decoder, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.decoder = nn.Linear(4, 6)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.embedding(tokens))


def latent(module: nn.Module, attribute: str = "weight") -> nn.Parameter:
    return module.parametrizations[attribute].original


def checkerboard(rows: int, columns: int) -> Tensor:
    return (torch.arange(rows)[:, None] + torch.arange(columns)) % 2 == 0


# Hazard 1: deep copies share the class that torch injects.


def test_baking_a_deep_copy_leaves_the_original_laid() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    lay(model, "0.weight", Ternary())
    before = model[0].weight.detach().clone()
    twin = copy.deepcopy(model)
    bake(twin)
    assert type(twin[0]) is nn.Linear
    assert torch.equal(model[0].weight, before)
    latent(model[0]).grad = None
    model(torch.randn(2, 4)).sum().backward()
    assert latent(model[0]).grad is not None


def test_baking_the_original_leaves_a_deep_copy_laid() -> None:
    model = nn.Linear(4, 3)
    lay(model, "weight", Ternary())
    twin = copy.deepcopy(model)
    bake(model)
    assert type(model) is nn.Linear
    assert twin.weight.unique().numel() <= 3 and parametrize.is_parametrized(twin)


def test_a_matrix_without_numbers_is_no_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    model.nothing = nn.Parameter(torch.zeros(0, 2))
    assert list(weights_of(model, Scope("*"))) == ["0.weight"]


def test_two_weights_of_a_module_are_baked_one_by_one() -> None:
    model = Two()
    lay(model, "first", Ternary())
    lay(model, "second", Binary())
    twin, second = copy.deepcopy(model), model.second.detach().clone()
    bake(twin, "first")
    assert list(laid_tensors(twin)) == ["second"]
    assert list(laid_tensors(model)) == ["first", "second"]
    assert torch.equal(twin.second, second) and torch.equal(model.second, second)
    assert torch.equal(twin(torch.eye(3)), model(torch.eye(3)))
    bake(twin)
    assert type(twin) is Two and set(twin.state_dict()) == {"first", "second"}


ROWS = {
    "columns of a matrix": (lambda: nn.Linear(7, 5, bias=False), torch.ones(9, 7, 6).mT),
    "recurrent": (lambda: nn.GRU(6, 5, batch_first=True), torch.ones(4, 7, 6)),
    "channels last": (
        lambda: nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last),
        torch.ones(4, 8, 8, 8).to(memory_format=torch.channels_last),
    ),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_baked_network_computes_what_the_laid_one_did(name: str, masked: bool) -> None:
    make, like = ROWS[name]
    for _ in range(4):
        model, inputs = make().eval(), torch.randn_like(like)
        for weight, value in weights_of(model, Scope("*")).items():
            mask = torch.rand(value.shape) > 0.3
            lay(model, weight, Symmetric(4), mask=mask if masked else None)
        plain = copy.deepcopy(model)
        bake(plain)
        with torch.no_grad():
            found, wanted = model(inputs), plain(inputs)
        assert torch.equal(found[0], wanted[0])


def test_a_network_that_keeps_what_it_computed_is_copied(tmp_path: Path) -> None:
    model = Keeps()
    answer = model(torch.ones(1, 4))
    small = compress(model, None, [Quantize(4)])
    assert model.last is answer and answer.grad_fn is not None
    assert small.model.last is small.model.seen["inner"][0]
    assert torch.equal(small.model.last, answer) and not small.model.last.requires_grad
    small.save(tmp_path / "keeps")
    model(torch.ones(1, 4))
    again = load(tmp_path / "keeps", model=model)
    assert torch.equal(again(torch.ones(1, 4)), small.model(torch.ones(1, 4)))


def test_laying_a_second_weight_on_a_deep_copy_leaves_the_original() -> None:
    model = Two()
    lay(model, "first", Ternary())
    twin = copy.deepcopy(model)
    lay(twin, "second", Binary())
    assert torch.equal(model.second, latent(twin, "second"))
    assert list(laid_tensors(model)) == ["first"]
    lay(twin, "first", Float())
    assert twin.first.unique().numel() <= 3
    assert isinstance(model.parametrizations.first[0].representation, Ternary)


def test_another_parametrization_of_the_module_survives() -> None:
    model = parametrizations.weight_norm(Two(), "second")
    lay(model, "first", Binary())
    second = model.second.detach().clone()
    bake(model)
    assert torch.equal(model.second, second)
    with pytest.raises(ModelError, match="not laconic's"):
        mask_of(model, "second")


def test_a_laid_module_refuses_pickle() -> None:
    model = nn.Linear(2, 2)
    lay(model, "weight", Float())
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(model)


# Hazard 3: tied weights.


def test_every_owner_of_a_tied_weight_reads_the_laid_value() -> None:
    model = Tied()
    lay(model, "embedding.weight", Ternary("row"))
    assert torch.equal(model.embedding.weight, model.decoder.weight)
    assert latent(model.embedding) is latent(model.decoder)
    assert model.embedding.parametrizations.weight[0] is model.decoder.parametrizations.weight[0]
    assert len(list(model.parameters())) == 2
    model(torch.arange(6)).sum().backward()
    assert bool(latent(model.embedding).grad.any())


def test_a_tie_survives_copying_laying_again_and_baking() -> None:
    model = Tied()
    lay(model, "decoder.weight", Binary())
    twin = copy.deepcopy(model)
    assert latent(twin.embedding) is latent(twin.decoder)
    lay(twin, "embedding.weight", Ternary(), mask=checkerboard(6, 4))
    assert latent(twin.embedding) is latent(twin.decoder)
    assert not bool(twin.decoder.weight[~checkerboard(6, 4)].any())
    shipped = twin.decoder.weight.detach().clone()
    bake(twin)
    assert twin.embedding.weight is twin.decoder.weight
    assert torch.equal(twin.embedding.weight, shipped)
    assert parametrize.is_parametrized(model.decoder)


def test_a_tied_weight_is_listed_once_and_narrowed_everywhere() -> None:
    model = Tied()
    assert list(weights_of(model, Scope("*"))) == ["embedding.weight"]
    lay(model, "embedding.weight", Float())
    assert list(weights_of(model, Scope("*"))) == ["embedding.weight"]
    narrow(model, "decoder.weight", checkerboard(6, 4))
    assert not bool(model.embedding.weight[~checkerboard(6, 4)].any())


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


# Errors.


def test_a_wrong_name_is_answered_with_the_nearest() -> None:
    for wrong, told in (("ternry", "did you mean 'ternary'"), (9, "less than or equal to 8")):
        with pytest.raises(RecipeError, match=told):
            lay(nn.Sequential(nn.Linear(2, 2)), "0.weight", wrong)
    with pytest.raises(ModelError, match="no weight '0'; choose one of"):
        lay(nn.Sequential(nn.Linear(2, 2)), "0", Float())
    with pytest.raises(ModelError, match=r"no weight '0\.weigth'; did you mean '0\.weight'"):
        owner(nn.Sequential(nn.Linear(2, 2)), "0.weigth")


def test_what_nothing_can_represent_is_refused() -> None:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="'weight' holds NaN"):
        lay(model, "weight", Float())
    assert not parametrize.is_parametrized(model)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_holds_no_rows_of_numbers_is_refused() -> None:
    empty, scalar = nn.Linear(0, 4), nn.Module()
    scalar.weight = nn.Parameter(torch.tensor(1.0))
    for model in (empty, scalar):
        with pytest.raises(ModelError, match=r"'weight' has the shape .*only what has rows"):
            lay(model, "weight", Symmetric(4, granularity="row"))


def test_codes_of_what_overflows_are_refused() -> None:
    model = nn.Linear(256, 256).half()
    with torch.no_grad():
        model.weight.fill_(8.0)
    with pytest.raises(ModelError, match="'weight' becomes NaN or infinity as Binary"):
        lay(model, "weight", Binary())
    assert not parametrize.is_parametrized(model)
    lay(model, "weight", Binary("row"))


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 2)], ids=["shape", "dtype"]
)
def test_a_mask_of_another_shape_or_type_is_refused(mask: Tensor) -> None:
    with pytest.raises(ModelError, match="mask of 'weight'"):
        lay(nn.Linear(2, 2), "weight", Float(), mask=mask)


@pytest.mark.parametrize("laid_before", [False, True])
def test_narrowing_refuses_a_mask_of_another_shape(laid_before: bool) -> None:
    model = nn.Linear(2, 2)
    if laid_before:
        lay(model, "weight", Ternary())
    with pytest.raises(ModelError, match="mask of 'weight'"):
        narrow(model, "weight", torch.ones(2, dtype=torch.bool))


def test_a_frozen_weight_stays_frozen() -> None:
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    lay(model, "weight", Ternary())
    assert not latent(model).requires_grad
    bake(model)
    assert not model.weight.requires_grad


def test_a_failed_lay_leaves_the_model_as_it_was() -> None:
    model = nn.Linear(3, 3)
    lay(model, "weight", Binary())
    with pytest.raises(ModelError, match="do not divide"):
        lay(model, "weight", Symmetric(4, granularity=4))
    assert isinstance(model.parametrizations.weight[0].representation, Binary)


def test_a_representation_may_be_what_a_recipe_writes() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    lay(model, "0.weight", "ternary")
    assert laid_tensors(model)["0.weight"][0].representation == Ternary()
    lay(model, "0.weight", {"symmetric": {"bits": 4}})
    assert laid_tensors(model)["0.weight"][0].representation == Symmetric(4)
    with pytest.raises(ValueError, match="ternary"):
        lay(model, "0.weight", "ternery")


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_rows_that_a_look_up_changes_are_refused(kind: type[nn.Module]) -> None:
    table = nn.Sequential(kind(4, 2, max_norm=1.0))
    for refuse in (
        lambda: lay(table, "0.weight", Ternary("row")),
        lambda: Quantize(Ternary("row")).check(table, None),
    ):
        with pytest.raises(ModelError, match=r"'0\.weight': max_norm changes rows in place"):
            refuse()
