"""Factorizations to try, a small network and task for them, and one layer split."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from laconic.step import State, run_step
from laconic.structure.factorization import Factorization, Source
from laconic.structure.factorize import Factorize
from laconic.structure.kernels import CP, DepthwiseSeparable, Separable, Tucker2, TwoThrees
from laconic.structure.matrices import SVD, BlockDiagonal, BlockTerm, DataSVD, TensorTrain
from laconic.tasks import Task

# float32 sums of a few hundred products of order one.
CLOSE = 1e-4


DATA = DataSVD(batches=2, batch=8)


LINEAR: list[Factorization] = [SVD(), DATA, BlockDiagonal(), TensorTrain(4), BlockTerm(2, sweeps=2)]
LINEAR += [SVD(energy=0.3), BlockDiagonal(2, order="energy"), TensorTrain(eps=0.9)]


CONV: list[Factorization] = [SVD(), DATA, BlockDiagonal(), Tucker2(), CP(sweeps=3), Separable()]
CONV += [DepthwiseSeparable(), Tucker2((3, 2)), Tucker2(energy=0.4), TwoThrees(sweeps=2)]
CONV += [BlockDiagonal(2, order="energy"), DepthwiseSeparable(1), Separable(energy=0.4)]


GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"padding": (2, 1)},
    "strided": {"stride": (2, 3), "padding": 2},
    "dilated": {"dilation": (2, 1), "padding": (4, 2)},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid", "stride": 2},
    "grouped": {"groups": 2, "padding": 2, "stride": 2},
    "depthwise": {"groups": 4},
    "reflected": {"padding": 2, "padding_mode": "reflect"},
    "circular": {"padding": (1, 2), "padding_mode": "circular"},
    "no bias": {"bias": False},
}


def network() -> nn.Sequential:
    """Return [batch, 4, 9, 9] -> [batch, 6]."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 24),
        nn.ReLU(),
        nn.Linear(24, 6),
    ).eval()


def task(examples: int = 24) -> Task:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(examples, 4, 9, 9, generator=generator)
    labels = torch.arange(examples) % 3
    return Task((images, labels), (images, labels), (images[:6], labels[:6]))


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def source(module: nn.Module, moments: Tensor | None = None) -> Source:
    weight = module.weight.detach().double()  # type: ignore[union-attr, operator]
    return Source(module, weight, torch.Generator().manual_seed(0), moments)


def split(method: Factorization, module: nn.Module, moments: Tensor | None = None) -> nn.Module:
    return method.split(source(module, moments))


def factorized(step: Factorize, model: nn.Module | None = None, seed: int = 0) -> nn.Module:
    state = State(network() if model is None else model, task(), seed=seed)
    step.check(state.model, state.task)
    run_step(step, state)
    return state.model


def weights(module: nn.Module) -> int:
    named = module.named_parameters()
    return sum(p.numel() for name, p in named if not name.endswith("bias"))
