"""Bit packing: codes of 1 to 8 bits laid end to end, lowest bit first."""

from __future__ import annotations

from functools import cache

import numpy as np

from laconic.errors import ArtifactError

__all__ = ["checked_data", "checked_symbols", "damaged", "pack", "packed_bytes", "unpack"]

# Bytes of one working array: two of them stay in a core's second-level cache.
_CHUNK_BYTES = 1 << 18


def damaged(reason: str) -> ArtifactError:
    """Return the error for a coded stream that cannot be decoded.

    Args:
        reason: what is wrong, with the values.
    """
    return ArtifactError(f"a coded stream is damaged: {reason}; get the file again")


def pack(symbols: np.ndarray, bits: int) -> np.ndarray:
    """Lay codes end to end, each in its own bits, lowest bit first.

    Code i fills the bits [i * bits, (i + 1) * bits) of the result read as one
    little-endian number; the last byte is filled up with zeros.

    Args:
        symbols: uint8 [count], each below 2**bits.
        bits: width of one code, 1 to 8.

    Returns:
        uint8 [bytes], with bytes = ceil(count * bits / 8).

    Raises:
        ArtifactError: if bits is out of range or a code does not fit.

    >>> pack(np.array([1, 2, 3, 7], dtype=np.uint8), 3).tolist()
    [209, 14]
    """
    symbols = checked_symbols(symbols, bits)
    if bits == 8:
        return symbols.copy()
    if bits == 1:
        return np.packbits(symbols, bitorder="little")
    word, size, _ = _grouping(bits)
    whole, rest = divmod(symbols.size, word.itemsize)
    packed = np.empty((whole + 1) * size, dtype=np.uint8)
    _join(symbols[: symbols.size - rest], packed[: whole * size], bits)
    last = np.zeros(word.itemsize, dtype=np.uint8)
    last[:rest] = symbols[symbols.size - rest :]
    _join(last, packed[whole * size :], bits)
    return packed[: packed_bytes(symbols.size, bits)]


def unpack(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the codes that `pack` laid end to end.

    Args:
        data: uint8 [bytes], with bytes = ceil(count * bits / 8).
        bits: width of one code, 1 to 8.
        count: number of codes.

    Returns:
        uint8 [count], each below 2**bits.

    Raises:
        ArtifactError: if bits or count is out of range or the length differs.

    >>> unpack(np.array([209, 14], dtype=np.uint8), 3, 4).tolist()
    [1, 2, 3, 7]
    """
    data = checked_data(data, bits, count)
    if data.size != packed_bytes(count, bits):
        raise damaged(f"{count} codes of {bits} bits do not fill {data.size} bytes")
    if bits == 8:
        return data.copy()
    if bits == 1:
        return np.unpackbits(data, count=count, bitorder="little")
    word, size, halvings = _grouping(bits)
    words = np.empty(-(-count // word.itemsize), dtype=word)
    chunk = _CHUNK_BYTES // word.itemsize
    buffer = np.empty(min(chunk, words.size), dtype=word)
    for start in range(0, words.size, chunk):
        parted = words[start : start + chunk]
        moved = buffer[: parted.size]
        _load(data[start * size :], size, parted)
        for _, upper, factor in reversed(halvings):
            np.bitwise_and(parted, upper, out=moved)
            np.multiply(moved, factor, out=moved)
            np.add(parted, moved, out=parted)
    return words.view(np.uint8)[:count]


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes that `count` codes of `bits` bits fill.

    Args:
        count: number of codes.
        bits: width of one code.
    """
    return -(-count * bits // 8)


def checked_symbols(symbols: np.ndarray, bits: int) -> np.ndarray:
    """Return contiguous symbols, or raise if they are no codes of `bits` bits.

    Args:
        symbols: uint8 [count], each below 2**bits.
        bits: width of one code, 1 to 8.

    Raises:
        ArtifactError: if the type, the shape, bits or a value is wrong.
    """
    if not 1 <= bits <= 8:
        raise ArtifactError(f"bits is {bits}; a code has 1 to 8 bits")
    if symbols.dtype != np.uint8 or symbols.ndim != 1:
        found = f"{symbols.dtype} of {symbols.ndim} dimensions"
        raise ArtifactError(f"codes are {found}; pass uint8 of one dimension")
    if symbols.size and bits < 8 and symbols.max() >> bits:
        raise ArtifactError(f"a code is {symbols.max()}; {bits} bits hold 0 to {2**bits - 1}")
    return np.ascontiguousarray(symbols)


def checked_data(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return contiguous bytes, or raise if no stream can look like this.

    Args:
        data: uint8 [bytes].
        bits: width of one code, 1 to 8.
        count: number of codes.

    Raises:
        ArtifactError: if the type, the shape, bits or count is wrong.
    """
    if not 1 <= bits <= 8:
        raise damaged(f"codes of {bits} bits (1 to 8 are possible)")
    if count < 0:
        raise damaged(f"a count of {count} codes")
    if data.dtype != np.uint8 or data.ndim != 1:
        raise damaged(f"{data.dtype} of {data.ndim} dimensions in place of bytes")
    return np.ascontiguousarray(data)


@cache
def _grouping(bits: int) -> tuple[np.dtype, int, tuple[tuple[np.integer, ...], ...]]:
    """Return the machine word joining codes, the bytes they pack to, and the halvings.

    A word holds one code per byte, or all of them end to end. Each halving joins (or
    parts) neighbouring pieces, twice as many codes each time. Moving a piece x up by s
    bits adds x * (2**s - 1): one operation less than to cut it out, shift and put back.
    Per halving: mask of the lower halves, mask of the packed upper pieces, the factor.
    """
    codes_per_word = {2: 4, 4: 2}.get(bits, 8)
    word = np.dtype(f"<u{codes_per_word}")
    halvings = []
    codes = 1
    while codes < codes_per_word:
        places = sum(1 << start for start in range(0, 8 * codes_per_word, 16 * codes))
        lower = ((1 << 8 * codes) - 1) * places
        upper = (((1 << codes * bits) - 1) << codes * bits) * places
        factor = (1 << codes * (8 - bits)) - 1
        halvings.append(tuple(word.type(value) for value in (lower, upper, factor)))
        codes *= 2
    return word, codes_per_word * bits // 8, tuple(halvings)


def _join(symbols: np.ndarray, packed: np.ndarray, bits: int) -> None:
    """Pack whole words of codes."""
    word, size, halvings = _grouping(bits)
    words = symbols.view(word)
    chunk = _CHUNK_BYTES // word.itemsize
    buffers = np.empty((2, min(chunk, words.size)), dtype=word)
    # Moving up leaves the codes this far above the bottom of the word.
    excess = word.type((word.itemsize - 1) * (8 - bits))
    for start in range(0, words.size, chunk):
        source = words[start : start + chunk]
        joined, moved = buffers[:, : source.size]
        for lower, _, factor in halvings:
            np.bitwise_and(source, lower, out=moved)
            np.multiply(moved, factor, out=moved)
            source = np.add(source, moved, out=joined)
        np.right_shift(joined, excess, out=joined)
        _store(joined, packed[start * size : (start + chunk) * size], size)


def _store(words: np.ndarray, packed: np.ndarray, size: int) -> None:
    """Write the low `size` bytes of each word."""
    if size == 1:
        np.copyto(packed, words, casting="unsafe")
        return
    # An opaque type of `size` bytes makes numpy copy the low bytes of a word at once.
    opaque = f"V{size}"
    low_bytes = np.ndarray(words.shape, opaque, words, 0, words.strides)
    np.copyto(packed.view(opaque), low_bytes)


def _load(data: np.ndarray, size: int, words: np.ndarray) -> None:
    """Fill words with groups of `size` bytes each, from the start of data."""
    if size == 1:
        np.copyto(words, data[: words.size])
        return
    needed = (words.size - 1) * size + words.itemsize
    if data.size < needed:
        data = np.concatenate([data, np.zeros(needed - data.size, dtype=np.uint8)])
    # Overlapping unaligned reads: each word sees its own bytes and some of the next.
    overlapping = np.ndarray(words.shape, words.dtype, data, 0, (size,))
    np.bitwise_and(overlapping, words.dtype.type((1 << 8 * size) - 1), out=words)
