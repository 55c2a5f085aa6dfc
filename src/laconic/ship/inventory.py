"""The inventory of an artefact: where its bytes are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from laconic.errors import ArtifactError
from laconic.ship import coding
from laconic.ship.content import Piece, read_content
from laconic.weights.representation import POSITION

__all__ = ["Inventory", "inspect"]


@dataclass(frozen=True)
class Inventory:
    """Where the bytes of an artefact are.

    Attributes:
        size_bytes: of the file; the sum of the rest.
        code_bytes: entropy-coded or packed codes.
        index_bytes: positions of surviving weights.
        table_bytes: codebooks, scales and the coders' own tables.
        dense_bytes: numbers stored as they are, and the tokenizer.
        header_bytes: manifest and tensor listing.
        layers: name -> the first three for each represented weight.

    >>> found = Inventory(100, 40, 20, 10, 20, 10, layers={"fc.weight": (40, 20, 10)})
    >>> found.index_bytes / found.size_bytes
    0.2
    """

    size_bytes: int
    code_bytes: int
    index_bytes: int
    table_bytes: int
    dense_bytes: int
    header_bytes: int
    layers: dict[str, tuple[int, int, int]]


def inspect(path: str | Path) -> Inventory:
    """Return where the bytes of an artefact are.

    Raises:
        ArtifactError: the file is damaged.

    >>> import tempfile
    >>> from laconic.models import digits_cnn
    >>> from laconic.ship import save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save(digits_cnn(), Path(folder) / "model.safetensors")
    ...     inspect(Path(folder) / "model.safetensors").code_bytes
    0
    """
    path = Path(path)
    content = read_content(path)
    layers = {piece.name: _parts(path, piece) for piece in content.pieces()}
    code, index, table = (sum(parts[place] for parts in layers.values()) for place in range(3))
    stored = sum(blob.nbytes for blob in content.blobs.values())
    size = path.stat().st_size
    dense = stored - code - index - table
    return Inventory(size, code, index, table, dense, size - stored, layers)


def _parts(path: Path, piece: Piece) -> tuple[int, int, int]:
    """Return bytes of codes, of positions and of tables."""
    code = index = overhead = 0
    for key, data in piece.streams.items():
        own = _overhead(path, piece, key)
        overhead += own
        if key == POSITION:
            index += data.numel() - own
        else:
            code += data.numel() - own
    table = sum(each.nbytes for each in piece.tables.values())
    # A weight that is float has no codes but its values.
    if piece.streams.keys() <= {POSITION}:
        return code + table, index, overhead
    return code, index, overhead + table


def _overhead(path: Path, piece: Piece, key: str) -> int:
    bits, coder, count, _ = piece.entry.streams[key]
    try:
        return coding.overhead(piece.streams[key].numpy(), coder, bits=bits, count=count)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {piece.name!r}: {error}") from None
