"""Measurement: what a network costs and scores after a step, and the ledger of a run."""

from __future__ import annotations

import dataclasses
import itertools
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from laconic import costs
from laconic.costs import bit_operations, environment, float_bytes, latency, macs, peak_memory
from laconic.errors import RunError
from laconic.models.rounding import INPUT
from laconic.names import module_of
from laconic.scope import Scope
from laconic.ship.artifact import save
from laconic.ship.inventory import Inventory, inspect
from laconic.sizes import SizeReport, size_report
from laconic.tasks.task import device_of
from laconic.weights.laid import Laid, laid_tensors, owner, weights_of
from laconic.weights.quantizer import activations_of, attention_paths
from laconic.weights.representation import POSITION

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = [
    "Layer",
    "LedgerRow",
    "Measurement",
    "SizeReport",
    "Table",
    "bit_operations",
    "environment",
    "factor_text",
    "float_bytes",
    "latency",
    "ledger",
    "ledger_table",
    "macs",
    "measure",
    "peak_memory",
    "size_report",
    "size_text",
]

BINS = 41
# Points of a loss curve that are kept, and their digits: enough to draw it.
POINTS = 100
DIGITS = 6


@dataclass(frozen=True)
class Layer:
    """What one weight (a matrix, a kernel, or anything laid) costs.

    Attributes:
        name: of the tensor, dotted.
        shape: of the tensor.
        parameters: numbers in it.
        survivors: of these, not pruned; a surviving weight may have the value zero.
        nonzero: of these, not zero as the network uses them.
        bits: of the code of one survivor; 32 for float32. Tables and positions not counted.
        representation: "float", "kmeans 5 bit", ...
        code_bytes, index_bytes, table_bytes: its share of the file, once it is represented.
        dense_bytes: its share of the file as plain numbers, while it is not.
        macs: multiply-accumulates of one example; None: not measured.
        histogram: of the non-zero values: ``counts`` [41] from ``low`` to ``high``.
        input_bits: width of the numbers it is multiplied with.

    >>> from laconic.models import digits_cnn
    >>> measure(digits_cnn()).layers[0].name
    'conv1.weight'
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    survivors: int
    nonzero: int
    bits: float
    representation: str
    code_bytes: int
    index_bytes: int
    table_bytes: int
    dense_bytes: int
    macs: int | None
    histogram: Mapping[str, Any]
    input_bits: int = costs.FLOAT_BITS

    @property
    def size_bytes(self) -> int:
        """Return its share of the file."""
        return self.code_bytes + self.index_bytes + self.table_bytes + self.dense_bytes


@dataclass(frozen=True)
class Measurement:
    """What a network costs and scores after a step of a recipe.

    Attributes:
        step: label: "original", "prune", "train", ...
        parameters: numbers the network learns, a shared one once.
        nonzero: of these, not zero.
        size_bytes: of the artefact on disk; the sum of the five that follow.
        code_bytes: codes; the values of pruned float weights.
        index_bytes: positions of surviving weights.
        table_bytes: codebooks, scales and the coders' tables.
        dense_bytes: numbers stored as they are.
        header_bytes: manifest and listing.
        nominal_bits: bits of every code and float parameter, positions and tables ignored, as
            papers count: 32 / bits / density.
        macs: multiply-accumulates of one example; None where there is no task.
        bit_operations: of one example (see costs.bit_operations).
        latency_ms: median of a forward of one example.
        peak_memory_bytes: of a forward of one example (see costs.peak_memory).
        metrics: what the task scores.
        seconds: the step took.
        layers: the weights one by one.
        curves: the losses of the step's training, by what was trained; long ones are averaged.

    >>> from laconic.models import digits_cnn
    >>> found = measure(digits_cnn(), step="original")
    >>> found.parameters, Measurement.from_data(found.to_data()) == found
    (40506, True)
    """

    step: str
    parameters: int
    nonzero: int
    size_bytes: int
    code_bytes: int
    index_bytes: int
    table_bytes: int
    dense_bytes: int
    header_bytes: int
    nominal_bits: int
    macs: int | None
    bit_operations: int | None
    latency_ms: float | None
    peak_memory_bytes: int | None
    metrics: Mapping[str, float]
    seconds: float
    layers: tuple[Layer, ...] = field(repr=False)
    curves: Mapping[str, tuple[float, ...]] = field(default_factory=dict, repr=False)

    def to_data(self) -> dict[str, Any]:
        """Return the measurement as JSON-able data; a metric that is no number as its name."""
        data = dataclasses.asdict(self)
        data["metrics"] = {name: _jsonable(value) for name, value in self.metrics.items()}
        data["layers"] = [layer | {"shape": list(layer["shape"])} for layer in data["layers"]]
        data["curves"] = {name: [*map(_jsonable, each)] for name, each in self.curves.items()}
        return data

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """Return the measurement that ``to_data`` described.

        Raises:
            RunError: fields are missing or unknown.
        """
        _check_fields(cls, data)
        for layer in data["layers"]:
            _check_fields(Layer, layer)
        layers = [Layer(**{**layer, "shape": tuple(layer["shape"])}) for layer in data["layers"]]
        metrics = {name: float(value) for name, value in data["metrics"].items()}
        curves = {name: tuple(map(float, each)) for name, each in data.get("curves", {}).items()}
        changed = {"metrics": metrics, "layers": tuple(layers), "curves": curves}
        return cls(**{**data, **changed})


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
    forward = {} if task is None else _forward_costs(plain, task, latency)
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
        return _written(model, task, Path(folder) / "model.safetensors")


def _forward_costs(plain: nn.Module, task: Task, timed: bool) -> dict[str, Any]:
    batch = task.example_batch(1).to(device_of(plain))
    return {
        "counts": costs.macs(plain, batch, call=task.call),
        "latency_ms": costs.latency(plain, batch, call=task.call) if timed else None,
        "peak_memory_bytes": costs.peak_memory(plain, batch, call=task.call),
    }


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
    return tuple(replace(each, input_bits=_bits_into(rounded, each.name)) for each in found)


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
    operands = [places for places in activations_of(model).values() if INPUT not in places]
    every = len(operands) == len(attention_paths(model)) and operands
    widths = (activation.bits for places in operands for activation in places.values())
    bits = max(widths) if every else costs.FLOAT_BITS
    return costs.bit_operations(layers, macs, operand_bits=bits)


def _input_bits(model: nn.Module) -> dict[str, int]:
    """Return the width of what goes into each module that rounds it."""
    return {
        path: places[INPUT].bits
        for path, places in activations_of(model).items()
        if INPUT in places
    }


def _bits_into(rounded: Mapping[str, int], name: str) -> int:
    """Return the width of what a weight is multiplied with; halves see what their layer does."""
    path = module_of(name)
    return rounded.get(path, rounded.get(path.rpartition(".")[0], costs.FLOAT_BITS))


def _code(weight: Tensor, laid: tuple[Laid, Tensor] | None) -> tuple[int, float, str]:
    """Return survivors, bits of each and the representation in words."""
    plain_bits = 8.0 * weight.element_size()
    if laid is None:
        return weight.numel(), plain_bits, "float"
    layer, latent = laid
    streams = layer.encode(latent).streams
    position = streams.get(POSITION)
    survivors = latent.numel() if position is None else int(position.tensor.sum())
    coded = [stream for name, stream in streams.items() if name != POSITION]
    words = layer.representation.name.replace("_", " ")
    if not coded:
        return survivors, plain_bits, words
    bits = float(sum(stream.bits for stream in coded))
    if survivors:
        bits = sum(stream.bits * stream.tensor.numel() for stream in coded) / survivors
    return survivors, bits, f"{words} {bits:g} bit"


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


def _jsonable(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _check_fields(kind: type, data: Mapping[str, Any]) -> None:
    fields = dataclasses.fields(kind)
    # What has a default is younger than the first history.
    missing = dataclasses.MISSING
    needed = {f.name for f in fields if f.default is missing and f.default_factory is missing}
    wrong = sorted((needed - set(data)) | (set(data) - {f.name for f in fields}))
    if wrong:
        raise RunError(
            f"a {kind.__name__.lower()} of the history lacks or does not know {', '.join(wrong)}; "
            "it was written by another version of laconic: measure again"
        )


@dataclass(frozen=True)
class LedgerRow:
    """What one step of a run contributed, nominally and on disk.

    Attributes:
        step: label.
        predicted: factor of the step: nominal bits before / after.
        measured: the same on disk: file size before / after.
        predicted_total: the product of the predicted factors so far.
        measured_total: first file size / this one.
        size_bytes: of the artefact.
        index_share, table_share: of the file, 0 to 1.
        parameters, nonzero: of the network.
        metrics: what the task scores.
        seconds: the step took.

    >>> from laconic.models import digits_cnn
    >>> ledger([measure(digits_cnn())])[0].measured_total
    1.0
    """

    step: str
    predicted: float
    measured: float
    predicted_total: float
    measured_total: float
    size_bytes: int
    index_share: float
    table_share: float
    parameters: int
    nonzero: int
    metrics: Mapping[str, float]
    seconds: float


def ledger(history: Sequence[Measurement]) -> list[LedgerRow]:
    """Return what each step contributed: their factors multiply to the factor of all.

    ``predicted = 32 / (bits * density)`` counts codes alone; ``measured`` counts the file with
    positions, tables and header, so the two columns show what the papers' count leaves out.

    Args:
        history: at least the uncompressed network, first.

    >>> ledger([])
    []
    """
    return [
        LedgerRow(
            step=now.step,
            predicted=before.nominal_bits / max(now.nominal_bits, 1),
            measured=before.size_bytes / now.size_bytes,
            predicted_total=history[0].nominal_bits / max(now.nominal_bits, 1),
            measured_total=history[0].size_bytes / now.size_bytes,
            size_bytes=now.size_bytes,
            index_share=now.index_bytes / now.size_bytes,
            table_share=now.table_bytes / now.size_bytes,
            parameters=now.parameters,
            nonzero=now.nonzero,
            metrics=now.metrics,
            seconds=now.seconds,
        )
        for before, now in zip([*history[:1], *history], history, strict=False)
    ]


@dataclass(frozen=True)
class Table:
    """A table as text: what the terminal and the report both print.

    >>> Table(("a", "b"), (("1", "2"),)).rows[0][1]
    '2'
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def ledger_table(history: Sequence[Measurement]) -> Table:
    """Return the ledger as text: one row per measurement, every metric but the loss.

    A metric is a percentage when all its values lie between -1 and 1.

    >>> ledger_table([]).columns[:2]
    ('Step', 'Size')
    """
    rows = ledger(history)
    metrics = {
        name: [row.metrics.get(name) for row in rows]
        for name in dict.fromkeys(name for row in rows for name in row.metrics if name != "loss")
    }
    columns = {
        "Step": [row.step for row in rows],
        "Size": [size_text(row.size_bytes) for row in rows],
        "Predicted": [factor_text(row.predicted) for row in rows],
        "Measured": [factor_text(row.measured) for row in rows],
        "Predicted, all": [factor_text(row.predicted_total) for row in rows],
        "Measured, all": [factor_text(row.measured_total) for row in rows],
        "Index": [f"{row.index_share:.1%}" for row in rows],
        "Tables": [f"{row.table_share:.1%}" for row in rows],
        "Parameters": [f"{row.parameters:,}" for row in rows],
        "Non-zero": [f"{row.nonzero:,}" for row in rows],
        **{name.capitalize(): _metric_texts(values) for name, values in metrics.items()},
        "Time": [_time_text(row.seconds) for row in rows],
    }
    return Table(tuple(columns), tuple(zip(*columns.values(), strict=True)))


def size_text(size: int) -> str:
    """Return a number of bytes in decimal and in binary units.

    >>> size_text(1_070_000), size_text(999)
    ('1.07 MB (1.02 MiB)', '999 B')
    """
    if size < 1000:
        return f"{size} B"
    decimal, binary = _scaled(size, 1000, "kMGT"), _scaled(size, 1024, "KMGT")
    return f"{decimal}B ({binary}iB)"


def _scaled(size: int, base: int, prefixes: str) -> str:
    # 999,999 bytes round to 1.00 MB, not to 1000 kB.
    exponent = next(e for e in (1, 2, 3, 4) if e == 4 or round(size / base**e, 1) < base)
    value = size / base**exponent
    return f"{value:.{2 if value < 10 else 1}f} {prefixes[exponent - 1]}"


def factor_text(factor: float) -> str:
    """Return a factor with three significant digits.

    >>> factor_text(6.3898), factor_text(34.08), factor_text(120.4)
    ('6.39x', '34.1x', '120x')
    """
    digits = 2 if factor < 9.995 else 1 if factor < 99.95 else 0
    return f"{factor:.{digits}f}x"


def _metric_texts(values: Sequence[float | None]) -> list[str]:
    known = [value for value in values if value is not None]
    share = all(-1 <= value <= 1 for value in known if math.isfinite(value))
    shown = "{:.2%}" if share else "{:.4g}"
    return ["-" if value is None else shown.format(value) for value in values]


def _time_text(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"
