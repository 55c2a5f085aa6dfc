"""Errors on the command line, those of a user's own code included: a sentence, but for bugs."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.cli import finished_run, laconic, refused
from laconic import rundir
from laconic.cli.own_code import own_code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe, its data, and the run the recipe made."""
    return finished_run(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def artefact(folder: Path) -> Path:
    return folder / "run" / rundir.ARTIFACT


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    found = laconic("show", tmp_path / "x", "--debug")
    assert found.exit_code == 2
    assert "Traceback" in found.stderr
    assert found.stderr.strip().endswith("no such file")


def test_what_the_system_refuses_is_a_message(tmp_path: Path) -> None:
    assert "it is a folder); choose another --out" in refused("schema", "--out", tmp_path)


@pytest.mark.parametrize("text", ["{", "3", "[]", ""])
def test_an_option_that_is_no_yaml_is_refused(text: str, artefact: Path) -> None:
    assert refused("measure", artefact, "--task", text).startswith(f"--task {text}: write a name")


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    from laconic.cli import contents

    def broken(kind: str | None) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(contents, "catalogue", broken)
    # Not 1, which says that a budget is exceeded.
    found = laconic("list")
    assert found.exit_code == 2 and "Traceback" in found.stderr
    assert "laconic itself failed (ZeroDivisionError)" in found.stderr


# -- the user's own code --------------------------------------------------------------------------


OWN = """\
import threading

import torch
from torch import nn


def boom(width=3):
    raise ValueError("my own bug")


def misused():
    return nn.Linear("a", 3)


def leaves():
    raise SystemExit


def on_meta():
    with torch.device("meta"):
        return nn.Linear(2, 3)


def script():
    return torch.jit.trace(nn.Linear(2, 3), torch.ones(1, 2))


def lazy():
    return nn.Sequential(nn.LazyLinear(3))


def locked():
    made = nn.Linear(2, 3)
    made.lock = threading.Lock()
    return made
"""
MODULES = {
    "own_works": OWN,
    "own_syntax": "x = 1\ndef f(:\n",
    "own_key": "x = 1\n{}['y']\n",
    "own_value": "x = 1\nint('zz')\n",
    "own_attribute": "x = 1\nx.nothing\n",
    "own_import": "x = 1\nimport nothing_there\n",
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put a user's own modules where Python looks, and forget them afterwards."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_works:boom", "ValueError: my own bug (own_works.py, line 8)"),
        ("own_works:leaves", "SystemExit (own_works.py, line 16)"),
        ("own_syntax:f", "SyntaxError: invalid syntax (own_syntax.py, line 2)"),
        ("own_key:f", "KeyError: 'y' (own_key.py, line 2)"),
        ("own_value:f", "ValueError: invalid literal for int() with base 10: 'zz' (own_value.py, "),
        ("own_attribute:f", "AttributeError: 'int' object has no attribute 'nothing' (own_attribu"),
        ("own_import:f", "ModuleNotFoundError: No module named 'nothing_there' (own_import.py, "),
    ],
)
@pytest.mark.usefixtures("own")
def test_what_the_users_own_code_raises_is_a_sentence(name: str, said: str, folder: Path) -> None:
    words = ("compress", folder / "recipe.yaml", "--check")
    assert refused(*words, "--model", name).startswith(f"model: '{name}' raised {said}")
    assert refused(*words, "--teacher", name).startswith(f"teacher: '{name}' raised {said}")
    assert refused(*words, "--task", name).startswith(f"task: '{name}' raised {said}")
    assert refused("measure", "x", "--model", name).startswith(f"model: '{name}' raised {said}")


@pytest.mark.usefixtures("own")
def test_the_place_is_the_users_where_a_package_refuses_what_it_is_given(folder: Path) -> None:
    said = refused("compress", folder / "recipe.yaml", "--model", "{'own_works:misused': {}}")
    assert said.startswith("model: 'own_works:misused' raised TypeError: ")
    assert said.endswith("(own_works.py, line 12)")


@pytest.mark.usefixtures("own")
def test_the_traceback_of_own_code_is_shown_on_demand(folder: Path) -> None:
    words = ("compress", folder / "recipe.yaml", "--model", "own_works:boom", "--debug")
    assert 'raise ValueError("my own bug")' in laconic(*words).stderr


def test_a_bug_of_laconic_goes_through_where_no_own_code_is_named() -> None:
    for line in ("digits_cnn", {"hf": "folder"}, {"laconic:load": {"path": "x"}}):
        with pytest.raises(ZeroDivisionError), own_code("model", line):
            raise ZeroDivisionError


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("on_meta", "'weight' of Linear is on the device 'meta' and holds no numbers; load its"),
        ("script", "TopLevelTracedModule is TorchScript, whose layers cannot be changed; give"),
        ("lazy", "'0.weight' of Sequential has no shape yet; call the network once, on an example"),
        ("locked", "Linear cannot be copied (TypeError: cannot pickle '_thread.lock' object); "),
    ],
)
@pytest.mark.usefixtures("own")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:Lazy modules")
def test_a_network_that_cannot_be_worked_on_is_a_sentence(
    name: str, said: str, folder: Path
) -> None:
    words = ("compress", folder / "recipe.yaml", "--check", "--model", f"own_works:{name}")
    assert refused(*words).startswith(said)


# Ctrl-C comes while torch is imported, and half a library turns it into another error.
INTERRUPTED = """
import signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise AttributeError("module 'numpy' has no attribute 'matrix'")
            sys.exit("went on")
signal.signal(signal.SIGINT, signal.{before})
sys.meta_path.insert(0, Finder())
sys.argv = ["laconic", "list"]
from laconic.cli import main
main()
"""


@pytest.mark.parametrize(
    ("before", "code", "said"),
    [("default_int_handler", -signal.SIGINT, ""), ("SIG_IGN", 1, "went on\n")],
)
def test_ctrl_c_while_torch_is_imported_ends_at_once_unless_it_is_not_heard(
    before: str, code: int, said: str
) -> None:
    words = [sys.executable, "-c", INTERRUPTED.format(before=before)]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (code, said)


def test_an_empty_folder_is_no_folder(tmp_path: Path) -> None:
    """As of a shell variable that was not set."""
    assert "it is empty; name a folder" in refused("compress", "gobo", "--out", "")
    assert "it is a folder" in refused("schema", "--out", tmp_path)
    assert [*tmp_path.iterdir()] == []
