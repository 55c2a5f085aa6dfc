"""TernaryBERT: encoders of two to eight bits, taught by the network they come from.

The fine-tuned 6-layer encoder is quantised (weights by tensor, word embedding by row, activations
to 8 bits by their own range) and learns from itself in floats: embeddings, hidden states,
attention scores and logits at once (Zhang et al. 2020). Positions, token types, norms, biases and
head stay float. CoLA, MRPC, RTE, STS-B: three seeds; SST-2: one epoch, one seed. Variants
on MRPC and CoLA, one seed: three bits up to the largest weight, up to a limit of least error, with
learned steps; loss-aware ternary, half the layers; what each loss gives, and eight bits at the rate
of two, on MRPC. Scores are those of the full dev sets; published figures are of BERT base.

What comes before the steps of a row: dropout is switched off (`set_dropout: 0`). Half the layers
starts from the encoder that `width_depth` cuts to them and the whole teaches; its settings are
those of all layers. It is taught by what it starts from; its baseline is the float encoder of all
layers.

Where this differs from the paper's code: weights and activations are not clipped to +-2.5; two and
three bits learn at 2e-4, there all at 2e-5; logits weigh twice what they do there (an average over
examples, not over classes too). Three bits up to the largest weight did not work: few of the levels
are used.
"""

from __future__ import annotations

import argparse
from typing import Any

from common import asked, published
from encoders import fine_tuned
from lowbit import (
    CORE,
    RATE,
    Rows,
    alone,
    joint,
    line,
    prediction,
    quantize,
    run,
    seeds,
    smaller,
    still,
    table,
    tasks,
    train,
)

from laconic import Attention, Hidden, Recipe, Result, Task
from laconic.step import Step
from laconic.weights import LearnedStep, LossAware, Quantize, Symmetric, Ternary

EIGHT = quantize(Symmetric(8), Symmetric(8, granularity="row"))
TERNARY = quantize(Ternary(), Ternary("row"))
TWN = "TernaryBERT TWN 2-2-8"
SHALLOW = f"{TWN}, half the layers"
ROWS: dict[str, Quantize] = {"8-8-8": EIGHT, TWN: TERNARY}
RATES = {"8-8-8": 2e-5}  # the usual one: they start near the floats
VARIANTS: dict[str, Quantize] = {
    "3-3-8": quantize(Symmetric(3), Symmetric(3, granularity="row")),
    "3-3-8, least error": quantize(
        Symmetric(3, range="mse"), Symmetric(3, granularity="row", range="mse")
    ),
    "3-3-8, learned steps": quantize(LearnedStep(3), LearnedStep(3, granularity="row")),
    "TernaryBERT LAT 2-2-8": quantize(LossAware(2), LossAware(2, granularity="row")),
}
# The dev sets; accuracy of MRPC, Pearson's correlation of STS-B.
PUBLISHED: dict[str, dict[str, float]] = {
    "8-8-8": {"CoLA": 60.6, "MRPC": 87.3, "RTE": 71.8, "STS-B": 89.7, "SST-2": 93.7},
    TWN: {"CoLA": 55.7, "MRPC": 87.5, "RTE": 72.9, "STS-B": 87.9, "SST-2": 92.8},
    "TernaryBERT LAT 2-2-8": {"CoLA": 54.3, "MRPC": 87.0},
    SHALLOW: {"CoLA": 53.0, "MRPC": 88.0},
}


def cells(
    options: argparse.Namespace, name: str, task: Task, methods: dict[str, tuple[Step, ...]]
) -> Rows:
    """Run methods on a task, from the fine-tuned encoder of every seed."""
    teachers = [fine_tuned(options, name, task, seed) for seed in seeds(options, name)]
    for label, steps in methods.items():
        if not asked(options, label):
            continue
        done = runs(options, name, task, label, steps)
        yield line(name, task, label, done, teachers=teachers, **figure(label, name))


def runs(
    options: argparse.Namespace, name: str, task: Task, label: str, steps: tuple[Step, ...]
) -> list[Result]:
    """Return what steps make of the fine-tuned encoder, of every seed."""
    place, done = f"{name}-{label.replace(' ', '-').replace(',', '')}", []
    for seed in seeds(options, name):
        start = still(fine_tuned(options, name, task, seed))
        done.append(run(options, f"{place}-{seed}", start, task, recipe(steps, seed)))
    return done


def made(options: argparse.Namespace, name: str, task: Task, label: str) -> list[Result]:
    """Return the encoders of a task in one row of the core, of every seed."""
    steps = (ROWS[label], *joint(name, rate=RATES.get(label, RATE)))
    return runs(options, name, task, label, steps)


def recipe(steps: tuple[Step, ...], seed: int) -> Recipe:
    """Return the steps as a recipe; the teacher's features are kept where they fit."""
    return Recipe(steps, seed=seed, recall="6 GB")


def figure(label: str, name: str) -> dict[str, Any]:
    """Return the paper's figure for a row."""
    setting = "TernaryTinyBERT, 6 layers" if label == SHALLOW else "BERT base, 12 layers"
    return published(PUBLISHED.get(label, {}).get(name), setting)


def ablation(options: argparse.Namespace, task: Task) -> Rows:
    """Run what each of the losses gives, and eight bits at the rate of two, on MRPC."""
    logits, hidden, scores = prediction("MRPC"), Hidden(), Attention()
    ways = {
        "logits alone": logits,
        "hidden states and logits": hidden + logits,
        "attention scores and logits": scores + logits,
        "hidden states and attention scores": hidden + scores,
    }
    methods = {
        f"{TWN}, {way}": (TERNARY, train("MRPC", objective)) for way, objective in ways.items()
    }
    methods[f"8-8-8 at {RATE:g}"] = (EIGHT, *joint("MRPC"))
    yield from cells(options, "MRPC", task, methods)


def half_depth(options: argparse.Namespace, name: str, task: Task) -> Rows:
    """Run the ternary encoder of half the layers."""
    if not asked(options, SHALLOW):
        return
    small = smaller(options, name, task, seed=0, cell=(1.0, 0.5))
    steps = (TERNARY, *joint(name))
    done = run(options, f"{name}-half-depth-0", still(small), task, recipe(steps, 0))
    teachers = [fine_tuned(options, name, task, 0)]
    yield line(name, task, SHALLOW, [done], teachers=teachers, **figure(SHALLOW, name))


def rows(options: argparse.Namespace) -> Rows:
    """Run the core of the table, then its variants."""
    for name, task in tasks(options, CORE).items():
        methods = {
            label: (step, *joint(name, rate=RATES.get(label, RATE))) for label, step in ROWS.items()
        }
        yield from cells(options, name, task, methods)
    options = alone(options)
    for name, task in tasks(options, ("MRPC", "CoLA")).items():
        methods = {label: (step, *joint(name)) for label, step in VARIANTS.items()}
        yield from cells(options, name, task, methods)
        yield from half_depth(options, name, task)
    for task in tasks(options, ("MRPC",)).values():
        yield from ablation(options, task)


if __name__ == "__main__":
    table("ternarybert", __doc__, rows)
