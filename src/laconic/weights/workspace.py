"""Workspace: large tensors computed a part at a time, in memory that stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from types import EllipsisType

import torch
from torch import Tensor

from laconic.weights.representation import IN_CACHE

__all__ = ["Workspace", "traced", "wide_dtype", "write_product"]


class Workspace:
    """The parts of a tensor, one after the other, and memory for what is computed of each.

    Every operation on a large tensor fetches it from memory; on a part, only the first one does.
    What is computed of a part lies where that of the one before lay. A tensor that is small, on
    another device, or of a computation that is differentiated or traced, is one part.

    Args:
        tensor: float [any shape].

    >>> numbers, out = torch.ones(3), torch.empty(3)
    >>> space = Workspace(numbers)
    >>> for part in space:
    ...     doubled = torch.add(numbers[part], numbers[part], out=space.new())
    ...     out[part] = doubled
    >>> out
    tensor([2., 2., 2.])
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.parts = _parts(tensor)
        self._part, self._given = tensor, 0
        self._kept: list[Tensor] = []

    def __iter__(self) -> Iterator[slice | EllipsisType]:
        """Yield the index of every part."""
        whole: list[slice | EllipsisType] = [...]
        for part in self.parts or whole:
            self._part, self._given = self.tensor[part], 0
            yield part

    def new(self) -> Tensor:
        """Return a tensor [shape of the part], in float32 or wider, whose numbers are anything."""
        if self._given == len(self._kept):
            self._kept.append(torch.empty_like(self._part, dtype=wide_dtype(self._part)))
        kept = self._kept[self._given]
        self._given += 1
        return kept if kept.shape == self._part.shape else kept[: len(self._part)]

    def wide(self, tensor: Tensor) -> Tensor:
        """Return numbers of the part's shape in float32 or wider; themselves where they are."""
        return tensor if tensor.dtype == wide_dtype(tensor) else self.new().copy_(tensor)

    def times(self, tensor: Tensor, factor: Tensor) -> Tensor:
        """Return numbers of the part's shape times one [], in float32 or wider."""
        if tensor.dtype == wide_dtype(tensor):
            return torch.mul(tensor, factor, out=self.new())
        return self.new().copy_(tensor).mul_(factor)


def write_product(out: Tensor, one: Tensor, factor: Tensor) -> None:
    """Write a product into a tensor of any float type; the first may be lost.

    >>> out = torch.empty(2, dtype=torch.bfloat16)
    >>> write_product(out, torch.ones(2), torch.tensor(3.0))
    >>> out.tolist()
    [3.0, 3.0]
    """
    if out.dtype == one.dtype:
        torch.mul(one, factor, out=out)
    else:  # torch takes longer for both at once
        out.copy_(one.mul_(factor))


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return float32, or the tensor's type where that is wider.

    >>> wide_dtype(torch.zeros(1, dtype=torch.bfloat16))
    torch.float32
    """
    return torch.promote_types(tensor.dtype, torch.float32)


def traced() -> bool:
    """Return whether a program is made, for which no number can be looked at."""
    return torch.compiler.is_compiling()


def _parts(tensor: Tensor) -> list[slice]:
    """Return slices of a large tensor that each fit a cache; none where it is done at once."""
    # A program that is being traced must not depend on how large this tensor is.
    unknown = traced() or torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
    if unknown or tensor.device.type != "cpu" or torch.is_grad_enabled():
        return []
    numbers = IN_CACHE * torch.get_num_threads()
    if tensor.numel() <= numbers:
        return []
    rows = max(1, numbers // tensor[0].numel())
    return [slice(start, start + rows) for start in range(0, len(tensor), rows)]
