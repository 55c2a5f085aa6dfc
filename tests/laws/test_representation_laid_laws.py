"""Laws of representations laid on a layer: baking, deep copies, the state dict."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from helpers.representations import every, masks, normal, same_bytes
from laconic.weights import Representation, bake, lay
from laconic.weights.laid import narrow


def laid_linear(representation: Representation, mask: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(7, 4)
    with torch.no_grad():
        linear.weight.copy_(normal(4, 7))
    lay(linear, "weight", representation, mask=mask)
    return linear


@pytest.mark.parametrize("mask_name", ["no mask", "half"])
@every
def test_bake_leaves_what_ships(representation: Representation, mask_name: str) -> None:
    linear = laid_linear(representation, masks((4, 7))[mask_name])
    layers = linear.parametrizations.weight
    shipped = representation.decode(layers[0].encode(layers.original))
    output = linear(normal(2, 7))
    bake(linear)
    assert type(linear) is nn.Linear
    assert same_bytes(linear.weight, shipped)
    assert torch.equal(linear(normal(2, 7)), output)
    assert list(linear.state_dict()) == ["bias", "weight"]


@every
def test_a_deep_copy_is_independent(representation: Representation) -> None:
    linear = laid_linear(representation, masks((4, 7))["half"])
    before = linear.weight.detach().clone()
    twin = copy.deepcopy(linear)
    assert same_bytes(twin.weight, before)
    twin.parametrizations.weight[0].update()
    narrow(twin, "weight", torch.zeros(4, 7, dtype=torch.bool))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(-3)
    bake(twin)
    assert not parametrize.is_parametrized(twin) and parametrize.is_parametrized(linear)
    assert same_bytes(linear.weight, before)


@every
def test_the_state_dict_holds_all_it_needs(representation: Representation) -> None:
    linear = laid_linear(representation, masks((4, 7))["half"])
    for _ in range(3):
        linear.parametrizations.weight[0].update()
    other = nn.Linear(7, 4)
    lay(other, "weight", representation, mask=torch.ones(4, 7, dtype=torch.bool))
    other.load_state_dict(linear.state_dict())
    assert same_bytes(other.weight, linear.weight)
