"""House rules that a reader of the source can check: no pickle, no environment, no prints."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(importlib.util.find_spec("laconic").origin).parent
FILES = sorted(SOURCE.rglob("*.py"))

NEVER_IMPORTED = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "socket", "urllib"}
NEVER_CALLED = {
    "breakpoint", "compile", "eval", "exec", "hasattr", "input", "os.getenv", "os.system", "print",
    "torch.save", "warnings.simplefilter", "yaml.load", "yaml.unsafe_load",
}  # fmt: skip
NEVER_NAMED = {"os.environ", "os.environb"}


def called(tree: ast.AST) -> Iterator[tuple[int, str, list[str]]]:
    """Yield line, dotted name and keywords of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), [ast.unparse(k) for k in node.keywords]


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name.split(".")[0]) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, (node.module or "").split(".")[0]
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)


def problems(text: str) -> list[str]:
    """Return what a source text does that no file of laconic may do."""
    tree = ast.parse(text)
    found = [f"{line}: imports {name}" for line, name in imported(tree) if name in NEVER_IMPORTED]
    found += [f"{line}: imports {name}" for line, name in imported(tree) if name in NEVER_NAMED]
    for line, name, keywords in called(tree):
        if name in NEVER_CALLED:
            found.append(f"{line}: calls {name}")
        if name == "torch.load" and "weights_only=True" not in keywords:
            found.append(f"{line}: torch.load without weights_only=True")
        if name in ("np.load", "numpy.load") and "allow_pickle=False" not in keywords:
            found.append(f"{line}: {name} without allow_pickle=False")
    named = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    found += [
        f"{node.lineno}: reads the environment"
        for node in named
        if ast.unparse(node) in NEVER_NAMED
    ]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_file_keeps_the_promises(file):
    assert problems(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "from os import environ",
        "import os\nos.environ['HOME']",
        "import os\nos.getenv('HOME')",
        "eval('1')",
        "print(1)",
        "hasattr(model, 'weight')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "yaml.load(text)",
    ],
)
def test_breaking_a_promise_is_seen(text):
    assert len(problems(text)) == 1


def test_keeping_it_is_not_complained_about():
    text = "import os\nos.replace(a, b)\ntorch.load(p, weights_only=True)\nyaml.safe_load(t)\n"
    assert problems(text) == []
