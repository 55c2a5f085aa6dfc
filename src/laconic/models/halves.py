"""Halves: two layers whose outputs are added, as the two of a layer that was split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from laconic.models.layers import describe, layer

__all__ = ["Halves"]


class Halves(nn.Module):
    """Two layers that see the same input, and whose outputs are added.

    ``y = first(x) + second(x)``: what a ternary layer is once each of its weights is the sum of
    two binary ones (Bai et al. 2021, BinaryBERT, section 3.1).

    Args:
        first: description of a layer (see models.layers).
        second: description of another, for the same inputs and outputs.

    Raises:
        ModelError: a description is not one.

    >>> linear = {"Linear": {"in_features": 4, "out_features": 6}}
    >>> halves = Halves(linear, linear)
    >>> halves.first.weight.shape, halves.second.bias.shape
    (torch.Size([6, 4]), torch.Size([6]))
    """

    def __init__(self, first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
        super().__init__()
        self.first, self.second = layer(first), layer(second)

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments, with the layers as they are now."""
        return {"first": describe(self.first), "second": describe(self.second)}

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both layers' outputs, in their shape."""
        return cast("Tensor", self.first(x) + self.second(x))
