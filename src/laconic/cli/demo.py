"""The demonstration: train, compress, save, reload in a new process, verify, report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laconic import run, rundir
from laconic.cli.output import Output
from laconic.errors import RunError
from laconic.models import digits_cnn
from laconic.recipe import Recipe
from laconic.recover import AdamW, Train
from laconic.tasks import Task, digits

__all__ = ["demonstrate"]

MARK = ".laconic-demo"
ORIGINAL = "original.safetensors"
# All that a demonstration leaves in its folder; nothing else is ever removed from it.
LEFT = (*rundir.FILES, ORIGINAL)


def demonstrate(out: Path, output: Output) -> run.Result:
    """Train a small network on embedded digits, compress it, and prove that the file is right.

    Args:
        out: folder of the run; replaced if an earlier demonstration made it.
        output: what is going on is told here.

    Raises:
        RunError: the folder is someone else's, or the file differs from the network.
    """
    _claim(out)
    task = digits()
    output.note("1  Train a small convolutional network on scikit-learn's digits.")
    model = _trained(task)
    _save_plain(model, out / ORIGINAL)
    output.note("2  Prune, retrain, share weights, retrain, entropy-code: deep-compression.")
    result = run.compress(model, task, Recipe.read("deep-compression"), out=out)
    output.note("3  Load the file in a new process and compare.")
    checked = _verified(out / rundir.ARTIFACT)
    output.note(f"   {checked['tensors']} weights and all logits are identical bit for bit.")
    return result


def _claim(out: Path) -> None:
    """Take a new or empty folder, or one that an earlier demonstration made."""
    mark = out / MARK
    if out.exists() and not mark.is_file() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists and is not a demonstration's; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()
    for name in LEFT:
        (out / name).unlink(missing_ok=True)


def _trained(task: Task) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = digits_cnn()
    train = Train(epochs=10, batch=64, optimizer=AdamW(2e-3))
    return run.compress(model, task, [train]).model.cpu()


def _save_plain(model: nn.Module, path: Path) -> None:
    """Write the state dict as a recipe's ``weights:`` takes it."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)


def _verified(path: Path) -> dict[str, Any]:
    """Return what a new process says of the file."""
    command = [sys.executable, "-m", "laconic", "--json", "verify", str(path), "--logits"]
    threads = ["--threads", str(torch.get_num_threads())]
    answer = subprocess.run(  # noqa: S603  the interpreter that runs this line
        [*command, *threads], capture_output=True, text=True, check=False
    )
    if answer.returncode:
        raise RunError(f"{path}: a new process refused the file: {answer.stderr.strip()}")
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found
