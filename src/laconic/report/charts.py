"""The drawings of a report: size against score, bytes, weights. Colours come from the page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element

from laconic.ledger import size_text
from laconic.report.svg import Box, Label, drawing, node, number, place, shorten, text_width
from laconic.report.tables import BYTES, PARTS, rounded

__all__ = [
    "Axis",
    "Mark",
    "bar",
    "caption",
    "curve",
    "histogram",
    "leader_line",
    "line",
    "linear_ticks",
    "log_ticks",
    "stacked_bar",
    "tradeoff",
    "words",
]

FONT = 12.0
DOT = 4.5
SAME_SPOT = 2.0
MARGIN = Box(52, 28, 18, 46)
NAME_LENGTH = 22
# Of a curve of losses: how wide it is, and where its base line stands.
WIDTH, BASE = 200, 62
# More lines than these would be a grey area.
MOST_POWERS = 12
# Narrower segments of a bar hold no percentage that can be read on a telephone.
LABELLED_SHARE = 0.1


@dataclass(frozen=True)
class Mark:
    """A step in the plane of size and score.

    Attributes:
        name: of the step, with its number.
        size: of the file in bytes.
        score: on the vertical axis, as shown.
        title: what a pointer resting on it tells.
    """

    name: str
    size: int
    score: float
    title: str


def linear_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Return round numbers within a range, at most so many.

    >>> linear_ticks(0, 1, 6)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not low < high:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    for step in (power * factor for factor in (1, 2, 5, 10, 20)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < count:
            return [round(index * step, 12) for index in range(first, last + 1)]
    return [low]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten within a range; round numbers if it is small.

    >>> log_ticks(900, 60_000)
    [1000.0, 2000.0, 5000.0, 10000.0, 20000.0, 50000.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    return ticks if len(ticks) >= 3 else linear_ticks(low, high, 5)


def tradeoff(
    marks: Sequence[Mark],
    *,
    title: str,
    axis: str,
    size: tuple[int, int],
    attributes: Mapping[str, object],
) -> Element:
    """Return the steps as labelled points, joined in order; the size axis is logarithmic.

    Args:
        marks: at least one, in the order of the steps.
        title: of the drawing.
        axis: name and unit of the score.
        size: width and height in pixels.
        attributes: of the ``svg``.
    """
    width, height = size
    area = Box(MARGIN.left, MARGIN.top, width - MARGIN.right, height - MARGIN.bottom)
    across = Axis.around([math.log10(mark.size) for mark in marks], 0.08, area.left, area.right)
    up = Axis.around([mark.score for mark in marks], 0.01, area.bottom, area.top)
    spots = _spots(marks, across, up)
    points = [point for _, point in spots]
    labels = place(
        [_wordings(group) for group, _ in spots], points, area=area.grown(6), size=FONT, dot=DOT + 2
    )
    path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return drawing(
        title,
        {"viewBox": f"0 0 {width} {height}", **attributes},
        _size_axis(across, area),
        _score_axis(up, area),
        words(axis, 4, 14, "axis"),
        words("File size, logarithmic scale", area.right, height - 6, "axis", anchor="end"),
        node("polyline", {"points": path, "class": "path"}),
        *(leader_line(label) for label in labels if label is not None and label.leader),
        *(_dot(group, point, first=group[0] is marks[0]) for group, point in spots),
        *(caption(label) for label in labels if label is not None),
    )


@dataclass(frozen=True)
class Axis:
    """Maps values from low to high onto pixels from start to end.

    >>> Axis(0.0, 2.0, 100.0, 200.0).at(1.0)
    150.0
    """

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Sequence[float], least: float, start: float, end: float) -> Axis:
        """Return an axis with room on both sides of the values.

        Args:
            values: not empty.
            least: room to each side, relative to the largest value.
            start: pixels of the low end.
            end: pixels of the high end.
        """
        low, high = min(values), max(values)
        margin = max((high - low) * 0.08, least * max(abs(high), abs(low), 1e-9), 1e-12)
        return cls(low - margin, high + margin, start, end)

    def at(self, value: float) -> float:
        """Return where a value stands, in pixels."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


Spot = tuple[list[Mark], tuple[float, float]]


def _spots(marks: Sequence[Mark], across: Axis, up: Axis) -> list[Spot]:
    """Return the dots: steps in a row that changed neither size nor score share one."""
    spots: list[Spot] = []
    for mark in marks:
        point = across.at(math.log10(mark.size)), up.at(mark.score)
        if spots and math.dist(spots[-1][1], point) < SAME_SPOT:
            spots[-1][0].append(mark)
        else:
            spots.append(([mark], point))
    return spots


def _wordings(group: Sequence[Mark]) -> list[str]:
    """Return "3 train", or "3-5 train" for several steps; and the numbers alone."""
    first, last = group[0], group[-1]
    numbers = [mark.name.split(" ", maxsplit=1)[0] for mark in (first, last)]
    span = numbers[0] if first is last else "\u2013".join(numbers)
    name = last.name.removeprefix(numbers[1])
    return [shorten(span + name, NAME_LENGTH), span]


def _size_axis(across: Axis, area: Box) -> Element:
    ticks = [
        (across.at(math.log10(tick)), rounded(tick, BYTES, 4))
        for tick in log_ticks(10**across.low, 10**across.high)
    ]
    # A power of ten is dropped last.
    ticks.sort(key=lambda tick: (tick[1][0] != "1", tick[0]))
    shown: list[tuple[float, str]] = []
    for x, text in ticks:
        room = text_width(text, FONT) / 2 + 5
        free = all(abs(x - other) > room + text_width(word, FONT) / 2 for other, word in shown)
        if free and x + room - 5 <= area.right + MARGIN.right:
            shown.append((x, text))
    lines = []
    for x, text in sorted(shown):
        lines.append(line(x, area.top, x, area.bottom, "grid"))
        lines.append(words(text, x, area.bottom + 17, "tick", anchor="middle"))
    return node("g", None, *lines)


def _score_axis(up: Axis, area: Box) -> Element:
    lines = []
    for tick in linear_ticks(up.low, up.high):
        y = up.at(tick)
        lines.append(line(area.left, y, area.right, y, "grid"))
        lines.append(words(f"{tick:.10g}", area.left - 8, y + 4, "tick", anchor="end"))
    return node("g", None, *lines)


def line(x0: float, y0: float, x1: float, y1: float, kind: str) -> Element:
    """Return a line of a class, its ends in pixels.

    >>> line(0, 0, 9.5, 1, "grid").get("x2")
    '9.5'
    """
    ends = {"x1": number(x0), "y1": number(y0), "x2": number(x1), "y2": number(y1)}
    return node("line", {**ends, "class": kind})


def words(text: str, x: float, y: float, kind: str, anchor: str = "start") -> Element:
    """Return a text of a class that starts, ends or has its middle at a point in pixels.

    >>> words("0.5", 10, 20, "tick").text
    '0.5'
    """
    place = {"x": number(x), "y": number(y), "text-anchor": anchor}
    return node("text", {**place, "class": kind}, text)


def _dot(group: Sequence[Mark], point: tuple[float, float], *, first: bool) -> Element:
    place = {"cx": number(point[0]), "cy": number(point[1]), "r": number(DOT)}
    title = node("title", None, "\n".join(mark.title for mark in group))
    return node("circle", {**place, "class": "dot first" if first else "dot"}, title)


def caption(label: Label) -> Element:
    """Return the text of a label where it was placed.

    >>> caption(Label("a", (0.0, 0.0), Box(4, 0, 20, 15), None)).text
    'a'
    """
    box, x = label.box, label.point[0]
    y = box.bottom - 3.5
    # The box is as wide as the widest font needs: the text keeps to the side of its point.
    if box.left >= x:
        return words(label.text, box.left + 2, y, "name")
    if box.right <= x:
        return words(label.text, box.right - 2, y, "name", anchor="end")
    return words(label.text, (box.left + box.right) / 2, y, "name", anchor="middle")


def leader_line(label: Label) -> Element:
    """Return the line from a point to its label.

    >>> leader_line(Label("a", (0, 0), Box(9, 0, 20, 15), ((0, 0), (9, 4)))).get("x2")
    '9'
    """
    (x0, y0), (x1, y1) = label.leader or (label.point, label.point)
    return line(x0, y0, x1, y1, "leader")


def stacked_bar(
    parts: Mapping[str, int], *, title: str, whole: int, height: int, shares: bool
) -> Element:
    """Return a bar of what a file is made of, as wide as the place it is put in.

    Args:
        parts: bytes by field of a measurement.
        title: of the drawing.
        whole: bytes that fill the width.
        height: in pixels.
        shares: whether wide segments are labelled with their percentage.
    """
    sizes = [parts[part] for part in PARTS]
    starts = itertools.accumulate([0, *sizes])
    segments = []
    for (part, word), start, size in zip(PARTS.items(), starts, sizes, strict=False):
        if size:
            left, share = start / max(whole, 1), size / max(whole, 1)
            segments.append(_segment(part, left, share, f"{word}: {size_text(size)}"))
            if shares and share >= LABELLED_SHARE:
                segments.append(_share_text(part, left + share / 2, share, height))
    return drawing(title, {"width": "100%", "height": height, "class": "bar"}, *segments)


def _segment(part: str, left: float, share: float, title: str) -> Element:
    place = {"x": _percent(left), "width": _percent(share), "y": 0, "height": "100%"}
    return node("rect", {**place, "class": part}, node("title", None, title))


def _share_text(part: str, middle: float, share: float, height: int) -> Element:
    place = {"x": _percent(middle), "y": number(height / 2 + 4), "text-anchor": "middle"}
    return node("text", {**place, "class": f"on-{part}"}, f"{share:.0%}")


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def bar(share: float, title: str) -> Element:
    """Return a small bar, filled up to a share.

    >>> bar(0.5, "half")[2].get("width")
    '50.00%'
    """
    filled = min(max(share, 0.0), 1.0)
    return drawing(
        title,
        {"width": "100%", "height": 10, "class": "bar"},
        node("rect", {"width": "100%", "height": "100%", "class": "empty"}),
        node("rect", {"width": _percent(filled), "height": "100%", "class": "filled"}),
    )


def histogram(
    before: Mapping[str, Any] | None, after: Mapping[str, Any], *, title: str
) -> tuple[Element, float]:
    """Return two overlaid outlines of weights and the largest magnitude they reach to.

    Heights are square roots of weights per unit of value, on one scale for both: a thousand
    weights at one value and a few in the tails are both seen. Zeros are left out.

    Args:
        before: of the original weight; None: it had none of this name.
        after: of the weight as it is now.
        title: of the drawing.
    """
    outlines = {"after": after} if before is None else {"before": before, "after": after}
    bound = max(_reach(values) for values in outlines.values())
    densest = max(max(_heights(values), default=0.0) for values in outlines.values())
    paths = [
        node("path", {"d": _outline(values, bound, densest), "class": kind})
        for kind, values in outlines.items()
        if any(values["counts"])
    ]
    frame = {"viewBox": "0 0 200 64", "preserveAspectRatio": "none", "class": "histogram"}
    lines = [line(100, 0, 100, 60, "grid"), line(0, 60, 200, 60, "base")]
    return drawing(title, frame, *lines, *paths), bound


def _reach(values: Mapping[str, Any]) -> float:
    return max(abs(values["low"]), abs(values["high"]))


def _heights(values: Mapping[str, Any]) -> list[float]:
    counts = values["counts"]
    width = (values["high"] - values["low"]) / max(len(counts), 1)
    return [math.sqrt(count / width) if width > 0 else 0.0 for count in counts]


def _outline(values: Mapping[str, Any], bound: float, densest: float) -> str:
    heights = _heights(values)
    low, high = values["low"], values["high"]
    at = [100 + 100 * (low + (high - low) * i / len(heights)) / bound for i in range(len(heights))]
    at.append(100 + 100 * high / bound)
    steps = [
        f"V{number(60 - 58 * height / densest)}H{number(right)}"
        for height, right in zip(heights, at[1:], strict=True)
    ]
    return f"M{number(at[0])},60{''.join(steps)}V60"


def curve(losses: Sequence[float], *, title: str) -> Element:
    """Return losses as a line from left to right, as high as the place it is put in.

    The scale is logarithmic, with a line at every power of ten, where all losses are positive.
    What is not finite is left out.

    Args:
        losses: in order; a single one is a level line.
        title: of the drawing.

    >>> [part.get("d") for part in curve([100.0, 10.0, 1.0], title="fc") if part.tag == "path"]
    ['M0,6L100,31L200,56']
    """
    positive = all(loss > 0 for loss in losses if math.isfinite(loss))
    heights = {
        place: math.log10(loss) if positive else loss
        for place, loss in enumerate(losses)
        if math.isfinite(loss)
    }
    up = _between(heights.values())
    across = Axis(0.0, max(len(losses) - 1, 1), 0.0, WIDTH)
    points = [f"{number(across.at(x))},{number(up.at(y))}" for x, y in heights.items()]
    path = f"M{'L'.join(points)}{f'H{WIDTH}' if len(points) == 1 else ''}"
    return drawing(
        title,
        {"viewBox": f"0 0 {WIDTH} {BASE + 2}", "preserveAspectRatio": "none", "class": "curve"},
        *(line(0, up.at(power), WIDTH, up.at(power), "grid") for power in _powers(up, positive)),
        line(0, BASE, WIDTH, BASE, "base"),
        *([node("path", {"d": path, "class": "losses"})] if points else []),
    )


def _between(heights: Collection[float]) -> Axis:
    """Return an axis from the lowest to the highest; what is all at one height is in the middle."""
    low, high = min(heights, default=0.0), max(heights, default=0.0)
    room = 0.0 if low < high else 1.0 + abs(low)
    return Axis(low - room, high + room, BASE - 6, 6.0)


def _powers(up: Axis, positive: bool) -> Sequence[int]:
    """Return the powers of ten of a logarithmic axis, unless they are too many to be told apart."""
    found = range(math.ceil(up.low), math.floor(up.high) + 1) if positive else ()
    return found if len(found) <= MOST_POWERS else ()
