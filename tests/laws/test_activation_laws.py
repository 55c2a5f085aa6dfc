"""Laws of every registered activation: grids, codes, gradients, ranges, round trips."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from laconic.errors import RecipeError, RunError
from laconic.step import Value, members
from laconic.weights import (
    Activation,
    LearnedClip,
    LearnedSpacing,
    Quantizer,
    Symmetric,
    workspace,
)
from laconic.weights.quantizer import attach_, quantizing

# Of float32 numbers that are products of a level and a spacing.
CLOSE = 1e-6
# Ranges of such numbers are finite in float32; networks hold nothing near it.
HUGE = 2.0**100


def variants() -> Iterator[Activation]:
    """Yield every member at the ends of its widths, with both kinds of levels."""
    for kind in members(Activation, every=True).values():
        if kind.__module__.startswith("laconic."):
            for bits in (2, 4, 8):
                for levels in ("symmetric", "asymmetric"):
                    yield kind(bits=bits, levels=levels)


every = pytest.mark.parametrize("activation", list(variants()), ids=repr)

TENSORS: dict[str, Tensor] = {
    "normal": torch.randn(40, 30, generator=torch.Generator().manual_seed(0)),
    "positive": torch.rand(500, generator=torch.Generator().manual_seed(1)),
    "negative": -torch.rand(500, generator=torch.Generator().manual_seed(2)),
    "zeros": torch.zeros(7),
    "constant": torch.full((3, 2), 1.5),
    "one": torch.tensor([-2.0]),
    "tiny": torch.tensor([1e-42, -1e-43, 0.0]),
    "large": torch.tensor([1e30, -1e29, 3e28]),
    "outlier": torch.cat([torch.linspace(-1, 1, 101), torch.tensor([50.0])]),
}


def calibrated(activation: Activation, tensor: Tensor) -> dict[str, Tensor]:
    """Return the state after one look at a tensor."""
    state = activation.start()
    activation.observe(tensor, state, training=False)
    return state


@every
@pytest.mark.parametrize("name", TENSORS)
def test_the_rounded_tensor_is_what_the_codes_stand_for(activation: Activation, name: str) -> None:
    tensor = TENSORS[name]
    state = calibrated(activation, tensor)
    rounded = activation.rounded(tensor, state)
    code, scale, zero_point = activation.codes(tensor, state)
    assert torch.equal(rounded, (code.float() - zero_point) * scale)
    assert rounded.shape == tensor.shape and bool(rounded.isfinite().all())
    assert int(code.max()) < 2**activation.bits
    assert 0 <= int(zero_point) < 2**activation.bits
    assert rounded.unique().numel() <= 2**activation.bits


@every
@pytest.mark.parametrize("weight", [Symmetric(8, granularity="row"), Symmetric(4)], ids=repr)
def test_a_layer_is_a_product_of_integers(activation: Activation, weight: Symmetric) -> None:
    """Multiply codes with int32 sums: what hardware computes is what the network does."""
    inputs, state = TENSORS["normal"], calibrated(activation, TENSORS["normal"])
    codes = weight.encode(torch.randn(5, 30, generator=torch.Generator().manual_seed(3)))
    one, scale, zero = activation.codes(inputs, state)
    other = codes.streams["code"].tensor.int() - (2 ** (weight.bits - 1) - 1)
    sums = (one.int() - zero.int()) @ other.T
    computed = sums * (scale * codes.tables["scale"])
    rounded = activation.rounded(inputs, state).double() @ weight.decode(codes).double().T
    assert torch.allclose(computed.double(), rounded, rtol=CLOSE, atol=CLOSE)


@every
def test_zero_is_a_level_and_order_is_kept(activation: Activation) -> None:
    tensor = TENSORS["normal"].flatten().sort().values
    tensor = torch.cat([tensor[:600], torch.zeros(1), tensor[600:]]).sort().values
    state = calibrated(activation, tensor)
    rounded = activation.rounded(tensor, state)
    assert bool((rounded[tensor == 0] == 0).all())
    assert bool((rounded.diff() >= 0).all())


@every
def test_inside_the_range_the_error_is_at_most_half_a_level(activation: Activation) -> None:
    tensor = TENSORS["normal"]
    state = calibrated(activation, tensor)
    scale, first, last = activation.grid_of(tensor, state)
    inside = (tensor >= first * scale) & (tensor <= last * scale)
    error = (activation.rounded(tensor, state) - tensor)[inside].abs()
    assert float(error.max()) <= float(scale) / 2 * (1 + CLOSE)


# Those whose range is not the tensor's own, which rounding moves.
FIXED = [each for each in variants() if each.start() and not isinstance(each, LearnedClip)]


@pytest.mark.parametrize("activation", FIXED, ids=repr)
def test_rounding_again_changes_nothing(activation: Activation) -> None:
    tensor = TENSORS["normal"]
    state = calibrated(activation, tensor)
    rounded = activation.rounded(tensor, state)
    torch.testing.assert_close(activation.rounded(rounded, state), rounded, rtol=CLOSE, atol=0)


@every
@pytest.mark.parametrize("name", ["normal", "positive", "outlier"])
def test_gradients_stop_beyond_the_range_and_nowhere_else(
    activation: Activation, name: str
) -> None:
    tensor = TENSORS[name].clone().requires_grad_()
    state = calibrated(activation, tensor.detach())
    for name in activation.learned:
        state[name].requires_grad_()
    activation.rounded(tensor, state).sum().backward()
    assert tensor.grad is not None
    assert set(tensor.grad.unique().tolist()) <= {0.0, 1.0}
    low, high = tensor.detach().min(), tensor.detach().max()
    if "low" in state:
        # Zero is a level, so a grid begins at or below it, and ends at or above.
        low, high = state["low"].detach().clamp(max=0), state["high"].detach().clamp(min=0)
        if activation.levels == "symmetric":  # of an uneven range the wider side counts
            low, high = torch.minimum(low, -high), torch.maximum(-low, high)
    elif "scale" in state:
        scale, first, last = activation.grid_of(tensor.detach(), state)
        low, high = first * scale, last * scale
    inside = (tensor.detach() > low) & (tensor.detach() < high)
    assert bool((tensor.grad[inside] == 1).all())
    beyond = (tensor.detach() < low) | (tensor.detach() > high)
    assert not bool(tensor.grad[beyond].any())


def slopes_of(activation: Activation, tensor: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return a rounded tensor, and the gradients of its squares: the tensor's and the learned."""
    tensor, state = tensor.clone().requires_grad_(), calibrated(activation, tensor)
    learned = [state[name].requires_grad_() for name in sorted(activation.learned)]
    rounded = activation.rounded(tensor, state)
    return rounded, list(torch.autograd.grad(rounded.square().sum(), (tensor, *learned)))


@every
@pytest.mark.parametrize("name", ["normal", "outlier"])
def test_in_parts_it_computes_what_it_does_at_once(
    activation: Activation, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, (flow, *moves) = slopes_of(activation, TENSORS[name])
    monkeypatch.setattr(workspace, "IN_CACHE", 1)  # times as many as there are threads
    with torch.no_grad():
        assert len(workspace.Workspace(TENSORS[name]).parts) > 1
    parts, (other, *others) = slopes_of(activation, TENSORS[name])
    assert torch.equal(parts, whole) and torch.equal(other, flow)
    torch.testing.assert_close(others, moves, rtol=1e-5, atol=1e-5)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_stand_for_what_is_rounded(activation: Activation, dtype: torch.dtype) -> None:
    tensor = TENSORS["normal"].to(dtype)
    state = calibrated(activation, tensor)
    code, scale, zero_point = activation.codes(tensor, state)
    assert torch.equal(((code - zero_point) * scale).to(dtype), activation.rounded(tensor, state))


@every
def test_nothing_is_rounded_to_nothing(activation: Activation) -> None:
    quantizer = Quantizer(activation)
    for each in (quantizer.train(), quantizer.eval()):
        assert each(torch.empty(0, 4)).shape == (0, 4)


@every
def test_gradients_have_gradients(activation: Activation) -> None:
    tensor = TENSORS["normal"].clone().requires_grad_()
    state = calibrated(activation, tensor.detach())
    rounded = activation.rounded(tensor, state)
    (inside,) = torch.autograd.grad(rounded.sum(), tensor, retain_graph=True)
    (first,) = torch.autograd.grad(rounded.pow(3).sum(), tensor, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), tensor)
    torch.testing.assert_close(second, 6 * rounded.detach() * inside)


@every
def test_a_place_that_two_tensors_pass_has_the_gradients_of_both(activation: Activation) -> None:
    quantizer = Quantizer(activation).train()
    first, second = (t.clone().requires_grad_() for t in (TENSORS["normal"], TENSORS["outlier"]))
    (quantizer(first).sum() + quantizer(second).sum()).backward()
    assert first.grad is not None and second.grad is not None
    assert first.grad.any() and second.grad.any()


@every
def test_a_range_of_nothing_is_an_error(activation: Activation) -> None:
    if not activation.needs_data:
        assert activation.rounded(torch.ones(2), activation.start()).isfinite().all()
        return
    with pytest.raises(RunError, match="has seen no data"):
        activation.rounded(torch.ones(2), activation.start())


@every
def test_a_recipe_writes_and_reads_it(activation: Activation) -> None:
    text = yaml.safe_dump(activation.to_data())
    assert Activation.coerce(yaml.safe_load(text)) == activation
    assert hash(activation) == hash(activation.model_copy())


@every
@settings(max_examples=20, deadline=None)
@given(numbers=st.lists(st.floats(-HUGE, HUGE, width=32), min_size=1, max_size=12))
def test_any_numbers_are_on_the_grid(activation: Activation, numbers: list[float]) -> None:
    tensor = torch.tensor(numbers)
    state = calibrated(activation, tensor)
    code, scale, zero_point = activation.codes(tensor, state)
    assert torch.equal(activation.rounded(tensor, state), (code.float() - zero_point) * scale)


@every
def test_a_module_of_it_travels_and_computes_in_float32(activation: Activation) -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    attach_(module, {"0": {"input": activation}})
    quantizer = module[0].quantizers["input"]
    assert isinstance(quantizer, Quantizer)
    assert {n for n, _ in quantizer.named_parameters()} == activation.learned
    with quantizing(module, "calibrate"):
        quantizer(TENSORS["normal"])
    twin = Quantizer(activation)
    twin.load_state_dict(quantizer.state_dict())
    quantizer.eval(), twin.eval()
    expected = twin(TENSORS["normal"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(TENSORS["normal"]), expected)
    halves = TENSORS["normal"].bfloat16()
    assert quantizer(halves).dtype == torch.bfloat16
    assert torch.equal(quantizer(halves), twin(halves.float()).bfloat16())


@pytest.mark.parametrize("kind", dict.fromkeys(type(each) for each in variants()))
def test_a_program_of_it_takes_any_batch(kind: type[Activation]) -> None:
    module, tensor = nn.Sequential(nn.Linear(30, 2)), TENSORS["normal"]
    attach_(module, {"0": {"input": kind()}})
    with quantizing(module, "calibrate"):
        module(tensor)
    batch = {0: torch.export.Dim("batch")}
    with torch.no_grad():
        program = torch.export.export(module.eval(), (tensor,), dynamic_shapes=(batch,)).module()
        assert torch.equal(program(tensor[:7]), module(tensor[:7]))


@every
def test_a_network_of_doubles_is_rounded_too(activation: Activation) -> None:
    doubles = TENSORS["normal"].double()
    for quantizer in (Quantizer(activation), Quantizer(activation).double()):
        with quantizing(quantizer, "calibrate"):
            quantizer(doubles)
        assert quantizer(doubles).dtype == torch.float64


@pytest.mark.parametrize("levels", ["symmetric", "asymmetric"])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (0.5, 2.0), (-1.0, -0.5)])
def test_what_moves_a_clip_is_what_is_clipped(levels: str, low: float, high: float) -> None:
    activation, tensor = LearnedClip(8, levels=levels), TENSORS["normal"].clone().requires_grad_()
    state = {"low": torch.tensor(low), "high": torch.tensor(high)}
    for limit in state.values():
        limit.requires_grad_()
    rounded = activation.rounded(tensor, state)
    _, scale, _ = activation.codes(tensor, state)
    ends = (min(low, 0.0), max(high, 0.0))
    assert rounded.min().item() == pytest.approx(ends[0], abs=float(scale))
    assert rounded.max().item() == pytest.approx(ends[1], abs=float(scale))
    rounded.sum().backward()
    assert state["low"].grad == (tensor <= ends[0]).sum()
    assert state["high"].grad == (tensor >= ends[1]).sum()
    assert tensor.grad is not None
    assert tensor.grad.sum() == ((tensor > ends[0]) & (tensor < ends[1])).sum()


@pytest.mark.parametrize("levels", ["symmetric", "asymmetric"])
def test_a_spacing_below_zero_finds_its_way_back(levels: str) -> None:
    activation, tensor = LearnedSpacing(4, levels=levels), TENSORS["normal"]
    spacing = torch.tensor(-0.01, requires_grad=True)
    for _ in range(50):
        rounded = activation.rounded(tensor, {"scale": spacing})
        (slope,) = torch.autograd.grad((rounded - tensor).square().sum(), spacing)
        assert slope.isfinite()
        with torch.no_grad():
            spacing -= 1e-3 * slope.sign()
    assert spacing > 0


def test_one_far_number_does_not_take_all_levels() -> None:
    # From a spacing at which it does: levels -15 to 0, and all that is positive becomes 0.
    activation, tensor = LearnedSpacing(4), torch.cat([TENSORS["normal"].flatten(), -torch.ones(1)])
    tensor[-1] = -16 * tensor[:-1].std()
    spacing = (tensor[:-1].std() / 2).requires_grad_()
    assert activation.grid_of(tensor, {"scale": spacing}).last == 0
    optimizer = torch.optim.Adam([spacing], lr=0.01 * spacing.item())
    for _ in range(200):
        optimizer.zero_grad()
        (activation.rounded(tensor, {"scale": spacing}) - tensor).square().mean().backward()
        optimizer.step()
    assert activation.grid_of(tensor, {"scale": spacing}).last >= 2


def test_widths_out_of_range_are_refused() -> None:
    for bits in (1, 9, 2.5, "wide"):
        with pytest.raises(RecipeError, match="bits"):
            LearnedClip(bits=bits)


def test_a_number_of_bits_is_short_for_the_tensors_own_range() -> None:
    found: Value = Activation.coerce(4)
    assert repr(found) == "MinMax(4)"
