"""Files that lie of streams of another shape than the weight, or of tables as long as codes say."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.hostile import (
    ABSURD,
    FOLDER,
    MOST_MEMORY,
    Manifest,
    peak_growth,
    places,
    replaced,
    signed,
    survive,
)
from laconic.errors import ArtifactError
from laconic.ship import container, load, save, verify
from laconic.weights import Gobo, Product, lay

pytestmark = pytest.mark.usefixtures("folder")


def blocky(*, masked: bool) -> nn.Sequential:
    """Return two layers: blocks that share codewords, and a codebook with outliers."""
    model = nn.Sequential(nn.Linear(22, 6), nn.Linear(6, 4))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for name, representation in (
            ("0.weight", Product(2, block=8)),
            ("1.weight", Gobo(2, threshold=0.0)),
        ):
            mask = model.get_parameter(name) > 0.3 if masked else None
            lay(model, name, representation, mask=mask)
    return model


def blocky_file(edit: Callable[[Manifest], object], *, masked: bool = False) -> Path:
    path = FOLDER[0] / "blocky.safetensors"
    save(blocky(masked=masked), path)
    manifest, tensors = container.read(path)
    manifest = copy.deepcopy(manifest)
    edit(manifest["tensors"])
    return signed(manifest, tensors)


def load_blocky(path: Path) -> nn.Module:
    return load(path, model=nn.Sequential(nn.Linear(22, 6), nn.Linear(6, 4)))


def of_blocks(**fields: int) -> Callable[[Manifest], object]:
    written = {"product": {"bits": 2, **fields}}
    return lambda tensors: tensors["0.weight"].update(representation=written)


def of_stream(name: str, stream: str, place: int, value: int) -> Callable[[Manifest], object]:
    return lambda tensors: tensors[name]["streams"][stream].__setitem__(place, value)


BLOCKS: dict[str, tuple[Callable[[Manifest], object], str]] = {
    "fewer blocks": (of_stream("0.weight", "index", 2, 17), "cannot have 17 'index' symbols"),
    "more blocks": (of_stream("0.weight", "index", 2, 19), "cannot have 19 'index' symbols"),
    "an index for every weight": (of_stream("0.weight", "index", 2, 132), "cannot have 132"),
    "an index for more": (of_stream("0.weight", "index", 2, 133), "cannot have 133"),
    "blocks of another length": (of_blocks(block=4), "cannot have 18 'index' symbols"),
    "longer codewords": (of_blocks(block=9), "table 'codebook'"),
    "blocks without end": (of_blocks(block=2**40), "block"),
    "another shape": (
        lambda tensors: tensors["0.weight"].update(shape=[1, 144]),
        r"in the file and|cannot have \d+ 'position' symbols",
    ),
    "more codewords": (
        lambda tensors: tensors["0.weight"].update(representation={"product": {"bits": 3}}),
        "table 'codebook'",
    ),
    "no block": (lambda tensors: tensors["0.weight"]["streams"].pop("index"), "."),
    "fewer outliers": (
        lambda tensors: tensors["1.weight"]["tables"].update(outliers=[0]),
        "promises numbers|table 'outliers'",
    ),
    "outliers in rows": (
        lambda tensors: tensors["1.weight"]["tables"].update(
            outliers=[1, *tensors["1.weight"]["tables"]["outliers"]]
        ),
        "table 'outliers'",
    ),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_that_lie(name, masked):
    edit, words = BLOCKS[name]
    path = blocky_file(edit, masked=masked)
    with pytest.raises(ArtifactError, match=words):
        load_blocky(path)
    with pytest.raises(ArtifactError):
        verify(path)
    survive(path)


@pytest.mark.parametrize("masked", [False, True])
def test_an_honest_file_of_blocks_is_read(masked):
    path = blocky_file(lambda tensors: None, masked=masked)
    loaded, saved = load_blocky(path), blocky(masked=masked)
    for place in range(2):
        assert torch.equal(loaded[place].weight, saved[place].weight)


@pytest.mark.parametrize("masked", [False, True])
def test_any_value_anywhere_in_a_manifest_of_blocks_is_survived(masked):
    manifest, _ = container.read(blocky_file(lambda tensors: None, masked=masked))
    generator = random.Random(4)
    for place in list(places(manifest["tensors"])) * 3:
        value = generator.choice(ABSURD)
        survive(blocky_file(lambda t, at=place, new=value: replaced(t, at, new), masked=masked))


def test_blocks_do_not_decode_to_more_than_was_promised():
    """A row of one weight would be padded to a block of 64: 2^20 rows, 256 MiB."""
    rows = 1 << 20
    model = nn.Linear(1, rows, bias=False)
    nn.init.constant_(model.weight, 0.5)
    lay(model, "weight", Product(1, block=64))
    path = FOLDER[0] / "rows.safetensors"
    save(model, path)
    plain = nn.Linear(1, rows, bias=False)
    assert peak_growth(lambda: load(path, model=plain)) < MOST_MEMORY
