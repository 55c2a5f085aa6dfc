"""Train on laid weights: codebooks, masks, noise, precision, and the numbers that ship."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from helpers.tensors import same
from helpers.train import (
    BATCH,
    ONE,
    Tied,
    by_hand,
    constant,
    gradient,
    network,
    plain_sgd,
    task,
    trained,
)
from laconic.recover import L1, AdamW, Stop, Train
from laconic.step import State, run_step
from laconic.structure import Prune
from laconic.weights import Binary, KMeans, Quantize, Symmetric, Ternary, bake, lay
from laconic.weights.laid import laid_tensors


def test_a_codebook_is_trained_with_the_sum_over_each_cluster() -> None:
    """Deep Compression, section 3: the gradient of an entry is that of all its weights."""
    model = network()
    lay(model, "0.weight", KMeans(2))
    layer, latent = laid_tensors(model)["0.weight"]
    before, kept = layer.codebook.detach().clone(), latent.detach().clone()
    plain = copy.deepcopy(model)
    bake(plain)
    slope = gradient(plain, task(), ["0.weight"])["0.weight"]
    trained(Train(**ONE, scope="0", optimizer=plain_sgd()), model)
    sums = torch.zeros(4).index_add_(0, layer.index.long().flatten(), slope.flatten())
    assert torch.allclose(layer.codebook, before - 0.1 * sums, atol=1e-6)
    assert torch.equal(latent, kept)


@pytest.mark.parametrize(
    "representation",
    [Ternary(), Binary(), Symmetric(4, rounding="stochastic"), KMeans(3)],
    ids=repr,
)
def test_what_is_trained_is_what_ships(representation: Any) -> None:
    """Hazards 2, 8 and 12: no stale cache, no -0.0, and a pruned weight never revives."""
    model = network()
    run_step(Prune("weights", keep=0.5), State(model))
    run_step(Quantize(representation), State(model))
    trained(Train(epochs=3, batch=BATCH, optimizer=AdamW(0.05), penalty=L1(1e-3)), model)
    for name, (layer, latent) in laid_tensors(model).items():
        used = model.get_submodule(name.removesuffix(".weight")).weight.detach()
        shipped = layer.representation.decode(layer.encode(latent))
        assert torch.equal(used.view(torch.int32), shipped.view(torch.int32)), name
        assert not bool(used[~layer.mask].any())
        assert not bool(((used == 0) & used.signbit()).any())


def test_training_reads_the_weights_as_they_are_now() -> None:
    """Hazard 2: with the cache of torch's parametrize around it, a second update would not."""
    model, twin = network(), network()
    for each in (model, twin):
        lay(each, "0.weight", Ternary())
    train = constant(3, Stop(keep="last"))
    made = lambda groups: torch.optim.SGD(groups, lr=0.1)  # noqa: E731
    assert same(trained(train, model), by_hand(train, twin, task(), made))
    assert not torch.equal(laid_tensors(model)["0.weight"][1], network()[0].weight)


def test_noise_is_drawn_anew_after_every_update_once_and_in_the_scope_alone() -> None:
    model = Tied()
    for name in ("first.weight", "last.weight"):
        lay(model, name, Symmetric(4, rounding="stochastic"))
    before = {name: int(layer.noise) for name, (layer, _) in laid_tensors(model).items()}
    trained(Train(scope="first, second", epochs=2, batch=BATCH, stop=Stop(keep="last")), model)
    after = {
        name: int(layer.noise) - before[name] for name, (layer, _) in laid_tensors(model).items()
    }
    assert after == {"first.weight": 6, "second.weight": 6, "last.weight": 0}


def test_a_kind_finds_its_modules_though_they_are_laid() -> None:
    """Hazard 10: the type of a laid module is another."""
    model = network()
    lay(model, "2.weight", Symmetric(8))
    before = laid_tensors(model)["2.weight"][1].detach().clone()
    trained(Train(scope="kind:linear", batch=BATCH), model)
    assert not torch.equal(laid_tensors(model)["2.weight"][1], before)


def test_bfloat16_trains_numbers_that_stay_float32() -> None:
    """Hazard 13: autocast is for forwards in training; scores and weights are float32."""
    states = [State(network(), task(), precision=p) for p in ("float32", "bfloat16")]
    seen: list[torch.dtype] = []
    for state in states:
        lay(state.model, "0.weight", Ternary())
        state.model[2].register_forward_hook(lambda m, i, output: seen.append(output.dtype))  # type: ignore[index, operator]
        run_step(Train(epochs=2, batch=BATCH), state)
    assert {tensor.dtype for tensor in states[1].model.parameters()} == {torch.float32}
    half = len(seen) // 2
    assert set(seen[:half]) == {torch.float32}
    assert set(seen[half:]) == {torch.bfloat16, torch.float32}
    assert not same(states[0].model, states[1].model)
    layer, latent = laid_tensors(states[1].model)["0.weight"]
    assert torch.equal(layer(latent), layer.representation.decode(layer.encode(latent)))
