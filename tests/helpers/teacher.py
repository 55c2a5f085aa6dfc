"""Networks of residual blocks as students and teachers, a task, and short trainings of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from laconic.recover import SGD, Constant, Hidden, Label, Logits, Objective, Stop, Train, Uniform
from laconic.step import State, run_step
from laconic.tasks import Task

BATCH, EXAMPLES = 8, 20  # two full batches and a rest of four
HIDDEN = Label() + Hidden(Uniform()) + Logits(2.0)


def task(examples: int = EXAMPLES, classes: int = 3) -> Task:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(examples, 6, generator=generator)
    held = torch.randn(9, 6, generator=generator), torch.arange(9) % classes
    return Task((inputs, torch.arange(examples) % classes), held, held)


class Blocks(nn.Module):
    """Residual blocks with dropout and a norm: [batch, 6] -> [batch, classes]."""

    def __init__(self, blocks: int, width: int, classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(0.5))
            for _ in range(blocks)
        )
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        outputs: Tensor = self.last(self.norm(x))
        return outputs


def network(blocks: int = 2, width: int = 8, classes: int = 3, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Blocks(blocks, width, classes)


def teacher(**options: Any) -> nn.Module:
    return network(**{"blocks": 4, "width": 12, "seed": 1, **options})


def trained(
    train: Train, model: nn.Module, teachers: tuple[nn.Module, ...], **options: Any
) -> nn.Module:
    """Return the network after a training, with seed 0."""
    state = State(model, task(), teacher=teachers, **options)
    train.check(model, state.task)
    run_step(train, state)
    return model


def short(objective: Objective, **fields: Any) -> Train:
    options = {"epochs": 2, "batch": BATCH, "stop": Stop(keep="last")}
    optimizer = SGD(0.1, momentum=0.9, decay=Constant())
    return Train(objective, **{"optimizer": optimizer, **options, **fields})


def close(left: nn.Module, right: nn.Module) -> None:
    for (name, one), two in zip(left.named_parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6, msg=name)
