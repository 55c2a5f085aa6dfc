"""Factorizations of matrices: low rank, embeddings, blocks, tensor train, block terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from laconic.errors import ModelError
from laconic.models.factored import BlockDiagonalLinear, BlockTermLinear, Reorder, TTLinear
from laconic.step import Count
from laconic.structure import decompose
from laconic.structure.factorization import (
    Factorization,
    Portion,
    Source,
    Spectral,
    chain,
    convolution,
    geometry_of,
    linear,
    shape_of,
)
from laconic.structure.tensors import block_term

__all__ = ["SVD", "BlockDiagonal", "BlockTerm", "DataSVD", "Embedding", "TensorTrain"]

# Inner rank of a tensor train where nothing decides it.
TRAIN_RANK = 8
LINEAR_OR_CONV: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)
Modes = Annotated[tuple[Count, ...], Field(max_length=16)]


class SVD(Spectral):
    """Low rank: two layers A and B in place of one, ``W ~ A B``.

    The nearest product in the Frobenius norm, A = U_k sqrt(S_k) and B = sqrt(S_k) V_k^T. A
    kernel is the matrix [co, ci kh kw], split into a convolution to k channels and a 1 x 1 one.
    Smaller below rank m n / (m + n).

    Attributes:
        rank: k, or
        ratio: k = floor(ratio m n / (m + n)), so at most this share of the weights (but 1 at
            least); 0.5 where nothing is given, or
        energy: the least k with sum_{i<=k} s_i^2 / sum_i s_i^2 >= energy.

    >>> SVD(64), SVD(ratio=0.25)
    (SVD(64), SVD(ratio=0.25))
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = LINEAR_OR_CONV
    fitting: ClassVar[str] = "nn.Linear and nn.Conv2d"

    def count(self, shape: Sequence[int], rank: int) -> int:
        """Return k (m + n)."""
        return rank * (shape[0] + math.prod(shape[1:]))

    def spectrum(self, source: Source) -> Tensor:
        """Return the squared singular values of W."""
        values = [torch.linalg.svdvals(part.flatten(1)) for part in source.parts]
        return torch.stack(values).square().sum(0)

    def split(self, source: Source) -> nn.Module:
        """Return two layers, B and A."""
        rank = self.rank_for(source)
        pairs = [decompose.svd_factors(part.flatten(1), rank) for part in source.parts]
        return _low_rank(source, pairs)


class DataSVD(Spectral):
    """Low rank on data: A and B minimise ``|(W - A B) X|_F`` over a layer's inputs X.

    The inputs are those of training examples, not augmented and drawn by the step's seed, in
    the network as the step finds it. Only their second moments X X^T are kept, n^2 float64
    numbers per layer; padding tokens count as any other input.

    Attributes:
        rank: k, or
        ratio: k = floor(ratio m n / (m + n)), as for SVD; 0.5 where nothing is given, or
        energy: the least k that keeps this share of the energy of the outputs W X.
        batches: at most so many; one epoch if the split has fewer.
        batch: examples per batch.

    >>> DataSVD(energy=0.95, batches=4)
    DataSVD(energy=0.95, batches=4)
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = LINEAR_OR_CONV
    fitting: ClassVar[str] = "nn.Linear and nn.Conv2d"

    batches: Count = 8
    batch: Count = 64

    @property
    def samples(self) -> tuple[int, int] | None:
        """Return batches and their size."""
        return self.batches, self.batch

    def count(self, shape: Sequence[int], rank: int) -> int:
        """Return k (m + n)."""
        return rank * (shape[0] + math.prod(shape[1:]))

    def spectrum(self, source: Source) -> Tensor:
        """Return the squared singular values of W C^(1/2)."""
        values = [decompose.data_spectrum(*pair) for pair in self._weighed(source)]
        return torch.stack(values).sum(0)

    def split(self, source: Source) -> nn.Module:
        """Return two layers, B and A."""
        rank = self.rank_for(source)
        pairs = [decompose.data_svd_factors(*pair, rank) for pair in self._weighed(source)]
        return _low_rank(source, pairs)

    def _weighed(self, source: Source) -> list[tuple[Tensor, Tensor]]:
        """Return matrix and second moment of every group."""
        matrices = [part.flatten(1) for part in source.parts]
        return list(zip(matrices, cast("Tensor", source.moments), strict=True))


def _low_rank(source: Source, pairs: Sequence[tuple[Tensor, Tensor]]) -> nn.Module:
    """Return the layers of A [m, k] and B [k, n] of every group, B first."""
    if not isinstance(source.module, nn.Conv2d):
        ((a, b),) = pairs
        return chain(source, linear(source, b), linear(source, a))
    kernels = [b.unflatten(1, source.shape[1:]) for _, b in pairs]
    return chain(
        source,
        convolution(source, kernels, geometry_of(source.module)),
        convolution(source, [a[:, :, None, None] for a, _ in pairs]),
    )


class Embedding(Factorization):
    """A narrow table and a projection: V E + E H numbers in place of V H.

    ALBERT's embedding (Lan et al. 2020), as the nearest product of this width (SVD).

    Attributes:
        width: E of the narrow table.

    >>> Embedding(64)
    Embedding(64)
    """

    positional: ClassVar[tuple[str, ...]] = ("width",)
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)
    fitting: ClassVar[str] = "nn.Embedding"

    width: Count = 128

    def check(self, module: nn.Module) -> None:
        """Refuse a table whose rows are renormalised when they are read."""
        if cast("nn.Embedding", module).max_norm is not None:
            raise ModelError(
                "max_norm renormalises the rows of a table, which no projection can follow; "
                "leave it out of the scope"
            )

    def count(self, shape: Sequence[int], rank: int) -> int:
        """Return E (V + H)."""
        return rank * (shape[0] + shape[1])

    def planned(self, shape: Sequence[int]) -> int | None:
        """Return the numbers at this width."""
        return self.count(shape, self.width)

    def split(self, source: Source) -> nn.Module:
        """Return a table and a linear layer without bias."""
        narrow, wide = decompose.svd_factors(source.weight, self.width)
        padding = cast("nn.Embedding", source.module).padding_idx
        table = nn.Embedding(len(narrow), self.width, padding_idx=padding, device="meta")
        table.weight = source.parameter(narrow)
        return nn.Sequential(table, linear(source, wide.T))


class BlockDiagonal(Factorization):
    """Only blocks on the diagonal, 1 / g of the weights: a grouped layer.

    The blocks keep their weights and all others are lost, so the order of the channels matters.

    Attributes:
        blocks: g, which divides inputs and outputs.
        order: "given", or "energy": channels are reordered to gather energy in the blocks, for
            which the network reorders inputs and outputs as it runs.

    >>> BlockDiagonal(4, order="energy")
    BlockDiagonal(4, order='energy')
    """

    positional: ClassVar[tuple[str, ...]] = ("blocks",)
    kinds: ClassVar[tuple[type[nn.Module], ...]] = LINEAR_OR_CONV
    fitting: ClassVar[str] = "nn.Linear and nn.Conv2d"

    blocks: Annotated[int, Field(ge=2)] = 2
    order: Literal["given", "energy"] = "given"

    def check(self, module: nn.Module) -> None:
        """Refuse a layer whose channels the blocks do not divide."""
        super().check(module)
        rows, columns, *_ = shape_of(module)
        if rows % self.blocks or columns % self.blocks:
            common = math.gcd(rows, columns)
            advice = f"choose a divisor of {common}, or " if common > 1 else ""
            raise ModelError(
                f"{self.blocks} blocks do not divide [{rows}, {columns}]; {advice}leave it out of "
                "the scope"
            )

    @property
    def by_shape(self) -> bool:
        """Return whether the order is given."""
        return self.order == "given"

    def count(self, shape: Sequence[int], rank: int) -> int:
        """Return m n / g; there is no rank."""
        return math.prod(shape) // self.blocks

    def planned(self, shape: Sequence[int]) -> int | None:
        """Return m n / g."""
        return self.count(shape, 1)

    def split(self, source: Source) -> nn.Module:
        """Return the grouped layer, between two reorderings if the order is not the given."""
        orders = [self._orders(part) for part in source.parts]
        blocks = [
            decompose.block_diagonal(part[rows][:, columns], self.blocks).flatten(0, 1)
            for part, (rows, columns) in zip(source.parts, orders, strict=True)
        ]
        grouped = self._grouped(source, blocks)
        if self.order == "given":
            return chain(source, grouped)[0]
        rows, columns = (
            torch.cat([order + k * len(order) for k, order in enumerate(side)])
            for side in zip(*orders, strict=True)
        )
        bias = source.bias()
        if bias is not None:
            bias = nn.Parameter(bias.detach()[rows], bias.requires_grad)
        grouped.register_parameter("bias", bias)
        return nn.Sequential(_reorder(source, columns), grouped, _reorder(source, rows.argsort()))

    def _orders(self, part: Tensor) -> tuple[Tensor, Tensor]:
        if self.order == "given":
            return torch.arange(part.shape[0]), torch.arange(part.shape[1])
        norms = part.reshape(*part.shape[:2], -1).norm(dim=2)
        return decompose.block_order(norms, self.blocks)

    def _grouped(self, source: Source, blocks: Sequence[Tensor]) -> nn.Module:
        if isinstance(source.module, nn.Conv2d):
            return convolution(source, blocks, geometry_of(source.module), groups=self.blocks)
        rows, columns = source.shape
        made = BlockDiagonalLinear(columns, rows, self.blocks, bias=source.biased)
        made.weight = source.parameter(blocks[0])
        return made


def _reorder(source: Source, order: Tensor) -> Reorder:
    made = Reorder(len(order), dim=1 if isinstance(source.module, nn.Conv2d) else -1)
    made.order.copy_(order)
    return source.placed(made)


class TensorTrain(Factorization):
    """A linear layer as a tensor train: d small cores in place of one matrix.

    ``W[(i_1..i_d), (j_1..j_d)] = G_1[i_1, j_1] ... G_d[i_d, j_d]`` (Novikov et al. 2015), found by
    TT-SVD (Oseledets 2011).

    Attributes:
        rank: largest inner rank; 8 where neither this nor eps is given.
        eps: ``|W - TT|_F <= eps |W|_F`` by the least ranks, unless the rank stops them.
        cores: d.
        rows: m_1 ... m_d, whose product is the outputs; empty: d about equal ones.
        columns: n_1 ... n_d, whose product is the inputs; empty: d about equal ones.

    >>> TensorTrain(16), TensorTrain(eps=0.2, rows=(24, 32), columns=(48, 64))
    (TensorTrain(16), TensorTrain(eps=0.2, rows=(24, 32), columns=(48, 64)))
    """

    positional: ClassVar[tuple[str, ...]] = ("rank",)
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    fitting: ClassVar[str] = "nn.Linear"

    rank: Count | None = None
    eps: Portion | None = None
    cores: Annotated[int, Field(ge=2, le=16)] = 3
    rows: Modes = ()
    columns: Modes = ()

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if self.rows and self.columns and len(self.rows) != len(self.columns):
            raise ValueError(
                f"{len(self.rows)} rows and {len(self.columns)} columns; give as many of each"
            )
        return self

    @property
    def by_shape(self) -> bool:
        """Return False: ranks are those of the numbers, where these are lower."""
        return False

    def modes(self, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return m_1 ... m_d and n_1 ... n_d for a weight [out, in]."""
        count = len(self.rows or self.columns) or self.cores
        rows = self.rows or decompose.modes(shape[0], count)
        # Large rows meet small columns, so that the cores are about equal.
        return rows, self.columns or decompose.modes(shape[1], count)[::-1]

    def check(self, module: nn.Module) -> None:
        """Refuse a layer that the given modes do not multiply to."""
        shape = shape_of(module)
        decompose.paired(torch.empty(shape, device="meta"), *self.modes(shape))

    def count(self, shape: Sequence[int], rank: int) -> int:
        """Return sum_k r_{k-1} m_k n_k r_k."""
        sizes = [m * n for m, n in zip(*self.modes(shape), strict=True)]
        ranks = (1, *decompose.train_ranks(sizes, rank), 1)
        return sum(size * ranks[k] * ranks[k + 1] for k, size in enumerate(sizes))

    def planned(self, shape: Sequence[int]) -> int | None:
        """Return the numbers in the cores, if the rank decides them."""
        return self.count(shape, self.rank or TRAIN_RANK) if self.eps is None else None

    def split(self, source: Source) -> nn.Module:
        """Return the layer of the cores."""
        rows, columns = self.modes(source.shape)
        rank = TRAIN_RANK if self.rank is None and self.eps is None else self.rank
        eps = self.eps or 0.0
        cores = decompose.tensor_train(source.weight, rows, columns, rank=rank, eps=eps)
        ranks = [core.shape[3] for core in cores[:-1]]
        made = source.placed(TTLinear(rows, columns, ranks, bias=source.biased))
        made.set_cores_(cores)
        return chain(source, made)[0]


class BlockTerm(Factorization):
    """A linear layer as a sum of Tucker blocks (Ye et al. 2018).

    The matrix is a tensor of d modes (i_k, j_k), about equal ones. Blocks begin one by one, by
    HOSVD of what the others have left, and are fitted again in turn by HOOI.

    Attributes:
        rank: of every block in every mode, where the mode is as large.
        blocks: how many are summed.
        cores: d, the modes.
        sweeps: of fitting over all blocks.

    >>> BlockTerm(6, blocks=4)
    BlockTerm(6, blocks=4)
    """

    positional: ClassVar[tuple[str, ...]] = ("rank",)
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    fitting: ClassVar[str] = "nn.Linear"

    rank: Count = 4
    blocks: Annotated[int, Field(ge=1, le=64)] = 2
    cores: Annotated[int, Field(ge=2, le=16)] = 3
    sweeps: Count = 10

    def modes(self, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return m_1 ... m_d and n_1 ... n_d for a weight [out, in]."""
        rows, columns = (decompose.modes(size, self.cores) for size in shape)
        return rows, columns[::-1]

    def ranks(self, shape: Sequence[int], rank: int) -> list[int]:
        """Return R_1 ... R_d for a weight [out, in]."""
        return [min(rank, m * n) for m, n in zip(*self.modes(shape), strict=True)]

    def count(self, shape: Sequence[int], rank: int) -> int:
        """Return P (prod_k R_k + sum_k m_k n_k R_k)."""
        ranks = self.ranks(shape, rank)
        factors = sum(m * n * r for m, n, r in zip(*self.modes(shape), ranks, strict=True))
        return self.blocks * (math.prod(ranks) + factors)

    def planned(self, shape: Sequence[int]) -> int | None:
        """Return the numbers in cores and factors."""
        return self.count(shape, self.rank)

    def split(self, source: Source) -> nn.Module:
        """Return the layer of the blocks."""
        rows, columns = self.modes(source.shape)
        ranks = self.ranks(source.shape, self.rank)
        tensor = decompose.paired(source.weight, rows, columns)
        found = block_term(tensor, self.blocks, ranks, sweeps=self.sweeps)
        made = BlockTermLinear(rows, columns, self.blocks, ranks, bias=source.biased)
        made = source.placed(made)
        made.set_blocks_(found)
        return chain(source, made)[0]
