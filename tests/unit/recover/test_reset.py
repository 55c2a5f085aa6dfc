"""Reset: numbers are drawn anew, masks and representations stay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laconic.errors import ModelError, ScopeError
from laconic.recover import Reset, Train
from laconic.scope import Scope
from laconic.step import State, run_step
from laconic.structure import Prune
from laconic.tasks import Task
from laconic.weights import Float, KMeans, Quantize, Representation, Symmetric, Ternary, lay
from laconic.weights.laid import laid_tensors, mask_of


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.BatchNorm1d(8, affine=False),
            nn.Linear(8, 3),
        )  # fmt: skip


def reset(model: Any, seed: int = 0, scope: str = "*") -> Any:
    step = Reset(scope=scope)
    step.check(model, None)
    run_step(step, State(model, seed=seed))
    return model


def worn() -> nn.Sequential:
    """Return the network with statistics that it has learned."""
    model = network()
    model(torch.randn(16, 6) + 3)
    nn.init.constant_(model[1].weight, 0.5)
    return model


def test_every_number_is_drawn_as_torch_draws_it() -> None:
    model = reset(worn())
    fresh, bound = nn.BatchNorm1d(8), 6**-0.5
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(model[1].state_dict()[name], tensor), name
    assert int(model[3].num_batches_tracked) == 0
    for tensor in (model[0].weight, model[0].bias):
        assert 0.5 * bound < float(tensor.detach().abs().max()) <= bound
    assert not bool((model[0].weight == network()[0].weight).any())


def test_draws_depend_on_seed_and_name_alone() -> None:
    first = reset(network())
    torch.rand(3)
    assert torch.equal(first[4].weight, reset(worn())[4].weight)
    assert torch.equal(first[4].weight, reset(network(), scope="4")[4].weight)
    assert not bool((first[4].weight == reset(network(), seed=1)[4].weight).any())


def test_what_is_outside_the_scope_and_what_is_frozen_stays() -> None:
    model = worn()
    model[4].bias.requires_grad_(False)
    before = copy.deepcopy(model)
    reset(model, scope="4")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name]) == (name != "4.weight"), name
    assert not model[4].bias.requires_grad


@pytest.mark.parametrize(
    "representation", [Float(), Ternary(), KMeans(2), Symmetric(4)], ids=lambda r: r.name
)
def test_masks_and_representations_stay(representation: Representation) -> None:
    model = network()
    run_step(Prune("weights", keep=0.5), State(model))
    run_step(Quantize(representation), State(model))
    names = list(laid_tensors(model))
    masks = {name: mask_of(model, name).clone() for name in names}
    before = {name: latent for name, (_, latent) in laid_tensors(model).items()}
    order = [name for name, _ in model.named_parameters()]
    used = model[0].weight.detach().clone()
    reset(model)
    assert list(laid_tensors(model)) == names
    assert [name for name, _ in model.named_parameters()] == order
    for name, (layer, latent) in laid_tensors(model).items():
        assert layer.representation == representation and latent is before[name]
        assert torch.equal(layer.mask, masks[name])
        now = layer(latent)
        assert not bool(now[~masks[name]].any()) and bool((now != 0).any())
        # A codebook is fitted to the new numbers, within the bound of torch's start.
        assert float(now.detach().abs().max()) <= 8**-0.5 * 1.7
    assert not torch.equal(model[0].weight, used)


def test_a_frozen_laid_weight_stays() -> None:
    model = network()
    lay(model, "0.weight", Ternary())
    latent = laid_tensors(model)["0.weight"][1]
    latent.requires_grad_(False)
    before, scale = latent.clone(), laid_tensors(model)["0.weight"][0]
    reset(model)
    assert torch.equal(laid_tensors(model)["0.weight"][1], before)
    assert laid_tensors(model)["0.weight"][0] is scale


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.second(self.first(x))
        return outputs


@pytest.mark.parametrize("laid", [False, True])
def test_tied_weights_stay_tied(laid: bool) -> None:
    model = Tied()
    if laid:
        lay(model, "first.weight", Symmetric(4))
    before = model.first.weight.detach().clone()
    reset(model)
    assert torch.equal(model.first.weight, model.second.weight)
    assert not torch.equal(model.first.weight, before)
    assert len(laid_tensors(model)) == 2 * laid
    assert len({id(layer) for layer, _ in laid_tensors(model).values()}) == laid


def test_attention_of_torch_is_drawn_too() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    before = copy.deepcopy(model.state_dict())
    reset(model)
    for name, tensor in model.state_dict().items():
        assert tensor.dim() < 2 or not torch.equal(tensor, before[name]), name
    assert torch.equal(model.norm1.weight, torch.ones(8))


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.inner(x * self.weight)
        return outputs


def test_a_module_that_does_not_know_how_it_starts_is_refused() -> None:
    model = nn.Sequential(Custom())
    with pytest.raises(ModelError, match=r"'0' \(Custom\) has parameters and no reset.*'!0'"):
        Reset().check(model, None)
    reset(model, scope="0.*")
    assert torch.equal(model[0].weight, torch.ones(4))


def test_a_scope_without_parameters_is_refused() -> None:
    with pytest.raises(ScopeError, match="'2' selects no module with parameters to reset"):
        Reset(scope=Scope("2")).check(network(), None)


def test_the_control_of_a_pruned_network_trains_from_scratch() -> None:
    """Liu et al. 2019: the same mask, other numbers, the same training."""
    pair = (torch.randn(20, 6), torch.arange(20) % 3)
    state = State(network(), Task(pair, pair, pair))
    for step in (Prune("weights", keep=0.25), Reset(), Train(batch=8)):
        run_step(step, state)
    alive = [int(layer.mask.sum()) for layer, _ in laid_tensors(state.model).values()]
    assert alive == [12, 6]
