"""The formulas of ternary and binary weights: vectors by hand and the best of all supports."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from helpers.weights import PRINTED, ROUNDING, VECTOR, encoded, shipped, sse
from laconic.weights import Binary, Representation, Ternary
from laconic.weights.lowbit import ternary_threshold

HALF = 2**-10  # the spacing of float16, for a threshold and a scale

# Ternary (TWN).


@pytest.mark.parametrize("threshold", ["heuristic", "exact"])
def test_ternary_vector(threshold: str) -> None:
    codes = encoded(Ternary(threshold=threshold), VECTOR)
    assert (codes.streams["code"].tensor.int() - 1).tolist() == [1, -1, 0, 0, 0, -1, 0, 1]
    assert codes.streams["code"].bits == 2
    assert float(codes.tables["scale"]) == pytest.approx(1.025, abs=ROUNDING)
    assert sse(VECTOR, shipped(Ternary(threshold=threshold), VECTOR)) == pytest.approx(0.72)


def test_ternary_threshold_is_strict() -> None:
    weight = torch.tensor([0.0, 1.0, -2.0, 3.0])
    for _ in range(50):  # until the first weight is its own threshold
        weight[0] = ternary_threshold(weight.abs()[None], 4)
    assert weight[0] == 0.7 * weight.abs().mean() > 1
    assert shipped(Ternary(), weight).tolist() == [0, 0, -2.5, 2.5]


def ternary_by_supports(weight: Tensor) -> float:
    """Return the least squared error over every non-empty support."""
    size = weight.abs().double()
    best = float(size.square().sum())
    for taken in itertools.product([False, True], repeat=len(weight)):
        support = torch.tensor(taken)
        if support.any():
            scale = size[support].mean()
            error = (size - scale * support).square().sum()
            best = min(best, float(error))
    return best


@pytest.mark.parametrize("count", range(1, 11))
def test_exact_ternary_is_the_best_of_all_supports(count: int) -> None:
    for _ in range(3 if count > 8 else 10):
        weight = torch.randn(count)
        exact = sse(weight, shipped(Ternary(threshold="exact"), weight))
        assert exact == pytest.approx(ternary_by_supports(weight), abs=ROUNDING)


def test_exact_ternary_never_parts_equal_weights() -> None:
    weight = torch.tensor([1.0, 1.0, -0.6, 0.6, 0.6, -0.6, 0.1])
    decoded = shipped(Ternary(threshold="exact"), weight)
    assert decoded[2:6].abs().unique().numel() == 1
    assert sse(weight, decoded) == pytest.approx(ternary_by_supports(weight), abs=ROUNDING)


def test_ternary_scale_is_the_least_squares_one_of_its_signs() -> None:
    weight = torch.randn(500)
    decoded = shipped(Ternary(), weight)
    signs = decoded.sign()
    best = (weight * signs).sum() / signs.square().sum()
    assert torch.allclose(decoded, best * signs, atol=ROUNDING)
    assert sse(weight, shipped(Ternary(threshold="exact"), weight)) <= sse(weight, decoded)


# Binary (BWN).


def test_binary_vector() -> None:
    codes = encoded(Binary(), VECTOR)
    assert codes.streams["code"].tensor.tolist() == [1, 0, 1, 0, 1, 0, 1, 1]
    assert float(codes.tables["scale"]) == pytest.approx(0.63125, abs=PRINTED)
    assert sse(VECTOR, shipped(Binary(), VECTOR)) == pytest.approx(1.7346875, abs=ROUNDING)


def test_the_sign_of_zero_is_plus() -> None:
    assert shipped(Binary(), torch.tensor([0.0, -0.0, 3.0])).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("count", range(1, 11))
def test_binary_is_the_best_of_all_sign_vectors(count: int) -> None:
    weight = torch.randn(count)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=count)), dtype=torch.float64)
    scales = (signs * weight).mean(1, keepdim=True)
    best = float((weight - scales * signs).square().sum(1).min())
    assert sse(weight, shipped(Binary(), weight)) == pytest.approx(best, abs=ROUNDING)


@pytest.mark.parametrize("representation", [Binary(), Ternary(), Ternary(threshold="exact")])
def test_sums_over_many_halves_do_not_end_at_the_largest_half(
    representation: Representation,
) -> None:
    weight = torch.linspace(-2, 2, 400_000).half()  # the sizes add up to 400,000
    found, wide = (representation.encode(each).tables["scale"] for each in (weight, weight.float()))
    assert found.dtype == torch.float16
    assert torch.allclose(found.float(), wide, rtol=HALF)
