"""A small convolutional network, its data, and states and distances of layers to fit."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn

from laconic.recover import Adam
from laconic.recover.quadratic import Fitted
from laconic.step import State
from laconic.tasks import Task

FAST = Adam(lr=0.01)


class Net(nn.Sequential):
    """Three convolutions with BatchNorm and a linear layer: [batch, 2, 6, 6] -> [batch, 3]."""

    def __init__(self) -> None:
        super().__init__()
        for index, (first, second) in enumerate(((2, 8), (8, 8), (8, 6))):
            self.add_module(f"conv{index}", nn.Conv2d(first, second, 3, padding=1))
            self.add_module(f"norm{index}", nn.BatchNorm2d(second))
            self.add_module(f"relu{index}", nn.ReLU())
        self.add_module("pool", nn.AdaptiveAvgPool2d(1))
        self.add_module("flat", nn.Flatten())
        self.add_module("last", nn.Linear(6, 3))


def layer(model: nn.Module, path: str) -> Fitted:
    """Return a layer, typed."""
    return cast("Fitted", model.get_submodule(path))


def state_of(model: nn.Module, task: Task, **fields: Any) -> State:
    teacher = copy.deepcopy(model).requires_grad_(False)
    return State(copy.deepcopy(model), task, (teacher,), **fields)


def difference(first: nn.Module, second: nn.Module, task: Task) -> float:
    """Return the mean squared difference of the answers on the training examples."""
    (inputs,) = task.example(24)
    with torch.no_grad():
        return float((first(inputs) - second(inputs)).square().mean())


def narrower() -> nn.Module:
    """Return a teacher whose second convolution reads fewer channels."""
    teacher = Net()
    teacher.conv0, teacher.norm0 = nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5)
    teacher.conv1 = nn.Conv2d(5, 8, 3, padding=1)
    return teacher.eval()


def normed() -> nn.Module:
    """Return the network with statistics of its norms."""
    network = Net()
    network(torch.randn(64, 2, 6, 6))  # statistics
    return network.eval()


def examples() -> Task:
    """Return a task of normal images in three classes."""
    targets = torch.arange(24) % 3
    data = torch.randn(24, 2, 6, 6), targets
    return Task(data, (torch.randn(6, 2, 6, 6), targets[:6]), data)
