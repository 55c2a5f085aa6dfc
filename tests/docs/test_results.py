"""Result files of papers/: what a new run leaves of the rows that are there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PAPERS = Path(__file__).parents[2] / "papers"
TODAY = {"date": "2026-02-02", "hardware": "new"}


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return papers/common.py as a module."""
    monkeypatch.syspath_prepend(str(PAPERS))
    spec = importlib.util.spec_from_file_location("papers_common", PAPERS / "common.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("convert",):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return module


def row(task: str, name: str, ours: float, note: str | None = None) -> dict[str, Any]:
    """Return a row."""
    return {"task": task, "row": name, "ours": ours, "note": note}


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
