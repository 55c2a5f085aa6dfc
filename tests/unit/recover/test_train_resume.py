"""Train: what a checkpoint holds of a training, and how one goes on from it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.tensors import same
from helpers.train import BATCH, constant, network, plain_sgd, scored, task
from laconic.errors import RunError
from laconic.recover import SGD, Adam, AdamW, Stop, Train
from laconic.recover.train import _Loop
from laconic.ship.checkpoint import load_checkpoint, save_checkpoint
from laconic.step import State, run_step
from laconic.structure import Prune
from laconic.tasks import digits
from laconic.weights import KMeans, lay


class Keep:
    """Notes what a training would write, at every chance."""

    def __init__(self) -> None:
        self.payloads: list[dict[str, Any]] = []

    def due(self) -> bool:
        return True

    def write(self, state: State, training: dict[str, Any]) -> None:
        self.payloads.append(training)


def test_it_offers_to_write_after_every_update_and_epoch() -> None:
    keeper = Keep()
    run_step(Train(epochs=2, batch=BATCH), State(network(), task(), keeper=keeper))
    stood = [(p["counters"]["epoch"], p["counters"]["batch"]) for p in keeper.payloads]
    assert stood == [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]


def moments(loop: _Loop, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: slots for parameter, slots in loop.descent.optimizer.state.items()
    }


@pytest.mark.parametrize("optimizer", [Adam(0.01), AdamW(0.01), SGD(0.1), plain_sgd()], ids=repr)
def test_moments_go_back_to_their_parameters(optimizer: Any, tmp_path: Path) -> None:
    """A mask is laid on the way, which moves a weight to another name and place."""
    train = Train(
        epochs=2, batch=BATCH, optimizer=optimizer, during=(Prune("weights", scope="2", keep=0.5),)
    )
    state = State(network(), task())
    lay(state.model, "0.weight", KMeans(2))
    loop = _Loop(train, state)
    for batch in itertools.islice(loop.batches(), 4):
        loop.update(batch)
    save_checkpoint(state, loop.payload(), tmp_path / "checkpoint", run={})
    other = State(network(), task())
    load_checkpoint(other, tmp_path / "checkpoint")
    resumed = _Loop(train, other)
    assert other.training == {}
    before, after = moments(loop, state.model), moments(resumed, other.model)
    assert before.keys() == after.keys()
    assert len(before) == (0 if optimizer == plain_sgd() else 4)  # 0.weight itself has no gradient
    for name, slots in before.items():
        assert slots.keys() == after[name].keys()
        assert all(torch.equal(torch.as_tensor(slots[key]), after[name][key]) for key in slots)
    assert same(state.model, other.model)


def test_the_best_epoch_is_written_and_found_again(tmp_path: Path) -> None:
    state = State(network(), scored(0.1, 0.9, 0.2))
    loop = _Loop(constant(3, Stop(patience=5)), state)
    for batch in loop.batches():
        loop.update(batch)
    save_checkpoint(state, loop.payload(), tmp_path / "checkpoint", run={})
    other = State(network(), task())
    load_checkpoint(other, tmp_path / "checkpoint")
    resumed = _Loop(constant(3, Stop(patience=5)), other)
    assert resumed.best_score == loop.best_score and resumed.best_score is not None
    assert resumed.best_score[0] == 0.9 and resumed.stale == 1
    assert resumed.best.keys() == loop.best.keys()
    assert all(torch.equal(resumed.best[name], loop.best[name]) for name in loop.best)
    resumed.run()
    loop.model.load_state_dict(loop.best)
    assert same(other.model, loop.model)


def test_moments_of_other_parameters_are_refused() -> None:
    def loop(width: int) -> _Loop:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 10))
        return _Loop(Train(optimizer=AdamW()), State(model, digits()))

    first = loop(4)
    first.update(next(first.task.train.batches(8)))
    with pytest.raises(RunError, match="moments in the checkpoint are not those"):
        loop(6).restore(first.payload())
