"""ShareLayers: all blocks of a network compute with the parameters of one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import laconic
from helpers.depth import WIDTH, after, inputs, net, numbers
from laconic.errors import ModelError
from laconic.measure import measure
from laconic.recover import SGD, Train
from laconic.structure import ShareLayers
from laconic.weights import Float, KMeans, Ternary
from laconic.weights.laid import laid_tensors, lay


@pytest.mark.parametrize("blocks", [2, 5])
def test_parameters_do_not_depend_on_the_depth(blocks: int) -> None:
    model = after(ShareLayers(), net(blocks))
    outside = numbers(model.first) + numbers(model.last)
    assert numbers(model) == outside + numbers(model.blocks[0])
    assert len(model.blocks) == blocks


@pytest.mark.parametrize("source", [0, 2, "mean"])
def test_all_blocks_compute_what_the_source_does(source: int | str) -> None:
    model = net()
    origin = [block.state_dict() for block in copy.deepcopy(model).blocks]
    after(ShareLayers(source), model)
    for name, tensor in model.blocks[3].state_dict().items():
        stacked = torch.stack([block[name] for block in origin])
        wanted = stacked.mean(dim=0) if source == "mean" else stacked[source]
        assert torch.equal(tensor, wanted)
    x = inputs()
    hidden = model.first(x)
    for _ in range(4):
        hidden = model.blocks[1](hidden)
    assert torch.equal(model(x), model.last(hidden.mean(dim=1)))


def test_training_moves_shared_parameters_together() -> None:
    model = after(ShareLayers("mean"))
    before = model.blocks[0].inner.weight.detach().clone()
    after(Train(batch=6, optimizer=SGD(0.1)), model)
    weights = [block.inner.weight for block in model.blocks]
    assert not torch.equal(weights[0], before)
    assert all(weight is weights[0] for weight in weights)


def test_a_file_holds_shared_parameters_once(tmp_path: Path) -> None:
    model = net(8)
    after(ShareLayers(1), model)
    assert measure(model).dense_bytes == 4 * numbers(model)
    laconic.save(model, tmp_path / "shared.safetensors")
    again = laconic.load(tmp_path / "shared.safetensors", model=net(8))
    assert torch.equal(again(inputs()), model(inputs()))
    assert numbers(again) == numbers(model)


@pytest.mark.parametrize("source", [1, "mean"])
def test_what_is_laid_is_shared_too(source: int | str) -> None:
    model = net()
    mask = torch.arange(36).reshape(6, 6) % 2 == 0
    for place in range(4):
        lay(model, f"blocks.{place}.inner.weight", Ternary(), mask=mask)
    before = model.blocks[1].inner.weight.detach().clone()
    after(ShareLayers(source), model)
    layers = {name: layer for name, (layer, _) in laid_tensors(model).items()}
    assert len(layers) == 4 and len(set(layers.values())) == 1
    found = model.blocks[3].inner.weight.detach()
    assert not bool(found[~mask].any())
    assert len(found.unique()) == 3
    assert source == "mean" or torch.equal(found, before)
    assert all(torch.equal(block.inner.weight, found) for block in model.blocks)


def test_a_mean_keeps_what_any_block_has() -> None:
    model = net(2)
    rows = torch.arange(6)[:, None].expand(6, 6)
    lay(model, "blocks.0.inner.weight", Float(), mask=rows < 2)
    lay(model, "blocks.1.inner.weight", Float(), mask=rows > 3)
    after(ShareLayers("mean"), model)
    (layer,) = {layer for layer, _ in laid_tensors(model).values()}
    assert torch.equal(layer.mask, (rows < 2) | (rows > 3))


def test_what_is_laid_on_other_blocks_alone_is_gone() -> None:
    model = net()
    lay(model, "blocks.2.inner.weight", KMeans(2))
    after(ShareLayers(0), model)
    assert laid_tensors(model) == {}
    assert model.blocks[2].inner.weight is model.blocks[0].inner.weight


def test_blocks_that_differ_cannot_share() -> None:
    model = net()
    model.blocks[2].inner = nn.Linear(WIDTH, WIDTH, bias=False)
    with pytest.raises(ModelError, match=r"block 2 and block 0 differ in 'inner\.bias'"):
        ShareLayers().check(model, None)
    with pytest.raises(ModelError, match="there is no block 4; the 4 blocks are 0 to 3"):
        ShareLayers(4).check(net(), None)
