"""Public names: what ``__all__`` promises is there, and what is there is promised."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from abc import ABC
from types import ModuleType

import pytest

import laconic
from laconic.step import Step, Value, members

MODULES = ["laconic"] + [
    info.name
    for info in pkgutil.walk_packages(laconic.__path__, "laconic.")
    if not info.name.split(".")[-1].startswith("_")
]
PACKAGES = [name for name in MODULES if hasattr(importlib.import_module(name), "__path__")]
TABLES = {name: importlib.import_module(name)._TABLE for name in PACKAGES}


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.mark.parametrize("name", MODULES)
def test_every_promised_name_exists_once(name):
    module = load(name)
    promised = list(module.__all__)
    assert promised == [each for each in promised if not each.startswith("_")]
    assert len(set(promised)) == len(promised)
    for each in promised:
        assert getattr(module, each, None) is not None, f"{name}.{each} is promised and missing"


@pytest.mark.parametrize("name", MODULES)
def test_star_import_gives_exactly_the_promised_names(name):
    namespace: dict[str, object] = {}
    exec(f"from {name} import *", namespace)
    namespace.pop("__builtins__")
    assert sorted(namespace) == sorted(load(name).__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_package_lists_its_table_sorted(package):
    module = load(package)
    assert module.__all__ == sorted(TABLES[package]) == dir(module)
    assert list(TABLES[package]) == sorted(TABLES[package]), "keep the table in order"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_name_is_a_module_of_its_package_too(package):
    """Importing the module would put it in the name's place."""
    modules = {info.name for info in pkgutil.iter_modules(load(package).__path__)}
    assert not modules & TABLES[package].keys()


@pytest.mark.parametrize("package", PACKAGES)
def test_table_names_the_module_that_defines(package):
    for name, home in TABLES[package].items():
        assert home == package or home.startswith(f"{package}.")
        private = home.split(".")[-1].startswith("_")
        assert private or name in load(home).__all__, f"{home} does not list {name}"
        value = getattr(load(package), name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__module__ == home, f"{name} is defined elsewhere"


def test_unknown_name_is_an_attribute_error():
    for package in PACKAGES:
        with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
            load(package).nonsense  # noqa: B018


def test_front_door_repeats_the_packages():
    for name, home in laconic._TABLE.items():
        package = ".".join(home.split(".")[:2])
        assert getattr(laconic, name) is getattr(load(package), name)
        assert name in load(package).__all__, f"laconic.{name} is not public in {package}"


def families() -> list[type[Value]]:
    members(Step, every=True)
    return [family for family in Value._registry if family.__module__.startswith("laconic.")]


@pytest.mark.parametrize("family", families(), ids=lambda family: family.__name__)
def test_every_method_is_in_the_table_of_its_package(family):
    for name, kind in members(family, every=True).items():
        if kind.__module__.startswith("laconic."):
            package = ".".join(kind.__module__.split(".")[:2])
            assert kind.__name__ in TABLES[package], f"a recipe cannot find '{name}'"


@pytest.mark.parametrize("family", families(), ids=lambda family: family.__name__)
def test_methods_are_abstract_or_final(family):
    for kind in members(family, every=True).values():
        parents = [base for base in kind.__mro__[1:] if ABC not in base.__bases__]
        concrete = [base for base in parents if base.__module__.startswith("laconic.")]
        assert [base for base in concrete if base is not Value] == []


@pytest.mark.parametrize("step", sorted(members(Step, every=True)))
def test_step_has_at_most_eight_fields(step):
    fields = members(Step)[step].model_fields
    assert len(fields) <= 8, f"group some of {', '.join(fields)} into a value"


def test_a_name_of_another_package_is_told_where_it_is() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Split'; it is in laconic\.structure"):
        _ = laconic.Split
    with pytest.raises(AttributeError, match=r"no attribute 'Split'; it is in laconic\.structure"):
        _ = laconic.weights.Split
    assert not hasattr(laconic, "__nothing__")
