"""How much memory a small file may ask for, with tables, streams and a probe."""

from __future__ import annotations

import copy
import functools
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers.hostile import (
    FOLDER,
    MOST_MEMORY,
    MOST_SECONDS,
    edited,
    entry,
    opened,
    peak_growth,
    probe,
    refuse_decoding,
    signed,
    verify_small,
)
from laconic.errors import ArtifactError
from laconic.ship import container, load, save, verify
from laconic.ship.manifest import WEIGHTS_PER_BYTE
from laconic.step import members
from laconic.weights import Binary, Representation, lay

pytestmark = pytest.mark.usefixtures("folder")


def plain_linear(rows: int, columns: int) -> nn.Module:
    return nn.Linear(columns, rows, bias=False, device="meta")


@pytest.mark.parametrize("name", members(Representation, every=True))
def test_tables_cannot_blow_up_a_weight(name, tmp_path):
    representation = members(Representation)[name]()
    model = nn.Linear(1000, 500, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.5)
    mask = torch.arange(500_000).reshape(500, 1000) < 400_000
    lay(model, "weight", representation, mask=mask)
    save(model, tmp_path / "a")
    manifest, tensors = container.read(tmp_path / "a")
    own = manifest["tensors"]["weight"]
    for table, shape in own["tables"].items():
        for wrong in (
            [shape[0] * 300],
            [shape[0], 300],
            [300, *shape],
            [1] if shape != [1] else [],
        ):
            if wrong == shape:
                continue  # 300 times nothing
            altered = copy.deepcopy(manifest)
            altered["tensors"]["weight"]["tables"][table] = wrong
            if own["streams"].keys() == {"position"} and wrong != [1]:
                continue  # then the file is as large as what it asks for
            others = sum(s[0] for key, s in own["tables"].items() if key != table)
            numbers = functools.reduce(lambda a, b: a * b, wrong, 1) + others
            path = signed(altered, tensors | {"float32": torch.ones(numbers)})
            check_blow_up(path)


def check_blow_up(path: Path) -> None:
    def work() -> None:
        with pytest.raises(ArtifactError, match=r"table|survivors"):
            load(path, model=plain_linear(500, 1000))

    assert peak_growth(work) < MOST_MEMORY


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_small_file_cannot_ask_for_much_memory(dtype):
    manifest, tensors = opened()
    for name in list(manifest["tensors"]):
        del manifest["tensors"][name]
    manifest["ties"] = {}
    manifest["dense"] = {}
    manifest["edits"] = {}
    stored = 3000
    count = (stored + 128) * WEIGHTS_PER_BYTE
    own = {
        "representation": "binary",
        "shape": [count],
        "dtype": dtype,
        "streams": {"code": [1, "huffman", count, 1]},
        "tables": {"scale": [1], "unused": [(stored - 1) // (4 if dtype == "float32" else 8) - 1]},
        "sha256": "0" * 64,
    }
    manifest["tensors"]["weight"] = own
    numbers = 1 + own["tables"]["unused"][0]
    tensors = {
        "codes": torch.tensor([2], dtype=torch.uint8),
        dtype: torch.ones(numbers, dtype=getattr(torch, dtype)),
    }
    stored = sum(tensor.nbytes for tensor in tensors.values())
    own["shape"] = [(stored + 128) * WEIGHTS_PER_BYTE]
    own["streams"]["code"][2] = own["shape"][0]
    path = signed(manifest, tensors)
    start = time.process_time()

    def work() -> None:
        with pytest.raises(ArtifactError, match="does not decode to the weight that was saved"):
            verify(path)

    assert peak_growth(work) < MOST_MEMORY
    assert time.process_time() - start < MOST_SECONDS
    own["shape"][0] += 1
    own["streams"]["code"][2] += 1
    refuse_decoding(signed(manifest, tensors), "bytes cannot hold")


def test_many_streams_are_counted_too():
    manifest, tensors = opened()
    count = 400_000
    own = entry(manifest)
    own["shape"] = [count]
    own["streams"] = {f"s{i}": [1, "huffman", count, 1] for i in range(99)}
    used = sum(
        stream[3]
        for name, other in manifest["tensors"].items()
        for stream in other["streams"].values()
        if name != "second.weight"
    )
    tensors["codes"] = torch.full((used + 99,), 2, dtype=torch.uint8)
    refuse_decoding(signed(manifest, tensors), "bytes cannot hold")


def test_a_probe_that_asks_for_much(tmp_path):
    class Passing(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs

    container.write(
        tmp_path / "a",
        {
            "builder": {"custom": "a:b"},
            "tensors": {},
            "dense": {},
            "probe": probe(shapes=[[2**40, 2**8]]),
        },
        {},
    )

    def work() -> None:
        with pytest.raises(ArtifactError, match="absurd"):
            verify(tmp_path / "a", logits=True, model=Passing())

    assert peak_growth(work) < MOST_MEMORY


@pytest.mark.parametrize("shapes", [[], [[3, 12], [3, 12]], [[3, 11]], [[0, 12]], [[]]])
def test_a_probe_that_does_not_fit_the_network(shapes):
    path = edited(lambda manifest: manifest.update(probe=probe(shapes=shapes)))
    with pytest.raises(ArtifactError, match=r"cannot run the probe|other logits"):
        verify_small(path)


def test_binary_is_what_it_seems():
    # The blow-up tests rely on streams of one byte.
    model = nn.Linear(1000, 1000, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    lay(model, "weight", Binary())
    path = FOLDER[0] / "binary"
    assert save(model, path) > 1000 * 1000 / WEIGHTS_PER_BYTE
