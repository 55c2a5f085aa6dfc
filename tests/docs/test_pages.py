"""The pages tell the truth: code runs, recipes fit, commands and links exist."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from laconic.cli import app
from laconic.models import load_model
from laconic.recipe import Recipe, shipped_recipes
from laconic.step import Value
from laconic.tasks import task_from_dict

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [text for kind, text in found if kind == language]


def each(language: str) -> list[pytest.param]:
    return [
        pytest.param(text, id=f"{page.name}-{place}")
        for page in PAGES
        for place, text in enumerate(blocks(page, language))
    ]


@pytest.mark.parametrize("text", each("python"))
def test_python_block_runs(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "block", "exec"), {"__name__": "__main__"})


def test_the_readme_shows_python_and_a_recipe():
    assert len(blocks(ROOT / "README.md", "python")) >= 2
    assert blocks(ROOT / "README.md", "yaml")


@pytest.mark.parametrize("text", each("yaml"))
def test_yaml_block_is_a_recipe(text):
    assert Recipe.parse(text).steps


def test_the_recipe_of_the_readme_fits_its_network_and_data():
    (text,) = blocks(ROOT / "README.md", "yaml")
    recipe = Recipe.parse(text)
    model = load_model(recipe.model, base=ROOT)
    recipe.check(model, task_from_dict(recipe.task, base=ROOT))


@pytest.mark.parametrize("path", shipped_recipes().values(), ids=lambda path: path.stem)
def test_shipped_recipe_reads_back_and_fits(path):
    text = path.read_text(encoding="utf-8")
    recipe = Recipe.read(path)
    assert text.startswith("# "), "a recipe begins with the paper it stands for"
    assert Recipe.parse(recipe.to_yaml()) == recipe
    if re.search(r"\bpath\b|/", f"{recipe.model} {recipe.task}"):
        pytest.skip("its network or data are files of the user")
    recipe.check(load_model(recipe.model, base=path.parent), task_from_dict(recipe.task, base=ROOT))


def commands() -> list[pytest.param]:
    lines = [
        (page.name, line)
        for page in PAGES
        for text in blocks(page, "")
        for line in text.splitlines()
        if line.startswith("laconic ")
    ]
    return [pytest.param(line, id=f"{name}-{line}") for name, line in lines]


@pytest.mark.parametrize("line", commands())
def test_command_and_its_options_exist(line):
    command = typer.main.get_command(app)
    context = command.make_context("laconic", ["--quiet"], resilient_parsing=True)
    name, found, rest = command.resolve_command(context, shlex.split(line)[1:])
    found.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"
    for path in re.findall(r"`((?:docs|scripts|src|tests|papers)/[\w./-]+)`", text):
        if "<" not in path:
            assert (ROOT / path).exists(), f"{page.name} names {path}"


@pytest.fixture
def render(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    spec = importlib.util.spec_from_file_location("render", ROOT / "docs" / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_fresh(render, capsys):
    assert render.main(["--check"]) == 0, capsys.readouterr().out


def test_methods_page_covers_every_family(render):
    known = set(render.FAMILIES)
    ours = {family for family in Value._registry if family.__module__.startswith("laconic.")}
    # Half of a family is listed with all of it.
    assert all(any(issubclass(family, whole) for whole in known) for family in ours - known)


def test_methods_page_explains_every_field():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    empty = re.findall(r"^\| `([^`]+)` \|[^|]*\|\s*\|$", text, re.MULTILINE)
    # resnet20 and its like repeat the option of resnet.
    assert set(empty) <= {"classes"}


def test_results_are_rendered_from_their_files(render, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(
        '{"command": "python papers/table.py", "date": "2026-01-01", "hardware": "2 cores",'
        ' "versions": {"torch": "2"}, "rows": [{"row": "w/o CD", "task": "mnist", "ours": 0.98765,'
        ' "std": 0.00123, "seeds": [0, 1], "published": 0.99, "published_setting": "GPU",'
        ' "size_bytes": 12345, "ratio": 40.0, "note": null}]}'
    )
    text = render.results(path)
    assert "| row | task | ours | seeds | published | size (bytes) | times smaller |" in text
    assert "| w/o CD | mnist | 0.9877 ± 0.0012 | 2 | 0.99 (GPU) | 12,345 | 40 |" in text


def test_what_rows_say_is_said_once_and_names_them(render, tmp_path):
    notes = {
        ("A", "CoLA"): "same file; slow; (Train(),)",
        ("A", "MRPC"): "same file; (Train(),); of seeds 0: slow; (Prune(),)",
        ("B", "CoLA"): "same file; (Train(),)",
    }
    rows = [{"row": key[0], "task": f"{key[1]} dev", "note": note} for key, note in notes.items()]
    head = {"command": "x", "date": "2026-01-01", "hardware": "", "versions": {}}
    path = tmp_path / "table.json"
    path.write_text(json.dumps(head | {"rows": rows}))
    facts, settings = render.results(path).split("<details><summary>Settings</summary>")
    assert facts.split("\n\n")[3].splitlines() == [
        "- every row: same file",
        "- A (CoLA): slow",
        "- A (MRPC): slow (seeds 0)",
    ]
    assert settings.split("\n\n")[1].splitlines() == [
        "- every row: `(Train(),)`",
        "- A (MRPC): `(Prune(),)` (seeds 0)",
    ]
    assert [line[:12] for line in facts.splitlines() if line.startswith(("| A", "| B"))] == [
        "| A | CoLA d",
        "| B | CoLA d",
        "| A | MRPC d",
    ]
