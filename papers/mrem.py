"""Few bits without training end to end: REM and MREM on 4,096 texts without labels.

The fine-tuned 6-layer encoder in three parts of two layers (Bai et al. 2022): weights and word
embedding of 4 or 2 bits, activations of 8 or 4; head and pooler stay float. REM fits layer by
layer with 500 updates each, MREM-S the three parts one after the other, MREM-P all three at once,
here in turns in one process. QAT is the same network trained as a whole, on all examples, by the
same losses as TernaryBERT. 2,000 updates of every part and 250, with fading teacher forcing and
without. Scores are those of the full dev set; published figures are of BERT base on MNLI. Memory is
measured by `benchmarks/mrem.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from common import costs, parser, row, spread, write_table
from encoders import fine_tuned, glue, score
from lowbit import BODY, joint, still

from laconic import Recipe, Result, Scope, Task, compress
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
# BERT base on MNLI-m; QAT, REM, MREM-S and MREM-P.
PUBLISHED = {
    "4-4-8": {"QAT": 84.6, "REM": 73.3, "MREM-S": 83.5, "MREM-P": 83.4},
    "2-2-8": {"QAT": 84.4, "REM": 71.6, "MREM-S": 82.7, "MREM-P": 82.3},
    "2-2-4": {"QAT": 83.5, "REM": 58.3, "MREM-S": 81.1, "MREM-P": 80.8},
}


def rebuilt(way: str) -> Step:
    """Return the step of a row."""
    parts, feed, order, steps = WAYS[way]
    solve = Gradient(steps, batch=32, optimizer=Adam(1e-4, decay=Linear()))
    return Reconstruct(parts=parts, feed=feed, order=order, solve=solve, scope=SCOPE)


def line(
    name: str, task: Task, label: str, done: list[Result], *, examples: int, **more: Any
) -> dict[str, Any]:
    """Return the row of a way, from the runs of every seed."""
    mean, deviation = spread([score(each, task) for each in done])
    print(f"{name}, {label}: {mean}", flush=True)
    return row(
        row=label,
        task=f"{name} dev",
        metric=f"{task.main_metric} x 100",
        ours=mean,
        std=deviation,
        seeds=len(done),
        **costs(done),
        published_setting=more.get("published") and "BERT base on MNLI-m",
        note=f"{examples} examples; {done[0].recipe.steps!r}",
        **more,
    )


def rows(options: argparse.Namespace, name: str) -> Iterator[dict[str, Any]]:
    """Yield one row for each width and each way."""
    task = glue(options, name)
    seeds = range(options.seeds)
    teachers = [fine_tuned(options, name, task, seed) for seed in seeds]
    baseline = sum(score(each, task) for each in teachers) / len(teachers)
    for bits, quantize in WIDTHS.items():
        ways: dict[str, tuple[Step, ...]] = {way: (rebuilt(way),) for way in WAYS}
        for way, steps in (ways | {"QAT": joint(name)}).items():
            if options.ways and way not in options.ways:
                continue
            done = []
            for seed in seeds:
                data = task if way == "QAT" else task.few(total=EXAMPLES, seed=seed)
                recipe = Recipe((quantize, *steps), seed=seed, precision="bfloat16")
                place = f"{name}-{bits}-{way.replace(' ', '-').replace(',', '')}-{seed}"
                out = options.work / "mrem" / place
                done.append(compress(still(teachers[seed]), data, recipe, out=out, resume=True))
            more = {"baseline": baseline, "published": PUBLISHED[bits].get(way)}
            yield line(name, task, f"{way} {bits}", done, examples=len(data.train), **more)


def main() -> None:
    """Run the table and write what is finished after every row."""
    made = parser(__doc__)
    made.add_argument("--tasks", nargs="*", default=["SST-2"])
    made.add_argument("--ways", nargs="*", choices=("QAT", *WAYS))
    options = made.parse_args()
    write_table("mrem", (found for name in options.tasks for found in rows(options, name)))


if __name__ == "__main__":
    main()
