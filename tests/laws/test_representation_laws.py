"""Laws of every registered representation: exactness, ranges, masks, copies, round trips."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.errors import ModelError
from laconic.step import members
from laconic.weights import (
    Affine,
    Binary,
    Codes,
    DynamicFixedPoint,
    FixedPoint,
    Gobo,
    Groups,
    KMeans,
    Laid,
    LearnedStep,
    LossAware,
    Product,
    Representation,
    Symmetric,
    Ternary,
    bake,
    lay,
)
from laconic.weights.laid import narrow
from laconic.weights.lookup import looked_up
from laconic.weights.representation import masked

SHAPES = [(5,), (4, 7), (3, 2, 3, 3)]
# Sums of so many such numbers stay finite in float32; networks hold nothing near it.
HUGE = 2.0**100

# Combinations that varying one field at a time does not reach.
EXTRA: dict[str, list[Representation]] = {
    "symmetric": [
        Symmetric(2, levels="full", granularity="row", range="mse", rounding="stochastic"),
        Symmetric(3, granularity="row", range="mse"),
        Symmetric(5, levels="full", rounding="equal"),
    ],
    "affine": [Affine(2, granularity="row")],
    "fixed_point": [
        FixedPoint(4, 2),
        FixedPoint(4, 2, rounding="stochastic"),
        FixedPoint(8, -3),
        FixedPoint(2),
    ],
    "dynamic_fixed_point": [DynamicFixedPoint(2, choose="mse", rounding="equal")],
    "ternary": [Ternary("row", threshold="exact")],
    "learned_step": [LearnedStep(3, granularity="row")],
    "loss_aware": [LossAware(4, granularity="row"), LossAware(granularity="row", solver="exact")],
    "gobo": [Gobo(2, threshold=-1.0), Gobo(4, threshold=3.0)],
    "product": [Product(1, block=3), Product(3, block=2, iterations=1)],
    "kmeans": [KMeans(2, start="random"), KMeans(3, start="density", iterations=1)],
}


def _choices(annotation: Any, metadata: list[Any]) -> Iterator[Any]:
    """Yield values worth trying of a field: every literal, both ends of a bounded number."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_origin(annotation) is Annotated:
        inner, *fields = get_args(annotation)
        yield from _choices(inner, [bound for field in fields for bound in field.metadata])
    elif annotation is int:
        ends = (getattr(bound, "ge", getattr(bound, "le", None)) for bound in metadata)
        yield from (end for end in ends if end is not None)
    else:
        for part in get_args(annotation):
            yield from _choices(part, [])


def _variants(member: type[Representation]) -> Iterator[Representation]:
    """Yield the default, each field varied on its own, and the table's combinations."""
    yield member()
    for name, info in member.model_fields.items():
        for value in _choices(info.annotation, list(info.metadata)):
            yield member(**{name: value})
    yield from EXTRA.get(member.name, [])


VARIANTS = list(
    dict.fromkeys(
        variant
        for member in members(Representation, every=True).values()
        for variant in _variants(member)
    )
)
every = pytest.mark.parametrize("representation", VARIANTS, ids=repr)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def weights(shape: tuple[int, ...]) -> dict[str, Tensor]:
    plain = normal(*shape)
    outlier = plain.clone()
    outlier.view(-1)[1] = 1e4
    return {
        "normal": plain,
        "signed zeros": torch.where(plain > 0, plain, -0.0),
        "zero": torch.zeros(shape),
        "minus zero": -torch.zeros(shape),
        "constant": torch.full(shape, 0.3),
        "negative constant": torch.full(shape, -0.7),
        "tiny": plain * 1e-30,
        "subnormal": plain * 1e-40,
        "huge": plain * HUGE,
        "outlier": outlier,
        "tiny and huge": torch.where(plain > 0, plain * 1e-30, plain * HUGE),
        "strided": torch.stack([plain, -plain], -1)[..., 0],
    }


def masks(shape: tuple[int, ...]) -> dict[str, Tensor | None]:
    one = torch.zeros(shape, dtype=torch.bool)
    one.view(-1)[2] = True
    return {
        "no mask": None,
        "half": normal(*shape).cos() > 0.6,
        "one": one,
        "none": torch.zeros(shape, dtype=torch.bool),
        "all": torch.ones(shape, dtype=torch.bool),
    }


def cases(shape: tuple[int, ...]) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    for weight_name, weight in weights(shape).items():
        for mask_name, mask in masks(shape).items():
            yield f"{weight_name}, {mask_name}", weight, mask


def same_bytes(left: Tensor, right: Tensor) -> bool:
    return (
        left.shape == right.shape
        and left.dtype == right.dtype
        and torch.equal(
            left.detach().flatten().view(torch.uint8),
            right.detach().flatten().view(torch.uint8),
        )
    )


def same_codes(left: Codes, right: Codes) -> bool:
    return (
        left.shape == right.shape
        and left.streams.keys() == right.streams.keys()
        and left.tables.keys() == right.tables.keys()
        and all(
            stream.bits == right.streams[name].bits
            and same_bytes(stream.tensor, right.streams[name].tensor)
            for name, stream in left.streams.items()
        )
        and all(same_bytes(table, right.tables[name]) for name, table in left.tables.items())
    )


def laid_on(representation: Representation, weight: Tensor, mask: Tensor | None = None) -> Laid:
    return Laid(representation, mask, representation.fit(weight.detach(), mask))


def has_minus_zero(weight: Tensor) -> bool:
    return bool(((weight == 0) & weight.signbit()).any())


def check_exact(representation: Representation, weight: Tensor, mask: Tensor | None) -> None:
    laid = laid_on(representation, weight, mask)
    codes = laid.encode(weight)
    decoded = representation.decode(codes)
    assert same_bytes(laid(weight), decoded)
    assert decoded.shape == weight.shape and decoded.dtype == weight.dtype
    assert bool(decoded.isfinite().all())
    assert not has_minus_zero(decoded)
    if mask is not None:
        assert not bool(decoded[~mask].any())


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


@pytest.mark.parametrize(
    "representation", [Binary("row"), Ternary("row"), Ternary("row", threshold="exact")], ids=repr
)
@pytest.mark.parametrize("shape", [(31, 40_000), (3, 70_000)], ids=str)
def test_long_rows_are_added_up_as_in_the_file(
    representation: Representation, shape: tuple[int, int], two_threads: None
) -> None:
    # What is left over is one row, which two threads would add up in another order.
    weight = torch.randn(shape)
    decoded = representation.decode(representation.encode(weight))
    assert torch.equal(representation.quantized(weight, None, {}), decoded)


@pytest.mark.parametrize(
    "representation", [Binary("row"), Ternary("row"), Ternary("row", threshold="exact")], ids=repr
)
def test_rows_that_lie_apart_are_added_up_as_in_the_file(representation: Representation) -> None:
    weight = torch.randn(3000, 100).t()  # more rows than are done together, the last ones few
    decoded = representation.decode(representation.encode(weight))
    assert torch.equal(representation.quantized(weight, None, {}), decoded)


@pytest.mark.parametrize("representation", [v for v in VARIANTS if v.row_by_row], ids=repr)
def test_rows_that_are_looked_up_are_those_of_the_whole(representation: Representation) -> None:
    ids = torch.tensor([[8, 0, 3], [3, 5, 0]])
    for name, weight in weights((9, 7)).items():
        table = nn.Embedding.from_pretrained(weight.contiguous(), freeze=False)
        laid = Laid(representation, state=representation.fit(weight))
        parametrize.register_parametrization(table, "weight", laid, unsafe=True)
        whole, expected = _looked_up(table, ids)
        with looked_up(table):
            some, found = _looked_up(table, ids)
        assert torch.equal(whole, some), name
        assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True)), name


def _looked_up(table: nn.Embedding, ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    out = table(ids)
    factors = torch.arange(1.0, 1 + out.numel()).reshape(out.shape)
    return out, torch.autograd.grad((out * factors).sum(), [*table.parameters()])


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


@every
def test_a_declared_idempotent_representation_is(representation: Representation) -> None:
    for name, weight, mask in cases((4, 7)) if representation.idempotent else ():
        laid = laid_on(representation, weight, mask)
        codes = laid.encode(weight)
        assert same_codes(laid.encode(representation.decode(codes)), codes), name


@every
def test_a_declared_fixed_representation_is(representation: Representation) -> None:
    weight, mask = normal(4, 7), masks((4, 7))["half"]
    laid = laid_on(representation, weight, mask)
    codes, others = laid.encode(weight), laid.encode(normal(7, 4).t() * 3 + 1)
    moved = {
        name
        for name, stream in codes.streams.items()
        if not same_bytes(stream.tensor, others.streams[name].tensor)
    }
    if representation.fixed:
        assert not moved
    elif representation == type(representation)():
        assert moved or codes.streams.keys() == {"position"}


@every
def test_distinct_values_fit_the_bits(representation: Representation) -> None:
    weight = normal(40, 50)
    laid = laid_on(representation, weight)
    streams = list(laid.encode(weight).streams.values())
    one_each = len(streams) == 1 and streams[0].tensor.shape == weight.shape
    if one_each and getattr(representation, "granularity", "tensor") == "tensor":
        assert laid(weight).unique().numel() <= 2 ** streams[0].bits
    else:
        assert laid(weight).unique().numel() <= weight.numel()


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
def test_groups_of_a_number_of_weights(representation: Representation) -> None:
    if "granularity" not in type(representation).model_fields:
        return
    by_three = representation.model_copy(update={"granularity": 3})
    for name, mask in masks((4, 6)).items():
        check_exact(by_three, normal(4, 6), mask)
        assert name
    blocks = normal(8, 3)
    row = representation.model_copy(update={"granularity": "row"})
    torch.manual_seed(0)
    expected = laid_on(row, blocks).encode(blocks)
    torch.manual_seed(0)
    flat = laid_on(by_three, blocks.reshape(4, 6)).encode(blocks.reshape(4, 6))
    for key, table in expected.tables.items():
        assert same_bytes(table, flat.tables[key])
    with pytest.raises(ModelError, match="groups of 3 do not divide"):
        laid_on(by_three, normal(4, 7)).encode(normal(4, 7))


@every
def test_a_number_of_groups(representation: Representation) -> None:
    if "granularity" not in type(representation).model_fields:
        return
    two = type(representation)(**{**dict(representation), "granularity": {"groups": 2}})
    twelve = representation.model_copy(update={"granularity": 12})
    assert two == representation.model_copy(update={"granularity": Groups(2)})
    assert Representation.coerce(yaml.safe_load(yaml.safe_dump(two.to_data()))) == two
    for mask in masks((4, 6)).values():
        check_exact(two, normal(4, 6), mask)
        found = []
        for each in (two, twelve):
            torch.manual_seed(0)
            found.append(laid_on(each, normal(4, 6), mask).encode(normal(4, 6)))
        assert same_codes(*found)
    with pytest.raises(ModelError, match="2 groups do not divide"):
        laid_on(two, normal(3, 7)).encode(normal(3, 7))


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


def laid_linear(representation: Representation, mask: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(7, 4)
    with torch.no_grad():
        linear.weight.copy_(normal(4, 7))
    lay(linear, "weight", representation, mask=mask)
    return linear


@pytest.mark.parametrize("mask_name", ["no mask", "half"])
@every
def test_bake_leaves_what_ships(representation: Representation, mask_name: str) -> None:
    linear = laid_linear(representation, masks((4, 7))[mask_name])
    layers = linear.parametrizations.weight
    shipped = representation.decode(layers[0].encode(layers.original))
    output = linear(normal(2, 7))
    bake(linear)
    assert type(linear) is nn.Linear
    assert same_bytes(linear.weight, shipped)
    assert torch.equal(linear(normal(2, 7)), output)
    assert list(linear.state_dict()) == ["bias", "weight"]


@every
def test_a_deep_copy_is_independent(representation: Representation) -> None:
    linear = laid_linear(representation, masks((4, 7))["half"])
    before = linear.weight.detach().clone()
    twin = copy.deepcopy(linear)
    assert same_bytes(twin.weight, before)
    twin.parametrizations.weight[0].update()
    narrow(twin, "weight", torch.zeros(4, 7, dtype=torch.bool))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(-3)
    bake(twin)
    assert not parametrize.is_parametrized(twin) and parametrize.is_parametrized(linear)
    assert same_bytes(linear.weight, before)


@every
def test_the_state_dict_holds_all_it_needs(representation: Representation) -> None:
    linear = laid_linear(representation, masks((4, 7))["half"])
    for _ in range(3):
        linear.parametrizations.weight[0].update()
    other = nn.Linear(7, 4)
    lay(other, "weight", representation, mask=torch.ones(4, 7, dtype=torch.bool))
    other.load_state_dict(linear.state_dict())
    assert same_bytes(other.weight, linear.weight)
