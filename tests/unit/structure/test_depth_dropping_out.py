"""LayerDrop: blocks drop out while a network trains."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laconic
from helpers.depth import Block, after, inputs, net, task
from helpers.tensors import same
from laconic.errors import TaskError
from laconic.recover import SGD, Train
from laconic.step import State, run_step
from laconic.structure import LayerDrop
from laconic.structure.depth import dropping_out
from laconic.structure.surgery import edits_of


def fit(during: float | None, seed: int = 0, epochs: int = 2) -> nn.Module:
    train = Train(epochs=epochs, batch=6, optimizer=SGD(0.1))
    return after(train if during is None else LayerDrop(during, retrain=train), seed=seed)


def test_dropping_out_with_no_chance_is_plain_training() -> None:
    state = State(net(), task())
    state.seed = laconic.step.derive(0, "layer_drop", 0)
    run_step(Train(epochs=2, batch=6, optimizer=SGD(0.1)), state)
    assert same(fit(0.0), state.model)


def test_draws_depend_on_the_seed_alone() -> None:
    first = fit(0.5)
    torch.manual_seed(99)
    assert same(fit(0.5), first)
    assert not same(fit(0.5, seed=1), first)
    assert not same(fit(0.2), first)


def test_blocks_drop_out_independently_while_training() -> None:
    model = net().train()
    model.blocks.apply(lambda module: setattr(module, "p", 0.0))  # dropout off
    x, rounds = inputs(1), 400
    with dropping_out(model.blocks, 0.3):
        for _ in range(rounds):
            model(x)
    calls = [block.calls for block in model.blocks]
    # 400 draws of 0.7: the deviation is 9.2; five of them are allowed.
    assert all(abs(count - 0.7 * rounds) < 46 for count in calls)
    assert len(set(calls)) > 1


def test_a_dropped_block_returns_its_input() -> None:
    model, x = net().train(), inputs()
    with dropping_out(model.blocks, 1 - 1e-12):
        assert torch.equal(model(x), model.last(model.first(x).mean(dim=1)))
        model.eval()
        kept = model(x)
    assert torch.equal(kept, model(x))


def test_nothing_is_left_behind() -> None:
    model = net()
    before = [dict(vars(module)) for module in model.modules()]
    with dropping_out(model.blocks, 0.5):
        assert "forward" in vars(model.blocks[0])
    assert [dict(vars(module)) for module in model.modules()] == before
    with pytest.raises(TypeError), dropping_out(model.blocks, 0.5):
        model()
    assert [dict(vars(module)) for module in model.modules()] == before
    trained = fit(0.5)
    assert all("forward" not in vars(module) for module in trained.modules())
    assert type(trained.blocks[0]) is Block
    assert not trained.blocks[0]._forward_hooks and edits_of(trained) == {}


def test_a_copy_made_meanwhile_is_a_network_of_its_own() -> None:
    model, x = net(), inputs()
    with dropping_out(model.blocks, 0.5):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.blocks[0].inner.weight.zero_()
            other.blocks[0].inner.bias.zero_()
        assert not torch.equal(other(x), model(x))
    assert not torch.equal(other(x), model(x))


class Halt:
    """Keeps what a run needs to go on after some updates, and ends it."""

    def __init__(self, updates: int) -> None:
        self.left = updates
        self.kept: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    def due(self) -> bool:
        self.left -= 1
        return self.left == 0

    def write(self, state: State, training: dict[str, Any]) -> None:
        self.kept = copy.deepcopy((state.model.state_dict(), training))
        raise KeyboardInterrupt


@pytest.mark.parametrize("updates", [1, 4, 9])
def test_a_resumed_training_goes_on_as_if_nothing_had_happened(updates: int) -> None:
    step = LayerDrop(0.5, retrain=Train(epochs=3, batch=6, optimizer=SGD(0.1)))
    whole = after(step)
    halt = Halt(updates)
    stopped = State(net(), task(), keeper=halt)
    with pytest.raises(KeyboardInterrupt):
        run_step(step, stopped)
    assert all("forward" not in vars(module) for module in stopped.model.modules())
    assert halt.kept is not None
    resumed = State(net(), task(), training=halt.kept[1])
    resumed.model.load_state_dict(halt.kept[0])
    run_step(step, resumed)
    assert same(resumed.model, whole)


def test_what_the_training_refuses_is_refused() -> None:
    with pytest.raises(TaskError, match="there is no task"):
        LayerDrop(0.2, retrain=Train()).check(net(), None)
