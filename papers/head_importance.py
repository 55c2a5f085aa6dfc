"""Are sixteen heads really better than one? The encoder's heads, ranked and removed.

The 6-layer encoder is fine-tuned on MRPC, CoLA and SST-2. Its heads are ranked once, by their
importance on 1,024 training examples (Michel et al. 2019, equation 2, the absolute value taken per
batch and normalised by layer), and removed in steps of 10 % over all layers, without retraining;
the best head of a layer always stays. Then, one layer at a time, all heads but the best are
removed. Scores are those of the full dev sets.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from typing import Any

from common import parser, row, write_table
from encoders import EPOCHS, fine_tuned, glue, score
from torch import Tensor, nn

from laconic import Scope, Task
from laconic.step import State
from laconic.structure import Axis, HeadImportance, Ranking, slice_
from laconic.structure.elements import axes_of
from laconic.structure.ranking import best_elements

BY = HeadImportance(batches=32, batch=32)
Scores = dict[Axis, Tensor]


def without(model: nn.Module, task: Task, kept: dict[Axis, Tensor]) -> float:
    """Return the main metric, times 100, of the network with these heads alone."""
    cut = copy.deepcopy(model)
    slice_(cut, {axis: chosen.nonzero()[:, 0].tolist() for axis, chosen in kept.items()})
    return 100 * task.score(cut, split="test")[task.main_metric]


def curve(name: str, task: Task, model: nn.Module, base: float, scores: Scores) -> Iterator[Any]:
    """Yield the rows of the pruning curve."""
    alive = {axis: values >= values.min() for axis, values in scores.items()}
    for percent in range(10, 100, 10):
        kept = best_elements(scores, alive, 1 - percent / 100, Ranking("global"))
        left = sum(int(chosen.sum()) for chosen in kept.values())
        label = f"{percent} % of heads pruned ({left} left)"
        yield line(name, task, label, without(model, task, kept), base)


def ablation(
    name: str, task: Task, model: nn.Module, base: float, scores: Scores
) -> Iterator[dict[str, Any]]:
    """Yield, for each layer, the score with its best head alone."""
    for layer, (axis, values) in enumerate(scores.items(), 1):
        kept = {axis: values == values.max()}
        label = f"one head in layer {layer}"
        yield line(name, task, label, without(model, task, kept), base)


def line(name: str, task: Task, label: str, ours: float, base: float) -> dict[str, Any]:
    """Return one row."""
    print(f"{name}, {label}: {ours:.2f} ({base:.2f})", flush=True)
    return row(
        row=f"{name}, {label}",
        task=f"{name} dev",
        metric=f"{task.main_metric} x 100",
        ours=ours,
        seeds=1,
        baseline=base,
    )


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run every task."""
    for name in [options.only] if options.only else list(EPOCHS):
        task = glue(options, name)
        tuned = fine_tuned(options, name, task, seed=0)
        base = score(tuned, task)
        yield row(
            row=f"{name}, fine-tuned",
            task=f"{name} dev",
            metric=f"{task.main_metric} x 100",
            ours=base,
            seeds=1,
            seconds=tuned.history[-1].seconds,
            note=f"{tuned.recipe.steps!r}",
        )
        model = tuned.baked()
        axes = axes_of(model, task, "heads", Scope("*"))
        scores = BY.axis_scores(State(model, task, seed=0), axes)
        yield from curve(name, task, model, base, scores)
        yield from ablation(name, task, model, base, scores)


def main() -> None:
    """Run the table and write what is finished after every row."""
    made = parser(__doc__)
    made.add_argument("--only", choices=list(EPOCHS), help="one task")
    options = made.parse_args()
    write_table("head_importance", rows(options))


if __name__ == "__main__":
    main()
