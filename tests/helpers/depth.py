"""A network of residual blocks that count their calls, and its task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from laconic.step import State, Step, run_step
from laconic.tasks import Task

WIDTH = 6


class Block(nn.Module):
    """A residual block that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.drop(torch.tanh(self.inner(self.norm(x))))


class Net(nn.Module):
    """[batch, 3, 4] -> [batch, 3], through blocks of [batch, 3, 6]."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.first = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x.mean(dim=1))


def net(blocks: int = 4) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Net(blocks).eval()


def inputs(count: int = 5) -> Tensor:
    return torch.randn(count, 3, 4, generator=torch.Generator().manual_seed(0))


def task() -> Task:
    x = inputs(36)
    y = torch.arange(36) % 3
    return Task((x, y), (x[:6], y[:6]), (x[:6], y[:6]))


def after(step: Step, model: nn.Module | None = None, seed: int = 0) -> Any:
    model = net() if model is None else model
    state = State(model, task(), seed=seed)
    step.check(model, state.task)
    run_step(step, state)
    return state.model


def numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
