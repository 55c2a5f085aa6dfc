"""Activations: how the numbers that flow through a network are rounded to a few levels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, final

import torch
from pydantic import Field
from torch import Tensor

from laconic.errors import RunError
from laconic.step import Share, Value
from laconic.weights.learned_step import positive, scale_slope
from laconic.weights.uniform import level_range
from laconic.weights.workspace import Workspace, traced, wide_dtype, write_product

__all__ = [
    "Activation",
    "Grid",
    "LearnedClip",
    "LearnedSpacing",
    "LeastError",
    "MinMax",
    "MovingAverage",
    "Percentile",
    "grid",
    "least_error_range",
]

Levels = Literal["symmetric", "asymmetric"]
State = Mapping[str, Tensor]
# Of a part of a tensor, in memory for results: the derivatives of what it is rounded to, by the
# numbers themselves, 1 or 0, and by what is learned; float32 or wider [shape of the part].
Slopes = Callable[[Tensor, Workspace], tuple[Tensor, dict[str, Tensor]]]

# Percentiles and errors are estimated on so many numbers of a tensor, spread evenly over it.
SAMPLE = 1 << 16
# LSQ: the first spacing is so many times the mean size over the square root of the last level.
FIRST_SPACING = {"symmetric": 2.0, "asymmetric": 4.0}


class Grid(NamedTuple):
    """Levels of one spacing: a number x becomes ``scale * clip(round(x / scale), first, last)``.

    Attributes:
        scale: the spacing, above 0 [].
        first: the first level, at most 0, a whole number [].
        last: the last level, at least 0 [].

    >>> Grid(*map(torch.tensor, (0.5, -2.0, 1.0))).levels(torch.tensor([-9.0, 0.3, 9.0])).tolist()
    [-2.0, 1.0, 1.0]
    """

    scale: Tensor
    first: Tensor
    last: Tensor

    def ratio(self, tensor: Tensor, space: Workspace | None = None) -> Tensor:
        """Return numbers in units of the spacing, in a tensor of their own."""
        # Times the reciprocal: a division of every number takes twice as long.
        factor = self.scale.reciprocal()
        return tensor * factor if space is None else space.times(tensor, factor)

    def levels(self, tensor: Tensor, space: Workspace | None = None) -> Tensor:
        """Return the whole numbers that numbers become, float32 or wider where space is None."""
        return self.ratio(tensor, space).round_().clamp_min_(self.first).clamp_max_(self.last)


def grid(low: Tensor, high: Tensor, bits: int, levels: Levels) -> Grid:
    """Return a grid that spans a range and has a level at 0.

    Symmetric: last = 2^(bits-1) - 1 = -first and ``scale = max(-low, high) / last``. Asymmetric:
    there are 2^bits levels, ``scale = (high - low) / (2^bits - 1)``, and the zero point
    ``round(-low / scale)`` is -first (Jacob et al. 2018, section 2.1).

    Args:
        low: smallest number [], at most 0 counts.
        high: largest number [], at least 0 counts.
        bits: width of a code.
        levels: where they lie.

    Returns:
        The grid; that of an empty range has one level, 0.

    >>> scale, first, last = grid(torch.tensor(-10.0), torch.tensor(30.0), 8, "asymmetric")
    >>> [int((x / scale).round() - first) for x in (-10.0, 10.0, 30.0)]
    [0, 128, 255]
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    symmetric = levels == "symmetric"
    last = level_range(bits, "narrow")[1]
    count = 2 * last if symmetric else 2**bits - 1
    spread = torch.maximum(-low, high) / last if symmetric else (high - low) / count
    scale = _safe(spread)
    first = torch.full_like(scale, -last) if symmetric else (low / scale).round()
    spans = spread >= torch.finfo(spread.dtype).tiny
    return Grid(scale, first * spans, (first + count) * spans)


def _safe(scale: Tensor) -> Tensor:
    # Not a subnormal one: what is divided by it could overflow.
    return torch.where(scale < torch.finfo(scale.dtype).tiny, torch.ones_like(scale), scale)


def _sample(tensor: Tensor) -> Tensor:
    """Return at most SAMPLE numbers of a tensor, evenly spread over it, widened [numbers]."""
    flat = tensor.flatten()
    step = -(-flat.numel() // SAMPLE)
    while math.gcd(step, flat.numel()) > 1:  # it would come upon a few channels only
        step += 1
    return _wide(flat[::step])


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, where it is not in a wider type."""
    return tensor.to(wide_dtype(tensor))


def _extremes(tensor: Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(tensor)
    return _wide(low), _wide(high)


def least_error_range(numbers: Tensor, bits: int, levels: Levels) -> tuple[Tensor, Tensor]:
    """Return the limits whose grid errs least: a share of the extremes, of 1 % to 100 %.

    Args:
        numbers: [any shape].
        bits: width of a code.
        levels: where the levels lie.

    >>> numbers = torch.tensor([0.1] * 200 + [1.0])
    >>> low, high = least_error_range(numbers, 2, "symmetric")
    >>> bool(high < 0.3)
    True
    """
    low, high = torch.aminmax(numbers)
    best, kept = torch.inf, 1.0
    for step in range(100, 0, -1):
        share = step / 100
        scale, first, last = grid(low * share, high * share, bits, levels)
        units = numbers / scale
        error = float((units.round().clamp_(first, last) - units).mul_(scale).square_().sum())
        if error < best:
            best, kept = error, share
    return low * kept, high * kept


def _product(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum of the products of two tensors, without a tensor of them []."""
    return torch.dot(one.flatten(), other.flatten())


class _Rounding(torch.autograd.Function):
    """On the grid in the forward pass, what the activation says of gradients in the backward."""

    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, activation: Activation, state: State, *learned: Tensor
    ) -> Tensor:
        found = activation.grid_of(tensor, state)
        ctx.activation = activation
        if activation.clips:
            ctx.names = tuple(state)
            # The state goes on: another tensor may move it before this one's backward pass.
            ctx.save_for_backward(tensor, *found, *(each.clone() for each in state.values()))
        return activation.placed(tensor, found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if not ctx.activation.clips:
            return gradient, None, None
        tensor, scale, first, last, *values = (each.detach() for each in ctx.saved_tensors)
        state = dict(zip(ctx.names, values, strict=True))
        flow, moves = ctx.activation.gradients(gradient, tensor, Grid(scale, first, last), state)
        return flow, None, None, *(moves[name] for name in sorted(moves))


class Activation(Value, ABC):
    """How activations are rounded: a frozen value, whose state is kept outside of it.

    Every tensor has one range and one spacing. ``rounded`` is computed in float32, whatever
    autocast says, and is exactly ``(code - zero_point) * scale`` of ``codes``. Its gradient is
    straight-through; a class that clips, or learns, writes ``slopes``.

    Attributes:
        bits: width of a code, 2 to 8.
        levels: "asymmetric": 2^bits of them from the smallest to the largest number, with an
            integer zero point; "symmetric": +-(2^(bits-1) - 1) around zero.
        needs_data: whether nothing can be rounded before a batch has been seen.
        clips: whether the gradient is another than that of the rounded tensor (``slopes``).
        learned: names of the state's tensors that training optimises.
    """

    positional: ClassVar[tuple[str, ...]] = ("bits",)
    needs_data: ClassVar[bool] = False
    clips: ClassVar[bool] = False
    learned: ClassVar[frozenset[str]] = frozenset()

    bits: Annotated[int, Field(ge=2, le=8)] = 8
    levels: Levels = "asymmetric"

    @classmethod
    def shorthand(cls, value: Any) -> tuple[str, Any] | None:
        """Return the meaning of a bare number: the range of the tensor itself, so many bits."""
        plain = isinstance(value, int) and not isinstance(value, bool)
        return ("min_max", {"bits": value}) if plain else None

    def start(self) -> dict[str, Tensor]:
        """Return the state before any tensor was seen, each []."""
        return {}

    def observe(self, tensor: Tensor, state: State, *, training: bool) -> None:
        """Let the state follow a tensor, in place.

        Args:
            tensor: float [any shape], finite.
            state: of the place it passes.
            training: the network is being trained; else it is being calibrated.
        """

    def update(self, state: State) -> None:
        """Let the state follow an update of the optimiser, in place, without gradients."""

    @abstractmethod
    def grid_of(self, tensor: Tensor, state: State) -> Grid:
        """Return the grid for a tensor, in float32 or wider."""

    def slopes(self, found: Grid, state: State) -> Slopes:
        """Return what tells the derivatives of a part of a tensor.

        Straight-through: asked only where ``clips`` says that it is something else.

        Args:
            found: the grid of the whole tensor.
            state: as it was in the forward pass.
        """
        return lambda part, space: (torch.ones_like(space.wide(part)), {})

    def gradient_scale(self, numbers: int) -> float:
        """Return the factor of the gradients of what is learned, for so many numbers."""
        return 1.0

    @final
    def rounded(self, tensor: Tensor, state: State) -> Tensor:
        """Return the tensor on its grid, in its dtype; the gradients are those of ``slopes``.

        Args:
            tensor: float [any shape].
            state: of the place it passes.
        """
        if not torch.is_grad_enabled():
            return self.placed(tensor, self.grid_of(tensor, state))
        learned = [state[name] for name in sorted(self.learned)]
        rounded: Tensor = _Rounding.apply(tensor, self, state, *learned)  # type: ignore[no-untyped-call]
        return rounded

    @final
    def placed(self, tensor: Tensor, found: Grid) -> Tensor:
        """Return the tensor on a grid, in its dtype, computed in float32 or wider."""
        space = Workspace(tensor)
        if not space.parts:
            return found.levels(_wide(tensor)).mul_(found.scale).to(tensor.dtype)
        out = torch.empty_like(tensor)
        for part in space:
            write_product(out[part], found.levels(tensor[part], space), found.scale)
        return out

    @final
    def gradients(
        self, gradient: Tensor, tensor: Tensor, found: Grid, state: State
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the gradients of a tensor and, by name, of what is learned."""
        flow, moves = torch.empty_like(tensor), dict.fromkeys(self.learned, found.scale * 0)
        space, slopes_of = Workspace(tensor), self.slopes(found, state)
        for part in space:
            passed, slopes = slopes_of(tensor[part], space)
            wide = space.wide(gradient[part])
            moves = {name: moves[name] + _product(wide, each) for name, each in slopes.items()}
            if torch.is_grad_enabled():  # it is differentiated once more
                flow = (wide * passed).to(tensor.dtype)
            else:
                write_product(flow[part], passed, wide)
        scale = self.gradient_scale(tensor.numel())
        return flow, {name: scale * move for name, move in moves.items()}

    @final
    def codes(self, tensor: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """Return what integer arithmetic needs: codes, scale and zero point.

        Returns:
            uint8 [shape of the tensor] from 0, counted from the first level; the scale []; the
            zero point [], the code of 0.
        """
        with torch.no_grad():
            found = self.grid_of(tensor, state)
            levels = found.levels(_wide(tensor))
            return (levels - found.first).to(torch.uint8), found.scale, -found.first


class MinMax(Activation):
    """The range of the tensor itself, found anew in every forward: nothing is clipped.

    TernaryBERT's activations (Zhang et al. 2020, section 3.1).

    >>> code, scale, zero_point = MinMax(8).codes(torch.tensor([-10.0, 30.0, 0.0]), {})
    >>> code.tolist(), int(zero_point)
    ([0, 255, 64], 64)
    """

    def grid_of(self, tensor: Tensor, state: State) -> Grid:
        """Return the grid over the extremes of the tensor."""
        return grid(*_extremes(tensor), self.bits, self.levels)


class Ranged(Activation, ABC):
    """An activation whose limits are part of its state; numbers beyond get no gradient.

    Attributes of the state: ``low`` and ``high``, and ``seen``, how many tensors made them.
    """

    needs_data: ClassVar[bool] = True
    clips: ClassVar[bool] = True

    def start(self) -> dict[str, Tensor]:
        """Return limits of nothing."""
        return {name: torch.zeros(()) for name in ("low", "high", "seen")}

    @abstractmethod
    def limits(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Return the limits that a tensor asks for, each []."""

    def observe(self, tensor: Tensor, state: State, *, training: bool) -> None:
        """Average the limits over the tensors of a calibration."""
        if not training or not state["seen"]:
            _average(state, self.limits(tensor), least=0.0)

    def grid_of(self, tensor: Tensor, state: State) -> Grid:
        """Return the grid over the limits."""
        if not traced() and not state["seen"]:
            raise RunError(
                f"activations: {self!r} has seen no data and has no range; let "
                "quantize attach it, or call laconic.weights.calibrate"
            )
        return grid(state["low"], state["high"], self.bits, self.levels)

    def slopes(self, found: Grid, state: State) -> Slopes:
        """Return what tells 1 within the limits, 0 at and beyond them."""
        low, high = state["low"].clamp(max=0.0), state["high"].clamp(min=0.0)
        if self.levels == "symmetric":
            high = torch.maximum(-low, high)
            low = -high

        def of(part: Tensor, space: Workspace) -> tuple[Tensor, dict[str, Tensor]]:
            wide = space.wide(part)
            above = torch.gt(wide, low, out=space.new())
            return above.mul_(torch.lt(wide, high, out=space.new())), {}

        return of


def _average(state: State, limits: tuple[Tensor, Tensor], *, least: float) -> None:
    """Move the limits of a state towards these: a mean, of at least this weight for the last."""
    state["seen"].add_(1)
    rate = max(1 / float(state["seen"]), least)
    for name, limit in zip(("low", "high"), limits, strict=True):
        state[name].lerp_(limit.to(state[name]), rate)


class MovingAverage(Ranged):
    """The extremes, averaged over the batches of training with exponential weights.

    ``range <- decay range + (1 - decay) extremes``; until ``1 / (1 - decay)`` tensors were seen
    it is their plain mean (Jacob et al. 2018, section 3.1; Q8BERT, Zafrir et al. 2019). What
    ``torch.utils.checkpoint`` computes twice counts twice.

    Attributes:
        decay: weight of the past.

    >>> place, activation = MovingAverage().start(), MovingAverage(8, decay=0.9)
    >>> activation.observe(torch.tensor([-1.0, 3.0]), place, training=True)
    >>> activation.observe(torch.tensor([-2.0, 4.0]), place, training=True)
    >>> place["low"].item(), place["high"].item()
    (-1.5, 3.5)
    """

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9999

    def limits(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Return the extremes."""
        return _extremes(tensor)

    def observe(self, tensor: Tensor, state: State, *, training: bool) -> None:
        """Follow every tensor, in training too."""
        _average(state, self.limits(tensor), least=1 - self.decay)


class Percentile(Ranged):
    """The range that all but a few numbers lie in, of a calibration.

    Attributes:
        share: of the numbers that lie within, (0, 1]; half of the rest is above.

    >>> low, high = Percentile(share=0.8).limits(torch.arange(11.0))
    >>> low.item(), high.item()
    (1.0, 9.0)
    """

    share: Share = 0.999

    def limits(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Return both percentiles of at most 65,536 numbers of the tensor."""
        beyond = (1 - self.share) / 2
        sample = _sample(tensor)
        low, high = torch.quantile(sample, sample.new_tensor([beyond, 1 - beyond]))
        return low, high


class LeastError(Ranged):
    """The range with the least squared error, of a calibration.

    See ``least_error_range``.

    >>> numbers = torch.tensor([0.0] + [0.1] * 200 + [1.0])
    >>> bool(LeastError(2, levels="symmetric").limits(numbers)[1] < 0.3)
    True
    """

    def limits(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best limits for at most 65,536 numbers of the tensor."""
        return least_error_range(_sample(tensor), self.bits, self.levels)


class LearnedClip(Activation):
    """The range of the tensor itself, clipped to limits that training learns.

    A limit moves with all numbers at and beyond it: ``d/d high = sum of the gradients where x >=
    high``, and so for low (Choi et al. 2018, PACT, equation 3). Levels lie between the extremes
    of what is clipped, as in BinaryBERT (Bai et al. 2021): over all of +-2.5, probabilities of
    attention would get one level in five. Numbers are clipped to both limits where levels are
    symmetric too; a limit that has crossed zero is taken for zero.

    Attributes:
        low, high: the limits to begin with.

    >>> place = {name: limit.requires_grad_() for name, limit in LearnedClip().start().items()}
    >>> LearnedClip().rounded(torch.tensor([3.0, 4.0, 0.0]), place).sum().backward()
    >>> place["high"].grad.item()
    2.0
    """

    clips: ClassVar[bool] = True
    learned: ClassVar[frozenset[str]] = frozenset({"low", "high"})

    low: Annotated[float, Field(le=0)] = -2.5
    high: Annotated[float, Field(ge=0)] = 2.5

    def start(self) -> dict[str, Tensor]:
        """Return the limits to begin with."""
        return {"low": torch.tensor(self.low), "high": torch.tensor(self.high)}

    def grid_of(self, tensor: Tensor, state: State) -> Grid:
        """Return the grid over what is left of the tensor, and no level beyond it."""
        low, high = _extremes(tensor)
        low = torch.maximum(low, state["low"].detach()).clamp(max=0.0)
        high = torch.minimum(high, state["high"].detach()).clamp(min=0.0)
        scale, first, last = grid(low, high, self.bits, self.levels)
        if self.levels == "symmetric":
            first, last = (low / scale).round(), (high / scale).round()
        return Grid(scale, first, last)

    def slopes(self, found: Grid, state: State) -> Slopes:
        """Return what tells 1 within the limits; at and beyond one, 1 is that limit's."""
        low, high = state["low"].clamp(max=0.0), state["high"].clamp(min=0.0)
        # Of limits that are both zero, zeros belong to the upper one alone.
        low = torch.where(low < high, low, low.nextafter(low - 1))

        def of(part: Tensor, space: Workspace) -> tuple[Tensor, dict[str, Tensor]]:
            wide = space.wide(part)
            above = torch.ge(wide, high, out=space.new())
            below = torch.le(wide, low, out=space.new())
            inside = torch.add(above, below, out=space.new()).eq_(0.0)
            return inside, {"low": below, "high": above}

        return of


class LearnedSpacing(Activation):
    """A spacing of the levels that training learns (Esser et al. 2020, LSQ).

    The first tensor sets it: ``s = 2 mean|x| / sqrt(last)``, 4 where levels are asymmetric. Its
    gradient is ``round(x / s) - x / s``, or the level it was clipped to, times ``1 /
    sqrt(numbers * last)`` (equations 3 and 5). Asymmetric levels are counted from the one nearest
    to the tensor's smallest number, or from 0 where all are larger: 0 is a level. As in
    BinaryBERT, what is clipped above widens the spacing by ``last``, and what is clipped below
    does not move it.

    >>> place, activation = LearnedSpacing(4).start(), LearnedSpacing(4, levels="symmetric")
    >>> activation.observe(torch.tensor([-0.5, 0.2, 0.8, 1.0]), place, training=True)
    >>> round(place["scale"].item(), 6)
    0.472456
    """

    clips: ClassVar[bool] = True
    learned: ClassVar[frozenset[str]] = frozenset({"scale"})
    needs_data: ClassVar[bool] = True

    def start(self) -> dict[str, Tensor]:
        """Return no spacing."""
        return {"scale": torch.zeros(())}

    @property
    def top(self) -> int:
        """Return the last level, counted from 0 where levels are asymmetric."""
        return 2**self.bits - 1 if self.levels == "asymmetric" else 2 ** (self.bits - 1) - 1

    def observe(self, tensor: Tensor, state: State, *, training: bool) -> None:
        """Set the first spacing."""
        if not state["scale"]:
            mean = _wide(tensor).abs().mean()
            first = FIRST_SPACING[self.levels] * mean / self.top**0.5
            state["scale"].detach().copy_(_safe(first))

    def update(self, state: State) -> None:
        """Bring a spacing back that the optimiser has moved below zero."""
        scale = state["scale"]
        scale.copy_(torch.where(scale == 0, scale, positive(scale)))  # 0: nothing was seen yet

    def grid_of(self, tensor: Tensor, state: State) -> Grid:
        """Return the grid of this spacing."""
        scale = state["scale"].detach()
        if not traced() and not scale:
            raise RunError(
                f"activations: {self!r} has seen no data and has no spacing; let "
                "quantize attach it, or call laconic.weights.calibrate"
            )
        scale = positive(scale)
        if self.levels == "symmetric":
            return Grid(scale, scale.new_tensor(-self.top - 1), scale.new_tensor(self.top))
        # Not amin, which takes twice as long.
        first = (_wide(tensor.min()).clamp(max=0.0) / scale).round().clamp(min=-self.top)
        return Grid(scale, first, first + self.top)

    def slopes(self, found: Grid, state: State) -> Slopes:
        """Return what tells 1 within the grid, and equation 3."""

        def of(part: Tensor, space: Workspace) -> tuple[Tensor, dict[str, Tensor]]:
            ratio, (_, first, last) = found.ratio(part, space), found
            if self.levels == "asymmetric":
                ratio, first, last = ratio.sub_(first), first * 0, last - first
            inside, slope = scale_slope(ratio, first, last, space.new(), space.new())
            return inside, {"scale": slope}

        return of

    def gradient_scale(self, numbers: int) -> float:
        """Return ``1 / sqrt(numbers * last)``."""
        return (numbers * self.top) ** -0.5
