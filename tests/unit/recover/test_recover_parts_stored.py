"""What Reconstruct's parts keep on disk: checkpoints, features that wait, flows that go on."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.recover_parts import after, chain, quantised, step, task
from helpers.tensors import same
from laconic.errors import RunError
from laconic.recover import Mixed, Order, Parallel, Sequential
from laconic.recover import modulewise as ordering
from laconic.recover.fitting import Fitting, fittings_of
from laconic.recover.stream import Data, Flow, Stored, flattened, restored
from laconic.run import compress
from laconic.ship.checkpoint import load_checkpoint, save_checkpoint
from laconic.step import State, run_step
from laconic.weights import MovingAverage, Quantize


class Keeper:
    """Writes a checkpoint at one moment, and stops there."""

    def __init__(self, at: int, path: Path) -> None:
        self.left, self.path = at, path

    def due(self) -> bool:
        self.left -= 1
        return self.left == 0

    def write(self, state: State, training: dict[str, Any]) -> None:
        save_checkpoint(state, training, self.path, run={})
        raise KeyboardInterrupt

    def scratch(self) -> AbstractContextManager[Path]:
        return State(nn.Identity()).scratch()


@pytest.mark.parametrize(
    ("order", "at"),
    [
        *itertools.product([Sequential()], [1, 4, 5, 6, 11, 15]),
        *((Parallel(2), at) for at in (1, 4, 5)),
    ],
    ids=repr,
)
def test_a_resumed_run_gives_the_same_bits(order: Order, at: int, tmp_path: Path) -> None:
    """In order, of each part's 5 updates; all at once, of 5 updates of every part."""
    asked = step(3, order=order, feed=Mixed())
    activation: Any = MovingAverage(6)
    wanted = after(asked, quantised(activation=activation))
    state = quantised(activation=activation)
    state.keeper = Keeper(at, tmp_path / "checkpoint")
    with pytest.raises(KeyboardInterrupt):
        run_step(asked, state)
    resumed = State(chain(), task(), teacher=(chain(),))
    load_checkpoint(resumed, tmp_path / "checkpoint")
    assert same(after(asked, resumed), wanted)


def test_in_a_run_with_its_directory(tmp_path: Path) -> None:
    result = compress(chain(), task(), [Quantize(3), step(2)], out=tmp_path / "run", device="cpu")
    assert [measured.step for measured in result.history] == ["original", "quantize", "reconstruct"]


def test_features_wait_on_disk_and_go_when_all_is_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen: list[set[str]] = []
    fit = ordering._fit
    monkeypatch.setattr(
        ordering,
        "_fit",
        lambda *a: (seen.append({p.parent.name for p in tmp_path.glob("*/*/*")}), fit(*a)),
    )
    after(step(3))
    assert seen == [set(), {"0"}, {"1"}], "more than one part's features are kept"
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(ordering, "_fit", lambda *a: 1 / 0)
    with pytest.raises(RunError, match="ZeroDivision"):
        run_step(step(3), quantised())
    assert not any(tmp_path.iterdir())


def test_features_of_a_run_wait_in_its_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, folders = tmp_path / "run", set()
    (out / "scratch-0" / "1").mkdir(parents=True)  # of a process that was killed
    write = Stored._write

    def watched(self: Stored, flow: Flow) -> None:
        folders.add(self.folder)
        assert folders > {out / "scratch-0" / "0"} or not (out / "scratch-0" / "1").exists()
        write(self, flow)

    monkeypatch.setattr(Stored, "_write", watched)
    compress(chain(1), task(), [step(3)], teacher=chain(), out=out)
    assert folders == {out / "scratch-0" / "0", out / "scratch-0" / "1"}
    assert not [*out.glob("scratch*")]


def test_a_part_that_is_done_keeps_no_state_of_its_optimiser() -> None:
    state = quantised()
    fittings = fittings_of(step(3), state)
    ordering.fit_in_order(fittings, state)
    assert [fitting.tensors() for fitting in fittings] == [{}, {}, {}]


def test_the_teacher_answers_a_batch_of_a_later_part_once() -> None:
    """Of 6 updates on 3 batches; the last part's answers are the first part's batches each."""
    state = quantised()
    calls: list[Tensor] = []
    state.teacher[0].blocks[3].register_forward_hook(lambda *got: calls.append(got[2]))
    fittings = fittings_of(step(2, steps=6), state)
    calls.clear()
    ordering.fit_in_order(fittings, state)
    assert len(calls) == len(ordering.data_of(fittings[0])) == 3


def test_answers_that_are_kept_are_those_that_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = after(step(3, steps=6, feed=Mixed()))
    monkeypatch.setattr(Fitting, "answered", lambda _, flow: flow)
    assert same(after(step(3, steps=6, feed=Mixed())), kept)


def test_stored_flows_come_back(tmp_path: Path) -> None:
    shared = torch.randn(2, 3)
    beside = {"args": [None, (shared > 0)], "named": {"more": [1.5, shared[:1]]}}
    flow = Flow(shared, shared, beside, [shared, 2 * shared])
    kept = Stored(tmp_path / "kept", [flow, flow], "cpu")
    back = next(kept.each())
    assert torch.equal(back.student, shared) and torch.equal(back.beside["args"][1], shared > 0)
    assert back.beside["named"]["more"][0] == 1.5
    assert torch.equal(back.answers[1], 2 * shared)
    assert restored(*flattened(flow)).beside.keys() == flow.beside.keys()
    assert len([*itertools.islice(kept.flows(0), 5)]) == 5
    kept.close()
    assert not (tmp_path / "kept").exists()


def test_flows_go_on_where_they_stopped(tmp_path: Path) -> None:
    data = Data(task().train, 8, limit=3, seed=0, device="cpu")
    features = [flow.teacher.inputs[0] for flow in data.each()]
    stored = Stored(tmp_path / "kept", (Flow(each, each, {}) for each in features), "cpu")
    assert stored.count == 3
    whole = [flow.teacher for flow in itertools.islice(stored.flows(5), 10)]
    for start in range(8):
        assert torch.equal(next(stored.flows(5, start)).teacher, whole[start])
    whole = [flow.teacher.inputs[0] for flow in itertools.islice(data.flows(5), 10)]
    for start in range(8):
        assert torch.equal(next(data.flows(5, start)).teacher.inputs[0], whole[start])
