"""Loss-aware representations: levels and scales that weigh errors by the loss's curvature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from laconic.weights.lowbit import Binary, optimal_support
from laconic.weights.representation import (
    IN_CACHE,
    SPREAD,
    Codes,
    Granularity,
    Representation,
    Stream,
    grouped,
    indicator,
    masked,
)
from laconic.weights.uniform import Symmetric
from laconic.weights.workspace import wide_dtype

__all__ = ["LossAware", "exact_ternary", "loss_aware_binary", "loss_aware_levels"]

# The paper alternates at most ten times, and stops where the scale has come to rest.
ALTERNATIONS = 10
REST = 1e-6


def loss_aware_binary(size: Tensor, curvature: Tensor) -> Tensor:
    """Return the scale of loss-aware binary weights, [groups].

    ``alpha = sum(D |w|) / sum(D)``, the least ``sum_i D_i (alpha b_i - w_i)^2`` with
    ``b = sign(w)`` (Hou, Yao and Kwok 2017, Loss-aware Binarization).

    Args:
        size: |w| [groups, size].
        curvature: D [groups, size], not negative; zero where pruned.

    >>> loss_aware_binary(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]])).tolist()
    [1.25]
    """
    return (curvature * size).sum(1) / _divisor(curvature.sum(1))


def exact_ternary(size: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best ternary levels of |w|, 0 or 1 [groups, size], and the scale [groups].

    Of all supports the best holds the weights above a threshold c, with
    ``c = sum(D |w|) / (2 sum(D))`` over them and ``alpha = 2 c``; among those, the one with the
    largest ``c^2 sum(D)`` is found by sorting (Hou and Kwok 2018, section 3.1).

    Args:
        size: |w| [groups, size]; zero where pruned.
        curvature: D [groups, size], not negative.

    >>> levels, scale = exact_ternary(torch.tensor([[1.0, 0.1, 0.8]]), torch.ones(1, 3))
    >>> levels.tolist(), round(float(scale), 6)
    ([[1.0, 0.0, 1.0]], 0.9)
    """
    levels = optimal_support(size, curvature).to(size.dtype)
    weights = curvature * levels
    return levels, (weights * size).sum(1) / _divisor(weights.sum(1))


def loss_aware_levels(
    size: Tensor, curvature: Tensor, top: int, *, alternations: int = ALTERNATIONS
) -> tuple[Tensor, Tensor]:
    """Return levels of |w|, 0 to top [groups, size], and the step between them [groups].

    It lowers ``sum_i D_i (s q_i - w_i)^2`` by turns (Hou and Kwok 2018, section 3):
    ``q = min(round(|w| / s), top)``, then ``s = sum(D q |w|) / sum(D q^2)``. In the paper's
    words ``b = q / top`` and ``alpha = s top``. It starts at ``s = 1.4 mean|w| / sqrt(top)``, for
    ternary levels the threshold of ternary weight networks, or where nothing is clipped, if that
    is finer.

    Args:
        size: |w| [groups, size]; zero where pruned.
        curvature: D [groups, size], not negative.
        top: the largest level; 1 for ternary.
        alternations: at most so many; fewer for a group whose step moves by less than a millionth.

    >>> levels, step = loss_aware_levels(torch.tensor([[1.0, 0.1, 0.8]]), torch.ones(1, 3), 1)
    >>> levels.tolist(), round(float(step), 6)
    ([[1.0, 0.0, 1.0]], 0.9)
    """
    count = torch.count_nonzero(size, dim=1).clamp(min=1)
    step = torch.minimum(size.amax(1) / top, 1.4 * (size.sum(1) / count) / top**0.5)
    taken = step = _divisor(step)
    moves = torch.ones_like(step, dtype=torch.bool)
    for _ in range(alternations):
        best = _best_step(size, curvature, step, top)
        # Every group stops by itself, so that it has the levels that it would have alone.
        taken, step = torch.where(moves, step, taken), torch.where(moves, best, step)
        moves &= (step - taken).abs() > REST * taken
        if not bool(moves.any()):
            break
    return _nearest(size, taken, top), step


def _nearest(size: Tensor, step: Tensor, top: int) -> Tensor:
    if top == 1:  # a half is rounded to even: down
        return indicator(torch.gt, size, step[:, None] / 2)
    return (size / step[:, None]).round_().clamp_(max=top)


def _best_step(size: Tensor, curvature: Tensor, step: Tensor, top: int) -> Tensor:
    """Return ``sum(D q |w|) / sum(D q^2)`` [groups] for the levels q nearest at this step."""
    product, square = torch.zeros_like(step), torch.zeros_like(step)
    # Piece by piece: what a processor holds in its cache costs a fraction of what it does not.
    for rows, columns in _pieces(*size.shape):
        part = rows, columns
        levels = _nearest(size[part], step[rows], top)
        weighed = curvature[part] * levels
        product[rows] += _products(weighed, size[part])
        square[rows] += _products(weighed, levels)
    # Nothing is zero but what is too small for its curvature: it stays where it is.
    return torch.where(product > 0, product / _divisor(square), step)


def _pieces(groups: int, length: int) -> Iterator[tuple[slice, slice]]:
    """Yield the rows and columns of pieces of [groups, length] that each fit a cache."""
    width = max(1, min(length, IN_CACHE))
    height = IN_CACHE // width
    for top in range(0, groups, height):
        for left in range(0, length, width):
            yield slice(top, top + height), slice(left, left + width)


def _products(one: Tensor, other: Tensor) -> Tensor:
    """Return the sums of the products of two pieces [groups, size], by group."""
    # Shorter ones are added up alike, alone or among others: a few may be decoded by themselves.
    if len(one) == 1 and one.shape[1] >= SPREAD:
        return torch.dot(one[0], other[0])[None]
    return (one * other).sum(1)


def _divisor(total: Tensor) -> Tensor:
    # Of a group without anything left; what is divided is zero then.
    return torch.where(total > 0, total, 1.0)


class LossAware(Representation):
    """Binary, ternary or linear weights whose errors count by the loss's curvature.

    ``min sum_i D_i (alpha b_i - w_i)^2`` over alpha and levels b: LAB with one bit, LAT with
    two, LAQ with ``2^(bits-1) - 1`` levels a side from three bits on (Hou and Kwok 2018,
    Loss-aware Weight Quantization of Deep Networks). D is ``sqrt(v) + 1e-8`` with Adam's
    second moment v of the weight, bias-corrected; ``Train`` brings it up to date after every
    update, so its optimiser must be Adam or AdamW. Until then D is 1: least squares. A loop of
    your own calls ``laid.update(curvature_of(optimizer, latent))`` (laconic.recover.optimize).

    Attributes:
        bits: width of a code, 1 to 8.
        granularity: how many weights share a scale.
        solver: "approximate": levels and scale by turns; "exact": the best of all, by sorting,
            with two bits only.

    >>> weight = torch.tensor([0.9, -1.1, 0.3, -0.2, 0.05, -0.6, 0.4, 1.5])
    >>> state = {"curvature": torch.tensor([1.0, 2.0, 1.0, 1.0, 4.0, 1.0, 1.0, 0.5])}
    >>> LossAware(2).encode(weight, state=state).streams["code"].tensor.tolist()
    [2, 0, 1, 1, 1, 0, 1, 2]
    """

    positional: ClassVar[tuple[str, ...]] = ("bits",)
    needs: ClassVar[frozenset[str]] = frozenset({"curvature"})

    bits: Annotated[int, Field(ge=1, le=8)] = 2
    granularity: Granularity = "tensor"
    solver: Literal["approximate", "exact"] = "approximate"

    @model_validator(mode="after")
    def _solvable(self) -> Self:
        if self.solver == "exact" and self.bits != 2:
            raise ValueError(
                f"solver 'exact' is for 2 bits, not {self.bits}; leave it 'approximate'"
            )
        return self

    def fit(self, weight: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return a curvature of ones [shape of the weight], until training knows it."""
        return {"curvature": torch.ones_like(weight)}

    def codes(self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]) -> Codes:
        """Return the levels, counted from the lowest, and the scale [groups] of one level."""
        if self.bits == 1:
            scale, code = loss_aware_binary(*self._weighed(weight, mask, state)), weight >= 0
        else:
            levels, scale = self._levels(weight, mask, state)
            code = levels.add_(self._top)
        streams = {"code": Stream(code.to(torch.uint8), self.bits)}
        return Codes(streams, {"scale": scale.to(weight.dtype)}, weight.shape, weight.dtype)

    @property
    def _top(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def _weighed(
        self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return |w| and D, each [groups, size], zero where pruned."""
        # Sums of squared levels are beyond float16.
        wide = wide_dtype(weight)
        size = grouped(masked(weight, mask).abs().to(wide), self.granularity)
        return size, grouped(masked(state["curvature"], mask).to(wide), self.granularity)

    def _levels(
        self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the levels [shape of the weight] and the scale [groups] of one level."""
        size, curvature = self._weighed(weight, mask, state)
        if self.solver == "exact":
            levels, scale = exact_ternary(size, curvature)
        else:
            levels, scale = loss_aware_levels(size, curvature, self._top)
        return levels.reshape(weight.shape).copysign_(weight), scale

    def shortcut(self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]) -> Tensor:
        """Return scale * level without the codes."""
        if self.bits == 1:
            return super().shortcut(weight, mask, state)
        levels, scale = self._levels(weight, mask, state)
        groups = grouped(levels.to(weight.dtype), self.granularity)
        return groups.mul_(scale.to(weight.dtype)[:, None]).reshape(weight.shape).add_(0.0)

    def values(self, codes: Codes) -> Tensor:
        """Return what binary or symmetric weights of these codes are."""
        return self._grid().values(codes)

    def _grid(self) -> Representation:
        if self.bits == 1:
            return Binary(granularity=self.granularity)
        return Symmetric(bits=self.bits, granularity=self.granularity)
