"""Channel ghosts (GhostNet): what convolutions compute, keep and cost with cheap channels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import laconic
from helpers.ghost import CONV, ROUNDING, after, drawn
from laconic.errors import ModelError
from laconic.measure import macs
from laconic.models import resnet, vgg
from laconic.models.ghosts import GhostConv2d
from laconic.scope import Scope
from laconic.structure import ChannelGhosts, Ghost
from laconic.structure.ghost import nearest_multiples
from laconic.weights import Float
from laconic.weights.laid import laid_tensors, lay


def test_what_a_convolution_computes() -> None:
    layer = GhostConv2d(CONV, 4, 11, ratio=3, taps=3, bias=True)
    nn.init.normal_(layer.bias)
    x = drawn(2, 3, 9, 9)
    whole = layer.primary(x)
    cheap = F.conv2d(whole, layer.cheap.weight, padding=1, groups=4)
    wanted = torch.cat([whole, cheap], dim=1)[:, :11] + layer.bias[None, :, None, None]
    assert torch.equal(layer(x), wanted)
    assert layer(x).shape == (2, 11, 7, 7)


@pytest.mark.parametrize(("outputs", "ratio"), [(8, 2), (9, 2), (9, 4), (10, 4), (6, 3), (5, 5)])
def test_filters_that_are_multiples_are_made_exactly(outputs: int, ratio: int) -> None:
    conv = nn.Conv2d(3, outputs, 3, stride=2, padding=1)
    kept = -(-outputs // ratio)
    with torch.no_grad():
        for place in range(kept, outputs):
            source = (place - kept) // (ratio - 1)
            conv.weight[place] = (place - 3.5) * conv.weight[source]
    model, x = nn.Sequential(copy.deepcopy(conv)), drawn(2, 3, 7, 7)
    after(Ghost(ChannelGhosts(ratio=ratio)), model)
    torch.testing.assert_close(model(x), conv(x), **ROUNDING)


def test_nearest_multiples_are_least_squares() -> None:
    kept, others = drawn(2, 3, 3), drawn(5, 3, 3, seed=1)
    found = nearest_multiples(kept, others, 3)
    for place, scale in enumerate(found):
        own = kept[place // 3].flatten()[:, None]
        solved = torch.linalg.lstsq(own, others[place].flatten()[:, None]).solution
        assert float(scale) == pytest.approx(float(solved), rel=1e-5)
    assert nearest_multiples(torch.zeros(1, 4), torch.ones(1, 4), 1).tolist() == [0.0]


@pytest.mark.parametrize(
    ("make", "millions"), [(lambda: vgg(16), "158"), (lambda: resnet(56), "65")]
)
def test_operations_of_published_networks(make: Any, millions: str) -> None:
    """Han et al. 2020: VGG-16 falls from 313 M to 158 M at s = 2, d = 3 (ResNet-56: 63 M)."""
    with torch.device("meta"):
        model = after(Ghost(ChannelGhosts(), scope=Scope("kind:conv")), make())
        found = macs(model, torch.zeros(1, 3, 32, 32))[""]
    assert f"{found / 1e6:.0f}" == millions


def test_convolutions_that_cannot_have_ghosts_are_left() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 1, 1), nn.Conv1d(3, 8, 1)
    )
    after(Ghost(ChannelGhosts()), model)
    assert [isinstance(layer, GhostConv2d) for layer in model] == [True, False, False, False]
    before = list(model.state_dict())
    after(Ghost(ChannelGhosts()), model)
    assert list(model.state_dict()) == before


def test_a_laid_convolution_keeps_mask_and_representation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False))
    mask = torch.rand(8, 3, 3, 3) < 0.5
    lay(model, "0.weight", Float(), mask=mask)
    wanted = model[0].weight.detach().clone()
    after(Ghost(ChannelGhosts()), model)
    ((name, (layer, _)),) = laid_tensors(model).items()
    assert name == "0.primary.weight" and torch.equal(layer.mask, mask[:4])
    assert torch.equal(model[0].primary.weight, wanted[:4])


def test_a_tied_convolution_is_refused_and_a_laid_bias_taken_over() -> None:
    tied = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    tied[1].weight = tied[0].weight
    with pytest.raises(ModelError, match="ghost: the weight of '0' is also that of '1'"):
        after(Ghost(ChannelGhosts()), tied)
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    lay(model, "0.bias", Float(), mask=torch.tensor([True, False, True, True]))
    bias = model[0].bias.detach().clone()
    after(Ghost(ChannelGhosts()), model)
    assert torch.equal(model[0].bias, bias) and bias[1] == 0


def test_a_frozen_convolution_stays_frozen() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[0].requires_grad_(False)
    after(Ghost(ChannelGhosts()), model)
    moving = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert moving == {"1"}


def test_what_is_cheap_may_be_replaced_and_described() -> None:
    ghosted = GhostConv2d({"Conv2d": {"in_channels": 3, "out_channels": 4, "kernel_size": 1}}, 4, 8)
    arguments = ghosted.arguments
    ghosted.cheap = nn.Identity()
    assert ghosted.arguments == arguments


def test_a_file_brings_the_convolutions_back(tmp_path: Path) -> None:
    model = after(Ghost(ChannelGhosts(ratio=4)), vgg("small")).eval()
    laconic.save(model, tmp_path / "ghost.safetensors")
    again = laconic.load(tmp_path / "ghost.safetensors")
    x = drawn(1, 3, 32, 32)
    assert torch.equal(again(x), model(x))
