"""The formulas of the weight representations: hand-computed vectors, brute force, identities."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from laconic.errors import RecipeError
from laconic.weights import (
    Affine,
    Binary,
    Codes,
    DynamicFixedPoint,
    FixedPoint,
    KMeans,
    Laid,
    Logarithmic,
    Representation,
    Symmetric,
    Ternary,
    lay,
)
from laconic.weights.codebook import lloyd, start_centroids
from laconic.weights.lowbit import ternary_threshold
from laconic.weights.uniform import (
    FRACTIONS,
    choose_fraction,
    fraction_for,
    mse_scale,
    power_levels,
    round_to,
    smallest_scale,
)

VECTOR = torch.tensor([0.9, -1.1, 0.3, -0.2, 0.05, -0.6, 0.4, 1.5])
# Half a unit in the last printed place of the hand-computed figures.
PRINTED = 5e-8
# A few float32 roundings of numbers near one.
ROUNDING = 1e-6


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def encoded(representation: Representation, weight: Tensor, mask: Tensor | None = None) -> Codes:
    return representation.encode(weight, mask=mask, state=representation.fit(weight, mask))


def shipped(representation: Representation, weight: Tensor) -> Tensor:
    return representation.decode(encoded(representation, weight))


def sse(weight: Tensor, other: Tensor) -> float:
    return float((weight.double() - other.double()).square().sum())


def gradient(representation: Representation, weight: Tensor) -> Tensor:
    latent = weight.clone().requires_grad_()
    laid = Laid(representation, None, representation.fit(weight))
    return torch.autograd.grad(laid(latent).sum(), latent)[0]


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


# K-means.


def test_three_means_vector() -> None:
    numbers = np.array([0, 0.1, 0.2, 1, 1.1, 5])
    centroids = lloyd(numbers, start_centroids(numbers, 3, "density"), 100)
    assert centroids == pytest.approx([0.1, 1.05, 5.0])
    assert squared_distance(numbers, centroids) == pytest.approx(0.025)
    assert clusters_by_cuts(numbers, 3) == pytest.approx(0.025)


def clusters_by_cuts(numbers: np.ndarray, count: int) -> float:
    """Return the least squared error over every way to cut sorted numbers."""
    ordered = np.sort(numbers)
    ways = itertools.combinations(range(1, len(ordered)), count - 1)
    return min(
        sum(float(part.var() * part.size) for part in np.split(ordered, list(cuts)))
        for cuts in ways
    )


def squared_distance(numbers: np.ndarray, centroids: np.ndarray) -> float:
    return float(np.square(np.abs(numbers[:, None] - centroids).min(1)).sum())


@pytest.mark.parametrize("start", ["linear", "density", "random"])
def test_lloyd_is_no_worse_than_its_start(start: str) -> None:
    generator = np.random.default_rng(0)
    for _ in range(5):
        numbers = np.sort(generator.normal(size=120))
        first = start_centroids(numbers, 8, start)
        found = lloyd(numbers, first, 100)
        assert squared_distance(numbers, found) <= squared_distance(numbers, first) + 1e-12
        assert bool((np.diff(found) >= 0).all())


def test_lloyd_ends_where_every_centroid_is_the_mean_of_its_cluster() -> None:
    numbers = np.sort(np.random.default_rng(1).normal(size=300))
    found = lloyd(numbers, start_centroids(numbers, 4, "linear"), 1000)
    nearest = np.abs(numbers[:, None] - found).argmin(1)
    for cluster in range(4):
        assert found[cluster] == pytest.approx(numbers[nearest == cluster].mean())


def test_an_empty_cluster_keeps_its_centroid() -> None:
    numbers = np.array([0.0, 0.1, 10.0])
    found = lloyd(numbers, np.array([0.0, 5.0, 10.0]), 10)
    assert found.tolist() == [0.05, 5.0, 10.0]


def test_shared_weights_are_codebook_entries() -> None:
    weight, mask = torch.randn(20, 30), torch.rand(20, 30) < 0.4
    representation = KMeans(3)
    codes = encoded(representation, weight, mask)
    index = codes.streams["index"].tensor
    assert torch.equal(representation.decode(codes)[mask], codes.tables["codebook"][index.long()])
    for cluster in index.unique().tolist():
        mean = float(weight[mask][index == cluster].mean())
        assert float(codes.tables["codebook"][cluster]) == pytest.approx(mean, abs=ROUNDING)


def test_sixteen_weights_and_four_centroids_compress_3_2_times() -> None:
    # r = n b / (n log2 k + k b) = 512 / (32 + 128), Han, Mao and Dally 2016, figure 3.
    codes = encoded(KMeans(2), torch.randn(4, 4))
    coded = sum(stream.tensor.numel() * stream.bits for stream in codes.streams.values())
    tables = sum(table.numel() * 32 for table in codes.tables.values())
    assert (coded, tables) == (32, 128)
    assert 16 * 32 / (coded + tables) == pytest.approx(3.2)


def test_the_codebook_gradient_sums_over_each_cluster() -> None:
    model = nn.Linear(12, 5).double()
    mask = torch.rand(5, 12) < 0.7
    lay(model, "weight", KMeans(2), mask=mask)
    laid, inputs = model.parametrizations.weight[0], torch.randn(6, 12, dtype=torch.float64)
    leaf = model.weight.detach().requires_grad_()
    loss = nn.functional.linear(inputs, leaf, model.bias).sin().sum()
    (by_weight,) = torch.autograd.grad(loss, leaf)
    model(inputs).sin().sum().backward()
    for cluster in range(4):
        members = (laid.index == cluster) & mask
        assert float(laid.codebook.grad[cluster]) == pytest.approx(float(by_weight[members].sum()))


def test_the_codebook_gradient_is_the_finite_difference() -> None:
    model = nn.Linear(12, 5).double()
    lay(model, "weight", KMeans(2))
    laid, inputs = model.parametrizations.weight[0], torch.randn(6, 12, dtype=torch.float64)
    model(inputs).sin().sum().backward()
    step = 1e-6
    for cluster in range(4):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                laid.codebook[cluster] += sign * step
                sides.append(float(model(inputs).sin().sum()))
                laid.codebook[cluster] -= sign * step
        slope = (sides[0] - sides[1]) / (2 * step)
        assert float(laid.codebook.grad[cluster]) == pytest.approx(slope, rel=1e-5, abs=1e-7)


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
