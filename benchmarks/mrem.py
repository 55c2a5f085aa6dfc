"""Modules that learn side by side: time on two processes, and memory beside training as a whole.

The 6-layer encoder (MiniLM's shape, untrained, ternary) learns from itself in floats. Time: two
parts of three layers, on one process in turns and on two that torchrun starts, one thread each,
seconds of the step per update of both parts, medians of runs in alternation. What four and eight
processes would take follows from the measured time of every block, cut so that the slowest has
least, plus what two processes took over the ideal. Memory: the peak of a process above what it held
when all was loaded, batches of 32 texts of 128 tokens, three parts one after the other beside
training all of it (hidden states, attention scores, logits). Writes benchmarks/results/mrem.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from common import write
from qat import SCOPE, encoder
from torch import nn

from laconic import Task, compress, ranks
from laconic.recover import (
    Adam,
    Attention,
    Gradient,
    Hidden,
    Logits,
    Mixed,
    Parallel,
    Reconstruct,
    Sequential,
    Stop,
    Train,
)
from laconic.step import Step
from laconic.tasks import Batch
from laconic.weights import Quantize, Ternary

ROUNDS, UPDATES, BATCH, LAYERS = 3, 60, 32, 6
TOKENS = {"time": 64, "memory": 128}
TERNARY = Quantize(Ternary(), embedding=Ternary("row"), activation=8, scope=SCOPE)
WAYS = ("in turns", "two processes")


def texts(tokens: int, batches: int) -> Task:
    """Return a task of random tokens."""
    drawn = torch.randint(1000, 30_000, (BATCH * batches, tokens))
    labels = torch.arange(len(drawn)) % 2

    def call(model: nn.Module, batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=batch.inputs[0]).logits
        return logits

    return Task((drawn, labels), (drawn[:2], labels[:2]), (drawn[:2], labels[:2]), call=call)


def parts(count: int, updates: int, order: Sequential | Parallel) -> Step:
    """Return the step that is timed."""
    solve = Gradient(updates, batch=BATCH, optimizer=Adam(1e-4))
    return Reconstruct(parts=count, feed=Mixed(), order=order, solve=solve, scope=SCOPE)


def whole() -> Step:
    """Return the training of the network as a whole."""
    return Train(
        Hidden() + Attention() + Logits(loss="cross_entropy"), batch=BATCH, stop=Stop(keep="last")
    )


def resident(field: str) -> int:
    """Return the bytes that the process holds (VmRSS), or held at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def seconds_of(step: Step, tokens: int, batches: int) -> float:
    """Return how long a step takes on the quantised encoder."""
    result = compress(encoder(), texts(tokens, batches), [TERNARY, step])
    return result.history[-1].seconds


def peak_of(step: Step) -> int:
    """Return how much more memory a run takes at its peak than the process held before it."""
    task, model = texts(TOKENS["memory"], 6), encoder()
    before = resident("VmRSS")
    compress(model, task, [TERNARY, step])
    return resident("VmHWM") - before


def measured(what: str) -> Any:
    """Return one measurement, taken in this process."""
    torch.set_num_threads(1)
    if what == "reconstruct":
        return peak_of(parts(3, 6, Sequential()))
    if what == "train":
        return peak_of(whole())
    if what == "blocks":
        return [seconds_of(parts(LAYERS, 20, Sequential()), TOKENS["time"], 4)]
    return seconds_of(parts(2, UPDATES, Parallel(4)), TOKENS["time"], 8)


def asked(what: str, *, processes: int = 1) -> Any:
    """Return a measurement of one or more processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        start = [sys.executable]
        if processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            start += [*launcher, str(processes)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        call = [*start, __file__, what, str(out)]
        subprocess.run(call, check=True, env=environment)
        return json.loads(out.read_text(encoding="utf-8"))


def speed() -> list[Mapping[str, Any]]:
    """Return the rows of time."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, processes in zip(WAYS, (1, 2), strict=True):
            times[way].append(asked("time", processes=processes) / UPDATES)
            print(way, times[way][-1], flush=True)
    one, two = (statistics.median(times[way]) for way in WAYS)
    rows: list[Mapping[str, Any]] = [
        {
            "row": way,
            "task": "an update of both parts",
            "metric": "seconds",
            "ours": median,
            "baseline": one,
            "ratio": one / median,
            "seeds": ROUNDS,
        }
        for way, median in zip(WAYS, (one, two), strict=True)
    ]
    return rows


def main() -> None:
    """Measure everything, or one thing for the process that asks."""
    if len(sys.argv) > 1:
        found = measured(sys.argv[1])
        if ranks.leads():
            Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")
        return
    rows = speed()
    write("mrem", rows, packages=("torch", "transformers"))


if __name__ == "__main__":
    main()
