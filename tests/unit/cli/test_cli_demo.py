"""The command demo: which folders it takes, and how it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.cli import laconic
from laconic import rundir
from laconic.cli import demo
from laconic.errors import RunError
from laconic.recipe import Recipe
from laconic.structure import Prune
from laconic.weights import Quantize


def test_the_demonstration_takes_new_empty_and_its_own_folders(tmp_path: Path) -> None:
    for name in ("new/er", "empty"):
        path = tmp_path / name
        if name == "empty":
            path.mkdir()
        demo._claim(path)
        (path / rundir.CHECKPOINT).touch()
        (path / "notes.txt").touch()
        demo._claim(path)
        assert not (path / rundir.CHECKPOINT).exists()
        assert (path / "notes.txt").exists()


def test_the_demonstration_leaves_other_folders_and_files_alone(tmp_path: Path) -> None:
    (tmp_path / rundir.CHECKPOINT).touch()
    file = tmp_path / "file"
    file.touch()
    for path in (tmp_path, file):
        with pytest.raises(RunError, match="is not a demonstration's; give another --out"):
            demo._claim(path)
    assert (tmp_path / rundir.CHECKPOINT).exists()


def test_the_demonstration_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = Recipe((Prune("weights", keep=0.1), Quantize(4)))
    monkeypatch.setattr(Recipe, "read", classmethod(lambda cls, path: short))
    found = laconic("demo", "--out", tmp_path / "demo", "--threads", torch.get_num_threads())
    assert found.exit_code == 0, found.output
    assert "5 weights and all logits are identical bit for bit" in found.output
    assert (tmp_path / "demo" / demo.ORIGINAL).is_file()
