"""What weight representations have in common: rounding, noise, scaling, rows, their fields."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from helpers.weights import ROUNDING, shipped
from laconic.errors import RecipeError
from laconic.weights import (
    Affine,
    Binary,
    FixedPoint,
    KMeans,
    Logarithmic,
    Representation,
    Symmetric,
    Ternary,
)
from laconic.weights.uniform import round_to


@pytest.mark.parametrize("representation", [Ternary(), Ternary(threshold="exact"), Binary()])
def test_scaling_the_weight_scales_the_result(representation: Representation) -> None:
    weight = torch.randn(50)
    assert torch.equal(shipped(representation, 4 * weight), 4 * shipped(representation, weight))


@pytest.mark.parametrize(
    "make",
    [Ternary, lambda how: Ternary(how, threshold="exact"), Binary, lambda how: Affine(3, how)],
    ids=["ternary", "exact", "binary", "affine"],
)
def test_rows_are_represented_one_by_one(make: Callable[[object], Representation]) -> None:
    weight, mask = torch.randn(6, 10), torch.rand(6, 10) < 0.6
    mask[3] = False
    codes = make("row").encode(weight, mask=mask)
    decoded = make("row").decode(codes)
    for row in range(6):
        own = make("tensor").encode(weight[row], mask=mask[row])
        assert torch.allclose(decoded[row], make("tensor").decode(own), atol=ROUNDING)


# Rounding.


def test_nearest_rounding_breaks_ties_to_even() -> None:
    assert round_to(torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])).tolist() == [-2, 0, 0, 2, 2]


@pytest.mark.parametrize("value", [0.1, 0.5, 2.75, -1.3])
@pytest.mark.parametrize("rounding", ["stochastic", "equal"])
def test_mean_of_random_rounding(value: float, rounding: str) -> None:
    count = 100_000
    rounded = round_to(torch.full((count,), value), rounding, torch.Generator().manual_seed(1))
    floor = np.floor(value)
    chance = value - floor if rounding == "stochastic" else 0.5
    three_sigma = 3 * np.sqrt(chance * (1 - chance) / count)
    assert float(rounded.double().mean()) == pytest.approx(floor + chance, abs=three_sigma)
    assert set(rounded.unique().tolist()) == {floor, floor + 1}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "equal"])
def test_integers_are_not_rounded(rounding: str) -> None:
    integers = torch.arange(-500.0, 500.0)
    assert torch.equal(round_to(integers, rounding), integers)


def test_stochastic_rounding_keeps_what_nearest_kills() -> None:
    weight = torch.cat([torch.ones(1), torch.full((50_000,), 0.1)])
    nearest, stochastic = Symmetric(2), Symmetric(2, rounding="stochastic")
    assert not bool(shipped(nearest, weight)[1:].any())
    assert float(shipped(stochastic, weight)[1:].mean()) == pytest.approx(0.1, abs=0.005)


def test_noise_is_a_function_of_the_counter() -> None:
    weight, representation = torch.randn(1000), FixedPoint(3, 1, rounding="stochastic")
    states = [{"noise": torch.tensor(number)} for number in (5, 5, 6)]
    first, second, third = (representation.encode(weight, state=state) for state in states)
    assert torch.equal(first.streams["code"].tensor, second.streams["code"].tensor)
    assert not torch.equal(first.streams["code"].tensor, third.streams["code"].tensor)
    representation.update(states[0])
    assert int(states[0]["noise"]) == 6


# Fields.


@pytest.mark.parametrize(
    "make",
    [
        lambda: Symmetric(1),
        lambda: Symmetric(9),
        lambda: Affine(0),
        lambda: FixedPoint(1),
        lambda: FixedPoint(8, 1000),
        lambda: Logarithmic(1),
        lambda: KMeans(9),
        lambda: Symmetric(4, granularity=0),
        lambda: Ternary("column"),
        lambda: Symmetric(4, rounding="up"),
    ],
)
def test_fields_out_of_bounds_are_refused(make: Callable[[], Representation]) -> None:
    with pytest.raises(RecipeError):
        make()


def test_a_bare_number_means_symmetric() -> None:
    assert Representation.coerce(4) == Symmetric(4)
    assert Representation.coerce({"ternary": "row"}) == Ternary("row")
    assert Representation.coerce({"fixed_point": {"bits": 6, "fraction": 3}}) == FixedPoint(6, 3)
