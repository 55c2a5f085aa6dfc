"""Every registered step, built from its fields' types alone, and each field's values to try."""

from __future__ import annotations

import itertools
import re
from abc import ABC
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen

from laconic.budget import Budget
from laconic.scope import Scope
from laconic.step import Step, Value, members
from laconic.weights import Quantize


def ours(family: type[Value]) -> dict[str, Any]:
    """Return the members of a family but for those that other tests define."""
    found = members(family, every=True)
    return {name: kind for name, kind in found.items() if kind.__module__.startswith("laconic.")}


STEPS = ours(Step)


def built(kind: type[Value]) -> Any:
    """Return a value with its required fields filled."""
    if kind is Quantize:  # of three fields it wants one
        return Quantize(8, activation=8)
    required = {name: info for name, info in kind.model_fields.items() if info.is_required()}
    return kind(**{n: next(choices(i.annotation, i.metadata)) for n, i in required.items()})


def choices(annotation: Any, metadata: list[Any], depth: int = 2) -> Iterator[Any]:
    """Yield values worth trying of a field, from its type and bounds alone."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        bounds = [bound for item in more for bound in getattr(item, "metadata", [item])]
        yield from choices(inner, bounds, depth)
    elif get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_origin(annotation) is tuple:
        least = max((item.min_length for item in metadata if isinstance(item, MinLen)), default=0)
        some = list(itertools.islice(choices(get_args(annotation)[0], [], depth), 2))
        yield from (tuple(some[:count]) for count in range(least, len(some) + 1))
    elif get_args(annotation):
        for part in get_args(annotation):
            yield from choices(part, metadata, depth)
    elif annotation is type(None):
        yield None
    else:
        yield from plain_choices(annotation, metadata, depth)


def plain_choices(kind: type, metadata: list[Any], depth: int) -> Iterator[Any]:
    """Yield values of a class that is no union, literal or list."""
    if kind is Scope:
        yield Scope("kind:linear, !last")
    elif kind is Budget:
        yield from (Budget("size <= 0.5x"), Budget("size <= 1 KiB"))
    elif kind is bool:
        yield from (False, True)
    elif kind is int:
        yield from (value for value in (0, 1, 7) if within(value, metadata))
    elif kind is float:
        yield from (value for value in (0.25, 1.0, 3e-5, 2.5) if within(value, metadata))
    elif kind is str:
        patterns = [item.pattern for item in metadata if getattr(item, "pattern", None)]
        yield from (word for text in patterns for word in re.findall(r"\w+", text))
    elif ABC in kind.__bases__:
        if depth:
            for member in ours(kind).values():
                yield built(member)
                yield from varied(built(member), depth - 1)
    else:
        yield from varied(built(kind), depth - 1)


def within(value: float, metadata: list[Any]) -> bool:
    """Return whether a number is inside a field's bounds."""
    allowed: dict[type, Callable[[Any], bool]] = {
        Ge: lambda bound: value >= bound.ge,
        Gt: lambda bound: value > bound.gt,
        Le: lambda bound: value <= bound.le,
        Lt: lambda bound: value < bound.lt,
    }
    return all(allowed[type(item)](item) for item in metadata if type(item) in allowed)


def varied(value: Value, depth: int = 2) -> Iterator[Any]:
    """Yield the value with each of its fields changed on its own."""
    for name, info in type(value).model_fields.items():
        for choice in choices(info.annotation, info.metadata, depth):
            if choice != getattr(value, name):
                yield value.model_copy(update={name: choice})
