"""A small artefact to damage and forge, and what is demanded of everything that reads one."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laconic.errors import ArtifactError
from laconic.ship import container, inspect, load, save, verify
from laconic.structure.surgery import keep_, replace_, resize_, set_attributes_
from laconic.weights import Affine, Float, KMeans, Logarithmic, Ternary, lay

# What a small file may make this process allocate on top of itself.
MOST_MEMORY = 64e6
MOST_SECONDS = 5.0

Manifest = dict[str, Any]
Tensors = dict[str, Tensor]


class Small(nn.Module):
    """A few weights of several kinds, two of them the same, and blocks that are edited."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 10), nn.Linear(10, 12)
        self.norm = nn.BatchNorm1d(12)
        self.table, self.decoder = nn.Embedding(9, 8), nn.Linear(8, 9)
        self.decoder.weight = self.table.weight
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.norm(self.second(self.first(inputs)))


def small() -> Small:
    model = Small()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.copy_(torch.rand(tensor.shape, generator=generator).mul(8).sub(3))
    keep_(model, "blocks", [0, 2])
    replace_(model, "blocks.1", nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU()))
    resize_(model, "blocks.0.weight", model.blocks[0].weight[:, :1])
    set_attributes_(model, "blocks.0", {"in_features": 1})
    lay(model, "first.weight", KMeans(3), mask=model.first.weight > 1.5)
    lay(model, "second.weight", Ternary("row"))
    lay(model, "first.bias", Affine(4))
    lay(model, "second.bias", Float(), mask=model.second.bias > 0)
    lay(model, "table.weight", Logarithmic(4))
    return model


FOLDER: list[Path] = []


@functools.cache
def small_file() -> bytes:
    """Return the bytes of an artefact of 3 kB."""
    path = Path(os.fspath(FOLDER[0])) / "small.safetensors"
    save(small(), path, recipe={"note": [1, 2.5, "ü", None, True]})
    return path.read_bytes()


@functools.cache
def sound() -> dict[str, Tensor]:
    path = FOLDER[0] / "sound.safetensors"
    path.write_bytes(small_file())
    return load_small(path).state_dict()


@functools.cache
def empty() -> Small:
    with torch.device("meta"):
        return Small()


def written(data: bytes) -> Path:
    path = FOLDER[0] / "hostile.safetensors"
    path.write_bytes(data)
    return path


def opened() -> tuple[Manifest, Tensors]:
    manifest, tensors = container.read(written(small_file()))
    return copy.deepcopy(manifest), tensors


def forged(text: str, tensors: Tensors) -> Path:
    """Write a file around any text, its own header in order."""
    listing = {name: (container.NAMES[t.dtype], list(t.shape)) for name, t in tensors.items()}
    header = container._header(text, listing)
    body = b"".join(bytes(container.raw_bytes(tensors[n])) for n in container._order(listing))
    return written(len(header).to_bytes(8, "little") + header + body)


def signed(manifest: Manifest, tensors: Tensors) -> Path:
    """Write a file whose checksum is right, whatever it says."""
    body = {"checksum": container._checksum(manifest, tensors), "format": 1, "manifest": manifest}
    return forged(container._json(body), tensors)


def edited(edit: Callable[[Manifest], object]) -> Path:
    manifest, tensors = opened()
    edit(manifest)
    return signed(manifest, tensors)


def entry(manifest: Manifest, name: str = "second.weight") -> dict[str, Any]:
    return manifest["tensors"][name]


def probe(**fields: Any) -> dict[str, Any]:
    from laconic.ship.probe import conditions

    own = {"seed": 0, "shapes": [[2, 12]], "logits": "0" * 64}
    return own | conditions() | fields


def refuse(path: Path, words: str = ".") -> None:
    """Demand that every way to read a file refuses it."""
    for read in (load, load_small, verify, inspect, verify_small):
        with pytest.raises(ArtifactError, match=words) as caught:
            read(path)
        message = str(caught.value)
        assert str(path) in message
        assert len(message) < 1500


def refuse_decoding(path: Path, words: str) -> None:
    for read in (load_small, verify):
        with pytest.raises(ArtifactError, match=words):
            read(path)


def load_small(path: Path) -> nn.Module:
    return load(path, model=copy.deepcopy(empty()))


def verify_small(path: Path) -> Any:
    return verify(path, logits=True, model=copy.deepcopy(empty()))


def survive(path: Path) -> None:
    """Read a file in every way: it is read, or ArtifactError; nothing else is raised."""
    for read in (load, load_small, verify, inspect, verify_small):
        try:
            read(path)
        except ArtifactError:
            continue


def peak_growth(work: Callable[[], object]) -> float:
    """Return by how many bytes memory rises while something runs."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        pytest.skip("this system does not tell the peak of a process's memory")
    before = _memory("VmRSS")
    work()
    return _memory("VmHWM") - before


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


# Any value in any place.

DELETED = object()
ABSURD: list[Any] = [
    DELETED,
    *(None, True, False, -1, 0, 1, 2, 9, 255, 2**31, 2**40, 2**62, 2**64, 10**400, -(2**70)),
    *(
        0.0,
        1.0,
        1.5,
        1e300,
        "",
        "a",
        "1",
        "position",
        "../../etc/passwd",
        "__class__",
        "x" * 10_000,
    ),
    *("first.weight", "norm.weight", "norm.num_batches_tracked", "nowhere", "\x00", "ü\ud800"),
    *("float32", "int64", "codes", "rans", "huffman", "gaps-rans", "packed", "ternary", "kmeans"),
    *([], {}, [[]], [1], [2**40], [0, 2**60, 2**60], [1] * 70, {"a": 1}, {"": {}}, {"float": None}),
    *({"kmeans": {"bits": 9}}, {"symmetric": {"granularity": 2**70}}, [8, "packed", 5, 5]),
    *({"symmetric": 8}, {"affine": {"granularity": 7}}, {"kmeans": 8}, [1, "rans", 2**40, 3]),
]


def places(data: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value inside, the innermost too."""
    keys = data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for key in keys:
        yield (*place, key)
        yield from places(data[key], (*place, key))


def replaced(data: Any, place: tuple[Any, ...], value: Any) -> None:
    for key in place[:-1]:
        data = data[key]
    if value is DELETED:
        del data[place[-1]]
    else:
        data[place[-1]] = value
