"""Every registered representation in its variants, weights and masks, and their exactness."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import torch
from torch import Tensor

from laconic.step import members
from laconic.weights import (
    Affine,
    Codes,
    DynamicFixedPoint,
    FixedPoint,
    Gobo,
    KMeans,
    Laid,
    LearnedStep,
    LossAware,
    Product,
    Representation,
    Symmetric,
    Ternary,
)

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
