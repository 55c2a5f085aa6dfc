"""Time of an update of quantised training, beside training in floats in the same run.

The 6-layer encoder (MiniLM's shape, untrained) learns from a teacher of its own shape: hidden
states, attention scores and logits; batches of 32 texts of 64 tokens, bfloat16 autocast. Every
variant takes a few updates in turn, so that whatever else the machine does slows them all. Writes
benchmarks/results/qat.json.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from typing import Any

import torch
from common import write
from torch import nn

from laconic.recover import AdamW, Attention, Hidden, Logits, Stop, Train
from laconic.step import During, State, run_step
from laconic.tasks import Batch, Task
from laconic.weights import (
    Activation,
    Binary,
    LearnedClip,
    LearnedSpacing,
    LearnedStep,
    LossAware,
    MinMax,
    Quantize,
    Representation,
    Symmetric,
    Ternary,
)

THREADS, ROUNDS, UPDATES = 2, 4, 4
BATCH, TOKENS = 32, 64
SCOPE = "*, !*position*, !*token_type*, !classifier"
FLOAT = "float"
EXACT = LossAware(2, solver="exact")
NUMBERS: dict[str, tuple[Representation, Representation, Activation]] = {
    "8-8-8": (Symmetric(8), Symmetric(8, granularity="row"), MinMax(8)),
    "ternary 2-2-8": (Ternary(), Ternary("row"), MinMax(8)),
    "4-4-8, learned steps": (LearnedStep(4), LearnedStep(4, granularity="row"), MinMax(8)),
    "binary 1-1-8": (Binary(), Binary("row"), MinMax(8)),
    "binary 1-1-8, learned clips": (Binary(), Binary("row"), LearnedClip(8)),
    "binary 1-1-4, learned spacing": (Binary(), Binary("row"), LearnedSpacing(4)),
    "loss-aware ternary 2-2-8": (LossAware(2), LossAware(2, granularity="row"), MinMax(8)),
    "loss-aware ternary 2-2-8, exact": (
        EXACT,
        EXACT.model_copy(update={"granularity": "row"}),
        MinMax(8),
    ),
}
VARIANTS: dict[str, Quantize | None] = {FLOAT: None} | {
    name: Quantize(weight, embedding=embedding, activation=activation, scope=SCOPE)
    for name, (weight, embedding, activation) in NUMBERS.items()
}
TIMES: list[float] = []


class Clock(During):
    """Notes when every update was done."""

    def apply(self, state: State) -> None:
        """Do nothing."""

    def update(self, state: State, progress: float, *, since: float) -> None:
        """Note the time."""
        TIMES.append(time.perf_counter())


def encoder() -> nn.Module:
    """Return an untrained encoder of MiniLM's shape."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    return BertForSequenceClassification(config).eval()


def texts() -> Task:
    """Return a task of random tokens."""
    tokens = torch.randint(1000, 30_000, (BATCH * (UPDATES + 2), TOKENS))
    labels = torch.arange(len(tokens)) % 2

    def call(model: nn.Module, batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=batch.inputs[0]).logits
        return logits

    learnt, seen = (tokens, labels), (tokens[:2], labels[:2])
    return Task(learnt, seen, seen, call=call)


def seconds(state: State) -> list[float]:
    """Return the seconds of some updates; the first, which warms up, is left out."""
    TIMES.clear()
    objective = Hidden() + Attention() + Logits(loss="cross_entropy")
    train = Train(
        objective, batch=BATCH, optimizer=AdamW(1e-5), stop=Stop(keep="last"), during=(Clock(),)
    )
    run_step(train, state)
    return [after - before for before, after in itertools.pairwise(TIMES)][1:]


def main() -> None:
    """Time every variant and write the result file."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    teacher, task = encoder(), texts()
    states, times = {}, {name: [] for name in VARIANTS}
    for name, quantize in VARIANTS.items():
        states[name] = State(copy.deepcopy(teacher), task, teacher=(teacher,), precision="bfloat16")
        if quantize is not None:
            run_step(quantize, states[name])
    for _ in range(ROUNDS):
        for name, state in states.items():
            times[name] += seconds(state)
    rows = [row(name, times) for name in VARIANTS]
    write("qat", rows, packages=("torch", "transformers"), threads=THREADS)


def row(name: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """Return the row of a variant."""
    ours, baseline = statistics.median(times[name]), statistics.median(times[FLOAT])
    print(f"{name}: {1000 * ours:.0f} ms, {ours / baseline:.2f}x", flush=True)
    return {
        "row": name,
        "metric": "milliseconds an update, median",
        "ours": 1000 * ours,
        "baseline": 1000 * baseline,
        "ratio": ours / baseline,
        "seconds": ours,
        "note": f"fastest {1000 * min(times[name]):.0f}, of floats {1000 * min(times[FLOAT]):.0f}; "
        "baseline and ratio: the float network with the same losses, in turns in the same run",
    }


if __name__ == "__main__":
    main()
