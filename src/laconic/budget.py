"""Budget: upper limits on measured costs, and the exact knapsack that spends one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from laconic.errors import BudgetError, nearest
from laconic.text_value import TextValue

__all__ = ["Budget", "bytes_of", "knapsack"]

_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_BYTES |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_COUNT = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_TIME = {"ms": 1, "s": 10**3}
RELATIVE = "x"

# What a budget may limit: the name it is written with -> field of a measurement, units.
_QUANTITIES: dict[str, tuple[str, dict[str, int]]] = {
    "size": ("size_bytes", _BYTES),
    "parameters": ("parameters", _COUNT),
    "nonzero": ("nonzero", _COUNT),
    "macs": ("macs", _COUNT),
    "bit_operations": ("bit_operations", _COUNT),
    "latency": ("latency_ms", _TIME),
    "memory": ("peak_memory_bytes", _BYTES),
}
_NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_TERM = re.compile(rf"\s*(\w+)\s*([<>=]+)\s*({_NUMBER})\s*([a-z]*)\s*", re.IGNORECASE)
_AMOUNT = re.compile(rf"\s*({_NUMBER})\s*([a-z]+)\s*", re.IGNORECASE)
# Utilities are sums of floats: a gain below this is rounding (methods.md, A-4).
_GAIN = 1e-12


@dataclass(frozen=True)
class _Limit:
    """One term of a budget: ``amount`` in the field's own unit, or a share of the start."""

    field: str
    amount: float
    relative: bool

    def of(self, start: Mapping[str, float | None]) -> float:
        return self.amount * _measured(self.field, start) if self.relative else self.amount


class Budget(TextValue):
    """Upper limits on costs, as text: ``"size <= 28 MiB, macs <= 0.5x"``.

    Quantities: size and memory (B kB MB GB KiB MiB GiB), latency (ms s), and the counts
    parameters, nonzero, macs and bit_operations (no unit, K M G). ``0.5x`` is half of what
    the uncompressed model costs. Two limits on one quantity both hold.

    Costs are mappings keyed by the fields of a measurement: size_bytes, peak_memory_bytes,
    latency_ms, parameters, nonzero, macs, bit_operations.

    Raises:
        BudgetError: the text cannot be read; the nearest name or the units are given.

    >>> budget = Budget("size <= 1 KiB, macs <= 0.5x")
    >>> budget.exceeded_by({"size_bytes": 1030, "macs": 40}, start={"macs": 100})
    {'size_bytes': 6.0}
    """

    example = "size <= 28 MiB, macs <= 0.5x"
    described = f"upper limits: '{example}'"

    def __init__(self, text: str) -> None:
        parsed = [_parse(part, text) for part in text.split(",")]
        super().__init__(", ".join(tidied for tidied, _ in parsed))
        self._limits = tuple(limit for _, limit in parsed)

    @property
    def fields(self) -> frozenset[str]:
        """Return the fields of a measurement that are limited.

        >>> sorted(Budget("size <= 1 KiB, macs <= 0.5x").fields)
        ['macs', 'size_bytes']
        """
        return frozenset(limit.field for limit in self._limits)

    def limits(self, start: Mapping[str, float | None]) -> dict[str, float]:
        """Return the largest allowed cost of every limited field.

        Args:
            start: costs of the uncompressed model; read for limits such as ``0.5x``.

        Raises:
            BudgetError: a relative limit on a field that ``start`` lacks.

        >>> Budget("macs <= 0.5x, macs <= 1 K").limits({"macs": 3000})
        {'macs': 1000.0}
        """
        found: dict[str, float] = {}
        for limit in self._limits:
            found[limit.field] = min(limit.of(start), found.get(limit.field, math.inf))
        return found

    def exceeded_by(
        self, now: Mapping[str, float | None], start: Mapping[str, float | None]
    ) -> dict[str, float]:
        """Return by how much each limit is exceeded; empty: the budget is met.

        Args:
            now: costs of the model as it is.
            start: costs of the uncompressed model.

        Returns:
            The exceeded fields alone -> the amount above the limit, in bytes, ms or counts.

        Raises:
            BudgetError: a limited field was not measured.
        """
        over = {
            field: _measured(field, now) - allowed for field, allowed in self.limits(start).items()
        }
        return {field: amount for field, amount in over.items() if amount > 0}


def bytes_of(text: str) -> int:
    """Return an amount of memory in bytes.

    Args:
        text: a number and one of B, kB, MB, GB, KiB, MiB, GiB.

    Raises:
        BudgetError: anything else.

    >>> bytes_of("2 GB"), bytes_of("0.5 KiB")
    (2000000000, 512)
    """
    match = _AMOUNT.fullmatch(text)
    if match is None or match[2] not in _BYTES or math.isinf(float(match[1]) * _BYTES[match[2]]):
        raise BudgetError(
            f"'{text}' is no amount of memory; write a number and one of "
            f"{', '.join(_BYTES)}, such as '2 GB'"
        )
    return round(float(match[1]) * _BYTES[match[2]])


def _parse(part: str, whole: str) -> tuple[str, _Limit]:
    where = f"budget '{whole}'"
    match = _TERM.fullmatch(part)
    if match is None:
        raise BudgetError(
            f"{where}: '{part.strip()}' is no limit; write a quantity, '<=', a number and a "
            "unit, such as 'size <= 28 MiB' or 'macs <= 0.5x'"
        )
    quantity, sign, number, unit = match.groups()
    if quantity not in _QUANTITIES:
        raise BudgetError(f"{where}: no quantity '{quantity}'{nearest(quantity, _QUANTITIES)}")
    if sign != "<=":
        raise BudgetError(f"{where}: '{sign}' in '{part.strip()}'; a limit is written '<='")
    field, units = _QUANTITIES[quantity]
    if unit not in (RELATIVE, *units):
        raise BudgetError(f"{where}: {_unit_problem(quantity, unit, units)}")
    amount = float(number) * units.get(unit, 1)
    if not 0 < amount < math.inf:
        raise BudgetError(f"{where}: {quantity} <= {number}: a limit is finite and above 0")
    gap = " " if unit and unit != RELATIVE else ""
    return f"{quantity} <= {number}{gap}{unit}", _Limit(field, amount, unit == RELATIVE)


def _unit_problem(quantity: str, unit: str, units: Mapping[str, int]) -> str:
    choice = ", ".join(name for name in (*units, RELATIVE) if name)
    problem = f"'{unit}' is no unit of {quantity}" if unit else f"{quantity} needs a unit"
    return f"{problem}; choose one of: {choice}"


def _measured(field: str, costs: Mapping[str, float | None]) -> float:
    value = costs.get(field)
    if value is None:
        raise BudgetError(
            f"the budget limits {field}, which was not measured; measure it (a task gives the "
            "inputs that a forward needs) or take it out of the budget"
        )
    return float(value)


def knapsack(costs: Sequence[int], utilities: Sequence[float], capacity: int) -> tuple[int, ...]:
    """Return the items of largest total utility whose total cost fits the capacity.

    Exact 0/1 knapsack by dynamic programming (BinaryBERT, adaptive splitting):
    ``V[i][q] = max(V[i-1][q], V[i-1][q - c_i] + u_i)``. Memory is items x capacity bytes after
    division by the costs' common divisor, so round large costs up to a grain first.

    Args:
        costs: of each item, whole numbers from 0.
        utilities: of each item; an item without a gain is never taken.
        capacity: largest total cost.

    Returns:
        Positions of the chosen items, ascending.

    Raises:
        BudgetError: lengths differ, a cost or the capacity is negative, a utility not finite.

    >>> knapsack((2, 3, 4, 5, 6), (3, 4, 5, 8, 9), 10)
    (0, 1, 3)
    """
    _check_items(costs, utilities, capacity)
    grain = math.gcd(*costs) or 1
    scaled = [cost // grain for cost in costs]
    room = min(capacity // grain, sum(scaled))
    value = np.zeros(room + 1)
    taken = np.zeros((len(scaled), room + 1), dtype=bool)
    for item, (cost, utility) in enumerate(zip(scaled, utilities, strict=True)):
        if cost <= room:
            without, with_item = value[cost:], value[: room + 1 - cost] + utility
            taken[item, cost:] = with_item > without + _GAIN
            value[cost:] = np.where(taken[item, cost:], with_item, without)
    left, chosen = int(np.argmax(value)), []
    for item in reversed(range(len(scaled))):
        if taken[item, left]:
            chosen.append(item)
            left -= scaled[item]
    return tuple(reversed(chosen))


def _check_items(costs: Sequence[int], utilities: Sequence[float], capacity: int) -> None:
    if len(costs) != len(utilities):
        raise BudgetError(
            f"knapsack: {len(costs)} costs and {len(utilities)} utilities; each item needs both"
        )
    if capacity < 0 or min(costs, default=0) < 0:
        raise BudgetError(
            f"knapsack: the capacity ({capacity}) and every cost (least: {min(costs, default=0)}) "
            "must not be negative"
        )
    if not all(math.isfinite(utility) for utility in utilities):
        raise BudgetError("knapsack: a utility is NaN or infinite; give finite numbers")
