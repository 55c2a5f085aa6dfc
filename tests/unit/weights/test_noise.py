"""Quantisation noise: which blocks, which gradients, evaluation, draws, resuming, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.train import network, task
from laconic.errors import ChainError, RecipeError
from laconic.recover import AdamW, Stop, Train
from laconic.scope import Scope
from laconic.ship.checkpoint import load_checkpoint, save_checkpoint
from laconic.step import State, run_step
from laconic.structure import Prune
from laconic.weights import (
    Float,
    KMeans,
    Laid,
    LearnedStep,
    LossAware,
    Product,
    Quantize,
    QuantNoise,
    Symmetric,
    Ternary,
    lay,
)
from laconic.weights.laid import laid_tensors
from laconic.weights.noise import noisy, random_blocks

TRAIN = Train(epochs=2, batch=8, optimizer=AdamW(0.02), stop=Stop(keep="last"))


def bytes_of(model: nn.Module) -> dict[str, bytes]:
    return {name: t.detach().numpy().tobytes() for name, t in model.state_dict().items()}


# Blocks.


@pytest.mark.parametrize(
    ("shape", "block"), [((6, 20), 8), ((4, 3, 3, 3), 9), ((17,), 5), ((3, 2), 8)]
)
def test_blocks_are_chosen_whole(shape: tuple[int, ...], block: int) -> None:
    chosen = random_blocks(torch.Size(shape), 0.5, block)
    assert chosen.shape == shape
    for row in chosen.reshape(shape[0] if len(shape) > 1 else 1, -1):
        assert all(part.unique().numel() == 1 for part in row.split(block))


@pytest.mark.parametrize("chance", [0.0, 0.1, 0.7, 1.0])
def test_the_chance_is_a_probability(chance: float) -> None:
    chosen = random_blocks(torch.Size((1000, 160)), chance, 8).double().mean()
    assert float(chosen) == pytest.approx(chance, abs=4 * (chance * (1 - chance) / 20_000) ** 0.5)


# Value and gradient.


@pytest.mark.parametrize("representation", [Ternary(), Symmetric(3), LossAware(1)], ids=repr)
def test_chosen_blocks_are_quantised_and_the_others_are_not(representation: Any) -> None:
    weight = torch.randn(12, 40, requires_grad=True)
    laid = Laid(representation, None, representation.fit(weight.detach()))
    quantised = laid(weight).detach()
    with noisy([laid], QuantNoise(0.4, block=8, retrain=TRAIN)):
        torch.manual_seed(5)
        output = laid(weight)
        torch.manual_seed(5)
        chosen = random_blocks(weight.shape, 0.4, 8)
        assert torch.equal(output, torch.where(chosen, quantised, weight))
        assert 0 < int(chosen.sum()) < chosen.numel()
        output.sum().backward()
        assert torch.equal(weight.grad, torch.ones(12, 40))
        laid.eval()
        assert torch.equal(laid(weight), quantised)
    laid.train()
    assert torch.equal(laid(weight), quantised)


def test_a_clipped_weight_has_no_gradient_where_it_is_quantised() -> None:
    weight = torch.full((4, 16), 9.0, requires_grad=True)
    laid = Laid(LearnedStep(2), None, {"scale": torch.ones(1)})
    with noisy([laid], QuantNoise(0.5, block=4, retrain=TRAIN)):
        torch.manual_seed(2)
        laid(weight).sum().backward()
    torch.manual_seed(2)
    chosen = random_blocks(weight.shape, 0.5, 4)
    assert torch.equal(weight.grad, (~chosen).float())
    assert float(laid.scale.grad) == pytest.approx(int(chosen.sum()) / 64**0.5)


def test_zero_blocks_have_a_straight_through_gradient() -> None:
    weight = torch.randn(8, 16, requires_grad=True)
    laid = Laid(Float())
    with noisy([laid], QuantNoise(0.5, proxy="zero", retrain=TRAIN)):
        torch.manual_seed(4)
        output = laid(weight)
    torch.manual_seed(4)
    chosen = random_blocks(weight.shape, 0.5, 8)
    assert torch.equal(output, weight.masked_fill(chosen, 0.0))
    output.sum().backward()
    assert torch.equal(weight.grad, torch.ones(8, 16))


def test_what_is_pruned_stays_so() -> None:
    weight, mask = torch.randn(8, 16, requires_grad=True), torch.rand(8, 16) < 0.5
    laid = Laid(Ternary(), mask)
    with noisy([laid], QuantNoise(0.5, retrain=TRAIN)):
        output = laid(weight)
    output.sum().backward()
    assert not bool(output[~mask].any()) and not bool(weight.grad[~mask].any())


# Training.


def seen_in_training(step: QuantNoise, model: nn.Module) -> list[tuple[bool, Tensor]]:
    """Return the first weight of every forward, and whether it was in training."""
    seen: list[tuple[bool, Tensor]] = []
    hook = model[0].register_forward_hook(
        lambda module, inputs, output: seen.append(
            (module.training, module.weight.detach().clone())
        )
    )
    run_step(step, State(model, task()))
    hook.remove()
    return seen


def test_every_update_has_other_blocks_and_evaluation_none() -> None:
    model = network()
    lay(model, "0.weight", Ternary())
    judging = TRAIN.model_copy(update={"stop": Stop()})
    seen = seen_in_training(QuantNoise(0.5, block=2, retrain=judging), model)
    in_training = [weight for training, weight in seen if training]
    assert len(in_training) == 6
    assert all(weight.unique().numel() > 3 for weight in in_training)
    judged = [weight for training, weight in seen if not training]
    assert judged and all(weight.unique().numel() <= 3 for weight in judged)
    layer, latent = laid_tensors(model)["0.weight"]
    assert layer.quant_noise is None
    assert torch.equal(model[0].weight, layer.representation.decode(layer.encode(latent)))


def test_no_share_is_the_float_training_and_all_of_it_the_quantised_one() -> None:
    found = {}
    for name, step in (
        ("none", QuantNoise(0.0, retrain=TRAIN)),
        ("all", QuantNoise(1.0, retrain=TRAIN)),
    ):
        model = network()
        lay(model, "0.weight", Ternary())
        run_step(step, State(model, task()))
        found[name] = laid_tensors(model)["0.weight"][1].detach()
    for name, representation in (("none", Float()), ("all", Ternary())):
        model = network()
        lay(model, "0.weight", representation)
        # The same draws as inside the step: its seed goes into the training's.
        run_step(
            QuantNoise(0.0, proxy="zero", scope=Scope("2"), retrain=TRAIN), State(model, task())
        )
        assert torch.equal(laid_tensors(model)["0.weight"][1].detach(), found[name]), name


def test_zero_noise_takes_weights_that_are_plain_and_leaves_them_so() -> None:
    model = network()
    lay(model, "2.weight", Symmetric(4))
    step = QuantNoise(0.5, block=2, proxy="zero", retrain=TRAIN)
    seen = seen_in_training(step, model)
    assert all(bool((weight == 0).any()) for training, weight in seen if training)
    assert all(bool((weight != 0).all()) for training, weight in seen if not training)
    assert list(laid_tensors(model)) == ["2.weight"]
    pruned = network()
    while_training = TRAIN.model_copy(update={"during": (Prune("weights", keep=0.5),)})
    run_step(step.model_copy(update={"retrain": while_training}), State(pruned, task()))
    assert [int((pruned[place].weight == 0).sum()) for place in (0, 2)] == [24, 12]


def test_the_scope_alone_gets_noise() -> None:
    model = network()
    for name in ("0.weight", "2.weight"):
        lay(model, name, Ternary())
    seen = seen_in_training(QuantNoise(0.5, block=2, scope=Scope("2"), retrain=TRAIN), model)
    assert all(weight.unique().numel() <= 3 for _, weight in seen)


class Stopped(Exception):
    """Ends a run as if the machine had."""


class Keep:
    """Writes a checkpoint after so many updates, and stops there."""

    def __init__(self, updates: int, path: Path) -> None:
        self.left, self.path = updates, path

    def due(self) -> bool:
        self.left -= 1
        return self.left == 0

    def write(self, state: State, training: dict[str, Any]) -> None:
        save_checkpoint(state, training, self.path, run={})
        raise Stopped


@pytest.mark.parametrize("proxy", ["value", "zero"])
def test_a_resumed_training_is_the_same(proxy: str, tmp_path: Path) -> None:
    step = QuantNoise(0.5, block=2, proxy=proxy, retrain=TRAIN)
    quantize = Quantize(LossAware(), scope=Scope("0"))
    whole, part = State(network(), task()), State(network(), task())
    for state in (whole, part):
        run_step(quantize, state)
    run_step(step, whole)
    part.keeper = Keep(4, tmp_path / "checkpoint")
    with pytest.raises(Exception, match="Stopped"):
        run_step(step, part)
    other = State(network(), task())
    load_checkpoint(other, tmp_path / "checkpoint")
    assert other.training
    run_step(step, other)
    assert bytes_of(other.model) == bytes_of(whole.model)
    still = State(network(), task())
    run_step(quantize, still)
    run_step(TRAIN, still)
    assert bytes_of(still.model) != bytes_of(whole.model)


# Refusals.


def test_noise_needs_something_that_is_quantised() -> None:
    step = QuantNoise(retrain=TRAIN)
    with pytest.raises(ChainError, match="nothing in '\\*' is quantised; put quantize before it"):
        step.check(network(), task())
    step.check(network(), task(), (Quantize(4),))
    with pytest.raises(ChainError, match="nothing in '0' is quantised"):
        QuantNoise(scope=Scope("0"), retrain=TRAIN).check(
            network(), task(), (Quantize(4, scope=Scope("2")),)
        )
    with pytest.raises(ChainError, match="nothing"):
        run_step(step, State(network(), task()))
    QuantNoise(proxy="zero", retrain=TRAIN).check(network(), task())


@pytest.mark.parametrize("representation", [KMeans(), Product()], ids=repr)
@pytest.mark.parametrize("proxy", ["value", "zero"])
def test_codes_that_are_fixed_are_refused(representation: Any, proxy: str) -> None:
    step = QuantNoise(proxy=proxy, retrain=TRAIN)
    with pytest.raises(ChainError, match=r"codes are fixed.*quantize after the training"):
        step.check(network(), task(), (Quantize(representation),))


def test_what_the_training_refuses_is_refused() -> None:
    with pytest.raises(ChainError, match="use adam or adamw"):
        QuantNoise(retrain=Train(optimizer={"sgd": 0.1})).check(
            network(), task(), (Quantize(LossAware()),)
        )


@pytest.mark.parametrize(
    "fields", [{"chance": -0.1}, {"chance": 1.1}, {"block": 0}, {"retrain": None}], ids=repr
)
def test_fields_out_of_bounds_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(fields))):
        QuantNoise(**{"retrain": TRAIN} | fields)
