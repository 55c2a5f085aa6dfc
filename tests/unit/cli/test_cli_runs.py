"""Commands on the folder of a run: measure, report, and how a stopped one goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.cli import answer, finished_run, laconic, refused
from laconic import rundir
from laconic.weights import Quantize


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe, its data, and the run the recipe made."""
    return finished_run(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def artefact(folder: Path) -> Path:
    return folder / "run" / rundir.ARTIFACT


def test_measure_of_a_run_is_its_ledger(folder: Path) -> None:
    text = laconic("measure", folder / "run").stdout.splitlines()
    assert " ".join(text[0].split())[:53] == "Step Size Codes alone File Codes alone, all File, all"
    assert [line.split()[0] for line in text[1:]] == ["original", "prune", "quantize", "train"]
    history = answer("measure", folder / "run")["history"]
    assert [measured["step"] for measured in history] == ["original", "prune", "quantize", "train"]


def test_measure_of_several_runs_compares_them(folder: Path, tmp_path: Path) -> None:
    run, other = folder / "run", tmp_path / "other"
    shutil.copytree(run, other)
    history = json.loads((other / rundir.HISTORY).read_text())
    (other / rundir.HISTORY).write_text(json.dumps(history[:2]))
    text = laconic("measure", run, other).stdout.splitlines()
    assert " ".join(text[0].split())[:14] == "Run Steps Size"
    assert text[0].split()[-3:] == ["before", "Accuracy", "Time"]
    assert str(run) in text[1] and "prune > quantize > train" in text[1]
    assert str(other) in text[2] and " prune " in text[2] and "quantize" not in text[2]
    assert text[-1].startswith(f"{other} is unfinished")
    found = answer("measure", run, other, run)["runs"]
    assert [(each["run"], len(each["history"])) for each in found] == [
        (str(run), 4),
        (str(other), 2),
    ]
    (other / rundir.HISTORY).write_text("[]")
    assert refused("measure", run, other).startswith(f"{other}: nothing was measured yet")
    assert "holds no run" in refused("measure", run, tmp_path / "nothing")
    file = run / rundir.ARTIFACT
    assert refused("measure", run, file).startswith(f"{file} is a file; of several, give")
    assert refused("measure", run, run, "--task", "digits").startswith("--task is for one file")


def test_report_writes_the_page_or_prints_the_tables(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    assert laconic("report", folder / "run", "--out", path).stdout.strip() == str(path)
    assert "<html" in path.read_text(encoding="utf-8").lower()
    (folder / "run" / "report.html").unlink()
    found = answer("report", folder / "run")
    assert Path(found["report"]) == folder / "run" / "report.html"
    assert Path(found["report"]).is_file()
    printed = laconic("report", folder / "run", "--terminal").stdout
    assert "quantize" in printed
    assert not any(line.endswith(" ") for line in printed.splitlines())


def test_a_report_is_of_a_folder(artefact: Path) -> None:
    assert refused("report", artefact) == (
        f"{artefact} is a file; give the folder of a run, such as {artefact.parent}"
    )


@pytest.mark.parametrize(
    ("option", "text"), [("--task", "{npz: x.npz}"), ("--model", "digits_cnn")]
)
def test_a_run_is_measured_on_its_own_data(option: str, text: str, artefact: Path) -> None:
    run = artefact.parent
    said = refused("measure", run, option, text)
    assert said.startswith(f"{run} is a run, whose measurements are made already; {option} is for")
    assert f"laconic measure {artefact} {option} " in said


@pytest.mark.parametrize("command", ["measure", "report"])
def test_a_folder_without_a_run_is_refused(command: str, tmp_path: Path) -> None:
    assert refused(command, tmp_path) == f"{tmp_path} holds no run (history.json is missing)"


def test_a_folder_with_a_run_is_not_overwritten_but_can_be_resumed(
    folder: Path, artefact: Path
) -> None:
    before = artefact.read_bytes()
    words = ("compress", folder / "recipe.yaml", "--out", folder / "run", "--device", "cpu")
    assert refused(*words) == (
        f"{folder / 'run'} holds a run already; resume it (resume=True, or --resume), or choose "
        "another directory"
    )
    assert laconic(*words, "--resume").exit_code == 0
    assert artefact.read_bytes() == before
    assert "another recipe" in refused(*words, "--resume", "--set", "seed=5")


def test_an_interrupt_says_how_to_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, out: Path, **options: Any) -> None:
        if out.name == "begun":
            (out / rundir.CHECKPOINT).touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("laconic.run.compress", interrupted)
    (tmp_path / "begun").mkdir()
    given = ("--set", "seed=1", "--device", "cpu")
    words = ("compress", folder / "recipe.yaml", "--out")
    assert refused(*words, tmp_path, *given, code=130) == "stopped before anything was done"
    assert refused(*words, tmp_path / "begun", *given, code=130) == (
        f"stopped; go on with: laconic compress {folder / 'recipe.yaml'} --out "
        f"{tmp_path / 'begun'} --resume --set seed=1 --device cpu"
    )


@pytest.fixture(scope="module")
def stopped(folder: Path) -> Path:
    """Return the folder of a run that was stopped after its first step."""
    step = Quantize.apply

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    Quantize.apply = interrupted  # type: ignore[method-assign]
    try:
        words = ("compress", folder / "recipe.yaml", "--out", folder / "stopped")
        assert laconic(*words, "--device", "cpu").exit_code == 130
    finally:
        Quantize.apply = step  # type: ignore[method-assign]
    return folder / "stopped"


@pytest.mark.parametrize("words", [("measure",), ("report",), ("report", "--terminal")])
def test_a_run_that_was_stopped_is_unfinished(words: tuple[str, ...], stopped: Path) -> None:
    recipe = stopped / rundir.RECIPE
    again = ("compress", str(recipe), "--out", str(stopped), "--resume")
    said = (
        f"{stopped} is unfinished: 1 of 3 steps are done; where it was stopped, it goes on with: "
        f"laconic {' '.join(again)}"
    )
    command, *options = words
    assert laconic(command, stopped, *options).stdout.splitlines()[-1] == said
    assert answer(command, stopped, *options)["unfinished"] == said
    if command == "report" and not options:
        page = (stopped / rundir.REPORT).read_text(encoding="utf-8")
        assert "Unfinished: 1 of 3 steps are done." in page


def test_a_stopped_run_goes_on_as_it_is_told(stopped: Path, artefact: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    words = laconic("measure", tmp_path / "run").stdout.splitlines()[-1].partition("laconic ")[2]
    assert laconic(*words.split()).exit_code == 0
    assert (tmp_path / "run" / rundir.ARTIFACT).read_bytes() == artefact.read_bytes()
    assert answer("measure", tmp_path / "run")["unfinished"] == ""
    assert "unfinished" not in laconic("measure", tmp_path / "run").stdout


def test_a_run_of_python_goes_on_in_python(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    facts = json.loads((tmp_path / "run" / rundir.RUN).read_text(encoding="utf-8"))
    facts["recipe"] = "steps: [train, train]"
    (tmp_path / "run" / rundir.RUN).write_text(json.dumps(facts), encoding="utf-8")
    said = laconic("measure", tmp_path / "run").stdout.splitlines()[-1]
    assert said.endswith(f"compress(..., out='{tmp_path / 'run'}', resume=True)")
