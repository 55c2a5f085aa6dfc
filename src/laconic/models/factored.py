"""Layers that torch has none of: tensor train, block terms, block-diagonal, reordering."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.errors import ModelError

__all__ = ["BlockDiagonalLinear", "BlockTermLinear", "Reorder", "TTLinear"]

# A file must not make a constructor loop for long.
MOST_MODES, MOST_BLOCKS = 16, 64


class Reorder(nn.Module):
    """The elements of one dimension in another order.

    Args:
        size: of the dimension.
        dim: which one.

    >>> layer = Reorder(3)
    >>> _ = layer.order.copy_(torch.tensor([2, 0, 1]))
    >>> layer(torch.tensor([10.0, 20.0, 30.0]))
    tensor([30., 10., 20.])
    """

    order: Tensor

    def __init__(self, size: int, dim: int = -1) -> None:
        super().__init__()
        _positive("Reorder", size=size)
        self.arguments: dict[str, Any] = {"size": size, "dim": dim}
        self.dim = dim
        self.register_buffer("order", torch.arange(size, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``y[i] = x[order[i]]`` along the dimension, in the shape of x."""
        return x.index_select(self.dim, self.order)

    def extra_repr(self) -> str:
        """Return what a print of the network shows."""
        return _shown(self.arguments)


class BlockDiagonalLinear(nn.Module):
    """A linear layer of independent blocks, as groups are for a convolution.

    ``y = [x_1 W_1^T, ..., x_g W_g^T] + b`` for x = [x_1, ..., x_g], with in * out / g weights.

    Args:
        in_features: divisible by the blocks.
        out_features: divisible by the blocks.
        blocks: g.
        bias: whether there is one.

    Raises:
        ModelError: the blocks do not divide the features.

    >>> layer = BlockDiagonalLinear(4, 6, 2)
    >>> layer.weight.shape, layer(torch.zeros(5, 4)).shape
    (torch.Size([6, 2]), torch.Size([5, 6]))
    """

    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, blocks: int, *, bias: bool = True
    ) -> None:
        super().__init__()
        _positive("BlockDiagonalLinear", inputs=in_features, outputs=out_features, blocks=blocks)
        if in_features % blocks or out_features % blocks:
            raise ModelError(
                f"BlockDiagonalLinear: {blocks} blocks do not divide {in_features} inputs and "
                f"{out_features} outputs; choose a divisor of both"
            )
        self.arguments: dict[str, Any] = {
            "in_features": in_features,
            "out_features": out_features,
            "blocks": blocks,
            "bias": bias,
        }
        self.in_features, self.out_features, self.blocks = in_features, out_features, blocks
        self.weight = nn.Parameter(torch.empty(out_features, in_features // blocks))
        _add_bias_(self, out_features if bias else 0)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as nn.Linear does a block of this width."""
        _draw_(self, 1 / (3 * self.weight.shape[1]), [self.weight])

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        weight = self.weight.view(self.blocks, -1, self.weight.shape[1])
        parts = x.reshape(-1, self.blocks, self.weight.shape[1]).transpose(0, 1)
        y = torch.bmm(parts, weight.transpose(1, 2)).transpose(0, 1)
        return _biased(y.reshape(*x.shape[:-1], self.out_features), self.bias)

    def extra_repr(self) -> str:
        """Return what a print of the network shows."""
        return _shown(self.arguments)


class TTLinear(nn.Module):
    """A linear layer whose weight is a tensor train (Novikov et al. 2015).

    ``W[(i_1..i_d), (j_1..j_d)] = G_1[i_1, j_1] ... G_d[i_d, j_d]``, never built: one core after
    the other meets the input. Core k is kept as a matrix [m_k r_k, r_{k-1} n_k], ``core_{k-1}``,
    so it quantises and prunes like the weight of a linear layer.

    Args:
        rows: m_1 ... m_d, whose product is the number of outputs; d at most 16.
        columns: n_1 ... n_d, whose product is the number of inputs.
        ranks: r_1 ... r_{d-1}.
        bias: whether there is one.

    Raises:
        ModelError: the lengths do not fit each other, or a number is out of bounds.

    >>> layer = TTLinear((2, 3), (4, 5), (6,))
    >>> layer(torch.zeros(7, 20)).shape, layer.core_0.shape, layer.core_1.shape
    (torch.Size([7, 6]), torch.Size([12, 4]), torch.Size([3, 30]))
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        rows: Sequence[int],
        columns: Sequence[int],
        ranks: Sequence[int],
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        _check_modes("TTLinear", rows, columns, ranks, len(rows) - 1)
        self.arguments: dict[str, Any] = {
            "rows": list(rows),
            "columns": list(columns),
            "ranks": list(ranks),
            "bias": bias,
        }
        self.in_features, self.out_features = math.prod(columns), math.prod(rows)
        self.columns = tuple(columns)
        self.ranks = (1, *ranks, 1)
        for k, (m, n) in enumerate(zip(rows, columns, strict=True)):
            shape = (m * self.ranks[k + 1], self.ranks[k] * n)
            self.register_parameter(f"core_{k}", nn.Parameter(torch.empty(shape)))
        _add_bias_(self, self.out_features if bias else 0)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the cores so that the weight varies as nn.Linear's does."""
        paths = math.prod(self.ranks)
        variance = (1 / (3 * self.in_features * paths)) ** (1 / len(self.columns))
        _draw_(self, variance, [self.get_parameter(f"core_{k}") for k in range(len(self.columns))])

    def set_cores_(self, cores: Sequence[Tensor]) -> None:
        """Copy cores G_k [r_{k-1}, m_k, n_k, r_k], as ``tensor_train`` returns them."""
        for k, core in enumerate(cores):
            left, rows, columns, right = core.shape
            matrix = core.permute(1, 3, 0, 2).reshape(rows * right, left * columns)
            self.get_parameter(f"core_{k}").data.copy_(matrix)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        rest = x.reshape(-1, *self.columns, 1, 1)  # [batch, n_1 ... n_d, outputs so far, rank]
        for k in range(len(self.columns)):
            met = rest.movedim(1, -1).flatten(-2)  # [batch, n_{k+1} ..., outputs, r_{k-1} n_k]
            # As a matrix: for more dimensions torch chooses how to add up by requires_grad.
            product = F.linear(met.reshape(-1, met.shape[-1]), getattr(self, f"core_{k}"))
            rest = product.reshape(*met.shape[:-2], -1, self.ranks[k + 1])
        return _biased(rest.reshape(*x.shape[:-1], self.out_features), self.bias)

    def extra_repr(self) -> str:
        """Return what a print of the network shows."""
        return _shown(self.arguments)


class BlockTermLinear(nn.Module):
    """A linear layer whose weight is a sum of Tucker blocks (Ye et al. 2018, BT-RNN).

    ``W[(i_1..i_d), (j_1..j_d)] = sum_p sum_r G_p[r_1..r_d] prod_k A_p^k[(i_k, j_k), r_k]``. Block p
    keeps its core as a matrix ``core_p`` [R_1, R_2 ... R_d] and its factors as ``factor_p_k``
    [m_k n_k, R_k].

    Args:
        rows: m_1 ... m_d, whose product is the number of outputs; d at most 16.
        columns: n_1 ... n_d, whose product is the number of inputs.
        blocks: P, at most 64.
        ranks: R_1 ... R_d of every block.
        bias: whether there is one.

    Raises:
        ModelError: the lengths do not fit each other, or a number is out of bounds.

    >>> layer = BlockTermLinear((2, 3), (4, 5), 2, (3, 3))
    >>> layer(torch.zeros(7, 20)).shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([7, 6]), 162)
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        rows: Sequence[int],
        columns: Sequence[int],
        blocks: int,
        ranks: Sequence[int],
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        _positive("BlockTermLinear", blocks=blocks)
        if blocks > MOST_BLOCKS:
            raise ModelError(f"BlockTermLinear: {blocks} blocks; choose 1 to {MOST_BLOCKS}")
        _check_modes("BlockTermLinear", rows, columns, ranks, len(rows))
        self.arguments: dict[str, Any] = {
            "rows": list(rows),
            "columns": list(columns),
            "blocks": blocks,
            "ranks": list(ranks),
            "bias": bias,
        }
        self.in_features, self.out_features = math.prod(columns), math.prod(rows)
        self.rows, self.columns = tuple(rows), tuple(columns)
        self.blocks, self.ranks = blocks, tuple(ranks)
        for p in range(blocks):
            core = torch.empty(ranks[0], math.prod(ranks[1:]))
            self.register_parameter(f"core_{p}", nn.Parameter(core))
            for k, (m, n, rank) in enumerate(zip(rows, columns, ranks, strict=True)):
                factor = nn.Parameter(torch.empty(m * n, rank))
                self.register_parameter(f"factor_{p}_{k}", factor)
        _add_bias_(self, self.out_features if bias else 0)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw cores and factors so that the weight varies as nn.Linear's does."""
        paths = self.blocks * math.prod(self.ranks)
        variance = (1 / (3 * self.in_features * paths)) ** (1 / (len(self.rows) + 1))
        drawn = [tensor for name, tensor in self.named_parameters() if name != "bias"]
        _draw_(self, variance, drawn)

    def set_blocks_(self, blocks: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> None:
        """Copy cores [R_1 ... R_d] and factors [m_k n_k, R_k], as ``block_term`` returns them."""
        for p, (core, factors) in enumerate(blocks):
            self.get_parameter(f"core_{p}").data.copy_(core.reshape(len(core), -1))
            for k, factor in enumerate(factors):
                self.get_parameter(f"factor_{p}_{k}").data.copy_(factor)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        flat = x.reshape(-1, *self.columns)
        y = self._block(flat, 0)
        for p in range(1, self.blocks):
            y = y + self._block(flat, p)
        return _biased(y.reshape(*x.shape[:-1], self.out_features), self.bias)

    def _block(self, x: Tensor, p: int) -> Tensor:
        """Map [batch, n_1 ... n_d] to [batch, m_1 ... m_d] through one block."""
        count = len(self.columns)
        # The core joins the first factor, so no more than outputs times R^(d-1) is ever built.
        first = getattr(self, f"factor_{p}_0") @ getattr(self, f"core_{p}")
        first = first.reshape(self.rows[0], self.columns[0], *self.ranks[1:])
        # Autocast lowers the product inside tensordot, which wants equal types outside.
        rest = torch.tensordot(x, first.to(x.dtype), dims=([1], [1]))
        for k in range(1, count):
            # [batch, n_k ... n_d, outputs so far, R_k ... R_d]
            factor = getattr(self, f"factor_{p}_{k}").to(rest.dtype)
            factor = factor.reshape(self.rows[k], self.columns[k], -1)
            left = count - k
            rest = torch.tensordot(rest, factor, dims=([1, 2 + left], [1, 2]))
            rest = rest.movedim(-1, left + 1).flatten(left, left + 1)
        return rest

    def extra_repr(self) -> str:
        """Return what a print of the network shows."""
        return _shown(self.arguments)


def _positive(layer: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ModelError(f"{layer}: {name} is {size}; every size is at least 1")


def _check_modes(
    layer: str, rows: Sequence[int], columns: Sequence[int], ranks: Sequence[int], count: int
) -> None:
    if not 1 <= len(rows) <= MOST_MODES or len(rows) != len(columns) or len(ranks) != count:
        raise ModelError(
            f"{layer}: {len(rows)} rows, {len(columns)} columns and {len(ranks)} ranks; give as "
            f"many rows as columns, 1 to {MOST_MODES}, and {max(count, 0)} ranks"
        )
    _positive(layer, **{f"mode {k}": size for k, size in enumerate((*rows, *columns, *ranks))})


def _add_bias_(layer: nn.Module, size: int) -> None:
    layer.register_parameter("bias", nn.Parameter(torch.empty(size)) if size else None)


def _draw_(layer: nn.Module, variance: float, weights: Sequence[Tensor]) -> None:
    for weight in weights:
        nn.init.normal_(weight, std=math.sqrt(variance))
    for name, bias in layer.named_parameters(recurse=False):
        if name == "bias":
            nn.init.zeros_(bias)


def _biased(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias


def _shown(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in arguments.items())
