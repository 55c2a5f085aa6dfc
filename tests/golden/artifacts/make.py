"""Write the golden artefact: every representation, coder and float type, masked and not, tied.

Run once per format version and commit what it writes: python tests/golden/artifacts/make.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from laconic.ship import coding, save
from laconic.ship.container import FORMAT, digest
from laconic.step import members
from laconic.weights import KMeans, Representation, Symmetric, Ternary, lay

FOLDER = Path(__file__).parent
ROWS, COLUMNS = 24, 20
FLOATS = ("float16", "bfloat16", "float64")
# Which coder writes a stream is told by its length: no other stream has one of these.
WIDTHS = {name: 31 + place for place, name in enumerate(coding.CODERS)}
SURVIVORS = {name: 101 + place for place, name in enumerate(coding.CODERS)}
FORCED = {ROWS * WIDTHS[name]: name for name in coding.CODERS}
FORCED |= {SURVIVORS[name]: name.removeprefix("gaps-") for name in coding.CODERS}

smallest = coding.encode


def parts() -> Iterator[tuple[str, nn.Module, Representation | None, int | None]]:
    """Yield every layer: its name, what it is, its representation and how many survive."""
    for name, kind in members(Representation, every=True).items():
        if kind.__module__.startswith("laconic."):
            yield f"{name}_all", nn.Linear(COLUMNS, ROWS), kind(), None
            yield f"{name}_few", nn.Linear(COLUMNS, ROWS), kind(), 60
    for name in coding.CODERS:
        layer = nn.Linear(WIDTHS[name], ROWS)
        yield f"coder_{name}", layer, Symmetric(3, granularity="row"), SURVIVORS[name]
    for name in FLOATS:
        layer = nn.Linear(COLUMNS, ROWS, dtype=getattr(torch, name))
        yield f"of_{name}", layer, Ternary("row"), None
    first, second = nn.Linear(COLUMNS, ROWS), nn.Linear(COLUMNS, ROWS)
    second.weight = first.weight
    yield "tied_again", second, None, None
    yield "tied", first, KMeans(3), 200
    yield "norm", nn.BatchNorm1d(COLUMNS), None, None


def laid() -> nn.ModuleDict:
    """Return the network with drawn numbers, its weights laid."""
    generator = torch.Generator().manual_seed(1)
    listed = list(parts())
    model = nn.ModuleDict({name: layer for name, layer, _, _ in listed})
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 3)
    for name, layer, representation, keep in listed:
        mask = None if keep is None else largest(layer.weight, keep)
        if representation is not None:
            lay(model, f"{name}.weight", representation, mask=mask)
    return model


def largest(weight: Tensor, count: int) -> Tensor:
    """Return a mask in which so many survive."""
    places = weight.detach().abs().flatten().topk(count).indices
    return torch.zeros(weight.numel()).index_fill(0, places, 1).bool().view_as(weight)


def encode(symbols: np.ndarray, bits: int) -> coding.Coded:
    """Code with the coder that the length tells, or with the best."""
    name = FORCED.get(symbols.size)
    return smallest(symbols, bits, coders=None if name is None else [name])


def main() -> None:
    """Write the file and, beside it, the shape and the hash of every tensor."""
    model = laid()
    with mock.patch.object(coding, "encode", encode):
        save(model, FOLDER / f"format{FORMAT}.safetensors")
    tensors = {
        f"{name}.{key}": getattr(layer, key)
        for name, layer in model.items()
        for key in [*nn.Linear(1, 1).state_dict(), *nn.BatchNorm1d(1).state_dict()]
        if getattr(layer, key, None) is not None
    }
    listing = {name: [list(tensor.shape), digest(tensor)] for name, tensor in tensors.items()}
    text = json.dumps(listing, indent=1, sort_keys=True)
    (FOLDER / f"format{FORMAT}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
