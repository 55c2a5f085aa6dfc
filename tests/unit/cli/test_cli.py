"""The command line as a whole: help, hints, options, and what list and schema tell."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.cli import answer, laconic, refused
from laconic.cli.contents import catalogue

COMMANDS = ("demo", "compress", "measure", "analyse", "report", "show", "verify", "list", "schema")
HEAVY = ("torch", "numpy", "pydantic", "yaml", "sklearn", "laconic.step", "laconic.run")


# -- help, hints and options ----------------------------------------------------------------------


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = f"""
import sys, time
sys.argv = ["laconic", "--help"]
from laconic.cli import main
try:
    main()
except SystemExit as stop:
    print(stop.code, time.process_time(), [name for name in {HEAVY} if name in sys.modules])
"""
    fastest = math.inf
    for _ in range(3):
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        status, seconds, heavy = found.stdout.splitlines()[-1].split(" ", 2)
        assert (status, heavy) == ("0", "[]")
        fastest = min(fastest, float(seconds))
    assert fastest < 0.5


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(name: str) -> None:
    found = laconic(name, "--help")
    assert found.exit_code == 0
    assert "Example" in found.stdout
    assert f"laconic {name}" in found.stdout
    for option in ("--json", "--quiet", "--debug"):
        assert option in found.stdout


def test_the_commands_are_all_there() -> None:
    found = laconic("--help").stdout
    assert all(f" {name} " in found for name in COMMANDS)
    bare = laconic()
    assert "Commands" in bare.output


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("compres",), "compress"),
        (("shwo",), "show"),
        (("compress", "x", "--resum"), "--resume"),
        (("verify", "x", "--logit"), "--logits"),
        (("--jsn",), "--json"),
    ],
)
def test_a_slip_names_the_nearest(words: tuple[str, ...], hint: str) -> None:
    assert hint in refused(*words)


def test_a_missing_argument_is_refused() -> None:
    assert "RECIPE" in refused("compress")


def test_the_version_is_printed() -> None:
    from laconic import __version__

    assert laconic("--version").stdout.strip() == __version__


def test_the_modules_run_as_programs() -> None:
    from laconic import __version__

    for module in ("laconic", "laconic.cli"):
        command = [sys.executable, "-m", module, "--version"]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == __version__


@pytest.mark.parametrize("words", [("--json", "list"), ("list", "--json")])
def test_common_options_stand_before_or_after_the_command(words: tuple[str, ...]) -> None:
    assert json.loads(laconic(*words).stdout)["event"] == "result"


# -- list and schema ------------------------------------------------------------------------------


def test_list_names_every_kind_and_describes_every_member() -> None:
    found = answer("list")
    kinds = {"steps", "representations", "criteria", "penalties", "objectives", "optimizers"}
    kinds |= {"schedules", "decays", "models", "tasks", "recipes", "coders"}
    assert kinds <= set(found)
    for kind in kinds:
        assert found[kind], kind
        assert all(found[kind].values()), kind


def test_list_of_one_kind_is_one_line_each() -> None:
    lines = laconic("list", "models").stdout.splitlines()
    assert len(lines) == 1 + len(catalogue("models")["models"])
    assert any(line.startswith("digits_cnn  ") for line in lines)
    assert "deep-compression" in laconic("list", "recipes").stdout
    assert "huffman" in answer("list", "coders")["coders"]


def test_list_explains_a_name() -> None:
    found = answer("list", "kmeans")["methods"]
    assert [method["family"] for method in found] == ["representation"]
    assert found[0]["fields"][0] == ["bits", "5", "width of an index, 1 to 8."]
    assert [method["family"] for method in answer("list", "prune")["methods"]] == ["step"]
    assert "max_length" in laconic("list", "glue").stdout
    assert "- factorize: svd" in laconic("list", "factorize").stdout
    assert "quantize:" in laconic("list", "ternarybert").stdout
    assert "stop: {patience: ...}" in laconic("list", "train").stdout
    assert laconic("list", "prune").stdout.count("required") == 2
    assert refused("list", "prun") == "there is nothing called 'prun'; did you mean 'prune'?"


def test_list_explains_whatever_it_lists() -> None:
    for name, line in (("huffman", "in fewer bits"), ("hf", "a folder of Hugging Face")):
        assert line in laconic("list", name).stdout
    both = laconic("list", "gobo").stdout
    assert "steps:" in both and "gobo  (representation)" in both


def test_list_of_an_unknown_kind_names_the_nearest() -> None:
    assert refused("list", "stepz") == "there is nothing called 'stepz'; did you mean 'steps'?"
    assert "representations" in refused("list", "zzz")


def test_schema_is_json_and_can_be_written(tmp_path: Path) -> None:
    printed = json.loads(laconic("schema").stdout)
    path = tmp_path / "recipe.schema.json"
    assert laconic("schema", "--out", path).stdout.strip() == str(path)
    assert json.loads(path.read_text(encoding="utf-8")) == printed
    assert printed["properties"]["steps"]
    assert answer("schema")["schema"] == printed
