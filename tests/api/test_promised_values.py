"""What a change would break for people: defaults inside files, the caller's generator."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import laconic
from laconic.step import members
from laconic.tasks import digits
from laconic.weights import Representation

# A file stores what differs from the defaults: changing one changes what existing files decode
# to. Add a field whose default is the old behaviour. A line joins with the release that ships it.
DEFAULTS = {
    "affine": {"bits": 8, "granularity": "tensor"},
    "binary": {"granularity": "tensor"},
    "dynamic_fixed_point": {"bits": 8, "choose": "max", "rounding": "nearest"},
    "fixed_point": {"bits": 8, "fraction": None, "rounding": "nearest"},
    "float": {},
    "kmeans": {"bits": 5, "start": "linear", "iterations": 100},
    "logarithmic": {"bits": 4, "rounding": "log"},
    "symmetric": {
        "bits": 8,
        "granularity": "tensor",
        "range": "max",
        "levels": "narrow",
        "rounding": "nearest",
    },
    "ternary": {"granularity": "tensor", "threshold": "heuristic"},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_of_a_representation_are_part_of_the_format(name):
    kind = members(Representation, every=True)[name]
    defaults = {key: info.default for key, info in kind.model_fields.items()}
    assert {key: defaults[key] for key in DEFAULTS[name]} == DEFAULTS[name]
    assert all(not kind.model_fields[key].is_required() for key in set(defaults))


def test_compress_leaves_the_global_generator_and_the_model_alone():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, 10))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.random.get_rng_state()
    steps = [laconic.Train(batch=16), laconic.Prune("weights", keep=0.5), laconic.Quantize(4)]
    result = laconic.compress(model, digits().few(total=64), steps)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert all(torch.equal(weights[name], now) for name, now in model.state_dict().items())
    assert not torch.equal(result.model[1].weight, model[1].weight)
