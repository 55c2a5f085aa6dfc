"""The drawings of an analysis: values with deviations, and losses over a plane."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from laconic.report.charts import (
    DOT,
    FONT,
    Axis,
    caption,
    leader_line,
    line,
    linear_ticks,
    log_ticks,
    words,
)
from laconic.report.style import SERIES
from laconic.report.svg import Box, drawing, node, number, place, shorten, text_width

__all__ = ["Dot", "Plane", "decades", "dots", "plane", "series"]

# What an axis says from its low end to its high one: value -> text.
Ticks = Callable[[float, float], dict[float, str]]

# The largest share of the width that names of rows take.
NAMES = 0.42
BETWEEN_SERIES = 13
BETWEEN_ROWS = 9
# To the right of an axis, for half of its last text.
ROOM = 14
LEAST, MOST = 0.04, 0.92
# Of a logarithmic axis: how long one of a single value is, and as many ticks as fit.
SAME, FULL = 0.01, 8
# Under a path and its labels, so that they can be read.
PALE = 0.4


@dataclass(frozen=True)
class Dot:
    """A value, what it deviates by, and what a pointer resting on it tells."""

    value: float
    deviation: float
    title: str


def series(place: int) -> str:
    """Return the class of one of several series; the colours begin anew after the last.

    >>> series(1)
    'series-1'
    """
    return f"series-{place % len(SERIES)}"


def even(low: float, high: float) -> dict[float, str]:
    """Return the ticks of an axis of the values themselves.

    >>> even(0, 1)
    {0.0: '0', 0.5: '0.5', 1.0: '1'}
    """
    return {tick: f"{tick:.10g}" for tick in linear_ticks(low, high, 5)}


def decades(low: float, high: float) -> dict[float, str]:
    """Return the ticks of an axis of decimal logarithms, by what they are logarithms of.

    >>> decades(0, 4), list(decades(-1, 0).values())
    ({0.0: '1', 1.0: '10', 2.0: '100', 3.0: '1e+03', 4.0: '1e+04'}, ['0.1', '0.2', '0.5', '1'])
    """
    if high - low < SAME:
        return {(low + high) / 2: f"{10 ** ((low + high) / 2):.2g}"}
    ticks = log_ticks(10**low, 10**high)
    if len(ticks) > FULL:
        ticks = [tick for tick in ticks if f"{tick:e}".startswith("1")]
    return {math.log10(tick): f"{tick:.3g}" for tick in ticks}


def dots(
    rows: Mapping[str, Sequence[Dot]],
    *,
    title: str,
    axis: str,
    width: int,
    reference: float | None = None,
    ticks: Ticks = even,
    attributes: Mapping[str, object] | None = None,
) -> Element:
    """Return a row of dots for every name, one per series, with their deviations as whiskers.

    Args:
        rows: name -> a dot per series; what is not finite is left out. Not empty.
        title: of the drawing.
        axis: name and unit of the values.
        width: in pixels; the height follows from the rows.
        reference: a value that a line marks in all rows.
        ticks: what the axis says; ``decades`` where values are logarithms.
        attributes: of the ``svg``.

    >>> dots({"fc": [Dot(1.0, 0.5, "fc")]}, title="t", axis="a", width=344).get("viewBox")
    '0 0 344 74'
    """
    names = _fitting(rows, NAMES * width)
    left = max(text_width(name, FONT) for name in names) + 10
    deep = BETWEEN_SERIES * max(map(len, rows.values())) + BETWEEN_ROWS
    area = Box(left, 24, width - ROOM, 24 + deep * len(rows))
    across = Axis.around(_reached(rows, reference), 0.02, area.left, area.right)
    found: list[Element] = []
    for place_, (name, row) in enumerate(zip(names, rows.values(), strict=True)):
        top = area.top + deep * place_
        found.append(line(area.left, top, area.right, top, "grid"))
        found.append(words(name, area.left - 8, top + deep / 2 + 4, "name", anchor="end"))
        found += _marks(row, across, top + (deep - BETWEEN_SERIES * (len(row) - 1)) / 2)
    if reference is not None:
        x = across.at(reference)
        found.insert(0, line(x, area.top, x, area.bottom, "reference"))
    return drawing(
        title,
        {"viewBox": f"0 0 {width} {number(area.bottom + 28)}", **(attributes or {})},
        *_scale(across, area, ticks),
        words(axis, area.right, 14, "axis", anchor="end"),
        *found,
    )


def _fitting(names: Iterable[str], room: float) -> list[str]:
    """Return the names, all shortened to the length at which the widest fits."""
    names = list(names)
    for length in range(max(map(len, names)), 3, -1):
        short = [shorten(name, length) for name in names]
        if max(text_width(name, FONT) for name in short) <= room:
            return short
    return [shorten(name, 3) for name in names]


def _reached(rows: Mapping[str, Sequence[Dot]], reference: float | None) -> list[float]:
    ends = [
        end
        for dot in itertools.chain.from_iterable(rows.values())
        for end in (dot.value - dot.deviation, dot.value + dot.deviation)
    ]
    ends = [end for end in [*ends, reference] if end is not None and math.isfinite(end)]
    return ends or [0.0]


def _marks(row: Sequence[Dot], across: Axis, top: float) -> list[Element]:
    found = []
    for index, dot in enumerate(row):
        if not math.isfinite(dot.value + dot.deviation):
            continue
        y, kind = top + BETWEEN_SERIES * index, series(index)
        x0, x1 = across.at(dot.value - dot.deviation), across.at(dot.value + dot.deviation)
        if dot.deviation:
            found.append(line(x0, y, x1, y, f"whisker {kind}"))
        where = {"cx": number(across.at(dot.value)), "cy": number(y), "r": number(DOT)}
        found.append(node("circle", {**where, "class": kind}, node("title", None, dot.title)))
    return found


def _scale(across: Axis, area: Box, ticks: Ticks) -> list[Element]:
    found: list[Element] = []
    right = -math.inf
    for tick, text in ticks(across.low, across.high).items():
        x = across.at(tick)
        found.append(line(x, area.top, x, area.bottom, "grid"))
        half = text_width(text, FONT) / 2
        if x - half > right + 4 and x + half < area.right + ROOM:
            found.append(words(text, x, area.bottom + 17, "tick", anchor="middle"))
            right = x + half
    return found


@dataclass(frozen=True)
class Plane:
    """Losses over two axes, and a path in their plane.

    Attributes:
        axes: coordinates, equally spaced, of the horizontal and of the vertical axis.
        losses: [horizontal, vertical].
        names: of the two axes.
        path: points that are joined in order; the first and the last are named.
    """

    axes: tuple[Sequence[float], Sequence[float]]
    losses: Sequence[Sequence[float]]
    names: tuple[str, str]
    path: Sequence[tuple[float, float]] = ()


def plane(
    of: Plane,
    *,
    title: str,
    low: float,
    high: float,
    size: tuple[int, int],
    attributes: Mapping[str, object] | None = None,
) -> Element:
    """Return losses as cells that are darker where they are higher, and the path over them.

    Args:
        of: what is drawn.
        title: of the drawing.
        low: the loss of the palest cell.
        high: of the darkest; what is above it, or not finite, is as dark.
        size: width and height in pixels.
        attributes: of the ``svg``.

    >>> losses = Plane(((0.0, 1.0), (0.0, 1.0)), ((1.0, 2.0), (3.0, 4.0)), ("x", "y"))
    >>> found = plane(losses, title="t", low=1.0, high=4.0, size=(260, 240))
    >>> sum(element.get("class") == "cell" for element in found.iter())
    4
    """
    width, height = size
    area = Box(44, 24, width - 10, height - 42)
    across, up = _over(of.axes[0], area.left, area.right), _over(of.axes[1], area.bottom, area.top)
    across_name, up_name = _fitting(of.names, area.right - 4)
    most = PALE if of.path else MOST
    return drawing(
        title,
        {"viewBox": f"0 0 {width} {height}", **(attributes or {})},
        *_cells(of, across, up, (low, high, most)),
        *_ticks(of, across, up, area),
        words(up_name, 4, 14, "axis"),
        words(across_name, area.right, height - 6, "axis", anchor="end"),
        *_path(of.path, across, up, area),
    )


def _over(places: Sequence[float], start: float, end: float) -> Axis:
    """Return an axis on which every place has a cell around it."""
    half = (places[-1] - places[0]) / max(len(places) - 1, 1) / 2 or 0.5
    return Axis(places[0] - half, places[-1] + half, start, end)


def _cells(of: Plane, across: Axis, up: Axis, shades: tuple[float, float, float]) -> list[Element]:
    low, high, most = shades
    wide = abs(across.end - across.start) / len(of.axes[0])
    tall = abs(up.end - up.start) / len(of.axes[1])
    found = []
    for x, column in zip(of.axes[0], of.losses, strict=True):
        for y, loss in zip(of.axes[1], column, strict=True):
            share = (loss - low) / (high - low) if high > low else 0.0
            share = min(max(share, 0.0), 1.0) if math.isfinite(share) else 1.0
            place = {"x": number(across.at(x) - wide / 2), "y": number(up.at(y) - tall / 2)}
            sides = {"width": number(wide + 0.05), "height": number(tall + 0.05)}
            shade = {"fill-opacity": f"{LEAST + (most - LEAST) * share:.3f}", "class": "cell"}
            title = node("title", None, f"{x:.3g}, {y:.3g}: loss {loss:.4g}")
            found.append(node("rect", {**place, **sides, **shade}, title))
    return found


def _ticks(of: Plane, across: Axis, up: Axis, area: Box) -> list[Element]:
    horizontal, vertical = (linear_ticks(places[0], places[-1], 5) for places in of.axes)
    below, left = area.bottom + 16, area.left - 6
    return [
        *(words(f"{at:.10g}", across.at(at), below, "tick", anchor="middle") for at in horizontal),
        *(words(f"{at:.10g}", left, up.at(at) + 4, "tick", anchor="end") for at in vertical),
    ]


def _path(path: Sequence[tuple[float, float]], across: Axis, up: Axis, area: Box) -> list[Element]:
    if not path:
        return []
    points = [(across.at(x), up.at(y)) for x, y in path]
    names = [["start"], *([] for _ in points[2:]), ["end"]] if len(points) > 1 else [["end"]]
    labels = [label for label in place(names, points, area=area, size=FONT, dot=DOT) if label]
    joined = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return [
        node("polyline", {"points": joined, "class": "path"}),
        *(leader_line(label) for label in labels if label.leader),
        *(
            node(
                "circle",
                {"cx": number(x), "cy": number(y), "r": number(DOT), "class": "dot"},
                node("title", None, f"snapshot {index}"),
            )
            for index, (x, y) in enumerate(points)
        ),
        *map(caption, labels),
    ]
