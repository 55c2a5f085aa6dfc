"""The chaining table: fixed point, dynamic fixed point, pruning and their chains, CIFAR-10.

Baseline, fixed 4 bit, dynamic fixed point 4 bit, pruned to 15.65 % density, pruned + fixed
6 bit, pruned + dynamic 6 bit: accuracy, nominal factor 32/bits/density and the factor on disk.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from pathlib import Path

from common import data_folder, parser, row, spread, write_results
from convert import convert, write

from laconic import Prune, Quantize, Recipe, Result, Task, Train, compress
from laconic.models import load_model
from laconic.recover import SGD, Recalibrate, Stop
from laconic.step import State, run_step
from laconic.structure import Gradual
from laconic.tasks import npz
from laconic.weights import DynamicFixedPoint, FixedPoint, Representation, bake

DENSITY = 0.1565
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PUBLISHED_SETTING = "a VGG variant of unknown shape; sizes count weights only, indices ignored"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: its published accuracy and nominal factor, and our result."""

    name: str
    published: float
    nominal: float
    results: list[Result]
    seconds: float


def best_fraction(model, task: Task, bits: int) -> int:
    """Return the fixed point's fraction bits that score best on the validation split."""

    def score(fraction: int) -> float:
        state = State(load_copy(model), task)
        run_step(Quantize(FixedPoint(bits, fraction)), state)
        return task.score(state.model, "validate")["accuracy"]

    return max(range(bits - 2, bits + 3), key=score)


def load_copy(model):
    """Return an independent copy with plain weights."""
    plain = copy.deepcopy(model)
    bake(plain)
    return plain


def quantized(weight: Representation, epochs: int, lr: float, seed: int, *earlier) -> Recipe:
    """Return the recipe that quantises, fine-tunes and recalibrates."""
    train = Train(epochs=epochs, optimizer=SGD(lr, weight_decay=1e-4), stop=Stop(keep="last"))
    steps = (*earlier, Quantize(weight), train, Recalibrate(batches=100))
    return Recipe(steps, seed=seed, precision="bfloat16")


def run(recipe: Recipe, model, task: Task, out: Path) -> tuple[Result, float]:
    """Run or resume one recipe and return its result and the seconds of this call."""
    began = time.monotonic()
    result = compress(model, task, recipe, out=out, resume=True)
    return result, time.monotonic() - began


def main() -> None:
    """Run the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--network", default="resnet20")
    arguments.add_argument("--prune-epochs", type=int, default=20)
    arguments.add_argument("--epochs", type=int, default=4, help="after quantising")
    options = arguments.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    data, work = data_folder(options), options.work / "chaining" / options.network
    sheet = options.work / "cifar10.npz"
    if not sheet.is_file():
        sheet.parent.mkdir(parents=True, exist_ok=True)
        write(convert(data / "cifar10"), sheet, compress=False)
    task = npz(sheet, mean=IMAGENET[0], std=IMAGENET[1], augment="pad-crop-flip")
    weights = data / "teachers_cifar10" / f"{options.network}.safetensors"
    model = load_model({options.network: {"weights": str(weights)}})

    prune = Train(
        epochs=options.prune_epochs,
        optimizer=SGD(0.03, weight_decay=1e-4),
        stop=Stop(keep="last"),
        during=(Prune("weights", keep=DENSITY, ranking="global", schedule=Gradual(end=0.5)),),
    )
    once = Recipe((prune, Recalibrate(batches=100)), precision="bfloat16")
    pruned, seconds = run(once, model, task, work / "pruned")
    rows = [Row("pruned 15.65 %", 91.12, 1 / DENSITY, [pruned], seconds)]
    plain = pruned.baked()
    for name, published, weight in (
        ("pruned + fixed 6-32-32", 90.59, FixedPoint(6, best_fraction(plain, task, 6))),
        ("pruned + DFP 6-32-32", 91.04, DynamicFixedPoint(6, choose="mse")),
    ):
        again = Prune("weights", keep=DENSITY, ranking="global")
        recipe = quantized(weight, options.epochs, 0.01, 0, again)
        result, seconds = run(recipe, plain, task, work / name.replace(" ", ""))
        rows.append(Row(name, published, 32 / 6 / DENSITY, [result], seconds))
        report(rows, options.network, pruned)
    four = best_fraction(model, task, 4)
    for name, published, weight in (
        ("fixed 4-32-32", 89.64, FixedPoint(4, four)),
        ("DFP 4-32-32", 90.63, DynamicFixedPoint(4, choose="mse")),
    ):
        done = []
        for seed in range(options.seeds):
            recipe = quantized(weight, options.epochs, 0.01, seed)
            done.append(run(recipe, model, task, work / f"{name.replace(' ', '')}-{seed}"))
        results = [result for result, _ in done]
        rows.append(Row(name, published, 8.0, results, sum(seconds for _, seconds in done)))
        report(rows, options.network, pruned)


def report(rows: list[Row], network: str, pruned: Result) -> None:
    """Write what is finished so far and print it."""
    original = pruned.history[0]
    base = 100 * original.metrics["accuracy"]
    written = [
        row(
            row=f"{network} baseline",
            task="CIFAR-10 test",
            metric="accuracy %",
            ours=base,
            baseline=base,
            published=91.37,
            published_setting=PUBLISHED_SETTING,
            size_bytes=original.size_bytes,
            ratio=1.0,
        )
    ]
    for line in rows:
        accuracy, deviation = spread(
            [100 * r.history[-1].metrics["accuracy"] for r in line.results]
        )
        size, _ = spread([r.history[-1].size_bytes for r in line.results])
        recipes = "; ".join(repr(step) for step in line.results[0].recipe.steps)
        written.append(
            row(
                row=f"{network} {line.name}",
                task="CIFAR-10 test",
                metric="accuracy %",
                ours=accuracy,
                std=deviation,
                seeds=len(line.results),
                baseline=base,
                published=line.published,
                published_setting=PUBLISHED_SETTING,
                size_bytes=round(size),
                ratio=original.size_bytes / size,
                seconds=line.seconds,
                note=f"nominal factor {line.nominal:.2f}x (32/bits/density); {recipes}",
            )
        )
        print(
            f"{line.name}: {accuracy:.2f} %, nominal {line.nominal:.2f}x, "
            f"on disk {original.size_bytes / size:.2f}x"
        )
    print(write_results("chaining" if network == "resnet20" else f"chaining_{network}", written))


if __name__ == "__main__":
    main()
