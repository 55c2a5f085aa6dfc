"""The tables of the report, on the page and in the terminal: never wrong, never cut."""

from __future__ import annotations

import dataclasses
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from helpers.report import FACTS, ODD, RUNS, history, layer, learned, measurement, printed
from laconic.ledger import Measurement
from laconic.report.page import page
from laconic.report.tables import (
    TIMES,
    byte_scale,
    curve_columns,
    layer_columns,
    ledger_columns,
    main_metric,
)


@pytest.fixture(params=sorted(RUNS))
def run(request: pytest.FixtureRequest) -> tuple[list[Measurement], dict[str, Any]]:
    return RUNS[request.param]


def test_tables_are_rectangular(run: tuple[list[Measurement], dict[str, Any]]) -> None:
    tables = re.findall(r"<table>.*?</table>", page(*run), re.DOTALL)
    assert tables
    for table in tables:
        root = ElementTree.fromstring(table.replace("<wbr>", ""))
        above, below = root.findall("thead/tr")
        spans = sum(int(cell.get("colspan", 1)) for cell in above)
        assert spans == len(below) + sum(cell.get("rowspan") == "2" for cell in above)
        assert {len(row) for row in root.findall("tbody/tr")} == {spans}


def test_ledger_shows_every_step_with_its_factors_and_costs() -> None:
    runs = history(4)
    columns = {(one.group, one.title or one.unit): one.cells for one in ledger_columns(runs)}
    sizes = [one.size_bytes for one in runs]
    assert columns["So far", "file"][-1] == f"{sizes[0] / sizes[-1]:.1f}{TIMES}"
    assert columns["This step", "file"][0] == f"1.00{TIMES}"
    assert columns["One example", "latency"] == ("0.25",) * 4
    assert columns["", "Time"] == ("12.0",) * 4
    shown = [float(cell.replace(",", "")) for cell in columns["File size", "kB"]]
    assert shown == pytest.approx([size / 1000 for size in sizes], abs=0.06)


def test_layer_table_adds_up_to_the_file() -> None:
    runs = history(3, 4)
    columns = {(one.group, one.title): one.cells for one in layer_columns(runs)}
    after = [float(cell.replace(",", "")) for cell in columns["Size", "after"]]
    assert sum(after[:-1]) == after[-1] == runs[-1].size_bytes
    assert columns["", "Sparsity"][0] == "75.0"
    assert columns["Bits per weight", "stored"][0] == f"{8 * 964 / 6400:.2f}"


def test_losses_are_told_in_numbers() -> None:
    cells = [column.cells for column in curve_columns(measurement("train", (), curves=ODD))]
    rows = {part: ends for part, *ends in zip(*cells, strict=True)}
    assert rows["two"] == ["0.5", "0.25", f"2{TIMES}"]
    assert rows["ends at zero"] == ["1", "0", "\u2013"]
    assert rows["nothing finite"] == ["\u2013"] * 3
    assert "no loss" not in rows


@pytest.mark.parametrize(
    ("sizes", "unit", "texts"),
    [
        ([164_016, 9_675], "kB", ["164.02", "9.68"]),
        ([438_000_000, 13_200_000], "MB", ["438.0", "13.2"]),
        ([118_016, 288], "B", ["118,016", "288"]),
        ([2_359_296, 200], "kB", ["2,359.3", "0.2"]),
        ([93_763_584, 3_072], "kB", ["93,764", "3"]),
        ([12, 0], "B", ["12", "0"]),
        ([], "B", []),
    ],
)
def test_byte_columns_share_a_unit_that_fits(sizes: list[int], unit: str, texts: list[str]) -> None:
    scale = byte_scale(sizes)
    assert scale.unit == unit
    assert [scale.text(size) for size in sizes] == texts


def test_main_metric_is_the_first_that_is_no_loss() -> None:
    both = measurement("original", (), metrics={"loss": 0.5, "spearman": -0.2, "score": 3.0})
    metric = main_metric([both])
    assert metric is not None
    assert (metric.name, metric.share, metric.text(-0.2)) == ("spearman", True, "-20.00")
    loss = main_metric([dataclasses.replace(both, metrics={"loss": 0.5})])
    assert loss is not None
    assert (loss.share, loss.text(0.5)) == (False, "0.5000")


@pytest.mark.parametrize("width", [50, 80, 200])
def test_terminal_prints_every_cell_of_the_tables(width: int) -> None:
    runs = [*history(4), learned(3)]
    text = printed(runs, FACTS, width)
    assert max(map(len, text.splitlines())) <= width
    words = set(text.split())
    for column in (*ledger_columns(runs), *curve_columns(runs[-1])):
        assert {word for cell in column.cells for word in cell.split()} <= words
    assert {"12345", "1,365,", "digits:"} <= words


def test_terminal_prints_whatever_the_page_shows(
    run: tuple[list[Measurement], dict[str, Any]],
) -> None:
    assert run[0][-1].step in printed(*run, width=100)


def test_terminal_reads_no_markup_in_names() -> None:
    runs = [measurement("[bold]original[/bold]", (layer("[red]fc"),))]
    text = printed(runs, {"notes": ["[blink]note"]}, 120)
    assert "[bold]original[/bold]" in text
    assert "[red]fc" in text
    assert "[blink]note" in text
