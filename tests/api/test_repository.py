"""The repository speaks of itself alone, and its packaging says what the code needs."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import laconic

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "laconic"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOLDERS = (".ci", "benchmarks", "docs", "papers", "scripts", "src", "tests")
WRITTEN = {"", ".css", ".html", ".json", ".md", ".py", ".toml", ".txt", ".yaml"}

# Import name -> distribution, where they differ.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}

FOREIGN = {
    "an issue of some tracker": r"(?i)\b(issue|bug|PR|GH|pull request|ticket)s?[ -]?#?\d+\b",
    "a path of some machine": r"(?<![\w.])/(home|root|work|mnt|opt|Users)/\w",
    "the folder beside the repository": r"\.\./shared",
    "a host of packages": r"(?i)\b(pypi|pythonhosted|pytorch|anaconda|conda)\.(org|com|io)\b",
}
# .ci/run alone may look beside the repository for data.
ALLOWED = {(".ci/run", "the folder beside the repository")}


def written_files() -> list[Path]:
    """Return every file a person or a script of the repository wrote."""
    below = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    here = [path for path in ROOT.glob("*") if path.name != "LICENSE"]
    return sorted(
        path
        for path in [*here, *below]
        if path.is_file() and path.suffix in WRITTEN and "__pycache__" not in path.parts
        if path != Path(__file__)
    )


@pytest.mark.parametrize("file", written_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_file_speaks_of_the_project_alone(file):
    text, name = file.read_text(encoding="utf-8"), file.relative_to(ROOT).as_posix()
    for what, pattern in FOREIGN.items():
        found = re.search(pattern, text)
        if found and (name, what) not in ALLOWED:
            line = text[: found.start()].count("\n") + 1
            pytest.fail(f"{name}:{line} names {what}: {found.group()!r}")


@pytest.mark.parametrize(
    "text", ["see issue #12", "GH-7", "/home/me/x", "../shared/data", "https://pypi.org/simple"]
)
def test_foreign_words_are_seen(text):
    assert any(re.search(pattern, text) for pattern in FOREIGN.values())


def third_party() -> dict[str, str]:
    """Return distribution -> a file that imports it."""
    found: dict[str, str] = {}
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for top in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names):
                found[canonicalize_name(DISTRIBUTIONS.get(top, top))] = str(file)
    return {name: file for name, file in found.items() if name != "laconic"}


def required(lines: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


CORE = required(PROJECT["dependencies"])
EXTRAS = {name: required(lines) for name, lines in PROJECT["optional-dependencies"].items()}
# Imported, but brought along by a dependency that is nothing without it.
BROUGHT = {"pydantic-core": "pydantic", "click": "typer"}


def test_every_import_is_a_dependency_and_every_dependency_is_imported():
    imports = third_party()
    known = set(CORE) | {name for extra in EXTRAS.values() for name in extra} | set(BROUGHT)
    assert sorted(set(imports) - known) == []
    assert sorted(set(CORE) - set(imports)) == []
    assert all(BROUGHT[name] in CORE for name in set(imports) & set(BROUGHT))


def test_missing_extra_names_an_extra_that_brings_the_package():
    pattern = re.compile(r"MissingExtra\(\"([\w-]+)\", \"(\w+)\"\)")
    raised = [
        found for file in SOURCE.rglob("*.py") for found in pattern.findall(file.read_text("utf-8"))
    ]
    assert ("Pillow", "vision") in raised
    for package, extra in raised:
        assert canonicalize_name(package) in EXTRAS[extra]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_constraints_pin_what_is_required_for_any_machine():
    needed = CORE | EXTRAS["dev"] | EXTRAS["vision"]
    assert sorted(set(needed) - set(pins())) == []
    for name, version in pins().items():
        assert "+" not in version, f"{name}: a local build serves one machine only"
        assert not name.startswith(("nvidia", "triton"))
        if name in needed:
            assert needed[name].specifier.contains(version)


def test_constraints_allow_all_that_a_dependency_needs():
    for name in CORE | EXTRAS["dev"] | EXTRAS["vision"]:
        for line in importlib.metadata.requires(name) or []:
            other = Requirement(line)
            if other.name.startswith(("cuda", "nvidia", "triton")):
                continue  # what a CUDA build of torch brings along
            if other.marker is None or other.marker.evaluate({"extra": ""}):
                version = pins().get(canonicalize_name(other.name))
                assert version, f"constraints.txt does not pin {other.name}, which {name} needs"
                assert other.specifier.contains(version)


def test_versions_agree():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(laconic.__version__)}\b", changelog, re.MULTILINE)
    assert "version" in PROJECT["dynamic"]


def test_types_and_recipes_travel_with_the_package():
    assert (Path(laconic.__file__).parent / "py.typed").is_file()
    assert list((Path(laconic.__file__).parent / "recipes").glob("*.yaml"))


def test_scripts_are_executable():
    for name in ("scripts/demo", "scripts/test", "scripts/check", "scripts/docs", ".ci/run"):
        assert (ROOT / name).stat().st_mode & 0o111, f"{name} is not executable"
