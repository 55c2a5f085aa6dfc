"""What a run came to, in words: the headline, a few sentences, a verdict and four changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laconic.budget import Budget
from laconic.errors import BudgetError, RecipeError
from laconic.ledger import Measurement, excess_text, ledger, size_text
from laconic.problems import read_yaml
from laconic.report.tables import COUNTS, Metric, main_metric, rounded, times

__all__ = [
    "Tile",
    "headline",
    "recipe_data",
    "sentences",
    "tiles",
    "unfinished",
    "verdict",
]

# Larger numbers are rounded where they are shown large.
FULL_NUMBERS = 10**7


@dataclass(frozen=True)
class Tile:
    """One quantity before and after.

    Attributes:
        title: of the quantity.
        before: its value at first; empty: there is no before.
        after: its value now.
        detail: a line below.
    """

    title: str
    before: str
    after: str
    detail: str


def headline(history: Sequence[Measurement], facts: Mapping[str, Any]) -> str:
    """Return the result in a few words.

    Args:
        history: not empty.
        facts: of the run; the task's name is used.
    """
    first, last = history[0], history[-1]
    name = (facts.get("task") or {}).get("name")
    text = size_text(last.size_bytes) if len(history) == 1 else _change(first, last)
    return f"{name}: {text}" if name else text[:1].upper() + text[1:]


def _change(first: Measurement, last: Measurement) -> str:
    if last.size_bytes == first.size_bytes:
        return "the same size"
    smaller = last.size_bytes < first.size_bytes
    factor = first.size_bytes / last.size_bytes
    return f"{times(factor)} smaller" if smaller else f"{times(1 / factor)} larger"


def sentences(history: Sequence[Measurement], facts: Mapping[str, Any]) -> str:
    """Return what happened to size and score.

    Args:
        history: not empty.
        facts: of the run; the number of test examples is used.
    """
    first, last = history[0], history[-1]
    metric = main_metric(history)
    if len(history) == 1:
        parts = [f"One measurement, of a file of {size_text(last.size_bytes)}."]
    else:
        parts = [f"{size_text(first.size_bytes)} became {size_text(last.size_bytes)}."]
    if metric is not None:
        parts.append(_score_sentence(metric, history, facts))
    if len(history) > 1:
        codes = times(ledger(history)[-1].nominal_total)
        parts.append(f"Counted by codes alone, as papers do, the factor is {codes}.")
    return " ".join(parts)


def verdict(history: Sequence[Measurement], facts: Mapping[str, Any]) -> str:
    """Return whether the budget is met; of a run that is not finished, how far it came.

    Args:
        history: not empty.
        facts: of the run; its recipe is used.

    Returns:
        A sentence; empty: the run is finished, and its recipe has no budget.
    """
    if left := unfinished(history, facts):
        return f"Unfinished: {left}."
    text = recipe_data(facts).get("budget")
    if text is None:
        return ""
    first, last = (vars(history[index]) for index in (0, -1))
    try:
        exceeded = Budget(str(text)).exceeded_by(last, first)
    except BudgetError as error:
        return f"Budget: not known; {error}."
    came = f"exceeded by {excess_text(exceeded)}" if exceeded else "met"
    return f"Budget: {came} ({text})."


def unfinished(history: Sequence[Measurement], facts: Mapping[str, Any]) -> str:
    """Return how many steps of a recipe are done; empty: all of them are.

    >>> from laconic.measure import measure
    >>> from laconic.models import digits_cnn
    >>> unfinished([measure(digits_cnn())], {"recipe": "steps: [train, train]"})
    '0 of 2 steps are done'
    """
    steps = recipe_data(facts).get("steps")
    count = len(steps) if isinstance(steps, list) else 0
    done = len(history) - 1
    return f"{done} of {count} steps are done" if done < count else ""


def recipe_data(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe of a run as data; empty where there is none that can be read."""
    try:
        found = read_yaml(str(facts.get("recipe", "")))
    except RecipeError:
        found = None
    return found if isinstance(found, dict) else {}


def _score_sentence(
    metric: Metric, history: Sequence[Measurement], facts: Mapping[str, Any]
) -> str:
    before, after = (history[index].metrics.get(metric.name) for index in (0, -1))
    count = ((facts.get("task") or {}).get("examples") or {}).get("test")
    where = f" on {count:,} test examples" if count else ""
    new = _with_unit(metric, after)
    if len(history) == 1 or before is None or after is None:
        return f"{metric.title} is {new}{where}."
    if metric.text(before) == metric.text(after):
        return f"{metric.title} stayed at {new}{where}."
    difference = _difference(metric, before, after)
    return f"{metric.title} went from {_with_unit(metric, before)} to {new}{where}{difference}."


def _with_unit(metric: Metric, value: float | None) -> str:
    if value is not None and math.isnan(value):
        return "not a number"
    return f"{metric.text(value)}{metric.unit}"


def _difference(metric: Metric, before: float, after: float) -> str:
    if not math.isfinite(after - before):
        return ""
    unit = " points" if metric.share else ""
    word = "higher" if after > before else "lower"
    return f", {metric.text(abs(after - before))}{unit} {word}"


def tiles(history: Sequence[Measurement]) -> list[Tile]:
    """Return size, score, non-zero parameters and cost, each before and after.

    Args:
        history: not empty.
    """
    first, last = history[0], history[-1]
    found = [
        _size_tile(first, last),
        _score_tile(history),
        _nonzero_tile(first, last),
        _cost_tile(first, last),
    ]
    alone = len(history) == 1
    return [
        Tile(tile.title, "" if alone else tile.before, tile.after, tile.detail)
        for tile in found
        if tile is not None
    ]


def _size_tile(first: Measurement, last: Measurement) -> Tile:
    (before, was), (after, now) = (_both_units(one.size_bytes) for one in (first, last))
    return Tile("File size", before, after, now if was == now else f"{was} → {now}")


def _both_units(size: int) -> tuple[str, str]:
    """Return a size in decimal and in binary units."""
    decimal, _, binary = size_text(size).removesuffix(")").partition(" (")
    return decimal, binary or decimal


def _score_tile(history: Sequence[Measurement]) -> Tile | None:
    metric = main_metric(history)
    if metric is None:
        return None
    first, last = (history[index].metrics.get(metric.name) for index in (0, -1))
    detail = "measured once" if len(history) == 1 else "unchanged"
    if first is not None and last is not None and metric.text(first) != metric.text(last):
        detail = _difference(metric, first, last).removeprefix(", ")
    return Tile(metric.title, _with_unit(metric, first), _with_unit(metric, last), detail)


def _nonzero_tile(first: Measurement, last: Measurement) -> Tile:
    share = last.nonzero / max(last.parameters, 1)
    detail = f"{share:.1%} of {last.parameters:,}"
    short = max(first.nonzero, last.nonzero) >= FULL_NUMBERS
    before, after = (_count(n) if short else f"{n:,}" for n in (first.nonzero, last.nonzero))
    return Tile("Non-zero parameters", before, after, detail)


def _cost_tile(first: Measurement, last: Measurement) -> Tile | None:
    """Return the MACs; where steps left them alone, the bit operations, which show more."""
    if first.macs is None or last.macs is None:
        return None
    took = "" if last.latency_ms is None else f"; {last.latency_ms:.3g} ms"
    first_bits, last_bits = first.bit_operations, last.bit_operations
    if (
        first.macs != last.macs
        or first_bits == last_bits
        or first_bits is None
        or last_bits is None
    ):
        detail = f"one example, zeros included{took}"
        return Tile("Multiply-accumulates", _count(first.macs), _count(last.macs), detail)
    detail = f"{_count(last.macs)} MACs{took}"
    return Tile("Bit operations of one example", _count(first_bits), _count(last_bits), detail)


def _count(value: int) -> str:
    return rounded(value, COUNTS, 3)
