"""Golden artefacts: files of every format version so far load forever, to the same numbers."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from laconic.ship import inspect, load, verify
from laconic.ship.container import digest

FOLDER = Path(__file__).parent / "artifacts"
FILES = sorted(FOLDER.glob("format*.safetensors"))


def hashes(path):
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def skeleton(path):
    names = {name.partition(".")[0] for name in hashes(path)}
    with torch.device("meta"):
        return nn.ModuleDict({name: nn.Linear(20, 24) for name in sorted(names)})


def test_there_is_one_for_format_1():
    assert FOLDER / "format1.safetensors" in FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_loads_to_the_numbers_it_was_saved_with(path):
    loaded = load(path, model=skeleton(path)).state_dict()
    assert {name: digest(tensor) for name, tensor in loaded.items()} == hashes(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_is_verified(path):
    assert verify(path).tensors == len(inspect(path).layers) == len(hashes(path)) // 2
