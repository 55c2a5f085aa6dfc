"""Train: what moves and what stays, by scope, frozen and shared parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.tensors import same
from helpers.train import BATCH, Tied, network, plain_sgd, task, trained, with_norm
from laconic.errors import ModelError, RunError, ScopeError
from laconic.recover import AdamW, Reconstruct, Train
from laconic.recover.descent import Descent
from laconic.step import State, run_step
from laconic.weights import Symmetric, lay


def test_frozen_parameters_stay() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone()
    after = trained(Train(epochs=2, batch=BATCH, optimizer=AdamW(0.1)), model)
    assert torch.equal(after[0].weight, before)
    assert not after[0].weight.requires_grad
    assert not torch.equal(after[2].weight, network()[2].weight)


def test_nothing_to_train_is_refused() -> None:
    model = network().requires_grad_(False)
    with pytest.raises(RunError, match="every parameter in scope '0' is frozen"):
        run_step(Train(scope="0"), State(model, task()))
    with pytest.raises(ScopeError, match="'1' selects no module with parameters to train"):
        Train(scope="1").check(network(), task())


@pytest.mark.parametrize("step", [Train(epochs=1), Reconstruct()])
def test_weights_in_float16_are_refused(step: Train | Reconstruct) -> None:
    with pytest.raises(ModelError, match=rf"^{step.name}: the weights are float16.*float\(\)"):
        step.check(network().half(), task())
    with pytest.raises(ModelError, match="float16"):
        Descent(AdamW(), model := network().half(), [], networks=[[*model.parameters()]], name="a")


def test_only_the_scope_is_trained_and_statistics_outside_stay() -> None:
    model = with_norm()
    after = trained(Train(scope="4", epochs=2, batch=BATCH, optimizer=AdamW(0.1)), model)
    start = with_norm().state_dict()
    for name, tensor in after.state_dict().items():
        assert torch.equal(tensor, start[name]) == (not name.startswith("4.")), name


def test_statistics_inside_the_scope_follow() -> None:
    after = trained(Train(scope="1", batch=BATCH), with_norm())
    assert int(after[1].num_batches_tracked) == 3
    assert torch.equal(after[0].weight, with_norm()[0].weight)


@pytest.mark.parametrize("laid", [False, True])
def test_a_shared_parameter_belongs_to_each_of_its_modules(laid: bool) -> None:
    model = Tied()
    if laid:
        lay(model, "first.weight", Symmetric(8))
    before = model.first.weight.detach().clone()
    trained(Train(scope="second", batch=BATCH, optimizer=plain_sgd()), model)
    assert not torch.equal(model.first.weight, before)
    assert torch.equal(model.first.weight, model.second.weight)


def test_the_order_of_parameters_does_not_depend_on_what_is_laid() -> None:
    from laconic.recover.train import _trained

    plain = Tied()
    names = {id(parameter): name for name, parameter in plain.named_parameters()}
    before = [names[id(parameter)] for parameter in _trained(Train(), plain)]
    for name in ("second.weight", "last.weight"):
        lay(plain, name, Symmetric(8))
    assert [names[id(parameter)] for parameter in _trained(Train(), plain)] == before


def test_gradients_are_left_nowhere() -> None:
    model = trained(Train(scope="2", batch=BATCH))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_trains_whatever_the_caller_turned_off(context: Any) -> None:
    from laconic import compress

    with context():
        result = compress(network(), task(), [Train(batch=BATCH)])
    assert not same(result.model, network())
