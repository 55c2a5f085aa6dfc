"""Decompositions of kernels and tensors: Tucker, block terms, CP, and cheaper convolutions.

Pure functions of tensors, in the precision of what they are given; kernels are
[outputs, inputs, height, width].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from laconic.structure.decompose import balanced, svd_factors

__all__ = [
    "block_term",
    "compose_kernels",
    "cp",
    "cp_tensor",
    "depthwise_separable",
    "mode_spectrum",
    "separable",
    "separable_matrix",
    "tucker",
    "tucker_tensor",
    "two_kernels",
    "unfold",
]

# Keeps normal equations of nearly parallel factors solvable; factors have unit columns.
_RIDGE = 1e-12


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Return the tensor as a matrix [size of the mode, everything else].

    >>> unfold(torch.arange(6).reshape(1, 2, 3), 2).tolist()
    [[0, 3], [1, 4], [2, 5]]
    """
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def _project(tensor: Tensor, factor: Tensor, mode: int) -> Tensor:
    """Return the tensor with a mode [size] turned into [rank] by a factor [size, rank]."""
    return torch.tensordot(tensor, factor, dims=([mode], [0])).movedim(-1, mode)


def _leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return left singular vectors [size, size], signs fixed, and squared singular values."""
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -vectors, vectors), squares


def mode_spectrum(tensor: Tensor, mode: int) -> Tensor:
    """Return the squared singular values of an unfolding, descending [size of the mode].

    What a Tucker decomposition of rank r in this mode must lose at least is the sum of all
    but the first r.

    >>> mode_spectrum(torch.diag(torch.tensor([1.0, 2.0])), 0).tolist()
    [4.0, 1.0]
    """
    return _leading(unfold(tensor, mode))[1]


# ------------------------------------------------------------------ Tucker


def tucker(
    tensor: Tensor,
    ranks: Sequence[int | None],
    *,
    sweeps: int = 10,
    start: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return core and orthonormal factors: ``T ~ G x_1 U_1 x_2 U_2 ...``.

    Factors begin as the leading left singular vectors of each unfolding (HOSVD) and are then
    replaced in turn by those of the tensor projected on all others (HOOI; De Lathauwer et al.
    2000), each time the best choice given the others, so the error never rises. For a kernel
    with ranks (r_out, r_in, None, None) it is Tucker-2 (Kim et al. 2016, eq. 2).

    Args:
        tensor: T [any shape].
        ranks: of each mode, up to its size; None leaves the mode as it is.
        sweeps: of HOOI over all modes.
        start: factors to begin from, in place of HOSVD.

    Returns:
        G, with the ranks as its sizes, and U_k [size, rank], or None where the mode was left.

    >>> core, (outer, inner) = tucker(torch.ones(4, 6), (1, 1))
    >>> core.shape, outer.shape, inner.shape
    (torch.Size([1, 1]), torch.Size([4, 1]), torch.Size([6, 1]))
    """
    factors: list[Tensor | None]
    if start is not None:
        factors = list(start)
    else:
        factors = [
            None if rank is None else _leading(unfold(tensor, mode))[0][:, :rank]
            for mode, rank in enumerate(ranks)
        ]
    for _ in range(sweeps):
        for mode, rank in enumerate(ranks):
            if rank is not None:
                others = [None if at == mode else factor for at, factor in enumerate(factors)]
                factors[mode] = _leading(unfold(_core(tensor, others), mode))[0][:, :rank]
    return _core(tensor, factors), factors


def _core(tensor: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    for mode, factor in enumerate(factors):
        if factor is not None:
            tensor = _project(tensor, factor, mode)
    return tensor


def tucker_tensor(core: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """Return ``G x_1 U_1 x_2 U_2 ...``, the tensor of a Tucker decomposition.

    >>> tucker_tensor(torch.ones(1, 1), [torch.ones(2, 1), None]).shape
    torch.Size([2, 1])
    """
    return _core(core, [None if factor is None else factor.T for factor in factors])


def block_term(
    tensor: Tensor, blocks: int, ranks: Sequence[int], *, sweeps: int = 10
) -> list[tuple[Tensor, list[Tensor]]]:
    """Return Tucker blocks whose sum is near the tensor: ``T ~ sum_p G_p x_k U_p^(k)``.

    Block p starts as a Tucker decomposition of what the blocks before it have left; then the
    blocks are fitted again in turn, one HOOI sweep each from where they stand, to the tensor
    without all others, so the error never rises (De Lathauwer 2008; as a layer, Li et al. 2017
    and Ye et al. 2018, eq. 3).

    Args:
        tensor: T [any shape].
        blocks: how many.
        ranks: of every block in each mode.
        sweeps: over all blocks, after the start.

    Returns:
        For each block its core [ranks] and its factors [size, rank].

    >>> parts = block_term(torch.eye(4), 2, (2, 2))
    >>> sum(tucker_tensor(*part) for part in parts).round(decimals=6).trace()
    tensor(4.)
    """
    rest, found = tensor, []
    for _ in range(blocks):
        found.append(_block(rest, ranks, 1, None))
        rest = rest - tucker_tensor(*found[-1])
    for _ in range(sweeps):
        for index, part in enumerate(found):
            rest = rest + tucker_tensor(*part)
            found[index] = _block(rest, ranks, 1, part[1])
            rest = rest - tucker_tensor(*found[index])
    return found


def _block(
    tensor: Tensor, ranks: Sequence[int], sweeps: int, start: list[Tensor] | None
) -> tuple[Tensor, list[Tensor]]:
    core, factors = tucker(tensor, ranks, sweeps=sweeps, start=start)
    return core, [factor for factor in factors if factor is not None]


# ------------------------------------------------------------------ CP


def cp(
    tensor: Tensor,
    rank: int,
    *,
    generator: torch.Generator,
    sweeps: int = 100,
    tolerance: float = 1e-9,
) -> list[Tensor]:
    """Return factors of ``T ~ sum_r f_1[:, r] o f_2[:, r] o ...`` by alternating least squares.

    Each factor in turn is the least-squares solution given the others,
    ``F_k = T_(k) KhatriRao(others) (hadamard of their Gram matrices)^-1``, and its columns
    are normalised (Lebedev et al. 2015, section 3; Kolda and Bader 2009, figure 3.3). The
    norms are shared out evenly in the end. Factors begin as leading singular vectors of the
    unfoldings; columns beyond a mode's size are drawn.

    Args:
        tensor: T [any shape].
        rank: R.
        generator: of what is drawn.
        sweeps: over all modes, at most.
        tolerance: stop when the relative error falls by less in one sweep.

    Returns:
        F_k [size of mode k, R].

    >>> ones = torch.ones(2, 3, 2, dtype=torch.float64)
    >>> factors = cp(ones, 1, generator=torch.Generator())
    >>> torch.allclose(cp_tensor(factors), ones)
    True
    """
    factors = [_first(tensor, mode, rank, generator) for mode in range(tensor.dim())]
    norms = tensor.new_ones(rank)
    total, before = float(tensor.norm()), math.inf
    met: dict[int, Tensor] = {}
    for _ in range(sweeps):
        for mode in range(tensor.dim()):
            products = _khatri_rao_product(tensor, factors, mode, met)
            gram = _grams(factors, mode) + _RIDGE * torch.eye(rank).to(tensor)
            solved = torch.linalg.solve(gram, products.T).T
            norms = solved.norm(dim=0)
            factors[mode] = solved / torch.where(norms > 0, norms, 1.0)
            met.pop(mode, None)
        # |T - X|^2 = |T|^2 - 2 <T, X> + |X|^2, each from what the last mode has computed.
        inner = float((products * solved).sum())
        square = float((_grams(factors, None) * torch.outer(norms, norms)).sum())
        error = math.sqrt(max(total**2 - 2 * inner + square, 0.0)) / max(total, 1e-300)
        if before - error < tolerance:
            break
        before = error
    share = norms ** (1 / tensor.dim())
    return [factor * share for factor in factors]


def _first(tensor: Tensor, mode: int, rank: int, generator: torch.Generator) -> Tensor:
    size = tensor.shape[mode]
    vectors = _leading(unfold(tensor, mode))[0][:, :rank]
    drawn = torch.randn(size, rank - vectors.shape[1], generator=generator, dtype=torch.float64)
    columns = torch.cat([vectors, drawn.to(tensor)], dim=1)
    return columns / columns.norm(dim=0)


def _khatri_rao_product(
    tensor: Tensor, factors: Sequence[Tensor], mode: int, met: dict[int, Tensor]
) -> Tensor:
    """Return T_(mode) times the Khatri-Rao product of the other factors [size, R].

    The largest mode goes first, so nothing larger than the tensor times R / size is built, and
    ``met`` keeps that product for the modes to come.
    """
    others = [at for at in range(tensor.dim()) if at != mode]
    first = max(others, key=lambda at: tensor.shape[at])
    if first not in met:
        met[first] = torch.tensordot(tensor, factors[first], dims=([first], [0]))
    rest, modes = met[first], [at for at in range(tensor.dim()) if at != first]
    for at in [other for other in others if other != first]:
        rest = (rest.movedim(modes.index(at), -2) * factors[at]).sum(-2)
        modes.remove(at)
    return rest


def _grams(factors: Sequence[Tensor], skipped: int | None) -> Tensor:
    """Return the elementwise product of the factors' Gram matrices [R, R], one left out."""
    product = torch.ones_like(factors[0].T @ factors[0])
    for mode, factor in enumerate(factors):
        if mode != skipped:
            product = product * (factor.T @ factor)
    return product


def cp_tensor(factors: Sequence[Tensor]) -> Tensor:
    """Return ``sum_r f_1[:, r] o f_2[:, r] o ...``.

    >>> cp_tensor([torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])]).tolist()
    [[3.0], [6.0]]
    """
    whole = factors[0]
    for factor in factors[1:]:
        whole = whole.unsqueeze(-2) * factor
    return whole.sum(-1)


# ------------------------------------------------------------------ cheaper convolutions


def separable(kernel: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return a k x 1 and a 1 x k kernel whose convolutions, one after the other, are near it.

    The best rank-r factors of ``M[(i h), (w o)] = W[o, i, h, w]`` (Jaderberg et al. 2014,
    scheme 2; Tai et al. 2016, eq. 4), exact at r = min(ci kh, co kw).

    Args:
        kernel: W [co, ci, kh, kw].
        rank: r, 1 to min(ci kh, co kw).

    Returns:
        Vertical [r, ci, kh, 1] and horizontal [co, r, 1, kw].

    Raises:
        ModelError: there is no such rank.

    >>> column, row = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 0.0, -1.0])
    >>> first, second = separable(torch.outer(column, row)[None, None], 1)
    >>> torch.allclose(torch.outer(first.flatten(), second.flatten()), torch.outer(column, row))
    True
    """
    outputs, inputs, height, width = kernel.shape
    left, right = svd_factors(separable_matrix(kernel), rank)
    vertical = left.T.reshape(rank, inputs, height, 1)
    horizontal = right.reshape(rank, 1, width, outputs).permute(3, 0, 1, 2)
    return vertical, horizontal


def separable_matrix(kernel: Tensor) -> Tensor:
    """Return ``M[(i h), (w o)] = W[o, i, h, w]`` [ci kh, kw co].

    >>> separable_matrix(torch.arange(6).reshape(1, 1, 2, 3)).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    return kernel.permute(1, 2, 3, 0).flatten(2).flatten(0, 1)


def depthwise_separable(kernel: Tensor, multiplier: int = 1) -> tuple[Tensor, Tensor]:
    """Return a depthwise and a pointwise kernel nearest to a full one.

    With D filters per input channel it minimises
    ``|W - P S|^2 = sum_i |W[:, i] - sum_d p[:, i, d] s[i, d]|_F^2``: every input channel is a
    matrix [co, kh kw] of its own, whose best rank-D product is its truncated SVD (Guo et al.
    2018, network decoupling). Exact at D = min(co, kh kw).

    Args:
        kernel: W [co, ci, kh, kw].
        multiplier: D.

    Returns:
        Depthwise s [ci D, 1, kh, kw], for ci groups, and pointwise p [co, ci D, 1, 1].

    Raises:
        ModelError: D is more than min(co, kh kw).

    >>> depth, point = depthwise_separable(torch.ones(4, 2, 3, 3))
    >>> depth.shape, point.shape
    (torch.Size([2, 1, 3, 3]), torch.Size([4, 2, 1, 1]))
    """
    outputs, inputs, height, width = kernel.shape
    pairs = [svd_factors(kernel[:, i].flatten(1), multiplier) for i in range(inputs)]
    point = torch.cat([pair[0] for pair in pairs], dim=1)
    depth = torch.cat([pair[1] for pair in pairs])
    return depth.reshape(-1, 1, height, width), point.reshape(outputs, -1, 1, 1)


def compose_kernels(first: Tensor, second: Tensor) -> Tensor:
    """Return the one kernel that two convolutions in a row are, without padding between.

    The full convolution ``K[o, i, p] = sum_m sum_{a + b = p} K_2[o, m, a] K_1[m, i, b]``.

    Args:
        first: K_1 [middle, ci, h, w], applied first.
        second: K_2 [co, middle, h', w'].

    Returns:
        K [co, ci, h + h' - 1, w + w' - 1].

    >>> compose_kernels(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2)).flatten().tolist()
    [1.0, 2.0, 1.0]
    """
    shifts = _shifts(first, second.shape[2], second.shape[3])
    return torch.einsum("omyx,myxihw->oihw", second, shifts)


def _shifts(kernel: Tensor, rows: int, columns: int) -> Tensor:
    """Return the kernel [m, i, h, w] at every offset: [m, rows, columns, i, h + rows - 1, ...]."""
    middle, inputs, height, width = kernel.shape
    shape = (middle, rows, columns, inputs, height + rows - 1, width + columns - 1)
    shifted = kernel.new_zeros(shape)
    for row in range(rows):
        for column in range(columns):
            place = (slice(row, row + height), slice(column, column + width))
            shifted[:, row, column, :, place[0], place[1]] = kernel
    return shifted


def two_kernels(
    kernel: Tensor, middle: int, *, generator: torch.Generator, sweeps: int = 20
) -> tuple[Tensor, Tensor]:
    """Return two 3 x 3 kernels whose composition is near a 5 x 5 one.

    Alternating least squares on ``|K - K_2 * K_1|_F^2`` (full convolution): the composition is
    linear in each kernel, so each is solved for exactly given the other and the error never
    rises. Two 3 x 3 layers see as far as one 5 x 5 (Simonyan and Zisserman 2015, section 2.3).

    Args:
        kernel: K [co, ci, 5, 5]; any odd size 2 k - 1 gives two of size k.
        middle: channels between the two.
        generator: draws the first kernel to begin with.
        sweeps: solutions of each.

    Returns:
        First [middle, ci, 3, 3] and second [co, middle, 3, 3], of equal norm per channel. On
        the CPU only.

    >>> kernel = torch.arange(50.0).reshape(2, 1, 5, 5)
    >>> found = two_kernels(kernel, 4, generator=torch.Generator(), sweeps=1)
    >>> torch.allclose(compose_kernels(*found), kernel, atol=1e-3)
    True
    """
    inputs = kernel.shape[1]
    height, width = (size // 2 + 1 for size in kernel.shape[2:])
    drawn = torch.randn(middle, inputs, height, width, generator=generator, dtype=torch.float64)
    first = drawn.to(kernel)
    for _ in range(sweeps):
        second = _second(kernel, first)
        # Read from the other end, the roles of the two are exchanged.
        first = _second(kernel.transpose(0, 1), second.transpose(0, 1)).transpose(0, 1)
    second = _second(kernel, first)
    ahead, behind = balanced(second.transpose(0, 1).flatten(1).T, first.flatten(1))
    after = ahead.T.reshape(middle, -1, *second.shape[2:]).transpose(0, 1)
    return behind.reshape(first.shape), after


def _second(kernel: Tensor, first: Tensor) -> Tensor:
    """Return the second kernel that, after the first, comes nearest to a kernel."""
    middle, _, height, width = first.shape
    rows, columns = kernel.shape[2] - height + 1, kernel.shape[3] - width + 1
    shifts = _shifts(first, rows, columns).flatten(3).reshape(middle * rows * columns, -1)
    # By SVD, which takes channels to spare; the last bits of the default driver vary by call.
    solved = torch.linalg.lstsq(shifts.T, kernel.flatten(1).T, driver="gelsd").solution
    return solved.T.reshape(-1, middle, rows, columns)
