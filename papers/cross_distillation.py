"""Pruning with one to fifty images of a class: cross distillation and what it is compared with.

CIFAR-10 (Bai et al. 2020). Structured: half of the inner channels of every block of ResNet-56.
Unstructured: 90 % of the weights of ResNet-20's convolutions but the first. The images are drawn
once for every seed, the same for all methods; scores are those of the full test set. Every method
that works layer by layer is followed by the same fine-tuning: at a rate of 1e-5 after channels are
gone, 1e-3 after weights are. How far layers are from the teacher's on the test set is compared
before it, as a share of layers, which is no score. The shares of CD and SCD were chosen on held-out
training images with a seed that is in no row; settings of BP and FitNet were not searched.

Where this differs from the reference code: layers learn for 1,000 steps, there 3,000. Weights learn
at 1e-3, there at 5e-4; channels at 1e-3, as there. CD's share is 0.6, there 0.9 for ResNet-56. The
fine-tuning has about 100 updates, which are 100 epochs, as there, for up to six images of a class,
64 epochs for ten and 12 for fifty. Inner channels are cut in all 27 blocks; the code leaves those
at the borders of stages (its skip list is 0, 16, 20, 38, 54).
"""

from __future__ import annotations

import argparse
import collections
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from common import (
    asked,
    cifar10,
    costs,
    parser_of_rows,
    row,
    spread,
    trained_resnet,
    write_table,
)
from torch import nn

from laconic import Label, Prune, Recipe, Result, Scope, Task, Train, compress
from laconic.recover import (
    Adam,
    Constant,
    Cross,
    Feed,
    Gradient,
    Greedy,
    Hint,
    Lasso,
    Linear,
    Milestones,
    Pointwise,
    Proximal,
    ProximalChannels,
    ProximalWeights,
    Reconstruct,
    SoftCross,
    Stop,
    Student,
)
from laconic.report import estimation_error
from laconic.step import Step

FEEDS: dict[str, Feed] = {"w/o CD": Student(), "CD": Cross(0.6), "SCD": SoftCross(0.7, 0.7)}
SHOTS = {"structured": (1, 2, 3, 5, 10, 50), "unstructured": (1, 5, 50)}
KEEP = {"structured": 0.5, "unstructured": 0.1}
NETWORKS = {"structured": "resnet56", "unstructured": "resnet20"}
STEPS, WATCHED = 1000, 200
INNER, WEIGHTS = Scope("*.conv2"), Scope("kind:conv, !conv1")
# Norms keep their statistics: a few images would spoil them.
LEARNING = Scope("kind:conv, kind:linear")
STAGES = ("layer1", "layer2", "layer3")
# Layers that both sides fit, but for the first, which is fed the same by both networks.
COMPARED = {
    "structured": "*.conv2, !layer1.0.*",
    "unstructured": "kind:conv, !conv1, !layer1.0.conv1",
}
COMPARISON = "error of CD below w/o CD"

Method = tuple[Step, ...]


def trained(
    objective: Any, rate: float, updates: int, images: int, scope: Scope = LEARNING
) -> Train:
    """Return a training of so many updates on so few images."""
    batch = min(64, images)
    epochs = max(1, updates * batch // images)
    optimizer = Adam(rate, decay=Linear())
    return Train(
        objective,
        epochs=epochs,
        batch=batch,
        optimizer=optimizer,
        scope=scope,
        stop=Stop(keep="last"),
    )


def fitted(feed: Feed, penalty: Proximal, scope: Scope) -> Reconstruct:
    """Return the layer-wise regression of a paper's row."""
    decay = Milestones((1 / 3,)) if isinstance(penalty, ProximalChannels) else Constant()
    solve = Gradient(STEPS, optimizer=Adam(1e-3, decay=decay), penalty=penalty)
    return Reconstruct(feed=feed, solve=solve, scope=scope)


def methods(kind: str, keep: float, images: int) -> dict[str, Method]:
    """Return the steps of every row."""
    structured = kind == "structured"
    cut: Step = (
        Prune("channels", keep=keep, scope=Scope("*.conv1"))
        if structured
        else Prune("weights", keep=keep, scope=WEIGHTS)
    )
    last = trained(Label(), 1e-5 if structured else 1e-3, 100, images)
    hints = [trained(Hint(f"output:{stage}"), 1e-4, 100, images) for stage in STAGES]
    found: dict[str, Method] = {"L1-norm": (cut,)}
    if structured:
        found["FSKD"] = (cut, Reconstruct(solve=Pointwise(), scope=Scope("kind:conv")), last)
        found["ThiNet"] = (Reconstruct(solve=Greedy(keep), scope=INNER), last)
        found["CP"] = (Reconstruct(solve=Lasso(keep), scope=INNER), last)
    penalty: Proximal = ProximalChannels(keep) if structured else ProximalWeights(keep)
    scope = INNER if structured else WEIGHTS
    found |= {name: (fitted(feed, penalty, scope), last) for name, feed in FEEDS.items()}
    found["BP"] = (cut, trained(Label(), 1e-4, 200, images))
    return found | {"FitNet": (cut, *hints, last)}


def run(
    options: argparse.Namespace, model: nn.Module, task: Task, method: Method, name: str
) -> Iterator[Result]:
    """Run one method with every seed."""
    for seed in range(options.first, options.first + options.seeds):
        few = task.few(per_class=int(name.rpartition("-K")[2]), seed=seed)
        # Steps are watched on some of the test images; the score of a row is that of all.
        few.test = task.test.subset(range(WATCHED))
        out = options.work / "cross_distillation" / f"{name}-{seed}"
        recipe = Recipe(method, seed=seed, precision="auto")
        yield compress(model, few, recipe, out=out, resume=True)


# Bai et al. 2020, table 1: VGG-16 on CIFAR-10, half of the channels.
PUBLISHED: Mapping[str, Mapping[int, float]] = {
    name: dict(zip(SHOTS["structured"], scores, strict=True))
    for name, scores in {
        "L1-norm": (14.36,) * 6,
        "BP": (49.24, 49.32, 51.39, 55.73, 57.48, 64.69),
        "FSKD": (47.91, 55.44, 61.76, 65.69, 72.20, 75.46),
        "FitNet": (48.51, 71.51, 76.22, 81.10, 85.40, 88.46),
        "ThiNet": (58.06, 72.07, 75.37, 78.03, 81.15, 86.12),
        "CP": (66.03, 75.23, 77.98, 81.53, 83.59, 87.27),
        "w/o CD": (65.57, 75.44, 78.40, 81.20, 84.07, 87.67),
        "CD": (69.25, 80.65, 82.08, 84.91, 86.61, 87.64),
        "SCD": (68.53, 76.83, 80.16, 84.28, 86.30, 88.65),
    }.items()
}


def scored(
    results: list[Result], task: Task, label: str, *, kind: str, shots: int, dense: float
) -> dict[str, Any]:
    """Return the row of a method, from the runs of every seed."""
    scores = [score(result, task) for result in results]
    mean, deviation = spread(scores)
    print(f"{label}, {kind}, {shots}: {scores}", flush=True)
    published = PUBLISHED[label].get(shots) if kind == "structured" else None
    return row(
        row=f"{NETWORKS[kind]}, {label}, {kind}, {shots} images of a class",
        task="CIFAR-10 test",
        metric="accuracy",
        ours=mean,
        std=deviation,
        seeds=len(results),
        scores={str(each.recipe.seed): one for each, one in zip(results, scores, strict=True)},
        baseline=dense,
        published=published,
        published_setting=published and "VGG-16, half of the channels",
        **costs(results),
        note=repr(results[0].recipe.steps),
    )


def score(result: Result, task: Task) -> float:
    """Return the accuracy of a run on the full test set, found once."""
    if result.out is None:
        raise ValueError("the run kept no files")
    kept = result.out / "accuracy"
    if not kept.is_file():
        kept.write_text(str(100 * task.score(result.baked())["accuracy"]), encoding="ascii")
    return float(kept.read_text(encoding="ascii"))


def generalised(
    teacher: nn.Module, fitted: Mapping[str, list[Result]], task: Task, *, kind: str, shots: int
) -> dict[str, Any]:
    """Return on how many layers cross distillation is closer to the teacher, on the test set.

    As the layers were fitted, before the fine-tuning that follows.
    """
    shares, ratios = {}, collections.defaultdict(list)
    for plain, crossed in zip(fitted["w/o CD"], fitted["CD"], strict=True):
        students = {"w/o CD": plain.baked(), "CD": crossed.baked()}
        found = estimation_error(teacher, students, task, scope=COMPARED[kind])
        each = found.ratios("CD", to="w/o CD")
        shares[str(plain.recipe.seed)] = 100 * statistics.fmean(r < 1 for r in each.values())
        for layer, ratio in each.items():
            ratios[layer.partition(".")[0]].append(ratio)
    mean, deviation = spread([*shares.values()])
    medians = {stage: round(statistics.median(found), 3) for stage, found in ratios.items()}
    print(f"estimation error, {kind}, {shots}: {shares}, {medians}", flush=True)
    return row(
        row=f"{NETWORKS[kind]}, {COMPARISON}, {kind}, {shots} images of a class",
        task="CIFAR-10 test",
        metric="share of layers",
        ours=mean,
        std=deviation,
        seeds=len(shares),
        scores=shares,
        note=f"before fine-tuning; median ratio of the layers of each stage: {medians}",
    )


def rows(options: argparse.Namespace, kind: str) -> Iterator[dict[str, Any]]:
    """Yield one row for each number of images and each method."""
    task, model = cifar10(options), trained_resnet(options, NETWORKS[kind])
    dense, keep = 100 * task.score(model)["accuracy"], KEEP[kind]
    for shots in options.shots or SHOTS[kind]:
        fitted: dict[str, list[Result]] = {}
        for method, steps in methods(kind, keep, 10 * shots).items():
            place = f"{kind}-{keep:g}-{method.replace('/', '').replace(' ', '')}-K{shots}"
            if asked(options, COMPARISON) and method in ("CD", "w/o CD"):
                fitted[method] = list(run(options, model, task, steps[:-1], f"fitted-{place}"))
            if asked(options, method):
                done = list(run(options, model, task, steps, place))
                yield scored(done, task, method, kind=kind, shots=shots, dense=dense)
        if fitted:
            yield generalised(model, fitted, task, kind=kind, shots=shots)


def place(row: Mapping[str, Any]) -> tuple[str, int, int]:
    """Return where a row stands in the table: by kind, then images, then method."""
    _, label, kind, images = row["row"].split(", ")
    shots = int(images.split()[0])
    return kind, shots, [*methods(kind, KEEP[kind], shots), COMPARISON].index(label)


def main() -> None:
    """Run the tables and write what is finished after every row."""
    made = parser_of_rows(__doc__)
    made.add_argument("--only", choices=tuple(SHOTS))
    made.add_argument("--shots", type=int, nargs="*", help="images of a class; the paper's if none")
    options = made.parse_args()
    kinds = [options.only] if options.only else SHOTS
    found = (row for kind in kinds for row in rows(options, kind))
    write_table("cross_distillation", found, order=place)


if __name__ == "__main__":
    main()
