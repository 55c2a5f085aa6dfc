"""What a run directory holds is read, mended and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from laconic.errors import RunError
from laconic.measure import measure
from laconic.models import digits_cnn
from laconic.recipe import Recipe
from laconic.recover import Train
from laconic.run import compress
from laconic.rundir import ARTIFACT, HISTORY, RECIPE, RUN, read_history
from laconic.structure import Prune
from laconic.tasks import digits
from laconic.weights import Quantize


@pytest.fixture
def out(tmp_path: Path) -> Path:
    compress(network(), None, [Quantize(4), Quantize(2)], out=tmp_path / "run")
    return tmp_path / "run"


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return digits_cnn()


def test_a_history_older_than_the_checkpoint_is_mended(out: Path) -> None:
    """A run may be killed after the one was written and before the other is."""
    whole = json.loads((out / HISTORY).read_text())
    (out / HISTORY).write_text(json.dumps(whole[:1]))
    compress(network(), None, [Quantize(4), Quantize(2)], out=out, resume=True)
    assert json.loads((out / HISTORY).read_text()) == whole


@pytest.mark.parametrize("added", [1, 2])
def test_steps_may_be_added_at_the_end_of_a_run(added: int, tmp_path: Path) -> None:
    data = digits()
    steps = [Prune("weights", keep=0.5), Quantize(4), Train(epochs=1, batch=256)]
    once = compress(network(), data, steps, out=tmp_path / "once")
    compress(network(), data, steps[:-added], out=tmp_path / "run")
    again = compress(network(), data, steps, out=tmp_path / "run", resume=True)
    files = [tmp_path / name / ARTIFACT for name in ("once", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [row.step for row in again.history] == [row.step for row in once.history]
    assert Recipe.read(tmp_path / "run" / RECIPE).steps == tuple(steps)


def test_other_steps_or_fewer_are_another_recipe(out: Path) -> None:
    for steps in ([Quantize(4)], [Quantize(4), Quantize(3)], [Quantize(2), Quantize(4)]):
        with pytest.raises(RunError, match=r"another recipe.*steps may be added at its end"):
            compress(network(), None, steps, out=out, resume=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (RUN, []),
        (RUN, "x"),
        (HISTORY, {}),
        (HISTORY, [[]]),
        (HISTORY, [{"metrics": None}]),
        (HISTORY, [{"size_bytes": 0}]),
        (HISTORY, [{"seconds": float("inf")}]),
        (HISTORY, [{"size_bytes": "many"}]),
    ],
    ids=str,
)
def test_what_no_run_has_written_is_refused(name: str, content: Any, out: Path) -> None:
    if isinstance(content, list) and content and isinstance(content[0], dict):
        content = [json.loads((out / HISTORY).read_text())[0] | content[0]]
    (out / name).write_text(json.dumps(content))
    with pytest.raises(RunError):
        read_history(out)


def test_no_room_to_measure_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("laconic.ship.artifact.write", full)
    with pytest.raises(RunError, match=r"to be measured \(.*No space left.*set TMPDIR"):
        measure(network())
