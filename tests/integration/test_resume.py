"""What resuming a stopped run returns, notes and refuses."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.resuming import (
    PATIENCE,
    Stopped,
    artefact,
    count_moments,
    network,
    poisoned,
    quicken,
    short,
    small_task,
    three,
)
from laconic import measure as measuring
from laconic import rundir
from laconic.errors import LaconicError, RunError
from laconic.recipe import Recipe
from laconic.recover import LeastSquares, Reconstruct
from laconic.run import compress
from laconic.ship import save
from laconic.ship.container import read, write
from laconic.step import Step
from laconic.structure import Prune
from laconic.tasks import Task
from laconic.weights import Quantize


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with poisoned():
        quicken(monkeypatch)
        yield


TWO = Recipe([Prune("weights", keep=0.5, retrain=short(epochs=2))], seed=5, precision="float32")


@pytest.fixture
def stopped(tmp_path: Path, quick: None) -> Path:
    """Return the directory of a run that died in the middle of its training."""
    with pytest.MonkeyPatch.context() as patch:
        count_moments(patch, 3)
        with pytest.raises(Stopped):
            compress(network(), small_task(), TWO, out=tmp_path / "run")
    return tmp_path / "run"


def test_resuming_a_finished_run_returns_its_result(stopped: Path) -> None:
    compress(network(), small_task(), TWO, out=stopped, resume=True)
    before = artefact(stopped)
    result = compress(network(), small_task(), TWO, out=stopped, resume=True)
    assert artefact(stopped) == before
    assert len(result.history) == 2
    assert result.facts["notes"] == []
    assert int((result.model[6].weight != 0).sum()) == 512  # type: ignore[union-attr, operator]


def test_resuming_nothing_starts(tmp_path: Path, quick: None) -> None:
    result = compress(network(), None, [Prune("weights", keep=0.5)], out=tmp_path, resume=True)
    assert len(result.history) == 2


def test_a_directory_that_holds_a_run_is_not_taken_by_another(stopped: Path) -> None:
    before = (stopped / rundir.CHECKPOINT).read_bytes()
    with pytest.raises(RunError, match=r"holds a run already; resume it .*or --resume"):
        compress(network(), small_task(), TWO, out=stopped)
    assert (stopped / rundir.CHECKPOINT).read_bytes() == before


def retuned() -> nn.Module:
    model = network()
    with torch.no_grad():
        model[8].bias[3] += 1e-6  # type: ignore[index, union-attr]
    return model


@pytest.mark.parametrize(
    ("what", "model", "examples", "recipe"),
    [
        ("recipe", network, 96, TWO.model_copy(update={"seed": 6})),
        ("network", retuned, 96, TWO),
        ("network", three, 96, TWO),
        ("task", network, 95, TWO),
    ],
)
def test_another_run_is_refused_and_leaves_the_directory_alone(
    stopped: Path, what: str, model: Callable[[], nn.Module], examples: int, recipe: Recipe
) -> None:
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    with pytest.raises(RunError, match=f"was run with another {what}; resume with that one"):
        compress(model(), small_task(examples), recipe, out=stopped, resume=True)
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == before


def test_other_conditions_are_warned_of_and_noted(
    stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with caplog.at_level(logging.WARNING, logger="laconic"):
            result = compress(network(), small_task(), TWO, out=stopped, resume=True)
    finally:
        torch.set_num_threads(before)
    (note,) = result.facts["notes"]
    assert f"threads {before} -> {before + 1}" in note
    assert "the bytes of the artefact may differ" in note
    assert note in caplog.messages
    assert rundir.read_history(stopped)[1]["notes"] == [note]
    again = compress(network(), small_task(), TWO, out=stopped, resume=True)
    assert again.facts["notes"][0] == note
    assert f"threads {before + 1} -> {before}" in again.facts["notes"][1]


def test_the_same_conditions_need_no_note(stopped: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="laconic"):
        assert compress(network(), small_task(), TWO, out=stopped, resume=True).facts["notes"] == []
    assert caplog.messages == []


def test_what_was_being_written_when_it_was_killed_does_not_stay(stopped: Path) -> None:
    (stopped / f".{rundir.ARTIFACT}.partial").write_bytes(b"half")
    (stopped / "notes.txt").write_text("the user's own")
    compress(network(), small_task(), TWO, out=stopped, resume=True)
    assert not list(stopped.glob(".*.partial"))
    assert (stopped / "notes.txt").exists()


def test_the_time_before_a_stop_counts(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, tensors = read(stopped / rundir.CHECKPOINT)
    assert 0 < manifest["run"]["seconds"] < PATIENCE
    manifest["run"]["seconds"] = 1000.0
    write(stopped / rundir.CHECKPOINT, manifest, tensors)
    told: list[float] = []
    measured = measuring.measure(network(), curves={})
    monkeypatch.setattr(
        measuring, "measure", lambda *args, seconds, **rest: told.append(seconds) or measured
    )
    compress(network(), small_task(), TWO, out=stopped, resume=True)
    assert 1000 < told[0] < 1000 + PATIENCE


@pytest.mark.parametrize("damage", ["cut short", "changed", "another file"])
def test_a_damaged_checkpoint_is_refused(stopped: Path, damage: str) -> None:
    path = stopped / rundir.CHECKPOINT
    content = bytearray(path.read_bytes())
    if damage == "cut short":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        save(network(), path)
    with pytest.raises(LaconicError, match=rundir.CHECKPOINT):
        compress(network(), small_task(), TWO, out=stopped, resume=True)


class Repeated(nn.Module):
    """One block in two places: [batch, 6] -> [batch, 3]."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Linear(6, 6)
        self.blocks, self.last = nn.ModuleList([block, block]), nn.Linear(6, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            inputs = inputs + block(inputs).relu()
        outputs: torch.Tensor = self.last(inputs)
        return outputs


def interrupt(patch: pytest.MonkeyPatch, moment: int) -> None:
    """Let Ctrl-C come at the n-th chance to write a checkpoint."""
    chances = itertools.count(1)

    def due(self: rundir.Keeper) -> bool:
        self.interrupted = next(chances) >= moment
        return self.interrupted

    patch.setattr(rundir.Keeper, "due", due)


def chained() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)
    )


@pytest.mark.parametrize(
    ("made", "moments", "steps"),
    [
        (chained, [1], [Prune("neurons", keep=0.5, retrain=Reconstruct(solve=LeastSquares()))]),
        (Repeated, [1, 3], [Quantize(4, activation="learned_clip"), short(epochs=2)]),
        (Repeated, [1, 3], [Quantize(4, activation="learned_spacing"), short(epochs=2)]),
    ],
    ids=["pruned, rebuilt layer by layer", "shared, learned clip", "shared, learned spacing"],
)
def test_a_run_stopped_anywhere_ends_the_same(
    made: Callable[[], nn.Module],
    moments: list[int],
    steps: list[Step],
    tmp_path: Path,
    quick: None,
) -> None:
    torch.manual_seed(0)
    model, inputs = made(), torch.randn(60, 6)
    pair = inputs, torch.arange(60) % 3
    task = Task(pair, pair, pair)
    whole = compress(model, task, steps, out=tmp_path / "whole")
    for moment in moments:
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, moment)
            with pytest.raises(KeyboardInterrupt):
                compress(model, task, steps, out=tmp_path / f"{moment}")
        compress(model, task, steps, out=tmp_path / f"{moment}", resume=True)
        assert artefact(tmp_path / f"{moment}") == artefact(tmp_path / "whole")
    assert len(whole.history) == len(steps) + 1
