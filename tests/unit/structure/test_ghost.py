"""Layers with ghosts: the mean of neighbours, what they compute and describe, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from helpers.ghost import CONV, ROUNDING, after, drawn
from laconic.errors import ModelError, RecipeError, ScopeError
from laconic.models import layers
from laconic.models.ghosts import GhostConv2d, GhostProjection, neighbour_mean
from laconic.recover import Reset
from laconic.structure import ChannelGhosts, Ghost, TokenGhosts
from laconic.structure.surgery import apply_edits_, edits_of, replace_

# ------------------------------------------------------------------ the mean of neighbours


def test_the_published_formula() -> None:
    """O_i = sum_m softmax(W)_m X_{i - ceil((k + 1) / 2) + m}, zeros beyond the ends."""
    x = drawn(2, 6, 3)
    for taps in (1, 2, 3, 4, 5):
        logits = drawn(3, taps, seed=taps)
        weight, shift = torch.softmax(logits, dim=1), -(-(taps + 1) // 2)
        wanted = torch.zeros_like(x)
        for i in range(6):
            for m in range(1, taps + 1):
                place = i - shift + m
                if 0 <= place < 6:
                    wanted[:, i] += weight[:, m - 1] * x[:, place]
        torch.testing.assert_close(neighbour_mean(x, logits), wanted)


@given(seed=st.integers(0, 50), taps=st.sampled_from([1, 3, 5]))
def test_a_mean_is_within_its_window(seed: int, taps: int) -> None:
    x, logits = drawn(2, 7, 3, seed=seed), 3 * drawn(3, taps, seed=seed + 1)
    padded = F.pad(x.transpose(1, 2), (taps // 2, taps // 2)).unfold(2, taps, 1)
    found = neighbour_mean(x, logits).transpose(1, 2)
    slack = 1e-6
    assert bool((found <= padded.amax(dim=-1) + slack).all())
    assert bool((found >= padded.amin(dim=-1) - slack).all())


def test_constants_are_kept_but_at_the_ends() -> None:
    found = neighbour_mean(torch.full((1, 6, 2), 4.0), drawn(2, 3))
    torch.testing.assert_close(found[:, 1:-1], torch.full((1, 4, 2), 4.0))
    assert bool((found[:, [0, -1]] < 4.0 - 1e-3).all())


def test_it_is_a_grouped_convolution() -> None:
    x, logits = drawn(2, 5, 4), drawn(4, 3, seed=1)
    kernel = torch.softmax(logits, dim=1)[:, None]
    wanted = F.conv1d(x.transpose(1, 2), kernel, padding=1, groups=4).transpose(1, 2)
    assert torch.equal(neighbour_mean(x, logits), wanted)


def test_no_channel_sees_another() -> None:
    x, logits = drawn(1, 5, 3), drawn(3, 3, seed=1)
    other = x.clone()
    other[..., 1] += 1
    same = neighbour_mean(x, logits) == neighbour_mean(other, logits)
    assert bool(same[..., [0, 2]].all()) and not bool(same[..., 1].any())


# ------------------------------------------------------------------ a projection with ghosts


def projection(parts: int = 1, **options: Any) -> GhostProjection:
    dense = {"Linear": {"in_features": 12 // parts, "out_features": 6, "bias": False}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = GhostProjection([dense] * parts, 6, **options)
        nn.init.normal_(made.logits)
        if made.bias is not None:
            nn.init.normal_(made.bias)
    return made


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("ghosts", [1, 2])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_what_a_projection_computes(parts: int, ghosts: int, activation: str) -> None:
    layer = projection(parts, ghosts=ghosts, activation=activation, gain=0.5)
    x = drawn(2, 5, 12)
    wanted = layer.bias.expand(2, 5, 6).clone()
    kernels = layer.logits.detach().reshape(parts, ghosts, 6, 3)
    for part in range(parts):
        own = slice(part * 12 // parts, (part + 1) * 12 // parts)
        feature = x[..., own] @ layer.dense[part].weight.T
        wanted = wanted + feature
        for ghost in range(ghosts):
            mean = neighbour_mean(feature, kernels[part, ghost])
            wanted = wanted + 0.5 * (mean.relu() if activation == "relu" else mean)
    torch.testing.assert_close(layer(x), wanted, **ROUNDING)
    assert layer.logits.numel() == parts * ghosts * 6 * 3


@pytest.mark.parametrize("gain", [0.0, "learned"])
def test_a_gain_of_zero_is_the_projection_alone(gain: float | str) -> None:
    layer, x = projection(2, gain=gain), drawn(2, 5, 12)
    plain = torch.cat([part.weight for part in layer.dense], dim=1)
    torch.testing.assert_close(layer(x), F.linear(x, plain, layer.bias), **ROUNDING)


def test_a_learned_gain_leaves_zero() -> None:
    layer = projection(gain="learned")
    layer(drawn(2, 5, 12)).square().sum().backward()
    assert float(layer.gain.grad.abs()) > 0
    assert not bool(layer.logits.grad.any())  # until the gain has moved


@pytest.mark.parametrize(
    "layer",
    [
        projection(),
        projection(3, ghosts=2, taps=5, gain="learned", activation="relu", bias=False),
        GhostConv2d({"Conv2d": {"in_channels": 3, "out_channels": 4, "kernel_size": 3}}, 4, 7),
        GhostConv2d(
            {"Conv2d": {"in_channels": 3, "out_channels": 2, "kernel_size": 1, "bias": False}},
            *(2, 8),
            ratio=4,
            taps=5,
            bias=True,
        ),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_is_rebuilt_from_its_description(layer: nn.Module) -> None:
    spec = layers.describe(layer)
    again = layers.layer(spec)
    assert layers.describe(again) == spec
    again.load_state_dict(layer.state_dict())
    x = drawn(2, 5, 12) if isinstance(layer, GhostProjection) else drawn(2, 3, 8, 8)
    assert torch.equal(again(x), layer(x))


def test_a_description_follows_what_is_inside() -> None:
    model = nn.Sequential(projection())
    low = nn.Sequential(nn.Linear(12, 2, bias=False), nn.Linear(2, 6, bias=False))
    replace_(model, "0", projection())
    replace_(model, "0.dense.0", low)
    again = nn.Sequential(nn.Linear(12, 6))
    apply_edits_(again, edits_of(model), {})
    again.load_state_dict(model.state_dict())
    x = drawn(2, 5, 12)
    assert torch.equal(again(x), model(x))


def test_ghosts_start_again_as_new_layers_do() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    after(Ghost(ChannelGhosts()), model)
    before = model[0].primary.weight.detach().clone()
    after(Reset(), model)
    assert not model[0].bias.any() and not torch.equal(model[0].primary.weight, before)
    layer = projection(gain="learned")
    nn.init.ones_(layer.logits)
    layer.reset_parameters()
    assert not layer.logits.any() and not layer.gain.any()


# ------------------------------------------------------------------ what is refused


LINEAR = {"Linear": {"in_features": 4, "out_features": 6}}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("GhostProjection", {"dense": [], "outputs": 6}, "parts 0 of a ghost layer"),
        ("GhostProjection", {"dense": [LINEAR] * 129, "outputs": 6}, "parts 129 of a ghost"),
        ("GhostProjection", {"dense": [LINEAR], "outputs": 6, "ghosts": 1000}, "ghosts 1000 of"),
        ("GhostProjection", {"dense": [LINEAR], "outputs": 6, "taps": 0}, "taps 0 of a ghost"),
        ("GhostProjection", {"dense": [LINEAR], "outputs": 6, "activation": "exp"}, "'exp'"),
        ("GhostProjection", {"dense": [LINEAR], "outputs": 6, "gain": "much"}, "cannot be built"),
        ("GhostProjection", {"dense": [{"Bad": {}}], "outputs": 6}, "no layer is called 'Bad'"),
        ("GhostProjection", {"dense": 3, "outputs": 6}, "cannot be built"),
        ("GhostConv2d", {"primary": CONV, "inputs": 4, "outputs": 9}, "give 5 channels"),
        ("GhostConv2d", {"primary": CONV, "inputs": 4, "outputs": 8, "taps": 2}, "an odd number"),
        ("GhostConv2d", {"primary": CONV, "inputs": 4, "outputs": 8, "ratio": 1}, "ratio 1 of"),
        ("GhostConv2d", {"primary": CONV, "inputs": 4, "outputs": 8, "taps": 999}, "taps 999 of"),
    ],
)
def test_a_hostile_description_is_refused(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        layers.layer({name: arguments})


def test_a_network_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(ModelError, match="Sequential is no Transformer whose parts have known"):
        Ghost(TokenGhosts()).check(nn.Sequential(nn.Linear(2, 2)), None)
    with pytest.raises(ScopeError, match=r"nothing in '\*' can have channel ghosts"):
        Ghost(ChannelGhosts()).check(nn.Sequential(nn.Linear(2, 2)), None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChannelGhosts(taps=4), "4 taps have no middle"),
        (lambda: ChannelGhosts(ratio=1), "ratio"),
        (lambda: TokenGhosts(ghosts=0), "ghosts"),
        (lambda: TokenGhosts(gain="much"), "gain"),
        (lambda: TokenGhosts(activation="gelu"), "activation"),
    ],
)
def test_values_out_of_bounds_are_refused(make: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()
