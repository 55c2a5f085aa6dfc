"""Are sixteen heads really better than one? The encoder's heads, ranked and removed.

The 6-layer encoder is fine-tuned on MRPC, CoLA and SST-2. Its heads are ranked by their
importance (Michel et al. 2019, equation 2) and removed in steps of 10 % over all layers, without
retraining; the first head of a layer that would be its last stays. Then, one layer at a time, all
heads but the best are removed. Scores are those of the full dev sets.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from typing import Any

from common import parser, row, write_results
from encoders import EPOCHS, fine_tuned, glue, score
from torch import nn

from laconic import Prune, Scope, Task, compress
from laconic.structure import HeadImportance

HEADS, LAYERS = 12, 6
BY = HeadImportance(batches=32, batch=32)


def pruned(model: nn.Module, task: Task, prune: Prune) -> float:
    """Return the main metric, times 100, after pruning without retraining."""
    result = compress(model, task, [prune.model_copy(update={})], device="cpu")
    return score(result, task)


def curve(name: str, task: Task, model: nn.Module, base: float) -> Iterator[Any]:
    """Yield the rows of the pruning curve."""
    for percent in range(10, 100, 10):
        prune = Prune("heads", keep=1 - percent / 100, by=BY, ranking="global")
        yield line(name, task, f"{percent} % of heads pruned", pruned(model, task, prune), base)


def ablation(name: str, task: Task, model: nn.Module, base: float) -> Iterator[Any]:
    """Yield, for each layer, the score with its best head alone."""
    for layer in range(LAYERS):
        prune = Prune("heads", keep=1 / HEADS, by=BY, scope=Scope(f"*.layer.{layer}.*"))
        done = pruned(model, task, prune)
        yield line(name, task, f"one head in layer {layer + 1}", done, base)


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
        note="without retraining; importance per batch, normalised by layer",
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
        yield from curve(name, task, model, base)
        yield from ablation(name, task, model, base)


def main() -> None:
    """Run the table and write what is finished after every row."""
    made = parser(__doc__)
    made.add_argument("--only", choices=list(EPOCHS), help="run one task and write no results")
    options = made.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    done = []
    for found in rows(options):
        done.append(found)
        if not options.only:
            write_results("head_importance", done)


if __name__ == "__main__":
    main()
