"""Tables of docs/choosing.md, rendered from papers/results: nothing is typed by hand."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from figures import loaded, table

from laconic.report.tables import byte_scale

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "choosing.md"
BEGIN, END = r"(<!-- (?P<name>[\w-]+): from papers/results -->\n)", "(<!-- end -->)"
MARKED = re.compile(f"{BEGIN}.*?{END}", re.DOTALL)

Row = Mapping[str, Any]
TASKS = ("CoLA", "MRPC", "RTE", "STS-B", "SST-2")
EASIER = ("SST-2", "STS-B", "MRPC", "RTE")
DEV = {name: name for name in TASKS}


# ------------------------------------------------------------------ one table


@dataclass(frozen=True)
class Grid:
    """A table of scores.

    Attributes:
        rows: label -> file and name of the row; ``{}`` is where the word of a column goes.
        columns: heading -> word; where no name has a place for it, the task.
        task: of all cells; None: each column's.
        shown: how a cell is written.
        corner: what the lines are.
        last: heading -> what is said of all the rows of a line.
        below: what stands in a line at the end, label -> of the rows of a column.
    """

    rows: Mapping[str, tuple[str, str]]
    columns: Mapping[str, str]
    shown: Callable[[Row], str]
    task: str | None = None
    corner: str = ""
    last: Mapping[str, Callable[[Sequence[Row]], str]] = field(default_factory=dict)
    below: Mapping[str, Callable[[Sequence[Row]], str]] = field(default_factory=dict)

    def text(self) -> str:
        """Return it as Markdown."""
        lines, by_column = [], {heading: [] for heading in self.columns}
        for label, (file, name) in self.rows.items():
            cells = {
                heading: found(file, self.task or f"{word} dev", name.format(word))
                for heading, word in self.columns.items()
            }
            for heading, row in cells.items():
                by_column[heading] += [row] if row else []
            there = [row for row in cells.values() if row]
            line = [self.shown(row) if row else "" for row in cells.values()]
            lines.append([label, *line, *(say(there) for say in self.last.values())])
        for label, say in self.below.items():
            tail = [""] * len(self.last)
            lines.append([label, *(say(rows) for rows in by_column.values()), *tail])
        return table(lines, [self.corner, *self.columns, *self.last])


@cache
def by_name(file: str) -> dict[tuple[str, str], Row]:
    """Return the rows of a file by task and name."""
    return {(row["task"], row["row"]): row for row in loaded(file)["rows"]}


def found(file: str, task: str, name: str) -> Row | None:
    """Return a row, or None where it has not been run."""
    return by_name(file).get((task, name))


# ------------------------------------------------------------------ cells


def score(row: Row) -> str:
    """Return a score."""
    return f"{row['ours']:.1f}"


def precise(row: Row) -> str:
    """Return a score to two places."""
    return f"{row['ours']:.2f}"


def spread(row: Row) -> str:
    """Return a score and its standard deviation."""
    return f"{row['ours']:.1f} ± {row['std']:.1f}" if row["std"] else score(row)


def beside_floats(row: Row) -> str:
    """Return a score, and what it is above its own floats."""
    return f"{row['ours']:.1f} ({loss(row):+z.1f})"


def loss(row: Row) -> float:
    """Return what a score is above its own floats, of the same seeds and machines."""
    return row["ours"] - row["baseline"]


def size(rows: Sequence[Row]) -> str:
    """Return the size of files."""
    mean = statistics.fmean(row["size_bytes"] for row in rows)
    unit = byte_scale([mean])
    return f"{unit.text(mean)} {unit.unit}"


def minutes(rows: Sequence[Row]) -> str:
    """Return how long runs took."""
    taken = sorted({round(row["seconds"] / 60) for row in rows})
    return " to ".join(str(each) for each in dict.fromkeys((taken[0], taken[-1])))


def seeds(rows: Sequence[Row]) -> str:
    """Return of how many seeds rows are."""
    counts = sorted({row["seeds"] or 1 for row in rows})
    return " to ".join(str(each) for each in dict.fromkeys((counts[0], counts[-1])))


def apart(rows: Sequence[Row]) -> str:
    """Return how far the seeds of a row are from each other, at most."""
    drawn = [row["scores"].values() for row in rows if len(row.get("scores") or ()) > 1]
    return f"{max(max(each) - min(each) for each in drawn):.1f}" if drawn else ""


def mean_loss(*tasks: str) -> Callable[[Sequence[Row]], str]:
    """Return what says the mean of losses over tasks, with its standard error."""

    def said(rows: Sequence[Row]) -> str:
        losses = [loss(row) for row in rows if row["task"].removesuffix(" dev") in tasks]
        return with_error(losses)

    return said


def with_error(values: Sequence[float]) -> str:
    """Return a mean, with its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):+z.1f} ± {error:.1f}"


# ------------------------------------------------------------------ split against binary at once


def split_gains() -> str:
    """Return what split networks are above those that were binary at once."""
    lines = [gain_line(bits) for bits in (8, 4)]
    mean = "mean, ± standard error"
    return table(lines, ["activations", *TASKS, mean, "the paper's", "bytes", "seconds"])


def gain_line(bits: int) -> list[str]:
    """Return the line of one width of activations."""
    pairs = [
        [found("binarybert", f"{task} dev", f"{way} 1-1-{bits}") for way in ("TWS", "BWN")]
        for task in TASKS
    ]
    gains = [gain(*pair) for pair in pairs]
    paper = [split["published"] - plain["published"] for split, plain in pairs]
    more = [times(pairs, cost) for cost in ("size_bytes", "seconds")]
    each = [f"{value:+z.1f}" for value in gains]
    return [f"{bits} bits", *each, with_error(gains), with_error(paper), *more]


def gain(split: Row, plain: Row) -> float:
    """Return the difference of two rows, over the seeds that both have."""
    both = [
        split["scores"][seed] - plain["scores"][seed]
        for seed in split["scores"].keys() & plain["scores"].keys()
    ]
    return statistics.fmean(both)


def times(pairs: Iterable[Sequence[Row]], cost: str) -> str:
    """Return how many times as much the first ones of pairs take as the second ones."""
    first, second = (sum(row[cost] for row in rows) for rows in zip(*pairs, strict=True))
    return f"{first / second:.2f}x"


# ------------------------------------------------------------------ all of them


def resnet(way: str, kind: str, network: str) -> tuple[str, str]:
    """Return the file and the name of a row of few data."""
    return "cross_distillation", f"{network}, {way}, {kind}, {{}} images of a class"


def few(kind: str, network: str, ways: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return the rows of few data."""
    return {label: resnet(way, kind, network) for label, way in ways.items()}


LEARNING = {
    "cut alone (`prune`)": "L1-norm",
    "then trained on labels": "BP",
    "then taught stage by stage (`hint`)": "FitNet",
}
CLOSED = {"`greedy` (ThiNet)": "ThiNet", "`lasso` (CP)": "CP", "`pointwise` (FSKD)": "FSKD"}
DESCENT = {
    "descent, fed by itself": "w/o CD",
    "descent, `{cross: 0.6}`": "CD",
    "descent, `{soft_cross: {teacher: 0.7, student: 0.7}}`": "SCD",
}
TWN = "TernaryBERT TWN 2-2-8"
BELOW = {"seeds": seeds, "seeds of a row apart, at most": apart}
TABLES: dict[str, Callable[[], str]] = {
    "anew": Grid(
        {
            label: ("rethinking", f"resnet20, {cut} pruned, {{}}")
            for label, cut in {
                "80 % of the weights": "80 % of weights",
                "95 % of the weights": "95 % of weights",
                "half the channels": "50 % of channels",
            }.items()
        },
        {
            "fine-tuned": "fine-tuned 5 epochs",
            "anew, 15 epochs": "scratch-E 15 epochs",
            "anew, 30 epochs": "scratch-B 30 epochs",
        },
        score,
        task="CIFAR-10 test",
        corner="cut",
    ).text,
    "widths": Grid(
        {
            label: ("quantization", f"resnet20, {name}, activations of 8 bits")
            for label, name in {
                **{f"{bits} bits": f"weights of {bits} bits" for bits in (8, 4, 3)},
                **{name: f"{name} weights" for name in ("ternary", "binary")},
            }.items()
        },
        {"accuracy, %": ""},
        precise,
        task="CIFAR-10 test",
        corner="weights",
        last={"file": size},
    ).text,
    "encoders": Grid(
        {
            "8-8-8, taught by itself": ("ternarybert", "8-8-8"),
            "2-2-8, taught by itself": ("ternarybert", TWN),
        },
        DEV,
        beside_floats,
        last={"all five": mean_loss(*TASKS), "without CoLA": mean_loss(*EASIER), "file": size},
        below=BELOW,
    ).text,
    "other-ways": Grid(
        {
            "8-8-8 from labels, after Q8BERT": ("quantization", "Q8BERT 8-8-8"),
            "groups of 2 and 4 bits from labels, after Q-BERT": ("quantization", "Q-BERT 2/4-8-8"),
            "3-4-32 without training (`gobo`)": ("quantization", "GOBO 3-4-32"),
            "2-2-32 without training": ("quantization", "GOBO 2-2-32"),
            "2-8-8 from labels": ("quantization", "Q2BERT 2-8-8"),
            "3-3-8, learned steps": ("ternarybert", "3-3-8, learned steps"),
            "3-3-8, range of least error": ("ternarybert", "3-3-8, least error"),
            "3-3-8, range up to the largest weight": ("ternarybert", "3-3-8"),
            "2-2-8, loss-aware": ("ternarybert", "TernaryBERT LAT 2-2-8"),
            "2-2-8, half the layers": ("ternarybert", f"{TWN}, half the layers"),
            "product quantisation from labels, after Quant-Noise": (
                "quantization",
                "Quant-Noise PQ",
            ),
            "the same, the last training taught": (
                "quantization",
                "Quant-Noise PQ, taught by itself",
            ),
        },
        {"MRPC": "MRPC", "CoLA": "CoLA"},
        score,
        last={"file": size},
    ).text,
    "width-depth": Grid(
        {
            f"{wide}, {deep}": ("width_depth", f"MRPC, width {w}, depth {d}, {{}}")
            for wide, w, deep, d in (
                ("all", "1", "half", "0.5"),
                ("three quarters", "0.75", "all", "1"),
                ("half", "0.5", "all", "1"),
                ("a quarter", "0.25", "all", "1"),
                ("three quarters", "0.75", "half", "0.5"),
                ("half", "0.5", "half", "0.5"),
                ("a quarter", "0.25", "half", "0.5"),
            )
        },
        {"from labels": "labels", "from the original": "distilled"},
        spread,
        task="MRPC dev",
        corner="heads and neurons, layers",
        last={"file": size},
    ).text,
    "splitting": Grid(
        {
            "half the width, floats": ("binarybert", "half width, floats"),
            "binary from floats, activations of 8 bits": ("binarybert", "BWN 1-1-8"),
            "ternary, then split, 8 bits": ("binarybert", "TWS 1-1-8"),
            "binary from floats, 4 bits": ("binarybert", "BWN 1-1-4"),
            "ternary, then split, 4 bits": ("binarybert", "TWS 1-1-4"),
        },
        DEV,
        beside_floats,
        last={"file": size},
        below=BELOW,
    ).text,
    "split-gains": split_gains,
    "adaptive": Grid(
        {
            label: ("binarybert", f"adaptive splitting 1-1-8, {label}")
            for label in ("maximal gain", "random gain", "minimal gain")
        },
        {"MRPC": "MRPC", "CoLA": "CoLA"},
        score,
        last={"file": size},
    ).text,
    "few-channels": Grid(
        few("structured", "resnet56", LEARNING | CLOSED | DESCENT),
        {"1": "1", "5": "5", "10": "10", "50": "50"},
        spread,
        task="CIFAR-10 test",
        corner="images of a class",
    ).text,
    "few-weights": Grid(
        few("unstructured", "resnet20", LEARNING | DESCENT),
        {"1": "1", "5": "5"},
        spread,
        task="CIFAR-10 test",
        corner="images of a class",
    ).text,
    "modules": Grid(
        {
            "as a whole, `train`": ("mrem", "QAT {}"),
            "module by module, `parts: 3`, 250 updates": ("mrem", "MREM-S, 250 updates {}"),
            "the same, 2,000 updates": ("mrem", "MREM-S {}"),
            "the same, 250 updates, fed by itself alone": (
                "mrem",
                "MREM-S, 250 updates, no forcing {}",
            ),
            "all modules at once, `order: parallel`, 250 updates": (
                "mrem",
                "MREM-P, 250 updates {}",
            ),
            "the same, fed by itself alone": ("mrem", "MREM-P, 250 updates, no forcing {}"),
            "matrix by matrix, `parts: layer`, 500 updates": ("mrem", "REM {}"),
        },
        {bits: bits for bits in ("4-4-8", "2-2-8", "2-2-4")},
        beside_floats,
        task="SST-2 dev",
        last={"minutes": minutes},
    ).text,
}


def choosing() -> str:
    """Return the page with its tables made anew."""
    by_name.cache_clear()
    text = PAGE.read_text(encoding="utf-8")
    return MARKED.sub(lambda place: f"{place[1]}{TABLES[place['name']]()}\n{place[3]}", text)
