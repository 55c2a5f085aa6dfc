"""Outlines: copies of networks that a step edits so that later steps can be checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from laconic.step import undisturbed
from laconic.weights.laid import copied

__all__ = ["blank", "outlined"]


@contextmanager
def outlined(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a copy of a network, to be edited inside a with block; draws inside it do not count.

    Its parameters are its own and their numbers the network's, of which there is no second copy:
    modules and parameters may be replaced, numbers must not be written to.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> with outlined(model) as outline:
    ...     outline[0] = nn.Identity()
    >>> model[0]
    Linear(in_features=2, out_features=2, bias=True)
    """
    own = {
        id(p): nn.Parameter(p.clone() if p.is_inference() else p.detach(), p.requires_grad)
        for p in model.parameters()
        if not is_lazy(p)
    }
    with undisturbed():
        yield copied(model, own)


def blank(module: nn.Module, like: Tensor) -> nn.Module:
    """Return a module that was built on the device "meta" as one of zeros.

    Args:
        module: holds no numbers yet.
        like: whose place it gets.

    >>> with torch.device("meta"):
    ...     layer = nn.Linear(2, 1, bias=False)
    >>> blank(layer, torch.zeros(1)).weight
    Parameter containing:
    tensor([[0., 0.]], requires_grad=True)
    """
    made = module.to_empty(device=like.device)
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            tensor.zero_()
    return made
