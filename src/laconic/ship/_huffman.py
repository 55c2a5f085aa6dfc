"""Canonical Huffman codes: optimal lengths, and streams decoded in many lanes at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from laconic.errors import ArtifactError
from laconic.ship._blocks import Blocks
from laconic.ship._packing import damaged, pack, packed_bytes, unpack

__all__ = ["LONGEST", "canonical_codes", "code_lengths", "read", "size", "table_bytes", "write"]

# Twelve bits: the decoding tables stay in a first-level cache and a length fits 4 bits.
LONGEST = 12
# One lane costs 16 bits of table: one per 6144 bits of codes keeps that under 0.3 %.
_LANE_BITS = 6144
# No lane may hold more symbols, so that its length in bits always fits 16 bits.
_LANE_SYMBOLS = 65535 // LONGEST
_CHUNK = 1 << 16
# Typed once: mixing 64-bit unsigned numbers with Python's costs a conversion per call.
_FIVE, _LOW_FIVE, _UNREAD = np.uint64(5), np.uint64(31), np.uint64(64 - LONGEST)


def code_lengths(counts: np.ndarray, limit: int) -> np.ndarray:
    """Return optimal prefix-code lengths, none above a limit (package-merge).

    Minimises sum(counts * lengths). Without an effective limit these are the lengths
    of Huffman's code. Symbols that never occur get length 0, and so does a symbol that
    is alone: nothing has to be written for it. (Larmore and Hirschberg 1990.)

    Args:
        counts: int [symbols], how often each symbol occurs.
        limit: the longest length allowed, in bits.

    Returns:
        int64 [symbols], with sum(2.0**-lengths) == 1 over two or more used symbols.

    Raises:
        ArtifactError: if codes of `limit` bits cannot tell the used symbols apart.

    >>> code_lengths(np.array([45, 13, 12, 16, 9, 5]), 12).tolist()
    [1, 3, 3, 3, 4, 4]
    """
    counts = np.asarray(counts, dtype=np.int64)
    lengths = np.zeros(counts.size, dtype=np.int64)
    used = np.flatnonzero(counts)
    if used.size > 1 << limit:
        raise ArtifactError(f"{used.size} symbols need codes longer than {limit} bits")
    if used.size < 2:
        return lengths
    ascending = used[np.argsort(counts[used], kind="stable")]
    leaves = counts[ascending]
    packages = leaves[:0]
    levels = []
    for _ in range(limit):
        items = np.concatenate([leaves, packages])
        order = np.argsort(items, kind="stable")
        levels.append(order < leaves.size)
        pairs = items[order][: items.size // 2 * 2]
        packages = pairs[0::2] + pairs[1::2]
    # Of the last level the cheapest 2n - 2 items are the code; a leaf among them costs
    # its symbol one bit, a package stands for two items of the level before.
    taken = 2 * used.size - 2
    for is_leaf in reversed(levels):
        chosen = int(np.count_nonzero(is_leaf[:taken]))
        lengths[ascending[:chosen]] += 1
        taken = 2 * (taken - chosen)
    return lengths


def canonical_codes(lengths: np.ndarray) -> np.ndarray:
    """Return the canonical prefix code with given lengths.

    Codes ascend with (length, symbol), so lengths alone determine them.

    Args:
        lengths: int [symbols], bits of each code; 0 for a symbol without one.

    Returns:
        int64 [symbols], each code as a number of that many bits, highest bit first.

    >>> [f"{code:0{bits}b}" for code, bits in zip(canonical_codes([1, 3, 3, 2]), [1, 3, 3, 2])]
    ['0', '110', '111', '10']
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    longest = int(lengths.max(initial=0))
    order = _canonical_order(lengths)
    shares = 1 << (longest - lengths[order])
    codes = np.zeros(lengths.size, dtype=np.int64)
    codes[order] = (np.cumsum(shares) - shares) >> (longest - lengths[order])
    return codes


def size(counts: np.ndarray, blocks: Blocks) -> int | None:
    """Return the bytes a stream takes, or None if there is nothing to tell apart.

    Args:
        counts: int [blocks.size], how often each block occurs.
        blocks: what the symbols of the stream stand for.
    """
    if np.count_nonzero(counts) < 2:
        return None
    total_bits = int(counts @ code_lengths(counts, LONGEST))
    lanes = _lane_count(int(counts.sum()), total_bits)
    return _header_bytes(blocks.size, lanes) + packed_bytes(total_bits, 1)


def write(symbols: np.ndarray, counts: np.ndarray, blocks: Blocks) -> np.ndarray:
    """Return a stream: code lengths, lanes and their lengths in bits, codes.

    Symbol i goes to lane i % lanes, so each step of a decoder yields neighbours.

    Args:
        symbols: uint8 [count], joined.
        counts: int [blocks.size], how often each block occurs; two or more occur.
        blocks: what the symbols stand for.

    Returns:
        uint8 [bytes].
    """
    lengths = code_lengths(counts, LONGEST)
    lanes = _lane_count(symbols.size, int(counts @ lengths))
    rows = -(-symbols.size // lanes)
    grid = np.zeros(rows * lanes, dtype=np.uint8)
    grid[: symbols.size] = symbols
    bits = lengths.astype(np.uint8)[grid]
    bits[symbols.size :] = 0
    by_lane = grid.reshape(rows, lanes).T[bits.reshape(rows, lanes).T > 0]
    parts = [
        pack(lengths.astype(np.uint8), 4),
        np.array([lanes], dtype="<u4").view(np.uint8),
        bits.reshape(rows, lanes).sum(axis=0, dtype="<u2").view(np.uint8),
        _write_codes(by_lane, lengths),
    ]
    return np.concatenate(parts)


def read(data: np.ndarray, count: int, blocks: Blocks) -> np.ndarray:
    """Return the symbols of a stream, decoding all lanes in lockstep.

    Args:
        data: uint8 [bytes], what `write` returned.
        count: number of symbols, at least 1.
        blocks: what the symbols stand for.

    Returns:
        uint8 [count], each below blocks.size.

    Raises:
        ArtifactError: if the stream is damaged.
    """
    stream = _parse(data, count, blocks.size)
    symbol_of, length_of = _decoding_tables(stream.lengths)
    windows = _windows(stream.codes)
    lanes = stream.lane_bits.size
    rows = -(-count // lanes)
    symbols = np.empty((rows, lanes), dtype=np.uint8)
    ends = np.cumsum(stream.lane_bits, dtype=np.uint64)
    position = ends - stream.lane_bits
    window, scratch, taken = np.empty((3, lanes), dtype=np.uint64)
    index = scratch.view(np.int64)
    for row in range(rows):
        if row % 2 == 0:  # a window holds 33 valid bits: enough for two codes
            np.right_shift(position, _FIVE, out=scratch)
            windows.take(index, out=window, mode="clip")
            np.bitwise_and(position, _LOW_FIVE, out=scratch)
            np.left_shift(window, scratch, out=window)
        np.right_shift(window, _UNREAD, out=scratch)
        symbol_of.take(index, out=symbols[row], mode="clip")
        length_of.take(index, out=taken, mode="clip")
        if row == rows - 1:
            taken[count - row * lanes :] = 0
        np.add(position, taken, out=position)
        np.left_shift(window, taken, out=window)
    if not np.array_equal(position, ends):
        raise damaged("codes of a Huffman stream do not end where their lane ends")
    return symbols.reshape(-1)[:count]


def table_bytes(data: np.ndarray, count: int, blocks: Blocks) -> int:
    """Return how many bytes of a stream are code lengths and lane lengths.

    Args:
        data: uint8 [bytes], what `write` returned.
        count: number of symbols, at least 1.
        blocks: what the symbols stand for.

    Raises:
        ArtifactError: if the stream is damaged.
    """
    return data.size - _parse(data, count, blocks.size).codes.size


class _Stream(NamedTuple):
    lengths: np.ndarray
    lane_bits: np.ndarray
    codes: np.ndarray


def _parse(data: np.ndarray, count: int, alphabet: int) -> _Stream:
    """Take a stream apart, and refuse one whose parts cannot belong together."""
    table = packed_bytes(alphabet, 4)
    if data.size < table + 4:
        raise damaged(f"{data.size} bytes are too few for {alphabet} code lengths")
    lengths = unpack(data[:table], 4, alphabet).astype(np.int64)
    shares = np.where(lengths > 0, 1 << np.maximum(LONGEST - lengths, 0), 0).sum()
    if lengths.max() > LONGEST or shares != 1 << LONGEST:
        raise damaged("code lengths of a Huffman stream make no prefix code")
    lanes = int.from_bytes(data[table : table + 4].tobytes(), "little")
    if not 1 <= lanes <= count or -(-count // lanes) > _LANE_SYMBOLS:
        raise damaged(f"{lanes} lanes for {count} symbols of a Huffman stream")
    header = _header_bytes(alphabet, lanes)
    if data.size < header:
        raise damaged(f"{data.size} bytes are too few for {lanes} lanes")
    lane_bits = np.frombuffer(data[table + 4 : header].tobytes(), dtype="<u2")
    codes = data[header:]
    total_bits = int(lane_bits.sum(dtype=np.int64))
    if codes.size != packed_bytes(total_bits, 1):
        raise damaged(f"{codes.size} bytes of Huffman codes where lanes have {total_bits} bits")
    return _Stream(lengths, lane_bits.astype(np.uint64), codes)


def _header_bytes(alphabet: int, lanes: int) -> int:
    return packed_bytes(alphabet, 4) + 4 + 2 * lanes


def _lane_count(count: int, total_bits: int) -> int:
    return max(1, min(count, total_bits // _LANE_BITS), -(-count // _LANE_SYMBOLS))


def _canonical_order(lengths: np.ndarray) -> np.ndarray:
    order = np.argsort(lengths, kind="stable")
    return order[lengths[order] > 0]


def _decoding_tables(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return symbol and length of the code that starts each string of LONGEST bits."""
    order = _canonical_order(lengths)
    runs = 1 << (LONGEST - lengths[order])
    symbol_of = np.repeat(order, runs).astype(np.uint8)
    return symbol_of, lengths.astype(np.uint64)[symbol_of]


def _windows(codes: np.ndarray) -> np.ndarray:
    """Return 64 bits of codes from every 32nd bit on, first bit highest: uint64 [windows]."""
    count = codes.size // 4 + 1
    padded = np.zeros(4 * count + 4, dtype=np.uint8)
    padded[: codes.size] = codes
    return np.ndarray((count,), ">u8", padded, 0, (4,)).astype(np.uint64)


def _write_codes(symbols: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Lay the codes of symbols end to end, highest bit first."""
    places = np.arange(LONGEST)
    tops = canonical_codes(lengths) << (LONGEST - lengths)
    code_bits = (tops[:, None] >> (LONGEST - 1 - places) & 1).astype(np.uint8)
    is_code = places < lengths[:, None]
    pieces = []
    rest = np.zeros(0, dtype=np.uint8)
    for start in range(0, symbols.size, _CHUNK):
        chunk = symbols[start : start + _CHUNK].astype(np.int64)
        laid = np.concatenate([rest, code_bits[chunk][is_code[chunk]]])
        whole = laid.size // 8 * 8
        pieces.append(np.packbits(laid[:whole]))
        rest = laid[whole:]
    return np.concatenate([*pieces, np.packbits(rest)])
