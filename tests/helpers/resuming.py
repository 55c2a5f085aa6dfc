"""Runs to stop, in this process or in one that runs this file, and what to compare of them."""

from __future__ import annotations

import dataclasses
import functools
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laconic import measure as measuring
from laconic import run, rundir
from laconic.errors import LaconicError
from laconic.ledger import Measurement
from laconic.recipe import Recipe
from laconic.recover import SGD, Recalibrate, Train
from laconic.run import compress
from laconic.structure import Prune
from laconic.tasks import Task, digits
from laconic.weights import KMeans, Quantize

PATIENCE = 300  # seconds for what takes a few: other work may share the cores


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


def three() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Three()


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


def short(**fields: Any) -> Train:
    """Return a training of three updates an epoch."""
    return Train(**{"batch": 32, **fields})


def artefact(out: Path) -> bytes:
    return (out / rundir.ARTIFACT).read_bytes()


def told(out: Path) -> list[tuple[Any, ...]]:
    """Return what the history of a run says, but for times."""
    history, _ = rundir.read_history(out)
    fields = ("step", "size_bytes", "nonzero", "macs", "metrics", "layers", "curves")
    return [tuple(getattr(measured, field) for field in fields) for measured in history]


# Stopping at a moment of a short run.


class Stopped(BaseException):
    """What a test kills a run with, once it has written."""


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


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory that nothing was written to with NaN, so that reading it never goes well."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def quicken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what these runs do not need: disks, clocks, scores and reports."""
    measured = functools.cache(functools.partial(measuring.measure, network()))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)

    def only_curves(*args: Any, curves: Any, **options: Any) -> Measurement:
        kept = {name: measuring.averaged(losses) for name, losses in curves.items()}
        return dataclasses.replace(measured(), curves=kept)

    monkeypatch.setattr(measuring, "measure", only_curves)
    monkeypatch.setattr(run.Result, "report", lambda self, path: path)


# A run in a process of its own.

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


if __name__ == "child":  # in a process that runs this file
    child(*globals()["ARGUMENTS"], **globals()["OPTIONS"])
