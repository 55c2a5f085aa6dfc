"""What a network costs and scores, measured: the size is that of a written file."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from laconic import costs
from laconic.costs import bit_operations, environment, float_bytes, latency, macs, peak_memory
from laconic.errors import ArtifactError, ModelError, RunError
from laconic.ledger import FLOAT_BITS, Layer, Measurement
from laconic.models.rounding import INPUT, OPERANDS, quantizers_of
from laconic.names import module_of
from laconic.own import explained
from laconic.scope import KINDS, Scope
from laconic.ship.artifact import save
from laconic.ship.inventory import Inventory, inspect
from laconic.sizes import SizeReport, size_report
from laconic.tasks.task import device_of
from laconic.weights.laid import Laid, laid_tensors, owner, owners_of, weights_of
from laconic.weights.quantizer import activations_of, attention_paths
from laconic.weights.representation import POSITION

if TYPE_CHECKING:
    from laconic.tasks import Batch, Task

__all__ = [
    "Measurement",
    "SizeReport",
    "bit_operations",
    "environment",
    "float_bytes",
    "forward_costs",
    "latency",
    "macs",
    "measure",
    "peak_memory",
    "size_report",
]

BINS = 41
# Points of a loss curve that are kept, and their digits: enough to draw it.
POINTS = 100
DIGITS = 6


def measure(
    model: nn.Module,
    task: Task | None = None,
    *,
    step: str = "",
    seconds: float = 0.0,
    path: Path | None = None,
    split: str = "test",
    latency: bool = True,
    curves: Mapping[str, Sequence[float]] | None = None,
) -> Measurement:
    """Return what a network costs and scores; the size is that of a written artefact.

    Args:
        model: laid or plain; unchanged.
        task: scores the network and gives the example that forwards are measured with.
        step: label.
        seconds: how long the step took.
        path: where the artefact goes; None: a temporary file.
        split: which examples are scored.
        latency: whether to time forwards, for at most about a second.
        curves: every loss of the step's training, by what was trained.

    Raises:
        ArtifactError: the network cannot be stored.

    >>> from laconic.models import digits_cnn
    >>> found = measure(digits_cnn())
    >>> found.size_bytes == found.dense_bytes + found.header_bytes
    True
    """
    # First: what does not fit the data is refused by score, which says why.
    metrics = {} if task is None else task.score(model, split)
    inventory = _written(model, task, path)
    plain = costs.plain(model)
    forward = {} if task is None else forward_costs(plain, task, timed=latency)
    counts = forward.pop("counts", {})
    layers = _layers(model, plain, inventory, counts)
    total = counts.get(costs.TOTAL)
    parameters = list(plain.parameters())
    return Measurement(
        step=step,
        parameters=sum(parameter.numel() for parameter in parameters),
        nonzero=sum(int(parameter.count_nonzero()) for parameter in parameters),
        size_bytes=inventory.size_bytes,
        code_bytes=inventory.code_bytes,
        index_bytes=inventory.index_bytes,
        table_bytes=inventory.table_bytes,
        dense_bytes=inventory.dense_bytes,
        header_bytes=inventory.header_bytes,
        nominal_bits=_nominal_bits(plain, layers),
        macs=total,
        bit_operations=None if total is None else _bit_operations(model, layers, total),
        latency_ms=forward.get("latency_ms"),
        peak_memory_bytes=forward.get("peak_memory_bytes"),
        metrics=metrics,
        seconds=seconds,
        layers=layers,
        curves={name: averaged(losses) for name, losses in (curves or {}).items()},
    )


def averaged(losses: Sequence[float], points: int = POINTS) -> tuple[float, ...]:
    """Return a curve of at most so many points: the means of equal stretches, in six digits.

    >>> averaged([4.0, 2.0, 1.0, 1.0], points=2)
    (3.0, 1.0)
    """
    count = min(points, len(losses))
    edges = [index * len(losses) // max(count, 1) for index in range(count + 1)]
    means = (sum(losses[start:end]) / (end - start) for start, end in itertools.pairwise(edges))
    return tuple(float(f"{mean:.{DIGITS}g}") for mean in means)


def _written(model: nn.Module, task: Task | None, path: Path | None) -> Inventory:
    if path is not None:
        save(model, path, task=task, probe=True)
        return inspect(path)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return _written(model, task, Path(folder) / "model.safetensors")
        except ArtifactError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            raise RunError(
                f"the network cannot be written to be measured ({error.__cause__}); make room in "
                f"{Path(folder).parent}, or set TMPDIR to another folder"
            ) from error


def forward_costs(plain: nn.Module, task: Task, *, timed: bool = True) -> dict[str, Any]:
    """Return what a forward on a single example costs.

    Args:
        plain: a network without represented weights.
        task: gives the example and calls the network.
        timed: whether the latency is measured.

    Returns:
        "counts": multiply-accumulates by layer; "latency_ms", None unless timed;
        "peak_memory_bytes".

    Raises:
        ModelError: the network does not take a single example, or lets inputs pass unrounded
            that are to be rounded.

    >>> from laconic.models import digits_cnn
    >>> from laconic.tasks import digits
    >>> forward_costs(digits_cnn(), digits(), timed=False)["counts"][costs.TOTAL]
    616064
    """
    batch = task.example_batch(1).to(device_of(plain))
    with explained(
        "the network cannot be called with a single example, for which costs are counted",
        "let it take batches of one (BatchNorm with running statistics does)",
    ):
        return {
            "counts": _counts(plain, batch, task),
            "latency_ms": costs.latency(plain, batch, call=task.call) if timed else None,
            "peak_memory_bytes": costs.peak_memory(plain, batch, call=task.call),
        }


def _counts(plain: nn.Module, batch: Batch, task: Task) -> dict[str, int]:
    """Return the multiply-accumulates of a forward; refuse inputs that pass it unrounded.

    Raises:
        ModelError: a layer rounds its input and is never called, though its weight is at work.
    """
    rounded: set[str] = set()
    asked = {path: places for path, places in quantizers_of(plain).items() if INPUT in places}
    with ExitStack() as hooks:
        for path, places in asked.items():
            hook = places[INPUT].register_forward_hook(lambda *_, path=path: rounded.add(path))
            hooks.enter_context(hook)
        counts = costs.macs(plain, batch, call=task.call)
    at_work = {module_of(name) for name, count in counts.items() if count}
    for path in asked:
        if path in at_work - rounded:
            raise ModelError(
                f"the network computes with the weight of '{path}' itself and never calls this "
                "layer, so its input is not rounded; let the network call it, or leave it out of "
                f"the scope of quantize with '!{path}'"
            )
    return counts


def _layers(
    model: nn.Module, plain: nn.Module, inventory: Inventory, counts: Mapping[str, int]
) -> tuple[Layer, ...]:
    laid = laid_tensors(model)
    weights = weights_of(plain, Scope("*"))
    for name in inventory.layers:  # a laid vector is no matrix, but has codes
        if name not in weights:
            module, attribute = owner(plain, name)
            weights[name] = getattr(module, attribute)
    rounded = _input_bits(model)
    found = (
        _layer(name, weight, laid.get(name), inventory, counts.get(name))
        for name, weight in weights.items()
    )
    return tuple(
        replace(each, input_bits=_bits_into(rounded, _multiplying(plain, weights[each.name])))
        for each in found
    )


def _layer(
    name: str,
    weight: Tensor,
    laid: tuple[Laid, Tensor] | None,
    inventory: Inventory,
    count: int | None,
) -> Layer:
    survivors, bits, representation = _code(weight, laid)
    code, index, table = inventory.layers.get(name, (0, 0, 0))
    return Layer(
        name=name,
        shape=tuple(weight.shape),
        parameters=weight.numel(),
        survivors=survivors,
        nonzero=int(weight.count_nonzero()),
        bits=bits,
        representation=representation,
        code_bytes=code,
        index_bytes=index,
        table_bytes=table,
        dense_bytes=0 if laid is not None else weight.nbytes,
        macs=count,
        histogram=_histogram(weight),
    )


def _bit_operations(model: nn.Module, layers: Sequence[Layer], macs: int) -> int:
    rounded = activations_of(model)
    widths = (
        rounded[path][place].bits if place in rounded.get(path, {}) else FLOAT_BITS
        for path in attention_paths(model)
        for place in OPERANDS
    )
    return costs.bit_operations(layers, macs, operand_bits=max(widths, default=FLOAT_BITS))


def _input_bits(model: nn.Module) -> dict[str, int]:
    """Return the width of what goes into each module that rounds it."""
    return {
        path: places[INPUT].bits
        for path, places in activations_of(model).items()
        if INPUT in places
    }


def _bits_into(rounded: Mapping[str, int], paths: Iterable[str]) -> int:
    """Return the width of what a weight is multiplied with, the widest of all layers it is of.

    Halves see what their layer does.
    """
    widths = (rounded.get(path, rounded.get(path.rpartition(".")[0], FLOAT_BITS)) for path in paths)
    return max(widths, default=FLOAT_BITS)


def _multiplying(model: nn.Module, weight: Tensor) -> list[str]:
    """Return the modules of a weight but for embeddings, which multiply it with nothing."""
    paths = map(module_of, owners_of(model, weight))
    return [p for p in paths if not isinstance(model.get_submodule(p), KINDS["embedding"])]


def _code(weight: Tensor, laid: tuple[Laid, Tensor] | None) -> tuple[int, float, str]:
    """Return survivors, bits of each and the representation in words."""
    plain_bits = 8.0 * weight.element_size()
    if laid is None:
        return weight.numel(), plain_bits, "float"
    layer, latent = laid
    codes = layer.encode(latent)
    streams = codes.streams
    position = streams.get(POSITION)
    survivors = latent.numel() if position is None else int(position.tensor.sum())
    coded = [stream for name, stream in streams.items() if name != POSITION]
    words = layer.representation.name.replace("_", " ")
    if not coded:
        return survivors, plain_bits, words
    bits = float(sum(stream.bits for stream in coded))
    if survivors:
        kept = sum(8 * codes.tables[name].nbytes for name in layer.representation.verbatim)
        bits = sum(stream.bits * stream.tensor.numel() for stream in coded) / survivors
        bits += kept / survivors
    return survivors, bits, f"{words} {bits:.4g} bit"


def _nominal_bits(plain: nn.Module, layers: Sequence[Layer]) -> int:
    own = {layer.name for layer in layers}
    rest = [tensor for name, tensor in plain.named_parameters() if name not in own]
    coded = sum(layer.survivors * layer.bits for layer in layers)
    return round(coded) + sum(8 * tensor.nbytes for tensor in rest)


def _histogram(weight: Tensor) -> dict[str, Any]:
    values = weight.detach().float().cpu().flatten()
    values = values[values.isfinite() & (values != 0)]
    bound = float(values.abs().max()) if values.numel() else 0.0
    counts = values.histc(BINS, -bound, bound) if bound else torch.zeros(BINS)
    return {"low": -bound, "high": bound, "counts": [int(count) for count in counts]}
