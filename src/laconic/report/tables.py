"""The tables of a report as columns of text, for the page and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laconic.ledger import FLOAT_BITS, Layer, Measurement, factor_text, ledger

__all__ = [
    "BYTES",
    "COUNTS",
    "LOSS",
    "MINUS",
    "NONE",
    "PARTS",
    "SHARE_GROUP",
    "SIZE_GROUPS",
    "Column",
    "Metric",
    "Scale",
    "byte_columns",
    "byte_scale",
    "condition_rows",
    "curve_columns",
    "curves_of",
    "heading",
    "layer_columns",
    "ledger_columns",
    "main_metric",
    "metrics_of",
    "parts_of",
    "rounded",
    "shape_text",
    "short_text",
    "sparsity",
    "step_names",
    "stored_bits",
    "times",
    "work_columns",
]

# Written as escapes: they are easily taken for the letter x and for hyphens.
NONE = "\u2013"
TIMES = "\u00d7"
MINUS = "\u2212"
LOSS = "loss"

# What the bytes of a file are, in the order of their drawing: field of a measurement -> word.
PARTS: dict[str, str] = {
    "code_bytes": "codes",
    "index_bytes": "positions",
    "table_bytes": "tables",
    "dense_bytes": "plain numbers",
    "header_bytes": "header",
}

# Units, the smallest first: name and size.
Units = Sequence[tuple[str, float]]
BYTES: Units = [("B", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)]
BINARY_BYTES: Units = [(name, 1024.0**n) for n, name in enumerate("B KiB MiB GiB TiB".split())]
COUNTS: Units = [("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12)]
# Groups of the ledger that say how small the file is and what it is made of.
SIZE_GROUPS = frozenset({"File size", "This step", "So far"})
SHARE_GROUP = "Share of file"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: above it.
        cells: one text per row.
        unit: of the numbers; empty: none.
        group: what it and its neighbours share.
        number: whether it is aligned to the right.

    >>> Column("Size", ("1", "2"), unit="kB").cells[0]
    '1'
    """

    title: str
    cells: tuple[str, ...]
    unit: str = ""
    group: str = ""
    number: bool = True


def heading(column: Column) -> str:
    """Return what stands above a column: its title, and its unit if it has one.

    >>> heading(Column("size", (), unit="kB"))
    'size, kB'
    """
    return ", ".join(part for part in (column.title, column.unit) if part)


@dataclass(frozen=True)
class Scale:
    """The unit in which a column of numbers is shown.

    >>> Scale("kB", 1000.0, 1).text(1500), Scale("kB", 1000.0, 1).text(None) == NONE
    ('1.5', True)
    """

    unit: str
    divisor: float
    decimals: int

    def text(self, value: float | None) -> str:
        """Return a value in the unit, without it."""
        if value is None or math.isnan(value):
            return NONE
        return f"{value / self.divisor:,.{self.decimals}f}"


def _scale(values: Iterable[float | None], units: Units) -> Scale:
    """Return the unit in which the smallest value keeps its digits and the largest is short."""
    known = sorted(abs(value) for value in values if value and math.isfinite(value))
    least, most = (known[0], known[-1]) if known else (0.0, 0.0)
    fits = [unit for unit in units if least >= 0.995 * unit[1] or most >= 1e3 * unit[1]]
    name, divisor = fits[-1] if fits else units[0]
    least, most = least / divisor, most / divisor
    wanted = 0 if least >= 100 else 1 if least >= 10 else 2
    room = 0 if most >= 1e4 else 1 if most >= 1e3 else 2
    return Scale(name, divisor, 0 if divisor == 1 else min(wanted, room))


def byte_scale(values: Iterable[float | None], base: int = 1000) -> Scale:
    """Return the unit for numbers of bytes.

    Args:
        values: of one column, in bytes.
        base: 1000 for kB, MB, ...; 1024 for KiB, MiB, ...

    >>> byte_scale([164_016, 9_675]).text(9_675), byte_scale([5]).unit
    ('9.68', 'B')
    """
    return _scale(values, BYTES if base == 1000 else BINARY_BYTES)


def _count_scale(values: Iterable[float | None]) -> Scale:
    return _scale(values, COUNTS)


def rounded(value: float, units: Units, digits: int) -> str:
    """Return an amount in the largest of its units that it reaches.

    >>> rounded(2_500_000, BYTES, 4), rounded(999, COUNTS, 3)
    ('2.5 MB', '999')
    """
    unit, divisor = [each for each in units if value >= each[1] or each is units[0]][-1]
    return f"{value / divisor:.{digits}g} {unit}".rstrip()


def _time_scale(values: Sequence[float | None]) -> Scale:
    most = max((value for value in values if value is not None), default=0.0)
    if most < 1000:
        return Scale("s", 1.0, 1)
    return Scale("min", 60.0, 1) if most < 60_000 else Scale("h", 3600.0, 1)


def times(factor: float) -> str:
    """Return a factor as shown.

    >>> times(6.3898) == f"6.39{TIMES}"
    True
    """
    return f"{factor_text(factor).removesuffix('x')}{TIMES}"


@dataclass(frozen=True)
class Metric:
    """A metric as shown: a percentage when every value lies between -1 and 1.

    >>> Metric("accuracy", True).text(0.9833), Metric("top5_accuracy", True).title
    ('98.33', 'Top5 accuracy')
    """

    name: str
    share: bool

    @property
    def title(self) -> str:
        """Return the name as a heading."""
        words = self.name.replace("_", " ")
        return words[:1].upper() + words[1:]

    @property
    def unit(self) -> str:
        """Return the unit of ``text``."""
        return "%" if self.share else ""

    def text(self, value: float | None) -> str:
        """Return a value without its unit."""
        if value is None or math.isnan(value):
            return NONE
        return f"{100 * value:.2f}" if self.share else f"{value:,.4f}"


def metrics_of(history: Sequence[Measurement]) -> list[Metric]:
    """Return what was scored, the loss last.

    >>> metrics_of([])
    []
    """
    names = list(dict.fromkeys(name for measured in history for name in measured.metrics))
    names.sort(key=lambda name: name == LOSS)
    return [Metric(name, name != LOSS and _within_one(history, name)) for name in names]


def main_metric(history: Sequence[Measurement]) -> Metric | None:
    """Return the metric that a run is judged by: the first one; the loss if there is no other.

    >>> main_metric([]) is None
    True
    """
    return next(iter(metrics_of(history)), None)


def _within_one(history: Sequence[Measurement], name: str) -> bool:
    values = [measured.metrics.get(name, 0.0) for measured in history]
    return all(-1 <= value <= 1 for value in values if math.isfinite(value))


def step_names(history: Sequence[Measurement]) -> list[str]:
    """Return the label of every step with its number, the original network being 0.

    >>> step_names([])
    []
    """
    return [f"{index} {measured.step}" for index, measured in enumerate(history)]


def ledger_columns(history: Sequence[Measurement]) -> list[Column]:
    """Return the ledger: a row per step, what it gained, what it cost.

    Args:
        history: the uncompressed network first.

    >>> [column.title for column in ledger_columns([])][:2]
    ['Step', '']
    """
    rows = ledger(history)
    columns = [
        Column("Step", tuple(step_names(history)), number=False),
        *_size_columns([row.size_bytes for row in rows]),
        Column("codes alone", tuple(times(row.nominal) for row in rows), group="This step"),
        Column("file", tuple(times(row.measured) for row in rows), group="This step"),
        Column("codes alone", tuple(times(row.nominal_total) for row in rows), group="So far"),
        Column("file", tuple(times(row.measured_total) for row in rows), group="So far"),
        Column("positions", _percent(row.index_share for row in rows), "%", SHARE_GROUP),
        Column("tables", _percent(row.table_share for row in rows), "%", SHARE_GROUP),
        *(
            Column(
                metric.title,
                tuple(metric.text(measured.metrics.get(metric.name)) for measured in history),
                metric.unit,
                "Scores",
            )
            for metric in metrics_of(history)
        ),
        Column("all", tuple(f"{row.parameters:,}" for row in rows), group="Parameters"),
        Column("non-zero", tuple(f"{row.nonzero:,}" for row in rows), group="Parameters"),
        *_forward_columns(history),
    ]
    seconds = [measured.seconds for measured in history]
    scale = _time_scale(seconds)
    return [*columns, Column("Time", tuple(map(scale.text, seconds)), scale.unit)]


def _size_columns(sizes: Sequence[int]) -> list[Column]:
    decimal, binary = byte_scale(sizes), byte_scale(sizes, 1024)
    return [
        Column("", tuple(map(decimal.text, sizes)), decimal.unit, "File size"),
        Column("", tuple(map(binary.text, sizes)), binary.unit, "File size"),
    ]


def _forward_columns(history: Sequence[Measurement]) -> list[Column]:
    """Return MACs and latency of one example; what was never measured is left out."""
    macs = [measured.macs for measured in history]
    latency = [measured.latency_ms for measured in history]
    found = [
        _number_column("MACs", macs, _count_scale(macs)),
        _number_column("latency", latency, Scale("ms", 1.0, 2)),
    ]
    return [column for column in found if set(column.cells) != {NONE}]


def _number_column(title: str, values: Sequence[float | None], scale: Scale) -> Column:
    return Column(title, tuple(map(scale.text, values)), scale.unit, "One example")


def work_columns(history: Sequence[Measurement]) -> list[Column]:
    """Return bit operations and peak memory of one example, each with its factor so far.

    What was never measured is left out; the steps stand alone when nothing was.

    >>> [column.title for column in work_columns([])]
    ['Step']
    """
    operations = [measured.bit_operations for measured in history]
    memory = [measured.peak_memory_bytes for measured in history]
    columns = [Column("Step", tuple(step_names(history)), number=False)]
    for group, values, scale in (
        ("Bit operations", operations, _count_scale(operations)),
        ("Peak memory", memory, byte_scale(memory)),
    ):
        if any(values):
            factors = tuple(_factor(values[0], value) for value in values)
            numbers = tuple(map(scale.text, values))
            columns += [
                Column("", numbers, scale.unit, group),
                Column("so far", factors, "", group),
            ]
    return columns


def _factor(before: float | None, after: float | None) -> str:
    return times(before / after) if before and after and after > 0 else NONE


def _percent(shares: Iterable[float]) -> tuple[str, ...]:
    return tuple(f"{share:.1%}".removesuffix("%") for share in shares)


def parts_of(measured: Measurement | Layer) -> dict[str, int]:
    """Return how many bytes of a file are codes, positions, tables, plain numbers, header.

    >>> list(PARTS.values())[0]
    'codes'
    """
    return {part: getattr(measured, part, 0) for part in PARTS}


def byte_columns(history: Sequence[Measurement]) -> list[Column]:
    """Return what the bytes of the file are after every step.

    >>> [column.title for column in byte_columns([])]
    ['Step', 'codes', 'positions', 'tables', 'plain numbers', 'header', 'file']
    """
    parts = [parts_of(measured) for measured in history]
    scale = byte_scale(measured.size_bytes for measured in history)
    return [
        Column("Step", tuple(step_names(history)), number=False),
        *(
            Column(word, tuple(scale.text(found[part]) for found in parts), scale.unit)
            for part, word in PARTS.items()
        ),
        Column("file", tuple(scale.text(one.size_bytes) for one in history), scale.unit),
    ]


def short_text(value: float) -> str:
    """Return a number in four digits.

    >>> short_text(0.0012341), short_text(math.nan) == NONE
    ('0.001234', True)
    """
    return NONE if math.isnan(value) else f"{value:.4g}"


def curves_of(measured: Measurement) -> dict[str, tuple[float, ...]]:
    """Return the curves that have a loss; empty: the step trained nothing."""
    return {part: losses for part, losses in measured.curves.items() if losses}


def curve_columns(measured: Measurement) -> list[Column]:
    """Return what the losses of a step's training began and ended with, part by part.

    >>> from laconic.measure import measure
    >>> from laconic.models import digits_cnn
    >>> found = measure(digits_cnn(), curves={"fc1": [2.0, 1.0, 0.5]})
    >>> [column.cells[0] for column in curve_columns(found)] == ["fc1", "2", "0.5", f"4{TIMES}"]
    True
    """
    ends = {part: (losses[0], losses[-1]) for part, losses in curves_of(measured).items()}
    return [
        Column("Part", tuple(ends), number=False),
        Column("first", tuple(short_text(first) for first, _ in ends.values()), group="Loss"),
        Column("last", tuple(short_text(last) for _, last in ends.values()), group="Loss"),
        Column("factor", tuple(_fall(*pair) for pair in ends.values()), group="Loss"),
    ]


def _fall(first: float, last: float) -> str:
    return f"{first / last:.3g}{TIMES}" if first > 0 and last > 0 else NONE


def shape_text(shape: Iterable[int]) -> str:
    """Return a shape as shown.

    >>> shape_text((10, 64)) == f"10 {TIMES} 64"
    True
    """
    return f" {TIMES} ".join(str(size) for size in shape)


def layer_columns(history: Sequence[Measurement]) -> list[Column]:
    """Return what every weight of the last measurement costs, beside what it cost at first.

    The two rows at the end are everything else of the file, and the file.

    Args:
        history: not empty.
    """
    first, last = history[0], history[-1]
    before = {layer.name: layer.size_bytes for layer in first.layers}
    scale = byte_scale([*before.values(), *(layer.size_bytes for layer in last.layers)])
    rows = [_layer_row(layer, before.get(layer.name), scale) for layer in last.layers]
    rest = [one.size_bytes - sum(layer.size_bytes for layer in one.layers) for one in history]
    rows.append(("everything else", "", "", "", "", "", *_sizes(rest[0], rest[-1], scale)))
    bits = f"{8 * last.size_bytes / max(last.parameters, 1):.2f}"
    zeros = _percent([sparsity(last)])[0]
    sizes = _sizes(first.size_bytes, last.size_bytes, scale)
    rows.append(("file", "", "", "", bits, zeros, *sizes))
    cells = list(zip(*rows, strict=True))
    inputs = (*(f"{layer.input_bits}" for layer in last.layers), "", "")
    rounded = any(layer.input_bits < FLOAT_BITS for layer in last.layers)
    return [
        Column("Layer", cells[0], number=False),
        Column("Shape", cells[1], number=False),
        Column("Representation", cells[2], number=False),
        *([Column("Bits of inputs", inputs)] if rounded else []),
        Column("code", cells[3], group="Bits per weight"),
        Column("stored", cells[4], group="Bits per weight"),
        Column("Sparsity", cells[5], "%"),
        Column("before", cells[6], scale.unit, "Size"),
        Column("after", cells[7], scale.unit, "Size"),
        Column("factor", cells[8], group="Size"),
    ]


def _layer_row(layer: Layer, before: int | None, scale: Scale) -> tuple[str, ...]:
    return (
        layer.name,
        shape_text(layer.shape),
        layer.representation,
        f"{layer.bits:.3g}",
        f"{stored_bits(layer):.2f}",
        *_percent([sparsity(layer)]),
        *_sizes(before, layer.size_bytes, scale),
    )


def _sizes(before: int | None, after: int, scale: Scale) -> tuple[str, str, str]:
    return scale.text(before), scale.text(after), _factor(before, after)


def stored_bits(layer: Layer) -> float:
    """Return the bits of the file per number of a weight: codes, positions and tables."""
    return 8 * layer.size_bytes / max(layer.parameters, 1)


def sparsity(of: Layer | Measurement) -> float:
    """Return the fraction of the numbers that are zero."""
    return 1 - of.nonzero / of.parameters if of.parameters else 0.0


def condition_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the figures depend on besides the recipe: task, seed, versions, machine.

    >>> condition_rows({"seed": 3, "environment": {"gpu": None, "threads": 2}})
    [('seed', '3'), ('threads', '2')]
    """
    task = facts.get("task") or {}
    classes = task.get("classes") or ()
    rows: dict[str, Any] = {
        "task": task.get("name"),
        "examples": task.get("examples"),
        "trained on": f"{len(task['drawn']):,} drawn examples" if task.get("drawn") else None,
        "classes": f"{len(classes):,}" if classes else None,
        "seed": str(facts.get("seed", "")),
        "network": facts.get("model_hash"),
        **(facts.get("environment") or {}),
    }
    return [(key, text) for key, value in rows.items() if (text := _value_text(value))]


def _value_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value_text(item) or 'none'}" for key, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
