"""Lossless coding of small integers: all coders weighed by size, the smallest written.

Layout of the streams; numbers are little-endian, [n] is a number of bytes:

    packed    codes end to end, the lowest bit first
    gaps-X    index bits [1], number of gaps [8], the gaps as X
    huffman   alphabet, code length of each block (4 bits each), lanes [4],
              bits of each lane [2 each], codes of lane 0, 1, ..., highest bit first
    rans      alphabet, kind of table [1], weights ([2] per value or [1] per block),
              words [4 each] without the zero bytes at their end
    alphabet  one bit per possible symbol, set if it occurs; symbols in a block [1].
              A value that is alone ends the stream here, before the byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

import laconic.ship._huffman as _huffman
import laconic.ship._rans as _rans
from laconic.errors import ArtifactError, nearest
from laconic.ship._blocks import Blocks, histogram, largest_group, parse
from laconic.ship._huffman import canonical_codes, code_lengths
from laconic.ship._packing import (
    checked_data,
    checked_symbols,
    damaged,
    pack,
    packed_bytes,
    unpack,
)

__all__ = [
    "CODERS",
    "Coded",
    "canonical_codes",
    "code_lengths",
    "decode",
    "encode",
    "entropy",
    "from_gaps",
    "gaps",
    "overhead",
    "pack",
    "unpack",
]

# Fastest to decode first: of all within 0.2 % of the smallest, the first is taken.
CODERS = ("packed", "gaps-packed", "huffman", "gaps-huffman", "rans", "gaps-rans")
_NEARLY_SMALLEST = 1.002
_ENTROPY_CODERS = {"huffman": _huffman, "rans": _rans}
_GAPS = "gaps-"
# Index bits in one byte, number of gap codes in eight.
_GAPS_HEADER = 9
# Denser masks have nothing to win from gaps: estimating them would only take time.
_SPARSE = 1 / 4
_CHUNK = 1 << 18


@dataclass(frozen=True, eq=False)
class Coded:
    """Codes as bytes.

    Attributes:
        coder: one of `CODERS`; with bits and count it determines the decoder.
        data: uint8 [bytes], all tables and headers inside.

    >>> encode(np.zeros(1000, dtype=np.uint8), 2).data.size
    1
    """

    coder: str
    data: np.ndarray


def encode(symbols: np.ndarray, bits: int, *, coders: Sequence[str] | None = None) -> Coded:
    """Code symbols with whichever coder needs the fewest bytes.

    Sizes, tables and headers included, follow from the counts alone, so only the
    coder that is taken writes. Of all within 0.2 % of the smallest it is the first,
    that is the fastest to decode, in `CODERS`.

    Args:
        symbols: uint8 [count], each below 2**bits.
        bits: width of one symbol, 1 to 8.
        coders: names to choose from; None: all. Gaps are for one bit.

    Raises:
        ArtifactError: if a symbol does not fit its bits or a name is unknown.

    >>> coded = encode(np.array([0, 2, 1, 1] * 999, dtype=np.uint8), 2)
    >>> decode(coded.data, coded.coder, bits=2, count=3996)[:4].tolist()
    [0, 2, 1, 1]
    """
    symbols = checked_symbols(symbols, bits)
    names = _checked_names(CODERS if coders is None else coders)
    if not symbols.size:
        return Coded(min(names, key=CODERS.index), symbols.copy())
    plans = list(_all_plans(symbols, bits, names))
    if not plans:
        raise ArtifactError(f"{', '.join(names)}: none codes {bits} bits; name others too")
    enough = _NEARLY_SMALLEST * min(plan.size_bytes for plan in plans)
    fitting = [plan for plan in plans if plan.size_bytes <= enough]
    taken = min(fitting, key=lambda plan: (CODERS.index(plan.coder), -plan.group))
    return Coded(taken.coder, taken.write())


def decode(coded_data: np.ndarray, coder: str, *, bits: int, count: int) -> np.ndarray:
    """Return the symbols that were coded.

    Damaged bytes either raise or decode to other symbols (a checksum's business);
    memory stays within a few times count + bytes.

    Args:
        coded_data: uint8 [bytes].
        coder: one of `CODERS`.
        bits: width of one symbol, 1 to 8.
        count: number of symbols.

    Returns:
        uint8 [count], each below 2**bits.

    Raises:
        ArtifactError: if the bytes are no such stream.

    >>> decode(np.array([209, 14], dtype=np.uint8), "packed", bits=3, count=4).tolist()
    [1, 2, 3, 7]
    """
    data = checked_data(coded_data, bits, count)
    _checked_names([coder])
    if not count:
        if data.size:
            raise damaged(f"{data.size} bytes where there are no symbols")
        return data.copy()
    if coder == "packed":
        return unpack(data, bits, count)
    if not coder.startswith(_GAPS):
        return _read(data, coder, bits, count)
    if bits != 1:
        raise damaged(f"coder '{coder}' for {bits} bits; gaps code one bit")
    index_bits, codes, body = _gaps_parts(data, count)
    inner = decode(body, coder.removeprefix(_GAPS), bits=index_bits, count=codes)
    return _mask_from_gaps(inner, index_bits, count)


def overhead(coded_data: np.ndarray, coder: str, *, bits: int, count: int) -> int:
    """Return how many bytes of a coded stream are tables and headers.

    Args:
        coded_data: uint8 [bytes].
        coder: one of `CODERS`.
        bits: width of one symbol, 1 to 8.
        count: number of symbols.

    Raises:
        ArtifactError: if the bytes are no such stream.

    >>> overhead(pack(np.ones(9, dtype=np.uint8), 3), "packed", bits=3, count=9)
    0
    """
    data = checked_data(coded_data, bits, count)
    _checked_names([coder])
    if coder == "packed" or not count:
        return 0
    if coder.startswith(_GAPS):
        index_bits, codes, body = _gaps_parts(data, count)
        inner = coder.removeprefix(_GAPS)
        return _GAPS_HEADER + overhead(body, inner, bits=index_bits, count=codes)
    blocks, body = parse(data, bits)
    if blocks.values.size == 1:
        return data.size
    inside = _ENTROPY_CODERS[coder].table_bytes(body, blocks.count(count), blocks)
    return data.size - body.size + inside


def entropy(counts: np.ndarray) -> float:
    """Return the zero-order entropy, H = -sum(p * log2(p)), in bits per symbol.

    Args:
        counts: [alphabet], how often each symbol occurs.

    >>> round(100 * entropy(np.array([45, 13, 12, 16, 9, 5])), 3)
    221.988
    """
    counts = np.asarray(counts)
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def gaps(positions: np.ndarray, bits: int) -> np.ndarray:
    """Return ascending positions as differences of a fixed number of index bits.

    The relative index of Deep Compression (Han et al. 2016): a difference counts from
    the position before, the first from -1. One above 2**bits - 1 needs fillers: a
    filler, the code 0, goes 2**bits - 1 positions on and marks nothing there. The
    paper's filler is an entry whose weight is zero; here no weight is stored for it.

    Args:
        positions: int [positions], ascending and distinct, from 0.
        bits: width of one difference, 1 to 8.

    Returns:
        uint8 [positions + fillers], each below 2**bits.

    Raises:
        ArtifactError: if positions do not ascend.

    >>> gaps(np.array([0, 3, 11, 14]), 3).tolist()
    [1, 3, 0, 1, 3]
    """
    steps = _steps(positions)
    fillers, rest = np.divmod(steps, 2**bits - 1)
    codes = np.zeros(positions.size + int(fillers.sum()), dtype=np.uint8)
    codes[np.cumsum(fillers + 1) - 1] = rest + 1
    return codes


def from_gaps(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return the positions that `gaps` wrote as differences.

    Args:
        codes: uint8 [codes], each below 2**bits.
        bits: width of one difference, 1 to 8.

    Returns:
        int64 [positions], ascending.

    >>> from_gaps(np.array([1, 3, 0, 1, 3], dtype=np.uint8), 3).tolist()
    [0, 3, 11, 14]
    """
    steps = np.where(codes == 0, np.uint8(2**bits - 1), codes)
    return np.cumsum(steps, dtype=np.int64)[codes != 0] - 1


@dataclass(frozen=True, eq=False)
class _Plan:
    """A way to code one stream: what it takes, and how to write it."""

    coder: str
    group: int
    size_bytes: int
    write: Callable[[], np.ndarray]


def _all_plans(symbols: np.ndarray, bits: int, names: Sequence[str]) -> Iterator[_Plan]:
    direct = [name for name in names if not name.startswith(_GAPS)]
    yield from _plans(symbols, bits, direct)
    by_gaps = [name.removeprefix(_GAPS) for name in names if name.startswith(_GAPS)]
    sparse = bits == 1 and np.count_nonzero(symbols) <= _SPARSE * symbols.size
    if not by_gaps or bits != 1 or (direct and not sparse):
        return
    positions = np.flatnonzero(symbols)
    index_bits = _best_index_bits(positions)
    codes = gaps(positions, index_bits)
    header = np.zeros(_GAPS_HEADER, dtype=np.uint8)
    header[0] = index_bits
    header[1:] = np.array([codes.size], dtype="<u8").view(np.uint8)
    for plan in _plans(codes, index_bits, by_gaps):
        write = partial(_after, header, plan.write)
        yield _Plan(_GAPS + plan.coder, plan.group, _GAPS_HEADER + plan.size_bytes, write)


def _plans(symbols: np.ndarray, bits: int, names: Sequence[str]) -> Iterator[_Plan]:
    """Yield the plans of the coders that code symbols as they are."""
    if not symbols.size:
        yield from (_Plan(name, 1, 0, symbols.copy) for name in names)
        return
    if "packed" in names:
        yield _Plan("packed", 1, packed_bytes(symbols.size, bits), partial(pack, symbols, bits))
    coders = [name for name in names if name in _ENTROPY_CODERS]
    if not coders:
        return
    values = np.flatnonzero(histogram(symbols, 2**bits)).astype(np.uint8)
    if values.size == 1:
        header = Blocks(values, 1).header(bits)
        yield from (_Plan(name, 1, header.size, header.copy) for name in coders)
        return
    for group in sorted({1, largest_group(values.size)}):
        blocks = Blocks(values, group)
        joined = blocks.join(symbols)
        counts = histogram(joined, blocks.size)
        header = blocks.header(bits)
        for name in coders:
            size = _ENTROPY_CODERS[name].size(counts, blocks)
            write = partial(_ENTROPY_CODERS[name].write, joined, counts, blocks)
            if size is not None:
                yield _Plan(name, group, header.size + size, partial(_after, header, write))


def _after(header: np.ndarray, write: Callable[[], np.ndarray]) -> np.ndarray:
    return np.concatenate([header, write()])


def _read(data: np.ndarray, coder: str, bits: int, count: int) -> np.ndarray:
    """Decode a stream of an entropy coder."""
    blocks, body = parse(data, bits)
    if blocks.values.size > 1:
        joined = _ENTROPY_CODERS[coder].read(body, blocks.count(count), blocks)
        return blocks.split(joined, count)
    if body.size:
        raise damaged(f"{body.size} bytes too many after a single value")
    return np.full(count, blocks.values[0])


def _best_index_bits(positions: np.ndarray) -> int:
    """Return the width for which the packed differences of positions are smallest."""
    steps = _steps(positions)
    sizes = {bits: bits * int((steps // (2**bits - 1) + 1).sum()) for bits in range(2, 9)}
    return min(sizes, key=lambda bits: sizes[bits])


def _steps(positions: np.ndarray) -> np.ndarray:
    """Return how many places lie unmarked before each position: int64 [positions]."""
    steps = np.diff(positions.astype(np.int64, copy=False), prepend=-1) - 1
    if steps.size and steps.min() < 0:
        place = int(steps.argmin())
        raise ArtifactError(f"position {positions[place]} does not ascend; sort the positions")
    return steps


def _gaps_parts(data: np.ndarray, count: int) -> tuple[int, int, np.ndarray]:
    """Return the index bits, the number of codes, and the rest."""
    if data.size < _GAPS_HEADER:
        raise damaged(f"{data.size} bytes are too few for a header of gaps")
    index_bits = int(data[0])
    codes = int.from_bytes(data[1:_GAPS_HEADER].tobytes(), "little")
    if not 2 <= index_bits <= 8 or codes > count:
        raise damaged(f"{codes} gaps of {index_bits} bits in {count} positions")
    return index_bits, codes, data[_GAPS_HEADER:]


def _mask_from_gaps(codes: np.ndarray, index_bits: int, count: int) -> np.ndarray:
    mask = np.zeros(count, dtype=np.uint8)
    start = 0
    for first in range(0, codes.size, _CHUNK):
        chunk = codes[first : first + _CHUNK]
        positions = from_gaps(chunk, index_bits) + start
        if positions.size and positions[-1] >= count:
            raise damaged(f"a gap leads to position {positions[-1]} of {count}")
        mask[positions] = 1
        start += int(chunk.sum(dtype=np.int64))
        start += (2**index_bits - 1) * (chunk.size - np.count_nonzero(chunk))
    return mask


def _checked_names(names: Sequence[str]) -> Sequence[str]:
    for name in names:
        if name not in CODERS:
            raise ArtifactError(f"'{name}' is no coder{nearest(name, CODERS)}")
    if not names:
        raise ArtifactError("no coder to choose from; name one or pass None")
    return names
