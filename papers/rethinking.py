"""Rethinking the value of pruning: fine-tune what is left, or train it from scratch?

ResNet-20 on CIFAR-10 (Liu et al. 2019): 80 and 95 % of the weights of its convolutions pruned over
all of them by magnitude, and half of its channels by L1 norm. Then, with schedules scaled down from
the paper's 40, 160 and 160 epochs times the FLOPs saved: fine-tuned for 5 epochs at 0.001;
scratch-E, drawn anew and trained for 15; scratch-B, the same for as much compute as 15 epochs of
the unpruned network, at most 30. From scratch the rate starts at 0.1 and falls tenfold at half and
three quarters of the epochs. Scores are those of the full test set.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from common import (
    cifar10,
    costs,
    parser,
    row,
    spread,
    trained_resnet,
    write_table,
)
from torch import nn

from laconic import Prune, Recipe, Result, Scope, Task, Train, compress
from laconic.recover import SGD, Constant, Milestones, Reset, Stop
from laconic.step import Step

EPOCHS, CAP = 15, 30
CONVOLUTIONS = Scope("kind:conv")
CUTS = {
    "80 % of weights": Prune("weights", keep=0.2, ranking="global", scope=CONVOLUTIONS),
    "95 % of weights": Prune("weights", keep=0.05, ranking="global", scope=CONVOLUTIONS),
    "50 % of channels": Prune("channels", keep=0.5),
}
PUBLISHED = {"80 % of weights": (94.55, 93.76, 94.52), "95 % of weights": (92.35, 91.23, 91.55)}


def fine_tune(epochs: int) -> tuple[Step, ...]:
    """Return the paper's fine-tuning: a small, constant rate."""
    optimizer = SGD(0.001, weight_decay=1e-4, decay=Constant())
    return (Train(epochs=epochs, batch=64, optimizer=optimizer, stop=Stop(keep="last")),)


def scratch(epochs: int) -> tuple[Step, ...]:
    """Return a training of what is left from new numbers."""
    optimizer = SGD(0.1, weight_decay=1e-4, decay=Milestones((0.5, 0.75)))
    return (Reset(), Train(epochs=epochs, batch=128, optimizer=optimizer, stop=Stop(keep="last")))


def saving(model: nn.Module, task: Task, cut: Prune) -> float:
    """Return how many times fewer multiplications by non-zero weights a cut leaves."""
    before, after = compress(model, task, [cut]).history
    dense = sum(layer.macs or 0 for layer in before.layers)
    left = sum((layer.macs or 0) * layer.nonzero / layer.parameters for layer in after.layers)
    return dense / left


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run every cut with every recovery."""
    task, model = cifar10(options), trained_resnet(options, "resnet20")
    for label, cut in CUTS.items():
        longer = min(CAP, round(EPOCHS * saving(model, task, cut)))
        ways = {
            "fine-tuned 5 epochs": fine_tune(5),
            f"scratch-E {EPOCHS} epochs": scratch(EPOCHS),
            f"scratch-B {longer} epochs": scratch(longer),
        }
        for index, (way, steps) in enumerate(ways.items()):
            name = f"{label} pruned, {way}"
            done = []
            for seed in range(options.seeds):
                recipe = Recipe((cut, *steps), seed=seed, precision="bfloat16")
                out = options.work / "rethinking" / f"{name.replace(' ', '')}-{seed}"
                done.append(compress(model, task, recipe, out=out, resume=True))
            yield line(name, done, PUBLISHED.get(label, (None,) * 3)[index])


def line(name: str, done: list[Result], published: float | None) -> dict[str, Any]:
    """Return one row."""
    scores = [100 * result.history[-1].metrics["accuracy"] for result in done]
    mean, deviation = spread(scores)
    print(f"{name}: {scores}", flush=True)
    last = done[0].history[-1]
    return row(
        row=f"resnet20, {name}",
        task="CIFAR-10 test",
        metric="accuracy %",
        ours=mean,
        std=deviation,
        seeds=len(done),
        baseline=100 * done[0].history[0].metrics["accuracy"],
        published=published,
        published_setting=published and "PreResNet-110, 40, 160 and at least 160 epochs",
        **costs(done),
        note=f"{last.nonzero:,} of {last.parameters:,} parameters are not zero; "
        f"{done[0].recipe.steps!r}",
    )


def main() -> None:
    """Run the table and write what is finished after every row."""
    made = parser(__doc__)
    made.set_defaults(seeds=2)
    write_table("rethinking", rows(made.parse_args()))


if __name__ == "__main__":
    main()
