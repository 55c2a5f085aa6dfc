"""How steep the loss becomes with fewer bits: eigenvalues and surfaces of float, ternary, binary.

The 6-layer encoder fine-tuned on MRPC, TernaryBERT's 2-2-8 and BinaryBERT's BWN and TWS 1-1-8, the
networks of those tables (Bai et al. 2021, BinaryBERT, figures 2 and 3, of BERT base on MRPC).
Eigenvalues: the largest of the Hessian of the task's loss, by part, in evaluation mode; the mean
over six layers and two batches of 16 training examples, the ratio to the float network's. Surface:
the highest less the lowest loss where the value projections of the first two layers are moved by a
constant, each by up to the mean size of its weights, on a grid of 11 by 11, over the same batches.
The two halves of what was split count as one part. The paper draws curves and prints no figures.

What did not show here: in the paper the binary network is the steepest by far, and here it is the
floats, which are surest of their answers. Single layers and batches decide these means: deviations
are larger than they are.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import binarybert
import ternarybert
from common import parser_of_rows, row, write_table
from encoders import fine_tuned, glue
from lowbit import Rows

from laconic import Result, Task
from laconic.report import Eigenvalues, LossSurface, eigenvalues, loss_surface

NAME, BATCHES, SIZE = "MRPC", 2, 16
FLOAT, TWN, BWN, TWS = "float", ternarybert.TWN, "BWN 1-1-8", "TWS 1-1-8"
VALUES = tuple(f"bert.encoder.layer.{layer}.attention.self.value.weight" for layer in (0, 1))


def trained(options: argparse.Namespace, task: Task) -> dict[str, Result]:
    """Return the networks of the first seed, trained where they are not there yet."""
    options = argparse.Namespace(**{**vars(options), "seeds": 1})
    found = {
        TWN: ternarybert.made(options, NAME, task, TWN),
        BWN: binarybert.made(options, NAME, task, "BWN", 8),
        TWS: binarybert.made(options, NAME, task, "TWS", 8),
    }
    whole = fine_tuned(options, NAME, task, options.first)
    return {FLOAT: whole} | {name: results[0] for name, results in found.items()}


def rows(options: argparse.Namespace) -> Rows:
    """Yield what is found of every network: by part, then of the surface."""
    task = glue(options, NAME)
    results = trained(options, task)
    models = {name: result.model for name, result in results.items()}
    drawn = task.train.plain().batches(SIZE, seed=options.first)
    batches = list(itertools.islice(drawn, BATCHES))
    yield from steepness(eigenvalues(models, task, batches).pooled())
    whole = {name: model for name, model in models.items() if name != TWS}  # it has no such weight
    yield from heights(loss_surface(whole, task, batches, tensors=VALUES))


def steepness(found: Eigenvalues) -> Rows:
    """Yield the rows of every network's parts."""
    for name, parts in found.values.items():
        for part in parts:
            yield line(
                f"{name}, {part}",
                "largest eigenvalue",
                found.mean(name, part),
                std=found.deviation(name, part),
                baseline=found.mean(FLOAT, part),
                ratio=found.ratio(name, part),
            )


def heights(found: LossSurface) -> Rows:
    """Yield the rows of every network's surface."""
    flat = found.height(FLOAT)
    for name in found.losses:
        height = found.height(name)
        label = f"{name}, surface"
        yield line(label, "height of the loss", height, baseline=flat, ratio=height / flat)


def line(label: str, metric: str, ours: float, **more: Any) -> dict[str, Any]:
    """Return a row."""
    return row(row=label, task=f"{NAME} train", metric=metric, ours=ours, seeds=1, **more)


if __name__ == "__main__":
    write_table("landscape", rows(parser_of_rows(__doc__).parse_args()))
