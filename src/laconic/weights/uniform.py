"""Grids: symmetric, affine, (dynamic) fixed point and logarithmic representations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from laconic.weights.representation import (
    Codes,
    Granularity,
    Representation,
    Stream,
    grouped,
    indicator,
    masked,
)
from laconic.weights.workspace import wide_dtype

__all__ = [
    "Affine",
    "DynamicFixedPoint",
    "FixedPoint",
    "Logarithmic",
    "Symmetric",
    "affine_range",
    "choose_fraction",
    "clipped",
    "fraction_for",
    "least_scale",
    "level_range",
    "mse_scale",
    "power_levels",
    "power_thresholds",
    "round_to",
    "smallest_scale",
]

Rounding = Literal["nearest", "stochastic", "equal"]
Levels = Literal["narrow", "full"]
Bits = Annotated[int, Field(ge=2, le=8)]

# Courbariaux, Bengio and David 2014: a range grows when more than 0.01 % of it overflows.
OVERFLOW_RATE = 1e-4
# 2^-fraction and the largest code times it stay normal float32 numbers.
FRACTIONS = (-110, 120)


def round_to(
    values: Tensor, rounding: Rounding = "nearest", generator: torch.Generator | None = None
) -> Tensor:
    """Return the values rounded to integers; integers stay as they are.

    Args:
        values: float [any shape].
        rounding: "nearest" (ties to even); "stochastic": up with probability
            ``v - floor(v)``, unbiased; "equal": up or down with probability 0.5.
        generator: CPU generator of the noise, so that every device draws the same.

    >>> round_to(torch.tensor([0.5, 1.5, -2.5])).tolist()
    [0.0, 2.0, -2.0]
    """
    if rounding == "nearest":
        return values.round()
    floor = values.floor()
    fraction = values - floor
    chance = fraction if rounding == "stochastic" else 0.5 * (fraction > 0)
    draw = torch.rand(values.shape, generator=generator).to(values.device)
    return floor + (draw < chance)


def start_noise(rounding: Rounding) -> dict[str, Tensor]:
    """Return the noise counter of a rounding, or nothing where it draws nothing.

    It starts at a random number, so that weights of one shape do not share their noise.
    """
    return {} if rounding == "nearest" else {"noise": torch.randint(2**62, ())}


def noise_of(state: Mapping[str, Tensor]) -> torch.Generator | None:
    """Return the generator of the state's noise counter, or None."""
    return torch.Generator().manual_seed(int(state["noise"])) if "noise" in state else None


def advance_noise(state: Mapping[str, Tensor]) -> None:
    """Add 1 to the noise counter, in place."""
    if "noise" in state:
        state["noise"].add_(1)


def clipped(weight: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the weight where low < weight < high, else 0: a gradient mask.

    The straight-through gradient of a range that clips; at both ends it is zero.

    Args:
        weight: [any shape].
        low: broadcast against it.
        high: the same.

    >>> clipped(torch.tensor([2.0, 0.5, 1.0]), torch.tensor(-1.0), torch.tensor(1.0)).tolist()
    [0.0, 0.5, 0.0]
    """
    numbers = weight.detach()
    inside = indicator(torch.gt, numbers, low).mul_(indicator(torch.lt, numbers, high))
    return weight * inside


def level_range(bits: int, levels: Levels) -> tuple[int, int]:
    """Return the smallest and the largest level of a signed grid.

    >>> level_range(4, "narrow"), level_range(4, "full")
    ((-7, 7), (-8, 7))
    """
    high = 2 ** (bits - 1) - 1
    return (-high if levels == "narrow" else -high - 1), high


def least_scale(dtype: torch.dtype) -> float:
    """Return the smallest number that numbers are divided by.

    The smallest normal one; in float16 a subnormal one, because the steps of weights of 0.001 are.

    >>> least_scale(torch.float32), least_scale(torch.float16)
    (1.1754943508222875e-38, 5.960464477539063e-08)
    """
    info = torch.finfo(dtype)
    return info.tiny * info.eps if dtype == torch.float16 else info.tiny


def smallest_scale(groups: Tensor, low: int, high: int) -> Tensor:
    """Return the smallest scale [groups] at which no weight is clipped.

    ``max(max w / high, min w / low)``; with a narrow range that is ``max|w| / high``.
    A group that is all zero, or all but zero (``least_scale``), gets scale 1.

    Args:
        groups: weights [groups, size]; zero where pruned.
        low: the smallest level.
        high: the largest level.

    >>> smallest_scale(torch.tensor([[-1.5, 0.5], [0.0, 0.0]]), -3, 3).tolist()
    [0.5, 1.0]
    """
    scale = torch.maximum(groups.amax(1) / high, groups.amin(1) / low)
    return torch.where(scale < least_scale(scale.dtype), torch.ones_like(scale), scale)


def mse_scale(groups: Tensor, low: int, high: int, *, steps: int = 100) -> Tensor:
    """Return the fraction of the largest scale that errs least, [groups].

    Args:
        groups: weights [groups, size]; zero where pruned (zero is exact on every grid).
        low: the smallest level.
        high: the largest level.
        steps: the grid is 1/steps, 2/steps, ..., 1 of ``smallest_scale``.

    >>> mse_scale(torch.tensor([[0.1] * 200 + [1.0]]), -1, 1).item() < 0.3
    True
    """
    largest = smallest_scale(groups, low, high)
    # In units of the largest scale, so that squares neither overflow nor vanish.
    units = groups.to(wide_dtype(groups)) / largest[:, None]
    best = units.new_full(largest.shape, torch.inf)
    fraction = torch.ones_like(best)
    for step in range(steps, 0, -1):
        share = step / steps
        levels = (units / share).round_().clamp_(low, high)
        error = levels.mul_(-share).add_(units).square_().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        fraction = torch.where(better, share, fraction)
    return (largest * fraction).to(largest.dtype)


class Symmetric(Representation):
    """Linear grid around zero: ``scale * clip(round(w / scale), low, high)``.

    Attributes:
        bits: width of a code, 2 to 8.
        granularity: how many weights share a scale.
        range: "max": nothing is clipped, the scale follows the weights; "mse": the scale with
            the least squared error when the representation is laid, fixed from then on, so
            that weights outside are clipped and get no gradient.
        levels: "narrow": +-(2^(bits-1) - 1), as Q8BERT and TernaryBERT; "full": one more
            negative level.
        rounding: "nearest", "stochastic" or "equal" (see ``round_to``).

    >>> weight = torch.tensor([0.9, -1.1, 0.3, -0.2, 0.05, -0.6, 0.4, 1.5])
    >>> (Symmetric(4).encode(weight).streams["code"].tensor.int() - 7).tolist()
    [4, -5, 1, -1, 0, -3, 2, 7]
    """

    positional: ClassVar[tuple[str, ...]] = ("bits",)

    bits: Bits = 8
    granularity: Granularity = "tensor"
    range: Literal["max", "mse"] = "max"
    levels: Levels = "narrow"
    rounding: Rounding = "nearest"

    def fit(self, weight: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return the noise counter and, with range "mse", the scale [groups]."""
        state = start_noise(self.rounding)
        if self.range == "mse":
            groups = grouped(masked(weight, mask), self.granularity)
            state["scale"] = mse_scale(groups, *level_range(self.bits, self.levels))
        return state

    def update(self, state: Mapping[str, Tensor]) -> None:
        """Draw other noise from now on."""
        advance_noise(state)

    def codes(self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]) -> Codes:
        """Return the levels, counted from the lowest, and the scale [groups]."""
        low, _ = level_range(self.bits, self.levels)
        levels, scale = self._levels(weight, mask, state)
        streams = {"code": Stream((levels - low).to(torch.uint8).reshape(weight.shape), self.bits)}
        return Codes(streams, {"scale": scale}, weight.shape, weight.dtype)

    def _levels(
        self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the levels [groups, size] and the scale [groups]."""
        low, high = level_range(self.bits, self.levels)
        groups = grouped(masked(weight, mask), self.granularity)
        scale = state["scale"] if self.range == "mse" else smallest_scale(groups, low, high)
        wide = groups.to(wide_dtype(groups))  # the nearest level of a narrow quotient may not be
        levels = round_to(wide / scale[:, None], self.rounding, noise_of(state))
        return levels.clamp_(low, high).to(weight.dtype), scale

    def shortcut(self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]) -> Tensor:
        """Return scale * level without the codes."""
        levels, scale = self._levels(weight, mask, state)
        return levels.mul_(scale[:, None]).reshape(weight.shape).add_(0.0)

    def values(self, codes: Codes) -> Tensor:
        """Return scale * level."""
        low, _ = level_range(self.bits, self.levels)
        levels = codes.streams["code"].tensor.reshape(codes.shape).to(codes.dtype).add_(low)
        groups = grouped(levels, self.granularity)
        groups = groups.mul_(codes.table("scale", groups.shape[0])[:, None])
        return groups.reshape(codes.shape).add_(0.0)

    def surrogate(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Return the weight, without gradient where range "mse" clips it."""
        if self.range == "max":
            return weight
        low, high = level_range(self.bits, self.levels)
        scale = state["scale"][:, None]
        groups = grouped(weight, self.granularity)
        return clipped(groups, scale * low, scale * high).reshape(weight.shape)


def affine_range(groups: Tensor, survivors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest survivor of each group, [groups] each.

    Args:
        groups: weights [groups, size].
        survivors: bool [groups, size]; a group without any gets 0 and 0.

    >>> [end.tolist() for end in affine_range(torch.tensor([[-10.0, 30.0, 10.0]]), None)]
    [[-10.0], [30.0]]
    """
    if survivors is None:
        return groups.amin(1) + 0.0, groups.amax(1) + 0.0
    any_left = survivors.any(1)
    low = groups.where(survivors, torch.inf).amin(1)
    high = groups.where(survivors, -torch.inf).amax(1)
    return masked(low, any_left) + 0.0, masked(high, any_left) + 0.0


class Affine(Representation):
    """Min-max grid: 2^bits levels from the smallest to the largest weight.

    ``Q(w) = (max - min) * round((2^bits - 1) (w - min) / (max - min)) / (2^bits - 1) + min``;
    both ends are reproduced exactly, and a constant weight is itself.

    Attributes:
        bits: width of a code, 1 to 8.
        granularity: how many weights share a range.

    >>> weight = torch.tensor([-10.0, 30.0, 10.0])
    >>> Affine(8).encode(weight).streams["code"].tensor.tolist()
    [0, 255, 128]
    """

    positional: ClassVar[tuple[str, ...]] = ("bits", "granularity")

    bits: Annotated[int, Field(ge=1, le=8)] = 8
    granularity: Granularity = "tensor"

    def codes(self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]) -> Codes:
        """Return the levels, counted from the smallest weight, and both ends [groups]."""
        levels, low, high = self._levels(weight, mask)
        streams = {"code": Stream(levels.to(torch.uint8).reshape(weight.shape), self.bits)}
        return Codes(streams, {"low": low, "high": high}, weight.shape, weight.dtype)

    def shortcut(self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]) -> Tensor:
        """Return low + level * step without the codes."""
        return self._placed(*self._levels(weight, mask)).reshape(weight.shape)

    def values(self, codes: Codes) -> Tensor:
        """Return low + level * step, and exactly high at the last level."""
        code = codes.streams["code"].tensor.reshape(codes.shape)
        levels = grouped(code, self.granularity).to(codes.dtype)
        low, high = (codes.table(end, len(levels)) for end in ("low", "high"))
        return self._placed(levels, low, high).reshape(codes.shape)

    def _levels(self, weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the levels [groups, size] and both ends [groups]."""
        groups = grouped(weight, self.granularity)
        survivors = None if mask is None else grouped(mask, self.granularity)
        low, high = affine_range(groups, survivors)
        width, top = torch.where(high > low, high - low, 1.0), 2**self.bits - 1
        levels = (groups - low[:, None]).div_(width[:, None]).mul_(top)
        return levels.round_().clamp_(0, top), low, high

    def _placed(self, levels: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return the numbers that levels stand for [groups, size]."""
        top, first, last = 2**self.bits - 1, low[:, None], high[:, None]
        inner = (levels * ((last - first) * (1 / top))).add_(first)
        return torch.where(levels == top, last, inner).add_(0.0)


def fraction_for(largest: float, bits: int) -> int:
    """Return the fraction bits with which a number of this size just fits.

    ``bits - 1 - i`` with ``2^(i-1) <= largest < 2^i``: one bit is the sign, i the integer.

    >>> fraction_for(0.7, 8), fraction_for(1.0, 8), fraction_for(5.0, 4)
    (7, 6, 0)
    """
    _, integer = math.frexp(largest)
    return min(max(bits - 1 - integer, FRACTIONS[0]), FRACTIONS[1])


def choose_fraction(weight: Tensor, bits: int, choose: Literal["max", "mse", "overflow"]) -> int:
    """Return the fraction bits of one weight.

    Args:
        weight: surviving numbers [any shape], none allowed.
        bits: word length.
        choose: "max": nothing overflows; "mse": least squared error; "overflow": the smallest
            range that at most 0.01 % of the numbers overflow.

    >>> choose_fraction(torch.tensor([0.2, 0.3, 0.4]), 8, "max")
    8
    """
    size = weight.detach().abs().flatten()
    if not size.numel():
        return fraction_for(0.0, bits)
    if choose == "overflow":
        spared = int(size.numel() * OVERFLOW_RATE)
        return fraction_for(float(size.kthvalue(size.numel() - spared).values), bits)
    fraction = fraction_for(float(size.amax()), bits)
    if choose == "max":
        return fraction
    # From "all weights round to zero" up to "all but the smallest are clipped".
    tried = range(max(fraction - bits, FRACTIONS[0]), min(fraction + bits, FRACTIONS[1]) + 1)
    return min(tried, key=lambda option: _fixed_error(weight, bits, option))


def _fixed_error(weight: Tensor, bits: int, fraction: int) -> float:
    # In units of the largest weight, so that squares neither overflow nor vanish.
    unit = max(float(weight.abs().amax()), math.ldexp(1.0, -FRACTIONS[1]))
    levels = _fixed_levels(weight, bits, fraction, "nearest", None)
    return float(((weight - levels * math.ldexp(1.0, -fraction)) / unit).square().sum())


def _fixed_levels(
    weight: Tensor,
    bits: int,
    fraction: int,
    rounding: Rounding,
    generator: torch.Generator | None,
) -> Tensor:
    low, high = level_range(bits, "full")
    return round_to(weight * math.ldexp(1.0, fraction), rounding, generator).clamp_(low, high)


class FixedPoint(Representation):
    """Fixed point: ``clip(round(w 2^f), -2^(bits-1), 2^(bits-1) - 1) 2^-f``.

    One split into integer and fraction bits serves the whole scope. Weights outside the range
    of a given split are clipped and get no gradient.

    Attributes:
        bits: word length with the sign, 2 to 8.
        fraction: fraction bits f; None: from the largest weight of the scope.
        rounding: "nearest", "stochastic" or "equal" (see ``round_to``).

    >>> FixedPoint(4, fraction=2).decode(FixedPoint(4, fraction=2).encode(torch.tensor([0.3, -9])))
    tensor([ 0.2500, -2.0000])
    """

    positional: ClassVar[tuple[str, ...]] = ("bits", "fraction")

    bits: Bits = 8
    fraction: Annotated[int, Field(ge=FRACTIONS[0], le=FRACTIONS[1])] | None = None
    rounding: Rounding = "nearest"

    def resolve(self, weights: Mapping[str, Tensor]) -> dict[str, Representation]:
        """Return one fixed point for all, its fraction from the largest weight of all."""
        if self.fraction is not None:
            return dict.fromkeys(weights, self)
        largest = max(
            (float(weight.abs().amax()) for weight in weights.values() if weight.numel()),
            default=0.0,
        )
        fraction = fraction_for(largest, self.bits)
        fixed = FixedPoint(bits=self.bits, fraction=fraction, rounding=self.rounding)
        return dict.fromkeys(weights, fixed)

    def fit(self, weight: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return the noise counter, if the rounding draws."""
        return start_noise(self.rounding)

    def update(self, state: Mapping[str, Tensor]) -> None:
        """Draw other noise from now on."""
        advance_noise(state)

    def codes(self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]) -> Codes:
        """Return the integers, counted from the lowest, and the step 2^-f [1]."""
        left = masked(weight, mask)
        fraction = self.fraction
        if fraction is None:
            fraction = choose_fraction(left, self.bits, "max")
        low, _ = level_range(self.bits, "full")
        levels = _fixed_levels(left, self.bits, fraction, self.rounding, noise_of(state))
        streams = {"code": Stream((levels - low).to(torch.uint8), self.bits)}
        step = weight.new_tensor([math.ldexp(1.0, -fraction)])
        return Codes(streams, {"step": step}, weight.shape, weight.dtype)

    def values(self, codes: Codes) -> Tensor:
        """Return integer * step."""
        return _fixed_values(codes, self.bits)

    def surrogate(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Return the weight, without gradient where a given fraction clips it."""
        if self.fraction is None:
            return weight
        low, high = level_range(self.bits, "full")
        step = weight.new_tensor(math.ldexp(1.0, -self.fraction))
        return clipped(weight, step * low, step * high)


def _fixed_values(codes: Codes, bits: int) -> Tensor:
    low, _ = level_range(bits, "full")
    levels = codes.streams["code"].tensor.reshape(codes.shape).to(codes.dtype).add_(low)
    return levels.mul_(codes.table("step", 1)).add_(0.0)


class DynamicFixedPoint(Representation):
    """Fixed point with fraction bits of its own for every weight, found before laying.

    Courbariaux, Bengio and David 2014; Gysel, Motamedi and Ghiasi 2016 (Ristretto).

    Attributes:
        bits: word length with the sign, 2 to 8.
        choose: "max", "mse" or "overflow" (see ``choose_fraction``).
        rounding: "nearest", "stochastic" or "equal" (see ``round_to``).

    >>> DynamicFixedPoint(4).resolve({"a": torch.tensor([0.3]), "b": torch.tensor([3.0])})
    {'a': FixedPoint(4, 4), 'b': FixedPoint(4, 1)}
    """

    positional: ClassVar[tuple[str, ...]] = ("bits",)

    bits: Bits = 8
    choose: Literal["max", "mse", "overflow"] = "max"
    rounding: Rounding = "nearest"

    def resolve(self, weights: Mapping[str, Tensor]) -> dict[str, Representation]:
        """Return a fixed point for each weight, with its own fraction."""
        return {name: self._fixed(weight) for name, weight in weights.items()}

    def _fixed(self, survivors: Tensor) -> FixedPoint:
        fraction = choose_fraction(survivors, self.bits, self.choose)
        return FixedPoint(bits=self.bits, fraction=fraction, rounding=self.rounding)

    def fit(self, weight: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return the noise counter, if the rounding draws."""
        return start_noise(self.rounding)

    def update(self, state: Mapping[str, Tensor]) -> None:
        """Draw other noise from now on."""
        advance_noise(state)

    def codes(self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]) -> Codes:
        """Return the codes of the fixed point this weight asks for now."""
        survivors = weight if mask is None else weight[mask]
        return self._fixed(survivors).codes(weight, mask, state)

    def values(self, codes: Codes) -> Tensor:
        """Return integer * step."""
        return _fixed_values(codes, self.bits)


def power_levels(bits: int) -> list[float]:
    """Return the positive levels 2^-(n-1), ..., 1/2, 1 with n = 2^(bits-1) - 1.

    >>> power_levels(3)
    [0.25, 0.5, 1.0]
    """
    count = 2 ** (bits - 1) - 1
    return [math.ldexp(1.0, exponent) for exponent in range(1 - count, 1)]


def power_thresholds(bits: int, rounding: Literal["log", "linear"]) -> list[float]:
    """Return from which size on a number is rounded up to each of ``power_levels``.

    Args:
        bits: width of a code.
        rounding: "log": halfway between exponents, level / sqrt(2); "linear": halfway between
            neighbours, 1.5 times the lower one (half the smallest, next to zero).

    >>> power_thresholds(3, "linear")
    [0.125, 0.375, 0.75]
    """
    levels = power_levels(bits)
    if rounding == "log":
        return [level / math.sqrt(2) for level in levels]
    return [levels[0] / 2, *(0.75 * level for level in levels[1:])]


class Logarithmic(Representation):
    """Powers of two: zero and +-{1, 1/2, ..., 2^-(n-1)} times the largest weight.

    With n = 2^(bits-1) - 1: a product with such a weight is a shift.

    Attributes:
        bits: width of a code, 2 to 8.
        rounding: to the nearest exponent ("log") or the nearest number ("linear").

    >>> representation = Logarithmic(3)
    >>> representation.decode(representation.encode(torch.tensor([1.0, -0.36, 0.01])))
    tensor([ 1.0000, -0.5000,  0.0000])
    """

    positional: ClassVar[tuple[str, ...]] = ("bits",)

    bits: Bits = 4
    rounding: Literal["log", "linear"] = "log"

    def codes(self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]) -> Codes:
        """Return the place of each weight in the ladder of levels, and its top [1]."""
        left = masked(weight, mask)
        top = left.abs().amax().reshape(1)
        size = (left.abs() / torch.where(top > 0, top, 1.0)).contiguous()
        thresholds = power_thresholds(self.bits, self.rounding)
        place = torch.bucketize(size, size.new_tensor(thresholds), right=True)
        code = place.copysign(left) + len(thresholds)
        streams = {"code": Stream(code.to(torch.uint8), self.bits)}
        return Codes(streams, {"scale": top}, weight.shape, weight.dtype)

    def values(self, codes: Codes) -> Tensor:
        """Look every code up in the ladder; powers of two multiply exactly."""
        levels = power_levels(self.bits)
        ladder = [-level for level in reversed(levels)] + [0.0] + levels
        scale = codes.table("scale", 1)
        table = scale.new_tensor(ladder) * scale + 0.0
        code = codes.streams["code"].tensor
        return table.index_select(0, code.flatten().int()).reshape(codes.shape)
