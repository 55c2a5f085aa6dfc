"""Laws of every registered representation: exactness, ranges, masks, gradients, recipes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.representations import (
    HUGE,
    VARIANTS,
    check_exact,
    every,
    has_minus_zero,
    laid_on,
    masks,
    normal,
    same_bytes,
    same_codes,
    weights,
)
from laconic.weights import Affine, FixedPoint, Float, Representation
from laconic.weights.representation import grouped, masked

SHAPES = [(5,), (4, 7), (3, 2, 3, 3)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)

# A weight that is alone in its group is its end; no number comes near half of this step.
UNMOVED = [Affine(granularity=1), FixedPoint(fraction=-110)]
IDEMPOTENT = [variant for variant in VARIANTS if variant.idempotent]
FIXED = [variant for variant in VARIANTS if variant.fixed]
MOVING = [each for each in VARIANTS if not each.fixed and each not in [Float(), *UNMOVED]]


def one_code_each(representation: Representation) -> bool:
    """Return whether a weight's value is told by one code of its own."""
    weight = normal(4, 6)
    streams = laid_on(representation, weight).encode(weight).streams.values()
    return [stream.tensor.shape for stream in streams] == [weight.shape]


CODED = [variant for variant in VARIANTS if one_code_each(variant)]


def cases(shape: tuple[int, ...]) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    for weight_name, weight in weights(shape).items():
        for mask_name, mask in masks(shape).items():
            yield f"{weight_name}, {mask_name}", weight, mask


def check_streams(
    representation: Representation, weight: Tensor, mask: Tensor | None = None
) -> None:
    codes = laid_on(representation, weight, mask).encode(weight)
    survivors = weight.shape if mask is None else torch.Size([int(mask.sum())])
    for name, stream in codes.streams.items():
        assert 1 <= stream.bits <= 8
        assert stream.tensor.dtype == torch.uint8
        shape = representation.stream_shape(name, weight.shape)
        assert shape.numel() <= weight.numel()
        follows = name != "position" and shape == weight.shape
        assert stream.tensor.shape == (survivors if follows else shape)
        if stream.tensor.numel():
            assert int(stream.tensor.max()) < 2**stream.bits
    assert ("position" in codes.streams) == (mask is not None)
    for table in codes.tables.values():
        assert table.dtype == weight.dtype and bool(table.isfinite().all())
        assert not has_minus_zero(table)


@each_shape
@every
def test_the_laid_weight_is_the_decoded_one(
    representation: Representation, shape: tuple[int, ...]
) -> None:
    for name, weight, mask in cases(shape):
        try:
            check_exact(representation, weight, mask)
        except AssertionError as error:
            raise AssertionError(name) from error


@every
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_laid_weight_is_the_decoded_one_for_any_numbers(
    representation: Representation, data: st.DataObject
) -> None:
    numbers = st.floats(-HUGE, HUGE, width=32)
    weight = torch.tensor(data.draw(st.lists(numbers, min_size=1, max_size=12)))
    kept = st.lists(st.booleans(), min_size=len(weight), max_size=len(weight))
    mask = data.draw(st.none() | kept.map(torch.tensor))
    check_exact(representation, weight, mask)


@every
@pytest.mark.parametrize("mask_name", ["no mask", "half"])
def test_the_shortcut_is_the_way_through_the_codes(
    representation: Representation, mask_name: str
) -> None:
    weight = torch.randn(40, 4000)  # more rows than are done together
    mask = None if mask_name == "no mask" else torch.rand(weight.shape) < 0.5
    state = representation.fit(weight, mask)
    codes = representation.codes(weight, mask, state)
    found = masked(representation.quantized(weight, mask, state), mask)
    assert torch.equal(found, masked(representation.values(codes), mask))


@each_shape
@every
def test_codes_are_in_range_and_streams_hold_the_survivors(
    representation: Representation, shape: tuple[int, ...]
) -> None:
    for name, weight, mask in cases(shape):
        try:
            check_streams(representation, weight, mask)
        except AssertionError as error:
            raise AssertionError(name) from error


@each_shape
@every
def test_pruned_numbers_do_not_change_the_codes(
    representation: Representation, shape: tuple[int, ...]
) -> None:
    weight = normal(*shape)
    for name, mask in masks(shape).items():
        if mask is None:
            continue
        found = []
        for filler in (0.0, 1e6, -HUGE):
            torch.manual_seed(0)
            other = weight.where(mask, torch.tensor(filler))
            state = representation.fit(other, mask)
            found.append(representation.encode(other, mask=mask, state=state))
        assert same_codes(found[0], found[1]) and same_codes(found[0], found[2]), name


@each_shape
@every
def test_a_pruned_weight_has_no_value_and_no_gradient(
    representation: Representation, shape: tuple[int, ...]
) -> None:
    mask = masks(shape)["half"]
    latent = normal(*shape).requires_grad_()
    laid = laid_on(representation, latent, mask)
    output = laid(latent)
    (output * normal(*shape)).sum().backward()
    assert not bool(output[~mask].any())
    if latent.grad is not None:
        assert not bool(latent.grad[~mask].any())


@every
def test_the_gradient_is_the_surrogates(representation: Representation) -> None:
    weight, mask, flow = normal(4, 7) * 3, masks((4, 7))["half"], normal(7, 4).t()
    laid = laid_on(representation, weight, mask)
    owned = list(laid.parameters())
    assert {name for name, _ in laid.named_parameters()} == representation.learned
    gradients = []
    for compute in (
        laid,
        lambda latent: representation.surrogate(latent, laid.state).mul(mask),
    ):
        latent = weight.clone().requires_grad_()
        gradients.append(
            torch.autograd.grad((compute(latent) * flow).sum(), [latent, *owned], allow_unused=True)
        )
    if representation == type(representation)():
        assert any(gradient is not None and bool(gradient.any()) for gradient in gradients[0])
    for laid_gradient, own_gradient in zip(*gradients, strict=True):
        assert (laid_gradient is None) == (own_gradient is None)
        assert laid_gradient is None or torch.equal(laid_gradient, own_gradient)


@every
def test_encoding_changes_nothing_and_repeats(representation: Representation) -> None:
    weight, mask = normal(4, 7), masks((4, 7))["half"]
    laid, before = laid_on(representation, weight, mask), weight.clone()
    state = {name: tensor.clone() for name, tensor in laid.state.items()}
    first, second = laid.encode(weight), laid.encode(weight)
    assert same_codes(first, second)
    assert same_bytes(weight, before)
    assert all(same_bytes(tensor, laid.state[name]) for name, tensor in state.items())


def test_every_law_that_some_must_keep_has_some_to_keep_it() -> None:
    assert all([IDEMPOTENT, FIXED, MOVING, CODED])


@pytest.mark.parametrize("representation", IDEMPOTENT, ids=repr)
def test_a_declared_idempotent_representation_is(representation: Representation) -> None:
    for name, weight, mask in cases((4, 7)):
        laid = laid_on(representation, weight, mask)
        codes = laid.encode(weight)
        assert same_codes(laid.encode(representation.decode(codes)), codes), name


def moved(representation: Representation) -> set[str]:
    """Return which streams follow when a weight moves that was laid elsewhere."""
    weight, mask = normal(4, 7), masks((4, 7))["half"]
    laid = laid_on(representation, weight, mask)
    codes, others = laid.encode(weight), laid.encode(normal(7, 4).t() * 3 + 1)
    assert codes.streams.keys() > {"position"}
    return {
        name
        for name, stream in codes.streams.items()
        if not same_bytes(stream.tensor, others.streams[name].tensor)
    }


@pytest.mark.parametrize("representation", FIXED, ids=repr)
def test_a_declared_fixed_representation_is(representation: Representation) -> None:
    assert not moved(representation)


@pytest.mark.parametrize("representation", MOVING, ids=repr)
def test_codes_of_any_other_follow_the_weight(representation: Representation) -> None:
    assert moved(representation)


@pytest.mark.parametrize("representation", CODED, ids=repr)
def test_distinct_values_of_a_group_fit_the_bits(representation: Representation) -> None:
    weight = normal(40, 50)
    laid = laid_on(representation, weight)
    (stream,) = laid.encode(weight).streams.values()
    for group in grouped(laid(weight), getattr(representation, "granularity", "tensor")):
        assert group.unique().numel() <= 2**stream.bits


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@every
def test_other_float_types_are_exact_too(representation: Representation, dtype: Any) -> None:
    weight = normal(4, 7).to(dtype)
    fraction = getattr(representation, "fraction", None) or 0
    if torch.tensor(2.0**-fraction).to(dtype).isinf():
        return  # the step is above every number of this type
    check_exact(representation, weight, None)
    check_exact(representation, weight, masks((4, 7))["half"])
    check_streams(representation, weight)


@every
def test_small_halves_are_not_lost(representation: Representation) -> None:
    if isinstance(representation, FixedPoint):
        return  # its step is given, whatever the weights are
    weight = (normal(4, 50) / 1000).half()
    decoded = laid_on(representation, weight)(weight).detach()
    assert bool(decoded.isfinite().all()) and bool(decoded.any(dim=1).all())


@every
def test_a_recipe_writes_and_reads_it(representation: Representation) -> None:
    written = yaml.safe_load(yaml.safe_dump(representation.to_data()))
    read = Representation.coerce(written)
    assert read == representation
    assert hash(read) == hash(representation)
    assert repr(read) == repr(representation)
    assert type(read) is type(representation)


@every
def test_resolving_keeps_the_names(representation: Representation) -> None:
    scope = {"a": normal(9), "b": normal(4, 2) * 100, "empty": torch.zeros(0)}
    resolved = representation.resolve(scope)
    assert list(resolved) == list(scope)
    for name, own in resolved.items():
        if scope[name].numel():
            check_exact(own, scope[name], None)
