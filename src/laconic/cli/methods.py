"""What every name that a recipe may write means, with its fields, read off the docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from laconic.step import Value, members

__all__ = ["Method", "described", "of_function", "of_value"]


@dataclass(frozen=True)
class Method:
    """A name that a recipe may write.

    Attributes:
        name: as it is written.
        family: what it is one of.
        prose: what it does.
        fields: name, default and meaning of each field; the default is empty where it is required.

    >>> next(described("prune")).fields[2][:2]
    ('keep', '')
    """

    name: str
    family: str
    prose: str
    fields: tuple[tuple[str, str, str], ...]


def described(name: str) -> Iterator[Method]:
    """Yield what a recipe may call so; several families may have the same name.

    >>> [method.family for method in described("linear")]
    ['decay']
    """
    from laconic import models, tasks
    from laconic.recipe import families
    from laconic.step import snake

    kinds: dict[type[Value], str] = {}
    for family in families():
        if name in members(family):  # a step that may run inside training is of two families
            kinds.setdefault(members(family)[name], snake(family.__name__))
    for kind, word in kinds.items():
        yield of_value(kind, word)
    for word, module, names in (("model", models, models.BUILDERS), ("task", tasks, tasks.KINDS)):
        if name in names:
            yield of_function(module, name, word)


def of_value(kind: type[Value], family: str = "") -> Method:
    """Return what a member of a family means."""
    defaults, meanings = _fields(kind)
    fields = ((each, _written(value), meanings.get(each, "")) for each, value in defaults.items())
    return Method(kind.name, family, _sections(kind)[0], tuple(fields))


def of_function(module: Any, name: str, family: str = "") -> Method:
    """Return what a function that a ``task:`` or ``model:`` line names means."""
    function = getattr(module, name)
    prose, meanings = _sections(function)
    fields = (
        (each, _written(item.default), meanings.get(each, ""))
        for each, item in inspect.signature(function).parameters.items()
    )
    return Method(name, family, prose, tuple(fields))


def _sections(documented: Any) -> tuple[str, dict[str, str]]:
    """Return the prose of a docstring, and the meaning of each attribute or argument."""
    text = re.split(r"\n\s*>>> ", inspect.cleandoc(documented.__doc__ or ""))[0]
    prose: list[str] = []
    meanings: dict[str, str] = {}
    names: list[str] = []
    listing = skipping = False
    for line in text.split("\n"):
        if re.fullmatch(r"(Args|Attributes|Raises|Returns):", line):
            listing = line in ("Args:", "Attributes:")
            names = []
            skipping = not listing
        elif line and not line.startswith(" "):
            listing, skipping = False, False
            prose.append(line)
        elif listing and (found := re.match(r"    (\w[\w, ]*): (.*)", line)):
            names = found[1].split(", ")
            meanings |= dict.fromkeys(names, found[2])
        elif listing and line.strip():
            meanings |= {name: f"{meanings[name]} {line.strip()}" for name in names}
        elif prose and not (listing or skipping):
            prose.append(line)
    return re.sub("::$", ":", "\n".join(prose).strip(), flags=re.MULTILINE), meanings


def _fields(kind: type[Value]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return default and meaning of every field, inherited ones and those of groups included."""
    defaults: dict[str, Any] = {}
    meanings: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        meanings |= _sections(base)[1] if issubclass(base, Value) else {}
    for name, info in kind.model_fields.items():
        default = info.get_default(call_default_factory=True)
        defaults[name] = default
        if isinstance(default, Value) and _is_group(default):
            inner, inner_meanings = _fields(type(default))
            defaults.pop(name)
            nested = {key: f"{name}: {{{key}: ...}}" for key in inner}
            defaults |= {nested[key]: value for key, value in inner.items()}
            meanings |= {nested[key]: inner_meanings.get(key, "") for key in inner}
    return defaults, meanings


def _is_group(value: Value) -> bool:
    """Return whether a value is a group of fields, and no member of a family."""
    from laconic.recipe import families

    return not isinstance(value, tuple(families()))


def _written(value: Any) -> str:
    """Return a default as a recipe writes it."""
    if value in (PydanticUndefined, inspect.Parameter.empty):
        return ""
    if isinstance(value, Value):
        value = value.to_data()
    plain = list(value) if isinstance(value, tuple) else value
    plain = plain if isinstance(plain, str | int | float | dict | list | None) else str(plain)
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()
