"""Runs of every kind, stopped at any moment at which they may write, end in the same bytes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers.resuming import (
    Stopped,
    artefact,
    count_moments,
    network,
    poisoned,
    quicken,
    short,
    small_task,
    three,
    told,
)
from laconic.recipe import Recipe
from laconic.recover import (
    L1,
    L2,
    SGD,
    Adam,
    AdamW,
    Constant,
    Cosine,
    Final,
    Hidden,
    Label,
    Logits,
    Stop,
)
from laconic.run import compress
from laconic.step import Step
from laconic.structure import (
    SVD,
    ChannelGhosts,
    DataSVD,
    DropLayers,
    Factorize,
    Geometric,
    Ghost,
    Gradual,
    LayerDrop,
    MaximalGain,
    PlanSplit,
    Prune,
    Random,
    ShareLayers,
    Soft,
    Split,
    Taylor,
    Top,
)
from laconic.weights import KMeans, Quantize, Symmetric, Ternary

GRADUAL = Prune("weights", keep=0.2, schedule=Gradual(end=0.5))


class Residual(nn.Module):
    """Three blocks that add to what enters them."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.first = nn.Flatten(), nn.Linear(64, 12)
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.last = nn.Linear(12, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(self.flat(images))
        for block in self.blocks:
            hidden = hidden + block(hidden).relu()
        return self.last(hidden)


def residual() -> Residual:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Residual()


def frozen() -> nn.Module:
    model = network()
    model[6].weight.requires_grad_(False)
    return model


LESSON = 0.5 * Label() + 0.5 * Logits(4.0)
# What they have in common with EVERYTHING is left out.
VARIANTS: dict[str, tuple[Callable[[], nn.Module], list[Step], str]] = {
    "the mask is laid while Adam is at work": (
        network,
        [short(epochs=4, optimizer=Adam(5e-3, clip=1.0), during=(GRADUAL,), stop=Stop(patience=1))],
        "float32",
    ),
    "the best epoch is behind": (
        network,
        [short(epochs=6, optimizer=AdamW(0.1, decay=Constant()), stop=Stop(patience=3))],
        "float32",
    ),
    "the last epoch is kept": (
        network,
        [short(epochs=3, stop=Stop(patience=2, keep="last"), optimizer=SGD(0.1, momentum=0.0))],
        "float32",
    ),
    "momentum, penalty and noise": (
        network,
        [
            Quantize(Symmetric(4, rounding="stochastic")),
            short(epochs=2, optimizer=SGD(0.05, nesterov=True), penalty=L1(1e-4)),
            short(epochs=2, optimizer=SGD(0.05, decay=Cosine(warmup=0.5)), penalty=L2(1e-4)),
        ],
        "float32",
    ),
    "bfloat16": (
        network,
        [short(epochs=2, during=(GRADUAL,)), Quantize(KMeans(2)), short(epochs=2)],
        "bfloat16",
    ),
    "rounds ranked by chance and by gradients": (
        network,
        [
            Prune("weights", keep=0.5, by=Random(), rounds=2, retrain=short()),
            Prune(
                "weights",
                keep=0.2,
                by=Taylor(batches=1),
                rounds=2,
                ranking="global",
                schedule=Geometric(),
                retrain=short(epochs=2),
            ),
        ],
        "float32",
    ),
    "rounds inside rounds": (
        network,
        [
            Prune(
                "weights",
                keep=0.2,
                rounds=2,
                retrain=Prune("weights", scope="kind:linear", keep=0.1, rounds=2, retrain=short()),
            )
        ],
        "float32",
    ),
    "several matrices in a module, ties among equal codes": (
        three,
        [
            Quantize(Ternary()),
            short(epochs=2, penalty=L1(1e-3)),
            Prune("weights", keep=0.7, ranking="global", retrain=short()),
        ],
        "float32",
    ),
    "channels in rounds, then codes, with a teacher": (
        network,
        [
            Prune(
                "channels",
                keep=0.5,
                by=Taylor(batches=1),
                rounds=2,
                retrain=short(objective=LESSON),
            ),
            Quantize(Ternary()),
            short(objective=LESSON, epochs=2),
        ],
        "float32",
    ),
    "neurons masked while training, then cut": (
        network,
        [
            short(epochs=3, during=(Prune("neurons", keep=0.5, schedule=Gradual(end=0.5)),)),
            Prune("neurons", keep=1),
            short(),
        ],
        "float32",
    ),
    "a part of it ternary, split and trained again": (
        network,
        [
            PlanSplit("size <= 500 B", choose=MaximalGain(batches=1, by="loss")),
            short(epochs=2),
            Split(),
            short(epochs=2, objective=LESSON),
        ],
        "float32",
    ),
    "blocks dropped, shared and left out at random": (
        residual,
        [
            DropLayers(Top(1)),
            ShareLayers("mean"),
            LayerDrop(0.5, retrain=short(objective=Hidden(map=Final()), epochs=2)),
        ],
        "float32",
    ),
    "softly pruned, at moments between updates": (
        network,
        [short(epochs=2, during=(Prune("weights", keep=0.3, schedule=Soft(), rounds=5),))],
        "float32",
    ),
    "factors of a frozen layer": (
        frozen,
        [Factorize(SVD(2), scope="6"), short(optimizer=AdamW(1e-2), epochs=2)],
        "float32",
    ),
    "factors and ghosts": (
        network,
        [Ghost(ChannelGhosts()), Factorize(DataSVD(4, batches=1, batch=8), scope="6"), short()],
        "float32",
    ),
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with poisoned():
        quicken(monkeypatch)
        yield


def check_moments(name: str, out: Path, *, share: float) -> None:
    """Stop a run at a share of the moments at which it may write; resume and compare."""
    build, steps, precision = VARIANTS[name]
    recipe, task = Recipe(steps, seed=5, precision=precision), small_task()
    with pytest.MonkeyPatch.context() as patch:
        total = count_moments(patch)
        compress(build(), task, recipe, out=out / "whole")
    chosen = random.Random(0).sample(range(1, total[0] + 1), max(3, round(share * total[0])))
    for moment in sorted(chosen):
        folder = out / str(moment)
        with pytest.MonkeyPatch.context() as patch:
            count_moments(patch, moment)
            with pytest.raises(Stopped):
                compress(build(), task, recipe, out=folder)
        compress(build(), task, recipe, out=folder, resume=True)
        assert artefact(folder) == artefact(out / "whole"), f"moment {moment} of {total[0]}"
        assert told(folder) == told(out / "whole"), f"moment {moment} of {total[0]}"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_goes_on_from_any_moment(name: str, tmp_path: Path) -> None:
    check_moments(name, tmp_path, share=0.2)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_goes_on_from_every_moment(name: str, tmp_path: Path) -> None:
    check_moments(name, tmp_path, share=1.0)
