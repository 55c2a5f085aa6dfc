"""The shipped recipe deep-compression, changed only in its model and task lines.

Digits, MNIST with LeNet-300-100 and LeNet-5 (trained here first), CIFAR-10 with the trained
ResNet-20: one seed each, nothing tuned to the network. A network without a row in the results has
not been run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import (
    cifar10,
    costs,
    data_folder,
    parser,
    row,
    trained_resnet,
    write_table,
)
from torch import nn

from laconic import Recipe, Task, Train, compress
from laconic.measure import float_bytes
from laconic.models import load_model
from laconic.recover import Adam
from laconic.tasks import task_from_dict

EPOCHS = 12


def digits(options: argparse.Namespace) -> tuple[nn.Module, Task]:
    """Return the network of the demonstration, trained."""
    task = task_from_dict("digits")
    return trained("digits_cnn", task, options.work), task


def lenet_300_100(options: argparse.Namespace) -> tuple[nn.Module, Task]:
    """Return LeNet-300-100 on MNIST, trained."""
    task = task_from_dict({"mnist": str(data_folder(options) / "mnist")})
    return trained("lenet_300_100", task, options.work), task


def lenet_5(options: argparse.Namespace) -> tuple[nn.Module, Task]:
    """Return LeNet-5 on MNIST, trained."""
    task = task_from_dict({"mnist": str(data_folder(options) / "mnist")})
    return trained("lenet_5", task, options.work), task


def resnet20(options: argparse.Namespace) -> tuple[nn.Module, Task]:
    """Return the published ResNet-20 on CIFAR-10."""
    return trained_resnet(options, "resnet20"), cifar10(options)


NETWORKS: dict[str, Callable[[argparse.Namespace], tuple[nn.Module, Task]]] = {
    function.__name__: function for function in (digits, lenet_300_100, lenet_5, resnet20)
}


def trained(name: str, task: Task, work: Path) -> nn.Module:
    """Return a network trained from scratch, once."""
    torch.manual_seed(0)
    train = Train(epochs=EPOCHS, optimizer=Adam(2e-3, weight_decay=1e-4))
    out = work / "shipped_recipe" / f"{name}-baseline"
    return compress(load_model(name), task, Recipe((train,)), out=out, resume=True).baked()


def results(names: list[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per network."""
    recipe = Recipe.read("deep-compression")
    for name in names:
        model, task = NETWORKS[name](options)
        out = options.work / "shipped_recipe" / name
        result = compress(model, task, recipe, out=out, resume=True)
        first, last = result.history[0], result.history[-1]
        plain = float_bytes(model)
        yield row(
            row=f"{name}, shipped recipe unchanged",
            task=f"{task.name} test",
            metric="accuracy %",
            ours=100 * last.metrics["accuracy"],
            seeds=1,
            baseline=100 * first.metrics["accuracy"],
            **costs([result], plain),
            note=f"float32 safetensors {plain} bytes; {recipe.steps!r}",
        )


def main() -> None:
    """Run the table."""
    made = parser(__doc__)
    made.add_argument("--only", choices=NETWORKS, help="one network")
    options = made.parse_args()
    names = [options.only] if options.only else list(NETWORKS)
    write_table("shipped_recipe", results(names, options))


if __name__ == "__main__":
    main()
