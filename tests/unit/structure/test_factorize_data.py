"""Factorize by low rank on data: how inputs are weighed, and what it asks of the task."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from helpers.factorize import DATA, GEOMETRIES, factorized, images, network, source, split, task
from laconic.errors import ModelError, TaskError
from laconic.scope import Scope
from laconic.step import State, run_step
from laconic.structure.columns import groups_of
from laconic.structure.factorize import Factorize
from laconic.structure.matrices import SVD, DataSVD
from laconic.tasks import Task


def error_on_data(model: nn.Module, plain: nn.Module, x: Tensor, upto: int) -> float:
    """Return the squared error of a layer's outputs on its inputs in the plain network."""
    entered = plain[:upto](x)  # type: ignore[index]
    return float((model[upto](entered) - plain[upto](entered)).detach().square().sum())  # type: ignore[index]


@pytest.mark.parametrize("name", ["0", "2", "5", "7"])
def test_data_make_the_error_on_them_smaller(name: str) -> None:
    # All training examples at once: the error on them is what is minimised.
    everything = next(task().train.batches(64)).inputs[0]
    plain, place = network(), int(name)
    scope = Scope(name)
    found = factorized(Factorize(DataSVD(1, batches=1, batch=64), scope=scope))
    blind = factorized(Factorize(SVD(1), scope=scope))
    weighed, unweighed = (
        error_on_data(model, plain, everything, place) for model in (found, blind)
    )
    assert weighed <= unweighed
    assert weighed < 0.99 * unweighed or name in ("0", "2")


@pytest.mark.parametrize("geometry", [name for name in GEOMETRIES if name != "depthwise"])
def test_moments_of_a_convolution_are_those_of_its_patches(geometry: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, **GEOMETRIES[geometry])
    conv.bias = None
    model = nn.Sequential(conv)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, 9, 9, generator=generator)
    labels = torch.zeros(12).long()
    data = Task((x, labels), (x, labels), (x, labels))
    step = Factorize(DataSVD(2, batches=2, batch=6))
    moments = step._moments(State(model, data), {"0": conv})["0"]
    # |W X|_F^2 = tr(W C W^T) is the energy of what the convolution computes.
    kernels = conv.weight.detach().double().flatten(1).chunk(groups_of(conv))
    energy = sum(float((w @ m @ w.T).trace()) for w, m in zip(kernels, moments, strict=True))
    assert energy == pytest.approx(float(conv(x).detach().double().square().sum()), rel=1e-5)


def test_moments_are_summed_over_batches_and_calls() -> None:
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = images(20, 6)
    labels = torch.arange(20) % 2
    data = Task((x, labels), (x, labels), (x, labels))
    state = State(model, data)
    moments = Factorize(DataSVD(batches=2, batch=5))._moments(state, {"0": layer})["0"][0]
    seen = torch.cat([batch.inputs[0] for batch in list(data.train.batches(5, seed=0))[:2]])
    entered = torch.cat([seen, model[:2](seen)]).detach().double()
    assert torch.allclose(moments, entered.T @ entered, atol=1e-5)
    assert not layer._forward_pre_hooks


def test_data_are_drawn_by_the_seed_and_the_network_is_left_as_found() -> None:
    step = Factorize(DataSVD(3, batches=1, batch=4), scope=Scope("5"))
    model = network().train()
    model[1].eval()
    one, same = factorized(step, copy.deepcopy(model)), factorized(step, copy.deepcopy(model))
    other = factorized(step, copy.deepcopy(model), seed=1)
    assert torch.equal(one[5][0].weight, same[5][0].weight)
    assert not torch.equal(one[5][0].weight, other[5][0].weight)
    assert not one[1].training and one[0].training and one[5].training


def test_an_energy_on_data_is_that_of_the_outputs() -> None:
    linear = nn.Linear(8, 8, bias=False)
    inputs = images(30, 8).double() * torch.tensor([9.0] * 2 + [0.01] * 6)
    moments = (inputs.T @ inputs)[None]
    assert DataSVD(energy=0.99).rank_for(source(linear, moments)) == 2
    made = split(DataSVD(energy=0.99), linear, moments)
    expected = linear(inputs.float())
    lost = float((made(inputs.float()) - expected).detach().square().sum())
    assert lost <= 0.011 * float(expected.detach().square().sum())


def test_a_layer_that_no_batch_reaches_is_refused() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    x, labels = images(20, 6), torch.arange(20) % 2
    data = Task((x, labels), (x, labels), (x, labels))
    with pytest.raises(ModelError, match="inputs of 'idle' were never computed"):
        run_step(Factorize(DataSVD()), State(Lazy(), data))
    model = Lazy()
    model.used.weight.data.fill_(1e30)
    chained = nn.Sequential(model, nn.Linear(6, 6), nn.Linear(6, 6))
    chained[1].weight.data.fill_(1e30)
    with pytest.raises(ModelError, match="inputs of '2' are not finite"):
        run_step(Factorize(DataSVD(), scope=Scope("2")), State(chained, data))


def test_data_need_a_task() -> None:
    with pytest.raises(TaskError, match="there is no task"):
        Factorize(DATA).check(network(), None)
    with pytest.raises(TaskError, match="there is no task"):
        run_step(Factorize(DATA), State(network()))
    Factorize(SVD()).check(network(), None)
