"""Numbers to draw, and whether two networks hold the same ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn64(*shape: int, seed: int = 0) -> Tensor:
    """Return other numbers than ``drawn``, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def same(left: nn.Module, right: nn.Module) -> bool:
    one, two = left.state_dict(), right.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
