"""Factorised layers: parameters, multiplications, measured time and accuracy.

ResNet-20 on CIFAR-10: every 3 x 3 convolution but the first becomes a product with at most half of
its weights, by SVD, Tucker-2 and spatial separation. The fine-tuned 6-layer encoder on MRPC: the
two matrices of every feed-forward part become products with half of their weights, by SVD of the
weights and of the weights on data. Each is scored before a short training on the labels (the
convolutions with their BatchNorm recalibrated) and after it. Times are medians of a forward of one
example in torch, in the same run as the original's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from typing import Any

from common import cifar10, costs, parser, row, trained_resnet, write_table
from encoders import RATE, fine_tuned, glue
from torch import nn

from laconic import Factorize, Recipe, Result, Scope, Task, Train, compress
from laconic.costs import latency
from laconic.recover import SGD, AdamW, Linear, Recalibrate, Stop
from laconic.step import Step
from laconic.structure import SVD, DataSVD, Factorization, Separable, Tucker2

TURNS = 9
KERNELS: tuple[Factorization, ...] = (SVD(ratio=0.5), Tucker2(ratio=0.5), Separable(ratio=0.5))
MATRICES: tuple[Factorization, ...] = (SVD(ratio=0.5), DataSVD(ratio=0.5))


def convolutions(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of ResNet-20."""
    task, model = cifar10(options), trained_resnet(options, "resnet20")
    train = Train(epochs=4, optimizer=SGD(0.02, weight_decay=1e-4), stop=Stop(keep="last"))
    for by in KERNELS:
        steps = (Factorize(by, scope=Scope("layer*")), Recalibrate(batches=100), train)
        out = options.work / "factorize" / f"resnet20-{by.name}"
        recipe = Recipe(steps, precision="bfloat16")
        result = compress(model, task, recipe, out=out, resume=True)
        yield from lines("resnet20", task, result, by=by, original=model)


def encoder(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of the encoder."""
    task = glue(options, "MRPC")
    model = fine_tuned(options, "MRPC", task, seed=0).baked()
    optimizer = AdamW(RATE, clip=1.0, decay=Linear(warmup=0.1))
    feed_forward = Scope("*.intermediate.dense, *.layer.*.output.dense, !*.attention.*")
    for by in MATRICES:
        steps: tuple[Step, ...] = (
            Factorize(by, scope=feed_forward),
            Train(epochs=3, batch=32, optimizer=optimizer),
        )
        out = options.work / "factorize" / f"encoder-{by.name}"
        recipe = Recipe(steps, precision="bfloat16")
        result = compress(model, task, recipe, out=out, resume=True)
        yield from lines("6-layer encoder, feed-forward", task, result, by=by, original=model)


def milliseconds(task: Task, *models: nn.Module) -> list[float]:
    """Return how long a forward of one example takes each network; they take turns."""
    batch = task.example_batch(1)
    times = [[latency(model, batch, call=task.call) for model in models] for _ in range(TURNS)]
    return [statistics.median(each) for each in zip(*times, strict=True)]


def lines(
    name: str, task: Task, result: Result, *, by: Factorization, original: nn.Module
) -> Iterator[dict[str, Any]]:
    """Yield two rows: before the training, and after it."""
    first, last = result.history[0], result.history[-1]
    before, after = milliseconds(task, original, result.baked())
    for label, at in (("before training", result.history[-2]), ("trained", last)):
        score = 100 * at.metrics[task.main_metric]
        print(f"{name}, {by!r}, {label}: {score:.2f}", flush=True)
        yield row(
            row=f"{name}, {by!r}, {label}",
            task="MRPC dev" if task.tokenizer else "CIFAR-10 test",
            metric=f"{task.main_metric} x 100",
            ours=score,
            seeds=1,
            baseline=100 * first.metrics[task.main_metric],
            **(costs([result]) if at is last else {}),
            note=f"parameters {first.parameters:,} -> {at.parameters:,}, multiplications "
            f"{first.macs:,} -> {at.macs:,}, milliseconds {before:.2f} -> {after:.2f}; "
            f"{result.recipe.steps!r}",
        )


def main() -> None:
    """Run the table and write what is finished after every row."""
    made = parser(__doc__)
    made.add_argument("--only", choices=("convolutions", "encoder"), help="one part")
    options = made.parse_args()
    parts = {"convolutions": convolutions, "encoder": encoder}
    names = [options.only] if options.only else list(parts)
    rows = (found for name in names for found in parts[name](options))
    write_table("factorize", rows)


if __name__ == "__main__":
    main()
