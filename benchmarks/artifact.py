"""Saving and loading an artefact of BERT-base shape: 109 million ternary weights, one file.

Writes benchmarks/results/artifact.json. Loading runs in a fresh process; its peak memory is the
growth of the largest resident size over that after the imports.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import torch
from coding import LAYOUT
from common import resident, write
from torch import nn

import laconic
from laconic.weights import Ternary

THREADS = 2


def network() -> nn.Module:
    """Return plain matrices in the shapes of BERT base."""
    shapes = [(size // 768, 768) for size in LAYOUT]
    return nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in shapes)


def load_alone(path: str) -> tuple[float, int]:
    """Return the seconds and the growth in bytes of loading, in this process."""
    torch.set_num_threads(THREADS)
    with torch.device("meta"):
        empty = network()
    before = resident("VmHWM")
    began = time.perf_counter()
    laconic.load(path, model=empty)
    seconds = time.perf_counter() - began
    return seconds, resident("VmHWM") - before


def main() -> None:
    """Save once, load five times, write the result file."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = network()
    weights = sum(parameter.numel() for parameter in model.parameters())
    for index in range(len(LAYOUT)):
        laconic.lay(model, f"{index}.weight", Ternary("row"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bert.safetensors"
        began = time.perf_counter()
        size = laconic.save(model, path)
        saving = time.perf_counter() - began
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            loads = pool.map(load_alone, [str(path)] * 5, chunksize=1)
    seconds, growth = min(seconds for seconds, _ in loads), max(growth for _, growth in loads)
    note = f"{weights} weights; five loads {[round(s, 2) for s, _ in loads]} s"
    rows = [
        {"row": "save", "metric": "seconds", "seconds": saving, "size_bytes": size, "note": note},
        {"row": "load", "metric": "seconds, best of five", "ours": seconds, "seconds": seconds},
        {
            "row": "load, peak memory",
            "metric": "growth over the float32 weights",
            "ours": growth,
            "baseline": 4 * weights,
            "ratio": growth / (4 * weights),
        },
    ]
    write("artifact", rows, packages=("torch",), threads=THREADS)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
