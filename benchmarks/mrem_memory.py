"""Memory of training module by module beside training as a whole.

The 6-layer encoder (MiniLM's shape, untrained, ternary weights, 8-bit activations) learns from
itself in floats, in batches of 32 texts of 128 tokens: as a whole (QAT: hidden states, attention
scores, logits), layer by layer (REM), and in three parts, one after the other (MREM-S) and all at
once (MREM-P), in turns in one process and on three that torchrun starts. The peak of a process
above what it held with network and data loaded, a median of three; of several processes the
largest. How many updates there are makes no difference to it. Writes
benchmarks/results/mrem_memory.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from common import resident, write
from modulewise import TERNARY, answer, asked, layers, parts, texts, whole
from qat import encoder

from laconic import compress
from laconic.recover import Parallel, Sequential
from laconic.step import Step

ROUNDS, TOKENS, BATCHES = 3, 128, 6
WHOLE = "QAT"
STEPS: dict[str, Step] = {
    WHOLE: whole(),
    "REM": layers(BATCHES),
    "MREM-S": parts(3, BATCHES, Sequential()),
    "MREM-P": parts(3, BATCHES, Parallel(4)),
}
NAMES = {
    (WHOLE, 1): "QAT: trained as a whole",
    ("REM", 1): "REM: layer by layer",
    ("MREM-S", 1): "MREM-S: three parts, one after the other",
    ("MREM-P", 1): "MREM-P: three parts, in turns in one process",
    ("MREM-P", 3): "MREM-P: three parts, each process of three",
}


def peak_bytes(step: Step) -> Callable[[], int]:
    """Return what says how much more a run takes at its peak than was held before it."""

    def measured() -> int:
        task, model = texts(TOKENS, BATCHES), encoder()
        before = resident("VmRSS")
        compress(model, task, [TERNARY, step])
        return resident("VmHWM") - before

    return measured


def main() -> None:
    """Measure every way, or one for the process that asks."""
    if answer({name: peak_bytes(step) for name, step in STEPS.items()}):
        return
    peaks: dict[tuple[str, int], float] = {}
    for (way, count), name in NAMES.items():
        drawn = [max(asked(__file__, way, processes=count)) for _ in range(ROUNDS)]
        peaks[way, count] = statistics.median(drawn)
        print(name, drawn, flush=True)
    rows: list[dict[str, Any]] = [
        {
            "row": NAMES[way],
            "task": "peak memory above the start",
            "metric": "bytes",
            "ours": peak,
            "seeds": ROUNDS,
            "size_bytes": peak,
            "ratio": peak / peaks[WHOLE, 1],
        }
        for way, peak in peaks.items()
    ]
    write("mrem_memory", rows, packages=("torch", "transformers"))


if __name__ == "__main__":
    main()
