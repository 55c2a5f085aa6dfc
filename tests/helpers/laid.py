"""What tests of laid weights share: the latent of a module, and a mask in squares."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def latent(module: nn.Module, attribute: str = "weight") -> nn.Parameter:
    return module.parametrizations[attribute].original


def checkerboard(rows: int, columns: int) -> Tensor:
    return (torch.arange(rows)[:, None] + torch.arange(columns)) % 2 == 0
