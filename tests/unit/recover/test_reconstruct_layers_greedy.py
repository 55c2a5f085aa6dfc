"""ThiNet's factors of the channels that stay are least squares of what these contribute."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from helpers.reconstruct_layers import examples, layer, normed, state_of
from laconic.models.capture import capture
from laconic.recover import Greedy, Reconstruct
from laconic.scope import Scope
from laconic.step import run_step

# Moments are sums of thousands of float32 products.
SUMMED = {"rtol": 1e-4, "atol": 1e-5}


def entering(model: nn.Module, path: str, inputs: Tensor) -> Tensor:
    with capture(model, [f"input:{path}"]) as features:
        model(inputs)
    return features[f"input:{path}"]


def contributed(model: nn.Module, path: str, inputs: Tensor) -> Tensor:
    """Return what every input channel of a layer adds to its answers [answers, channels]."""
    own, entered = copy.deepcopy(layer(model, path)), entering(model, path, inputs)
    nn.init.zeros_(own.bias)
    columns = []
    for channel in range(entered.shape[1]):
        alone = torch.zeros_like(entered)
        alone[:, channel] = entered[:, channel]
        columns.append(own(alone).flatten().double())
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize(("path", "source"), [("conv1", "conv0"), ("last", "conv2")])
@pytest.mark.parametrize("astray", [0.0, 0.1])
@torch.no_grad()
def test_factors_are_least_squares(path: str, source: str, astray: float) -> None:
    net, task = normed(), examples()
    state, inputs = state_of(net, task), task.example(24)[0]
    for parameter in state.model.parameters():
        parameter.add_(astray * torch.randn_like(parameter))
    before = copy.deepcopy(state.model)
    with torch.enable_grad():
        run_step(Reconstruct(solve=Greedy(0.5), scope=Scope(path)), state)
    found = layer(state.model, path)

    whole, bias = layer(before, path).weight, layer(before, path).bias
    left = layer(state.model, source).bias  # tells one channel from another
    kept = [layer(before, source).bias.tolist().index(number) for number in left.tolist()]
    assert len(kept) == whole.shape[1] // 2
    parts = contributed(before, path, inputs)
    wanted = layer(net, path)(entering(net, path, inputs)).movedim(1, -1) - bias
    column = wanted.movedim(-1, 1).reshape(-1, 1).double()
    factors = torch.linalg.lstsq(parts[:, kept], column).solution[:, 0]
    assert float((factors - 1).abs().min()) > 1e-3
    expected = whole[:, kept].movedim(1, -1) * factors.float()
    torch.testing.assert_close(found.weight, expected.movedim(-1, 1), **SUMMED)
    assert torch.equal(found.bias, bias)
