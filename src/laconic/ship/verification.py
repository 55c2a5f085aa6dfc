"""Verification: what can be checked of an artefact without the network it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from laconic.errors import ArtifactError
from laconic.ship import probe as probing
from laconic.ship.artifact import load
from laconic.ship.container import digest
from laconic.ship.content import Content, Piece, decode_piece, in_parallel, read_content
from laconic.weights.laid import copied

__all__ = ["Verification", "verify"]


@dataclass(frozen=True)
class Verification:
    """What was checked of an artefact.

    Attributes:
        size_bytes: of the file.
        tensors: how many decoded weights had the stored sha256.
        logits: True: identical bit for bit; None: not compared.
        note: why logits were not compared.

    >>> Verification(size_bytes=9_000, tensors=5, logits=True).logits
    True
    """

    size_bytes: int
    tensors: int
    logits: bool | None = None
    note: str = ""


def verify(
    path: str | Path, *, logits: bool = False, model: nn.Module | None = None
) -> Verification:
    """Check an artefact: checksum, hash of every decoded weight and, if asked, logits.

    Args:
        path: the file.
        logits: also run the stored probe; compared when threads, torch and CPU agree.
        model: the plain network, for a file whose builder is the user's own.

    Raises:
        ArtifactError: something does not match.

    >>> import tempfile
    >>> from laconic.models import digits_cnn
    >>> from laconic.ship import save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = save(digits_cnn(), Path(folder) / "model.safetensors")
    ...     verify(Path(folder) / "model.safetensors").size_bytes == size
    True
    """
    path = Path(path)
    content = read_content(path)
    checked = in_parallel(lambda piece: _check(path, piece), list(content.pieces()))
    same, note = _compare(content, model) if logits else (None, "not asked for")
    return Verification(path.stat().st_size, len(checked), same, note)


def _check(path: Path, piece: Piece) -> None:
    if digest(decode_piece(path, piece)) != piece.entry.sha256:
        raise ArtifactError(f"{path}: {piece.name!r} does not decode to the weight that was saved")


def _compare(content: Content, model: nn.Module | None) -> tuple[bool | None, str]:
    probe, here = content.manifest.probe, probing.conditions()
    if probe is None:
        return None, "the file holds no probe"
    other = [key for key in here if getattr(probe, key) != here[key]]
    if other:
        there = ", ".join(_condition(key, getattr(probe, key)) for key in other)
        now = ", ".join(_condition(key, here[key]) for key in other)
        return None, (
            f"those of the file come from {there}, not from {now} as here; compare under the same "
            "conditions"
        )
    plain = None if model is None else copied(model)
    probing.compare(probe, load(content.path, model=plain), str(content.path))
    return True, "logits are identical bit for bit"


def _condition(key: str, value: Any) -> str:
    if key == "threads":
        return "1 thread" if value == 1 else f"{value} threads"
    return f"torch {value}" if key == "torch" else str(value)
