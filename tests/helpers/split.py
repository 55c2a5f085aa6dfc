"""A small network made ternary, its task, and how exactly halves must add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.tensors import drawn
from laconic.scope import Scope
from laconic.step import State, Step, run_step
from laconic.tasks import Task
from laconic.weights import Quantize, Representation, Ternary

# A few hundred float64 roundings of numbers near one.
IDENTITY = 1e-12


# Of logits in float32, where the two scales of a pair differ in the last bits.
LOGITS = 1e-4


granularities = pytest.mark.parametrize("granularity", ["tensor", "row", 5])


thresholds = pytest.mark.parametrize("threshold", ["heuristic", "exact"])


def images(count: int = 4) -> Tensor:
    return drawn(count, 1, 6, 6, seed=5)


def task() -> Task:
    labels = torch.arange(24) % 3
    inputs = drawn(24, 1, 6, 6) + labels[:, None, None, None]
    return Task((inputs, labels), (inputs[:9], labels[:9]), (inputs[:9], labels[:9]))


def network() -> nn.Sequential:
    """Return a network [batch, 1, 6, 6] -> [batch, 3], in double for exact comparisons."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, stride=2, groups=2, padding_mode="circular", padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(36, 8),
            nn.ReLU(),
            nn.Linear(8, 3),
        )
    return model.eval()


def after(step: Step, model: nn.Module, task: Task | None = None) -> Any:
    step.check(model, task)
    run_step(step, State(model, task))
    return model


def ternary_network(representation: Representation | None = None, scope: str = "*") -> Any:
    return after(Quantize(representation or Ternary(), scope=Scope(scope)), network())
