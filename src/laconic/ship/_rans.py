"""Asymmetric numeral systems: streams within a few bytes of what their model allows."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from laconic.ship._blocks import Blocks
from laconic.ship._packing import damaged

__all__ = ["read", "size", "table_bytes", "write"]

# The coder is constriction's: a 64-bit state, 32-bit words, frequencies that sum to
# 2**24. It adds one to each frequency it is given, so ours sum to 2**24 - alphabet: its
# scale is then exactly 1.0, and every machine builds the same model from the integers.
_TOTAL = 1 << 24
_WORD_BYTES = 4
# Weights are small floats: a mantissa of so many bits, and exponents up to this weight,
# so that 256 of them times 2**24 stay within 64 bits.
_LARGEST_WEIGHT = 1 << 30
_CHUNK = 1 << 18


class _Table(NamedTuple):
    """How a stream stores its model; the first byte is the index in `_TABLES`."""

    per_block: bool
    dtype: str
    mantissa: int

    def size(self, blocks: Blocks) -> int:
        """Return the bytes of the table, its first byte included."""
        weights = blocks.size if self.per_block else blocks.values.size
        return 1 + weights * np.dtype(self.dtype).itemsize


# Symbols of a block that know nothing of each other need one weight per value, at two
# bytes; those that do need one per block, where one byte loses 0.0005 bit per block.
_TABLES = (_Table(False, "<u2", 11), _Table(True, "u1", 3))


def size(counts: np.ndarray, blocks: Blocks) -> int | None:
    """Return the bytes a stream takes, to within a few.

    Args:
        counts: int [blocks.size], how often each block occurs.
        blocks: what the symbols of the stream stand for.
    """
    return min(_sizes(counts, blocks))


def write(symbols: np.ndarray, counts: np.ndarray, blocks: Blocks) -> np.ndarray:
    """Return a stream: a table of weights, then words without their last zero bytes.

    Args:
        symbols: uint8 [count], joined.
        counts: int [blocks.size], how often each block occurs.
        blocks: what the symbols of the stream stand for.

    Returns:
        uint8 [bytes].
    """
    from constriction import stream

    sizes = _sizes(counts, blocks)
    kind = sizes.index(min(sizes))
    table = _TABLES[kind]
    codes = _weight_codes(table, counts, blocks)
    model = _model(_frequencies(table, codes, blocks))
    coder = stream.stack.AnsCoder()
    # Last things first: the coder is a stack.
    for start in reversed(range(0, symbols.size, _CHUNK)):
        coder.encode_reverse(symbols[start : start + _CHUNK].astype(np.int32), model)
    words = coder.get_compressed().astype("<u4").view(np.uint8)
    used = words.size - _ending_zeros(words)
    return np.concatenate([[np.uint8(kind)], codes.view(np.uint8), words[:used]])


def read(data: np.ndarray, count: int, blocks: Blocks) -> np.ndarray:
    """Return the symbols of a stream.

    Args:
        data: uint8 [bytes], what `write` returned.
        count: number of symbols.
        blocks: what the symbols of the stream stand for.

    Returns:
        uint8 [count], each below blocks.size.

    Raises:
        ArtifactError: if the stream is damaged.
    """
    from constriction import stream

    frequencies, body = _parse(data, blocks)
    if not body.size or body[-1] == 0:
        raise damaged("an rANS stream has no words or ends in a zero byte")
    padded = np.zeros(-(-body.size // _WORD_BYTES) * _WORD_BYTES, dtype=np.uint8)
    padded[: body.size] = body
    coder = stream.stack.AnsCoder(padded.view("<u4").astype(np.uint32, copy=False))
    model = _model(frequencies)
    symbols = np.empty(count, dtype=np.uint8)
    for start in range(0, count, _CHUNK):
        chunk = symbols[start : start + _CHUNK]
        chunk[...] = coder.decode(model, chunk.size)
    # Missing words decode as zeros without complaint: only the end state tells.
    if not coder.is_empty():
        raise damaged("an rANS stream does not end in the state it began with")
    return symbols


def table_bytes(data: np.ndarray, count: int, blocks: Blocks) -> int:
    """Return how many bytes of a stream are its table.

    Args:
        data: uint8 [bytes], what `write` returned.
        count: number of symbols.
        blocks: what the symbols of the stream stand for.

    Raises:
        ArtifactError: if the stream is damaged.
    """
    _, body = _parse(data, blocks)
    return data.size - body.size


def _sizes(counts: np.ndarray, blocks: Blocks) -> list[int]:
    """Return the bytes of a stream with each kind of table."""
    sizes = []
    for table in _TABLES:
        codes = _weight_codes(table, counts, blocks)
        shares = (_frequencies(table, codes, blocks) + 1) / _TOTAL
        words = int(-(counts @ np.log2(shares)) / 8) + _WORD_BYTES
        sizes.append(table.size(blocks) + words)
    return sizes


def _parse(data: np.ndarray, blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Return the frequencies [blocks.size] and the words of a stream."""
    if not data.size or data[0] >= len(_TABLES):
        raise damaged("an rANS stream has no known kind of table")
    table = _TABLES[data[0]]
    end = table.size(blocks)
    if data.size < end:
        raise damaged(f"{data.size} bytes are too few for an rANS table of {end}")
    codes = np.frombuffer(data[1:end].tobytes(), dtype=table.dtype)
    if codes.max() >= _weights(table.mantissa).size or not codes.any():
        raise damaged("weights of an rANS table are out of range")
    return _frequencies(table, codes, blocks), data[end:]


@cache
def _weights(mantissa: int) -> np.ndarray:
    """Return what each code stands for: small ones themselves, then even steps per octave."""
    steps = 1 << mantissa
    octaves = _LARGEST_WEIGHT.bit_length() - mantissa
    codes = np.arange(steps * octaves, dtype=np.int64)
    return np.where(codes < steps, codes, (steps + codes % steps) << (codes // steps - 1).clip(0))


def _weight_codes(table: _Table, counts: np.ndarray, blocks: Blocks) -> np.ndarray:
    """Return the code of the weight nearest to each count: table.dtype [weights]."""
    if not table.per_block:
        places = counts.reshape((blocks.values.size,) * blocks.group)
        every = range(blocks.group)
        counts = sum(places.sum(axis=tuple(set(every) - {place})) for place in every)
    weights = _weights(table.mantissa)
    scale = -(-int(counts.max()) // int(weights[-1]))
    middles = (weights[1:] + weights[:-1] + 1) // 2
    codes = np.searchsorted(middles, -(-counts // scale), side="right")
    return codes.astype(table.dtype)


def _frequencies(table: _Table, codes: np.ndarray, blocks: Blocks) -> np.ndarray:
    """Return frequencies that sum to 2**24 - alphabet: int64 [blocks.size]."""
    weights = _weights(table.mantissa)[codes]
    if not table.per_block:
        of_value = _summing_to(_TOTAL, weights)
        weights = of_value
        for _ in range(blocks.group - 1):
            weights = (weights[:, None] * of_value // _TOTAL).reshape(-1)
    return _summing_to(_TOTAL - weights.size, weights)


def _summing_to(total: int, weights: np.ndarray) -> np.ndarray:
    """Return integers in proportion to weights; the largest takes what rounding leaves."""
    parts = weights * total // weights.sum()
    parts[weights.argmax()] += total - parts.sum()
    return parts


def _model(frequencies: np.ndarray) -> Any:
    from constriction import stream

    return stream.model.Categorical(frequencies.astype(np.float64), perfect=False, lazy=False)


def _ending_zeros(words: np.ndarray) -> int:
    last = words[-_WORD_BYTES:]
    return last.size - int(np.flatnonzero(last)[-1]) - 1 if last.size else 0
