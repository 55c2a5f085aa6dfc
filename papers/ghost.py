"""Ghosts: what they cost BERT-base, and what they give an encoder with half of its heads.

The cost (GhostBERT, Huang et al. 2021) is counted on a network of BERT-base's shape at 128 tokens.
On MRPC, half of the heads of the fine-tuned 6-layer encoder, the least important, are cut; what is
left learns from the full encoder (hidden states, embeddings, logits), without ghosts, with the
paper's, and with ghosts whose gain is learned from 0. Scores are those of the full dev set.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from common import costs, parser, row, spread, write_table
from encoders import RATE, fine_tuned, glue, score
from torch import nn

from laconic import Hidden, Logits, Prune, Recipe, Train, compress
from laconic.costs import macs
from laconic.recover import AdamW, Linear
from laconic.step import State, Step, run_step
from laconic.structure import Ghost, HeadImportance, TokenGhosts

TOKENS = 128
WAYS: dict[str, tuple[Step, ...]] = {
    "no ghosts": (),
    "ghosts": (Ghost(TokenGhosts()),),
    "ghosts, learned gain": (Ghost(TokenGhosts(gain="learned")),),
}


def cost() -> dict[str, Any]:
    """Return the row of what ghosts add to BERT-base."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model, batch = BertModel(BertConfig()), torch.zeros(1, TOKENS, dtype=torch.long)
    numbers, products = parameters(model), macs(model, batch)[""]
    state = State(model)
    run_step(Ghost(TokenGhosts()), state)
    more = parameters(state.model) - numbers
    flops = 2 * (macs(state.model, batch)[""] - products)
    print(f"BERT-base: {more:,} parameters and {flops:,} FLOPs more", flush=True)
    return row(
        row="BERT-base, all heads, parameters of its ghosts",
        task=f"counted at {TOKENS} tokens",
        metric="parameters",
        ours=more,
        baseline=0,
        published=55_296,
        note=f"{flops:,} FLOPs (published 14.2 million)",
    )


def parameters(model: nn.Module) -> int:
    """Return how many numbers a network learns."""
    return sum(parameter.numel() for parameter in model.parameters())


def gains(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row for each way to go on with half the heads."""
    task = glue(options, "MRPC")
    cut = Prune("heads", keep=0.5, by=HeadImportance(batches=8, batch=32))
    train = Train(
        Hidden() + Logits(loss="cross_entropy"),
        epochs=3,
        batch=32,
        optimizer=AdamW(RATE, clip=1.0, decay=Linear(warmup=0.1)),
    )
    for way, ghosts in WAYS.items():
        teachers, done = [], []
        for seed in range(options.seeds):
            teachers.append(fine_tuned(options, "MRPC", task, seed))
            recipe = Recipe((cut, *ghosts, train), seed=seed, precision="bfloat16")
            out = options.work / "ghost" / f"{way.replace(' ', '-').replace(',', '')}-{seed}"
            model = teachers[-1].baked()
            done.append(compress(model, task, recipe, out=out, resume=True))
        scores = [score(result, task) for result in done]
        mean, deviation = spread(scores)
        print(f"half the heads, {way}: {scores}", flush=True)
        yield row(
            row=f"6-layer encoder, half the heads, {way}",
            task="MRPC dev",
            metric=f"{task.main_metric} x 100",
            ours=mean,
            std=deviation,
            seeds=len(done),
            baseline=statistics.fmean(score(teacher, task) for teacher in teachers),
            **costs(done),
            note=f"{done[0].history[-1].parameters:,} parameters, before training "
            f"{[round(100 * r.history[-2].metrics[task.main_metric], 2) for r in done]}; "
            f"{done[0].recipe.steps!r}",
        )


def main() -> None:
    """Run the table and write what is finished after every row."""
    options = parser(__doc__).parse_args()
    write_table("ghost", itertools.chain([cost()], gains(options)))


if __name__ == "__main__":
    main()
