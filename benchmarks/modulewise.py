"""What the benchmarks of modules that learn apart share: data, steps, processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from qat import SCOPE
from torch import nn

from laconic import Task
from laconic.recover import (
    Adam,
    Attention,
    Gradient,
    Hidden,
    Logits,
    Mixed,
    Order,
    Reconstruct,
    Sequential,
    Stop,
    Student,
    Train,
)
from laconic.step import Step
from laconic.tasks import Batch
from laconic.weights import Quantize, Ternary

BATCH = 32
TERNARY = Quantize(Ternary(), embedding=Ternary("row"), activation=8, scope=SCOPE)


def texts(tokens: int, batches: int) -> Task:
    """Return a task of random tokens."""
    drawn = torch.randint(1000, 30_000, (BATCH * batches, tokens))
    labels = torch.arange(len(drawn)) % 2

    def call(model: nn.Module, batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=batch.inputs[0]).logits
        return logits

    seen = drawn[:2], labels[:2]
    return Task((drawn, labels), seen, seen, call=call)


def parts(count: int, updates: int, order: Order) -> Reconstruct:
    """Return the step that lets so many parts learn: MREM."""
    solve = Gradient(updates, batch=BATCH, optimizer=Adam(1e-4))
    return Reconstruct(parts=count, feed=Mixed(), order=order, solve=solve, scope=SCOPE)


def layers(updates: int) -> Reconstruct:
    """Return the step that lets every layer learn: REM."""
    solve = Gradient(updates, batch=BATCH, optimizer=Adam(1e-4))
    return Reconstruct(feed=Student(), order=Sequential(), solve=solve, scope=SCOPE)


def whole(epochs: int = 1) -> Step:
    """Return the training of the network as a whole: QAT."""
    objective = Hidden() + Attention() + Logits(loss="cross_entropy")
    return Train(objective, epochs=epochs, batch=BATCH, stop=Stop(keep="last"))


def asked(script: str, what: str, *, processes: int = 1) -> list[Any]:
    """Return a measurement taken in a process of its own, or in several, of every process."""
    with tempfile.TemporaryDirectory() as folder:
        start = [sys.executable]
        if processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            start += [*launcher, str(processes)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*start, script, what, folder], check=True, env=environment)
        files = sorted(Path(folder).iterdir())
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def answer(measured: Mapping[str, Callable[[], Any]]) -> bool:
    """Measure what ``asked`` has asked this process for; return whether it has."""
    if len(sys.argv) == 1:
        return False
    torch.set_num_threads(1)
    what, folder = sys.argv[1:]
    found = json.dumps(measured[what]())
    rank = os.environ.get("RANK", "0")
    Path(folder, f"{rank}.json").write_text(found, encoding="utf-8")
    return True
