"""Write the generated pages: docs/methods.md from docstrings, tables from papers/results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from figures import papers, readme, results, table

from laconic import models, tasks
from laconic.cli.methods import Method, of_function, of_value
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


def entry(method: Method, path: str, extra: str = "") -> str:
    """Return the part of the page on one name."""
    rows = [
        (f"`{name}`", f"`{default}`" if default else "", meaning)
        for name, default, meaning in method.fields
    ]
    fields = table(rows, ("field", "default", "meaning")) if rows else ""
    parts = [f"### `{method.name}`", f"`{path}`{extra}", method.prose, fields]
    return "\n\n".join(part for part in parts if part)


def value_entry(kind: type[Value]) -> str:
    """Return the part on a member of a family."""
    place = f"{'.'.join(kind.__module__.split('.')[:2])}.{kind.__name__}"
    extra = ", also inside `train: {during: [...]}`" if issubclass(kind, During) else ""
    return entry(of_value(kind), place, extra)


def function_entry(package: Any, name: str) -> str:
    """Return the part on a function that a ``task:`` or ``model:`` line names."""
    return entry(of_function(package, name), f"{package.__name__}.{name}")


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
