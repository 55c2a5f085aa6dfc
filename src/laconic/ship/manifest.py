"""The manifest of an artefact: what a file says of its content, checked before use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from laconic.errors import ArtifactError

__all__ = ["DTYPES", "Manifest", "Probe", "TensorEntry", "parse_manifest"]

DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
CODES = "codes"
# A file cannot hold more weights than this per byte: bounds what a hostile one makes us allocate.
WEIGHTS_PER_BYTE = 1024
SLACK = 1 << 20

Count = Annotated[int, Field(ge=0, le=1 << 48)]
Shape = Annotated[tuple[Count, ...], Field(max_length=8)]
Name = Annotated[str, Field(max_length=512)]
StreamEntry = tuple[Annotated[int, Field(ge=1, le=8)], Name, Count, Count]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class TensorEntry(_Strict):
    """One represented weight.

    Attributes:
        representation: what a recipe would write for it.
        shape, dtype: of the decoded weight.
        streams: name -> (bits, coder, count of symbols, bytes in the codes blob).
        tables: name -> shape of a float table in the blob of the weight's dtype.
        sha256: of the decoded weight's bytes.
    """

    representation: Any
    shape: Shape
    dtype: Literal["float16", "bfloat16", "float32", "float64"]
    streams: dict[Name, StreamEntry]
    tables: dict[Name, Shape]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Probe(_Strict):
    """Logits of seeded random inputs, as a hash, and where they were computed."""

    seed: int
    shapes: tuple[Shape, ...]
    logits: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    threads: int
    torch: str
    cpu: str


class Manifest(_Strict):
    """Everything a file says: the destination, not the journey.

    Attributes:
        builder: how the plain module is built again.
        tensors: represented weights by dotted name.
        dense: dtype -> name -> shape of everything stored as plain numbers.
        ties: name -> the name it shares its parameter with.
        inputs: label names and image normalisation, where the task has them.
        probe: how to check logits bit for bit.
        recipe: the recipe, where asked for.
        versions: of laconic and torch at writing.
    """

    builder: dict[str, Any]
    tensors: dict[Name, TensorEntry]
    dense: dict[str, dict[Name, Shape]]
    ties: dict[Name, Name] = {}
    inputs: dict[str, Any] = {}
    probe: Probe | None = None
    recipe: Any = None
    versions: dict[str, str] = {}


def parse_manifest(data: Mapping[str, Any], blobs: Mapping[str, Tensor], where: str) -> Manifest:
    """Return the validated manifest of a file, its counts checked against the blobs.

    Raises:
        ArtifactError: a field is missing, unknown or absurd, or counts do not add up.
    """
    try:
        manifest = Manifest.model_validate(data)
    except (ValidationError, RecursionError) as error:
        first = (
            error.errors()[0]
            if isinstance(error, ValidationError)
            else {"loc": (), "msg": "nested"}
        )
        place = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"{where}: manifest {place}: {first['msg']}") from None
    expected = _blob_sizes(manifest, where)
    found = {name: blob.numel() for name, blob in blobs.items()}
    if expected != found:
        raise ArtifactError(
            f"{where}: the manifest promises blobs {expected}, the file has {found}"
        )
    for name, blob in blobs.items():
        wanted = torch.uint8 if name == CODES else DTYPES[name]
        if blob.dtype != wanted or blob.dim() != 1:
            raise ArtifactError(f"{where}: blob '{name}' is {blob.dtype} {tuple(blob.shape)}")
    _bound(manifest, sum(blob.numel() * blob.element_size() for blob in blobs.values()), where)
    return manifest


def _blob_sizes(manifest: Manifest, where: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for dtype, shapes in manifest.dense.items():
        if dtype not in DTYPES:
            raise ArtifactError(f"{where}: unknown dtype '{dtype}'")
        sizes[dtype] = sum(math.prod(shape) for shape in shapes.values())
    for entry in manifest.tensors.values():
        for shape in entry.tables.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + math.prod(shape)
        for _, _, _, size in entry.streams.values():
            sizes[CODES] = sizes.get(CODES, 0) + size
    return {name: size for name, size in sizes.items() if size}


def _bound(manifest: Manifest, stored: int, where: str) -> None:
    total = 0
    for name, entry in manifest.tensors.items():
        numbers = math.prod(entry.shape)
        total += numbers
        position = entry.streams.get("position")
        for stream, (_, _, count, _) in entry.streams.items():
            dense = position is None or stream == "position"
            if count > numbers or (dense and count != numbers):
                raise ArtifactError(
                    f"{where}: '{name}' {list(entry.shape)} cannot have {count} {stream} symbols"
                )
    if total > stored * WEIGHTS_PER_BYTE + SLACK:
        raise ArtifactError(f"{where}: {stored} bytes cannot hold the {total} weights they promise")
