"""Few bits without training end to end: REM and MREM on 4,096 texts without labels.

The fine-tuned 6-layer encoder in three parts of two layers (Bai et al. 2022): weights and word
embedding of 4 or 2 bits, activations of 8 or 4; head and pooler stay float. REM fits layer by
layer with 500 updates each (matrices alone: ranges of activations and the word embedding stay as
they were found), MREM-S the three parts one after the other, MREM-P all three at once, here in
turns in one process. QAT is the same network trained as a whole, on all examples, by the same
losses as TernaryBERT. 2,000 updates of every part and 250, with fading teacher forcing and
without. Scores are those of the full dev set; published figures are of BERT base after 2,000
updates. Memory does not depend on the row: `benchmarks/mrem_memory.py` measures that of every way.
Dropout is switched off before the steps of a row (`set_dropout: 0`).

On MNLI-m the paper has in 4-4-8 QAT 84.6, REM 73.3, MREM-S 83.5 and MREM-P 83.4, in 2-2-8 84.4,
71.6, 82.7 and 82.3, in 2-2-4 83.5, 58.3, 81.1 and 80.8. On SST-2 it has no QAT and no REM; the
figure of QAT beside 2-2-8 is TernaryBERT's. What did not show here: REM is not far behind, and
teacher forcing gains nothing that could be measured.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

from common import asked, published
from encoders import fine_tuned, glue
from lowbit import BODY, Rows, joint, line, run, still, table

from laconic import Recipe, Scope
from laconic.recover import (
    Adam,
    Feed,
    Gradient,
    Linear,
    Mixed,
    Order,
    Parallel,
    Reconstruct,
    Sequential,
    Student,
)
from laconic.step import Step
from laconic.weights import LearnedSpacing, LearnedStep, MinMax, Quantize, Ternary

EXAMPLES, PARTS = 4096, 3
TASKS = ("SST-2", "MNLI")
SCOPE = Scope(f"{BODY}, !*pooler*")
WIDTHS: dict[str, Step] = {
    "4-4-8": Quantize(
        LearnedStep(4),
        embedding=LearnedStep(4, granularity="row"),
        activation=MinMax(8),
        scope=SCOPE,
    ),
    "2-2-8": Quantize(Ternary(), embedding=Ternary("row"), activation=MinMax(8), scope=SCOPE),
    "2-2-4": Quantize(
        Ternary(), embedding=Ternary("row"), activation=LearnedSpacing(4), scope=SCOPE
    ),
}
FORCED = Mixed()
WAYS: dict[str, tuple[int | str, Feed, Order, int]] = {
    "MREM-S": (PARTS, FORCED, Sequential(), 2000),
    "MREM-P": (PARTS, FORCED, Parallel(), 2000),
    "MREM-S, no forcing": (PARTS, Student(), Sequential(), 2000),
    "MREM-P, no forcing": (PARTS, Student(), Parallel(), 2000),
    "MREM-S, 250 updates": (PARTS, FORCED, Sequential(), 250),
    "MREM-P, 250 updates": (PARTS, FORCED, Parallel(), 250),
    "MREM-S, 250 updates, no forcing": (PARTS, Student(), Sequential(), 250),
    "MREM-P, 250 updates, no forcing": (PARTS, Student(), Parallel(), 250),
    "REM": ("layer", Student(), Sequential(), 500),
}
# The dev sets, MNLI-m of MNLI; QAT on SST-2 is TernaryBERT.
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "MNLI": {
        "4-4-8": {"QAT": 84.6, "REM": 73.3, "MREM-S": 83.5, "MREM-P": 83.4},
        "2-2-8": {"QAT": 84.4, "REM": 71.6, "MREM-S": 82.7, "MREM-P": 82.3},
        "2-2-4": {"QAT": 83.5, "REM": 58.3, "MREM-S": 81.1, "MREM-P": 80.8},
    },
    "SST-2": {
        "4-4-8": {"MREM-S": 91.4, "MREM-P": 91.5},
        "2-2-8": {"QAT": 92.8, "MREM-S": 91.2, "MREM-P": 91.3},
    },
}


def rebuilt(way: str) -> Step:
    """Return the step of a row."""
    parts, feed, order, steps = WAYS[way]
    solve = Gradient(steps, batch=32, optimizer=Adam(1e-4, decay=Linear()))
    return Reconstruct(parts=parts, feed=feed, order=order, solve=solve, scope=SCOPE)


def figure(name: str, bits: str, way: str) -> dict[str, Any]:
    """Return the paper's figure for a row."""
    setting = "BERT base, 12 layers" + ", in four parts" * way.startswith("MREM")
    setting = f"TernaryBERT, {setting}" if (name, way) == ("SST-2", "QAT") else setting
    return published(PUBLISHED[name].get(bits, {}).get(way), setting)


def rows(options: argparse.Namespace) -> Rows:
    """Yield one row for each task, width and way."""
    seeds = range(options.first, options.first + options.seeds)
    for name in TASKS if options.only is None else (options.only,):
        task = glue(options, name)
        teachers = [fine_tuned(options, name, task, seed) for seed in seeds]
        ways: dict[str, tuple[Step, ...]] = {way: (rebuilt(way),) for way in WAYS}
        for (bits, quantize), (way, steps) in itertools.product(
            WIDTHS.items(), (ways | {"QAT": joint(name)}).items()
        ):
            label = f"{way} {bits}"
            if not asked(options, label):
                continue
            done = []
            for seed, teacher in zip(seeds, teachers, strict=True):
                data = task if way == "QAT" else task.few(total=EXAMPLES, seed=seed)
                recipe = Recipe((quantize, *steps), seed=seed)
                place = f"{name}-{label.replace(' ', '-').replace(',', '')}-{seed}"
                done.append(run(options, place, still(teacher), data, recipe))
            note = f"{len(data.train)} examples; "
            more = figure(name, bits, way)
            yield line(name, task, label, done, teachers=teachers, note=note, **more)


if __name__ == "__main__":
    table("mrem", __doc__, rows, TASKS)
