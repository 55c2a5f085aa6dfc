"""Laid weights in deep copies, baked networks and tied modules: none changes another."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from helpers.laid import checkerboard, latent
from laconic import compress, load
from laconic.errors import ModelError
from laconic.scope import Scope
from laconic.weights import Binary, Float, Quantize, Symmetric, Ternary, bake, lay
from laconic.weights.laid import laid_tensors, mask_of, narrow, weights_of


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
