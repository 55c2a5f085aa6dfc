"""The import rule: a file imports only from its left or from its own folder."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(importlib.util.find_spec("laconic").origin).parent
FILES = sorted(SOURCE.rglob("*.py"))

# Left to right. A folder stands for all its files but the parts named apart.
ORDER = (
    "errors", "names", "own", "_lazy", "machine", "ranks", "progress", "bars", "text_value",
    "scope", "budget", "ledger", "problems", "step", "tasks", "models", "curvature", "ship/coding",
    "structure/surgery", "weights", "structure", "ship", "costs", "sizes", "measure", "recover",
    "search", "report", "recipe", "rundir", "run", "cli", "__main__",
)  # fmt: skip
# Parts that stand further left than the rest of their folder; ship's private files are coders.
PARTS = {"ship/coding": "ship/coding", "structure/surgery": "structure/surgery"}


def place(module: str) -> str:
    """Return where in ORDER an absolute module name belongs."""
    path = "/".join(module.split(".")[1:])
    if path.startswith("ship/_"):
        return PARTS["ship/coding"]
    return PARTS.get(path, path.split("/")[0])


def module_name(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_name(file) for file in FILES}


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and absolute module of every import that runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imported(ast.Module(body=node.orelse, type_ignores=[]))
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, found) for found in resolved(node))
        else:
            yield from imported(node)


def resolved(node: ast.ImportFrom) -> list[str]:
    """Return the modules that ``from module import names`` reaches, lazy names followed."""
    assert node.level == 0, f"line {node.lineno}: a relative import"
    if not (node.module == "laconic" or node.module.startswith("laconic.")):
        return [node.module]
    table = getattr(importlib.import_module(node.module), "_TABLE", {})
    parts = {name.name: f"{node.module}.{name.name}" for name in node.names}
    return [
        part if part in MODULES else table.get(name, node.module) for name, part in parts.items()
    ]


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_file_imports_from_its_left_or_its_own_folder(file):
    name = module_name(file)
    if name == "laconic":
        assert {found for _, found in imported(parsed(file))} == {"laconic._lazy"}
        return
    own = place(name)
    assert own in ORDER, f"{name} has no place in the import rule"
    wrong = [
        f"{file}:{line}: {own} imports {found}"
        for line, found in imported(parsed(file))
        # The bare package is `from laconic import __version__`: nothing more is imported.
        if found.startswith("laconic.")
        if place(found) not in ORDER or ORDER.index(place(found)) > ORDER.index(own)
    ]
    assert not wrong, "\n".join(wrong)


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def test_the_rule_sees_every_kind_of_import():
    text = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from laconic.cli import main
else:
    import laconic.run
def late():
    from laconic import Train, __version__, errors
    from laconic.ship import _packing, save
"""
    found = [module for _, module in imported(ast.parse(text))]
    assert found[:2] == ["typing", "laconic.run"]
    assert found[2:5] == ["laconic.recover.train", "laconic", "laconic.errors"]
    assert found[5:] == ["laconic.ship._packing", "laconic.ship.artifact"]


@pytest.mark.parametrize(
    "folder", sorted(path.parent.name for path in SOURCE.glob("*/__init__.py"))
)
def test_package_init_is_lazy(folder):
    tree = parsed(SOURCE / folder / "__init__.py")
    assert [module for _, module in imported(tree)] == ["laconic._lazy"]
