"""Functions of the user's own: where their modules are looked for, and what is said of slips."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

from laconic.cli import app
from laconic.errors import LaconicError, ModelError, TaskError
from laconic.models import load_model
from laconic.models.load import anchored_model, builder_of
from laconic.tasks import Task, task_from_dict
from laconic.tasks.line import anchored_task

TEXT = """
import torch
from torch import nn
from laconic.tasks import Task
import helper_of_mine

__all__ = ["build", "data", "number", "fails", "made"]

def build(width=6):
    return nn.Sequential(nn.Linear(width, 3))

def data(count=40, name="mine"):
    pair = torch.zeros(count, 6), torch.arange(count) % 3
    return Task(pair, pair, name=name)

def number():
    return helper_of_mine.NUMBER

def fails():
    raise RuntimeError("a mistake of mine")

made = data()
"""
NAMES = ("nets_of_mine", "helper_of_mine", "package_of_mine")


def written(folder: Path, width: int = 6) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "nets_of_mine.py").write_text(TEXT.replace("width=6", f"width={width}"))
    (folder / "helper_of_mine.py").write_text("NUMBER = 3\n")
    inner = folder / "package_of_mine"
    inner.mkdir(exist_ok=True)
    (inner / "nets.py").write_text("from nets_of_mine import build, data\n")
    return folder


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Leave modules and paths as they were; stand in an empty folder."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in NAMES]:
        del sys.modules[name]


def model(line: Any, base: Path) -> Any:
    return load_model(line, base=base)


def task(line: Any, base: Path) -> Any:
    return task_from_dict(line, base=base)


def test_modules_beside_the_recipe_are_found(tmp_path: Path) -> None:
    base = written(tmp_path / "recipes")
    network = load_model("nets_of_mine:build", base=base)
    assert network[0].in_features == 6
    assert builder_of(network) == {"custom": "nets_of_mine:build"}
    assert load_model({"package_of_mine.nets:build": {"width": 9}}, base=base)[0].in_features == 9
    found = task_from_dict("package_of_mine.nets:data", base=base)
    assert found.name == "mine" and len(found.test) == 40
    line = {"nets_of_mine:data": {"count": 60, "name": "x"}, "few": {"total": 5}}
    found = task_from_dict(line, base=base)
    assert (found.name, len(found.train), len(found.test)) == ("x", 5, 60)


def test_modules_in_the_current_folder_are_found(tmp_path: Path) -> None:
    written(Path.cwd())
    empty = tmp_path / "recipes"
    empty.mkdir()
    assert load_model("nets_of_mine:build", base=empty)[0].in_features == 6
    assert isinstance(task_from_dict("nets_of_mine:data", base=empty), Task)


def test_the_folder_of_the_recipe_comes_first(tmp_path: Path) -> None:
    written(Path.cwd(), width=1)
    base = written(tmp_path / "recipes", width=2)
    assert load_model("nets_of_mine:build", base=base)[0].in_features == 2


def test_a_folder_before_the_name_is_looked_in(tmp_path: Path) -> None:
    written(tmp_path / "nets")
    for name in ("nets/nets_of_mine:build", f"{tmp_path}/nets/nets_of_mine:build"):
        network = load_model(name, base=tmp_path)
        assert builder_of(network) == {"custom": "nets_of_mine:build"}


def test_an_anchored_line_says_the_same_elsewhere(tmp_path: Path) -> None:
    base = written(tmp_path / "recipes")
    away = tmp_path / "away"
    away.mkdir()
    for line in ("nets_of_mine:build", {"package_of_mine.nets:build": {"width": 4}}):
        anchored = yaml.safe_load(yaml.safe_dump(anchored_model(line, base)))
        assert load_model(anchored, base=away)[0].out_features == 3
        assert anchored_model(anchored, away) == anchored
    line = {"nets_of_mine:data": {"count": 9}, "few": {"total": 2}}
    anchored = yaml.safe_load(yaml.safe_dump(anchored_task(line, base)))
    assert anchored == {f"{base}/nets_of_mine:data": {"count": 9}, "few": {"total": 2}}
    assert len(task_from_dict(anchored, base=away).train) == 2
    assert anchored_model("torch.nn:Identity", base) == "torch.nn:Identity"


def test_afterwards_python_looks_there_last(tmp_path: Path) -> None:
    base, before = written(tmp_path / "recipes"), sys.path[:]
    (base / "yaml.py").write_text("raise RuntimeError('the wrong one')\n")
    load_model("nets_of_mine:build", base=base)
    assert sys.path == [*before, str(base), str(Path.cwd())]
    assert task_from_dict("nets_of_mine:data", base=base).name == "mine"
    assert sys.path == [*before, str(base), str(Path.cwd())]


def test_a_module_of_the_same_name_elsewhere_is_refused(tmp_path: Path) -> None:
    one, other = written(tmp_path / "one"), written(tmp_path / "other")
    load_model("nets_of_mine:build", base=one)
    with pytest.raises(
        ModelError, match=r"imported from .*one/nets_of_mine.py before, and .*other"
    ):
        load_model("nets_of_mine:build", base=other)
    load_model("nets_of_mine:build", base=one)


SLIPS = [
    ("nets_of_mine:buidl", r"{0}: 'nets_of_mine' of .* has no 'buidl'; did you mean 'build'\?"),
    ("nets_of_mine:_", r"has no '_'; choose one of: build, data, fails, made, number"),
    ("nets_of_mine:", r"{0}: in 'nets_of_mine:', '' is no name of a function; write package.modul"),
    ("glue:data/SST-2", r"'data/SST-2' is no name of a function; .* or a space after the colon"),
    ("nets_of_mine.build", r"'nets_of_mine.build'; .* written with a colon: 'nets_of_mine:build'"),
    ("no_nets:build", r"{0}: 'no_nets' of .* cannot be imported \(No module named 'no_nets'\); it"),
    ("no_nets:build", r"looked for in .*/recipes, .*/here and where Python looks: put its folder"),
    ("nets_of_mine:number", r"{0}: 'nets_of_mine:number' returned int, not an? "),
    (
        "nets_of_mine:made",
        r"{0}: 'nets_of_mine:made' cannot be called .* that returns the {0}, and",
    ),
    ({"nets_of_mine:build": {"size": 1}}, r"unexpected keyword argument 'size'"),
    ({"nets_of_mine:build": 3}, r"{0}: nets_of_mine:build: options must be a mapping, got 3"),
]


@pytest.mark.parametrize(("load", "error"), [(model, ModelError), (task, TaskError)])
@pytest.mark.parametrize(("line", "message"), SLIPS)
def test_slips_are_answered_alike(
    load: Callable[..., Any], error: type[LaconicError], line: Any, message: str, tmp_path: Path
) -> None:
    base = written(tmp_path / "recipes")
    with pytest.raises(error, match=message.format(load.__name__)):
        load(line, base)


@pytest.mark.parametrize("load", [model, task])
def test_what_the_function_raises_goes_through(load: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a mistake of mine"):
        load("nets_of_mine:fails", written(tmp_path / "recipes"))


def test_a_recipe_and_the_command_line_name_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = written(tmp_path / "recipes")
    text = "model: nets_of_mine:build\ntask: nets_of_mine:data\nsteps: [quantize: 4]\n"
    (base / "mine.yaml").write_text(text)
    (base / "open.yaml").write_text("steps: [quantize: 4]\n")
    options = ["--model", "nets_of_mine:build", "--task", '{"nets_of_mine:data": {name: other}}']
    calls = [
        (tmp_path, [str(base / "mine.yaml")], "mine"),
        (base, ["open.yaml", *options], "other"),
        (tmp_path, ["runs/0/recipe.yaml"], "mine"),  # the one that the first run keeps
    ]
    for number, (folder, words, name) in enumerate(calls):
        monkeypatch.chdir(folder)
        out = tmp_path / f"runs/{number}"
        found = CliRunner().invoke(app, ["compress", *words, "--out", str(out)])
        assert found.exit_code == 0, found.output
        assert json.loads((out / "run.json").read_text())["task"]["name"] == name


def test_the_network_of_a_recipe_is_the_users(tmp_path: Path) -> None:
    found = load_model("nets_of_mine:build", base=written(tmp_path / "recipes"))
    assert isinstance(found, nn.Module) and found(torch.zeros(1, 6)).shape == (1, 3)
