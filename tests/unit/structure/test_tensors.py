"""Decompositions of tensors and kernels: exactness, errors that never rise, best fits."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.tensors import drawn64
from laconic.errors import ModelError
from laconic.structure.tensors import (
    block_term,
    compose_kernels,
    cp,
    cp_tensor,
    depthwise_separable,
    mode_spectrum,
    separable,
    separable_matrix,
    tucker,
    tucker_tensor,
    two_kernels,
    unfold,
)

# Sums of a few hundred float64 numbers of order one; eigenvalues of Gram matrices lose half.
ROUNDING, GRAM = 1e-10, 1e-7

seeds = st.integers(0, 1000)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def never_rises(errors: list[float]) -> bool:
    return all(after <= before + ROUNDING for before, after in itertools.pairwise(errors))


def test_unfolding_puts_a_mode_first() -> None:
    tensor = drawn64(2, 3, 4)
    for mode in range(3):
        found = unfold(tensor, mode)
        assert found.shape == (tensor.shape[mode], 24 // tensor.shape[mode])
        assert torch.equal(found[1].sort().values, tensor.select(mode, 1).flatten().sort().values)


# ------------------------------------------------------------------ Tucker


def test_tucker_of_full_rank_is_exact() -> None:
    kernel = drawn64(5, 4, 3, 3)
    core, factors = tucker(kernel, (5, 4, None, None))
    assert factors[2] is None and factors[3] is None
    assert torch.allclose(tucker_tensor(core, factors), kernel, atol=ROUNDING)


@settings(max_examples=20)
@given(seed=seeds, ranks=st.tuples(st.integers(1, 5), st.integers(1, 4)))
def test_hooi_never_loses_what_hosvd_has(seed: int, ranks: tuple[int, int]) -> None:
    kernel = drawn64(5, 4, 3, 3, seed=seed)
    errors = []
    for sweeps in range(4):
        core, factors = tucker(kernel, (*ranks, None, None), sweeps=sweeps)
        errors.append(error(tucker_tensor(core, factors), kernel))
        for factor, rank in zip(factors, ranks, strict=False):
            assert factor is not None
            assert torch.allclose(factor.T @ factor, torch.eye(rank).double(), atol=ROUNDING)
    assert never_rises(errors)
    tails = [float(mode_spectrum(kernel, m)[r:].sum()) for m, r in enumerate(ranks)]
    lost = errors[-1] ** 2 * float(kernel.square().sum())
    assert max(tails) - ROUNDING <= lost <= sum(tails) + ROUNDING


def test_a_tensor_of_known_ranks_is_recovered() -> None:
    known = tucker_tensor(
        drawn64(2, 3, 2), [drawn64(6, 2), drawn64(5, 3, seed=1), drawn64(4, 2, seed=2)]
    )
    core, factors = tucker(known, (2, 3, 2), sweeps=1)
    assert error(tucker_tensor(core, factors), known) < ROUNDING


def test_the_spectrum_of_a_mode_is_that_of_its_unfolding() -> None:
    tensor = drawn64(4, 3, 5)
    for mode in range(3):
        expected = torch.linalg.svdvals(unfold(tensor, mode)) ** 2
        assert torch.allclose(mode_spectrum(tensor, mode), expected, atol=ROUNDING)


@settings(max_examples=10)
@given(seed=seeds, blocks=st.integers(1, 3))
def test_block_terms_never_get_worse(seed: int, blocks: int) -> None:
    tensor = drawn64(6, 5, 4, seed=seed)
    errors = []
    for sweeps in range(4):
        parts = block_term(tensor, blocks, (2, 2, 2), sweeps=sweeps)
        assert [core.shape for core, _ in parts] == [(2, 2, 2)] * blocks
        errors.append(error(torch.stack([tucker_tensor(*part) for part in parts]).sum(0), tensor))
    assert never_rises(errors)


def test_more_blocks_are_nearer_and_one_is_tucker() -> None:
    tensor = drawn64(6, 5, 4)
    sums = [
        torch.stack([tucker_tensor(*part) for part in block_term(tensor, count, (2, 2, 2))]).sum(0)
        for count in (1, 2, 4)
    ]
    errors = [error(found, tensor) for found in sums]
    assert errors == sorted(errors, reverse=True)
    assert error(tucker_tensor(*tucker(tensor, (2, 2, 2), sweeps=11)), sums[0]) < 1e-6


def test_a_sum_of_separate_blocks_is_recovered() -> None:
    first, second = torch.zeros(2, 8, 6, 6, dtype=torch.float64)
    first[:4, :3, :3] = 3 * tucker_tensor(
        drawn64(2, 2, 2), [drawn64(4, 2), drawn64(3, 2, seed=1), drawn64(3, 2, seed=2)]
    )
    second[4:, 3:, 3:] = tucker_tensor(
        drawn64(2, 2, 2, seed=3),
        [drawn64(4, 2, seed=4), drawn64(3, 2, seed=5), drawn64(3, 2, seed=6)],
    )
    parts = block_term(first + second, 2, (2, 2, 2), sweeps=50)
    assert error(tucker_tensor(*parts[0]) + tucker_tensor(*parts[1]), first + second) < 1e-3


# ------------------------------------------------------------------ CP


@pytest.mark.parametrize(("shape", "rank"), [((8, 7, 3, 3), 3), ((6, 5, 4), 3), ((6, 6, 5, 5), 4)])
@pytest.mark.parametrize("seed", range(2))
def test_a_tensor_of_known_cp_rank_is_recovered(
    shape: tuple[int, ...], rank: int, seed: int
) -> None:
    known = cp_tensor([drawn64(size, rank, seed=10 * seed + k) for k, size in enumerate(shape)])
    found = cp(known, rank, generator=torch.Generator().manual_seed(seed), tolerance=0.0)
    assert [factor.shape for factor in found] == [(size, rank) for size in shape]
    assert error(cp_tensor(found), known) < 1e-6


def test_cp_never_gets_worse_and_shares_norms_evenly() -> None:
    tensor = drawn64(6, 5, 3, 3)
    errors = []
    for sweeps in (1, 2, 5, 20):
        found = cp(tensor, 4, generator=torch.Generator(), sweeps=sweeps, tolerance=-1.0)
        errors.append(error(cp_tensor(found), tensor))
    assert never_rises(errors)
    norms = torch.stack([factor.norm(dim=0) for factor in found])
    assert torch.allclose(norms, norms[0].expand(4, 4))


def test_cp_stops_where_nothing_is_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    solved, plain = [], torch.linalg.solve
    monkeypatch.setattr(torch.linalg, "solve", lambda *a: (solved.append(1), plain(*a))[1])
    cp(torch.ones(3, 3, 3).double(), 1, generator=torch.Generator(), sweeps=500)
    assert len(solved) < 3 * 10


def test_cp_of_a_rank_beyond_every_mode_draws_by_its_generator() -> None:
    tensor = drawn64(3, 3, 3)
    one, same, other = (
        cp(tensor, 5, generator=torch.Generator().manual_seed(seed), sweeps=3) for seed in (0, 0, 1)
    )
    assert torch.equal(one[0], same[0])
    assert not torch.equal(one[0], other[0])


def test_cp_of_nothing_is_nothing() -> None:
    found = cp(torch.zeros(3, 2, 2).double(), 2, generator=torch.Generator())
    assert bool((cp_tensor(found) == 0).all())


# ------------------------------------------------------------------ cheaper convolutions


@given(seed=seeds)
def test_separable_errors_are_tails_and_the_full_rank_is_exact(seed: int) -> None:
    kernel = drawn64(3, 2, 3, 4, seed=seed)
    squares = torch.linalg.svdvals(separable_matrix(kernel)) ** 2
    for rank in range(1, 7):
        tall, wide = separable(kernel, rank)
        assert tall.shape == (rank, 2, 3, 1) and wide.shape == (3, rank, 1, 4)
        composed = torch.einsum("rih,orw->oihw", tall[..., 0], wide[:, :, 0])
        lost = float((composed - kernel).square().sum())
        assert lost == pytest.approx(float(squares[rank:].sum()), abs=ROUNDING)


@settings(max_examples=20)
@given(seed=seeds, outputs=st.integers(1, 12))
def test_depthwise_separable_is_the_best_fit_per_channel(seed: int, outputs: int) -> None:
    kernel = drawn64(outputs, 3, 3, 3, seed=seed)
    squares = torch.linalg.svdvals(kernel.transpose(0, 1).flatten(2)) ** 2
    for filters in range(1, min(outputs, 9) + 1):
        depth, point = depthwise_separable(kernel, filters)
        grouped = depth.reshape(3, filters, 3, 3)
        whole = torch.einsum("oid,idhw->oihw", point.reshape(outputs, 3, filters), grouped)
        lost = float((whole - kernel).square().sum())
        assert lost == pytest.approx(float(squares[:, filters:].sum()), abs=ROUNDING)


def test_ranks_that_are_not_there_are_refused() -> None:
    with pytest.raises(ModelError, match=r"rank 7 .*choose 1 to 6"):
        separable(drawn64(3, 2, 3, 4), 7)
    with pytest.raises(ModelError, match=r"rank 5 .*choose 1 to 4"):
        depthwise_separable(drawn64(4, 2, 3, 3), 5)


@settings(max_examples=20)
@given(seed=seeds, first=st.sampled_from([1, 3]), second=st.sampled_from([(1, 3), (3, 3), (2, 1)]))
def test_composed_kernels_are_two_convolutions_in_a_row(
    seed: int, first: int, second: tuple[int, int]
) -> None:
    one, two = drawn64(4, 2, first, 3, seed=seed), drawn64(3, 4, *second, seed=seed + 1)
    image = drawn64(2, 2, 9, 8, seed=seed + 2)
    expected = torch.conv2d(torch.conv2d(image, one), two)
    assert torch.allclose(torch.conv2d(image, compose_kernels(one, two)), expected, atol=ROUNDING)


@settings(max_examples=10)
@given(seed=seeds, middle=st.integers(1, 6))
def test_two_kernels_never_get_worse(seed: int, middle: int) -> None:
    kernel = drawn64(3, 2, 5, 5, seed=seed)
    errors = []
    for sweeps in (1, 2, 4, 8):
        found = two_kernels(kernel, middle, generator=torch.Generator(), sweeps=sweeps)
        assert found[0].shape == (middle, 2, 3, 3) and found[1].shape == (3, middle, 3, 3)
        errors.append(error(compose_kernels(*found), kernel))
    assert never_rises(errors)
    norms = (found[0].flatten(1).norm(dim=1), found[1].transpose(0, 1).flatten(1).norm(dim=1))
    assert torch.allclose(*norms)


def test_two_kernels_with_enough_channels_are_exact() -> None:
    kernel = drawn64(3, 2, 5, 5)  # four shifts of every input reach all of a 5 x 5 kernel
    found = two_kernels(kernel, 8, generator=torch.Generator(), sweeps=1)
    assert error(compose_kernels(*found), kernel) < GRAM


def test_two_kernels_find_a_composition() -> None:
    known = compose_kernels(drawn64(3, 4, 3, 3), drawn64(5, 3, 3, 3, seed=1))
    found = two_kernels(known, 3, generator=torch.Generator(), sweeps=60)
    assert error(compose_kernels(*found), known) < 0.05


def test_two_kernels_draw_by_their_generator() -> None:
    kernel = drawn64(2, 2, 5, 5)
    one, same, other = (
        two_kernels(kernel, 1, generator=torch.Generator().manual_seed(seed), sweeps=1)
        for seed in (0, 0, 1)
    )
    assert torch.equal(one[0], same[0])
    assert not torch.equal(one[0], other[0])
