"""The learned step: its start, its gradients against the formula as a function, its sign."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laconic.recover import SGD, AdamW, Constant, Stop, Train
from laconic.step import State, run_step
from laconic.tasks import Task
from laconic.weights import Groups, Laid, LearnedStep, Symmetric, lay
from laconic.weights.laid import laid_tensors
from laconic.weights.learned_step import first_step

# Half a unit in the last printed place of the hand-computed figures.
PRINTED = 5e-8
# Gradients that come and go in bfloat16, which has eight bits.
HALVES = 2e-2
# Sums of a few hundred float32 products in another order.
SUMS = 1e-5


class LSQ(torch.autograd.Function):
    """Esser et al. 2020 written down directly, for one scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.ends = low, high
        return (x / scale).round().clamp(low, high) * scale

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        low, high = ctx.ends
        q = x / scale
        small, big = q < low, q > high
        middle = ~(small | big)
        ds = (g * (small * low + big * high + middle * (q.round() - q))).sum()
        return g * middle, ds.reshape(1) / math.sqrt(x.numel() * high), None, None


def test_start_vector() -> None:
    weight = torch.tensor([-0.5, 0.2, 0.8, 1.0])
    assert float(LearnedStep(4).fit(weight)["scale"]) == pytest.approx(0.47245559, abs=PRINTED)
    assert (
        first_step(weight.abs().mean()[None], 7).tolist()
        == LearnedStep(4).fit(weight)["scale"].tolist()
    )


def test_the_start_counts_survivors_of_its_group() -> None:
    weight, mask = torch.randn(4, 6), torch.rand(4, 6) < 0.5
    mask[2] = False
    found = LearnedStep(3, granularity="row").fit(weight, mask)["scale"]
    for row in (0, 1, 3):
        expected = 2 * weight[row][mask[row]].abs().mean() / math.sqrt(3)
        assert float(found[row]) == pytest.approx(float(expected))
    assert float(found[2]) == 1.0


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("factor", [0.1, 1.0, 3.0])
def test_forward_and_gradients_are_the_formula(bits: int, factor: float) -> None:
    weight, flow = torch.randn(20, 30), torch.randn(20, 30)
    representation = LearnedStep(bits)
    state = {"scale": representation.fit(weight)["scale"] * factor}
    laid, latent = Laid(representation, None, state), weight.clone().requires_grad_()
    output = laid(latent)
    (output * flow).sum().backward()
    x, scale = weight.clone().requires_grad_(), state["scale"].clone().requires_grad_()
    expected = LSQ.apply(x, scale, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    (expected * flow).sum().backward()
    assert torch.equal(output, expected)
    assert torch.equal(latent.grad, x.grad)
    assert float(laid.scale.grad) == pytest.approx(float(scale.grad), rel=SUMS, abs=SUMS)
    if factor < 1:
        assert not bool(latent.grad.all())


@pytest.mark.parametrize("granularity", ["row", 5, Groups(2)])
def test_every_group_has_a_scale_and_a_gradient_of_its_own(granularity: Any) -> None:
    weight, flow = torch.randn(4, 10), torch.randn(4, 10)
    representation = LearnedStep(3, granularity=granularity)
    laid = Laid(representation, None, representation.fit(weight))
    (laid(weight) * flow).sum().backward()
    parts = zip(
        *(each.reshape(len(laid.scale), -1) for each in (weight, flow)),
        laid.scale.detach(),
        laid.scale.grad,
        strict=True,
    )
    for own, way, scale, found in parts:
        one = scale.reshape(1).clone().requires_grad_()
        (LSQ.apply(own, one, -4, 3) * way).sum().backward()
        assert float(found) == pytest.approx(float(one.grad), rel=SUMS)


@pytest.mark.parametrize("granularity", ["tensor", "row", Groups(4)])
@pytest.mark.parametrize("again", [False, True])
def test_a_large_weight_is_done_in_parts(granularity: Any, again: bool) -> None:
    weight, flow = torch.randn(1000, 300), torch.randn(1000, 300)
    representation = LearnedStep(3, granularity=granularity)
    laid = Laid(representation, None, representation.fit(weight))
    latent, upstream = weight.clone().requires_grad_(), flow.clone().requires_grad_()
    moved, slopes = torch.autograd.grad(
        laid(latent), [latent, laid.scale], upstream, create_graph=again
    )
    groups, ways, found = (each.reshape(len(laid.scale), -1) for each in (weight, flow, moved))
    for group, way, scale, one, slope in zip(
        groups, ways, laid.scale.detach(), found.detach(), slopes.detach(), strict=True
    ):
        x, own = group.clone().requires_grad_(), scale.reshape(1).clone().requires_grad_()
        (LSQ.apply(x, own, -4, 3) * way).sum().backward()
        assert torch.equal(one, x.grad)
        assert float(slope) == pytest.approx(float(own.grad), rel=SUMS, abs=SUMS)
    if again:  # both are linear in what comes from above
        total = (moved.double() * flow).sum() + slopes.double().sum()
        total.backward()
        linear = (upstream.grad.double() * flow).sum()
        assert float(linear) == pytest.approx(float(total.detach()), rel=SUMS)


def test_both_ends_of_the_range_are_inside() -> None:
    laid = Laid(LearnedStep(2), None, {"scale": torch.ones(1)})
    weight = torch.tensor([-2.1, -2.0, 0.0, 1.0, 1.1], requires_grad=True)
    laid(weight).sum().backward()
    assert weight.grad.tolist() == [0, 1, 1, 1, 0]
    assert laid(weight).tolist() == [-2, -2, 0, 1, 1]


def test_the_scales_gradient_is_the_finite_difference_without_rounding() -> None:
    """Away from the points where a level changes, q s moves with s by q: round(q) - q + q."""
    weight, flow = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    laid = Laid(LearnedStep(3), None, LearnedStep(3).fit(weight))
    (laid(weight) * flow).sum().backward()
    step, scale = 1e-7, laid.scale.detach()
    sides = []
    for sign in (1, -1):
        moved = Laid(LearnedStep(3), None, {"scale": scale + sign * step})
        sides.append(float((moved(weight) * flow).sum().detach()))
    slope = (sides[0] - sides[1]) / (2 * step)
    ratio = weight / scale
    inside = (ratio >= -4) & (ratio <= 3)
    own = float(laid.scale.grad) * math.sqrt(50 * 3) + float((flow * ratio * inside).sum())
    assert own == pytest.approx(slope, rel=1e-5)


def test_codes_are_those_of_a_full_symmetric_grid_of_this_scale() -> None:
    weight = torch.randn(6, 10)
    state = LearnedStep(4).fit(weight)
    found = LearnedStep(4).encode(weight, state=state)
    other = Symmetric(4, levels="full", range="mse").encode(weight, state=state)
    assert torch.equal(found.streams["code"].tensor, other.streams["code"].tensor)


@pytest.mark.parametrize("scale", [0.0, -0.0, -3.0, 1e-42])
def test_a_scale_that_is_not_positive_still_quantises_and_comes_back(scale: float) -> None:
    weight = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    laid = Laid(LearnedStep(4), None, {"scale": torch.tensor([scale])})
    output = laid(weight)
    assert bool(output.isfinite().all()) and float(laid.encode(weight).tables["scale"]) > 0
    ((output - weight.detach()) ** 2).sum().backward()
    assert float(laid.scale.grad) < 0  # a step of descent makes it larger
    laid.update()
    assert 0 < float(laid.scale.detach()) < 1e-37
    assert torch.equal(laid(weight), output)


def task() -> Task:
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(40, 6, generator=generator), torch.arange(40) % 3
    return Task((inputs, labels), (inputs[:9], labels[:9]), (inputs[:9], labels[:9]))


@pytest.mark.parametrize("optimizer", [AdamW(0.05), SGD(0.5, decay=Constant())], ids=repr)
def test_training_moves_the_scale_and_keeps_it_positive(optimizer: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    for name in ("0.weight", "2.weight"):
        lay(model, name, LearnedStep(2, granularity="row"))
    before = laid_tensors(model)["0.weight"][0].scale.detach().clone()
    train = Train(epochs=10, batch=8, optimizer=optimizer, stop=Stop(keep="last"))
    run_step(train, State(model, task()))
    for layer, latent in laid_tensors(model).values():
        assert bool((layer.scale > 0).all())
        assert torch.equal(layer(latent), layer.representation.decode(layer.encode(latent)))
    assert not torch.equal(laid_tensors(model)["0.weight"][0].scale, before)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_of_half_precision_are_those_of_its_numbers(bits: int) -> None:
    weight, flow = torch.randn(40, 30).bfloat16(), torch.randn(40, 30)
    representation = LearnedStep(bits)
    scale = representation.fit(weight)["scale"]
    found = {}
    for dtype in (torch.bfloat16, torch.float64):
        laid = Laid(representation, None, {"scale": scale.to(dtype)})
        (laid(weight.to(dtype)).double() * flow).sum().backward()
        found[dtype] = float(laid.scale.grad)
    assert found[torch.bfloat16] == pytest.approx(found[torch.float64], rel=HALVES)
