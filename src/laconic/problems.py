"""What is wrong with the fields of a value, said in the words of a recipe."""

from __future__ import annotations

import itertools
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator
from types import NoneType
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from laconic.errors import FieldProblem, RecipeError, nearest

__all__ = ["admitted", "prefixed", "read_yaml", "refusal"]

# What pydantic calls a list, a mapping and a number of YAML.
_WORDS = {
    "valid tuple": "list",
    "valid dictionary": "mapping",
    "valid integer": "whole number",
    "a valid boolean": "true or false",
    "valid string": "text",
}
_WANTED = "Input should be "
# What pydantic adds that says no more than the value, which is shown.
_ASIDE = re.compile(r" or instance of \w+|, got a number with .*|, unable to (parse|interpret) .*")
# Of a text of YAML, its aliases written out: a few lines of them may stand for billions.
MOST_NODES = 100_000


def read_yaml(text: str, where: str = "the value") -> Any:
    """Return what a text of YAML says.

    Args:
        text: from a file, or typed.
        where: that it is from, for messages.

    Raises:
        RecipeError: it is none, with the line, or it is absurdly large.

    >>> read_yaml("{keep: 0.5, by: taylor}")
    {'keep': 0.5, 'by': 'taylor'}
    """
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        large = tree is not None and _nodes(tree, {}) > MOST_NODES
        found = None if large else yaml.safe_load(text)
    # A date that there is not is a ValueError, a number of too many digits too.
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or f"not YAML ({error})"
        raise RecipeError(f"{where}{line}: {problem}") from None
    if large:
        raise RecipeError(f"{where}: there are more than {MOST_NODES:,} values in it")
    return found


def _nodes(node: yaml.Node, known: dict[int, float]) -> float:
    """Return how many values a node stands for; infinitely many where it is inside itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        inside = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = isinstance(node, yaml.MappingNode)
        found = itertools.chain.from_iterable(inside) if pairs else inside
        known[id(node)] = 1 + sum(_nodes(each, known) for each in found)
    return known[id(node)]


def admitted(annotation: Any) -> frozenset[Any]:
    """Return the types that an annotation admits, those of a union apart.

    None is left out.

    >>> sorted(kind.__name__ for kind in admitted(int | str | None))
    ['int', 'str']
    """
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        return admitted(arguments[0])
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return frozenset({annotation} - {NoneType})
    return frozenset().union(*map(admitted, arguments))


def prefixed(family: type, name: str, problems: tuple[FieldProblem, ...]) -> ValidationError:
    """Return pydantic's error for problems in the fields of a family's member.

    Args:
        family: Step, Representation, ... .
        name: of the member.
        problems: with places that start at its fields.

    >>> prefixed(int, "kmeans", (FieldProblem(("bits",), "too wide"),)).errors()[0]["loc"]
    ('kmeans', 'bits')
    """
    details = [
        InitErrorDetails(
            type=PydanticCustomError(
                "field", "{text}", {"text": problem.message, "key": problem.key}
            ),
            loc=(name, *problem.path),
            input=None,
        )
        for problem in problems
    ]
    return ValidationError.from_exception_data(family.__name__, details)


def refusal(owner: type[BaseModel], name: str, error: ValidationError) -> RecipeError:
    """Return what is wrong with a value's fields, in the words of a recipe.

    Args:
        owner: the value's class.
        name: that a recipe calls it.
        error: pydantic's.

    >>> from laconic.weights import KMeans
    >>> KMeans(bit=2)
    Traceback (most recent call last):
    laconic.errors.RecipeError: kmeans: 'bit' is not a field; did you mean 'bits'?
    """
    found = (_problems(owner, item) for item in _united(owner, error.errors()))
    problems = _without_echoes(tuple(itertools.chain.from_iterable(found)))
    return RecipeError(f"{name}: {'; '.join(str(problem) for problem in problems)}", problems)


def _united(owner: type[BaseModel], items: Iterable[Any]) -> Iterator[Any]:
    """Yield pydantic's errors, those of a field's alternatives as one."""
    for place, group in itertools.groupby(items, key=lambda item: item["loc"][:1]):
        tried = list(group)
        if not _alternatives(owner, place) or any(len(item["loc"]) < 2 for item in tried):
            yield from tried
            continue
        inner = [item for item in tried if len(item["loc"]) > 2 or _inner(item)]
        if inner:  # one of them was begun: pydantic's name for it is no key of a recipe
            yield from ({**item, "loc": (*place, *item["loc"][2:])} for item in inner)
            continue
        messages = [item["msg"].partition(", unable")[0] for item in tried]
        wanted = [m.removeprefix(_WANTED) for m in messages if m.startswith(_WANTED)]
        others = [m.removeprefix("Value error, ") for m in messages if not m.startswith(_WANTED)]
        words = _WANTED + ", or ".join(wanted)
        yield tried[0] | {"loc": place, "msg": "; ".join([*others, words]), "type": ""}


def _alternatives(owner: type[BaseModel], place: tuple[Any, ...]) -> bool:
    """Return whether a field takes values of several kinds, none aside."""
    field = owner.model_fields.get(place[0]) if place else None
    return field is not None and len(admitted(field.annotation)) > 1


def _problems(owner: type[BaseModel], item: Any) -> tuple[FieldProblem, ...]:
    # A value inside a value has located its own problems: keep them, further down.
    place = tuple(item["loc"])
    found = (FieldProblem((*place, *p.path), p.message, p.key) for p in _inner(item))
    return tuple(found) or (_problem(owner, item),)


def _inner(item: Any) -> tuple[FieldProblem, ...]:
    error = item.get("ctx", {}).get("error")
    return error.problems if isinstance(error, RecipeError) else ()


def _without_echoes(problems: tuple[FieldProblem, ...]) -> tuple[FieldProblem, ...]:
    """Return the problems but missing fields that were only misspelt."""
    hints = "\n".join(problem.message for problem in problems if problem.key)
    misspelt = set(re.findall(r"did you mean ('[^']+')", hints))
    return tuple(p for p in problems if p.message.removesuffix(" is required") not in misspelt)


def _inside(owner: Any, name: str) -> str:
    """Return how a value is written in the field that takes it, where its name is given alone."""
    field = owner.taking(name)
    return f"; write '{field}: {name}', or '{field}: {{{name}: ...}}'" if field else ""


def _problem(owner: type[BaseModel], item: Any) -> FieldProblem:
    path, kind = tuple(item["loc"]), item["type"]
    if kind == "extra_forbidden":
        hint = _inside(owner, str(path[-1])) or nearest(str(path[-1]), owner.model_fields)
        return FieldProblem(path[:-1], f"'{path[-1]}' is not a field{hint}", str(path[-1]))
    if kind == "missing":
        return FieldProblem(path[:-1], f"'{path[-1]}' is required")
    message = item["msg"].removeprefix("Value error, ")
    if kind == "field":
        return FieldProblem(path, message, item["ctx"]["key"])
    if kind == "value_error":
        return FieldProblem(path, message)
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    message = _ASIDE.sub("", message)
    return FieldProblem(path, f"{message[0].lower()}{message[1:]}, got {item['input']!r}")
