"""Ranks of factorize: a full one changes nothing, and what a ratio, an energy and a plan give."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from helpers.factorize import CLOSE, CONV, DATA, GEOMETRIES, LINEAR, images, source, split, weights
from laconic.models.factored import BlockDiagonalLinear, BlockTermLinear, Reorder
from laconic.structure.columns import groups_of
from laconic.structure.factorization import Factorization, break_even, latent, shape_of
from laconic.structure.kernels import CP, DepthwiseSeparable, Separable, Tucker2, TwoThrees
from laconic.structure.matrices import SVD, BlockDiagonal, BlockTerm, Embedding, TensorTrain

# ------------------------------------------------------------------ at full rank nothing changes


def full(kind: str, conv: nn.Conv2d) -> Factorization:
    """Return a factorization of a rank at which it is exact."""
    outputs, inputs, height, width = shape_of(conv)
    made: dict[str, Factorization] = {
        "svd": SVD(min(outputs, inputs * height * width)),
        "tucker": Tucker2((outputs, inputs), sweeps=1),
        "separable": Separable(min(inputs * height, outputs * width)),
        "depthwise": DepthwiseSeparable(min(outputs, height * width)),
        "threes": TwoThrees(4 * inputs, sweeps=1),
    }
    return made[kind]


@pytest.mark.parametrize("kind", ["svd", "tucker", "separable", "depthwise", "threes"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_convolution_at_full_rank_computes_the_same(kind: str, geometry: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 5, **GEOMETRIES[geometry])
    made = split(full(kind, conv), conv)
    x = images(2, 4, 12, 11)
    assert torch.allclose(made(x), conv(x), atol=CLOSE)
    assert isinstance(made, nn.Sequential) and {type(part) for part in made} == {nn.Conv2d}


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (2, 4)])
def test_kernels_of_any_extent_are_split(shape: tuple[int, int]) -> None:
    conv = nn.Conv2d(3, 6, shape, stride=2, padding=(0, 0))
    x = images(2, 3, 9, 9)
    for kind in ("svd", "tucker", "separable", "depthwise"):
        made = split(full(kind, conv), conv)
        assert torch.allclose(made(x), conv(x), atol=CLOSE)
    rank = math.prod(shape) * 3
    assert split(CP(rank, sweeps=1), conv)(x).shape == conv(x).shape


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_cp_of_a_kernel_of_known_rank_computes_the_same(geometry: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 5, **GEOMETRIES[geometry])
    outputs, inputs, height, width = shape_of(conv)
    sizes = (groups_of(conv), outputs, inputs, height, width)
    out, into, rows, columns = (torch.randn(sizes[0], size, 2) for size in sizes[1:])
    kernels = torch.einsum("gor,gir,ghr,gwr->goihw", out, into, rows, columns)
    conv.weight.data.copy_(kernels.flatten(0, 1))
    made = split(CP(2, sweeps=500), conv)
    x = images(2, 4, 12, 11)
    assert torch.allclose(made(x), conv(x), rtol=1e-2, atol=0.05)
    assert [part.groups for part in made] == [  # type: ignore[union-attr]
        sizes[0], 2 * sizes[0], 2 * sizes[0], sizes[0]
    ]  # fmt: skip


@pytest.mark.parametrize("order", ["given", "energy"])
@pytest.mark.parametrize("groups", [1, 2])
def test_block_diagonal_convolutions_keep_their_blocks(order: str, groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, padding=1, stride=2, groups=groups)
    shuffle = torch.randperm(12 // groups), torch.randperm(8 // groups)
    pattern = torch.block_diag(*torch.ones(2, 6 // groups, 4 // groups))
    if order == "energy":
        pattern = pattern[shuffle[0]][:, shuffle[1]]
    conv.weight.data *= pattern.repeat(groups, 1)[:, :, None, None]
    x = images(2, 8, 7, 7)
    made = split(BlockDiagonal(2, order=order), conv)  # type: ignore[arg-type]
    assert torch.allclose(made(x), conv(x), atol=CLOSE)
    assert weights(made) == conv.weight.numel() // 2


@pytest.mark.parametrize("order", ["given", "energy"])
def test_a_block_diagonal_linear_layer_keeps_its_blocks(order: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 12)
    whole = torch.block_diag(*torch.rand(4, 3, 2) + 0.1)
    if order == "energy":
        whole = whole[torch.randperm(12)][:, torch.randperm(8)]
    linear.weight.data.copy_(whole)
    made = split(BlockDiagonal(4, order=order), linear)  # type: ignore[arg-type]
    for shape in [(8,), (3, 8), (2, 3, 8)]:
        assert torch.allclose(made(images(*shape)), linear(images(*shape)), atol=CLOSE)
    kinds = [BlockDiagonalLinear] if order == "given" else [Reorder, BlockDiagonalLinear, Reorder]
    assert [type(part) for part in made.modules() if not list(part.children())] == kinds


@pytest.mark.parametrize(
    "method", [SVD(12), TensorTrain(10**6), TensorTrain(eps=1e-6), TensorTrain(99, rows=(3, 4))]
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_at_full_rank_computes_the_same(method: Factorization, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 12, bias=bias)
    made = split(method, linear)
    for shape in [(16,), (5, 16), (2, 5, 16)]:
        assert torch.allclose(made(images(*shape)), linear(images(*shape)), atol=CLOSE)


def test_block_terms_of_full_rank_compute_the_same() -> None:
    linear = nn.Linear(12, 8)
    made = split(BlockTerm(100, blocks=1, cores=2), linear)
    assert isinstance(made, BlockTermLinear)
    assert torch.allclose(made(images(3, 12)), linear(images(3, 12)), atol=CLOSE)


def test_an_embedding_of_full_width_gives_the_same_rows() -> None:
    table = nn.Embedding(9, 5, padding_idx=2)
    made = split(Embedding(5), table)
    indices = torch.tensor([[0, 2, 8], [1, 1, 7]])
    assert torch.allclose(made(indices), table(indices), atol=CLOSE)
    assert [type(part) for part in made.children()] == [nn.Embedding, nn.Linear]
    assert made[0].padding_idx == 2  # type: ignore[index]


# ------------------------------------------------------------------ what is planned comes out


@pytest.mark.parametrize("method", [*LINEAR, *CONV], ids=repr)
def test_the_planned_count_is_the_count(method: Factorization) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(32, 24), nn.Conv2d(8, 16, 5), nn.Conv2d(8, 16, 5, groups=2)]
    fitting = [module for module in layers if method.fits(module)]
    assert fitting
    for module in fitting:
        side = math.prod(latent(module).shape[1:])
        moments = torch.eye(side).double().expand(groups_of(module), side, side)
        made = split(method, module, moments)
        planned = method.planned(shape_of(module))
        if planned is not None:
            assert weights(made) == planned * groups_of(module)
        assert weights(made) < latent(module).numel()


@pytest.mark.parametrize(
    "method", [SVD(), DATA, Separable(), CP(), DepthwiseSeparable(), TwoThrees()], ids=repr
)
def test_a_ratio_is_the_most_that_is_left(method: Any) -> None:
    for shape in [(64, 32, 5, 5), (7, 11, 3, 5)]:
        for ratio in (0.1, 0.25, 0.5, 0.9):
            chosen = method.model_copy(update={"ratio": ratio})
            rank, most = chosen.chosen(shape), ratio * math.prod(shape)
            assert chosen.planned(shape) == method.count(shape, rank)
            assert method.count(shape, rank) <= most or rank == 1
            assert method.count(shape, rank + 1) > most
        assert method.planned(shape) == method.model_copy(update={"ratio": 0.5}).planned(shape)


def test_a_ratio_of_tucker_divides_both_channels_alike() -> None:
    for ratio in (0.1, 0.25, 0.5, 0.9):
        planned = Tucker2(ratio=ratio).planned((64, 32, 3, 3))
        assert planned is not None and 0.9 * ratio < planned / (64 * 32 * 9) <= ratio
    made = split(Tucker2(ratio=0.5), nn.Conv2d(32, 64, 3))
    outer, inner = made[1].out_channels, made[1].in_channels  # type: ignore[index]
    assert outer // 2 == inner


def test_an_energy_is_reached_and_no_rank_below_reaches_it() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, groups=2)
    for method in (SVD(energy=0.7), Separable(energy=0.7), DepthwiseSeparable(energy=0.7)):
        rank = method.rank_for(source(conv))
        squares = method.spectrum(source(conv))
        assert float(squares.sum()) == pytest.approx(
            float(conv.weight.data.square().sum()), rel=1e-5
        )
        assert float(squares[:rank].sum()) >= 0.7 * float(squares.sum())
        assert float(squares[: rank - 1].sum()) < 0.7 * float(squares.sum())


def test_the_break_even_rank_is_the_largest_that_is_smaller() -> None:
    for method in (SVD(), CP(), Separable(), Tucker2(), DepthwiseSeparable(), TwoThrees()):
        shape = (16, 8, 5, 5)
        rank = break_even(method, shape)
        assert method.count(shape, rank) < math.prod(shape) <= method.count(shape, rank + 1)
    assert break_even(SVD(), (1, 9)) == 0
