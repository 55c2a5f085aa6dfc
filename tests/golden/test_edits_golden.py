"""Golden artefacts of edited networks: rebuilt from the file alone, forever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from laconic.ship import load, verify
from laconic.ship.container import digest, read

FOLDER = Path(__file__).parent / "artifacts"
TOKENS = {"input_ids": torch.arange(10).reshape(2, 5)}
IMAGES = {"input": torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)}
# Sums of at most a hundred float32 numbers around 1, in another order.
TOLERANCE = 1e-5


def opened(name: str) -> tuple[nn.Module, dict[str, Any]]:
    if name == "hf1":
        pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    path = FOLDER / f"{name}.safetensors"
    expected = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert path.stat().st_size == expected["bytes"]
    return load(path), expected


@pytest.mark.parametrize(("name", "inputs"), [("edited1", IMAGES), ("hf1", TOKENS)])
def test_it_is_rebuilt_and_computes_what_it_did(name, inputs):
    model, expected = opened(name)
    hashes = {key: digest(tensor) for key, tensor in model.state_dict().items()}
    assert hashes == expected["hashes"]
    with torch.no_grad():
        found = model(**inputs)
    found = found if isinstance(found, torch.Tensor) else found.logits
    assert (found - torch.tensor(expected["logits"])).abs().max() < TOLERANCE
    assert verify(FOLDER / f"{name}.safetensors").tensors == 1


def test_they_cover_every_kind_of_edit_and_builder():
    manifests = [read(FOLDER / f"{name}.safetensors")[0] for name in ("edited1", "hf1")]
    assert [next(iter(manifest["builder"])) for manifest in manifests] == ["arguments", "hf"]
    assert manifests[0]["edits"].keys() == {"attributes", "lists", "modules", "shapes"}
    assert manifests[1]["edits"].keys() == {"attributes", "lists", "shapes"}
    assert manifests[1]["builder"]["hf"].keys() == {"class", "config", "defaults"}
