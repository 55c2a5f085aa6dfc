"""Write the generated pages: docs/methods.md from docstrings, tables from files of results."""

from __future__ import annotations

import argparse
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from figures import benchmarks, papers, readme, results, table
from guide import choosing

from laconic import models, tasks
from laconic.cli.methods import Method, of_function, of_value
from laconic.recipe import families
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
laconic's, and where an entry knows that the paper differs, it says so. The field that is marked
*unnamed* may stand alone, without its name: `{kmeans: 4}` is `{kmeans: {bits: 4}}`. In Python the
same things are classes, and a field is a keyword argument.
"""
NETWORKS_INTRO = (
    "What a recipe's `model:` line names, besides `package.module:function`; `weights:` names a "
    "safetensors file with a state dict, or a network that was compressed."
)


def entry(
    method: Method,
    path: str,
    extra: str = "",
    *,
    unnamed: str = "",
    kinds: Mapping[str, Any] | None = None,
) -> str:
    """Return the part of the page on one name.

    Args:
        method: what is known of it.
        path: of its class or function.
        extra: what is said behind the path.
        unnamed: the field that may stand without its name.
        kinds: what the fields may hold, of those where it is known.
    """
    rows = [
        (
            f"`{name}`, unnamed" if name == unnamed else f"`{name}`",
            f"`{default}`" if default else "",
            with_values(meaning, (kinds or {}).get(name)),
        )
        for name, default, meaning in method.fields
    ]
    fields = table(rows, ("field", "default", "meaning")) if rows else ""
    parts = [f"### `{method.name}`", f"`{path}`{extra}", method.prose, fields]
    return "\n\n".join(part for part in parts if part)


def with_values(meaning: str, kind: Any) -> str:
    """Return what a field means, with the words that it takes where they are not in there.

    >>> with_values("which weights count.", typing.Literal["produced", "both"])
    'which weights count. `produced` or `both`.'
    """
    words = [word for each in alternatives(kind) for word in typing.get_args(each)]
    if all(re.search(rf"\b{word}\b", meaning) for word in words):
        return meaning
    *first, last = [text for each in alternatives(kind) for text in written(each)]
    return f"{meaning} {', '.join(first)} or {last}."


def alternatives(kind: Any) -> Iterator[Any]:
    """Yield the words that a field takes, and what else it does."""
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal or not inner:
        yield kind
    elif any(typing.get_origin(each) is typing.Literal for each in inner):
        for each in inner:
            yield from alternatives(each)


def written(kind: Any) -> Iterator[str]:
    """Yield how a recipe writes what a field takes."""
    if typing.get_origin(kind) is typing.Literal:
        yield from (f"`{word}`" for word in typing.get_args(kind))
    elif isinstance(kind, type) and issubclass(kind, Value):
        yield f"`{{{kind.name}: ...}}`"
    else:
        yield "a number"


def kinds_of(kind: type[Value]) -> Iterator[tuple[str, Any]]:
    """Yield what the fields of a value hold, those of groups too, by the names of its entry."""
    for name, info in kind.model_fields.items():
        group = info.get_default(call_default_factory=True)
        if isinstance(group, Value) and not isinstance(group, tuple(families())):
            inner = kinds_of(type(group))
            yield from ((f"{name}: {{{key}: ...}}", each) for key, each in inner)
        else:
            yield name, info.annotation


def value_entry(kind: type[Value]) -> str:
    """Return the part on a member of a family."""
    place = f"{'.'.join(kind.__module__.split('.')[:2])}.{kind.__name__}"
    extra = ", also inside `train: {during: [...]}`" if issubclass(kind, During) else ""
    unnamed = next(iter(kind.positional), "")
    return entry(of_value(kind), place, extra, unnamed=unnamed, kinds=dict(kinds_of(kind)))


def function_entry(package: Any, name: str) -> str:
    """Return the part on a function that a ``task:`` or ``model:`` line names."""
    unnamed = "path" if package is tasks else ""
    return entry(of_function(package, name), f"{package.__name__}.{name}", unnamed=unnamed)


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
    ROOT / "docs" / "choosing.md": choosing,
    ROOT / "benchmarks" / "README.md": lambda: benchmarks(NOTE.format(source="benchmarks/results")),
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
