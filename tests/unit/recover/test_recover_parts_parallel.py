"""Reconstruct's parts in any order and all at once: the same bits, queues and their memory."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.recover_parts import after, quantised, step
from helpers.tensors import same
from laconic import machine
from laconic.errors import RunError
from laconic.recover import Mixed, Parallel, Teacher
from laconic.recover import modulewise as ordering
from laconic.recover.fitting import fittings_of
from laconic.recover.stream import Flow, Stored
from laconic.step import derive, run_step


def test_reversed_order_gives_the_same_under_full_forcing() -> None:
    wanted = after(step(feed=Teacher()))
    state = quantised()
    asked = step(feed=Teacher())
    state.seed = derive(0, "reconstruct", 0)
    fittings = fittings_of(asked, state)
    with torch.random.fork_rng():
        for fitting in reversed(fittings):
            source: Any = ordering.data_of(fittings[0])
            flows = [*source.each()]
            for before in fittings[: fitting.number[0] - 1]:
                flows = [before.passed(flow) for flow in flows]
            source = source if fitting.number[0] == 1 else Kept(flows)
            ordering._fit(fitting, source, state)
    assert same(state.model, wanted)


class Kept:
    """Flows in memory, in the order in which Stored yields them."""

    def __init__(self, flows: list[Flow]) -> None:
        self.list, self._read = flows, flows.__getitem__

    def __len__(self) -> int:
        return len(self.list)

    flows = Stored.flows


def test_all_at_once_gives_the_same_bits_every_time() -> None:
    asked = step(3, order=Parallel(3), feed=Mixed(), steps=6)
    assert same(after(asked), after(asked))
    other = quantised()
    other.seed = 1
    assert not same(after(asked), after(asked, other))


def test_a_queue_of_one_is_a_pipeline() -> None:
    """Each part takes an update on what the one before has just sent."""
    asked = step(2, steps=4, order=Parallel(1))
    wanted, state = after(asked), quantised()
    state.seed = derive(0, "reconstruct", 0)
    fittings = fittings_of(asked, state)
    with torch.random.fork_rng():
        flows = ordering.data_of(fittings[0]).flows(derive(state.seed, "flows", 1))
        for flow in itertools.islice(flows, 4):
            for fitting in fittings:
                flow = fitting.update(flow)
    assert same(state.model, wanted)


def test_a_queue_holds_the_teachers_features_at_first_and_forgets_the_oldest() -> None:
    state = quantised()
    fittings = fittings_of(step(2), state)
    turns = ordering.Turns(fittings, fittings, 3)
    (queue,) = turns.queues.values()
    assert len(queue) == queue.maxlen == 3
    assert all(torch.equal(flow.teacher, flow.student) for flow in queue)
    second = queue[1]
    next(turns.each())
    assert len(queue) == 3 and queue[0] is second
    assert not torch.equal(queue[-1].teacher, queue[-1].student)
    assert not queue[-1].student.requires_grad


def test_queues_that_do_not_fit_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 examples x 6 numbers x 4 bytes for teacher and student, 3 queues of 10."""
    needed = 8 * 6 * 4 * 2 * 3 * 10
    monkeypatch.setattr(ordering, "free_memory", lambda: needed)
    after(step(order=Parallel(10), steps=1))
    monkeypatch.setattr(ordering, "free_memory", lambda: needed - 1)
    state = quantised()
    with pytest.raises(RunError, match=r"are free; write 'order: {parallel: 9}'"):
        run_step(step(order=Parallel(10)), state)
    assert not state.curves
    monkeypatch.setattr(ordering, "free_memory", lambda: needed)
    monkeypatch.setattr(ordering, "ranks", SimpleNamespace(count=lambda: 2))
    with pytest.raises(RunError, match=r"are free; write 'order: {parallel: 5}'"):
        run_step(step(order=Parallel(10)), quantised())


def test_free_memory_is_what_a_container_leaves(tmp_path: Path) -> None:
    assert machine._left_of_limit(tmp_path) is None
    files = {"max": "1000\n", "current": "700\n", "stat": "anon 500\ninactive_file 150\n"}
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert machine._left_of_limit(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._left_of_limit(tmp_path) is None
    assert machine.free_memory() > 0
