"""What the tests of the command line share: a command's answer or refusal, and a small run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from laconic.cli import app

RECIPE = """\
# Small: two steps and a little training.
model: digits_cnn
task: {npz: digits.npz}
steps:
  - prune: {axes: weights, keep: 0.25}
  - quantize: {weight: 4}
  - train: {epochs: 1, batch: 20}
"""


def laconic(*words: object) -> Result:
    """Run a command in this process; only what a user may cause is caught."""
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def answer(*words: object) -> dict[str, Any]:
    """Return the last JSON line of a command."""
    found = laconic("--json", *words)
    assert found.exit_code == 0, found.output
    last: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    assert last["event"] == "result"
    return last


def refused(*words: object, code: int = 2) -> str:
    """Return what a command that stops says on standard error."""
    found = laconic(*words)
    assert found.exit_code == code, found.output
    assert "Traceback" not in found.output
    return found.stderr.strip()


def finished_run(path: Path) -> Path:
    """Put a recipe, its data, and the run the recipe makes into a folder, and return it."""
    import numpy as np

    generator = np.random.default_rng(0)
    labels = np.arange(60) % 10
    images = generator.integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.savez(
        path / "digits.npz",
        train_images=images[:40],
        train_labels=labels[:40],
        test_images=images[40:],
        test_labels=labels[40:],
    )
    (path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    found = laconic("compress", path / "recipe.yaml", "--out", path / "run", "--device", "cpu")
    assert found.exit_code == 0, found.output
    (path / "said.txt").write_text(found.stdout, encoding="utf-8")
    return path
