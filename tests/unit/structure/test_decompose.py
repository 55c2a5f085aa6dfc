"""Decompositions of matrices: optimal errors, exactness at full rank, and fixed signs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.tensors import drawn64
from laconic.errors import ModelError
from laconic.structure.decompose import (
    balanced,
    block_diagonal,
    block_order,
    data_spectrum,
    data_svd_factors,
    energy_rank,
    modes,
    paired,
    signed_svd,
    svd_factors,
    tensor_train,
    train_matrix,
    train_ranks,
)

# Sums of a few hundred float64 numbers of order one.
ROUNDING = 1e-10

sizes = st.integers(1, 7)
seeds = st.integers(0, 1000)


# ------------------------------------------------------------------ low rank


@given(rows=sizes, columns=sizes, seed=seeds)
def test_the_error_of_a_rank_is_the_tail_of_the_spectrum(
    rows: int, columns: int, seed: int
) -> None:
    weight = drawn64(rows, columns, seed=seed)
    squares = torch.linalg.svdvals(weight) ** 2
    for rank in range(1, min(rows, columns) + 1):
        a, b = svd_factors(weight, rank)
        assert a.shape == (rows, rank) and b.shape == (rank, columns)
        error = (weight - a @ b).square().sum()
        assert float(error) == pytest.approx(float(squares[rank:].sum()), abs=ROUNDING)
    assert torch.allclose(a @ b, weight, atol=ROUNDING)  # the full rank is exact


@given(seed=seeds)
def test_both_factors_share_the_singular_values(seed: int) -> None:
    weight = drawn64(6, 9, seed=seed)
    a, b = svd_factors(weight, 4)
    values = torch.linalg.svdvals(weight)[:4]
    assert torch.allclose(a.T @ a, values.diag(), atol=ROUNDING)
    assert torch.allclose(b @ b.T, values.diag(), atol=ROUNDING)


def test_signs_do_not_depend_on_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = drawn64(5, 7)
    expected = signed_svd(weight)
    plain = torch.linalg.svd

    def flipped(matrix: Tensor, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]:
        u, s, v = plain(matrix, full_matrices=full_matrices)
        signs = torch.tensor([-1.0, 1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
        return u * signs, s, v * signs[:, None]

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    for found, wanted in zip(signed_svd(weight), expected, strict=True):
        assert torch.equal(found, wanted)
    u, s, v = expected
    assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())
    assert torch.allclose(u * s @ v, weight, atol=ROUNDING)


@pytest.mark.parametrize("rank", [0, -1, 4, 100])
def test_a_rank_that_is_not_there_is_refused(rank: int) -> None:
    with pytest.raises(ModelError, match=rf"rank {rank} of a matrix \[3, 5\]; choose 1 to 3"):
        svd_factors(drawn64(3, 5), rank)
    with pytest.raises(ModelError, match="choose 1 to 3"):
        data_svd_factors(drawn64(3, 5), torch.eye(5).double(), rank)


@given(
    values=st.lists(st.floats(0, 10), min_size=1, max_size=8).filter(lambda v: sum(v) > 1e-3),
    energy=st.floats(0.01, 1),
)
def test_the_rank_of_an_energy_is_the_least_that_reaches_it(
    values: list[float], energy: float
) -> None:
    squares = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    rank = energy_rank(squares, energy)
    assert float(squares[:rank].sum()) >= energy * float(squares.sum()) * (1 - 1e-9)
    assert float(squares[: rank - 1].sum()) < energy * float(squares.sum())


def test_all_energy_is_every_singular_value_but_zeros() -> None:
    assert energy_rank(torch.tensor([2.0, 1.0, 1.0]), 1.0) == 3
    assert energy_rank(torch.tensor([2.0, 0.0, 0.0]), 1.0) == 1
    assert energy_rank(torch.zeros(3), 1.0) == 1


def test_balancing_keeps_the_product_and_leaves_zeros() -> None:
    left, right = drawn64(4, 3) * torch.tensor([1.0, 100.0, 0.0]), drawn64(3, 5, seed=1)
    one, other = balanced(left, right)
    assert torch.allclose(one @ other, left @ right, atol=ROUNDING)
    assert torch.allclose(one.norm(dim=0)[:2], other.norm(dim=1)[:2])
    assert bool(one.isfinite().all()) and bool(other.isfinite().all())


# ------------------------------------------------------------------ low rank on data


@given(rows=sizes, columns=sizes, samples=st.integers(1, 9), seed=seeds)
def test_on_data_no_product_of_the_rank_is_better(
    rows: int, columns: int, samples: int, seed: int
) -> None:
    weight = drawn64(rows, columns, seed=seed)
    # Fewer samples than columns: the moment has no inverse.
    inputs = drawn64(columns, samples, seed=seed + 1) * torch.arange(1, columns + 1)[:, None]
    moment = inputs @ inputs.T
    squares = data_spectrum(weight, moment)
    scale = float(squares.sum()) + 1
    for rank in range(1, min(rows, columns) + 1):
        a, b = data_svd_factors(weight, moment, rank)
        error = float(((weight - a @ b) @ inputs).square().sum())
        assert error == pytest.approx(float(squares[rank:].sum()), abs=ROUNDING * scale)
        plain = svd_factors(weight, rank)
        worse = float(((weight - plain[0] @ plain[1]) @ inputs).square().sum())
        assert error <= worse + ROUNDING * scale


def test_the_spectrum_on_data_is_that_of_the_outputs() -> None:
    weight, inputs = drawn64(4, 6), drawn64(6, 20, seed=1)
    expected = torch.linalg.svdvals(weight @ inputs) ** 2
    assert torch.allclose(data_spectrum(weight, inputs @ inputs.T), expected, atol=1e-8)


def test_on_data_the_formula_with_an_inverse_gives_the_same() -> None:
    weight, inputs = drawn64(5, 6), drawn64(6, 40, seed=1)
    moment = inputs @ inputs.T
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.sqrt() @ vectors.T
    u, s, v = torch.linalg.svd(weight @ root, full_matrices=False)
    expected = u[:, :2] * s[:2] @ v[:2] @ torch.linalg.inv(root)
    a, b = data_svd_factors(weight, moment, 2)
    assert torch.allclose(a @ b, expected, atol=1e-8)


def test_on_white_data_it_is_the_plain_svd() -> None:
    weight = drawn64(5, 7)
    found = data_svd_factors(weight, torch.eye(7).double(), 3)
    for one, other in zip(found, svd_factors(weight, 3), strict=True):
        assert torch.allclose(one, other, atol=ROUNDING)


# ------------------------------------------------------------------ block-diagonal


@given(blocks=st.integers(1, 3), high=st.integers(1, 3), wide=st.integers(1, 3), seed=seeds)
def test_blocks_are_the_nearest_block_diagonal_matrix(
    blocks: int, high: int, wide: int, seed: int
) -> None:
    weight = drawn64(blocks * high, blocks * wide, seed=seed)
    found = block_diagonal(weight, blocks)
    assert found.shape == (blocks, high, wide)
    pattern = torch.block_diag(*torch.ones(blocks, high, wide).double())
    projected = torch.block_diag(*found)
    assert torch.equal(projected, weight * pattern)


def test_blocks_of_a_kernel_keep_its_extent() -> None:
    kernel = drawn64(4, 6, 3, 2)
    found = block_diagonal(kernel, 2)
    assert torch.equal(found[1], kernel[2:, 3:])


@pytest.mark.parametrize("function", [block_diagonal, block_order])
def test_blocks_that_do_not_divide_are_refused(function: object) -> None:
    with pytest.raises(ModelError, match=r"4 blocks do not divide a weight \[6, 9\].*divisor of 3"):
        function(drawn64(6, 9), 4)  # type: ignore[operator]


def block_energy(weight: Tensor, blocks: int) -> float:
    """Return the share of the squared norm that lies in the blocks on the diagonal."""
    return float(block_diagonal(weight, blocks).square().sum() / weight.square().sum())


@given(blocks=st.integers(2, 4), high=st.integers(1, 4), wide=st.integers(1, 4), seed=seeds)
def test_a_shuffled_block_diagonal_matrix_is_put_in_order(
    blocks: int, high: int, wide: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.block_diag(*(drawn64(blocks, high, wide, seed=seed).abs() + 0.1))
    rows = torch.randperm(blocks * high, generator=generator)
    columns = torch.randperm(blocks * wide, generator=generator)
    shuffled = whole[rows][:, columns]
    found = block_order(shuffled, blocks)
    assert block_energy(shuffled[found[0]][:, found[1]], blocks) == pytest.approx(1.0)


@given(blocks=st.sampled_from([2, 3]), seed=seeds)
def test_an_order_is_a_permutation_that_loses_nothing(blocks: int, seed: int) -> None:
    weight = drawn64(6, 12, seed=seed)
    rows, columns = block_order(weight, blocks)
    assert sorted(rows.tolist()) == list(range(6))
    assert sorted(columns.tolist()) == list(range(12))
    ordered = weight[rows][:, columns]
    assert block_energy(ordered, blocks) >= block_energy(weight, blocks)


def test_a_small_order_is_near_the_best_there_is() -> None:
    weight = drawn64(4, 4)
    halves = list(itertools.permutations(range(4)))
    best = max(block_energy(weight[list(r)][:, list(c)], 2) for r in halves for c in halves)
    rows, columns = block_order(weight, 2)
    assert block_energy(weight[rows][:, columns], 2) >= 0.95 * best


# ------------------------------------------------------------------ tensor train


@given(size=st.integers(1, 4000), count=st.integers(1, 5))
def test_modes_multiply_to_the_size(size: int, count: int) -> None:
    found = modes(size, count)
    assert len(found) == count
    assert math.prod(found) == size
    assert list(found) == sorted(found, reverse=True)


def test_modes_are_about_equal() -> None:
    assert modes(4096, 4) == (8, 8, 8, 8)
    assert modes(7, 2) == (7, 1)


MODES = [((2, 3), (3, 2)), ((4, 1, 2), (2, 3, 3)), ((2, 2, 2, 2), (3, 1, 2, 2)), ((6,), (5,))]


@pytest.mark.parametrize(("rows", "columns"), MODES)
def test_a_full_train_is_exact(rows: tuple[int, ...], columns: tuple[int, ...]) -> None:
    weight = drawn64(math.prod(rows), math.prod(columns))
    cores = tensor_train(weight, rows, columns)
    assert torch.allclose(train_matrix(cores), weight, atol=ROUNDING)
    ranks = [core.shape[3] for core in cores[:-1]]
    assert ranks == list(train_ranks([m * n for m, n in zip(rows, columns, strict=True)], 10**6))


@pytest.mark.parametrize(("rows", "columns"), MODES)
@settings(max_examples=20)
@given(eps=st.floats(0.01, 0.9), seed=seeds)
def test_the_error_of_a_train_is_within_its_bound(
    rows: tuple[int, ...], columns: tuple[int, ...], eps: float, seed: int
) -> None:
    weight = drawn64(math.prod(rows), math.prod(columns), seed=seed)
    cores = tensor_train(weight, rows, columns, eps=eps)
    error = (train_matrix(cores) - weight).norm() / weight.norm()
    assert float(error) <= eps + ROUNDING


def test_entries_are_products_of_core_slices() -> None:
    rows, columns = (2, 3), (3, 2)
    cores = tensor_train(drawn64(6, 6), rows, columns, rank=2)
    whole = train_matrix(cores)
    for i, j in itertools.product(range(6), range(6)):
        first = cores[0][0, i // 3, j // 2]
        second = cores[1][:, i % 3, j % 2, 0]
        assert float(whole[i, j]) == pytest.approx(float(first @ second), abs=ROUNDING)


def test_a_train_of_known_rank_is_found_and_levelled() -> None:
    known = [drawn64(1, 2, 3, 2), drawn64(2, 3, 2, 2, seed=1), drawn64(2, 2, 2, 1, seed=2)]
    weight = train_matrix(known)
    cores = tensor_train(weight, (2, 3, 2), (3, 2, 2), eps=1e-8)
    assert [core.shape for core in cores] == [core.shape for core in known]
    assert torch.allclose(train_matrix(cores), weight, atol=1e-8)
    norms = torch.stack([core.norm() for core in cores])
    assert torch.allclose(norms, norms[0].expand(3))


def test_a_rank_caps_every_core() -> None:
    cores = tensor_train(drawn64(64, 64), (4, 4, 4), (4, 4, 4), rank=5)
    assert [core.shape[3] for core in cores] == [5, 5, 1]
    errors = [
        float((train_matrix(tensor_train(drawn64(64, 64), (4, 4, 4), (4, 4, 4), rank=rank))
               - drawn64(64, 64)).norm())
        for rank in (1, 4, 8, 16)
    ]  # fmt: skip
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < ROUNDING


def test_a_zero_matrix_has_zero_cores() -> None:
    cores = tensor_train(torch.zeros(4, 6), (2, 2), (2, 3))
    assert bool((train_matrix(cores) == 0).all())


@pytest.mark.parametrize(
    ("rows", "columns"), [((2, 3), (2, 2)), ((2, 2), (3, 3)), ((6,), (2, 3)), ((), ())]
)
def test_modes_that_do_not_fit_are_refused(rows: tuple[int, ...], columns: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=r"do not multiply to a weight \[6, 6\]"):
        paired(drawn64(6, 6), rows, columns)
    with pytest.raises(ModelError, match="do not multiply"):
        tensor_train(drawn64(6, 6), rows, columns)
