"""Decompositions of a matrix: low rank, low rank on data, block-diagonal, tensor train.

Pure functions of tensors, in the precision of what they are given. Signs of singular vectors
are fixed, so a result does not depend on the linear algebra library that computed it (where
singular values are equal, vectors are free to rotate, but products of factors are not).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from laconic.errors import ModelError

__all__ = [
    "balanced",
    "block_diagonal",
    "block_order",
    "data_spectrum",
    "data_svd_factors",
    "energy_rank",
    "modes",
    "paired",
    "signed_svd",
    "svd_factors",
    "tensor_train",
    "train_matrix",
    "train_ranks",
]

# Shares are quotients of sums: one that is missed by rounding is reached.
_EPSILON = 1e-12
# Rounds of exchanging rows and columns between blocks; it stops earlier where nothing is gained.
_ROUNDS = 20


def energy_rank(squares: Tensor, energy: float) -> int:
    """Return the least k with ``sum_{i<=k} s_i^2 / sum_i s_i^2 >= energy``.

    Args:
        squares: s_i^2, descending [count].
        energy: share that is kept, (0, 1].

    >>> energy_rank(torch.tensor([9.0, 4.0, 1.0, 0.0]), 0.9)
    2
    """
    kept = squares.double().cumsum(0)
    reached = kept >= energy * kept[-1] * (1 - _EPSILON)
    return int(reached.double().argmax()) + 1


def signed_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [m, k], S [k] descending and V^T [k, n] with ``matrix = U diag(S) V^T``.

    In each column of U the entry of largest magnitude (the first of equals) is positive.

    >>> u, s, v = signed_svd(torch.tensor([[0.0, -2.0], [1.0, 0.0]]))
    >>> u.tolist(), s.tolist()
    ([[1.0, 0.0], [0.0, 1.0]], [2.0, 1.0])
    """
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    signs = torch.where(u.gather(0, u.abs().argmax(0, keepdim=True))[0] < 0, -1.0, 1.0).to(u)
    return u * signs + 0.0, s, v * signs[:, None] + 0.0


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product with ``|left[:, j]| = |right[j]|`` for every j.

    Args:
        left: [m, k].
        right: [k, n].

    >>> balanced(torch.tensor([[8.0]]), torch.tensor([[2.0]]))
    (tensor([[4.]]), tensor([[4.]]))
    """
    ratio = right.norm(dim=1) / left.norm(dim=0)
    scale = torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0).sqrt()
    return left * scale, right / scale[:, None]


def svd_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``A = U_k sqrt(S_k)`` and ``B = sqrt(S_k) V_k^T``, the best rank-k product.

    ``|W - A B|_F^2 = sum_{i>k} s_i^2``, the least there is (Eckart and Young 1936).

    Args:
        weight: W [m, n].
        rank: k, 1 to min(m, n).

    Returns:
        A [m, k] and B [k, n].

    Raises:
        ModelError: there is no such rank.

    >>> a, b = svd_factors(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), 1)
    >>> a.tolist(), b.tolist()
    ([[2.0], [0.0]], [[2.0, 0.0]])
    """
    _check_rank(weight, rank)
    u, s, v = signed_svd(weight)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def data_svd_factors(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B of rank k that minimise ``|(W - A B) X|_F`` for inputs X.

    With ``C = X X^T`` and ``W C^(1/2) = U S V^T`` the minimum is ``A B = U_k U_k^T W``, equal to
    ``U_k S_k V_k^T C^(-1/2)`` where C has an inverse, and in need of none. The error is
    ``sum_{i>k} s_i^2``. With ``C = I`` it is ``svd_factors`` (Chen et al. 2021, DRONE, eq. 4).

    Args:
        weight: W [m, n].
        moment: C, the second moment of the inputs [n, n].
        rank: k, 1 to min(m, n).

    Returns:
        A [m, k] and B [k, n], the norms of A's columns and B's rows equal.

    Raises:
        ModelError: there is no such rank.

    >>> a, b = data_svd_factors(torch.eye(2), torch.diag(torch.tensor([0.0, 1.0])), 1)
    >>> (a @ b).tolist()
    [[0.0, 0.0], [0.0, 1.0]]
    """
    _check_rank(weight, rank)
    vectors = signed_svd(weight @ _root(moment))[0][:, :rank]
    return balanced(vectors, vectors.T @ weight)


def data_spectrum(weight: Tensor, moment: Tensor) -> Tensor:
    """Return the squared singular values [min(m, n)] of ``W C^(1/2)``, descending.

    They are the energies of the outputs ``W X`` along their principal directions.

    Args:
        weight: W [m, n].
        moment: C [n, n].

    >>> data_spectrum(torch.eye(2), torch.diag(torch.tensor([1.0, 9.0]))).tolist()
    [9.0, 1.0]
    """
    return torch.linalg.svdvals(weight @ _root(moment)) ** 2


def _root(moment: Tensor) -> Tensor:
    """Return R with R R^T = C: C^(1/2) up to a rotation, which moves no left vector."""
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp_min(0).sqrt()


def _check_rank(weight: Tensor, rank: int) -> None:
    largest = min(weight.shape)
    if not 1 <= rank <= largest:
        raise ModelError(
            f"rank {rank} of a matrix {list(weight.shape)}; choose 1 to {largest} (exact)"
        )


# ------------------------------------------------------------------ block-diagonal


def block_diagonal(weight: Tensor, blocks: int) -> Tensor:
    """Return the blocks on the diagonal, the nearest block-diagonal matrix's content.

    ``W ~ blockdiag(W_1, ..., W_g)``: entries are independent, so the least-squares projection
    keeps those inside the blocks; the error is the energy of all others.

    Args:
        weight: W [m, n, ...].
        blocks: g, which divides m and n.

    Returns:
        [g, m / g, n / g, ...].

    Raises:
        ModelError: the blocks do not divide the matrix.

    >>> block_diagonal(torch.arange(16.0).reshape(4, 4), 2).tolist()
    [[[0.0, 1.0], [4.0, 5.0]], [[10.0, 11.0], [14.0, 15.0]]]
    """
    rows, columns, *rest = weight.shape
    if rows % blocks or columns % blocks:
        raise ModelError(
            f"{blocks} blocks do not divide a weight [{rows}, {columns}]; choose a divisor of "
            f"{math.gcd(rows, columns)}"
        )
    grid = weight.reshape(blocks, rows // blocks, blocks, columns // blocks, *rest)
    each = torch.arange(blocks, device=weight.device)
    return grid[each, :, each]


def block_order(weight: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Return orders of rows and columns that gather energy in the blocks on the diagonal.

    The best orders are hard to find (a balanced co-clustering). Blocks are grown one by one, a
    strong row and the columns it uses, then any two exchange columns and rows as long as the
    energy inside rises; for two blocks and one side an exchange is optimal. The given order is
    improved in the same way, and the better of the two is returned, so nothing is lost.

    Args:
        weight: W [m, n].
        blocks: g, which divides m and n.

    Returns:
        Positions of rows [m] and columns [n]: ``weight[rows][:, columns]`` is to be projected.

    Raises:
        ModelError: the blocks do not divide the matrix.

    >>> rows, columns = block_order(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), 2)
    >>> torch.tensor([[0.0, 2.0], [1.0, 0.0]])[rows][:, columns].tolist()
    [[2.0, 0.0], [0.0, 1.0]]
    """
    block_diagonal(weight, blocks)  # refuses what the blocks do not divide
    energy = weight.double().square()
    sides = [torch.arange(size).reshape(blocks, -1) for size in energy.shape]
    starts = [(sides[0], sides[1]), _grown(energy, blocks)]
    found = [_exchanged(energy, rows, columns) for rows, columns in starts]
    best = max(found, key=lambda groups: _inside(energy, *groups))  # the given order, if equal
    return best[0].flatten(), best[1].flatten()


def _inside(energy: Tensor, rows: Tensor, columns: Tensor) -> float:
    return float(energy[rows[:, :, None], columns[:, None, :]].sum())


def _grown(energy: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Return groups of rows [g, m / g] and columns [g, n / g], each around its strongest row."""
    height, width = (size // blocks for size in energy.shape)
    rows, columns = (torch.arange(size) for size in energy.shape)
    groups: list[tuple[Tensor, Tensor]] = []
    for _ in range(blocks):
        left = energy[rows][:, columns]
        chosen = left.sum(1).argmax().reshape(1)
        for _ in range(_ROUNDS):
            wide = _top(left[chosen].sum(0), width)
            chosen = _top(left[:, wide].sum(1), height)
        groups.append((rows[chosen], columns[wide]))
        rows, columns = _without(rows, chosen), _without(columns, wide)
    return torch.stack([g[0] for g in groups]), torch.stack([g[1] for g in groups])


def _top(scores: Tensor, count: int) -> Tensor:
    """Return the positions of the highest scores, ascending; ties to the lower one."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def _without(positions: Tensor, chosen: Tensor) -> Tensor:
    kept = torch.ones(len(positions), dtype=torch.bool)
    kept[chosen] = False
    return positions[kept]


def _exchanged(energy: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the groups after exchanges between pairs that raise the energy inside."""
    rows, columns = rows.clone(), columns.clone()
    before = _inside(energy, rows, columns)
    for _ in range(_ROUNDS):
        for one, other in itertools.combinations(range(len(rows)), 2):
            _exchange_(energy, columns, rows, (one, other))
            _exchange_(energy.T, rows, columns, (one, other))
        after = _inside(energy, rows, columns)
        if after <= before * (1 + _EPSILON):
            break
        before = after
    return rows, columns


def _exchange_(energy: Tensor, moved: Tensor, fixed: Tensor, pair: tuple[int, int]) -> None:
    """Divide the moved members of two groups so that most energy lies inside them."""
    one, other = pair
    both = torch.cat([moved[one], moved[other]])
    gain = energy[fixed[one]][:, both].sum(0) - energy[fixed[other]][:, both].sum(0)
    first = _top(gain, moved.shape[1])
    moved[one], moved[other] = both[first], _without(both, first)


# ------------------------------------------------------------------ tensor train


def modes(size: int, count: int) -> tuple[int, ...]:
    """Return numbers as equal as possible whose product is the size, largest first.

    Prime factors, largest first, each join the smallest product so far.

    >>> modes(768, 3), modes(3072, 3), modes(10, 3)
    ((12, 8, 8), (16, 16, 12), (5, 2, 1))
    """
    products = [1] * count
    for prime in reversed(_primes(size)):
        smallest = products.index(min(products))
        products[smallest] *= prime
    return tuple(sorted(products, reverse=True))


def _primes(number: int) -> list[int]:
    found, divisor = [], 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return [*found, number] if number > 1 else found


def train_ranks(sizes: Sequence[int], rank: int) -> tuple[int, ...]:
    """Return the d - 1 inner ranks of a tensor train: ``rank``, where the modes allow it.

    Args:
        sizes: m_k n_k of every core [d].
        rank: largest wanted.

    >>> train_ranks((4, 6, 6), 8)
    (4, 6)
    """
    splits = range(1, len(sizes))
    return tuple(min(rank, math.prod(sizes[:k]), math.prod(sizes[k:])) for k in splits)


def paired(weight: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """Return a matrix as a tensor [m_1 n_1, ..., m_d n_d] with ``(i_k, j_k)`` as its k-th index.

    Args:
        weight: W [m, n].
        rows: m_1 ... m_d, whose product is m; i_1 is the slowest.
        columns: n_1 ... n_d, whose product is n.

    Raises:
        ModelError: the modes do not multiply to the matrix's shape.

    >>> paired(torch.kron(torch.eye(2), torch.ones(3, 2)), (2, 3), (2, 2)).any(1).tolist()
    [True, False, False, True]
    """
    count = len(rows)
    if count != len(columns) or (math.prod(rows), math.prod(columns)) != tuple(weight.shape):
        raise ModelError(
            f"modes {tuple(rows)} x {tuple(columns)} do not multiply to a weight "
            f"{list(weight.shape)}; give as many of each, with its shape as their products"
        )
    order = [axis for k in range(count) for axis in (k, count + k)]
    sizes = [m * n for m, n in zip(rows, columns, strict=True)]
    return weight.reshape(*rows, *columns).permute(order).reshape(sizes)


def tensor_train(
    weight: Tensor,
    rows: Sequence[int],
    columns: Sequence[int],
    *,
    rank: int | None = None,
    eps: float = 0.0,
) -> list[Tensor]:
    """Return the cores of a matrix in tensor-train format, by successive SVDs.

    ``W[(i_1..i_d), (j_1..j_d)] = G_1[i_1, j_1] G_2[i_2, j_2] ... G_d[i_d, j_d]``, a product of
    matrices (Novikov et al. 2015, eq. 4). Each SVD drops singular values of norm at most
    ``delta = eps / sqrt(d - 1) |W|_F``, so that ``|W - TT|_F <= eps |W|_F`` (Oseledets 2011,
    algorithm 1 and theorem 2.2).

    Args:
        weight: W [m, n].
        rows: m_1 ... m_d, whose product is m; i_1 is the slowest.
        columns: n_1 ... n_d, whose product is n.
        rank: largest inner rank; None: no limit. With one, the error may exceed the bound.
        eps: allowed relative error.

    Returns:
        d cores G_k [r_{k-1}, m_k, n_k, r_k] of equal norm, with r_0 = r_d = 1.

    Raises:
        ModelError: the modes do not multiply to the matrix's shape.

    >>> weight = torch.kron(torch.eye(2), torch.ones(3, 2))
    >>> [list(core.shape) for core in tensor_train(weight, (2, 3), (2, 2), eps=1e-4)]
    [[1, 2, 2, 1], [1, 3, 2, 1]]
    """
    rest = paired(weight, rows, columns)
    delta = eps / math.sqrt(max(len(rows) - 1, 1)) * float(weight.norm())
    cores, left = [], 1
    for height, width in zip(rows[:-1], columns[:-1], strict=True):
        u, s, v = signed_svd(rest.reshape(left * height * width, -1))
        kept = min(_tail_rank(s, delta), rank or len(s))
        cores.append(u[:, :kept].reshape(left, height, width, kept))
        rest, left = s[:kept, None] * v[:kept], kept
    cores.append(rest.reshape(left, rows[-1], columns[-1], 1))
    return _levelled(cores)


def _tail_rank(values: Tensor, delta: float) -> int:
    """Return the least rank whose dropped singular values have at most this norm."""
    tails = values.double().square().flip(0).cumsum(0).flip(0).sqrt()
    return max(int((tails > delta).sum()), 1)


def _levelled(cores: list[Tensor]) -> list[Tensor]:
    norms = torch.stack([core.norm() for core in cores])
    if not bool((norms > 0).all()):
        return cores
    level = norms.log().mean().exp()
    return [core * (level / norm) for core, norm in zip(cores, norms, strict=True)]


def train_matrix(cores: Sequence[Tensor]) -> Tensor:
    """Return the matrix [prod m_k, prod n_k] that tensor-train cores stand for.

    Args:
        cores: G_k [r_{k-1}, m_k, n_k, r_k].

    >>> train_matrix([torch.ones(1, 2, 1, 3), torch.ones(3, 2, 2, 1)]).tolist()[0]
    [3.0, 3.0]
    """
    whole = cores[0]
    for core in cores[1:]:
        joined = torch.einsum("amnr,rpqb->ampnqb", whole, core)
        first, m, p, n, q, last = joined.shape
        whole = joined.reshape(first, m * p, n * q, last)
    return whole[0, :, :, 0]
