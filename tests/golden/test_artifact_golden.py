"""Golden artefacts: files of every format version so far load forever, to the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from laconic.ship import CODERS, inspect, load, verify
from laconic.ship.container import digest, read
from laconic.step import members
from laconic.weights import Representation

FOLDER = Path(__file__).parent / "artifacts"
FILES = sorted(FOLDER.glob("format*.safetensors"))

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def expected(path: Path) -> dict[str, tuple[list[int], str]]:
    """Return the shape and the sha256 of every tensor."""
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def skeleton(path: Path) -> nn.Module:
    """Return the plain network of a file, built from its listing alone."""
    model = nn.Module()
    for name, (shape, _) in expected(path).items():
        layer, _, tensor = name.partition(".")
        if not hasattr(model, layer):
            model.add_module(layer, nn.Module())
        empty = torch.empty(shape, device="meta")
        if tensor in ("weight", "bias"):
            getattr(model, layer).register_parameter(tensor, nn.Parameter(empty))
        else:
            kind = torch.int64 if tensor == "num_batches_tracked" else torch.float32
            getattr(model, layer).register_buffer(tensor, empty.to(kind))
    return model


def test_there_is_one_for_format_1():
    assert FOLDER / "format1.safetensors" in FILES


@each_file
def test_it_loads_to_the_numbers_it_was_saved_with(path):
    loaded = load(path, model=skeleton(path)).state_dict()
    hashes = {name: own for name, (_, own) in expected(path).items()}
    assert {name: digest(tensor) for name, tensor in loaded.items()} == hashes


@each_file
def test_it_is_verified(path):
    assert verify(path).tensors == len(inspect(path).layers) > 20


@each_file
def test_what_is_tied_stays_tied(path):
    loaded = load(path, model=skeleton(path))
    assert loaded.tied.weight is loaded.tied_again.weight


def entries(path: Path) -> list[dict[str, Any]]:
    return list(read(path)[0]["tensors"].values())


def test_the_one_of_format_1_covers_what_format_1_has():
    found = entries(FOLDER / "format1.safetensors")
    coders = {stream[1] for entry in found for stream in entry["streams"].values()}
    assert coders == set(CODERS)
    assert {entry["dtype"] for entry in found} == {"float16", "bfloat16", "float32", "float64"}
    written = [entry["representation"] for entry in found]
    names = {each if isinstance(each, str) else next(iter(each)) for each in written}
    # What was added since is in the files of later formats, or in a new file of this one.
    assert names <= set(members(Representation, every=True))
    assert {"affine", "binary", "fixed_point", "float", "kmeans", "logarithmic"} <= names
    assert {"dynamic_fixed_point", "symmetric", "ternary"} <= names
