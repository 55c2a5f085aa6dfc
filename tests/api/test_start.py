"""Starting up: importing laconic is quick, and torch comes only when something needs it."""

from __future__ import annotations

import subprocess
import sys

# Processor time beyond torch and pydantic, as a share of theirs: no machine is fast or slow then.
MOST = 0.5


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_import_brings_no_heavy_package():
    code = "import sys, laconic; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(run(code).split())
    assert "laconic" in loaded
    heavy = {"torch", "numpy", "pydantic", "yaml", "sklearn", "scipy", "PIL", "rich", "typer"}
    assert loaded & heavy == set()


def test_everything_public_starts_quickly_beside_torch_and_pydantic():
    code = """
import time
import torch, numpy, pydantic.types
start = time.process_time()
import laconic
for name in laconic.__all__:
    getattr(laconic, name)
print((time.process_time() - start) / start)
"""
    assert any(float(run(code)) < MOST for _ in range(5))


def test_the_front_door_needs_no_optional_package():
    code = "import sys, laconic; [getattr(laconic, n) for n in dir(laconic)]; print(*sys.modules)"
    optional = {"sklearn", "scipy", "PIL", "rich", "typer", "constriction", "transformers"}
    assert set(run(code).split()) & optional == set()
