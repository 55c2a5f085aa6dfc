"""One and two bits: binary and ternary representations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from laconic.weights.representation import (
    Codes,
    Granularity,
    Representation,
    Stream,
    group_sizes,
    grouped,
    indicator,
    masked,
)
from laconic.weights.workspace import wide_dtype

__all__ = ["Binary", "Ternary", "optimal_support", "ternary_threshold"]

# What a float64 is divided by at least.
SMALLEST = 1e-300
# A float32 counts no further one by one.
COUNTABLE = 1 << 24


class Binary(Representation):
    """Binary weights: ``alpha sign(w)`` with ``alpha = mean|w|``; the sign of 0 is +.

    It minimises ``||w - alpha b||^2`` over b in {-1, +1} and alpha
    (Rastegari et al. 2016, XNOR-Net, section 3.1).

    Attributes:
        granularity: how many weights share a scale.

    >>> Binary().decode(Binary().encode(torch.tensor([0.5, -1.5])))
    tensor([ 1., -1.])
    """

    positional: ClassVar[tuple[str, ...]] = ("granularity",)

    granularity: Granularity = "tensor"

    def codes(self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]) -> Codes:
        """Return 1 for positive, 0 for negative, and the scale [groups]."""
        streams = {"code": Stream((weight >= 0).to(torch.uint8), 1)}
        return Codes(streams, {"scale": self._scale(weight, mask)}, weight.shape, weight.dtype)

    def _scale(self, weight: Tensor, mask: Tensor | None) -> Tensor:
        size = grouped(masked(weight, mask).abs(), self.granularity)
        return (wide_sum(size) / group_sizes(size, mask, self.granularity)).to(weight.dtype)

    def shortcut(self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]) -> Tensor:
        """Return +-scale without the codes."""
        scale = self._scale(weight, mask)[:, None]
        positive = indicator(torch.ge, grouped(weight, self.granularity), 0.0)
        return positive.mul_(2 * scale).sub_(scale).reshape(weight.shape)  # exact, in fewer passes

    def values(self, codes: Codes) -> Tensor:
        """Return +-scale."""
        signs = codes.streams["code"].tensor.reshape(codes.shape).to(codes.dtype).mul_(2).sub_(1)
        signs = grouped(signs, self.granularity)
        return _scaled(signs, codes.table("scale", len(signs))).reshape(codes.shape)


def _scaled(signs: Tensor, scale: Tensor) -> Tensor:
    """Return signs [groups, size] times the scales [groups], in their place."""
    # A second copy of the largest weight would decide how much memory loading takes.
    return signs.mul_(scale[:, None]).add_(0.0)


def wide_sum(size: Tensor) -> Tensor:
    """Return the sums of groups [groups], in float32 or wider: float16 ends at 65,504.

    >>> wide_sum(torch.full((1, 4), 2.0**15, dtype=torch.float16))
    tensor([131072.])
    """
    return size.sum(1, dtype=wide_dtype(size))


def ternary_threshold(size: Tensor, count: Tensor | int) -> Tensor:
    """Return ``0.7 mean|w|`` [groups], above which a weight is not zero.

    Args:
        size: |w| [groups, size]; zero where pruned.
        count: survivors of each group [groups], at least 1.

    >>> ternary_threshold(torch.tensor([[1.0, 3.0]]), 2).tolist()
    [1.399999976158142]
    """
    return (0.7 * (wide_sum(size) / count)).to(size.dtype)


def optimal_support(size: Tensor, curvature: Tensor | None = None) -> Tensor:
    """Return which weights the best ternary keeps, bool [groups, size].

    The k largest, with ``k = argmax (sum of D |w|)^2 / (sum of D)`` over the k largest; found by
    sorting. Equal weights are never parted: the objective is convex in how many are taken.

    Args:
        size: |w| [groups, size]; zero where pruned.
        curvature: D [groups, size], by which squared errors are weighed; None: all alike.

    >>> optimal_support(torch.tensor([[1.0, 0.1, 0.9]])).tolist()
    [[True, False, True]]
    """
    ordered, places = size.sort(dim=1, descending=True)
    # In float64 and in units of the largest, so that squares neither overflow nor vanish.
    units = ordered.double() / ordered[:, :1].double().clamp(min=SMALLEST)
    weights = torch.ones_like(units) if curvature is None else curvature.gather(1, places).double()
    gain = (weights * units).cumsum(1).square_() / weights.cumsum(1).clamp_(min=SMALLEST)
    return size >= ordered.gather(1, gain.argmax(1, keepdim=True))


class Ternary(Representation):
    """Ternary weights: ``alpha sign(w)`` where ``|w| > threshold``, else 0.

    ``alpha`` is the mean size of the weights above the threshold (Li, Zhang and Liu 2016,
    Ternary Weight Networks, equations 4 to 6).

    Attributes:
        granularity: how many weights share a scale and a threshold.
        threshold: "heuristic": 0.7 mean|w|; "exact": the least squared error, by sorting.

    >>> weight = torch.tensor([0.9, -1.1, 0.3, -0.2, 0.05, -0.6, 0.4, 1.5])
    >>> Ternary().encode(weight).streams["code"].tensor.tolist()
    [2, 0, 1, 1, 1, 0, 1, 2]
    """

    positional: ClassVar[tuple[str, ...]] = ("granularity",)

    granularity: Granularity = "tensor"
    threshold: Literal["heuristic", "exact"] = "heuristic"

    def codes(self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]) -> Codes:
        """Return sign + 1 (0, 1 or 2) and the scale [groups]."""
        signs, scale = self._signs(weight, mask)
        streams = {"code": Stream(signs.add_(1).to(torch.uint8).reshape(weight.shape), 2)}
        return Codes(streams, {"scale": scale}, weight.shape, weight.dtype)

    def _signs(self, weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return -1, 0 or 1 [groups, size] and the scale [groups]."""
        groups = grouped(masked(weight, mask), self.granularity)
        size = groups.abs()
        if self.threshold == "exact":
            support = optimal_support(size).to(weight.dtype)
        else:
            count = group_sizes(size, mask, self.granularity)
            support = indicator(torch.gt, size, ternary_threshold(size, count)[:, None])
        # Adding up floats is faster, while they can count one by one.
        number = torch.float32 if size.shape[1] <= COUNTABLE else torch.int64
        scale = wide_sum(size.mul_(support)) / support.sum(1, dtype=number).clamp_(min=1)
        return groups.sign().mul_(support), scale.to(weight.dtype)

    def shortcut(self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]) -> Tensor:
        """Return -scale, 0 or +scale without the codes."""
        return _scaled(*self._signs(weight, mask)).reshape(weight.shape)

    def values(self, codes: Codes) -> Tensor:
        """Return -scale, 0 or +scale."""
        signs = codes.streams["code"].tensor.reshape(codes.shape).to(codes.dtype).sub_(1)
        signs = grouped(signs, self.granularity)
        return _scaled(signs, codes.table("scale", len(signs))).reshape(codes.shape)
