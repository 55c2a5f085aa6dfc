"""The size gate: code lines of files and functions, and how deep statements nest."""

from __future__ import annotations

import ast
import importlib
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(importlib.util.find_spec("laconic").origin).parent
FILES = sorted(SOURCE.rglob("*.py"))
TESTS = Path(__file__).parents[1]
LARGEST_FILE, LARGEST_FUNCTION, DEEPEST = 400, 45, 3

BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
SILENT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER, tokenize.ENCODING,
}  # fmt: skip


def code_lines(text: str) -> set[int]:
    """Return the numbers of the lines that are no docstring, comment or blank."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SILENT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and ast.get_docstring(node) is not None:
                lines -= set(range(first.lineno, first.end_lineno + 1))
    return lines


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def depth(node: ast.AST) -> int:
    """Return how many blocks stand inside one another below a node; elif is no new block."""
    deepest = 0
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.FunctionDef):
                chained = isinstance(node, ast.If) and field == "orelse" and len(value) == 1
                opens = isinstance(child, BLOCKS) and not (chained and isinstance(child, ast.If))
                deepest = max(deepest, depth(child) + opens)
    return deepest


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_file_and_its_functions_are_small(file):
    text = file.read_text(encoding="utf-8")
    lines = code_lines(text)
    assert len(lines) <= LARGEST_FILE, f"{len(lines)} lines of code"
    for function in functions(ast.parse(text)):
        own = lines & set(range(function.lineno, function.end_lineno + 1))
        where = f"{file}:{function.lineno}: {function.name}"
        assert len(own) <= LARGEST_FUNCTION, f"{where} has {len(own)} lines of code"
        assert depth(function) <= DEEPEST, f"{where} nests {depth(function)} deep"


def test_files_of_tests_are_small():
    files = {file: code_lines(file.read_text(encoding="utf-8")) for file in TESTS.rglob("*.py")}
    large = {str(file): len(lines) for file, lines in files.items() if len(lines) > LARGEST_FILE}
    assert files and not large


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_file_begins_with_one_sentence(file):
    summary = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n")[0]
    assert summary.endswith("."), f"{file} does not say what it holds"


def test_counting():
    text = '"""Doc."""\n\n# why\ndef f():  # why\n    """Doc.\n\n    More.\n    """\n    return 1\n'
    assert code_lines(text) == {4, 9}
    assert code_lines('text = """a\n\nb"""\n') == {1, 2, 3}
    nested = "def f():\n if a:\n  pass\n elif b:\n  for c in d:\n   with e:\n    pass\n"
    assert depth(ast.parse(nested).body[0]) == 3
