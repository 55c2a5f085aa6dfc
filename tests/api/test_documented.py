"""Every public name has a docstring, a short first line and an example that runs."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from abc import ABC
from collections.abc import Callable

import pytest

import laconic

WIDEST = 80


def public() -> dict[str, object]:
    """Return every class and function that a package or a top-level module lists."""
    names = ["laconic", *(info.name for info in pkgutil.iter_modules(laconic.__path__, "laconic."))]
    found: dict[str, object] = {}
    for name in names:
        if not name.endswith("__"):
            module = importlib.import_module(name)
            for each in getattr(module, "__all__", []):
                value = getattr(module, each)
                if inspect.isclass(value) or inspect.isfunction(value):
                    found[f"{value.__module__}.{each}"] = value
    return found


PUBLIC = public()


def needs_example(value: object) -> bool:
    """Return whether an example is due: not for errors, nor for what only subclasses make real."""
    if value.__module__ == "laconic.cli.entry":
        return False  # the command line shows its examples in --help
    if not inspect.isclass(value):
        return True
    abstract = ABC in value.__bases__ or getattr(value, "_is_protocol", False)
    return not (abstract or issubclass(value, Exception))


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_docstring(name):
    text = inspect.cleandoc(PUBLIC[name].__doc__ or "")
    assert text, f"{name} has no docstring"
    summary = text.split("\n")[0]
    assert summary.endswith("."), f"{name}: the first line is no sentence"
    assert len(summary) <= WIDEST, f"{name}: the first line has {len(summary)} columns"
    assert ">>> " in text or not needs_example(PUBLIC[name]), f"{name} has no example"


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_functions_and_methods_are_typed(name):
    value = PUBLIC[name]
    methods = [value] if inspect.isfunction(value) else own_functions(value)
    for function in methods:
        parameters = list(inspect.signature(function).parameters.values())
        untyped = [p.name for p in parameters if p.annotation is p.empty]
        assert [each for each in untyped if each not in ("self", "cls")] == [], function
        assert "return" in function.__annotations__, f"{function} does not say what it returns"


def own_functions(value: type) -> list[Callable[..., object]]:
    return [
        function
        for name, function in vars(value).items()
        if inspect.isfunction(function) and function.__module__ == value.__module__
        if not name.startswith("_") or name in ("__init__", "__call__")
    ]
