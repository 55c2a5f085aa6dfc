"""Every exception laconic raises, in one tree.

    LaconicError
    |-- RecipeError      a recipe or a field of a step is wrong (also a ValueError)
    |-- ScopeError       a pattern selects nothing
    |-- AxisError        an axis is frozen, stale or of another model
    |-- ChainError       a step cannot follow the steps before it
    |-- BudgetError      a budget cannot be read or cannot be met
    |-- FeatureError     a named feature of a forward is missing
    |-- TaskError        data are empty, misshapen, not finite or out of range
    |-- ModelError       a model cannot be built, loaded or used
    |-- RunError         a run directory or a checkpoint cannot be used
    |-- ArtifactError    a file is damaged, hostile or of another version
    `-- MissingExtra     an optional package is not installed

A message says what is wrong (with the values), where, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = [
    "ArtifactError",
    "AxisError",
    "BudgetError",
    "ChainError",
    "FeatureError",
    "FieldProblem",
    "LaconicError",
    "MissingExtra",
    "ModelError",
    "RecipeError",
    "RunError",
    "ScopeError",
    "TaskError",
    "few",
    "nearest",
]


class LaconicError(Exception):
    """Base of every error laconic raises on purpose."""


@dataclass(frozen=True)
class FieldProblem:
    """One wrong field: where it stands in the recipe and what is wrong.

    Attributes:
        path: keys and indices down to the value, or to the mapping of an unknown key.
        message: what is wrong.
        key: the unknown key; empty: the value itself is wrong.

    >>> str(FieldProblem(("steps", 0, "prune"), "'keeps' is not a field", "keeps"))
    "steps.0.prune: 'keeps' is not a field"
    """

    path: tuple[str | int, ...]
    message: str
    key: str = ""

    def __str__(self) -> str:
        where = ".".join(str(part) for part in self.path)
        return f"{where}: {self.message}" if where else self.message


class RecipeError(LaconicError, ValueError):
    """A recipe, or a field of one of its steps, is wrong."""

    def __init__(self, message: str, problems: tuple[FieldProblem, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


class ScopeError(LaconicError):
    """A scope cannot be read, or one of its patterns selects nothing."""


class AxisError(LaconicError):
    """An axis may not be changed: frozen, stale or unknown."""


class ChainError(LaconicError):
    """A step cannot follow the steps that came before it."""


class BudgetError(LaconicError):
    """A budget cannot be read, or cannot be met."""


class FeatureError(LaconicError):
    """A named feature of a forward is missing or empty."""


class TaskError(LaconicError):
    """Data of a task are empty, misshapen, not finite or out of range."""


class ModelError(LaconicError):
    """A model cannot be built, loaded or used as asked."""


class RunError(LaconicError):
    """A run directory or a checkpoint cannot be used."""


class ArtifactError(LaconicError):
    """An artefact is damaged, hostile, or of a version this laconic cannot read."""


class MissingExtra(LaconicError, ImportError):
    """An optional package is needed and not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"'{package}' is not installed; in the clone of laconic run: pip install '.[{extra}]'"
        )


def few(names: Sequence[str], most: int) -> str:
    """Return the first of some names, and how many more there are.

    >>> few(["a", "b", "c"], 2), few(["a"], 2)
    ('a, b and 1 more', 'a')
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def nearest(word: str, options: Iterable[str], *, otherwise: Iterable[str] = ()) -> str:
    """Return a hint naming the options nearest to a mistyped word.

    Args:
        word: what was written.
        options: what could have been written.
        otherwise: what to name when none is close; by default some of the options.

    >>> nearest("keeps", ["keep", "scope"])
    "; did you mean 'keep'?"
    """
    names = sorted(options)
    close = difflib.get_close_matches(word, names, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    if not names:
        return ""
    shown = sorted(otherwise) or (names if len(names) <= 12 else [*names[:8], "..."])
    return f"; choose one of: {', '.join(shown)}"
