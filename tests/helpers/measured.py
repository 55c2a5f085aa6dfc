"""A small network, plain, pruned and quantized, its task, and the measurements of all three."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from laconic.ledger import Measurement
from laconic.measure import measure
from laconic.tasks import Task
from laconic.weights.codebook import KMeans
from laconic.weights.laid import lay
from laconic.weights.representation import Float

FLOAT = 4  # bytes of a float32


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))


def small_task(**options: Any) -> Task:
    inputs, targets = torch.randn(30, 10), torch.arange(30) % 5
    return Task((inputs, targets), (inputs[:10], targets[:10]), **options)


def half(weight: Tensor) -> Tensor:
    """Return a mask that keeps every second number."""
    return (torch.arange(weight.numel()) % 2 == 0).reshape(weight.shape)


def pruned(model: nn.Sequential) -> nn.Sequential:
    model = copy.deepcopy(model)
    lay(model, "0.weight", Float(), mask=half(model[0].weight))
    return model


def shared(model: nn.Sequential, bits: int = 3) -> nn.Sequential:
    model = pruned(model)
    lay(model, "0.weight", KMeans(bits))
    return model


def three_steps() -> list[Measurement]:
    """Return the history of a run of two steps."""
    model, task = small(), small_task()
    steps = {"original": model, "prune": pruned(model), "quantize": shared(model)}
    return [
        measure(network, task, step=step, seconds=1.5, latency=False)
        for step, network in steps.items()
    ]
