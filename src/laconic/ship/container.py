"""The file format: safetensors with one JSON manifest and one checksum over everything."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from laconic.errors import ArtifactError
from laconic.names import MANIFEST

__all__ = ["FORMAT", "digest", "raw_bytes", "read", "write", "write_file"]

FORMAT = 1
METADATA = "__metadata__"
# The order in which safetensors lays tensors out: each then starts at a multiple of its size.
DTYPES: dict[str, torch.dtype] = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Limits of safetensors itself, and of what a recipe inside a manifest may nest.
LONGEST_HEADER = 100_000_000
DEEPEST = 100
MOST_DIMENSIONS, LARGEST = 64, 1 << 60
SHOWN = 200

Listing = dict[str, tuple[str, list[int]]]


def write(path: Path, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Write manifest and tensors as one file and return its size in bytes.

    The file appears whole or not at all: temporary name, fsync, rename. The same content
    gives the same bytes, whatever version of safetensors is installed.

    Args:
        path: where to; an existing file is replaced.
        manifest: JSON-able.
        tensors: name -> tensor of any shape.

    Raises:
        ArtifactError: the manifest is not JSON-able, or a tensor has a dtype no file holds.
        OSError: the system refuses to write.
    """
    plain = {name: _storable(path, name, tensor) for name, tensor in tensors.items()}
    try:
        # As it will be read: JSON has other keys than Python.
        content = json.loads(_json(manifest))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: the manifest cannot be written as JSON ({error})") from None
    if _depth(content) > DEEPEST:
        raise ArtifactError(f"{path}: the manifest nests deeper than {DEEPEST} levels; flatten it")
    body = {"format": FORMAT, "manifest": content, "checksum": _checksum(content, plain)}
    listing = {name: (NAMES[t.dtype], list(t.shape)) for name, t in plain.items()}
    header = _header(_json(body), listing)
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name in _order(listing):
                file.write(raw_bytes(plain[name]))
        _replace(partial, path)
    except OSError:
        # A full disk keeps nothing useless; that the rest cannot be removed is no news then.
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    return path.stat().st_size


def _storable(path: Path, name: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ArtifactError(f"{path}: '{name}' is {type(tensor).__name__}, not a tensor")
    if tensor.dtype not in NAMES or tensor.layout != torch.strided or tensor.is_meta:
        kind = f"{tensor.layout} {tensor.dtype} on {tensor.device}"
        raise ArtifactError(f"{path}: '{name}' is {kind}; a file holds {', '.join(NAMES.values())}")
    return tensor.detach().cpu().contiguous()


def write_file(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        _replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _replace(partial: Path, path: Path) -> None:
    """Move a finished temporary file to its name so that a crash leaves one or the other."""
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return manifest and tensors of a file after checking its checksum.

    Every byte counts: a header that says the same in other words is refused too. Tensors take no
    more memory than the file has bytes; the header, as Python's objects, up to 25 times its own.

    Args:
        path: of the file.

    Raises:
        ArtifactError: no such file, truncated, altered, not laconic's or of another format.
    """
    try:
        if path.is_dir():
            raise ArtifactError(f"{path}: a folder; name the file in it")
        if not path.is_file():
            raise ArtifactError(f"{path}: no such file")
        with path.open("rb") as file:
            text, listing = _read_header(path, file)
            body = _body(path, text)
            tensors = {name: _read_tensor(path, file, *listing[name]) for name in _order(listing)}
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error})") from None
    manifest: dict[str, Any] = body["manifest"]
    if body["checksum"] != _checksum(manifest, tensors):
        raise _damaged(path, "the checksum does not match")
    return manifest, tensors


def _damaged(path: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"{path}: {reason}; the file is damaged, get it again")


def _read_header(path: Path, file: BufferedReader) -> tuple[str, Listing]:
    """Return laconic's text and what tensors follow, once sizes add up to the file's."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, LONGEST_HEADER):
        raise ArtifactError(f"{path}: {size} bytes that are no safetensors file; get it again")
    raw = file.read(length)
    header = _loads(path, "header", raw)
    metadata = header.pop(METADATA, {})
    text = metadata.get(MANIFEST) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ArtifactError(f"{path}: a safetensors file, but not written by laconic")
    if not all(isinstance(entry, dict) for entry in header.values()):
        raise _damaged(path, "the header is no listing of tensors")
    listing = {name: _entry(path, name, entry) for name, entry in header.items()}
    if raw != _header(text, listing):
        raise _damaged(path, "the header is not as laconic writes it")
    expected = 8 + length + sum(_size(*entry) for entry in listing.values())
    if size != expected:
        raise _damaged(path, f"{size} bytes where the header promises {expected}")
    return text, listing


def _entry(path: Path, name: str, entry: dict[str, Any]) -> tuple[str, list[int]]:
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in DTYPES or not _is_shape(shape):
        raise _damaged(path, f"the tensor {name[:SHOWN]!r} has no dtype or shape that is known")
    return dtype, cast("list[int]", shape)


def _is_shape(shape: Any) -> bool:
    # An exact type: a JSON true is not a number here. Zeros must not hide an overflow.
    whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    return whole and len(shape) <= MOST_DIMENSIONS and math.prod(filter(None, shape)) < LARGEST


def _read_tensor(path: Path, file: BufferedReader, dtype: str, shape: list[int]) -> Tensor:
    data = torch.empty(_size(dtype, shape), dtype=torch.uint8, device="cpu")
    if file.readinto(data.numpy().data) != data.numel():
        raise _damaged(path, "it ends too early")
    if dtype == "BOOL" and data.numel() and int(data.max()) > 1:
        raise _damaged(path, "a truth value is neither 0 nor 1")
    return data.view(DTYPES[dtype]).reshape(shape)


def _body(path: Path, text: str) -> dict[str, Any]:
    """Return format, manifest and checksum, each of the right kind."""
    body = _loads(path, "manifest", text)
    found = body.get("format")
    if type(found) is not int or found != FORMAT:
        raise ArtifactError(
            f"{path}: format {str(found)[:40]!r} is not readable by this laconic, which reads "
            f"{FORMAT}; install the version that wrote it"
        )
    if _json(body) != text:
        raise _damaged(path, "the manifest is not as laconic writes it")
    if body.keys() != {"format", "manifest", "checksum"} or not isinstance(body["manifest"], dict):
        raise _damaged(path, "the manifest is missing")
    return body


def _loads(path: Path, what: str, text: str | bytes) -> dict[str, Any]:
    try:
        data = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"the {what} is no JSON ({str(error)[:SHOWN]})") from None
    if not isinstance(data, dict) or _depth(data) > DEEPEST + 1:
        raise _damaged(path, f"the {what} is no JSON object of at most {DEEPEST} levels")
    return data


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:SHOWN]} is no number of JSON")
    return number


def _depth(data: Any) -> int:
    """Return how many levels of lists and objects are nested, without recursion."""
    level, depth = [data], 0
    while level := [item for parent in level for item in _children(parent)]:
        depth += 1
    return depth


def _children(data: Any) -> Iterator[Any]:
    if isinstance(data, dict):
        yield from data.values()
    elif isinstance(data, list):
        yield from data


def _json(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _order(listing: Listing) -> list[str]:
    places = {dtype: place for place, dtype in enumerate(DTYPES)}
    return sorted(listing, key=lambda name: (places[listing[name][0]], name))


def _size(dtype: str, shape: list[int]) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


def _header(text: str, listing: Listing) -> bytes:
    """Return the header of safetensors, filled up with spaces to a multiple of 8 bytes."""
    entries: dict[str, Any] = {METADATA: {MANIFEST: text}}
    start = 0
    for name in _order(listing):
        dtype, shape = listing[name]
        end = start + _size(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
    encoded = header.encode(errors="surrogatepass")
    return encoded + b" " * (-len(encoded) % 8)


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, whatever its dtype."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def digest(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's bytes in hexadecimal."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def _checksum(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    running = hashlib.sha256(_json(manifest).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        running.update(_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        running.update(raw_bytes(tensor))
    return running.hexdigest()
