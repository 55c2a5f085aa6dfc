"""Factorizations of kernels: Tucker-2, CP, separable, two small kernels, depthwise separable.

Padding, stride and dilation go to the part that has the kernel's extent, so that at full rank
the network computes the same, at the borders too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from laconic.step import Count, Share
from laconic.structure import tensors
from laconic.structure.decompose import energy_rank
from laconic.structure.factorization import (
    HALF,
    Factorization,
    Geometry,
    Portion,
    Ranked,
    Source,
    Spectral,
    at_most,
    chain,
    convolution,
    geometry_of,
    refuse_several,
)

__all__ = ["CP", "DepthwiseSeparable", "Separable", "Tucker2", "TwoThrees"]

CONV: tuple[type[nn.Module], ...] = (nn.Conv2d,)
# Least squares of CP stop when the relative error falls by less in one sweep.
SETTLED = 1e-6
EXTENDED = "nn.Conv2d with a kernel larger than 1 x 1"
FIVE = (5, 5)


def _geometry(source: Source) -> Geometry:
    return geometry_of(cast("nn.Conv2d", source.module))


def _points(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return matrices [out, in] as 1 x 1 kernels."""
    return [matrix[:, :, None, None] for matrix in matrices]


class Tucker2(Factorization):
    """Tucker-2: 1 x 1, k x k and 1 x 1 convolutions with fewer channels between.

    ``W ~ sum G[r_out, r_in, h, w] U_out[o, r_out] U_in[i, r_in]`` (Kim et al. 2016, eq. 2), by
    HOSVD and then HOOI.

    Attributes:
        ranks: (r_out, r_in), or (r,) for both; at most the channels there are. Or
        ratio: both the same share of their channels, the largest that leaves at most this share
            of the weights; 0.5 where nothing is given. Or
        energy: for each, the least that keeps this share of its unfolding's squared singular
            values.
        sweeps: of HOOI.

    >>> Tucker2((32, 16)), Tucker2(energy=0.9)
    (Tucker2((32, 16)), Tucker2(energy=0.9))
    """

    positional: ClassVar[tuple[str, ...]] = ("ranks",)
    kinds: ClassVar[tuple[type[nn.Module], ...]] = CONV
    extent: ClassVar[int] = 2
    fitting: ClassVar[str] = EXTENDED

    ranks: Annotated[tuple[Count, ...], Field(max_length=2)] = ()
    ratio: Portion | None = None
    energy: Share | None = None
    sweeps: Annotated[int, Field(ge=0)] = 10

    @model_validator(mode="after")
    def _one_decides(self) -> Self:
        refuse_several(self, "ranks", "ratio", "energy")
        return self

    def count(self, shape: Sequence[int], rank: int) -> int:
        """Return the weights with this rank for both."""
        return self._count(shape, (rank, rank))

    def planned(self, shape: Sequence[int]) -> int | None:
        """Return the weights at the ranks that the shape decides, if it does."""
        return self._count(shape, self._fixed(shape)) if self.energy is None else None

    def foreseen(self) -> Tucker2:
        """Return the same at the largest ranks that save weights, if energy decides."""
        return at_most(self)

    def split(self, source: Source) -> nn.Module:
        """Return three convolutions."""
        outer, inner = self._chosen(source)
        found = [
            tensors.tucker(part, (outer, inner, None, None), sweeps=self.sweeps)
            for part in source.parts
        ]
        into = [cast("Tensor", factors[1]).T for _, factors in found]
        out = [cast("Tensor", factors[0]) for _, factors in found]
        return chain(
            source,
            convolution(source, _points(into)),
            convolution(source, [core for core, _ in found], _geometry(source)),
            convolution(source, _points(out)),
        )

    def _chosen(self, source: Source) -> tuple[int, int]:
        if self.energy is None:
            return self._fixed(source.shape)
        spectra = (
            torch.stack([tensors.mode_spectrum(part, mode) for part in source.parts]).sum(0)
            for mode in (0, 1)
        )
        outer, inner = (energy_rank(spectrum, self.energy) for spectrum in spectra)
        return outer, inner

    def _fixed(self, shape: Sequence[int]) -> tuple[int, int]:
        outputs, inputs, *_ = shape
        if self.ranks:
            return min(self.ranks[0], outputs), min(self.ranks[-1], inputs)
        # With both ranks a share s of their channels, s (co^2 + ci^2) + s^2 co ci k^2 weights.
        linear, square = outputs**2 + inputs**2, math.prod(shape)
        ratio = HALF if self.ratio is None else self.ratio
        root = math.sqrt(linear**2 + 4 * square * square * ratio)
        share = (root - linear) / (2 * square)
        return max(1, math.floor(share * outputs)), max(1, math.floor(share * inputs))

    def _count(self, shape: Sequence[int], ranks: tuple[int, int]) -> int:
        outputs, inputs, *extent = shape
        outer, inner = min(ranks[0], outputs), min(ranks[1], inputs)
        return inputs * inner + inner * outer * math.prod(extent) + outer * outputs


class CP(Ranked):
    """CP: 1 x 1, depthwise k x 1, depthwise 1 x k and 1 x 1 convolutions.

    ``W ~ sum_r f_out[o, r] f_in[i, r] f_h[h, r] f_w[w, r]`` by alternating least squares (Lebedev
    et al. 2015). Such networks are hard to fine-tune: start with a small learning rate.

    Attributes:
        rank: R, or
        ratio: the largest R that leaves at most this share of the weights (but 1 at least); 0.5
            where nothing is given.
        sweeps: of least squares, at most.

    >>> CP(24)
    CP(24)
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = CONV
    extent: ClassVar[int] = 2
    fitting: ClassVar[str] = EXTENDED

    sweeps: Count = 50

    def count(self, shape: Sequence[int], rank: int) -> int:
        """Return R (co + ci + kh + kw)."""
        return rank * sum(shape)

    @property
    def by_shape(self) -> bool:
        """Return False: least squares are solved on the way."""
        return False

    def foreseen(self) -> CP:
        """Return the same after one sweep."""
        return self.model_copy(update={"sweeps": 1})

    def split(self, source: Source) -> nn.Module:
        """Return four convolutions."""
        rank, moves = self.chosen(source.shape), _geometry(source)
        fit = functools.partial(
            tensors.cp, generator=source.generator, sweeps=self.sweeps, tolerance=SETTLED
        )
        found = [fit(part, rank) for part in source.parts]
        out, into, rows, columns = zip(*found, strict=True)
        tall = [factor.T[:, None, :, None] for factor in rows]
        wide = [factor.T[:, None, None, :] for factor in columns]
        return chain(
            source,
            convolution(source, _points([factor.T for factor in into])),
            convolution(source, tall, moves.vertical, groups=rank),
            convolution(source, wide, moves.horizontal, groups=rank),
            convolution(source, _points(out)),
        )


class Separable(Spectral):
    """A k x 1 and a 1 x k convolution in place of k x k (Jaderberg et al. 2014).

    The nearest of this rank: an SVD of ``M[(i h), (w o)] = W[o, i, h, w]``.

    Attributes:
        rank: r, the channels between, or
        ratio: the largest r that leaves at most this share of the weights (but 1 at least); 0.5
            where nothing is given, or
        energy: the least r that keeps this share of the squared singular values.

    >>> Separable(energy=0.9)
    Separable(energy=0.9)
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = CONV
    extent: ClassVar[int] = 2
    fitting: ClassVar[str] = EXTENDED

    def count(self, shape: Sequence[int], rank: int) -> int:
        """Return r (ci kh + co kw)."""
        outputs, inputs, height, width = shape
        return rank * (inputs * height + outputs * width)

    def spectrum(self, source: Source) -> Tensor:
        """Return the squared singular values of M."""
        matrices = [tensors.separable_matrix(part) for part in source.parts]
        return torch.linalg.svdvals(torch.stack(matrices)).square().sum(0)

    def split(self, source: Source) -> nn.Module:
        """Return two convolutions."""
        rank, moves = self.rank_for(source), _geometry(source)
        tall, wide = zip(*(tensors.separable(part, rank) for part in source.parts), strict=True)
        return chain(
            source,
            convolution(source, tall, moves.vertical),
            convolution(source, wide, moves.horizontal),
        )


class TwoThrees(Ranked):
    """Two 3 x 3 convolutions in place of a 5 x 5 one (Simonyan and Zisserman 2015).

    The nearest composition, by alternating least squares; 18 c^2 weights for 25 c^2. All padding
    stands before the first, the stride in the second.

    Attributes:
        rank: channels between the two, or
        ratio: the most that leave at most this share of the weights (but 1 at least); 0.5 where
            nothing is given.
        sweeps: of least squares.

    >>> TwoThrees(ratio=0.72)
    TwoThrees(ratio=0.72)
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = CONV
    fitting: ClassVar[str] = "nn.Conv2d with a 5 x 5 kernel"

    sweeps: Count = 20

    def fits(self, module: nn.Module) -> bool:
        """Return whether this is a convolution with a 5 x 5 kernel."""
        return super().fits(module) and cast("nn.Conv2d", module).kernel_size == FIVE

    def count(self, shape: Sequence[int], rank: int) -> int:
        """Return 9 c (ci + co) for c channels between."""
        return 9 * rank * (shape[0] + shape[1])

    @property
    def by_shape(self) -> bool:
        """Return False: least squares are solved on the way."""
        return False

    def foreseen(self) -> TwoThrees:
        """Return the same after one sweep."""
        return self.model_copy(update={"sweeps": 1})

    def split(self, source: Source) -> nn.Module:
        """Return two convolutions."""
        middle, moves = self.chosen(source.shape), _geometry(source)
        found = [
            tensors.two_kernels(part, middle, generator=source.generator, sweeps=self.sweeps)
            for part in source.parts
        ]
        first, second = zip(*found, strict=True)
        return chain(
            source,
            convolution(source, first, Geometry(padding=moves.padding, dilation=moves.dilation)),
            convolution(source, second, Geometry(moves.stride, dilation=moves.dilation)),
        )


class DepthwiseSeparable(Spectral):
    """A depthwise k x k and a pointwise 1 x 1 convolution in place of k x k.

    MobileNet's layer (Howard et al. 2017) fitted to a trained one: every input channel is a
    matrix [co, k^2], of which a truncated SVD keeps D filters (Guo et al. 2018). One filter costs
    1 / co + 1 / k^2 of the weights.

    Attributes:
        rank: D, filters per input channel, or
        ratio: the largest D that leaves at most this share of the weights (but 1 at least); 0.5
            where nothing is given, or
        energy: the least D that keeps this share of the squared singular values.

    >>> DepthwiseSeparable(1)
    DepthwiseSeparable(1)
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = CONV
    extent: ClassVar[int] = 2
    fitting: ClassVar[str] = EXTENDED

    def count(self, shape: Sequence[int], rank: int) -> int:
        """Return D ci (k^2 + co)."""
        outputs, inputs, *extent = shape
        return rank * inputs * (math.prod(extent) + outputs)

    def spectrum(self, source: Source) -> Tensor:
        """Return the squared singular values, summed over input channels."""
        channels = torch.cat([part.transpose(0, 1) for part in source.parts]).flatten(2)
        return torch.linalg.svdvals(channels).square().sum(0)

    def split(self, source: Source) -> nn.Module:
        """Return two convolutions."""
        rank, inputs = self.rank_for(source), source.shape[1]
        found = [tensors.depthwise_separable(part, rank) for part in source.parts]
        depth, point = zip(*found, strict=True)
        return chain(
            source,
            convolution(source, depth, _geometry(source), groups=inputs),
            convolution(source, point),
        )
