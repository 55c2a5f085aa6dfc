"""Bytes on disk of BERT base in few bits, beside what the strict count says it takes.

Writes benchmarks/results/lowbit_size.json. Weights are drawn as a new encoder's are, Gaussian of
deviation 0.02; there is no tokenizer and no head. Matrices of the encoder and the pooler have a
scale each, the word embedding one for every row; positions, token types, norms and biases are
float32. ``baseline`` is the strict count, ``ratio`` the file over it. Bars that are missed end
the run with an error.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from coding import LAYOUT
from common import write
from torch import nn
from transformers import BertConfig, BertModel

import laconic
from laconic.ship import inspect
from laconic.sizes import size_report
from laconic.step import State
from laconic.weights import Binary, Quantize, Representation, Symmetric, Ternary

THREADS = 1
SCOPE = "embeddings.word_embeddings, encoder.*, pooler.*"
FORMS: dict[str, tuple[Representation, Representation]] = {
    "ternary 2-2": (Ternary(), Ternary("row")),
    "symmetric 3-3": (Symmetric(3), Symmetric(3, granularity="row")),
    "symmetric 8-8": (Symmetric(8), Symmetric(8, granularity="row")),
    "binary 1-1": (Binary(), Binary("row")),
}
# Signs of random weights do not get shorter than a bit: what a header adds to the strict count.
HEADER = 0.005
# The entropy of a Gaussian cut at 0.7 mean sizes is 1.56 bits; with coders' tables and scales.
TERNARY_BITS = 1.62


def network() -> nn.Module:
    """Return BERT base without a head, the same weights every time."""
    torch.manual_seed(0)
    return BertModel(BertConfig())


def measured(name: str) -> dict[str, Any]:
    """Return the row of one form: its file, and the strict count of what is in it."""
    weight, embedding = FORMS[name]
    model = network()
    Quantize(weight, embedding=embedding, scope=SCOPE).apply(State(model))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bert.safetensors"
        began = time.perf_counter()
        size = laconic.save(model, path)
        seconds = time.perf_counter() - began
        found = inspect(path)
    bits = 8 * (found.code_bytes + found.table_bytes) / sum(LAYOUT)
    strict = size_report(model).size_bytes
    return {
        "row": name,
        "task": "BERT base, Gaussian weights",
        "metric": "bits a weight, with tables and scales",
        "ours": bits,
        "baseline": strict,
        "size_bytes": size,
        "ratio": size / strict,
        "seconds": seconds,
        "note": f"{size / 2**20:.2f} MiB; bytes of codes {found.code_bytes}, tables "
        f"{found.table_bytes}, plain numbers {found.dense_bytes}, header {found.header_bytes}",
    }


def missed(row: dict[str, Any]) -> str | None:
    """Return which bar a row misses."""
    name, size, allowed = row["row"], row["size_bytes"], row["baseline"]
    if name.startswith("binary"):
        allowed *= 1 + HEADER
    if size > allowed:
        return f"{name}: {size} bytes, {allowed:.0f} allowed"
    if name.startswith("ternary") and row["ours"] > TERNARY_BITS:
        return f"{name}: {row['ours']:.4f} bits a weight, {TERNARY_BITS} allowed"
    return None


def main() -> None:
    """Save every form once, write the result file, check the bars."""
    torch.set_num_threads(THREADS)
    rows = []
    for name in FORMS:
        rows.append(measured(name))
        print(json.dumps(rows[-1], indent=1), flush=True)
    write("lowbit_size", rows, packages=("torch", "transformers"), threads=THREADS)
    problems = [problem for row in rows if (problem := missed(row))]
    if problems:
        raise SystemExit("; ".join(problems))


if __name__ == "__main__":
    main()
