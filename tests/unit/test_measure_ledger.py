"""Measurements that are kept: as JSON, against a budget, and as the ledger of a run."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest
from torch import Tensor

from helpers.measured import small, small_task, three_steps
from laconic.budget import Budget
from laconic.errors import RunError
from laconic.ledger import Measurement, factor_text, ledger, ledger_table, size_text
from laconic.measure import averaged, measure
from laconic.models import digits_cnn
from laconic.tasks.split import Batch


@pytest.fixture
def history() -> list[Measurement]:
    return three_steps()


# --- the record -----------------------------------------------------------------------


def test_a_measurement_survives_json(history: list[Measurement]) -> None:
    for found in [*history, measure(small())]:
        text = json.dumps(found.to_data(), allow_nan=False)
        assert Measurement.from_data(json.loads(text)) == found


def test_a_loss_that_is_no_number_survives_json() -> None:
    def infinite(outputs: Tensor, batch: Batch) -> Tensor:
        return outputs.sum() * 0 + math.inf

    found = measure(small(), small_task(loss=infinite), latency=False)
    text = json.dumps(found.to_data(), allow_nan=False)
    assert Measurement.from_data(json.loads(text)).metrics["loss"] == math.inf


def test_curves_survive_json_and_older_histories_have_none() -> None:
    losses = {"fc": [3.0, 2.0, math.inf], "train: label": [1 / 3]}
    found = measure(small(), curves=losses)
    data = json.loads(json.dumps(found.to_data(), allow_nan=False))
    assert Measurement.from_data(data).curves == {
        "fc": (3.0, 2.0, math.inf),
        "train: label": (0.333333,),
    }
    del data["curves"]
    assert Measurement.from_data(data) == dataclasses.replace(found, curves={})


def test_a_history_of_before_widths_of_inputs_is_read() -> None:
    data = measure(digits_cnn()).to_data()
    for layer in data["layers"]:
        del layer["input_bits"]
    assert {layer.input_bits for layer in Measurement.from_data(data).layers} == {32}


def test_a_history_holds_few_digits_of_few_points() -> None:
    draws = random.Random(0)
    found = measure(small(), curves={"fc": [draws.random() for _ in range(10_000)]})
    assert len(found.curves["fc"]) == 100
    assert len(json.dumps(found.to_data()["curves"])) < 1100
    assert averaged([draws.random() for _ in range(150)])[-1] > 0
    assert averaged([5.0, 3.0, 1.0], points=2) == (5.0, 2.0)
    assert averaged([]) == ()


@pytest.mark.parametrize("place", ["measurement", "layer"])
def test_a_record_of_another_version_is_refused(place: str) -> None:
    data = measure(small()).to_data()
    fields = data if place == "measurement" else data["layers"][0]
    del fields["nonzero"]
    fields["colour"] = 1
    with pytest.raises(RunError, match=f"a {place} .* colour, nonzero"):
        Measurement.from_data(data)


def test_budgets_read_measurements(history: list[Measurement]) -> None:
    whole, prune, _ = (found.to_data() for found in history)
    budget = Budget("bit_operations <= 0.5x, macs <= 1x, nonzero <= 1 K")
    exceeded = budget.exceeded_by(prune, whole)
    assert exceeded == {"bit_operations": 200 * 1024 - 150 * 1024}


# --- the ledger -----------------------------------------------------------------------


def test_factors_of_the_steps_multiply(history: list[Measurement]) -> None:
    rows = ledger(history)
    assert [row.step for row in rows] == ["original", "prune", "quantize"]
    for total, factor in (("measured_total", "measured"), ("nominal_total", "nominal")):
        product = math.prod(getattr(row, factor) for row in rows)
        assert getattr(rows[-1], total) == pytest.approx(product, rel=1e-12)
    assert rows[0].measured == rows[0].nominal == 1.0
    assert rows[-1].measured_total == history[0].size_bytes / history[-1].size_bytes
    assert rows[1].nominal == (325 * 32) / ((100 + 125) * 32)


def test_shares_of_the_file(history: list[Measurement]) -> None:
    whole, prune, quantize = ledger(history)
    assert (whole.index_share, whole.table_share, prune.table_share) == (0.0, 0.0, 0.0)
    assert prune.index_share == history[1].index_bytes / history[1].size_bytes > 0
    assert quantize.table_share == history[2].table_bytes / history[2].size_bytes > 0


def test_the_table_says_what_the_ledger_says(history: list[Measurement]) -> None:
    table = ledger_table(history)
    assert {len(row) for row in table.rows} == {len(table.columns)}
    last = dict(zip(table.columns, table.rows[-1], strict=True))
    row = ledger(history)[-1]
    assert last["Step"] == "quantize"
    assert last["Size"] == size_text(row.size_bytes)
    assert last["File, all"] == factor_text(row.measured_total)
    assert last["Accuracy"] == f"{100 * row.metrics['accuracy']:.2f}%"
    assert last["Parameters"] == "325"
    assert last["Time"] == "1.5 s"
    assert "Loss" not in table.columns


def test_a_metric_beyond_one_is_no_percentage(history: list[Measurement]) -> None:
    values = {"perplexity": 12.34567, "f1": 0.5}
    first = {**history[0].to_data(), "metrics": values}
    second = {**history[1].to_data(), "metrics": {"f1": "nan"}}
    table = ledger_table([Measurement.from_data(first), Measurement.from_data(second)])
    columns = {name: cells for name, *cells in zip(table.columns, *table.rows, strict=True)}
    assert columns["Perplexity"] == ["12.35", "-"]
    assert columns["F1"] == ["50.00%", "nan%"]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB (0.98 KiB)"),
        (26_500, "26.5 kB (25.9 KiB)"),
        (999_999, "1.00 MB (976.6 KiB)"),
        (437_928_960, "437.9 MB (417.6 MiB)"),
        (5 * 10**15, "5000.0 TB (4547.5 TiB)"),
    ],
)
def test_sizes_are_printed_in_both_units(size: int, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("factor", "text"), [(1, "1.00x"), (9.996, "10.0x"), (99.96, "100x"), (1234.5, "1234x")]
)
def test_factors_have_three_digits(factor: float, text: str) -> None:
    assert factor_text(factor) == text
