"""The formulas of symmetric, affine, fixed-point and logarithmic weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.weights import PRINTED, ROUNDING, VECTOR, encoded, gradient, shipped, sse
from laconic.weights import Affine, DynamicFixedPoint, FixedPoint, Laid, Logarithmic, Symmetric
from laconic.weights.uniform import (
    FRACTIONS,
    choose_fraction,
    fraction_for,
    mse_scale,
    power_levels,
    smallest_scale,
)

# Symmetric.


@pytest.mark.parametrize(
    ("bits", "scale", "levels"),
    [
        (8, 0.0118110, [76, -93, 25, -17, 4, -51, 34, 127]),
        (4, 0.2142857, [4, -5, 1, -1, 0, -3, 2, 7]),
        (2, 1.5, [1, -1, 0, 0, 0, 0, 0, 1]),
    ],
)
def test_symmetric_narrow_vector(bits: int, scale: float, levels: list[int]) -> None:
    codes = encoded(Symmetric(bits), VECTOR)
    assert float(codes.tables["scale"]) == pytest.approx(scale, abs=PRINTED)
    lowest = 2 ** (bits - 1) - 1
    assert (codes.streams["code"].tensor.int() - lowest).tolist() == levels


def test_full_levels_use_the_extra_negative_one() -> None:
    weight = torch.tensor([-8.0, 1.0, 7.0])
    assert torch.equal(shipped(Symmetric(4, levels="full"), weight), weight)
    assert not torch.equal(shipped(Symmetric(4), weight), weight)
    assert encoded(Symmetric(4, levels="full"), weight).streams["code"].tensor.tolist() == [
        0,
        9,
        15,
    ]


@pytest.mark.parametrize("levels", ["narrow", "full"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_max_range_errs_by_half_a_step_and_clips_nothing(bits: int, levels: str) -> None:
    weight = torch.randn(5, 200)
    representation = Symmetric(bits, granularity="row", levels=levels)
    scale = encoded(representation, weight).tables["scale"][:, None]
    error = (shipped(representation, weight) - weight).abs()
    assert bool((error <= scale * (0.5 + ROUNDING * 2**bits)).all())
    assert torch.equal(gradient(representation, weight), torch.ones(5, 200))


def test_symmetric_narrow_is_odd_and_monotone() -> None:
    weight = torch.randn(300).sort().values
    decoded = shipped(Symmetric(3), weight)
    assert torch.equal(shipped(Symmetric(3), -weight), -decoded + 0.0)
    assert bool((decoded.diff() >= 0).all())


def test_symmetric_codes_are_idempotent_with_nearest_rounding() -> None:
    for bits in range(2, 9):
        weight = torch.randn(4, 300)
        first = encoded(Symmetric(bits), weight)
        again = encoded(Symmetric(bits), Symmetric(bits).decode(first))
        assert torch.equal(first.streams["code"].tensor, again.streams["code"].tensor)


def test_an_all_zero_weight_has_scale_one() -> None:
    codes = encoded(Symmetric(8, granularity="row"), torch.tensor([[0.0, 0.0], [1.27, 0.0]]))
    assert codes.tables["scale"][0] == 1.0
    assert codes.tables["scale"][1] == pytest.approx(0.01)


def test_mse_scale_is_the_best_of_a_hundred_fractions() -> None:
    weight = torch.randn(3, 400) ** 3
    found = mse_scale(weight, -3, 3)
    for row, scale in zip(weight, found, strict=True):
        largest = float(row.abs().max()) / 3
        errors = {
            step: sse(
                row, (row / (largest * step / 100)).round().clamp(-3, 3) * largest * step / 100
            )
            for step in range(1, 101)
        }
        best = min(errors, key=errors.__getitem__)
        assert float(scale) == pytest.approx(largest * best / 100, rel=ROUNDING)
        assert best < 100
    assert bool((found <= smallest_scale(weight, -3, 3)).all())


def test_mse_range_clips_and_stops_the_gradient_at_both_ends() -> None:
    weight = torch.cat([torch.full((200,), 0.1), torch.tensor([-1.0, 1.0])])
    representation = Symmetric(2, range="mse")
    state = representation.fit(weight)
    # 200 (0.1 - s)^2 + 2 (1 - s)^2 is least at s = 22 / 202, on the grid at 0.11.
    assert float(state["scale"]) == pytest.approx(0.11)
    scale = float(state["scale"])
    latent = torch.tensor([-1.0, -scale, -0.1, 0.0, 0.1, scale, 1.0], requires_grad=True)
    Laid(representation, None, state)(latent).sum().backward()
    assert latent.grad.tolist() == [0, 0, 1, 1, 1, 0, 0]


def test_mse_range_stays_where_it_was_laid() -> None:
    weight = torch.randn(100)
    laid = Laid(Symmetric(4, range="mse"), None, Symmetric(4, range="mse").fit(weight))
    before = laid.encode(weight).tables["scale"]
    assert torch.equal(laid.encode(100 * weight).tables["scale"], before)


# Affine.


def test_affine_vector() -> None:
    weight = torch.tensor([-10.0, 30.0, 10.0])
    assert encoded(Affine(8), weight).streams["code"].tensor.tolist() == [0, 255, 128]
    decoded = shipped(Affine(8), weight)
    assert decoded[:2].tolist() == [-10.0, 30.0]
    assert float(decoded[2]) == pytest.approx(128 * 40 / 255 - 10, rel=ROUNDING)


@pytest.mark.parametrize("bits", range(1, 9))
def test_affine_reproduces_both_ends_exactly(bits: int) -> None:
    weight = torch.randn(50, 30) * torch.logspace(-6, 6, 50)[:, None]
    decoded = shipped(Affine(bits, "row"), weight)
    assert torch.equal(decoded.amin(1), weight.amin(1))
    assert torch.equal(decoded.amax(1), weight.amax(1))
    half = (weight.amax(1) - weight.amin(1)) / (2**bits - 1) / 2
    assert bool(((decoded - weight).abs() <= half[:, None] * (1 + 2**bits * ROUNDING)).all())


@pytest.mark.parametrize("number", [0.0, 0.3, -1e-20, 7e5])
def test_a_constant_weight_is_itself(number: float) -> None:
    weight = torch.full((3, 4), number)
    assert torch.equal(shipped(Affine(2), weight), weight)


# Fixed point.


def test_fixed_point_formula() -> None:
    weight = torch.tensor([0.3, -0.3, 5.0, -9.0, 0.125, 0.375])
    expected = (weight * 4).round().clamp(-8, 7) / 4
    assert torch.equal(shipped(FixedPoint(4, 2), weight), expected)
    assert expected.tolist() == [0.25, -0.25, 1.75, -2.0, 0.0, 0.5]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fraction_bits_from_the_largest_number(bits: int) -> None:
    for size in (0.7, 1.0, 0.999, 3.0, 4.0, 1e-4, 1e4):
        integer = int(np.floor(np.log2(size))) + 1
        assert fraction_for(size, bits) == bits - 1 - integer
    assert fraction_for(1e38, bits) >= FRACTIONS[0] and fraction_for(1e-45, bits) <= FRACTIONS[1]


def test_steps_are_powers_of_two() -> None:
    for scale in (1e-20, 0.01, 1.0, 1e20):
        step = encoded(FixedPoint(8), torch.randn(20) * scale).tables["step"]
        assert step.frexp().mantissa.item() == 0.5


def test_fixed_point_stops_the_gradient_outside_its_range() -> None:
    weight = torch.tensor([-2.1, -2.0, -1.9, 1.7, 1.75, 1.8])
    assert gradient(FixedPoint(4, 2), weight).tolist() == [0, 0, 1, 1, 0, 0]
    assert gradient(FixedPoint(4), weight).tolist() == [1] * 6


def layers() -> dict[str, Tensor]:
    return {f"layer{index}": torch.randn(600) * scale for index, scale in enumerate((0.02, 0.3, 2))}


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("choose", ["max", "mse"])
def test_dynamic_fixed_point_errs_no_more_than_fixed(bits: int, choose: str) -> None:
    weights = layers()
    fixed = FixedPoint(bits).resolve(weights)
    dynamic = DynamicFixedPoint(bits, choose=choose).resolve(weights)
    assert len(set(fixed.values())) == 1 and len(set(dynamic.values())) > 1
    for name, weight in weights.items():
        assert sse(weight, shipped(dynamic[name], weight)) <= sse(
            weight, shipped(fixed[name], weight)
        )


def test_mse_fraction_is_the_best_of_all() -> None:
    for weight in (*layers().values(), torch.tensor([0.999]), torch.tensor([-1.0, 1.0, 0.9])):
        errors = {f: sse(weight, shipped(FixedPoint(4, f), weight)) for f in range(-20, 40)}
        chosen = choose_fraction(weight, 4, "mse")
        assert errors[chosen] == min(errors.values())


def test_in_a_common_range_dynamic_and_fixed_agree() -> None:
    weights = {"a": torch.tensor([0.6, 0.1]), "b": torch.tensor([-0.9, 0.2])}
    assert FixedPoint(6).resolve(weights) == DynamicFixedPoint(6).resolve(weights)


def test_overflow_rule_lets_one_in_ten_thousand_overflow() -> None:
    weight = torch.full((20_000,), 0.4)
    weight[:2] = 100.0
    assert choose_fraction(weight, 8, "overflow") == fraction_for(0.4, 8)
    weight[2] = 100.0
    assert choose_fraction(weight, 8, "overflow") == fraction_for(100.0, 8)
    assert choose_fraction(weight[2:100], 8, "overflow") == fraction_for(100.0, 8)


def test_the_layer_of_zeros_does_not_set_the_fraction() -> None:
    weights = {"zero": torch.zeros(3), "small": torch.tensor([0.01])}
    assert FixedPoint(8).resolve(weights)["zero"].fraction == fraction_for(0.01, 8)


# Logarithmic.


def codebook(bits: int, top: float) -> Tensor:
    levels = torch.tensor(power_levels(bits), dtype=torch.float64) * top
    return torch.cat([-levels.flip(0), torch.zeros(1), levels])


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_linear_rounding_takes_the_nearest_of_the_codebook(bits: int) -> None:
    weight = torch.randn(2000)
    entries = codebook(bits, float(weight.abs().max()))
    nearest = (weight.double()[:, None] - entries).abs().argmin(1)
    code = encoded(Logarithmic(bits, rounding="linear"), weight).streams["code"].tensor
    assert torch.equal(code.long(), nearest)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_log_rounding_rounds_the_exponent(bits: int) -> None:
    weight = torch.randn(2000)
    top = weight.abs().max()
    count = 2 ** (bits - 1) - 1
    exponent = (weight.abs() / top).double().log2().round()
    expected = weight.sign() * top * torch.exp2(exponent) * (exponent > -count)
    assert torch.allclose(shipped(Logarithmic(bits), weight).double(), expected, rtol=1e-6)


def test_the_two_roundings_differ_between_sqrt_two_and_one_and_a_half() -> None:
    weight = torch.tensor([1.0, 1.40 / 2, 1.45 / 2, 1.49 / 2, 1.51 / 2])
    assert shipped(Logarithmic(4), weight).tolist() == [1.0, 0.5, 1.0, 1.0, 1.0]
    linear = Logarithmic(4, rounding="linear")
    assert shipped(linear, weight).tolist() == [1.0, 0.5, 0.5, 0.5, 1.0]


def test_a_number_on_a_threshold_is_rounded_up() -> None:
    weight = torch.tensor([1.0, -0.75, 0.375, 0.125, 0.12])
    decoded = shipped(Logarithmic(3, rounding="linear"), weight)
    assert decoded.tolist() == [1.0, -1.0, 0.5, 0.25, 0.0]


def test_the_levels_are_powers_of_two_times_the_largest() -> None:
    weight = torch.randn(4000)
    levels = shipped(Logarithmic(4), weight).unique()
    assert levels.numel() == 15
    assert torch.equal(levels.double(), codebook(4, float(weight.abs().max())))
    again = encoded(Logarithmic(4), shipped(Logarithmic(4), weight))
    assert torch.equal(
        again.streams["code"].tensor, encoded(Logarithmic(4), weight).streams["code"].tensor
    )
