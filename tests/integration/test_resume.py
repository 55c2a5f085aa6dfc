"""A run that was killed, interrupted or refused goes on to the very bytes it would have given."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import random
import resource
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
import torch
from torch import Tensor, nn

from laconic import measure as measuring
from laconic import run, rundir
from laconic.errors import LaconicError, RunError
from laconic.ledger import Measurement
from laconic.recipe import Recipe
from laconic.recover import (
    L1,
    L2,
    SGD,
    Adam,
    AdamW,
    Constant,
    Cosine,
    Final,
    Hidden,
    Label,
    Logits,
    Recalibrate,
    Stop,
    Train,
)
from laconic.run import compress
from laconic.ship import save, verify
from laconic.ship.container import read, write
from laconic.step import Step
from laconic.structure import (
    SVD,
    ChannelGhosts,
    DataSVD,
    DropLayers,
    Factorize,
    Geometric,
    Ghost,
    Gradual,
    LayerDrop,
    MaximalGain,
    PlanSplit,
    Prune,
    Random,
    ShareLayers,
    Soft,
    Split,
    Taylor,
    Top,
)
from laconic.tasks import Task, digits
from laconic.weights import KMeans, Quantize, Symmetric, Ternary

PATIENCE = 300  # seconds for what takes a few: other work may share the cores
KILLS = 5
# What is imported on the way would otherwise be imported by every process.
PRELOADED = ["laconic.run", "laconic.report.report", "sklearn.datasets", "constriction"]
PRELOADED += ["torch.utils.flop_counter", "torch._dynamo", "pytest"]


def small_task(examples: int = 96) -> Task:
    """Return digits with few examples: [batch, 1, 8, 8] -> ten classes."""
    task = digits().few(total=examples)
    task.validate = task.validate.subset(range(40))
    task.test = task.test.subset(range(40))
    return task


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(64, 16),
            nn.ReLU(),
            nn.Linear(16, 10),
        )


# --------------------------------------------------------------- processes that are killed

EVERYTHING = Recipe(
    [
        Prune("weights", keep=0.5, rounds=2, retrain=Train(epochs=2, batch=32)),
        Train(epochs=4, batch=32, during=(Prune("weights", keep=0.2),)),
        Quantize(KMeans(3)),
        Train(epochs=3, batch=32, optimizer=SGD(0.01)),
        Recalibrate(4, batch=32),
    ],
    seed=7,
    precision="float32",
)


def child(out: str, threads: int, *, resume: bool, seconds: float, room: int | None) -> None:
    """Run the recipe in a process of its own; leave beside it what it was refused for."""
    torch.set_num_threads(threads)
    if room is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    task = small_task(480)
    try:
        compress(network(), task, EVERYTHING, out=out, resume=resume, checkpoint_seconds=seconds)
    except KeyboardInterrupt:
        sys.exit(130)
    except LaconicError as error:
        Path(f"{out}.error").write_text(str(error))
        sys.exit(2)


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
        process = context.Process(target=runpy.run_path, args=(__file__, values, "child"))
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


def artefact(out: Path) -> bytes:
    return (out / rundir.ARTIFACT).read_bytes()


def told(out: Path) -> list[tuple[Any, ...]]:
    """Return what the history of a run says, but for times."""
    history, _ = rundir.read_history(out)
    fields = ("step", "size_bytes", "nonzero", "macs", "metrics", "layers", "curves")
    return [tuple(getattr(measured, field) for field in fields) for measured in history]


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
    code = f"import runpy; runpy.run_path({__file__!r}, {values!r}, 'child')"
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


# --------------------------------------------------------- every moment of short trainings


class Stopped(BaseException):
    """What a test kills a run with, once it has written."""


class Three(nn.Module):
    """Three matrices in one module, not in the order of their names, and a tied one."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Flatten()
        for name in "cab":
            setattr(self, name, nn.Parameter(torch.randn(64, 64) / 8))
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.last = nn.Linear(64, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = (self.flat(inputs) @ self.c @ self.a @ self.b).relu()
        outputs: Tensor = self.last(self.second(self.first(hidden).relu()).relu())
        return outputs


def three() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Three()


def short(**fields: Any) -> Train:
    """Return a training of three updates an epoch."""
    return Train(**{"batch": 32, **fields})


GRADUAL = Prune("weights", keep=0.2, schedule=Gradual(end=0.5))


class Residual(nn.Module):
    """Three blocks that add to what enters them."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.first = nn.Flatten(), nn.Linear(64, 12)
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.last = nn.Linear(12, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(self.flat(images))
        for block in self.blocks:
            hidden = hidden + block(hidden).relu()
        return self.last(hidden)


def residual() -> Residual:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Residual()


def frozen() -> nn.Module:
    model = network()
    model[6].weight.requires_grad_(False)
    return model


LESSON = 0.5 * Label() + 0.5 * Logits(4.0)
# What they have in common with EVERYTHING is left out.
VARIANTS: dict[str, tuple[Callable[[], nn.Module], list[Step], str]] = {
    "the mask is laid while Adam is at work": (
        network,
        [short(epochs=4, optimizer=Adam(5e-3, clip=1.0), during=(GRADUAL,), stop=Stop(patience=1))],
        "float32",
    ),
    "the best epoch is behind": (
        network,
        [short(epochs=6, optimizer=AdamW(0.1, decay=Constant()), stop=Stop(patience=3))],
        "float32",
    ),
    "the last epoch is kept": (
        network,
        [short(epochs=3, stop=Stop(patience=2, keep="last"), optimizer=SGD(0.1, momentum=0.0))],
        "float32",
    ),
    "momentum, penalty and noise": (
        network,
        [
            Quantize(Symmetric(4, rounding="stochastic")),
            short(epochs=2, optimizer=SGD(0.05, nesterov=True), penalty=L1(1e-4)),
            short(epochs=2, optimizer=SGD(0.05, decay=Cosine(warmup=0.5)), penalty=L2(1e-4)),
        ],
        "float32",
    ),
    "bfloat16": (
        network,
        [short(epochs=2, during=(GRADUAL,)), Quantize(KMeans(2)), short(epochs=2)],
        "bfloat16",
    ),
    "rounds ranked by chance and by gradients": (
        network,
        [
            Prune("weights", keep=0.5, by=Random(), rounds=2, retrain=short()),
            Prune(
                "weights",
                keep=0.2,
                by=Taylor(batches=1),
                rounds=2,
                ranking="global",
                schedule=Geometric(),
                retrain=short(epochs=2),
            ),
        ],
        "float32",
    ),
    "rounds inside rounds": (
        network,
        [
            Prune(
                "weights",
                keep=0.2,
                rounds=2,
                retrain=Prune("weights", scope="kind:linear", keep=0.1, rounds=2, retrain=short()),
            )
        ],
        "float32",
    ),
    "several matrices in a module, ties among equal codes": (
        three,
        [
            Quantize(Ternary()),
            short(epochs=2, penalty=L1(1e-3)),
            Prune("weights", keep=0.7, ranking="global", retrain=short()),
        ],
        "float32",
    ),
    "channels in rounds, then codes, with a teacher": (
        network,
        [
            Prune(
                "channels",
                keep=0.5,
                by=Taylor(batches=1),
                rounds=2,
                retrain=short(objective=LESSON),
            ),
            Quantize(Ternary()),
            short(objective=LESSON, epochs=2),
        ],
        "float32",
    ),
    "neurons masked while training, then cut": (
        network,
        [
            short(epochs=3, during=(Prune("neurons", keep=0.5, schedule=Gradual(end=0.5)),)),
            Prune("neurons", keep=1),
            short(),
        ],
        "float32",
    ),
    "a part of it ternary, split and trained again": (
        network,
        [
            PlanSplit("size <= 500 B", choose=MaximalGain(batches=1, by="loss")),
            short(epochs=2),
            Split(),
            short(epochs=2, objective=LESSON),
        ],
        "float32",
    ),
    "blocks dropped, shared and left out at random": (
        residual,
        [
            DropLayers(Top(1)),
            ShareLayers("mean"),
            LayerDrop(0.5, retrain=short(objective=Hidden(map=Final()), epochs=2)),
        ],
        "float32",
    ),
    "softly pruned, at moments between updates": (
        network,
        [short(epochs=2, during=(Prune("weights", keep=0.3, schedule=Soft(), rounds=5),))],
        "float32",
    ),
    "factors of a frozen layer": (
        frozen,
        [Factorize(SVD(2), scope="6"), short(optimizer=AdamW(1e-2), epochs=2)],
        "float32",
    ),
    "factors and ghosts": (
        network,
        [Ghost(ChannelGhosts()), Factorize(DataSVD(4, batches=1, batch=8), scope="6"), short()],
        "float32",
    ),
}


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill memory that nothing was written to with NaN, so that reading it never goes well."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    """Leave out what these runs do not need: disks, clocks, scores and reports."""
    measured = functools.cache(functools.partial(measuring.measure, network()))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)

    def only_curves(*args: Any, curves: Any, **options: Any) -> Measurement:
        kept = {name: measuring.averaged(losses) for name, losses in curves.items()}
        return dataclasses.replace(measured(), curves=kept)

    monkeypatch.setattr(measuring, "measure", only_curves)
    monkeypatch.setattr(run.Result, "report", lambda self, path: path)


def count_moments(patch: pytest.MonkeyPatch, stop: int = 0) -> list[int]:
    """Let a run count its chances to write a checkpoint, take one of them and die there."""
    count = [0]
    write = rundir.Keeper.write

    def due(self: Any) -> bool:
        count[0] += 1
        return count[0] == stop

    def write_and_die(self: Any, state: Any, training: dict[str, Any]) -> None:
        write(self, state, training)
        if training:
            raise Stopped

    patch.setattr(rundir.Keeper, "due", due)
    patch.setattr(rundir.Keeper, "write", write_and_die)
    return count


def check_moments(name: str, out: Path, *, share: float) -> None:
    """Stop a run at a share of the moments at which it may write; resume and compare."""
    build, steps, precision = VARIANTS[name]
    recipe, task = Recipe(steps, seed=5, precision=precision), small_task()
    with pytest.MonkeyPatch.context() as patch:
        total = count_moments(patch)
        compress(build(), task, recipe, out=out / "whole")
    chosen = random.Random(0).sample(range(1, total[0] + 1), max(3, round(share * total[0])))
    for moment in sorted(chosen):
        folder = out / str(moment)
        with pytest.MonkeyPatch.context() as patch:
            count_moments(patch, moment)
            with pytest.raises(Stopped):
                compress(build(), task, recipe, out=folder)
        compress(build(), task, recipe, out=folder, resume=True)
        assert artefact(folder) == artefact(out / "whole"), f"moment {moment} of {total[0]}"
        assert told(folder) == told(out / "whole"), f"moment {moment} of {total[0]}"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_goes_on_from_any_moment(name: str, tmp_path: Path) -> None:
    check_moments(name, tmp_path, share=0.2)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_goes_on_from_every_moment(name: str, tmp_path: Path) -> None:
    check_moments(name, tmp_path, share=1.0)


# ------------------------------------------------------------------ what is told and refused

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


if __name__ == "child":  # in a process that runs this file
    child(*globals()["ARGUMENTS"], **globals()["OPTIONS"])
