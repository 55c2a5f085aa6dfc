"""Examples of every registered step, with a tiny network and task in which each finds work."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from helpers.step_values import STEPS, built
from laconic.recover import (
    SGD,
    Cross,
    Gradient,
    Mixed,
    Parallel,
    ProximalWeights,
    Recalibrate,
    Reconstruct,
    Reset,
    Train,
)
from laconic.scope import Scope
from laconic.step import State, Step, run_step
from laconic.structure import (
    SVD,
    ChannelGhosts,
    DataSVD,
    DropLayers,
    Factorize,
    Ghost,
    LayerDrop,
    MaximalGain,
    PlanSplit,
    Prune,
    Random,
    RandomGain,
    Rewire,
    ShareLayers,
    Split,
    Taylor,
    TensorTrain,
    Top,
)
from laconic.tasks import Task
from laconic.weights import MixedPrecision, Percentile, Quantize, QuantNoise, Symmetric, Ternary

FEW = Gradient(3, batch=8)


# What a step's defaults do not show: for each, whether it draws random numbers.
EXAMPLES: dict[str, dict[Step, bool]] = {
    "drop_layers": {DropLayers(Top(1)): False},
    "factorize": {
        Factorize(SVD(), scope=Scope("last*")): False,
        Factorize(TensorTrain(1), scope=Scope("last*")): False,
        Factorize(DataSVD(1, batches=1, batch=8), scope=Scope("last*")): True,
    },
    "ghost": {Ghost(ChannelGhosts()): False},
    "layer_drop": {LayerDrop(0.5, retrain=Train(batch=8)): True},
    "mixed_precision": {MixedPrecision(batches=2, batch=8): False},
    "plan_split": {
        PlanSplit("size <= 0.2x", choose=RandomGain()): False,
        PlanSplit("size <= 1x", choose=MaximalGain(batches=1, batch=8)): False,
    },
    "prune": {
        Prune("weights", keep=0.5): False,
        Prune("weights", keep=0.3, ranking="global", by=Taylor(batches=1, batch=8)): True,
        Prune("weights", keep=0.5, by=Random()): True,
        Prune("weights", keep=0.4, rounds=2, retrain=Train(batch=8)): True,
        Prune("channels", keep=0.5): False,
        Prune("neurons", keep=0.5, by=Taylor(batches=1, batch=8), ranking="global"): True,
    },
    "quant_noise": {QuantNoise(0.5, proxy="zero", retrain=Train(batch=8)): True},
    "quantize": {
        Quantize(4): False,
        Quantize(Symmetric(4, rounding="stochastic")): True,
        Quantize(4, activation=8): False,
        Quantize(activation=Percentile(4)): True,
    },
    "recalibrate": {Recalibrate(2, batch=8): True},
    "reconstruct": {
        Reconstruct(solve=Gradient(3)): False,
        Reconstruct(solve=Gradient(6, penalty=ProximalWeights(0.5)), feed=Cross(0.5)): False,
        Reconstruct(parts="block", solve=FEW): True,
        Reconstruct(parts=2, feed=Mixed(), order=Parallel(2), solve=FEW): True,
    },
    "reset": {Reset(): True},
    "rewire": {Rewire("channels"): False},
    "share_layers": {ShareLayers("mean"): False},
    "split": {Split(): False},
    "train": {
        Train(batch=8, optimizer=SGD(0.1)): True,
        Train(batch=8, during=(Prune("weights", keep=0.5),)): True,
    },
}


# Steps that want an attention of torch's, which others cannot round the inputs of.
ATTENDING = ("unpack",)


# What must have run before a step.
BEFORE: dict[str, tuple[Step, ...]] = {"split": (Quantize(Ternary()),)}


def examples() -> Iterator[tuple[Step, bool]]:
    """Yield every step worth testing, and whether it draws; a new one needs no entry."""
    for name, kind in STEPS.items():
        yield from EXAMPLES.get(name, {built(kind): False}).items()


each_step = pytest.mark.parametrize(
    ("step", "draws"), [pytest.param(*item, id=repr(item[0])) for item in examples()]
)


class Block(nn.Module):
    """Something to drop or share: it adds to what enters it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 8), nn.Linear(8, 16)
        self.activation = nn.GELU()

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.outer(self.activation(self.inner(hidden)))


class Tiny(nn.Module):
    """A BatchNorm, dropout, a scalar, a list of blocks and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: nn.Module | None = None
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm, self.relu = nn.BatchNorm2d(4), nn.PReLU()
        self.pool, self.drop = nn.AdaptiveAvgPool2d(2), nn.Dropout(0.1)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.middle, self.last = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.drop(self.pool(self.relu(self.norm(self.conv(images)))).flatten(1))
        for block in self.blocks:
            hidden = block(hidden)
        scores = self.last(self.middle(hidden))
        if self.attention is None:
            return scores
        words = images.flatten(1).unflatten(1, (9, 4))
        return scores + self.attention(words, words, words)[0].mean((1, 2))[:, None]


def tiny_network(step: Step | None = None, *, attends: bool = False) -> Tiny:
    """Return a network in which a step, of whatever kind, finds something to do."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Tiny()
        if attends or (step is not None and step.name in ATTENDING):
            network.attention = nn.MultiheadAttention(4, 2, batch_first=True)
    network.middle.bias.requires_grad_(False)
    for before in BEFORE.get(step.name, ()) if step is not None else ():
        run_step(before, State(network))
    return network.eval()


def another_network() -> nn.Module:
    """Return what there is to learn from: other numbers, so that it makes a difference."""
    network = tiny_network()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.25)
    return network.requires_grad_(False)


TEACHERS = (another_network(),)


@functools.cache
def tiny_task() -> Task:
    generator = torch.Generator().manual_seed(0)
    # More than a batch of 32: of all examples in one, no order would show in a range.
    labels = torch.arange(36) % 3
    images = torch.randn(36, 1, 6, 6, generator=generator) + labels[:, None, None, None]
    return Task((images, labels), (images[:9], labels[:9]), (images[:6], labels[:6]))
