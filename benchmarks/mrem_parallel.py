"""Modules that learn side by side: time on two processes.

The 6-layer encoder (MiniLM's shape, untrained, ternary) learns from itself in floats. Two parts of
three layers, in turns on one process and on two that torchrun starts, one thread each, seconds of
the step for an update of both parts; medians of runs in alternation. From the time of an update of
every single block follows what more processes would take, and deeper networks: the slowest share of
blocks, cut as evenly as can be, times what two processes took over theirs; all blocks in turns,
times what one process took over all of its own. Writes benchmarks/results/mrem_parallel.json.
"""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

from common import write
from modulewise import TERNARY, answer, asked, parts, texts
from qat import encoder

from laconic import compress
from laconic.recover import Parallel, Sequential
from laconic.recover.fitting import fittings_of
from laconic.recover.modulewise import data_of
from laconic.recover.pipeline import balanced
from laconic.step import State, run_step
from laconic.weights.laid import copied

ROUNDS, UPDATES, TIMED, TOKENS = 3, 150, 8, 64
PROCESSES = {"in turns": 1, "two processes": 2}
Row = dict[str, Any]


def update_seconds() -> float:
    """Return the seconds of an update of both parts, here or on all processes of torchrun."""
    step = parts(2, UPDATES, Parallel(4))
    result = compress(encoder(), texts(TOKENS, 8), [TERNARY, step])
    return result.history[-1].seconds / UPDATES


def block_seconds() -> list[float]:
    """Return the seconds of an update of every block by itself."""
    network = encoder()
    state = State(copied(network), texts(TOKENS, 2), (network.requires_grad_(False),))
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


MEASURED = {"time": update_seconds, "blocks": block_seconds}


def slowest(blocks: list[float], processes: int) -> float:
    """Return the seconds of the share that takes longest."""
    cuts = balanced(blocks, processes)
    return max(sum(blocks[slice(*pair)]) for pair in itertools.pairwise(cuts))


def speed() -> list[Row]:
    """Return the rows of time."""
    times: dict[str, list[float]] = {way: [] for way in PROCESSES}
    for _ in range(ROUNDS):
        for way, processes in PROCESSES.items():
            times[way].append(asked(__file__, "time", processes=processes)[0])
            print(way, times[way][-1], flush=True)
    one, two = (statistics.median(each) for each in times.values())
    rows: list[Row] = [
        {"row": way, "seconds": seconds, "ratio": one / seconds, "seeds": ROUNDS}
        for way, seconds in zip(PROCESSES, (one, two), strict=True)
    ]
    (blocks,) = asked(__file__, "blocks")
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


def main() -> None:
    """Measure both ways by turns, or one thing for the process that asks."""
    if not answer(MEASURED):
        write("mrem_parallel", speed(), packages=("torch", "transformers"))


if __name__ == "__main__":
    main()
