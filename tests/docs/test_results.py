"""Result files of papers/: what a new run leaves of the rows that are there."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PAPERS = Path(__file__).parents[2] / "papers"
TODAY = {"date": "2026-02-02", "hardware": "new"}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Return a function that imports a file of papers/; afterwards none is imported."""
    monkeypatch.syspath_prepend(str(PAPERS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (PAPERS / f"{name}.py").is_file():
            del sys.modules[name]


@pytest.fixture
def common(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("common")


def row(task: str, name: str, ours: float, note: str | None = None) -> dict[str, Any]:
    """Return a row."""
    return {"task": task, "row": name, "ours": ours, "note": note}


def test_a_command_does_not_say_where_files_lie(common: ModuleType) -> None:
    words = ["--seeds", "1", "--work", "/x", "--row", "TWS 1-1-4", "--data", "/y"]
    found = common.command(["papers/mrem.py", *words])
    assert found == "python papers/mrem.py --seeds 1 --row 'TWS 1-1-4'"


def test_new_rows_stand_beside_the_old_ones_of_their_task(common: ModuleType) -> None:
    before = TODAY | {"rows": [row("CoLA", "ternary", 1.0), row("MRPC", "ternary", 2.0)]}
    found = common.beside(before, [row("CoLA", "binary", 3.0), row("MRPC", "ternary", 4.0)], TODAY)
    assert [(each["task"], each["row"], each["ours"]) for each in found] == [
        ("CoLA", "ternary", 1.0),
        ("CoLA", "binary", 3.0),
        ("MRPC", "ternary", 4.0),
    ]
    assert [each["note"] for each in found] == [None, None, None]


def test_what_stays_from_another_machine_says_so_once(common: ModuleType) -> None:
    before = {"date": "2026-01-01", "hardware": "old", "rows": [row("CoLA", "a", 1.0, "why")]}
    once = common.beside(before, [], TODAY)
    assert once[0]["note"] == "2026-01-01, old; why"
    again = common.beside({"date": "later", "hardware": "else", "rows": once}, [], TODAY)
    assert again[0]["note"] == "2026-01-01, old; why"


def test_other_seeds_of_a_row_add_up(common: ModuleType) -> None:
    first = row("CoLA", "a", 1.0, "why") | {
        "seeds": 1,
        "baseline": 2.0,
        "size_bytes": 10,
        "ratio": 3.0,
    }
    second = row("CoLA", "a", 4.0) | {"seeds": 2, "scores": {"1": 3.0, "2": 5.0}, "baseline": 5.0}
    second |= {"size_bytes": 16, "ratio": 3.0, "note": "how"}
    (found,) = common.beside(TODAY | {"rows": [first]}, [second], TODAY)
    assert found["scores"] == {"0": 1.0, "1": 3.0, "2": 5.0}
    assert (found["ours"], found["std"], found["seeds"]) == (3.0, 2.0, 3)
    assert (found["baseline"], found["size_bytes"], found["seconds"]) == (4.0, 14, None)
    assert found["note"] == "how; of seeds 0: why"


def test_a_seed_that_was_run_again_replaces_the_row(common: ModuleType) -> None:
    first = row("CoLA", "a", 1.0) | {"seeds": 1}
    again = row("CoLA", "a", 2.0) | {"seeds": 1, "scores": {"0": 2.0}}
    assert common.beside(TODAY | {"rows": [first]}, [again], TODAY) == [again]


def test_a_table_adds_its_seeds_row_by_row(
    common: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["table"])
    for seed in ("0", "1", "1"):  # the last time a finished run is read again
        rows = [
            row("CoLA", name, float(seed)) | {"seeds": 1, "scores": {seed: float(seed)}}
            for name in ("a", "b")
        ]
        common.write_table("table", rows)
    found = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))["rows"]
    assert [(each["row"], each["scores"]) for each in found] == [
        ("a", {"0": 0.0, "1": 1.0}),
        ("b", {"0": 0.0, "1": 1.0}),
    ]


def test_a_published_figure_of_zero_keeps_its_setting(common: ModuleType) -> None:
    assert common.published(0.0, "how") == {"published": 0.0, "published_setting": "how"}
    assert common.published(None, "how") == {"published": None, "published_setting": None}


def test_two_rows_are_compared_over_the_seeds_that_both_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(PAPERS.parent / "docs"))
    guide = importlib.import_module("guide")
    split, plain = {"scores": {"0": 3.0, "1": 5.0, "2": 90.0}}, {"scores": {"1": 1.0, "0": 2.0}}
    assert guide.gain(split, plain) == 2.5
    losses = [
        {"task": f"{name} dev", "ours": 10.0 + more, "baseline": 11.0}
        for name, more in (("CoLA", 0.0), ("RTE", 2.0), ("MRPC", 9.0))
    ]
    assert guide.mean_loss("CoLA", "RTE")(losses) == "+0.0 ± 1.0"


def test_a_shared_run_is_made_by_one_at_a_time(common: ModuleType, tmp_path: Path) -> None:
    out, inside, most = tmp_path / "runs" / "CoLA-0", [], []

    def make() -> None:
        with common.in_turn(out):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        (["CD"], ["CD"]),
        (["BP", "L1-norm"], ["L1-norm", "BP"]),
        (["error of CD below w/o CD"], ["w/o CD, fitted", "CD, fitted", "comparison"]),
    ],
)
def test_cross_distillation_runs_the_rows_that_were_asked_for(
    script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    asked: list[str],
    made: list[str],
) -> None:
    table = script("cross_distillation")
    ran: list[str] = []
    methods = {steps: name for name, steps in table.methods("structured", 0.5, 20).items()}

    def run(options: Any, model: Any, task: Any, steps: Any, place: str) -> list[Any]:
        first = {steps[:-1]: f"{name}, fitted" for steps, name in methods.items()}
        ran.append((first if place.startswith("fitted-") else methods)[steps])
        return []

    class Task:
        def score(self, model: object) -> dict[str, float]:
            return {"accuracy": 0.9}

    monkeypatch.setattr(table, "run", run)
    monkeypatch.setattr(table, "cifar10", lambda options: Task())
    monkeypatch.setattr(table, "trained_resnet", lambda options, name: None)
    monkeypatch.setattr(table, "scored", lambda *_, **__: {})
    monkeypatch.setattr(table, "generalised", lambda *_, **__: ran.append("comparison"))
    options = argparse.Namespace(row=asked, shots=[2], first=0, seeds=1)
    assert len(list(table.rows(options, "structured"))) == sum("fitted" not in m for m in made)
    assert ran == made
