"""Speed of smaller networks in plain torch, beside the dense network in the same run.

BERT base at sequence length 128 with half the heads and neurons, and with half the layers;
ResNet-56 and VGG-16 with half the channels. Writes benchmarks/results/structure.json. Dense and
small take turns, so that whatever else the machine does slows both.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import write
from torch import nn

from laconic.models import families, resnet56, vgg
from laconic.structure.axes import find_axes, slice_
from laconic.structure.surgery import keep_

THREADS, ROUNDS = 2, 7
Inputs = dict[str, torch.Tensor] | tuple[torch.Tensor, ...]


def bert() -> tuple[nn.Module, Inputs]:
    """Return an untrained BERT base and one sentence of 128 tokens."""
    from transformers import BertConfig, BertForSequenceClassification

    tokens = torch.randint(0, 30_000, (1, 128))
    return BertForSequenceClassification(BertConfig()).eval(), {"input_ids": tokens}


def images(model: nn.Module) -> tuple[nn.Module, Inputs]:
    """Return a CIFAR network and eight images."""
    return model.eval(), (torch.randn(8, 3, 32, 32),)


def halved(model: nn.Module, inputs: Inputs, *kinds: str) -> nn.Module:
    """Return a copy with the first half of every axis of these kinds."""
    small = copy.deepcopy(model)
    axes = find_axes(small, **inputs) if isinstance(inputs, dict) else find_axes(small, *inputs)
    chosen = [axis for axis in axes if axis.kind in kinds and axis.frozen is None and axis.size > 1]
    slice_(small, {axis: range(axis.size // 2) for axis in chosen})
    return small


def half_deep(model: nn.Module) -> nn.Module:
    """Return a copy with every second block."""
    small = copy.deepcopy(model)
    path = families.blocks_path(small)
    keep_(small, path, range(0, len(small.get_submodule(path)), 2))
    return small


def cases() -> Iterator[tuple[str, nn.Module, nn.Module, Inputs]]:
    """Yield name, dense network, small network and inputs."""
    model, inputs = bert()
    yield (
        "BERT base, half the heads and neurons",
        model,
        halved(model, inputs, "head", "neuron"),
        inputs,
    )
    yield "BERT base, half the layers", model, half_deep(model), inputs
    for name, model in (("ResNet-56", resnet56()), ("VGG-16", vgg(16))):
        model, inputs = images(model)
        yield f"{name}, half the channels", model, halved(model, inputs, "channel"), inputs


def in_turns(dense: Callable[[], Any], small: Callable[[], Any]) -> tuple[float, float, float]:
    """Return the median seconds of each and the median of the ratios of each round."""
    seconds: list[tuple[float, float]] = []
    for _ in range(ROUNDS + 1):  # the first one warms up
        times = []
        for forward in (dense, small):
            began = time.perf_counter()
            for _ in range(3):
                forward()
            times.append((time.perf_counter() - began) / 3)
        seconds.append((times[0], times[1]))
    kept = seconds[1:]
    ratio = statistics.median(before / after for before, after in kept)
    return statistics.median(d for d, _ in kept), statistics.median(s for _, s in kept), ratio


def parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def measured(name: str, dense: nn.Module, small: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return the row of a case."""

    def forward(model: nn.Module) -> Any:
        return model(**inputs) if isinstance(inputs, dict) else model(*inputs)

    with torch.inference_mode():
        before, after, ratio = in_turns(lambda: forward(dense), lambda: forward(small))
    counts = f"{parameters(dense)} -> {parameters(small)} parameters"
    return {
        "row": name,
        "metric": "milliseconds a forward, median",
        "ours": 1000 * after,
        "baseline": 1000 * before,
        "ratio": ratio,
        "seconds": after,
        "note": f"{counts}; baseline and ratio: the dense network, in turns in the same run",
    }


def main() -> None:
    """Time every case and write the result file."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    rows = []
    for case in cases():
        rows.append(measured(*case))
        print(f"{rows[-1]['row']}: {rows[-1]['ratio']:.2f}x", flush=True)
    write("structure", rows, packages=("torch", "transformers"), threads=THREADS)


if __name__ == "__main__":
    main()
