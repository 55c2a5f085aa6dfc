"""Width and depth of an encoder: DynaBERT's grid, taught by the network it was cut from.

The fine-tuned 6-layer encoder keeps a share of the heads and neurons of every layer, the most
important (DynaBERT's rewiring, Hou et al. 2020), and a share of its layers, spread evenly. Then it
learns for as many epochs from the labels alone, or from the full encoder alone: hidden states,
embeddings and logits (TinyBERT's losses, Jiao et al. 2020; not its attention loss, which needs as
many heads as the teacher has). Every cell is trained by itself; DynaBERT trains one for all.
MRPC: the whole grid; SST-2: three cells, one epoch, one seed. Scores are those of the full dev
sets; published figures are DynaBERT's, of BERT base, where one network serves all widths and depths
and learns from augmented data too. The artefacts stay in the run directories.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from itertools import product
from typing import Any

from common import costs, parser, published, row, spread, write_table
from encoders import RATE, fine_tuned, glue, score

from laconic import Hidden, Label, Logits, Prune, Recipe, Result, Scope, Task, Train, compress
from laconic.recover import AdamW, Linear, Objective
from laconic.structure import DropLayers, HeadImportance, NeuronImportance, Spread

GRID = [cell for cell in product((1.0, 0.75, 0.5, 0.25), (1.0, 0.5)) if cell != (1.0, 1.0)]
CELLS = {"MRPC": GRID, "SST-2": [(0.5, 1.0), (0.25, 1.0), (1.0, 0.5)]}
EPOCHS = {"MRPC": 3, "SST-2": 1, "CoLA": 3, "RTE": 4, "STS-B": 3}
PUBLISHED: dict[str, dict[tuple[float, float], float]] = {
    "MRPC": {
        (1.0, 0.5): 85.0,
        (0.75, 1.0): 86.5,
        (0.75, 0.5): 84.1,
        (0.5, 1.0): 84.8,
        (0.5, 0.5): 83.1,
        (0.25, 1.0): 83.8,
        (0.25, 0.5): 81.4,
    },
    "SST-2": {(0.5, 1.0): 93.3, (0.25, 1.0): 92.8, (1.0, 0.5): 92.7},
}
OBJECTIVES: dict[str, Objective] = {
    "labels": Label(),
    "distilled": Hidden() + Logits(loss="cross_entropy"),
}


def recipe(name: str, width: float, depth: float, objective: Objective, seed: int) -> Recipe:
    """Return what cuts the fine-tuned encoder and trains what is left."""
    heads = Prune("heads", keep=width, by=HeadImportance(batches=8, batch=32))
    neurons = Prune(
        "neurons",
        keep=width,
        by=NeuronImportance(batches=8, batch=32),
        scope=Scope("*.encoder.*"),
    )
    cuts = [*((heads, neurons) if width < 1 else ()), *([DropLayers(Spread(depth))] * (depth < 1))]
    train = Train(
        objective,
        epochs=EPOCHS[name],
        batch=32,
        optimizer=AdamW(RATE, clip=1.0, decay=Linear(warmup=0.1)),
    )
    recall = "6 GB" if EPOCHS[name] > 1 else None
    return Recipe((*cuts, train), seed=seed, recall=recall)


def run(
    options: argparse.Namespace, name: str, task: Task, *, cell: tuple[float, float], how: str
) -> Iterator[tuple[Result, Result]]:
    """Yield teacher and student of every seed."""
    for seed in range(options.seeds if name == "MRPC" else 1):
        teacher = fine_tuned(options, name, task, seed)
        out = options.work / "width_depth" / f"{name}-{seed}-{cell[0]:g}-{cell[1]:g}-{how}"
        made = recipe(name, *cell, OBJECTIVES[how], seed)
        yield teacher, compress(teacher.baked(), task, made, out=out, resume=True)


def figure(name: str, cell: tuple[float, float], how: str) -> dict[str, Any]:
    """Return the paper's figure for a cell; it has none for labels."""
    found = PUBLISHED[name].get(cell) if how == "distilled" else None
    return published(found, "BERT base, 12 layers; one network for all cells, augmented data")


def line(
    name: str, task: Task, label: str, pairs: list[tuple[Result, Result]], **more: Any
) -> dict[str, Any]:
    """Return one row from the runs of every seed."""
    students = [student for _, student in pairs]
    scores = [score(student, task) for student in students]
    cut = [100 * student.history[-2].metrics[task.main_metric] for student in students]
    mean, deviation = spread(scores)
    print(f"{name}, {label}: {scores}, before training {cut}", flush=True)
    return row(
        row=f"{name}, {label}",
        task=f"{name} dev",
        metric=f"{task.main_metric} x 100",
        ours=mean,
        std=deviation,
        seeds=len(pairs),
        baseline=statistics.fmean(score(teacher, task) for teacher, _ in pairs),
        **costs(students),
        note=f"{students[0].history[-1].parameters:,} parameters; before training "
        f"{statistics.fmean(cut):.2f}; {students[0].recipe.steps!r}",
        **more,
    )


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run every cell with both objectives."""
    for name in [options.only] if options.only else list(CELLS):
        task = glue(options, name)
        for cell, how in product(CELLS[name], OBJECTIVES):
            label = f"width {cell[0]:g}, depth {cell[1]:g}, {how}"
            pairs = list(run(options, name, task, cell=cell, how=how))
            yield line(name, task, label, pairs, **figure(name, cell, how))


def main() -> None:
    """Run the grid and write what is finished after every row."""
    made = parser(__doc__)
    made.add_argument("--only", choices=list(CELLS), help="one task")
    options = made.parse_args()
    write_table("width_depth", rows(options))


if __name__ == "__main__":
    main()
