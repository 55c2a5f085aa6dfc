"""Speed and size of lossless coding: packing, the coders, and the 109 million codes of BERT.

Writes benchmarks/results/coding.json. Times are the best of several runs on one thread,
unless a row says otherwise; speeds count the uint8 symbols that are coded or decoded.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from common import resident, write

from laconic.ship import coding

EMBEDDING = 30_522 * 768
# BERT base: the embedding; query, key, value, output and two of the FFN per layer; the pooler.
LAYOUT = [EMBEDDING, *12 * [*4 * [768 * 768], *2 * [768 * 3072]], 768 * 768]
MB, GB = 1e6, 1e9

Row = dict[str, Any]
Streams = list[tuple[coding.Coded, int]]


def main() -> None:
    """Run every section and write the result file."""
    rows = []
    for section in SECTIONS:
        for row in section():
            rows.append(row)
            print(" | ".join(f"{key} {shown(value)}" for key, value in row.items()), flush=True)
    write("coding", rows, packages=("numpy", "constriction"))


def packing() -> Iterator[Row]:
    """Yield the speed of packing and unpacking, beside numpy.copyto in the same run."""
    generator = np.random.default_rng(0)
    for bits in range(1, 9):
        symbols = generator.integers(0, 2**bits, EMBEDDING, dtype=np.uint8)
        packed = coding.pack(symbols, bits)
        copying = best(np.copyto, np.empty_like(symbols), symbols)
        seconds_of = {
            "pack": best(coding.pack, symbols, bits),
            "unpack": best(coding.unpack, packed, bits, EMBEDDING),
        }
        for name, seconds in seconds_of.items():
            yield {
                "row": name,
                "task": f"{bits} bits, {EMBEDDING / MB:.1f} M codes",
                "metric": "GB/s",
                "ours": EMBEDDING / seconds / GB,
                "baseline": EMBEDDING / copying / GB,
                "size_bytes": packed.size,
                "ratio": copying / seconds,
                "seconds": seconds,
                "note": "baseline and ratio: numpy.copyto between two such uint8 arrays",
            }


def coders() -> Iterator[Row]:
    """Yield size and speed of each coder on streams of 2.4 million symbols."""
    for task, (symbols, bits) in sample_streams(768 * 3072).items():
        entropy = symbols.size * coding.entropy(np.bincount(symbols)) / 8
        taken = coding.encode(symbols, bits).coder
        for coder in coding.CODERS if bits == 1 else ("packed", "huffman", "rans"):
            coded = coding.encode(symbols, bits, coders=[coder])
            streams = [(coded, symbols.size)]
            seconds_of = {
                "encode MB/s": best(encode_all, [symbols], bits, [coder]),
                "decode MB/s": best(decode_all, streams, bits),
            }
            for metric, seconds in seconds_of.items():
                yield {
                    "row": coder,
                    "task": task,
                    "metric": metric,
                    "ours": symbols.size / seconds / MB,
                    "size_bytes": coded.data.size,
                    "ratio": coded.data.size / entropy,
                    "seconds": seconds,
                    "note": "ratio: size over zero-order entropy"
                    + ("; taken by default" if coder == taken else ""),
                }


def bert_layout() -> Iterator[Row]:
    """Yield size, time and memory of the 74 ternary tensors of BERT base."""
    tensors = [ternary(count, seed) for seed, count in enumerate(LAYOUT)]
    for names in (None, ["huffman"]):
        start = time.perf_counter()
        streams = encode_all(tensors, 2, names)
        encoding = time.perf_counter() - start
        size = sum(coded.data.size for coded, _ in streams)
        used = ", ".join(sorted({coded.coder for coded, _ in streams}))
        seconds_of = {
            "encode, one thread": encoding,
            "decode, one thread": best(decode_all, streams, 2, repeats=3),
            "decode, two threads": best(decode_threaded, streams, 2, repeats=3),
        }
        common = {
            "row": used if names else f"default: {used}",
            "task": f"{len(LAYOUT)} ternary tensors, {sum(LAYOUT) / MB:.1f} M weights",
            "size_bytes": size,
            "ratio": 8 * size / sum(LAYOUT),
        }
        for metric, seconds in seconds_of.items():
            speed = {"ours": sum(LAYOUT) / seconds / MB, "seconds": seconds}
            note = "ratio: bits per weight, all tables counted"
            yield {**common, "metric": f"{metric}, MB/s", **speed, "note": note}
        peak = peak_of_decoding(streams) / MB
        note = f"above the coded streams; the largest tensor alone has {EMBEDDING / MB:.1f} MB"
        yield {**common, "metric": "decode, one thread, peak MB", "ours": peak, "note": note}


# The load of a whole artefact of this layout, end to end, belongs here as a fourth section.
SECTIONS: tuple[Callable[[], Iterator[Row]], ...] = (packing, coders, bert_layout)


def sample_streams(count: int) -> dict[str, tuple[np.ndarray, int]]:
    """Return streams as they come out of the methods: name -> symbols [count] and bits."""
    generator = np.random.default_rng(0)
    gaussian = generator.standard_normal(count)
    pairs = generator.permuted(np.tile(np.uint8([1, 1, 0, 0]), (count // 4, 1)), axis=1)
    return {
        "ternary (TWN of Gaussian weights)": (ternary(count, 0), 2),
        "mask, 10 % survive": ((generator.random(count) < 0.1).astype(np.uint8), 1),
        "mask, 1 % survive": ((generator.random(count) < 0.01).astype(np.uint8), 1),
        "mask, 2 of 4 survive": (pairs.reshape(-1), 1),
        "4-bit linear codes": (np.clip(np.round(gaussian * 2.5 + 7.5), 0, 15).astype(np.uint8), 4),
        "8-bit linear codes": (np.clip(np.round(gaussian * 28 + 128), 0, 255).astype(np.uint8), 8),
    }


def ternary(count: int, seed: int) -> np.ndarray:
    """Return ternary codes of Gaussian weights, threshold 0.7 * mean(|w|): uint8 [count]."""
    weights = np.random.default_rng(seed).standard_normal(count, dtype=np.float32)
    threshold = 0.7 * np.abs(weights).mean()
    return 1 + (weights > threshold).view(np.uint8) - (weights < -threshold).view(np.uint8)


def encode_all(tensors: list[np.ndarray], bits: int, names: list[str] | None) -> Streams:
    """Code tensors one after the other."""
    return [(coding.encode(symbols, bits, coders=names), symbols.size) for symbols in tensors]


def decode_all(streams: Streams, bits: int) -> None:
    """Decode streams one after the other, keeping none."""
    for coded, count in streams:
        coding.decode(coded.data, coded.coder, bits=bits, count=count)


def decode_threaded(streams: Streams, bits: int) -> None:
    """Decode streams in a pool of two threads, the way a loader would."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda stream: decode_all([stream], bits), streams))


def peak_of_decoding(streams: Streams) -> int:
    """Return by how many bytes decoding raises the memory of a fresh process (Linux)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_growth, (streams,))


def _growth(streams: Streams) -> int:
    decode_all(streams[-1:], 2)  # so that everything is imported before
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the earlier peak
    before = resident("VmRSS")
    decode_all(streams, 2)
    return resident("VmHWM") - before


def best(work: Callable[..., Any], *arguments: Any, repeats: int = 5) -> float:
    """Return the seconds of the fastest of several runs; of short ones many are made."""
    seconds: list[float] = []
    while len(seconds) < repeats or sum(seconds) < 0.3:
        start = time.perf_counter()
        work(*arguments)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def shown(value: Any) -> str:
    """Return a value for the terminal."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
