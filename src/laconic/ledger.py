"""Ledger: what a network cost and scored after every step of a run, as data and as text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from laconic.errors import RunError

__all__ = [
    "FLOAT_BITS",
    "Layer",
    "LedgerRow",
    "Measurement",
    "Table",
    "comparison_table",
    "excess_text",
    "factor_text",
    "ledger",
    "ledger_table",
    "size_text",
]

FLOAT_BITS = 32


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

    >>> from laconic.measure import measure
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
    input_bits: int = FLOAT_BITS

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
        nominal_bits: codes alone, as papers count: bits of every code and float parameter,
            positions and tables ignored.
        macs: multiply-accumulates of one example; None where there is no task.
        bit_operations: of one example (see costs.bit_operations).
        latency_ms: median of a forward of one example.
        peak_memory_bytes: of a forward of one example (see costs.peak_memory).
        metrics: what the task scores.
        seconds: the step took.
        layers: the weights one by one.
        curves: the losses of the step's training, by what was trained; long ones are averaged.

    >>> from laconic.measure import measure
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
            RunError: fields are missing, unknown or absurd.
        """
        _check_fields(cls, data)
        if not data["size_bytes"] > 0 or not math.isfinite(data["seconds"]):
            raise RunError(
                f"a measurement of {data['size_bytes']} bytes in {data['seconds']} s is none"
            )
        for layer in data["layers"]:
            _check_fields(Layer, layer)
        layers = [Layer(**{**layer, "shape": tuple(layer["shape"])}) for layer in data["layers"]]
        metrics = {name: float(value) for name, value in data["metrics"].items()}
        curves = {name: tuple(map(float, each)) for name, each in data.get("curves", {}).items()}
        changed = {"metrics": metrics, "layers": tuple(layers), "curves": curves}
        return cls(**{**data, **changed})


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
    """What one step of a run contributed: to its codes alone, and to the file.

    Attributes:
        step: label.
        nominal: factor of the codes alone: nominal bits before / after.
        measured: factor of the file: its size before / after.
        nominal_total: the product of the nominal factors so far.
        measured_total: first file size / this one.
        size_bytes: of the artefact.
        index_share, table_share: of the file, 0 to 1.
        parameters, nonzero: of the network.
        metrics: what the task scores.
        seconds: the step took.

    >>> from laconic.measure import measure
    >>> from laconic.models import digits_cnn
    >>> ledger([measure(digits_cnn())])[0].measured_total
    1.0
    """

    step: str
    nominal: float
    measured: float
    nominal_total: float
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

    ``nominal = 32 / (bits * density)`` counts codes alone, as papers do; ``measured`` counts the
    file with positions, tables and header, so the two show what the papers' count leaves out.

    Args:
        history: at least the uncompressed network, first.

    >>> ledger([])
    []
    """
    return [
        LedgerRow(
            step=now.step,
            nominal=before.nominal_bits / max(now.nominal_bits, 1),
            measured=before.size_bytes / now.size_bytes,
            nominal_total=history[0].nominal_bits / max(now.nominal_bits, 1),
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
        "Codes alone": [factor_text(row.nominal) for row in rows],
        "File": [factor_text(row.measured) for row in rows],
        "Codes alone, all": [factor_text(row.nominal_total) for row in rows],
        "File, all": [factor_text(row.measured_total) for row in rows],
        "Index": [f"{row.index_share:.1%}" for row in rows],
        "Tables": [f"{row.table_share:.1%}" for row in rows],
        "Parameters": [f"{row.parameters:,}" for row in rows],
        "Non-zero": [f"{row.nonzero:,}" for row in rows],
        **{name.capitalize(): _metric_texts(values) for name, values in metrics.items()},
        "Time": [_time_text(row.seconds) for row in rows],
    }
    return Table(tuple(columns), tuple(zip(*columns.values(), strict=True)))


def comparison_table(runs: Mapping[str, Sequence[Measurement]]) -> Table:
    """Return what runs came to as text: a row for each, every metric but the loss.

    Factors are those of a run's result to the network that it began with.

    Args:
        runs: name -> what was measured of it, the uncompressed network first.

    >>> comparison_table({}).columns[:3]
    ('Run', 'Steps', 'Size')
    """
    rows = {name: ledger(history) for name, history in runs.items()}
    names = dict.fromkeys(name for found in rows.values() for name in found[-1].metrics)
    columns = {
        "Run": list(rows),
        "Steps": [" > ".join(row.step for row in found[1:]) for found in rows.values()],
        "Size": [size_text(found[-1].size_bytes) for found in rows.values()],
        "Codes alone": [factor_text(found[-1].nominal_total) for found in rows.values()],
        "File": [factor_text(found[-1].measured_total) for found in rows.values()],
        "Parameters": [f"{found[-1].parameters:,}" for found in rows.values()],
        "Non-zero": [f"{found[-1].nonzero:,}" for found in rows.values()],
    }
    for metric in (name for name in names if name != "loss"):
        for title, place in ((f"{metric.capitalize()} before", 0), (metric.capitalize(), -1)):
            scored = [found[place].metrics.get(metric) for found in rows.values()]
            columns[title] = _metric_texts(scored)
    seconds = [sum(row.seconds for row in found) for found in rows.values()]
    columns["Time"] = list(map(_time_text, seconds))
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


def excess_text(exceeded: Mapping[str, float]) -> str:
    """Return by how much a budget is exceeded, as ``Budget.exceeded_by`` found it.

    >>> excess_text({"size_bytes": 1_070_000.0, "macs": 40.5})
    '1.07 MB (1.02 MiB) in size, 41 in macs'
    """
    return ", ".join(_excess(field, amount) for field, amount in exceeded.items())


def _excess(field: str, amount: float) -> str:
    text = f"{math.ceil(amount):,}"
    if field.endswith("_bytes"):
        text = size_text(math.ceil(amount))
    elif field.endswith("_ms"):
        text = f"{amount:.3g} ms"
    quantity = re.sub("^peak_|_(bytes|ms)$", "", field)
    return f"{text} in {quantity.replace('_', ' ')}"


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
