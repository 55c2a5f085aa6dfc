"""The formulas of factorisation on numbers known beforehand: counts, break-evens, identities."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from helpers.tensors import drawn64
from laconic.structure.decompose import (
    data_svd_factors,
    energy_rank,
    svd_factors,
    tensor_train,
    train_matrix,
)
from laconic.structure.factorization import Source, break_even
from laconic.structure.kernels import CP, DepthwiseSeparable, Separable, Tucker2, TwoThrees
from laconic.structure.matrices import (
    SVD,
    BlockDiagonal,
    BlockTerm,
    Embedding,
    TensorTrain,
)
from laconic.structure.tensors import compose_kernels, cp, cp_tensor, separable, tucker

# float64 sums of a few hundred products of order one.
ROUNDING = 1e-10


# ------------------------------------------------------------------ low rank


def test_svd_of_768_by_3072_breaks_even_at_614() -> None:
    assert break_even(SVD(), (768, 3072)) == 614
    assert SVD().count((768, 3072), 614) == 2_357_760 < 768 * 3072 == 2_359_296
    assert SVD().count((768, 3072), 615) == 2_361_600
    assert SVD(ratio=0.5).chosen((768, 3072)) == 307
    assert SVD(ratio=0.25).chosen((768, 768)) == 96


def test_svd_of_a_known_matrix() -> None:
    weight = torch.tensor([[3.0, 0.0], [4.0, 5.0]], dtype=torch.float64)
    # W^T W = [[25, 20], [20, 25]]: singular values are the roots of 45 and 5.
    a, b = svd_factors(weight, 1)
    expected = torch.tensor([[1.5, 1.5], [4.5, 4.5]], dtype=torch.float64)
    assert torch.allclose(a @ b, expected, atol=ROUNDING)
    assert float((weight - a @ b).square().sum()) == pytest.approx(5)
    root = 45**0.25
    assert a[:, 0].tolist() == pytest.approx([root / 10**0.5, 3 * root / 10**0.5])
    assert b[0].tolist() == pytest.approx([root / 2**0.5] * 2)
    squares = torch.tensor([45.0, 5.0])
    assert [energy_rank(squares, energy) for energy in (0.5, 0.9, 0.91, 1.0)] == [1, 1, 2, 2]


def test_data_svd_keeps_the_direction_that_the_data_use() -> None:
    weight = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    inputs = torch.tensor([[0.1, 0.0], [0.0, 1.0]], dtype=torch.float64)
    a, b = data_svd_factors(weight, inputs @ inputs.T, 1)
    assert torch.allclose(a @ b, torch.diag(torch.tensor([0.0, 1.0]).double()), atol=ROUNDING)
    assert float(((weight - a @ b) @ inputs).square().sum()) == pytest.approx(0.04)
    plain = svd_factors(weight, 1)
    assert float(((weight - plain[0] @ plain[1]) @ inputs).square().sum()) == pytest.approx(1)


def test_albert_embeddings() -> None:
    # methods.md, 0.4: of ALBERT with E = 128 and H = 768, the table of 30,000 words.
    assert Embedding(128).count((30_000, 768), 128) == 30_000 * 128 + 128 * 768 == 3_938_304
    table = nn.Embedding(6, 4)
    wide = Embedding(4).split(Source(table, table.weight.detach().double(), torch.Generator()))
    words = torch.arange(6)
    assert torch.allclose(wide(words), table(words), atol=1e-5)
    assert break_even(Embedding(), (30_000, 768)) == 748


# ------------------------------------------------------------------ blocks and trains


def test_block_diagonal_keeps_one_in_g() -> None:
    assert BlockDiagonal(4).planned((768, 3072)) == 768 * 3072 // 4
    linear = nn.Linear(4, 4, bias=False)
    linear.weight.data.copy_(torch.arange(16.0).reshape(4, 4))
    source = Source(linear, linear.weight.detach().double(), torch.Generator())
    made = BlockDiagonal(2).split(source)
    whole = torch.tensor([[0.0, 1, 0, 0], [4, 5, 0, 0], [0, 0, 10, 11], [0, 0, 14, 15]])
    assert torch.equal(made(torch.eye(4)).T, whole)


def test_tensor_train_counts_and_bound() -> None:
    # methods.md, F-06: sum_k r_{k-1} m_k n_k r_k, with modes (12, 8, 8) and (12, 16, 16).
    shape = (768, 3072)
    assert TensorTrain(8).modes(shape) == ((12, 8, 8), (12, 16, 16))
    assert TensorTrain(8).count(shape, 8) == 144 * 8 + 8 * 128 * 8 + 8 * 128 == 10_368
    weight = drawn64(24, 24)
    for eps in (0.1, 0.3, 0.6):
        cores = tensor_train(weight, (2, 3, 4), (4, 3, 2), eps=eps)
        assert float((train_matrix(cores) - weight).norm()) <= eps * float(weight.norm())
    exact = tensor_train(weight, (2, 3, 4), (4, 3, 2))
    assert torch.allclose(train_matrix(exact), weight, atol=ROUNDING)
    assert sum(core.numel() for core in exact) == TensorTrain(
        99, rows=(2, 3, 4), columns=(4, 3, 2)
    ).count((24, 24), 99)


def test_block_term_counts() -> None:
    # P (prod_k R_k + sum_k m_k n_k R_k).
    assert BlockTerm(4, blocks=2).count((768, 3072), 4) == 2 * (4**3 + 4 * (144 + 128 + 128))


# ------------------------------------------------------------------ kernels


def test_tucker_2_counts_and_exactness() -> None:
    # ci r_in + r_in r_out k^2 + r_out co.
    assert Tucker2((32, 16)).planned((128, 64, 3, 3)) == 64 * 16 + 16 * 32 * 9 + 32 * 128
    kernel = drawn64(6, 5, 3, 3)
    core, factors = tucker(kernel, (6, 5, None, None))
    rebuilt = torch.einsum("abhw,oa,ib->oihw", core, factors[0], factors[1])
    assert torch.allclose(rebuilt, kernel, atol=ROUNDING)


def test_cp_recovers_a_synthetic_tensor() -> None:
    known = cp_tensor([drawn64(size, 3, seed=k) for k, size in enumerate((8, 7, 3, 3))])
    found = cp_tensor(cp(known, 3, generator=torch.Generator()))
    assert float((found - known).norm() / known.norm()) < 1e-6
    assert CP(24).planned((128, 64, 3, 3)) == 24 * (128 + 64 + 3 + 3)


def test_separable_is_exact_for_an_outer_product() -> None:
    column, row = torch.arange(1.0, 6.0).double(), torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]).double()
    kernel = torch.outer(column, row)[None, None]
    tall, wide = separable(kernel, 1)
    image = drawn64(1, 1, 9, 9)
    expected = torch.conv2d(image, kernel)
    assert torch.allclose(torch.conv2d(torch.conv2d(image, tall), wide), expected, atol=ROUNDING)
    # ci r k + r co k against ci co k^2.
    assert Separable(8).planned((32, 16, 5, 5)) == 16 * 8 * 5 + 8 * 32 * 5


def test_two_threes_see_what_a_five_sees() -> None:
    first, second = drawn64(3, 2, 3, 3), drawn64(4, 3, 3, 3, seed=1)
    kernel, image = compose_kernels(first, second), drawn64(1, 2, 8, 8, seed=2)
    assert kernel.shape == (4, 2, 5, 5)
    chained = torch.conv2d(torch.conv2d(image, first), second)
    assert torch.allclose(torch.conv2d(image, kernel), chained, atol=ROUNDING)
    # 18 c^2 in place of 25 c^2.
    assert TwoThrees(16).planned((16, 16, 5, 5)) == 18 * 16**2


def test_depthwise_separable_costs_a_share_of_the_full_kernel() -> None:
    # methods.md, F-07: (M D_K^2 + M N) / (M N D_K^2) = 1 / N + 1 / D_K^2.
    outputs, inputs, extent = 256, 128, 3
    planned = DepthwiseSeparable(1).planned((outputs, inputs, extent, extent))
    assert planned is not None
    share = planned / (outputs * inputs * extent**2)
    assert share == pytest.approx(1 / outputs + 1 / extent**2)


def test_a_depthwise_convolution_is_a_block_diagonal_one() -> None:
    depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
    full = torch.zeros(4, 4, 3, 3)
    full[torch.arange(4), torch.arange(4)] = depthwise.weight.detach()[:, 0]
    image = drawn64(2, 4, 6, 6).float()
    expected = torch.conv2d(image, full, padding=1)
    assert torch.allclose(depthwise(image), expected, atol=1e-6)
    # Such a kernel, written out in full, is split into itself and a diagonal.
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    conv.weight.data.copy_(full)
    made = DepthwiseSeparable(1).split(Source(conv, full.double(), torch.Generator()))
    assert torch.allclose(made(image), expected, atol=1e-6)
    point = made[1].weight.detach()[:, :, 0, 0]  # type: ignore[index]
    assert math.isclose(float(point.abs().sum()), float(point.diagonal().abs().sum()), rel_tol=1e-6)
