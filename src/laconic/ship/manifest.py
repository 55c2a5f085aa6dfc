"""The manifest of an artefact: what a file says of its content, checked before use."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from laconic.errors import ArtifactError

__all__ = [
    "CODES",
    "DTYPES",
    "Edits",
    "Manifest",
    "Probe",
    "TensorEntry",
    "parse_manifest",
    "too_good",
]

DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
CODES = "codes"
# A file cannot hold more weights than this per byte: bounds what a hostile one makes us allocate.
WEIGHTS_PER_BYTE = 1024
# Any weight takes more than this in the manifest, so this much of it may cost nothing else.
ENTRY_BYTES = 128
FREE = ENTRY_BYTES * WEIGHTS_PER_BYTE // 4
LONGEST_MESSAGE = 300
# A file whose edits are longer asks for more layers than any network has.
MOST_EDITS, LONGEST_EDITS = 20_000, 1 << 22


def _printable(text: str) -> str:
    """Refuse what would be an order to the terminal that shows it."""
    if not text.isprintable():
        raise ValueError("holds characters that cannot be printed")
    return text


Count = Annotated[int, Field(ge=0, le=1 << 48)]
Name = Annotated[str, Field(max_length=512), AfterValidator(_printable)]
Version = Annotated[str, Field(max_length=64), AfterValidator(_printable)]
# JSON knows no tuples; what is inside them is as strict as everything else.
Shape = Annotated[tuple[Count, ...], Field(max_length=64, strict=False)]
Bits = Annotated[int, Field(ge=1, le=8)]
StreamEntry = Annotated[tuple[Bits, Name, Count, Count], Field(strict=False)]
Places = Annotated[tuple[Count, ...], Field(min_length=1, max_length=4096, strict=False)]
Size = Annotated[int, Field(ge=1, le=1 << 24)]
Sizes = Annotated[tuple[Size, ...], Field(min_length=1, max_length=8, strict=False)]
Attribute = Size | Sizes
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    # Strict: neither true nor 1.0 nor "1" is the integer 1.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


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
    sha256: Hash


class Probe(_Strict):
    """Logits of seeded random inputs, as a hash, and where they were computed.

    Attributes:
        seed: of torch's CPU generator.
        shapes: of the inputs, in the order in which they are drawn.
        names: by which the network takes them; none: it takes them in this order.
        below: each input is whole numbers below this, or floats where it is 0; none: all are.
        logits: the sha256 of what the network answers.
        threads, torch, cpu: what the answer depends on besides.
    """

    seed: Annotated[int, Field(ge=0, lt=1 << 63)]
    shapes: Annotated[tuple[Shape, ...], Field(strict=False)]
    names: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    below: Annotated[tuple[Count, ...], Field(strict=False)] = ()
    logits: Hash
    threads: int
    torch: str
    cpu: str


class Edits(_Strict):
    """What was cut off, replaced and resized since the builder made the network.

    Attributes:
        lists: path of a list -> places of what was kept, in the list as it was built.
        modules: path -> description of the layers that stand there instead.
        attributes: path -> name -> what the module remembers of its tensors' shapes.
        shapes: names of the tensors that have another shape.
    """

    lists: Annotated[dict[Name, Places], Field(max_length=MOST_EDITS)] = {}
    modules: Annotated[dict[Name, dict[Name, Any]], Field(max_length=MOST_EDITS)] = {}
    attributes: Annotated[dict[Name, dict[Name, Attribute]], Field(max_length=MOST_EDITS)] = {}
    shapes: Annotated[tuple[Name, ...], Field(max_length=MOST_EDITS, strict=False)] = ()

    def to_data(self) -> dict[str, Any]:
        """Return them as surgery records them."""
        return self.model_dump(mode="json", exclude_defaults=True)


class Manifest(_Strict):
    """Everything a file says: the destination, not the journey.

    Attributes:
        builder: how the plain module is built again.
        edits: what is changed of it then, before it is filled.
        activations: path -> place -> how the numbers that flow there are rounded.
        tensors: represented weights by dotted name.
        dense: dtype -> name -> shape of everything stored as plain numbers.
        ties: name -> the name it shares its parameter with.
        inputs: label names and image normalisation, where the task has them.
        tokenizer: bits (8), coder, count and bytes in the codes blob, at its end, of the
            tokenizer.json that turned texts into the inputs.
        probe: how to check logits bit for bit.
        recipe: the recipe, where asked for.
        versions: of laconic and torch at writing.
    """

    builder: dict[str, Any]
    tensors: dict[Name, TensorEntry]
    dense: dict[str, dict[Name, Shape]]
    edits: Edits | None = None
    activations: Annotated[dict[Name, dict[Name, Any]], Field(max_length=MOST_EDITS)] = {}
    ties: dict[Name, Name] = {}
    inputs: dict[str, Any] = {}
    tokenizer: StreamEntry | None = None
    probe: Probe | None = None
    recipe: Any = None
    versions: dict[Name, Version] = {}

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of every tensor of the state dict, ties included."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, entry in self.tensors.items():
            found[name] = (entry.dtype, entry.shape)
        for dtype, shapes in self.dense.items():
            found |= {name: (dtype, shape) for name, shape in shapes.items()}
        return found | {name: found[first] for name, first in self.ties.items()}


def parse_manifest(data: Mapping[str, Any], blobs: Mapping[str, Tensor], where: str) -> Manifest:
    """Return the validated manifest of a file, its counts checked against the blobs.

    Raises:
        ArtifactError: a field is missing, unknown or absurd, or counts do not add up.
    """
    if "builder" not in data:
        raise ArtifactError(f"{where}: holds no network to load; a checkpoint is no artefact")
    if len(json.dumps(data.get("edits"))) > LONGEST_EDITS:
        raise ArtifactError(f"{where}: the edits are longer than {LONGEST_EDITS} letters")
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        message = f"manifest {place!r}: {first['msg']}"[:LONGEST_MESSAGE]
        raise ArtifactError(f"{where}: {message}") from None
    _check_names(manifest, where)
    expected = _blob_sizes(manifest, where)
    found = {name: blob.numel() for name, blob in blobs.items()}
    if expected != found:
        raise ArtifactError(
            f"{where}: the manifest promises numbers {_shown(expected)}, the file has "
            f"{_shown(found)}"
        )
    for name, blob in blobs.items():
        wanted = torch.uint8 if name == CODES else DTYPES[name]
        if blob.dtype != wanted or blob.dim() != 1:
            raise ArtifactError(f"{where}: blob '{name}' is {blob.dtype} {tuple(blob.shape)}")
    _bound(manifest, sum(blob.nbytes for blob in blobs.values()), where)
    return manifest


def too_good(count: int, size: int) -> bool:
    """Return whether so many symbols in so few bytes are more than a file may promise."""
    return count > FREE + size * WEIGHTS_PER_BYTE


def _shown(sizes: Mapping[str, int]) -> str:
    return repr(sizes)[:LONGEST_MESSAGE]


def _check_names(manifest: Manifest, where: str) -> None:
    for dtype in manifest.dense:
        if dtype not in DTYPES:
            raise ArtifactError(f"{where}: {dtype[:LONGEST_MESSAGE]!r} is no dtype of a file")
    names = Counter([*manifest.tensors, *itertools.chain(*manifest.dense.values()), *manifest.ties])
    name, count = next(iter(names.most_common(1)), ("", 0))
    if count > 1:
        raise ArtifactError(f"{where}: {name!r} is there {count} times")
    resized = () if manifest.edits is None else manifest.edits.shapes
    for name in resized:
        if name not in names:
            raise ArtifactError(f"{where}: {name!r} is resized, but there is no such tensor")
    for name, first in manifest.ties.items():
        if first not in names or first in manifest.ties:
            raise ArtifactError(f"{where}: {name!r} is tied to {first!r}, which is not stored")


def _blob_sizes(manifest: Manifest, where: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for dtype, shapes in manifest.dense.items():
        sizes[dtype] = sum(math.prod(shape) for shape in shapes.values())
    for entry in manifest.tensors.values():
        for shape in entry.tables.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + math.prod(shape)
        for _, _, _, size in entry.streams.values():
            sizes[CODES] = sizes.get(CODES, 0) + size
    if manifest.tokenizer is not None:
        sizes[CODES] = sizes.get(CODES, 0) + manifest.tokenizer[3]
    return {name: size for name, size in sizes.items() if size}


def _bound(manifest: Manifest, stored: int, where: str) -> None:
    total = 0 if manifest.tokenizer is None else manifest.tokenizer[2]
    for name, entry in manifest.tensors.items():
        numbers = math.prod(entry.shape)
        for stream, (_, _, count, _) in entry.streams.items():
            # That it is as many as the representation takes is checked before it is decoded.
            if count > numbers:
                raise ArtifactError(
                    f"{where}: {name!r} {list(entry.shape)} cannot have {count} {stream!r} symbols"
                )
        total += max(numbers, sum(count for _, _, count, _ in entry.streams.values()))
    stored += ENTRY_BYTES * len(manifest.tensors)
    if total > stored * WEIGHTS_PER_BYTE:
        raise ArtifactError(f"{where}: {stored} bytes cannot hold the {total} weights they promise")
