"""Elements of the page and of its drawings, and labels that never overlap."""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

__all__ = [
    "Box",
    "Label",
    "breakable",
    "drawing",
    "node",
    "number",
    "place",
    "shorten",
    "text_width",
]

Point = tuple[float, float]
Segment = tuple[Point, Point]

GAP = 3.0
LABEL_HEIGHT = 15.0
RINGS = (11.0, 16.0, 24.0, 34.0, 46.0, 60.0, 76.0, 96.0, 120.0)
DIRECTIONS = 16
# A label on the line that joins the points is harder to read than one further away.
CROSSING = 30.0


def node(
    tag: str, attributes: Mapping[str, object] | None = None, *children: Element | str
) -> Element:
    """Return an element; text is escaped when the tree is written.

    Args:
        tag: of HTML or SVG.
        attributes: name -> value, written with ``str``.
        children: elements and text in order.

    >>> node("p", {"class": "note"}, "less ", node("b", None, "is"), " more")[0].tail
    ' more'
    """
    element = Element(tag, {key: str(value) for key, value in (attributes or {}).items()})
    for child in children:
        if not isinstance(child, str):
            element.append(child)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + child
        else:
            element.text = (element.text or "") + child
    return element


def breakable(name: str) -> list[Element | str]:
    """Return a dotted name as children of an element that may break after every dot.

    >>> [len(breakable(name)) for name in ("fc", "fc.weight")]
    [1, 4]
    """
    first, *rest = name.split(".")
    children: list[Element | str] = [first]
    for part in rest:
        children += [".", node("wbr"), part]
    return children


def drawing(title: str, attributes: Mapping[str, object], *children: Element) -> Element:
    """Return an ``svg`` that a screen reader announces by its title.

    >>> drawing("sizes", {"width": 10})[0].text
    'sizes'
    """
    return node("svg", {"role": "img", **attributes}, node("title", None, title), *children)


def number(value: float) -> str:
    """Return a coordinate with at most one decimal.

    >>> number(3.14), number(2.0), number(-0.01)
    ('3.1', '2', '0')
    """
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def text_width(text: str, size: float) -> float:
    """Return an upper estimate of a text's width in pixels, for any sans-serif font.

    Args:
        text: of one line.
        size: of the font in pixels.

    >>> round(text_width("quantize", 10.0), 1)
    49.8
    """
    return sum(_advance(character) for character in text) * size


def _advance(character: str) -> float:
    if unicodedata.east_asian_width(character) in "WF":
        return 1.05
    if character in "mwMW@%—…":
        return 1.0
    return 0.45 if character in "iljt.,:;'|!()[] " else 0.8 if character.isupper() else 0.68


def shorten(text: str, length: int) -> str:
    """Return a text of at most so many characters, its middle left out.

    >>> shorten("encoder.layer.11.weight", 14)
    'encoder…weight'
    """
    if len(text) <= length:
        return text
    head = length // 2
    tail = length - 1 - head
    return f"{text[:head]}…{text[len(text) - tail :]}"


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels.

    >>> Box(0, 0, 2, 2).overlaps(Box(1, 1, 3, 3)), Box(0, 0, 1, 1).overlaps(Box(1, 0, 2, 1))
    (True, False)
    """

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Return whether the inner areas meet."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def inside(self, other: Box) -> bool:
        """Return whether no part is outside the other."""
        across = other.left <= self.left and self.right <= other.right
        return across and other.top <= self.top and self.bottom <= other.bottom

    def grown(self, by: float) -> Box:
        """Return the box with a margin around it."""
        return Box(self.left - by, self.top - by, self.right + by, self.bottom + by)

    def nearest(self, point: Point) -> Point:
        """Return the point of the box nearest to another."""
        x, y = point
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)

    def crossed(self, segment: Segment) -> bool:
        """Return whether a segment runs through the box (Liang and Barsky 1984)."""
        (x0, y0), (x1, y1) = segment
        first, last = 0.0, 1.0
        for start, step, low, high in (
            (x0, x1 - x0, self.left, self.right),
            (y0, y1 - y0, self.top, self.bottom),
        ):
            if step == 0:
                if not low < start < high:
                    return False
                continue
            near, far = sorted(((low - start) / step, (high - start) / step))
            first, last = max(first, near), min(last, far)
        return first < last


@dataclass(frozen=True)
class Label:
    """A text beside a point.

    Attributes:
        text: as shown.
        point: what it names.
        box: where it stands.
        leader: the line from point to text, when they are apart.
    """

    text: str
    point: Point
    box: Box
    leader: Segment | None


def place(
    texts: Sequence[Sequence[str]], points: Sequence[Point], *, area: Box, size: float, dot: float
) -> list[Label | None]:
    """Return where each point's label stands, so that no two of them overlap.

    The last and the first point choose first. A label that finds no room is tried in its next,
    shorter wording; where nothing fits there is None.

    Args:
        texts: of each point, the wordings from best to shortest.
        points: in the order in which a line joins them, in pixels.
        area: what labels stay inside of.
        size: of the font in pixels.
        dot: radius of the points in pixels.

    >>> place([["a"], ["b"]], [(9, 9), (60, 9)], area=Box(0, 0, 99, 99), size=12, dot=3)[0].text
    'a'
    """
    order = sorted(range(len(points)), key=lambda i: (i not in (0, len(points) - 1), -i))
    dots = [Box(x, y, x, y).grown(dot) for x, y in points]
    path = list(itertools.pairwise(points))
    found: list[Label | None] = [None] * len(points)
    for index in order:
        taken = [label for label in found if label is not None]
        blocked = dots + [label.box for label in taken]
        leaders = [label.leader for label in taken if label.leader is not None]
        for text in texts[index]:
            choices = _choices(text, points[index], area=area, size=size)
            choices = [
                label
                for label in choices
                if not any(label.box.overlaps(other) for other in blocked)
                and not any(label.box.crossed(leader) for leader in leaders)
                and not (label.leader and any(one.box.crossed(label.leader) for one in taken))
            ]
            if choices:
                found[index] = min(choices, key=lambda label: _cost(label, path, blocked))
                break
    return found


def _choices(text: str, point: Point, *, area: Box, size: float) -> list[Label]:
    half_width = text_width(text, size) / 2 + GAP
    half_height = LABEL_HEIGHT / 2
    labels = []
    for ring in RINGS:
        for turn in range(DIRECTIONS):
            angle = 2 * math.pi * turn / DIRECTIONS
            across, down = math.cos(angle), math.sin(angle)
            x = point[0] + ring * across + half_width * _side(across)
            y = point[1] + ring * down + half_height * _side(down)
            box = Box(x - half_width, y - half_height, x + half_width, y + half_height)
            if box.inside(area):
                labels.append(Label(text, point, box, _leader(point, box)))
    return labels


def _side(direction: float) -> float:
    return 0.0 if abs(direction) < 0.3 else math.copysign(1.0, direction)


def _leader(point: Point, box: Box) -> Segment | None:
    end = box.nearest(point)
    return (point, end) if math.dist(point, end) > RINGS[1] else None


def _cost(label: Label, path: Iterable[Segment], blocked: Iterable[Box]) -> float:
    far = math.dist(label.point, label.box.nearest(label.point))
    crossings = sum(label.box.crossed(segment) for segment in path)
    leader = label.leader
    if leader is not None:
        # The first of these is the label's own dot.
        crossings += sum(box.crossed(leader) for box in blocked) - 1
    # Beside a point reads better than above or below it.
    middle = (label.box.top + label.box.bottom) / 2
    return far + CROSSING * crossings + 0.2 * abs(middle - label.point[1])
