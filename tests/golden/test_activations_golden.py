"""The formulas of rounded activations, on numbers worked out beforehand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from laconic.weights import LearnedClip, LearnedSpacing, MinMax
from laconic.weights.activations import grid

# Half a unit in the last printed place of the figures.
CLOSE = 5e-8


def test_the_first_spacing_of_learned_levels() -> None:
    numbers = torch.tensor([-0.5, 0.2, 0.8, 1.0])
    for levels, expected in (("symmetric", 0.47245559), ("asymmetric", 0.64549722)):
        activation = LearnedSpacing(4, levels=levels)
        state = activation.start()
        activation.observe(numbers, state, training=True)
        assert float(state["scale"]) == pytest.approx(expected, abs=CLOSE)


def test_the_gradient_of_learned_levels() -> None:
    # Esser et al. 2020, equation 3: round(v) - v inside, the last level beyond; times 1/sqrt(n Qp).
    numbers = torch.tensor([0.3, 0.9, 5.0, -9.0])
    activation = LearnedSpacing(2, levels="symmetric")
    scale = torch.tensor(1.0, requires_grad=True)
    activation.rounded(numbers, {"scale": scale}).sum().backward()
    expected = ((0 - 0.3) + (1 - 0.9) + 1 - 2) / (4 * 1) ** 0.5
    assert scale.grad is not None and float(scale.grad) == pytest.approx(expected, abs=CLOSE)


def test_the_gradient_of_learned_levels_that_begin_at_the_smallest_number() -> None:
    # BinaryBERT, AsymLsqQuantizer, on x - min x = 0, 2.3, 2.9, 7: round(v) - v inside, 3 above.
    numbers = torch.tensor([-2.0, 0.3, 0.9, 5.0], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    rounded = LearnedSpacing(2).rounded(numbers, {"scale": scale})
    assert rounded.tolist() == [-2, 0, 1, 1]
    rounded.sum().backward()
    expected = (0 - 0.3 + 0.1 + 3) / (4 * 3) ** 0.5
    assert scale.grad is not None and float(scale.grad) == pytest.approx(expected, abs=CLOSE)
    assert numbers.grad is not None and numbers.grad.tolist() == [1, 1, 1, 0]


def test_a_learned_clip_moves_with_what_it_clips() -> None:
    place = {n: t.requires_grad_() for n, t in LearnedClip(low=-1, high=2).start().items()}
    numbers = torch.tensor([-3.0, -1.0, 0.0, 1.9, 2.0, 7.0])
    weights = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    (LearnedClip().rounded(numbers, place) * weights).sum().backward()
    assert float(place["low"].grad) == 3 and float(place["high"].grad) == 48


def test_levels_lie_within_what_a_learned_clip_leaves() -> None:
    # BinaryBERT scales by the extremes of the clipped tensor: (0.75 - 0) / 3, then (2 + 1) / 3.
    activation = LearnedClip(2, low=-1, high=2)
    for numbers, spacing in (((0.0, 0.25, 0.75), 0.25), ((-4.0, 0.4, 9.0), 1.0)):
        scale, _, _ = activation.grid_of(torch.tensor(numbers), activation.start())
        assert float(scale) == spacing


def test_an_asymmetric_grid_of_eight_bits() -> None:
    codes, _, zero_point = MinMax(8).codes(torch.tensor([-10.0, 30.0, 10.0]), {})
    assert codes.tolist() == [0, 255, 128] and int(zero_point) == 64


@pytest.mark.parametrize("levels", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("high", [0.0, -0.01])
def test_a_learned_clip_whose_limits_have_crossed_zero_leaves_nothing(
    levels: Any, high: float
) -> None:
    activation, numbers = LearnedClip(8, levels=levels), torch.tensor([0.0, 0.7, 3.0, 7.0])
    limits = {"low": torch.tensor(0.0), "high": torch.tensor(high)}
    assert not activation.rounded(numbers, limits).any()


@pytest.mark.parametrize("levels", ["symmetric", "asymmetric"])
def test_an_empty_range_has_one_level(levels: Any) -> None:
    found = grid(torch.tensor(0.0), torch.tensor(0.0), 8, levels)
    assert [float(each) for each in found] == [1, 0, 0]


def test_a_spacing_that_has_crossed_zero_comes_back_and_a_blank_one_stays() -> None:
    activation, place = LearnedSpacing(4), {"scale": torch.tensor(-0.5)}
    activation.update(place)
    assert 0 < float(place["scale"]) < 1e-30
    blank = activation.start()
    activation.update(blank)
    assert float(blank["scale"]) == 0
