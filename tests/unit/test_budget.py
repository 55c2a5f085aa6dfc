"""Budget: reading, comparing, and the knapsack against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from laconic.budget import Budget, bytes_of, knapsack
from laconic.errors import BudgetError

COSTS = {
    "size_bytes": 1000,
    "parameters": 200,
    "nonzero": 100,
    "macs": 5000,
    "bit_operations": 7000,
    "latency_ms": 12.5,
    "peak_memory_bytes": 4096,
}


@pytest.mark.parametrize(
    ("text", "field", "limit"),
    [
        ("size <= 7 B", "size_bytes", 7),
        ("size <= 2 kB", "size_bytes", 2_000),
        ("size <= 2 MB", "size_bytes", 2_000_000),
        ("size <= 0.5 GB", "size_bytes", 500_000_000),
        ("size <= 2 KiB", "size_bytes", 2_048),
        ("size <= 28 MiB", "size_bytes", 29_360_128),
        ("memory <= 1.5 GiB", "peak_memory_bytes", 1_610_612_736),
        ("parameters <= 110 M", "parameters", 110e6),
        ("nonzero <= 12345", "nonzero", 12345),
        ("macs <= 2.5e2 K", "macs", 250_000),
        ("bit_operations <= 3 G", "bit_operations", 3e9),
        ("latency <= 8 ms", "latency_ms", 8),
        ("latency <= 0.25 s", "latency_ms", 250),
        ("macs <= 0.5x", "macs", 2500),
        ("latency <= 2x", "latency_ms", 25),
    ],
)
def test_units_and_fields(text: str, field: str, limit: float) -> None:
    assert Budget(text).limits(COSTS) == {field: limit}


def test_text_is_normalised_so_that_equal_budgets_are_equal() -> None:
    first, second = Budget("size<=28MiB,macs <=  0.5 x"), Budget("size <= 28 MiB, macs <= 0.5x")
    assert first == second
    assert hash(first) == hash(second)
    assert first != Budget("size <= 28 MB, macs <= 0.5x")
    assert str(first) == "size <= 28 MiB, macs <= 0.5x"
    assert repr(first) == "Budget('size <= 28 MiB, macs <= 0.5x')"


def test_exceeded_by_names_only_what_is_over_and_by_how_much() -> None:
    budget = Budget("size <= 900 B, macs <= 0.5x, latency <= 20 ms")
    now = {"size_bytes": 1000, "macs": 2500, "latency_ms": 12.0}
    assert budget.exceeded_by(now, COSTS) == {"size_bytes": 100}
    assert budget.exceeded_by(now | {"size_bytes": 900}, COSTS) == {}
    assert budget.exceeded_by(now | {"macs": 2501}, COSTS) == {"size_bytes": 100, "macs": 1}


def test_the_tighter_of_two_limits_on_one_quantity_counts() -> None:
    budget = Budget("macs <= 3 K, macs <= 0.5x")
    assert budget.limits(COSTS) == {"macs": 2500}
    assert budget.limits({"macs": 10_000}) == {"macs": 3000}


@pytest.mark.parametrize("missing", [{}, {"latency_ms": None}])
def test_a_quantity_that_was_not_measured_is_named(missing: dict[str, float | None]) -> None:
    budget = Budget("latency <= 0.5x")
    with pytest.raises(BudgetError, match="latency_ms, which was not measured"):
        budget.exceeded_by({"latency_ms": 1.0}, missing)
    with pytest.raises(BudgetError, match="latency_ms, which was not measured"):
        Budget("latency <= 5 ms").exceeded_by(missing, COSTS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sise <= 28 MiB", "no quantity 'sise'; did you mean 'size'"),
        ("flops <= 1 G", "choose one of: bit_operations, latency, macs"),
        ("size <= 28", "size needs a unit; choose one of: B, kB, MB, GB, KiB, MiB, GiB, x"),
        ("size <= 28 ms", "'ms' is no unit of size"),
        ("macs <= 1 MiB", "'MiB' is no unit of macs; choose one of: K, M, G, x"),
        ("size < 28 MiB", "'<' in 'size < 28 MiB'"),
        ("size >= 28 MiB", "'>='"),
        ("size <= 0 MiB", "above 0"),
        ("macs <= 1e999", "finite"),
        ("size <= -1 MiB", "is no limit"),
        ("size", "'size' is no limit"),
        ("", "'' is no limit"),
        ("macs <= 0.5x,", "'' is no limit"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_hint(text: str, message: str) -> None:
    with pytest.raises(BudgetError, match=r"^budget '") as error:
        Budget(text)
    assert message in str(error.value)


def test_a_budget_is_a_field_written_as_text() -> None:
    class Holder(BaseModel, frozen=True):
        budget: Budget | None = None

    holder = Holder(budget="size<=28MiB")
    assert holder.budget == Budget("size <= 28 MiB")
    assert Holder(budget=holder.budget) == holder
    assert holder.model_dump(mode="json") == {"budget": "size <= 28 MiB"}
    assert Holder.model_json_schema()["properties"]["budget"]["anyOf"][0]["type"] == "string"
    with pytest.raises(ValidationError, match="did you mean 'size'"):
        Holder(budget="sizes <= 1 MB")
    with pytest.raises(ValidationError, match="a budget is a text"):
        Holder(budget=3)


def test_a_budget_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Budget("macs <= 1 K").text = "macs <= 2 K"  # type: ignore[misc]


def brute_force(costs: list[int], utilities: list[float], capacity: int) -> float:
    """Return the best total utility over every subset that fits."""
    best = 0.0
    for chosen in itertools.product((False, True), repeat=len(costs)):
        if sum(itertools.compress(costs, chosen)) <= capacity:
            best = max(best, sum(itertools.compress(utilities, chosen)))
    return best


items = st.lists(
    st.tuples(st.integers(0, 12), st.floats(-5, 20, allow_nan=False, width=32)), max_size=9
)


@settings(deadline=None, max_examples=150)
@given(items=items, capacity=st.integers(0, 60), grain=st.sampled_from([1, 7]))
def test_knapsack_equals_brute_force(
    items: list[tuple[int, float]], capacity: int, grain: int
) -> None:
    costs, utilities = [cost * grain for cost, _ in items], [utility for _, utility in items]
    chosen = knapsack(costs, utilities, capacity)
    assert list(chosen) == sorted(set(chosen))
    assert sum(costs[item] for item in chosen) <= capacity
    total = sum(utilities[item] for item in chosen)
    assert math.isclose(total, brute_force(costs, utilities, capacity), abs_tol=1e-9)


@pytest.mark.parametrize("text", ["2", "2 gigabytes", "-1 GB", "1e400 GB", "nan GB"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match=f"'{text}' is no amount of memory"):
        bytes_of(text)


def test_knapsack_never_takes_an_item_without_a_gain() -> None:
    assert knapsack((0, 1, 1, 0), (0.0, -1.0, 0.0, 2.0), 5) == (3,)
    assert knapsack((), (), 5) == ()


def test_knapsack_with_everything_affordable_needs_no_room_for_the_capacity() -> None:
    assert knapsack((3, 5), (1.0, 1.0), 10**15) == (0, 1)


@pytest.mark.parametrize(
    ("costs", "utilities", "capacity", "message"),
    [
        ((1, 2), (1.0,), 3, "2 costs and 1 utilities"),
        ((1, -2), (1.0, 1.0), 3, "least: -2"),
        ((1,), (1.0,), -1, r"capacity \(-1\)"),
        ((1,), (math.nan,), 3, "NaN"),
    ],
)
def test_knapsack_refuses(
    costs: tuple[int, ...], utilities: tuple[float, ...], capacity: int, message: str
) -> None:
    with pytest.raises(BudgetError, match=message):
        knapsack(costs, utilities, capacity)
