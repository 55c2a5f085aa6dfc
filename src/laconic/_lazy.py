"""Lazy packages: a table of public names, imported when first touched."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

# Where public names are looked for.
PACKAGES = ("structure", "weights", "recover", "tasks", "models", "report", "ship")


def attach(
    package: str, table: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` for a lazy package.

    Args:
        package: the package's ``__name__``.
        table: public name -> absolute name of the module that defines it.

    The table is the one line a new method adds: registration imports nothing.
    """

    def __getattr__(name: str) -> Any:
        if name not in table:
            hint = "" if name.startswith("_") else _elsewhere(package, name)
            raise AttributeError(f"module {package!r} has no attribute {name!r}{hint}")
        value = getattr(importlib.import_module(table[name]), name)
        if not isinstance(value, ModuleType):
            setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted(table)

    return __getattr__, __dir__, sorted(table)


def _elsewhere(package: str, name: str) -> str:
    """Return which package of ours has a name that this one has not, for a message."""
    for other in (f"laconic.{each}" for each in PACKAGES):
        if other != package and name in importlib.import_module(other).__all__:
            return f"; it is in {other}"
    return ""
