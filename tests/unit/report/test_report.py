"""The report: one page that stands alone and says what happened, whatever the run was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.report import (
    FACTS,
    RUNS,
    Reader,
    drawings,
    history,
    layer,
    measurement,
    printed,
    squeezed,
)
from laconic.errors import RunError
from laconic.ledger import Measurement
from laconic.report import terminal, write_report
from laconic.report.page import page
from laconic.report.tables import TIMES, ledger_columns

HOSTILE = "</title></style><script>alert('1')</script>\"'><img src=x onerror=alert(2)>&amp;[red]"


@pytest.fixture(params=sorted(RUNS))
def run(request: pytest.FixtureRequest) -> tuple[list[Measurement], dict[str, Any]]:
    return RUNS[request.param]


def test_page_is_well_formed_and_stands_alone(
    run: tuple[list[Measurement], dict[str, Any]],
) -> None:
    html = page(*run)
    reader = Reader(html)
    assert reader.open == []
    assert html.startswith("<!doctype html>\n<html")
    for outside in ("http:", "https:", "//", "url(", "@import", "src="):
        assert outside not in html
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(reader.tags)
    assert not {name for name, _ in reader.attributes if name.startswith("on")}
    assert {"h1", "table", "svg"} <= set(reader.tags)


def test_report_is_a_function_of_history_and_facts(tmp_path: Path) -> None:
    first = write_report(history(), FACTS, tmp_path / "a.html").read_bytes()
    again = [Measurement.from_data(one.to_data()) for one in history()]
    second = write_report(again, dict(FACTS), tmp_path / "deeper" / "b.html").read_bytes()
    assert first == second
    other = write_report(history(seed=1), FACTS, tmp_path / "a.html").read_bytes()
    assert other != first
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["a.html", "b.html"]


def test_hostile_names_are_text(tmp_path: Path) -> None:
    weights = (layer(HOSTILE), layer("x", representation=HOSTILE))
    runs = [
        measurement(step, weights, metrics={HOSTILE: score}, curves={HOSTILE: (1.0,)})
        for step, score in (("original", 0.9), (HOSTILE, 0.8))
    ]
    facts = {
        "recipe": HOSTILE,
        "task": {"name": HOSTILE, "examples": {HOSTILE: 1}},
        "environment": {HOSTILE: HOSTILE},
        "notes": [HOSTILE],
    }
    html = write_report(runs, facts, tmp_path / "a.html").read_text(encoding="utf-8")
    reader = Reader(html)
    assert reader.open == []
    assert {"script", "img"}.isdisjoint(reader.tags)
    assert "<script" not in html
    assert sum(HOSTILE in text for text in reader.text) >= 8
    assert drawings(html)


def test_a_name_that_is_no_unicode_is_written(tmp_path: Path) -> None:
    path = write_report([measurement("original", (layer("a\ud800"),))], {}, tmp_path / "a.html")
    assert "a&#55296;" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "make", [lambda h, p: write_report(h, {}, p), lambda h, _: terminal(h, {})]
)
def test_an_empty_history_is_refused(make: Any, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no measurement"):
        make([], tmp_path / "a.html")
    assert list(tmp_path.iterdir()) == []


def test_headline_names_sizes_factor_and_scores() -> None:
    before = measurement("original", (layer(),), size_bytes=164_000)
    after = measurement("prune", (squeezed(),), size_bytes=41_000, metrics={"accuracy": 0.9311})
    text = " ".join(Reader(page([before, after], FACTS)).text)
    for expected in (
        f"digits: 4.00{TIMES} smaller",
        "164.0 kB (160.2 KiB) became 41.0 kB (40.0 KiB).",
        "Accuracy went from 95.00% to 93.11% on 360 test examples, 1.89 points lower.",
    ):
        assert expected in text
    assert f"digits: 4.00{TIMES} larger" in page([after, before], FACTS)
    assert "stayed at 95.00%" in page([before, before], FACTS)


def test_what_papers_count_is_told_by_one_name() -> None:
    before = measurement("original", (layer(),), nominal_bits=64_000)
    after = measurement("prune", (squeezed(),), nominal_bits=2_000)
    said = " ".join(Reader(page([before, after], FACTS)).text)
    assert f"Counted by codes alone, as papers do, the factor is 32.0{TIMES}." in said
    titles = [one.title for one in ledger_columns([before, after]) if one.group == "So far"]
    assert titles == ["codes alone", "file"]
    assert "predicted" not in said.lower()


def budgeted(text: str, steps: int = 1) -> dict[str, Any]:
    return {**FACTS, "recipe": f"budget: {text}\nsteps: [{', '.join(['train'] * steps)}]\n"}


@pytest.mark.parametrize(
    ("budget", "verdict"),
    [
        ("size <= 50 kB", "Budget: met (size <= 50 kB)."),
        ("size <= 40 kB", "Budget: exceeded by 1.00 kB (0.98 KiB) in size (size <= 40 kB)."),
        ("macs <= 0.5x", "Budget: exceeded by 3,200 in macs (macs <= 0.5x)."),
        ("latency <= 0.2 ms", "Budget: exceeded by 0.05 ms in latency (latency <= 0.2 ms)."),
    ],
)
def test_the_verdict_on_the_budget_stands_where_people_look(budget: str, verdict: str) -> None:
    runs = [
        measurement(step, (layer(),), size_bytes=size, macs=6400)
        for step, size in (("original", 164_000), ("prune", 41_000))
    ]
    assert verdict in Reader(page(runs, budgeted(budget))).text
    assert verdict in printed(runs, budgeted(budget), 120)


def test_a_budget_on_what_was_not_measured_is_not_judged() -> None:
    runs = [measurement("original", (layer(),), macs=None)]
    text = printed(runs, budgeted("macs <= 1 M", steps=0), 200)
    assert "Budget: not known; the budget limits macs, which was not measured" in text


def test_a_run_that_is_not_finished_is_not_judged() -> None:
    text = Reader(page(history(2), budgeted("size <= 1 kB", steps=3))).text
    assert "Unfinished: 1 of 3 steps are done." in text
    assert not any(line.startswith("Budget") for line in text)
    done = printed(history(3), FACTS, 100)
    assert "Unfinished" not in done and "Budget" not in done


def test_a_dotted_name_breaks_at_its_dots_alone() -> None:
    assert ">encoder.<wbr>layer.<wbr>0.<wbr>attention" in page(history(2, 1), FACTS)


def test_notes_seed_versions_and_recipe_are_shown() -> None:
    text = Reader(page(history(), {**FACTS, "notes": ["bytes may differ"]})).text
    for expected in ("bytes may differ", "12345", "2.13.0", "dtype float32"):
        assert expected in text
    assert FACTS["recipe"].strip() in text
