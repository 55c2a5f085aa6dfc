"""Modules that learn side by side: time on two processes, and memory beside training as a whole.

The 6-layer encoder (MiniLM's shape, untrained, ternary) learns from itself in floats. Time: two
parts of three layers, in turns on one process and on two that torchrun starts, one thread each,
seconds of the step for an update of both parts; medians of runs in alternation. From the time of an
update of every single block follows what more processes would take, and deeper networks: the
slowest share of blocks, cut as evenly as can be, times what two processes took over theirs; all
blocks in turns, times what one process took over all of its own.
Memory: the peak of a process above what it held with network and data loaded, batches of 32 texts
of 128 tokens, three parts one after the other beside training all of it (hidden states, attention
scores, logits). Writes benchmarks/results/mrem.json.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import resident, write
from qat import SCOPE, encoder
from torch import nn

from laconic import Task, compress
from laconic.recover import (
    Adam,
    Attention,
    Gradient,
    Hidden,
    Logits,
    Mixed,
    Order,
    Parallel,
    Reconstruct,
    Sequential,
    Stop,
    Train,
)
from laconic.recover.fitting import fittings_of
from laconic.recover.modulewise import data_of
from laconic.recover.pipeline import balanced
from laconic.step import State, Step, run_step
from laconic.tasks import Batch
from laconic.weights import Quantize, Ternary
from laconic.weights.laid import copied

ROUNDS, UPDATES, TIMED, BATCH = 3, 150, 8, 32
TOKENS = {"time": 64, "memory": 128}
TERNARY = Quantize(Ternary(), embedding=Ternary("row"), activation=8, scope=SCOPE)
PROCESSES = {"in turns": 1, "two processes": 2}
Row = dict[str, Any]


def texts(tokens: int, batches: int) -> Task:
    """Return a task of random tokens."""
    drawn = torch.randint(1000, 30_000, (BATCH * batches, tokens))
    labels = torch.arange(len(drawn)) % 2

    def call(model: nn.Module, batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=batch.inputs[0]).logits
        return logits

    seen = drawn[:2], labels[:2]
    return Task((drawn, labels), seen, seen, call=call)


def parts(count: int, updates: int, order: Order) -> Reconstruct:
    """Return the step that lets so many parts learn."""
    solve = Gradient(updates, batch=BATCH, optimizer=Adam(1e-4))
    return Reconstruct(parts=count, feed=Mixed(), order=order, solve=solve, scope=SCOPE)


def whole(epochs: int = 1) -> Step:
    """Return the training of the network as a whole."""
    objective = Hidden() + Attention() + Logits(loss="cross_entropy")
    return Train(objective, epochs=epochs, batch=BATCH, stop=Stop(keep="last"))


def update_seconds() -> float:
    """Return the seconds of an update of both parts, here or on all processes of torchrun."""
    step = parts(2, UPDATES, Parallel(4))
    result = compress(encoder(), texts(TOKENS["time"], 8), [TERNARY, step])
    return result.history[-1].seconds / UPDATES


def block_seconds() -> list[float]:
    """Return the seconds of an update of every block by itself."""
    network = encoder()
    state = State(copied(network), texts(TOKENS["time"], 2), (network.requires_grad_(False),))
    run_step(TERNARY, state)
    state.precision = "bfloat16"
    blocks = fittings_of(parts(6, 2 * TIMED, Sequential()), state)
    flow, found = next(data_of(blocks[0]).flows(0)), []
    for block in blocks:
        block.begin()
        times = []
        for _ in range(TIMED):
            began = time.perf_counter()
            block.update(flow)
            times.append(time.perf_counter() - began)
        flow = block.passed(flow)
        found.append(statistics.median(times))
    return found


def peak_bytes(step: Step) -> int:
    """Return how much more memory a run takes at its peak than the process held before it."""
    task, model = texts(TOKENS["memory"], 6), encoder()
    before = resident("VmRSS")
    compress(model, task, [TERNARY, step])
    return resident("VmHWM") - before


MEASURED = {
    "time": update_seconds,
    "blocks": block_seconds,
    "parts": lambda: peak_bytes(parts(3, 6, Sequential())),
    "whole": lambda: peak_bytes(whole()),
}


def asked(what: str, *, processes: int = 1) -> Any:
    """Return a measurement that is taken in a process of its own, or in several."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        start = [sys.executable]
        if processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            start += [*launcher, str(processes)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*start, __file__, what, str(out)], check=True, env=environment)
        return json.loads(out.read_text(encoding="utf-8"))


def slowest(blocks: list[float], processes: int) -> float:
    """Return the seconds of the share that takes longest."""
    cuts = balanced(blocks, processes)
    return max(sum(blocks[slice(*pair)]) for pair in itertools.pairwise(cuts))


def speed() -> list[Row]:
    """Return the rows of time."""
    times: dict[str, list[float]] = {way: [] for way in PROCESSES}
    for _ in range(ROUNDS):
        for way, processes in PROCESSES.items():
            times[way].append(asked("time", processes=processes))
            print(way, times[way][-1], flush=True)
    one, two = (statistics.median(each) for each in times.values())
    rows: list[Row] = [
        {"row": way, "seconds": seconds, "ratio": one / seconds, "seeds": ROUNDS}
        for way, seconds in zip(PROCESSES, (one, two), strict=True)
    ]
    blocks = asked("blocks")
    deep = [blocks[0], *[statistics.mean(blocks[1:])] * 23]
    over = one / sum(blocks), two / slowest(blocks, 2)
    rows += [computed(blocks, count, *over) for count in (2, 4)]
    rows += [computed(deep, count, *over) for count in (4, 8)]
    return [{"task": "an update of all parts", "metric": "seconds"} | each for each in rows]


def computed(blocks: list[float], processes: int, turns: float, queued: float) -> Row:
    """Return the row of so many processes, from the seconds of every block.

    Args:
        blocks: seconds of each.
        processes: how many share them.
        turns: what one process took, in turns, over the sum of its blocks.
        queued: what two processes took over the slower of their shares.
    """
    seconds = slowest(blocks, processes) * queued
    return {
        "row": f"{processes} processes, {len(blocks)} layers, computed",
        "seconds": seconds,
        "ratio": sum(blocks) * turns / seconds,
        "note": f"the slowest share of blocks, of {[round(each, 3) for each in blocks[:6]]} s, "
        f"times {queued:.2f}: what two processes took over theirs; ratio: to all blocks times "
        f"{turns:.2f}, what one process took over its own",
    }


def memory() -> list[Row]:
    """Return the rows of memory."""
    peaks = {what: asked(what) for what in ("whole", "parts")}
    names = {"whole": "trained as a whole", "parts": "three parts one after the other"}
    return [
        {
            "row": names[what],
            "task": "peak memory above the start",
            "metric": "bytes",
            "ours": peak,
            "size_bytes": peak,
            "ratio": peak / peaks["whole"],
        }
        for what, peak in peaks.items()
    ]


def main() -> None:
    """Measure everything, or one thing for the process that asks."""
    if len(sys.argv) > 1:
        torch.set_num_threads(1)
        found = MEASURED[sys.argv[1]]()
        if int(os.environ.get("RANK", "0")) == 0:
            Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")
        return
    write("mrem", [*memory(), *speed()], packages=("torch", "transformers"))


if __name__ == "__main__":
    main()
