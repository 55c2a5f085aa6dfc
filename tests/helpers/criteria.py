"""A network and tasks to score by criteria."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from laconic.tasks.split import Arrays, Batch
from laconic.tasks.task import Task


def mean_square(outputs: Tensor, batch: Batch) -> Tensor:
    """Return half the mean squared error: its Hessian is the inputs' second moment."""
    return 0.5 * (outputs - batch.targets).square().sum(-1).mean()


def regression(examples: int = 24, width: int = 3, augment: object = None) -> Task:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(examples, width, generator=generator)
    targets = torch.randn(examples, 2, generator=generator)
    data = Arrays(inputs, targets, augment=augment)  # type: ignore[arg-type]
    rest = (inputs, targets)
    return Task(data, rest, rest, loss=mean_square, metrics={"loss": lambda o, t: 0.0})


def classification() -> Task:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 1, 6, 6, generator=generator)
    pair = (inputs, torch.arange(40) % 3)
    return Task(pair, pair, pair)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(64, 3),
    )


def linear(width: int = 3) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(width, 2, bias=False)
