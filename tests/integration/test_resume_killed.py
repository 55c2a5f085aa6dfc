"""A run that was killed, interrupted or found no room goes on to the very same bytes."""

from __future__ import annotations

import functools
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from helpers import resuming
from helpers.resuming import EVERYTHING, PATIENCE, artefact, network, small_task, told
from laconic import rundir
from laconic.errors import RunError
from laconic.recipe import Recipe
from laconic.run import compress
from laconic.ship import verify
from laconic.ship.container import read

KILLS = 5
# What is imported on the way would otherwise be imported by every process.
PRELOADED = ["laconic.run", "laconic.report.report", "sklearn.datasets", "constriction"]
PRELOADED += ["torch.utils.flop_counter", "torch._dynamo", "pytest"]


@pytest.fixture(scope="module")
def context() -> Any:
    """Return how processes are made: forked from one that has imported everything."""
    made = get_context("forkserver")
    made.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        # Two threads on a busy core would otherwise mostly wait for each other, at full speed.
        patch.setenv("OMP_WAIT_POLICY", "passive")
        forkserver.ensure_running()
    return made


@pytest.fixture(scope="module")
def start(context: Any) -> Iterator[Callable[..., BaseProcess]]:
    """Return a function that starts a run in a process; what is left is killed."""
    started: list[BaseProcess] = []

    def begin(
        out: Path,
        threads: int = 1,
        *,
        resume: bool = False,
        seconds: float = 0.05,
        room: int | None = None,
    ) -> BaseProcess:
        options = {"resume": resume, "seconds": seconds, "room": room}
        values = {"ARGUMENTS": (str(out), threads), "OPTIONS": options}
        process = context.Process(target=runpy.run_path, args=(resuming.__file__, values, "child"))
        process.start()
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.join(PATIENCE)
        process.close()


@pytest.fixture(scope="module")
def undisturbed(
    start: Callable[..., BaseProcess], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], tuple[Path, float]]:
    """Return a function that runs the recipe to its end: where it lies, how long it took."""

    @functools.cache
    def whole(threads: int) -> tuple[Path, float]:
        out = tmp_path_factory.mktemp("whole") / "run"
        # A first one waits until everything is imported, and is refused: a file is no folder.
        (out.parent / "file").touch()
        assert finish(start(out.parent / "file")) == 2
        began = time.monotonic()
        assert finish(start(out, threads)) == 0
        check_finished(out)
        return out, time.monotonic() - began

    return whole


def finish(process: BaseProcess) -> int | None:
    process.join(PATIENCE)
    return process.exitcode


def check_whole(out: Path) -> None:
    """Fail if a killed run left anything half written under its own name."""
    for name in (rundir.HISTORY, rundir.RUN):
        if (out / name).exists():
            json.loads((out / name).read_text(encoding="utf-8"))
    if (out / rundir.RECIPE).exists():
        assert Recipe.read(out / rundir.RECIPE) == EVERYTHING
    if (out / rundir.CHECKPOINT).exists():
        manifest, tensors = read(out / rundir.CHECKPOINT)
        assert tensors and manifest["run"]["facts"]["seed"] == 7
    if (out / rundir.ARTIFACT).exists():
        verify(out / rundir.ARTIFACT)


def check_finished(out: Path) -> None:
    """Fail if a finished run lacks a file or has one too many."""
    assert {path.name for path in out.iterdir()} == {*rundir.FILES, ".lock"}
    check_whole(out)


def kill_and_resume(
    start: Callable[..., BaseProcess],
    out: Path,
    threads: int,
    *,
    kills: int,
    duration: float,
    seed: int = 0,
) -> None:
    """Kill a run at random moments, so many times, and let it finish."""
    draw = random.Random(seed)
    killed, longest = 0, 0.4 * duration
    while killed < kills:
        process = start(out, threads, resume=True)
        process.join(draw.uniform(0.02, 1) * longest)
        process.kill()
        code = finish(process)
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            longest /= 2
        else:
            killed += 1
        check_whole(out)
    assert finish(start(out, threads, resume=True)) == 0
    check_finished(out)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_killed_again_and_again_gives_the_same_bytes(
    start: Callable[..., BaseProcess],
    undisturbed: Callable[[int], tuple[Path, float]],
    tmp_path: Path,
    threads: int,
) -> None:
    whole, duration = undisturbed(threads)
    kill_and_resume(start, tmp_path, threads, kills=KILLS, duration=duration)
    assert artefact(tmp_path) == artefact(whole)
    assert told(tmp_path) == told(whole)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("seed", range(1, 4))
def test_however_often_it_is_killed(
    start: Callable[..., BaseProcess],
    undisturbed: Callable[[int], tuple[Path, float]],
    tmp_path: Path,
    threads: int,
    seed: int,
) -> None:
    whole, duration = undisturbed(threads)
    kill_and_resume(start, tmp_path, threads, kills=20, duration=duration / 2, seed=seed)
    assert artefact(tmp_path) == artefact(whole)


def test_the_same_seed_gives_the_same_bytes_in_another_interpreter(
    undisturbed: Callable[[int], tuple[Path, float]], tmp_path: Path
) -> None:
    """Two processes of one server share the order of sets; a new interpreter has another."""
    options = {"resume": False, "seconds": 0.5, "room": None}
    values = {"ARGUMENTS": (str(tmp_path), 1), "OPTIONS": options}
    code = f"import runpy; runpy.run_path({resuming.__file__!r}, {values!r}, 'child')"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=PATIENCE)
    assert artefact(tmp_path) == artefact(undisturbed(1)[0])


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def test_ctrl_c_writes_a_checkpoint_and_the_run_goes_on_from_it(
    start: Callable[..., BaseProcess],
    undisturbed: Callable[[int], tuple[Path, float]],
    tmp_path: Path,
) -> None:
    process = start(tmp_path, seconds=1e9)
    wait_for((tmp_path / rundir.HISTORY).exists)  # the first checkpoint is written, training begins
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 130
    check_whole(tmp_path)
    assert not (tmp_path / rundir.ARTIFACT).exists()
    assert finish(start(tmp_path, resume=True)) == 0
    assert artefact(tmp_path) == artefact(undisturbed(1)[0])


def test_a_directory_serves_one_run_at_a_time(
    start: Callable[..., BaseProcess], tmp_path: Path
) -> None:
    process = start(tmp_path)
    wait_for((tmp_path / rundir.RECIPE).exists)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(RunError, match="in use by another run"):
        compress(network(), small_task(), EVERYTHING, out=tmp_path, resume=True)
    process.kill()
    finish(process)
    with rundir.Keeper(tmp_path, {}, 300).locked():
        pass


def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_room(
    start: Callable[..., BaseProcess],
    undisturbed: Callable[[int], tuple[Path, float]],
    tmp_path: Path,
) -> None:
    """The limit holds the first checkpoint, not one with an optimiser's moments."""
    whole, _ = undisturbed(1)
    history, _ = rundir.read_history(whole)
    out = tmp_path / "run"
    assert finish(start(out, room=2 * history[0].size_bytes)) == 2
    message = (tmp_path / "run.error").read_text()
    assert message.startswith(f"steps.0 (prune): {out}: the run cannot be kept there")
    assert "File too large" in message and "make room" in message
    check_whole(out)
    assert finish(start(out, resume=True)) == 0
    assert artefact(out) == artefact(whole)
