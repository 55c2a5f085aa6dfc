"""The content of an artefact: its pieces in the order of the format, and their decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from laconic.errors import ArtifactError, LaconicError
from laconic.ship import coding
from laconic.ship.container import read
from laconic.ship.manifest import CODES, DTYPES, Manifest, TensorEntry, parse_manifest
from laconic.weights.representation import POSITION, Codes, Representation, Stream

__all__ = ["Content", "Piece", "decode_piece", "in_parallel", "inputs_of", "read_content"]

LONGEST_MESSAGE = 300
# What decoding raises when codes and tables do not fit each other.
MISFIT = (LaconicError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Piece:
    """One represented weight as it is stored.

    Attributes:
        name: of the weight, dotted.
        entry: what the manifest says of it.
        streams: name -> coded bytes, uint8 [bytes].
        tables: name -> table, of the weight's dtype.
    """

    name: str
    entry: TensorEntry
    streams: dict[str, Tensor]
    tables: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Content:
    """An artefact that was read and checked, nothing of it decoded.

    Attributes:
        path: of the file.
        manifest: what it says.
        blobs: name -> numbers of one dtype, or coded bytes, end to end.
    """

    path: Path
    manifest: Manifest
    blobs: dict[str, Tensor]

    def pieces(self) -> Iterator[Piece]:
        """Yield every represented weight, by name."""
        start = dict.fromkeys(self.blobs, 0)

        def take(blob: str, size: int) -> Tensor:
            if not size:
                return torch.zeros(0, dtype=DTYPES.get(blob, torch.uint8), device="cpu")
            start[blob] += size
            return self.blobs[blob][start[blob] - size : start[blob]]

        for name, entry in sorted(self.manifest.tensors.items()):
            streams = {key: take(CODES, entry.streams[key][3]) for key in sorted(entry.streams)}
            tables = {
                key: take(entry.dtype, math.prod(shape)).reshape(shape).clone()
                for key, shape in sorted(entry.tables.items())
            }
            yield Piece(name, entry, streams, tables)

    def tokenizer(self) -> Tensor | None:
        """Return the coded tokenizer.json, uint8 [bytes], where there is one."""
        entry = self.manifest.tokenizer
        if entry is None:
            return None
        blob = self.blobs.get(CODES, torch.zeros(0, dtype=torch.uint8, device="cpu"))
        return blob[blob.numel() - entry[3] :]

    def dense(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every plain tensor by name, with storage of its own."""
        for dtype, shapes in sorted(self.manifest.dense.items()):
            # Tables of represented weights come before the plain numbers of a dtype.
            blob = self.blobs.get(dtype, torch.zeros(0, dtype=DTYPES[dtype], device="cpu"))
            start = blob.numel() - sum(math.prod(shape) for shape in shapes.values())
            for name, shape in sorted(shapes.items()):
                end = start + math.prod(shape)
                yield name, blob[start:end].reshape(shape).clone()
                start = end


def in_parallel(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return the result for every item, computed in as many threads as torch uses.

    Each of them computes on one core: threads that share their cores wait for one another.

    Args:
        work: may not depend on how many threads add up a sum.
        items: what to work on.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, items))
    finally:
        # What a new thread starts with is set for the whole process.
        torch.set_num_threads(threads)


def read_content(path: Path) -> Content:
    """Return the content of an artefact after checking checksum, fields and counts.

    Raises:
        ArtifactError: the file is damaged or hostile.
    """
    data, blobs = read(path)
    return Content(path, parse_manifest(data, blobs, str(path)), blobs)


def inputs_of(path: str | Path) -> dict[str, Any]:
    """Return what an artefact says of the network's inputs and outputs.

    Returns:
        ``classes``: names of the labels; ``image``: mean and standard deviation per channel;
        ``tokenizer``: the bytes of a tokenizer.json, for ``laconic.tasks.tokenizer_of``. Only
        what the task had is there.

    Raises:
        ArtifactError: the file is damaged or hostile.

    >>> import tempfile
    >>> from laconic.models import digits_cnn
    >>> from laconic.ship import save
    >>> from laconic.tasks import digits
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save(digits_cnn(), Path(folder) / "model.safetensors", task=digits())
    ...     inputs_of(Path(folder) / "model.safetensors")["classes"][:3]
    ['0', '1', '2']
    """
    content = read_content(Path(path))
    found, coded = dict(content.manifest.inputs), content.tokenizer()
    if content.manifest.tokenizer is not None and coded is not None:
        bits, coder, count, _ = content.manifest.tokenizer
        try:
            symbols = coding.decode(coded.numpy(), coder, bits=bits, count=count)
        except MISFIT as error:
            reason = str(error)[:LONGEST_MESSAGE]
            raise ArtifactError(f"{path}: the tokenizer cannot be decoded: {reason}") from None
        found["tokenizer"] = symbols.tobytes()
    return found


def decode_piece(path: Path, piece: Piece) -> Tensor:
    """Return the weight of a piece.

    Args:
        path: of the file, for messages.
        piece: what is stored.

    Raises:
        ArtifactError: what is stored stands for no such weight.
    """
    try:
        representation = Representation.understood(piece.entry.representation)
        return _decode(representation, piece)
    except MISFIT as error:
        reason = str(error)[:LONGEST_MESSAGE]
        raise ArtifactError(f"{path}: {piece.name!r} cannot be decoded: {reason}") from None


def _decode(representation: Representation, piece: Piece) -> Tensor:
    entry, shape = piece.entry, torch.Size(piece.entry.shape)
    thinned = _thinned(representation, entry)
    streams = {}
    for key, (bits, coder, count, _) in entry.streams.items():
        layout = representation.stream_shape(key, shape)
        if key not in thinned and count != layout.numel():
            raise ArtifactError(f"{list(shape)} cannot have {count} {key!r} symbols")
        data = piece.streams[key].numpy()
        symbols = torch.from_numpy(coding.decode(data, coder, bits=bits, count=count))
        streams[key] = Stream(symbols if key in thinned else symbols.reshape(layout), bits)
    if POSITION in streams:
        _check_survivors(streams, thinned, piece.tables)
    decoded = representation.decode(Codes(streams, piece.tables, shape, DTYPES[entry.dtype]))
    if decoded.shape != shape or decoded.dtype != DTYPES[entry.dtype]:
        raise ArtifactError(f"it decodes to {decoded.dtype} {tuple(decoded.shape)}")
    if decoded.numel() and not all(bool(end.isfinite()) for end in decoded.aminmax()):
        raise ArtifactError("it holds NaN or infinity")
    return decoded


def _thinned(representation: Representation, entry: TensorEntry) -> set[str]:
    """Return the streams that hold survivors only: of a masked weight, those of its shape."""
    if POSITION not in entry.streams:
        return set()
    shape = torch.Size(entry.shape)
    whole = {key for key in entry.streams if representation.stream_shape(key, shape) != shape}
    return entry.streams.keys() - whole - {POSITION}


def _check_survivors(
    streams: Mapping[str, Stream], thinned: set[str], tables: Mapping[str, Tensor]
) -> None:
    survivors = int(streams[POSITION].tensor.count_nonzero())
    # A weight that is float has no streams but a table of its values.
    lists = {key: streams[key].tensor for key in thinned} if len(streams) > 1 else tables
    for key, values in lists.items():
        if values.shape != (survivors,):
            raise ArtifactError(f"{key!r} is {tuple(values.shape)} for {survivors} survivors")
