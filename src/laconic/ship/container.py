"""The file format: safetensors with one JSON manifest and one checksum over everything."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from laconic.errors import ArtifactError

__all__ = ["FORMAT", "digest", "raw_bytes", "read", "replace_file", "write"]

FORMAT = 1
KEY = "laconic"


def write(path: Path, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Write manifest and tensors as one file and return its size in bytes.

    The file appears whole or not at all: temporary name, fsync, rename.

    Args:
        path: where to; an existing file is replaced.
        manifest: JSON-able.
        tensors: name -> tensor of any shape.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    body = _json({"format": FORMAT, "manifest": manifest, "checksum": _checksum(manifest, plain)})
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(plain, partial, metadata={KEY: body})
    replace_file(partial, path)
    return path.stat().st_size


def replace_file(partial: Path, path: Path) -> None:
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

    Raises:
        ArtifactError: no such file, truncated, altered, not laconic's or of another format.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not a readable safetensors file ({error})") from None
    if header is None:
        raise ArtifactError(f"{path}: a safetensors file, but not written by laconic")
    manifest, checksum = _parse(path, header)
    if checksum != _checksum(manifest, tensors):
        raise ArtifactError(
            f"{path}: the checksum does not match; the file is damaged, copy it again"
        )
    return manifest, tensors


def _parse(path: Path, header: str) -> tuple[dict[str, Any], str]:
    try:
        body = json.loads(header, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ArtifactError(f"{path}: the manifest is not JSON; the file is damaged") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        found = body.get("format") if isinstance(body, dict) else body
        raise ArtifactError(
            f"{path}: format {str(found)[:40]!r} is not readable by this laconic, which reads "
            f"{FORMAT}; install the version that wrote it"
        )
    manifest = body.get("manifest")
    if not isinstance(manifest, dict):
        raise ArtifactError(f"{path}: the manifest is missing; the file is damaged")
    return manifest, str(body.get("checksum"))


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} in a manifest")


def _json(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


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
