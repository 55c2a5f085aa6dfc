"""Deep Compression on MNIST: LeNet-300-100 and LeNet-5, factor on disk and accuracy.

Baseline from scratch, then the shipped chain: prune while training, share weights, fine-tune
the codebook, entropy-code. Factor = bytes of the float32 safetensors file over bytes of the
compressed file, everything in it. Published: 40x at 1.58 % error, 39x at 0.74 % error.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from common import data_folder, file_bytes, parser, row, seconds_of, spread, write_results
from torch import nn

from laconic import KMeans, Prune, Quantize, Recipe, Result, Task, Train, compress
from laconic.measure import float_bytes
from laconic.models import lenet_5, lenet_300_100
from laconic.recover import Adam, Stop
from laconic.structure import Gradual
from laconic.tasks import mnist


@dataclasses.dataclass(frozen=True)
class Network:
    """What is compressed, how far, and what the paper reports."""

    name: str
    build: Callable[[], nn.Module]
    published: float
    factor: float
    epochs: int
    points: tuple[tuple[float, int], ...]  # (fraction kept, bits of an index)


NETWORKS = (
    Network("LeNet-300-100", lenet_300_100, 98.42, 40.0, 20, ((0.08, 5), (0.04, 4), (0.025, 3))),
    Network("LeNet-5", lenet_5, 99.26, 39.0, 12, ((0.03, 4), (0.012, 3))),
)
DECAY = 1e-4


def baseline(network: Network, task: Task, seed: int, out: Path) -> nn.Module:
    """Train from scratch."""
    torch.manual_seed(seed)
    train = Train(epochs=network.epochs, optimizer=Adam(2e-3, weight_decay=DECAY))
    recipe = Recipe((train,), seed=seed, precision="bfloat16")
    return compress(network.build(), task, recipe, out=out, resume=True).baked()


def chain(network: Network, keep: float, bits: int, seed: int) -> Recipe:
    """Return prune + retrain, weight sharing, codebook fine-tuning."""
    prune = Prune("weights", keep=keep, ranking="global", schedule=Gradual(end=0.6))
    retrain = Train(
        epochs=network.epochs,
        optimizer=Adam(2e-3, weight_decay=DECAY),
        stop=Stop(keep="last"),
        during=(prune,),
    )
    share = (Quantize(KMeans(bits)), Train(epochs=4, optimizer=Adam(3e-4), stop=Stop(keep="last")))
    return Recipe((retrain, *share), seed=seed, precision="bfloat16")


def main() -> None:
    """Run the table."""
    options = parser(__doc__).parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    task = mnist(data_folder(options) / "mnist")
    rows = []
    for network in NETWORKS:
        results: dict[tuple[float, int], list[Result]] = {point: [] for point in network.points}
        for seed in range(options.seeds):
            work = options.work / "deep_compression" / f"{network.name}-{seed}"
            model = baseline(network, task, seed, work / "baseline")
            for keep, bits in network.points:
                recipe = chain(network, keep, bits, seed)
                out = work / f"keep{keep}-bits{bits}"
                results[keep, bits].append(compress(model, task, recipe, out=out, resume=True))
        plain = float_bytes(network.build())
        rows += [line(network, point, done, plain) for point, done in results.items()]
        print(write_results("deep_compression", rows))


def line(network: Network, point: tuple[float, int], done: list[Result], plain: int):
    """Return one row of the accuracy-size curve."""
    first, last = [r.history[0] for r in done], [r.history[-1] for r in done]
    accuracy, deviation = spread([100 * m.metrics["accuracy"] for m in last])
    base, base_deviation = spread([100 * m.metrics["accuracy"] for m in first])
    size, _ = spread([file_bytes(result) for result in done])
    falls = [
        100 * (b.metrics["accuracy"] - a.metrics["accuracy"])
        for b, a in zip(first, last, strict=True)
    ]
    print(f"{network.name} {point}: {accuracy:.2f} % (baseline {base:.2f}), {plain / size:.1f}x")
    return row(
        row=f"{network.name} keep {point[0]:g}, {point[1]} bit codebook",
        task="MNIST test",
        metric="accuracy %",
        ours=accuracy,
        std=deviation,
        seeds=len(done),
        baseline=base,
        published=network.published,
        published_setting=f"{network.factor:g}x, own baseline and pruning schedule",
        size_bytes=round(size),
        ratio=plain / size,
        seconds=seconds_of(done),
        note=f"float32 safetensors {plain} bytes; baseline std {base_deviation}; points lost per "
        f"seed {', '.join(f'{fall:.2f}' for fall in falls)}",
    )


if __name__ == "__main__":
    main()
