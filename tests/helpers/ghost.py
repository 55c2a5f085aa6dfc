"""Numbers to draw, a step to run, and a convolution to give ghosts to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from laconic.step import State, Step, run_step

# Two sums in another order, float32.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


CONV = {"Conv2d": {"in_channels": 3, "out_channels": 4, "kernel_size": 3}}


def numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def after(step: Step, model: nn.Module) -> Any:
    step.check(model, None)
    run_step(step, State(model))
    return model
