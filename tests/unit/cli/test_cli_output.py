"""What the command line prints: JSON by lines, quiet, log lines, tables, and to whom."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.text import Text

from helpers.cli import finished_run, laconic
from laconic.cli.output import UNFOLDED, Output, _fitting, console_of, jsonable


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe, its data, and the run the recipe made."""
    return finished_run(tmp_path_factory.mktemp("cli"))


def test_json_is_one_object_per_line_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    found = laconic("compress", folder / "recipe.yaml", "--out", tmp_path / "run", "--json")
    events = [json.loads(line) for line in found.stdout.splitlines()]
    assert [event["event"] for event in events][-1] == "result"
    assert {event["event"] for event in events} == {"log", "result"}
    assert any("prune" in event.get("message", "") for event in events)


def test_quiet_prints_the_result_alone(folder: Path, tmp_path: Path) -> None:
    words = ("compress", folder / "recipe.yaml", "--set", "steps=[]")
    loud = laconic(*words, "--out", tmp_path / "loud")
    quiet = laconic(*words, "--out", tmp_path / "quiet", "--quiet")
    assert "original: " in loud.stderr
    assert quiet.stderr == ""
    assert "original" in quiet.stdout


def test_an_error_is_an_event_too(tmp_path: Path) -> None:
    found = laconic("show", tmp_path / "x", "--json")
    assert json.loads(found.stdout) == {
        "event": "error",
        "message": f"{tmp_path / 'x'}: no such file",
    }
    assert found.exit_code == 2


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    code = """
from laconic.cli import app
from laconic.cli.command import command
@command()
def spill(output):
    for _ in range(1000):
        output.line("x" * 1000)
    return 0
app(["spill"])
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        assert started.stdout is not None
        assert started.stderr is not None
        started.stdout.close()
        said = started.stderr.read()
        assert started.wait() == 0
    assert said == b""


def test_one_process_of_several_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    assert laconic("list", "steps").stdout
    monkeypatch.setattr("laconic.ranks.prints", lambda: False)
    found = laconic("list", "steps")
    assert (found.exit_code, found.stdout) == (0, "")


def test_json_holds_what_json_can_hold() -> None:
    data = {"a": math.nan, "b": (1, Path("x")), 3: {"c": -math.inf}, "d": None, "e": True, "f": 1.5}
    held = {"a": "nan", "b": [1, "x"], "3": {"c": "-inf"}, "d": None, "e": True, "f": 1.5}
    assert jsonable(data) == held


def test_log_lines_are_shown_while_working_and_not_afterwards(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = logging.getLogger("laconic.recover.train")
    before = (logging.getLogger("laconic").level, list(logging.getLogger("laconic").handlers))
    with Output().working():
        logger.info("an epoch")
    with Output(json=True).working():
        logger.info("as data")
    with Output(quiet=True).working():
        logger.info("too much")
        logger.warning("a warning")
    with Output().working(about="laconic.run"):
        logger.info("a detail")
        logger.warning("another warning")
    logger.info("afterwards")
    printed = capsys.readouterr()
    assert [line.split("  ")[1] for line in printed.err.splitlines()] == [
        "an epoch",
        "a warning",
        "another warning",
    ]
    assert json.loads(printed.out) == {"event": "log", "level": "info", "message": "as data"}
    root = logging.getLogger("laconic")
    assert (root.level, list(root.handlers)) == before


def test_a_narrow_terminal_gives_up_spare_columns_first_to_last() -> None:
    columns, rows = ("Step", "One", "Two", "Three"), [("prune", "1", "22", "333")]
    wide = sum(len(text) + 2 for text in ("prune", "One", "Two", "Three"))
    assert _fitting(columns, rows, ("Two", "One"), wide) == [0, 1, 2, 3]
    assert _fitting(columns, rows, ("Two", "One"), wide - 1) == [0, 1, 3]
    assert _fitting(columns, rows, ("Two", "One"), 3) == [0, 3]


def test_cells_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table(("Name", "Value"), [("[bold]x[/bold]", "[/]")])
    assert capsys.readouterr().out.splitlines()[1].split() == ["[bold]x[/bold]", "[/]"]
    Output(json=True).table(("Name",), [("x",)])
    Output(json=True).show(Text("x"))
    Output(json=True).line("x")
    assert capsys.readouterr().out == ""


def test_orders_to_a_terminal_are_shown_not_sent(capsys: pytest.CaptureFixture[str]) -> None:
    """What a file says may hold them."""
    evil = "a\x1b]0;pwned\x07\r"
    Output().line(evil)
    Output().error(evil)
    Output().table(["Weight"], [[evil]])
    found = "".join(capsys.readouterr())
    assert found.count(r"a\x1b]0;pwned\x07\r") == 3
    assert not set("\x1b\x07\r") & set(found)


def test_a_stream_that_was_closed_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert console_of(stderr=False).width == console_of(stderr=True).width == UNFOLDED
    with Output().working():
        Output().line("nowhere")
