"""What a change would break for people: defaults inside files, the caller's generator."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import laconic
from laconic.models.layers import OWN, layer
from laconic.step import members
from laconic.tasks import digits
from laconic.weights import Representation

# A file stores what differs from the defaults: changing one changes what existing files decode
# to. Add a field whose default is the old behaviour.
DEFAULTS = {
    "affine": {"bits": 8, "granularity": "tensor"},
    "binary": {"granularity": "tensor"},
    "dynamic_fixed_point": {"bits": 8, "choose": "max", "rounding": "nearest"},
    "fixed_point": {"bits": 8, "fraction": None, "rounding": "nearest"},
    "float": {},
    "gobo": {"bits": 3, "threshold": -4.0},
    "kmeans": {"bits": 5, "start": "linear", "iterations": 100},
    "learned_step": {"bits": 4, "granularity": "tensor"},
    "logarithmic": {"bits": 4, "rounding": "log"},
    "loss_aware": {"bits": 2, "granularity": "tensor", "solver": "approximate"},
    "product": {"bits": 8, "block": 8, "iterations": 20},
    "symmetric": {
        "bits": 8,
        "granularity": "tensor",
        "range": "max",
        "levels": "narrow",
        "rounding": "nearest",
    },
    "ternary": {"granularity": "tensor", "threshold": "heuristic"},
}


def test_every_representation_has_its_line():
    kinds = members(Representation, every=True).items()
    assert DEFAULTS.keys() == {name for name, kind in kinds if kind.__module__[:8] == "laconic."}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_of_a_representation_are_part_of_the_format(name):
    kind = members(Representation, every=True)[name]
    defaults = {key: info.default for key, info in kind.model_fields.items()}
    assert {key: defaults[key] for key in DEFAULTS[name]} == DEFAULTS[name]
    assert all(not kind.model_fields[key].is_required() for key in set(defaults))


LINEAR = {"Linear": {"in_features": 4, "out_features": 6}}
CONV = {"Conv2d": {"in_channels": 3, "out_channels": 4, "kernel_size": 3}}
MODES = {"rows": [2, 3], "columns": [2, 2]}
LAYERS = {
    "BlockDiagonalLinear": {"in_features": 4, "out_features": 6, "blocks": 2},
    "BlockTermLinear": {**MODES, "blocks": 2, "ranks": [2, 2]},
    "GhostConv2d": {"primary": CONV, "inputs": 4, "outputs": 8, "bias": True},
    "GhostProjection": {"dense": [LINEAR], "outputs": 6, "gain": "learned"},
    "Halves": {"first": LINEAR, "second": LINEAR},
    "Reorder": {"size": 3},
    "TTLinear": {**MODES, "ranks": [2]},
    "UnpackedAttention": dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), LINEAR)
    | {"head_dim": 3},
}


def test_the_page_of_the_format_names_every_layer_of_laconics_and_its_tensors():
    assert LAYERS.keys() == OWN.keys()
    page = Path(__file__).parents[2] / "docs" / "format.md"
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", page.read_text("utf-8"), re.MULTILINE)
    for name, arguments in LAYERS.items():
        said = {part.split(".")[0] for part in re.findall(r"`([a-z][\w.*]*)`", dict(rows)[name])}
        heads = {key.split(".")[0] for key in layer({name: arguments}).state_dict()}
        assert said <= heads | {"learned"}
        assert {re.sub(r"\d", "0", head) for head in heads} <= said


def test_compress_leaves_the_global_generator_and_the_model_alone():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, 10))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.random.get_rng_state()
    steps = [laconic.Train(batch=16), laconic.Prune("weights", keep=0.5), laconic.Quantize(4)]
    result = laconic.compress(model, digits().few(total=64), steps)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert all(torch.equal(weights[name], now) for name, now in model.state_dict().items())
    assert not torch.equal(result.model[1].weight, model[1].weight)
