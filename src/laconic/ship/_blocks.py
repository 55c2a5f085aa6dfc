"""Blocks: several symbols of a small alphabet joined to one number below 256."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from laconic.ship._packing import damaged, packed_bytes

__all__ = ["LARGEST", "Blocks", "histogram", "largest_group", "parse"]

LARGEST = 256
_CHUNK = 1 << 18


@dataclass(frozen=True, eq=False)
class Blocks:
    """How symbols are joined: the digits of a block are places in `values`.

    Joining makes Huffman codes of skewed alphabets nearly optimal, sees what
    neighbours have in common, and decodes several symbols at a time.

    Attributes:
        values: uint8 [values], the symbols that occur, ascending.
        group: symbols in a block, the first the lowest digit.
    """

    values: np.ndarray
    group: int

    @property
    def size(self) -> int:
        """Number of different blocks, at most 256."""
        return int(self.values.size) ** self.group

    def count(self, symbols: int) -> int:
        """Return how many blocks so many symbols make; the last may be short."""
        return -(-symbols // self.group)

    def join(self, symbols: np.ndarray) -> np.ndarray:
        """Return symbols as blocks: uint8 [count]."""
        base = self.values.size
        if self.values[-1] >= base:
            digit_of = np.zeros(256, dtype=np.uint8)
            digit_of[self.values] = np.arange(base)
            symbols = digit_of[symbols]
        if self.group == 1:
            return symbols
        places = (base ** np.arange(self.group)).astype(np.uint8)
        rest = symbols.size % self.group
        whole = symbols.size - rest
        blocks = np.zeros(self.count(symbols.size), dtype=np.uint8)
        np.matmul(
            symbols[:whole].reshape(-1, self.group), places, out=blocks[: whole // self.group]
        )
        if rest:
            blocks[-1] = symbols[whole:] @ places[:rest]
        return blocks

    def split(self, blocks: np.ndarray, count: int) -> np.ndarray:
        """Return the symbols of blocks: uint8 [count]."""
        base = self.values.size
        digits = np.arange(self.size)[:, None] // base ** np.arange(self.group) % base
        symbols_of = self.values[digits]
        symbols = np.empty((blocks.size, self.group), dtype=np.uint8)
        for start in range(0, blocks.size, _CHUNK):
            chunk = blocks[start : start + _CHUNK].astype(np.int64)
            symbols_of.take(chunk, axis=0, out=symbols[start : start + _CHUNK], mode="clip")
        return symbols.reshape(-1)[:count]

    def header(self, bits: int) -> np.ndarray:
        """Return the header of a stream: one bit per possible value, and the group."""
        occurs = np.zeros(8 * packed_bytes(2**bits, 1), dtype=np.uint8)
        occurs[self.values] = 1
        alphabet = np.packbits(occurs, bitorder="little")
        # A value that is alone needs no blocks, nor anything after it.
        return alphabet if self.values.size == 1 else np.append(alphabet, np.uint8(self.group))


def parse(data: np.ndarray, bits: int) -> tuple[Blocks, np.ndarray]:
    """Return the blocks of a stream and what follows its header.

    Args:
        data: uint8 [bytes], beginning with a header.
        bits: width of one symbol.

    Raises:
        ArtifactError: if there is no such header.
    """
    size = packed_bytes(2**bits, 1)
    values = np.flatnonzero(np.unpackbits(data[:size], bitorder="little")).astype(np.uint8)
    if data.size < size or not values.size or values[-1] >= 2**bits:
        raise damaged(f"{data.size} bytes begin with no alphabet of {bits} bits")
    if values.size == 1:
        return Blocks(values, 1), data[size:]
    group = int(data[size]) if data.size > size else 0
    if not 1 <= group <= largest_group(values.size):
        raise damaged(f"blocks of {group} symbols of {values.size} values")
    return Blocks(values, group), data[size + 1 :]


def largest_group(values: int) -> int:
    """Return how many symbols of so many values make at most 256 different blocks.

    Args:
        values: number of values a symbol takes, at least 2.
    """
    group = 1
    while values ** (group + 1) <= LARGEST:
        group += 1
    return group


def histogram(symbols: np.ndarray, size: int) -> np.ndarray:
    """Return how often each symbol occurs: int64 [size].

    Args:
        symbols: uint8 [count], each below size.
        size: size of the alphabet.
    """
    counts = np.zeros(size, dtype=np.int64)
    # In pieces, because numpy widens what it counts to 8 bytes a symbol.
    for start in range(0, symbols.size, _CHUNK):
        counts += np.bincount(symbols[start : start + _CHUNK], minlength=size)
    return counts
