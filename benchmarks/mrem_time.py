"""Modules that learn one after the other: their time beside training as a whole.

The 6-layer encoder (MiniLM's shape, untrained, ternary) learns from itself in floats, on batches of
32 texts of 64 tokens: as a whole (hidden states, attention scores, logits), and in three parts of
two layers. Seconds of the step for an update (of all three parts), every batch seen twice, on one
thread; medians of runs in alternation. From their ratio follows, computed, what share of the time
of one epoch of SST-2, or of three of MNLI, so many updates of every part take. An epoch is of all
examples but the 5 % that choose the best checkpoint. Writes benchmarks/results/mrem_time.json.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from common import write
from modulewise import BATCH, TERNARY, parts, texts, whole
from qat import encoder

from laconic import compress
from laconic.recover import Sequential
from laconic.step import Step

ROUNDS, BATCHES, AGAIN, TOKENS = 3, 12, 2, 64
UPDATES = BATCHES * AGAIN
WAYS: dict[str, Step] = {
    "trained as a whole": whole(AGAIN),
    "three parts one after the other": parts(3, UPDATES, Sequential()),
}
# Updates of every part, epochs, and the examples of an epoch: 95 % of 67,349 and of 392,702.
BESIDE = {
    "one epoch of SST-2": (250, 1, 63_982),
    "three epochs of MNLI": (2000, 3, 373_067),
}


def update_seconds(step: Step) -> float:
    """Return the seconds of an update."""
    result = compress(encoder(), texts(TOKENS, BATCHES), [TERNARY, step])
    return result.history[-1].seconds / UPDATES


def main() -> None:
    """Measure both ways by turns."""
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, step in WAYS.items():
            times[way].append(update_seconds(step))
            print(way, times[way][-1], flush=True)
    every, each = (statistics.median(found) for found in times.values())
    rows: list[dict[str, Any]] = [
        {"row": way, "metric": "seconds", "seconds": seconds, "ratio": seconds / every}
        for way, seconds in zip(WAYS, (every, each), strict=True)
    ]
    rows += [
        {
            "row": f"{updates:,} updates of every part beside {epochs}, computed",
            "metric": "share of the time",
            "ratio": each / every * updates / (rounds * math.ceil(examples / BATCH)),
        }
        for epochs, (updates, rounds, examples) in BESIDE.items()
    ]
    same = {"task": "an update", "seeds": ROUNDS}
    write("mrem_time", [same | row for row in rows], packages=("torch", "transformers"))


if __name__ == "__main__":
    main()
