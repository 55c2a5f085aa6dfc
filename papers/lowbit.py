"""What the scripts on low-bit encoders share: what is quantised, how it is taught, rows.

Run as a program it prints the hash of the logits of an artefact, which the scripts compare with
those of the network that was trained: `python lowbit.py FILE INPUTS`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import artefact, costs, file_bytes, in_turn, parser_of_rows, row, spread, write_table
from encoders import LABELS, STARTS, fine_tuned, glue, score
from safetensors.torch import load_file, save_file
from torch import nn
from width_depth import recipe as cut

from laconic import Attention, Hidden, Logits, Recipe, Result, Task, Train, compress, load
from laconic.recover import AdamW, Linear, Objective
from laconic.run import pick_precision
from laconic.ship.container import digest
from laconic.step import State, Step
from laconic.structure import Rectify, SetDropout
from laconic.tasks.split import tensors_in
from laconic.weights import Activation, MinMax, Quantize, Representation

# Table Q-21 for TernaryBERT and BinaryBERT: floats are what is left out, norms and biases.
BODY = "*, !*position_embeddings, !*token_type_embeddings, !classifier"
EPOCHS = {"MRPC": 5, "CoLA": 5, "RTE": 6, "STS-B": 4, "SST-2": 1, "MNLI": 1}
CORE = ("CoLA", "MRPC", "RTE", "STS-B", "SST-2")
SEEDS = {"SST-2": 1}  # of the others as many as asked for
RATE = 2e-4
PROBED = 64
CHECKED = f"logits of {PROBED} examples from the file are bit-identical in another process"
ALONE = "inputs"  # what a network is called with that has no name
EIGHT_BITS = MinMax(8)

Rows = Iterator[dict[str, Any]]


def quantize(
    weight: Representation,
    embedding: Representation,
    activation: Activation | None = EIGHT_BITS,
    **more: Any,
) -> Quantize:
    """Return the step that represents everything but positions, types and head."""
    return Quantize(weight, embedding=embedding, activation=activation, scope=BODY, **more)


def prediction(name: str) -> Objective:
    """Return the objective on what the teacher answers: classes, or a score.

    Classes have reduction "batch"; the shipped recipes have "elements" as the papers' code has,
    which weighs the answers less by the number of classes.
    """
    if LABELS.get(name) == 1:
        return Logits(loss="l2", reduction="elements")
    return Logits(loss="cross_entropy")


def train(name: str, objective: Objective, *, share: float = 1.0, rate: float = RATE) -> Train:
    """Return a training of a share of the task's epochs."""
    return Train(
        objective,
        epochs=max(1, round(share * EPOCHS[name])),
        batch=32,
        optimizer=AdamW(rate, scales=1e-4, clip=1.0, decay=Linear(warmup=0.1)),
    )


def joint(name: str, *, rate: float = RATE) -> tuple[Step, ...]:
    """Return TernaryBERT's training: hidden states, attention scores and logits at once."""
    return (train(name, Hidden() + Attention() + prediction(name), rate=rate),)


def staged(name: str, *, rate: float = RATE) -> tuple[Step, ...]:
    """Return BinaryBERT's: hidden states and scores at 2.5 times the rate, then logits."""
    first = train(name, Hidden() + Attention(), share=0.5, rate=2.5 * rate)
    return first, train(name, prediction(name), share=0.5, rate=rate)


def smaller(
    options: argparse.Namespace, name: str, task: Task, *, seed: int, cell: tuple[float, float]
) -> Result:
    """Return the fine-tuned encoder cut to a width and a depth, taught by the whole."""
    teacher = fine_tuned(options, name, task, seed)
    made = cut(name, *cell, Hidden() + prediction(name), seed)
    place = f"{name}-{seed}-{cell[0]:g}-{cell[1]:g}-distilled"
    out = options.work / "width_depth" / place
    with in_turn(out):
        result = compress(teacher.baked(), task, made, out=out, resume=True)
        check_file(result, task, place)
    return result


def still(result: Result) -> nn.Module:
    """Return a network without dropout: it only learns from a teacher from now on."""
    return changed(result.baked(), SetDropout(0))


def rectified(encoder: nn.Module) -> nn.Module:
    """Return a copy whose feed-forward parts apply ReLU, whose numbers four bits hold better."""
    return changed(copy.deepcopy(encoder), Rectify())


def changed(model: nn.Module, step: Step) -> nn.Module:
    """Return a network, in place, after a step that needs no data."""
    state = State(model)
    step.check(model, None)
    step.apply(state)
    return state.model


def run(
    options: argparse.Namespace,
    place: str,
    start: nn.Module,
    task: Task,
    recipe: Recipe,
    teacher: nn.Module | None = None,
) -> Result:
    """Run a recipe, once, and check its file."""
    out = options.work / "lowbit" / place
    result = compress(start, task, recipe, out=out, resume=True, teacher=teacher)
    check_file(result, task, place)
    return result


def check_file(result: Result, task: Task, place: str) -> None:
    """Refuse a file from which another process computes other logits than what was trained."""
    inputs = task.test.example(PROBED).inputs
    named = inputs if isinstance(inputs, dict) else {ALONE: next(tensors_in(inputs))}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        probe = Path(folder) / "probe"
        save_file({name: tensor.contiguous() for name, tensor in named.items()}, probe)
        own = digest(answer(result.model.eval(), named))
        call = [sys.executable, __file__, str(artefact(result)), str(probe)]
        found = subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip()
    if found != own:
        raise RuntimeError(f"{place}: the file computes other logits than what was trained")


def answer(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits of a network for named inputs, or for the one that has no name."""
    found = model(inputs[ALONE]) if ALONE in inputs else model(**inputs)
    return found if isinstance(found, torch.Tensor) else found.logits


def line(
    name: str,
    task: Task,
    label: str,
    done: list[Result],
    *,
    teachers: list[Result],
    note: str = "",
    **more: Any,
) -> dict[str, Any]:
    """Return the row of a method on a task, from the runs of every seed.

    The ratio is that of the files of the fine-tuned encoder and of what was made of it.
    """
    scores, before = ([score(one, task) for one in results] for results in (done, teachers))
    mean, deviation = spread(scores)
    print(f"{name}, {label}: {scores}, fine-tuned {before}", flush=True)
    drawn = (str(result.recipe.seed) for result in done)
    start = f"; was fine-tuned on {STARTS[name]} before {name}" if name in STARTS else ""
    return row(
        row=label,
        task=f"{name} dev",
        metric=f"{task.main_metric} x 100",
        ours=mean,
        std=deviation,
        seeds=len(done),
        scores=dict(zip(drawn, scores, strict=True)),
        baseline=statistics.fmean(before),
        **costs(done, file_bytes(teachers[0])),
        note=f"{conditions(done[0])}; {note}{done[0].recipe.steps!r}{start}",
        **more,
    )


def conditions(result: Result) -> str:
    """Return what a row says of a run: its file was checked, and what training was computed in."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return f"{CHECKED}; training in {pick_precision(result.recipe.precision, device)}"


def seeds(options: argparse.Namespace, name: str) -> range:
    """Return the seeds of a task."""
    last = options.first + options.seeds
    return range(options.first, min(last, SEEDS.get(name, last)))


def alone(options: argparse.Namespace) -> argparse.Namespace:
    """Return the options of rows of one seed, the first of all."""
    return argparse.Namespace(**{**vars(options), "seeds": 1, "first": 0})


def tasks(options: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Task]:
    """Return the tasks that were asked for."""
    chosen = [name for name in names if options.only in (None, name)]
    return {name: glue(options, name) for name in chosen if seeds(options, name)}


def table(
    name: str,
    about: str | None,
    rows: Callable[[argparse.Namespace], Rows],
    names: Sequence[str] = CORE,
) -> None:
    """Run a table, or a part of it."""
    made = parser_of_rows(about)
    made.add_argument("--only", choices=names, help="one task")
    options = made.parse_args()
    write_table(name, rows(options))


def main() -> None:
    """Print the hash of an artefact's logits."""
    path, inputs = (Path(argument) for argument in sys.argv[1:])
    with torch.no_grad():
        print(digest(answer(load(path), load_file(inputs))))


if __name__ == "__main__":
    main()
