"""The page of analyses: a section for each, as drawings and as numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from laconic.report.analyse import (
    Analysis,
    BitSensitivity,
    Eigenvalues,
    LossSurface,
    Trajectory,
)
from laconic.report.estimation import EstimationError
from laconic.report.markup import details, document, legend, section, table
from laconic.report.plots import Dot, Plane, decades, dots, plane, series
from laconic.report.svg import node
from laconic.report.tables import LOSS, Column, Metric, short_text

__all__ = ["analysis_page"]

WIDTHS = {"tradeoff wide": 620, "tradeoff narrow": 344}
PANEL = (300, 290)
PLANES = {"tradeoff wide": (520, 460), "tradeoff narrow": (344, 330)}


def analysis_page(analyses: Sequence[Analysis], title: str) -> str:
    """Return the analyses as one HTML document that needs nothing else.

    Args:
        analyses: in the order of the page.
        title: of the page.

    >>> analysis_page([Eigenvalues({"float": {"fc": (1.0, 3.0)}})], "Curvature")[:15]
    '<!doctype html>'
    """
    kicker = node("p", {"class": "kicker"}, "Laconic analysis")
    header = node("header", None, kicker, node("h1", None, title))
    return document(
        f"Laconic analysis: {title}", [header, *(_SECTIONS[type(each)](each) for each in analyses)]
    )


def _eigenvalues(found: Eigenvalues) -> Element:
    pooled = found.pooled()
    rows = {
        part: [
            _dot(f"{part}, {network}", pooled.mean(network, part), pooled.deviation(network, part))
            for network in pooled.values
        ]
        for part in next(iter(pooled.values.values()))
    }
    title = "Largest eigenvalue of every part"
    drawings = _dots(rows, title=title, axis="largest eigenvalue")
    layers = [details(_eigenvalue_columns(found), "The same by layer")]
    return section(
        "Curvature by part",
        "The largest eigenvalue of the Hessian of the loss with respect to the weights of a part: "
        "mean and standard deviation over batches, and over layers where a part is in several. "
        "The ratio is to the first network.",
        *_legend(pooled.values),
        *drawings,
        table(_eigenvalue_columns(pooled), "Eigenvalues by part"),
        *(layers if found != pooled else []),
    )


def _dot(name: str, value: float, deviation: float) -> Dot:
    return Dot(value, deviation, f"{name}: {short_text(value)} \u00b1 {short_text(deviation)}")


def _eigenvalue_columns(found: Eigenvalues) -> list[Column]:
    parts = tuple(next(iter(found.values.values())))
    columns = [Column("Part", parts, number=False)]
    for network in found.values:
        for title, of in (
            ("mean", found.mean),
            ("deviation", found.deviation),
            ("ratio", found.ratio),
        ):
            columns.append(
                Column(title, tuple(short_text(of(network, part)) for part in parts), group=network)
            )
    return columns


def _surface(found: LossSurface) -> Element:
    low, high = _ends(itertools.chain.from_iterable(found.losses.values()))
    panels = []
    for network, losses in found.losses.items():
        drawn = plane(
            Plane((found.steps, found.steps), losses, _told_apart(*found.tensors)),
            title=f"Loss surface of {network}",
            low=low,
            high=high,
            size=PANEL,
        )
        words = f"highest \u2212 lowest: {short_text(found.height(network))}"
        name, height = node("p", {"class": "name"}, network), node("p", {"class": "range"}, words)
        panels.append(node("li", None, name, height, drawn))
    return section(
        "Loss surface",
        f"The loss where {found.tensors[0]} (across) and {found.tensors[1]} (up) are moved, each "
        "by multiples of its own mean size, and then quantised. Darker is higher, on one scale "
        "for all networks.",
        node("ul", {"class": "panels"}, *panels),
        table(_surface_columns(found), "Loss surfaces in numbers"),
    )


def _told_apart(first: str, second: str) -> tuple[str, str]:
    """Return two dotted names without what they begin with alike, but for its last part."""
    parts = first.split("."), second.split(".")
    pairs = enumerate(zip(*parts, strict=False))
    alike = next((place for place, (one, other) in pairs if one != other), 0)
    start = max(alike - 1, 0)
    return ".".join(parts[0][start:]), ".".join(parts[1][start:])


def _surface_columns(found: LossSurface) -> list[Column]:
    middle = len(found.steps) // 2
    ends = {network: _ends(losses) for network, losses in found.losses.items()}
    return [
        Column("Network", tuple(found.losses), number=False),
        Column(
            "as it is", tuple(short_text(grid[middle][middle]) for grid in found.losses.values())
        ),
        Column("lowest", tuple(short_text(low) for low, _ in ends.values())),
        Column("highest", tuple(short_text(high) for _, high in ends.values())),
        Column("difference", tuple(short_text(found.height(network)) for network in found.losses)),
    ]


def _trajectory(found: Trajectory) -> Element:
    low, high = _ends(found.losses)
    first, second = (f"{share:.1%}" for share in found.explained)
    names = f"first direction, {first}", f"second direction, {second}"
    whole = Plane(found.axes, found.losses, names, found.path)
    drawings = [
        plane(
            whole,
            title="Trajectory of training",
            low=low,
            high=high,
            size=size,
            attributes={"class": kind},
        )
        for kind, size in PLANES.items()
    ]
    return section(
        "Trajectory of training",
        "The weights after every snapshot, in the plane of the first two principal components of "
        "their distance from the last, each with its share of the variance, and the loss around "
        "that one. Darker is higher.",
        *drawings,
        details(_path_columns(found), "Coordinates of the snapshots"),
    )


def _path_columns(found: Trajectory) -> list[Column]:
    return [
        Column("Snapshot", tuple(str(index) for index in range(len(found.path))), number=False),
        Column("first", tuple(short_text(x) for x, _ in found.path), group="Direction"),
        Column("second", tuple(short_text(y) for _, y in found.path), group="Direction"),
    ]


def _bits(found: BitSensitivity) -> Element:
    kinds, metrics = list(next(iter(found.scores.values()))), _metrics(found)
    before = ", ".join(
        f"{metric.title.lower()} {metric.text(found.baseline[metric.name])}{metric.unit}"
        for metric in metrics
    )
    return section(
        "Sensitivity to bits",
        "The scores with one block quantised and the rest as it is; the line is the network as it "
        f"is: {before}.",
        *_legend(kinds),
        *itertools.chain.from_iterable(_bit_drawings(found, metric) for metric in metrics),
        details(_bit_columns(found, metrics), "Scores by block"),
    )


def _metrics(found: BitSensitivity) -> list[Metric]:
    """Return the main metric and the loss, which still tells blocks apart where that is even."""
    first = next((name for name in found.baseline if name != LOSS), LOSS)
    values = [found.baseline, *(kind for block in found.scores.values() for kind in block.values())]
    share = first != LOSS and all(-1 <= scores[first] <= 1 for scores in values)
    both = [Metric(first, share), Metric(LOSS, False)]
    return both if first != LOSS and LOSS in found.baseline else both[:1]


def _bit_drawings(found: BitSensitivity, metric: Metric) -> list[Element]:
    factor = 100 if metric.share else 1
    rows = {
        block: [
            Dot(
                factor * scores[metric.name],
                0.0,
                f"{block}, {kind}: {metric.text(scores[metric.name])}{metric.unit}",
            )
            for kind, scores in kinds.items()
        ]
        for block, kinds in found.scores.items()
    }
    return _dots(
        rows,
        title=f"{metric.title} with one block quantised",
        axis=f"{metric.title}, {metric.unit}" if metric.unit else metric.title,
        reference=factor * found.baseline[metric.name],
    )


def _bit_columns(found: BitSensitivity, metrics: Sequence[Metric]) -> list[Column]:
    columns = [Column("Block", tuple(found.scores), number=False)]
    for kind, metric in itertools.product(next(iter(found.scores.values())), metrics):
        scores = [block[kind][metric.name] for block in found.scores.values()]
        changes = [found.change(block, kind, metric.name) for block in found.scores]
        columns.append(Column(metric.title, tuple(map(metric.text, scores)), metric.unit, kind))
        columns.append(Column("change", tuple(map(metric.text, changes)), metric.unit, kind))
    return columns


def _estimation(found: EstimationError) -> Element:
    first, *others = found.errors
    shown = {other: found.ratios(other, to=first) for other in others} or found.errors
    measure = "ratio of errors" if others else "mean squared difference"
    rows = {
        layer: [
            Dot(_decimal(errors.get(layer)), 0.0, f"{layer}, {student}: {_cell(errors, layer)}")
            for student, errors in shown.items()
        ]
        for layer in found.errors[first]
    }
    drawings = _dots(
        rows,
        title=f"Layer by layer: {measure}",
        axis=f"{measure}, logarithmic",
        reference=0.0 if others else None,
        ticks=decades,
    )
    relative = f", relative to that of {first}: left of the line is better" if others else ""
    return section(
        "Estimation error",
        "The mean squared difference of what a layer puts out from what the teacher's does, "
        f"before BatchNorm and activation, each fed by its own network{relative}. Zeros are not "
        "drawn.",
        *_legend(shown),
        *drawings,
        details(_estimation_columns(found), "Errors by layer"),
    )


def _estimation_columns(found: EstimationError) -> list[Column]:
    first = next(iter(found.errors))
    layers = tuple(dict.fromkeys(itertools.chain.from_iterable(found.errors.values())))
    columns = [Column("Layer", layers, number=False)]
    for student, errors in found.errors.items():
        columns.append(Column("error", tuple(_cell(errors, one) for one in layers), group=student))
        if student != first:
            ratios = found.ratios(student, to=first)
            cells = tuple(_cell(ratios, layer) for layer in layers)
            columns.append(Column("ratio", cells, group=student))
    return columns


def _cell(values: Mapping[str, float], layer: str) -> str:
    return short_text(values.get(layer, math.nan))


def _decimal(value: float | None) -> float:
    """Return the decimal logarithm; NaN where there is none."""
    return math.log10(value) if value and value > 0 else math.nan


_SECTIONS: dict[type[Analysis], Callable[[Any], Element]] = {
    BitSensitivity: _bits,
    Eigenvalues: _eigenvalues,
    EstimationError: _estimation,
    LossSurface: _surface,
    Trajectory: _trajectory,
}


def _dots(rows: Mapping[str, Sequence[Dot]], **options: Any) -> list[Element]:
    """Return the dots for a wide page and for a narrow one; of these the style shows one."""
    return [
        dots(rows, width=width, attributes={"class": kind}, **options)
        for kind, width in WIDTHS.items()
    ]


def _legend(names: Iterable[str]) -> list[Element]:
    marks = [(series(place), name) for place, name in enumerate(names)]
    return [legend(marks)] if len(marks) > 1 else []


def _ends(losses: Iterable[Iterable[float]]) -> tuple[float, float]:
    """Return the lowest and the highest loss that is finite."""
    values = [loss for loss in itertools.chain.from_iterable(losses) if math.isfinite(loss)]
    return (min(values), max(values)) if values else (0.0, 0.0)
