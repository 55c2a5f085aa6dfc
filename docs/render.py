"""Write the generated pages: docs/methods.md from docstrings, tables from papers/results."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from figures import papers, readme, results, table
from pydantic_core import PydanticUndefined

from laconic import models, tasks
from laconic.recover import (
    Decay,
    Feed,
    LayerMap,
    Objective,
    Optimizer,
    Order,
    Penalty,
    Proximal,
    Solve,
)
from laconic.step import During, Step, Value, members
from laconic.structure import Criterion, Depth, Factorization, Gain, Ghosts, Schedule
from laconic.weights import Activation, Representation

__all__ = ["main", "methods", "results"]

ROOT = Path(__file__).resolve().parents[1]
NOTE = "<!-- Written by scripts/docs from {source}; edit that and run scripts/docs. -->"

# Family -> its heading, and what a recipe writes it for.
FAMILIES: dict[type[Value], tuple[str, str]] = {
    Step: ("Steps", "The items of a recipe's `steps:` list, run in order."),
    Representation: (
        "Representations",
        "How weights are stored: `quantize: {weight: ...}`; a bare number of bits is `symmetric`.",
    ),
    Activation: (
        "Activations",
        "How inputs of layers are rounded: `quantize: {activation: ...}`; a number is `min_max`.",
    ),
    Criterion: ("Criteria", "How weights are ranked: `prune: {by: ...}`; larger scores are kept."),
    Schedule: ("Schedules", "How the kept fraction falls: `prune: {schedule: ...}`."),
    Depth: ("Depths", "Which layers stay: `drop_layers: {by: ...}`."),
    Factorization: ("Factorisations", "What a layer becomes: `factorize: {method: ...}`."),
    Ghosts: ("Ghosts", "What imitates the parts that were cut: `ghost: {by: ...}`."),
    Gain: ("Gains", "Which parts are split: `plan_split: {choose: ...}`."),
    Objective: (
        "Objectives",
        "What training minimises: `train: {objective: ...}`; a list is a sum.",
    ),
    LayerMap: (
        "Layer maps",
        "Which layer of the teacher teaches which: `hidden: {map: ...}`; a list is `chosen`.",
    ),
    Penalty: ("Penalties", "What is added to the objective: `train: {penalty: ...}`."),
    Feed: (
        "Feeds",
        "What parts are fed, in the teacher and in the student: `reconstruct: {feed: ...}`.",
    ),
    Order: ("Orders", "Which part learns when: `reconstruct: {order: ...}`."),
    Solve: ("Solvers", "How a part's numbers are found: `reconstruct: {solve: ...}`."),
    Proximal: (
        "Proximal penalties",
        "What is removed of a layer while it learns: `{solve: {gradient: {penalty: ...}}}`.",
    ),
    Optimizer: ("Optimisers", "How parameters move: `train: {optimizer: ...}`."),
    Decay: ("Learning-rate decay", "The learning rate over training: `{optimizer: {decay: ...}}`."),
}
METHODS_INTRO = """# Methods

Everything a recipe may name, with its fields. A field without a default is required; defaults are
the paper's. In Python the same things are classes, and a field is a keyword argument.
"""
NETWORKS_INTRO = (
    "What a recipe's `model:` line names, besides `package.module:function`; `weights:` names a "
    "safetensors file with a state dict."
)


def sections(documented: Any) -> tuple[str, dict[str, str]]:
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
        elif not line and prose and not (listing or skipping):
            prose.append("")
    return "\n".join(prose).strip(), meanings


def fields(kind: type[Value]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return default and meaning of every field, inherited ones and those of groups included."""
    defaults: dict[str, Any] = {}
    meanings: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        meanings |= sections(base)[1] if issubclass(base, Value) else {}
    for name, info in kind.model_fields.items():
        default = info.get_default(call_default_factory=True)
        defaults[name] = default
        if isinstance(default, Value) and not isinstance(default, tuple(FAMILIES)):
            inner, inner_meanings = fields(type(default))
            defaults.pop(name)
            defaults |= {f"{name}.{key}": value for key, value in inner.items()}
            meanings |= {f"{name}.{key}": text for key, text in inner_meanings.items()}
    return defaults, meanings


def written(value: Any) -> str:
    """Return a default as a recipe writes it."""
    if value in (PydanticUndefined, inspect.Parameter.empty):
        return ""
    if isinstance(value, Value):
        value = value.to_data()
    plain = list(value) if isinstance(value, tuple) else value
    plain = plain if isinstance(plain, str | int | float | dict | list | None) else str(plain)
    text = yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n")
    return f"`{text.strip()}`"


def fields_table(defaults: Mapping[str, Any], meanings: Mapping[str, str]) -> str:
    """Return the table of fields, their defaults and meanings; empty without fields."""
    rows = [
        (f"`{name}`", written(default), meanings.get(name, ""))
        for name, default in defaults.items()
    ]
    return table(rows, ("field", "default", "meaning")) if rows else ""


def entry(name: str, path: str, documented: Any, fields: str, extra: str = "") -> str:
    """Return the part of the page on one method."""
    parts = [f"### `{name}`", f"`{path}`{extra}", sections(documented)[0], fields]
    return "\n\n".join(part for part in parts if part)


def value_entry(kind: type[Value]) -> str:
    """Return the part on a member of a family."""
    defaults, meanings = fields(kind)
    place = f"{'.'.join(kind.__module__.split('.')[:2])}.{kind.__name__}"
    extra = ", also inside `train: {during: [...]}`" if issubclass(kind, During) else ""
    return entry(kind.name, place, kind, fields_table(defaults, meanings), extra)


def function_entry(package: Any, name: str) -> str:
    """Return the part on a function that a ``task:`` or ``model:`` line names."""
    function: Callable[..., Any] = getattr(package, name)
    defaults = {key: item.default for key, item in inspect.signature(function).parameters.items()}
    fields = fields_table(defaults, sections(function)[1])
    return entry(name, f"{package.__name__}.{name}", function, fields)


def methods() -> str:
    """Return the page of every name a recipe may write."""
    parts = [NOTE.format(source="the docstrings"), METHODS_INTRO]
    for family, (heading, what) in FAMILIES.items():
        parts += [f"## {heading}", what]
        kinds = members(family, every=True).values()
        # A user's own members, or a test's, are not Laconic's to document.
        parts += [value_entry(kind) for kind in kinds if kind.__module__.startswith("laconic.")]
    parts += ["## Tasks", "What a recipe's `task:` line names; paths start at the recipe's folder."]
    parts += [function_entry(tasks, name) for name in tasks.KINDS]
    parts += ["## Networks", NETWORKS_INTRO]
    parts += [function_entry(models, name) for name in models.BUILDERS]
    return "\n\n".join(part.strip() for part in parts) + "\n"


PAGES: dict[Path, Callable[[], str]] = {
    ROOT / "docs" / "methods.md": methods,
    ROOT / "papers" / "README.md": lambda: papers(NOTE.format(source="papers/results")),
    ROOT / "README.md": readme,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if one is stale")
    check = parser.parse_args(arguments).check
    stale = []
    for path, page in PAGES.items():
        text = page()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(text, encoding="utf-8")
    for path in stale:
        print(f"{path} {'is stale: run scripts/docs' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
