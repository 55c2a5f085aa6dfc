"""BinaryBERT: encoders of one bit, from one of half the width whose ternary weights are split.

BWN: the fine-tuned 6-layer encoder, binary at once. TWS: the encoder of half the heads and neurons
becomes ternary and learns, each ternary layer is split into two binary ones that compute the same,
and these learn on (Bai et al. 2021). Teachers are the float networks of the same width; first
hidden states and attention scores, then logits. CoLA, MRPC, RTE, STS-B: three seeds;
SST-2: one epoch a stage, one seed. Adaptive splitting on MRPC and CoLA, one seed: under one size,
the parts that gain most stay ternary until they are split, or random ones, or those gaining least.
Scores are those of the full dev sets; published figures are of BERT base, without augmentation.

What comes before the steps of a row: dropout is switched off (`set_dropout: 0`). TWS and adaptive
splitting start from the encoder of half the width, cut and taught by the whole as its own row says.
In the rows of 1-1-4 ReLU takes the place of GELU in the student (`rectify`); the float teacher
keeps GELU. Times of a row are without that start.

TWS has both stages before the split and again after it, twice the updates of BWN, so a part of what
it gains may be the training's; "both stages twice" trains BWN as long, on MRPC and CoLA, one seed.
What TWS gains, over the tasks, and how much more time it took, is computed in docs/choosing.md.

Where this differs from the paper's code: activations of 8 bits have learned clips with asymmetric
levels everywhere, there symmetric ones for the inputs of query, key, value and projection; those of
4 bits have learned spacing, symmetric but for what is never negative, attention's probabilities and
what enters the second feed-forward layer, as there. The rate is 2e-4 in every stage on logits and
2.5 times that before it, there 1e-5 before the split and 5e-5 after it; batches have 32 examples,
there 16. The size under which parts are chosen, 3.6 MB, is what papers count; the files have a
header and a tokenizer beside.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

from common import asked, published
from encoders import fine_tuned
from lowbit import (
    BODY,
    CORE,
    Rows,
    alone,
    line,
    quantize,
    rectified,
    run,
    seeds,
    smaller,
    staged,
    still,
    table,
    tasks,
)

from laconic import Recipe, Result, Task
from laconic.step import Step
from laconic.structure import MaximalGain, MinimalGain, PlanSplit, RandomGain, Split
from laconic.structure.gains import Gain
from laconic.weights import (
    Binary,
    LearnedClip,
    LearnedSpacing,
    Quantize,
    Representation,
    Ternary,
)

CLIP = LearnedClip(8)
EVEN, POSITIVE = LearnedSpacing(4, levels="symmetric"), LearnedSpacing(4)
SECOND = "*.output.dense, !*.attention.*"
HALF, LONGER = "half width, floats", "BWN 1-1-8, both stages twice"
# The dev sets, without augmentation; the half width is DynaBERT's (Hou et al. 2020).
PUBLISHED = {
    HALF: {"CoLA": 58.4, "MRPC": 84.8, "RTE": 72.2, "STS-B": 89.8, "SST-2": 93.3},
    "BWN 1-1-8": {"CoLA": 46.7, "MRPC": 82.6, "RTE": 68.6, "STS-B": 86.8, "SST-2": 92.3},
    "TWS 1-1-8": {"CoLA": 53.4, "MRPC": 85.5, "RTE": 72.2, "STS-B": 88.6, "SST-2": 92.6},
    "BWN 1-1-4": {"CoLA": 34.8, "MRPC": 79.9, "RTE": 65.3, "STS-B": 84.9, "SST-2": 92.3},
    "TWS 1-1-4": {"CoLA": 44.4, "MRPC": 83.3, "RTE": 65.3, "STS-B": 87.2, "SST-2": 92.3},
}
# Bytes as papers count them: of the half-width encoder all binary about 2.6 MB, all split 4.6 MB.
ADAPTIVE = "size <= 3.6 MB"
CHOICES: dict[str, Gain] = {
    "maximal gain": MaximalGain(by="loss"),
    "random gain": RandomGain(),
    "minimal gain": MinimalGain(by="loss"),
}


def quantized(weight: Representation, embedding: Representation, bits: int) -> tuple[Step, ...]:
    """Return what represents weights, and rounds activations to so many bits."""
    if bits == 8:
        return (quantize(weight, embedding, CLIP),)
    first = quantize(weight, embedding, EVEN, probabilities=POSITIVE)
    return first, Quantize(activation=POSITIVE, scope=SECOND)


def binary(name: str, bits: int) -> tuple[Step, ...]:
    """Return what makes an encoder binary at once."""
    return (*quantized(Binary(), Binary("row"), bits), *staged(name))


def split(name: str, bits: int) -> tuple[Step, ...]:
    """Return what makes an encoder ternary, splits it, and trains both."""
    first = quantized(Ternary(), Ternary("row"), bits)
    return (*first, *staged(name), Split(), *staged(name))


WAYS: dict[str, Callable[[str, int], tuple[Step, ...]]] = {"BWN": binary, "TWS": split}


def longer(name: str) -> tuple[Step, ...]:
    """Return what makes an encoder binary at once, with as many updates as splitting has."""
    return (*binary(name, 8), *staged(name))


def adaptive(name: str, gain: Gain) -> tuple[Step, ...]:
    """Return what splits only some parts."""
    plan = PlanSplit(ADAPTIVE, choose=gain, scope=BODY)
    rounds = Quantize(activation=CLIP, scope=BODY)
    return (rounds, plan, *staged(name), Split(), *staged(name))


def rows(options: argparse.Namespace) -> Rows:
    """Run the core of the table, then adaptive splitting."""
    for name, task in tasks(options, CORE).items():
        whole = [fine_tuned(options, name, task, seed) for seed in seeds(options, name)]
        if asked(options, HALF):
            halves = _halves(options, name, task)
            yield line(name, task, HALF, halves, teachers=whole, **figure(HALF, name))
        for bits, way in itertools.product((8, 4), WAYS):
            label = f"{way} 1-1-{bits}"
            if asked(options, label):
                done = made(options, name, task, way, bits)
                yield line(name, task, label, done, teachers=whole, **figure(label, name))
    options = alone(options)
    for name, task in tasks(options, ("MRPC", "CoLA")).items():
        if asked(options, LONGER):
            whole = [fine_tuned(options, name, task, 0)]
            done = _runs(options, f"{name}-{LONGER}", task, whole, longer(name))
            yield line(name, task, LONGER, done, teachers=whole)
        for choice, gain in CHOICES.items():
            label = f"adaptive splitting 1-1-8, {choice}"
            if asked(options, label):
                whole, half = [fine_tuned(options, name, task, 0)], _halves(options, name, task)
                done = _runs(options, f"{name}-{label}", task, half, adaptive(name, gain))
                yield line(name, task, label, done, teachers=whole)


def made(options: argparse.Namespace, name: str, task: Task, way: str, bits: int) -> list[Result]:
    """Return the binary encoders of a task that are made in one way, of every seed."""
    if way == "TWS":
        starts = _halves(options, name, task)
    else:
        starts = [fine_tuned(options, name, task, seed) for seed in seeds(options, name)]
    steps = WAYS[way](name, bits)
    return _runs(options, f"{name}-{way} 1-1-{bits}", task, starts, steps, bits=bits)


def _halves(options: argparse.Namespace, name: str, task: Task) -> list[Result]:
    """Return the encoder of half the width, of every seed."""
    return [
        smaller(options, name, task, seed=seed, cell=(0.5, 1.0)) for seed in seeds(options, name)
    ]


def _runs(
    options: argparse.Namespace,
    label: str,
    task: Task,
    starts: list[Result],
    steps: tuple[Step, ...],
    *,
    bits: int = 8,
) -> list[Result]:
    place, done = label.replace(" ", "-").replace(",", ""), []
    for start in starts:
        whole, seed = still(start), start.recipe.seed
        student, teacher = (rectified(whole), whole) if bits == 4 else (whole, None)
        recipe = Recipe(steps, seed=seed, recall="6 GB")
        done.append(run(options, f"{place}-{seed}", student, task, recipe, teacher))
    return done


def figure(label: str, name: str) -> dict[str, Any]:
    """Return the paper's figure for a row."""
    setting = "BERT base, 12 layers"
    setting += "; one network for all widths, augmented data" * (label == HALF)
    setting += "; which correlation is not said" * (name == "STS-B")
    return published(PUBLISHED.get(label, {}).get(name), setting)


if __name__ == "__main__":
    table("binarybert", __doc__, rows)
