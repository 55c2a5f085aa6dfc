"""Grids whose scale is trained with the weights (Esser et al. 2020, LSQ)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from laconic.weights.representation import (
    Codes,
    Granularity,
    Representation,
    group_sizes,
    grouped,
    masked,
)
from laconic.weights.uniform import Bits, Symmetric, least_scale, level_range
from laconic.weights.workspace import Workspace

__all__ = ["LearnedStep", "first_step", "on_grid", "positive", "scale_slope"]


def first_step(mean: Tensor, high: int) -> Tensor:
    """Return the scale that learning starts from, ``2 mean|w| / sqrt(high)``; 1 for zeros.

    Esser et al. 2020, Learned Step Size Quantization, section 2.1.

    Args:
        mean: mean|w| [groups].
        high: the largest level.

    >>> first_step(torch.tensor([0.75, 0.0]), 1).tolist()
    [1.5, 1.0]
    """
    scale = mean * (2 / math.sqrt(high))
    return torch.where(scale < least_scale(scale.dtype), 1.0, scale)


class LearnedStep(Representation):
    """Linear grid whose scale is trained with the weights (LSQ).

    ``scale * clip(round(w / scale), low, high)`` with ``low = -2^(bits-1)`` and
    ``high = 2^(bits-1) - 1``. With g the gradient of the quantised weight, that of w is g
    where ``low <= w / scale <= high`` and 0 outside; that of the scale is the sum over a
    group of ``g (round(w / scale) - w / scale)`` inside and of ``g low`` or ``g high``
    outside, times ``1 / sqrt(size of the group * high)`` (Esser et al. 2020, Learned Step
    Size Quantization, equations 3 and 5, section 2.2).

    A scale that training has brought below ``least_scale`` is taken for that, so it is positive
    whatever the optimiser does, and its gradient can bring it back.

    Attributes:
        bits: width of a code, 2 to 8.
        granularity: how many weights share a scale.

    >>> weight = torch.tensor([-0.5, 0.2, 0.8, 1.0])
    >>> representation = LearnedStep(4)
    >>> state = representation.fit(weight)
    >>> round(state["scale"].item(), 6)
    0.472456
    >>> (representation.encode(weight, state=state).streams["code"].tensor.int() - 8).tolist()
    [-1, 0, 2, 2]
    """

    positional: ClassVar[tuple[str, ...]] = ("bits",)
    learned: ClassVar[frozenset[str]] = frozenset({"scale"})

    bits: Bits = 4
    granularity: Granularity = "tensor"

    def fit(self, weight: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return the scale to start from [groups]."""
        size = grouped(masked(weight, mask).abs(), self.granularity)
        mean = size.sum(1) / group_sizes(size, mask, self.granularity)
        return {"scale": first_step(mean, level_range(self.bits, "full")[1])}

    def update(self, state: Mapping[str, Tensor]) -> None:
        """Bring a scale back that the optimiser has moved below zero."""
        state["scale"].copy_(positive(state["scale"]))

    def codes(self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]) -> Codes:
        """Return the levels, counted from the lowest, and the scale [groups] as trained."""
        return self._grid().codes(weight, mask, {"scale": positive(state["scale"].detach())})

    def shortcut(self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]) -> Tensor:
        """Return scale * level without the codes."""
        scale = positive(state["scale"].detach())
        return self._grid().shortcut(weight, mask, {"scale": scale})

    def values(self, codes: Codes) -> Tensor:
        """Return scale * level."""
        return self._grid().values(codes)

    def _grid(self) -> Symmetric:
        return Symmetric(bits=self.bits, granularity=self.granularity, range="mse", levels="full")

    def surrogate(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Return the weight, with these gradients of it and of the scale."""
        low, high = level_range(self.bits, "full")
        groups = grouped(weight, self.granularity)
        share = 1 / math.sqrt(groups.shape[1] * high)
        # One group is taken by its rows: a part of them fits a cache.
        rows = weight.flatten(1) if len(groups) == 1 and weight.dim() > 1 else groups
        found = on_grid(rows, state["scale"][:, None], low, high, share=share)
        return found.reshape(weight.shape)


def on_grid(numbers: Tensor, scale: Tensor, low: int, high: int, *, share: float) -> Tensor:
    """Return numbers as they are, with the gradients of their levels on a grid times its scale.

    With g the gradient of the result, that of a number x is g where ``low <= x / scale <=
    high`` and 0 outside; that of the scale is the sum of ``g (round(x / scale) - x / scale)``
    inside and of ``g low`` or ``g high`` outside, times the share (Esser et al. 2020, Learned
    Step Size Quantization, equations 3 and 5, section 2.2).

    Args:
        numbers: [rows, size].
        scale: of every row [rows, 1] or of all [1, 1]; below ``least_scale`` it is taken for that.
        low: the smallest level.
        high: the largest level.
        share: factor of the scale's gradient.

    >>> scale = torch.tensor([[1.0]], requires_grad=True)
    >>> on_grid(torch.tensor([[0.75, 9.0]]), scale, -8, 7, share=1.0).sum().backward()
    >>> scale.grad.item()
    7.25
    """
    found: Tensor = _OnGrid.apply(numbers, scale, (low, high), share)  # type: ignore[no-untyped-call]
    return found


class _OnGrid(torch.autograd.Function):
    """Numbers as they are in the forward pass, the gradients of the grid in the backward."""

    @staticmethod
    def forward(
        ctx: Any, numbers: Tensor, scale: Tensor, levels: tuple[int, int], share: float
    ) -> Tensor:
        ctx.save_for_backward(numbers, scale)
        ctx.levels, ctx.share = levels, share
        return numbers.view_as(numbers)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        numbers, scale = (each.detach() for each in ctx.saved_tensors)
        scale, (low, high) = positive(scale), ctx.levels
        flow, moves = torch.empty_like(gradient), []
        space = Workspace(numbers)
        for part in space:
            units = scale if len(scale) == 1 else scale[part]
            # Widened first: a quotient in bfloat16 says little about what rounding changes.
            ratio = torch.div(space.wide(numbers[part]), units, out=space.new())
            inside, slope = scale_slope(ratio, low, high, space.new(), space.new())
            if torch.is_grad_enabled():  # it is differentiated once more
                flow, moved = gradient * inside, gradient * slope
            else:
                torch.mul(gradient[part], inside, out=flow[part])
                moved = slope.mul_(gradient[part])
            moves.append(moved.sum(1, keepdim=True))
        move = torch.cat(moves) * ctx.share
        return flow, move if len(scale) == len(move) else move.sum(0, keepdim=True), None, None


def scale_slope(
    ratio: Tensor,
    low: Tensor | int,
    high: Tensor | int,
    clamped: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return which numbers lie on a grid, and the derivative of what each becomes by the scale.

    ``round(x / scale) - x / scale`` inside, ``low`` or ``high`` outside (Esser et al. 2020,
    Learned Step Size Quantization, equation 3).

    Args:
        ratio: x / scale, without gradient [any shape]; what is returned first takes its place.
        low: the smallest level.
        high: the largest level.
        clamped: memory to work in [shape of ratio]; None: new.
        out: memory for the derivatives [shape of ratio]; None: new.

    Returns:
        1 inside and 0 outside; the derivatives.

    >>> inside, slope = scale_slope(torch.tensor([0.75, 9.0]), -8, 7)
    >>> inside.tolist(), slope.tolist()
    ([1.0, 0.0], [0.25, 7.0])
    """
    clamped = torch.clamp_min(ratio, low, out=clamped).clamp_max_(high)
    inside = ratio.eq_(clamped)
    return inside, torch.round(clamped, out=out).addcmul_(clamped, inside, value=-1)


def positive(scale: Tensor) -> Tensor:
    """Return the scale, no less than ``least_scale``.

    >>> positive(torch.tensor([-1.0, 0.5])).gt(0).tolist()
    [True, True]
    """
    return scale.clamp(min=least_scale(scale.dtype))
