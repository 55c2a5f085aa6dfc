"""The formulas of ternary weight splitting: a vector worked out beforehand, and identities."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from laconic.structure import split_ternary
from laconic.weights import Binary, Ternary

VECTOR = torch.tensor([0.9, -1.1, 0.3, -0.2, 0.05, -0.6, 0.4, 1.5], dtype=torch.float64)
A, B = 0.43292683, 0.39375
# Half a unit in the last printed place.
PRINTED = 5e-7
# A few hundred float64 roundings of numbers near one.
IDENTITY = 1e-12


def binary(weight: Tensor) -> Tensor:
    return Binary().decode(Binary().encode(weight))


def ternary(weight: Tensor) -> Tensor:
    return Ternary().decode(Ternary().encode(weight))


def test_the_vector() -> None:
    first, second = split_ternary(VECTOR, Ternary())
    wanted = (
        [0.389634, -0.476220, 0.69375, 0.39375, 0.44375, -0.259756, 0.79375, 0.649390],
        [0.510366, -0.623780, -0.39375, -0.59375, -0.39375, -0.340244, -0.39375, 0.850610],
    )
    assert first.tolist() == pytest.approx(wanted[0], abs=PRINTED)
    assert second.tolist() == pytest.approx(wanted[1], abs=PRINTED)
    assert float(first[0] / VECTOR[0]) == pytest.approx(A, abs=PRINTED)
    assert float(first[3]) == pytest.approx(B, abs=PRINTED)


def test_both_scales_are_half_of_the_ternary_one() -> None:
    for half in split_ternary(VECTOR, Ternary()):
        scale = Binary().encode(half).tables["scale"]
        assert float(scale) == pytest.approx(1.025 / 2, abs=IDENTITY)


def printed(weight: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """Return the halves by the paper's four sums; a sign of -1 is that of the slides."""
    size, kept = weight.abs(), ternary(weight) != 0
    up, down = ~kept & (weight > 0), ~kept & (weight <= 0)
    large, positive, negative = (size[each].sum() for each in (kept, up, down))
    a = (large + sign * (negative - positive)) / (2 * large)
    b = (len(weight) * large / kept.sum() - size.sum()) / (2 * (up | down).sum())
    first = torch.where(kept, a * weight, torch.where(up, b + weight, b))
    return first, weight - first


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_they_are_the_equations_of_the_paper(seed: int, mean: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(200, generator=generator, dtype=torch.float64) + mean
    for half, by_paper in zip(split_ternary(weight, Ternary()), printed(weight, 1), strict=True):
        assert torch.allclose(half, by_paper, rtol=0, atol=IDENTITY)


@pytest.mark.parametrize(
    ("halves", "exact"),
    [
        (lambda weight: split_ternary(weight, Ternary()), True),
        (lambda weight: printed(weight, -1), False),
    ],
    ids=["ours", "slides"],
)
def test_binary_halves_add_up_to_the_ternary(
    halves: Callable[[Tensor], tuple[Tensor, Tensor]], exact: bool
) -> None:
    first, second = halves(VECTOR)
    assert torch.allclose(first + second, VECTOR, rtol=0, atol=IDENTITY)
    error = float((binary(first) + binary(second) - ternary(VECTOR)).abs().max())
    assert error < IDENTITY if exact else error > 0.005
