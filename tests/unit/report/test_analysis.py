"""The page of analyses: it stands alone, its labels never overlap, whatever was found."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from helpers.report import drawings
from laconic.errors import RunError
from laconic.report import (
    BitSensitivity,
    Eigenvalues,
    EstimationError,
    LossSurface,
    Trajectory,
    write_analysis,
)
from laconic.report.analyse import Analysis
from laconic.report.analysis import _SECTIONS, analysis_page
from laconic.report.plots import Dot, Plane, dots, plane
from laconic.report.style import STYLE
from laconic.report.svg import Box, text_width

HOSTILE = "</title></style><script>alert('1')</script>\"'><img src=x onerror=alert(2)>&amp;[red]"
NETWORKS = ("float", "ternary", "binary")
FONT = 12


def curvature(layers: int = 3, networks: tuple[str, ...] = NETWORKS) -> Eigenvalues:
    draws = random.Random(layers)
    parts = [
        f"{layer} {part}"
        for layer in range(layers)
        for part in ("MHA-QK", "MHA-V", "MHA-O", "FFN-mid", "FFN-out")
    ]
    return Eigenvalues(
        {
            name: {part: tuple(draws.gauss(1, 2) * 10 for _ in range(4)) for part in parts}
            for name in networks
        }
    )


def surface(points: int = 11, networks: tuple[str, ...] = NETWORKS) -> LossSurface:
    steps = tuple(round(-1 + 2 * place / (points - 1), 12) for place in range(points))
    tensors = tuple(f"bert.encoder.layer.{layer}.attention.self.value.weight" for layer in (0, 1))
    losses = {
        name: tuple(tuple(0.4 + (bowl + 1) * (x * x + y * y) for y in steps) for x in steps)
        for bowl, name in enumerate(networks)
    }
    return LossSurface((tensors[0], tensors[1]), steps, losses)


def path(snapshots: int = 9, seed: int = 0) -> Trajectory:
    draws = random.Random(seed)
    points = [(draws.gauss(1, 1), draws.gauss(0, 0.3)) for _ in range(snapshots - 1)]
    axis = tuple(round(place / 2, 12) for place in range(-5, 6))
    losses = tuple(tuple(x * x + y for y in axis) for x in axis)
    return Trajectory((*points, (0.0, 0.0)), (0.81, 0.123), (axis, axis), losses)


def bits(blocks: int = 6, metric: str = "accuracy") -> BitSensitivity:
    draws = random.Random(blocks)
    return BitSensitivity(
        {metric: 0.9, "loss": 0.3},
        {
            f"bert.encoder.layer.{block}": {
                kind: {metric: 0.9 - draws.random() / 10, "loss": 0.4}
                for kind in ("2 bit", "4 bit")
            }
            for block in range(blocks)
        },
    )


def estimation(layers: int = 12, students: tuple[str, ...] = ("prior", "cd")) -> EstimationError:
    draws = random.Random(layers)
    return EstimationError(
        {
            name: {f"features.{layer}": 10 ** draws.gauss(-2, 1) for layer in range(layers)}
            for name in students
        }
    )


EXAMPLES: list[Analysis] = [
    curvature(),
    curvature(12),
    curvature(1, ("float",)),
    Eigenvalues({"float": {"conv1": (0.0,)}, "binary": {"conv1": (-3.0,)}}),
    surface(),
    surface(3, ("float",)),
    LossSurface(("a", "b"), (-1.0, 0.0, 1.0), {"broken": ((math.inf, 1.0, math.nan),) * 3}),
    path(),
    path(40),
    path(3),
    bits(),
    bits(1, "loss"),
    bits(24, "a metric with a long name"),
    BitSensitivity({"loss": 0.3}, {"x" * 80: {"1 bit": {"loss": math.inf}}}),
    estimation(),
    estimation(60, ("a student",)),
    estimation(2, ("first", "second", "third")),
    EstimationError({"same": {"fc": 0.0}, "other": {"fc": 0.0}}),
    EstimationError({"same": {"fc": 0.0}}),
    EstimationError({"prior": {"fc": 0.0, "a": math.nan}, "apart": {"fc": 1.0, "b": math.inf}}),
    EstimationError({"prior": {"fc": 1e-30}, "apart": {"last": 2.0}}),
]
each = pytest.mark.parametrize("found", EXAMPLES)


def box(element: ElementTree.Element) -> Box:
    """Return the room that a text takes, from above."""
    x, y = float(element.get("x", "")), float(element.get("y", ""))
    wide = text_width(element.text or "", FONT)
    left = x - wide * {"start": 0, "middle": 0.5, "end": 1}[element.get("text-anchor", "start")]
    return Box(left, y - 10, left + wide, y + 2)


@each
def test_every_page_stands_alone_and_its_drawings_are_finite(found: Analysis) -> None:
    html = analysis_page([found], "One")
    for outside in ("http:", "https:", "//", "url(", "@import", "src=", "<script"):
        assert outside not in html
    assert drawings(html)
    for drawing in drawings(html):
        assert drawing.get("role") == "img"
        assert drawing[0].tag == "title" and drawing[0].text
        for element in drawing.iter():
            for name, value in element.items():
                assert name == "class" or not re.search(r"nan|inf", value)


@each
def test_texts_are_inside_the_drawing_and_never_overlap(found: Analysis) -> None:
    shown = drawings(analysis_page([found], "One"))
    assert shown
    for drawing in shown:
        _, _, width, height = map(float, drawing.get("viewBox", "").split())
        boxes = [box(element) for element in drawing.iter("text")]
        assert boxes
        for index, one in enumerate(boxes):
            assert one.inside(Box(0, 0, width, height)), [e.text for e in drawing.iter("text")]
            assert not any(one.overlaps(other) for other in boxes[:index])


@each
def test_tables_are_rectangular(found: Analysis) -> None:
    tables = re.findall(r"<table>.*?</table>", analysis_page([found], "One"), re.DOTALL)
    assert tables
    for text in tables:
        root = ElementTree.fromstring(text.replace("<wbr>", ""))
        above, _ = root.findall("thead/tr")
        spans = sum(int(cell.get("colspan", 1)) for cell in above)
        assert {len(row) for row in root.findall("tbody/tr")} == {spans}


def test_every_class_of_a_drawing_has_a_style() -> None:
    used = {
        name
        for one in drawings(analysis_page(EXAMPLES, "All"))
        for part in one.iter()
        for name in part.get("class", "").split()
    }
    assert {name for name in used if not re.search(rf"\.{name}\b", STYLE)} == set()


def test_every_analysis_has_a_section() -> None:
    assert set(_SECTIONS) == set(Analysis.__subclasses__())


def test_larger_values_stand_further_right_and_whiskers_reach_as_far_as_they_deviate() -> None:
    row = [Dot(1.0, 0.5, "one"), Dot(3.0, 0.0, "two"), Dot(math.nan, 0.0, "none")]
    found = dots({"fc": row}, title="t", axis="a", width=600, reference=2.0)
    first, second = (float(one.get("cx", "")) for one in found.iter("circle"))
    (line,) = (one for one in found.iter("line") if one.get("class") == "reference")
    assert first < float(line.get("x1", "")) < second
    (whisker,) = (one for one in found.iter("line") if "whisker" in one.get("class", ""))
    reach = float(whisker.get("x2", "")) - float(whisker.get("x1", ""))
    assert reach == pytest.approx((second - first) / 2, abs=0.2)


def test_cells_are_darker_where_the_loss_is_higher_and_fill_the_plane() -> None:
    axes = (0.0, 1.0), (0.0, 1.0, 2.0)
    of = Plane(axes, ((0.0, 1.0, 2.0), (3.0, 4.0, math.inf)), ("x", "y"))
    found = plane(of, title="t", low=0.0, high=4.0, size=(260, 240))
    cells = [one for one in found.iter("rect") if one.get("class") == "cell"]
    shades = [float(one.get("fill-opacity", "")) for one in cells]
    assert shades == sorted(shades) and len(set(shades)) == 5
    left, right = cells[0], cells[3]
    assert float(right.get("x", "")) > float(left.get("x", ""))
    assert float(cells[0].get("y", "")) > float(cells[2].get("y", "")), "up is higher"
    area = sum(float(one.get("width", "")) * float(one.get("height", "")) for one in cells)
    assert area == pytest.approx((260 - 10 - 44) * (240 - 42 - 24), rel=0.01)


def test_the_path_begins_at_start_and_ends_at_end() -> None:
    found = drawings(analysis_page([path()], "One"))
    assert found
    for drawing in found:
        texts = [element.text for element in drawing.iter("text")]
        assert "start" in texts and "end" in texts
        assert len(list(drawing.iter("circle"))) == 9
        assert "first direction, 81.0%" in texts


def test_ratios_below_one_stand_left_of_the_line_as_far_as_their_logarithm() -> None:
    found = EstimationError({"prior": {"a": 4.0, "b": 1.0}, "cd": {"a": 0.4, "b": 10.0}})
    (drawing, _) = drawings(analysis_page([found], "One"))
    better, worse = (float(one.get("cx", "")) for one in drawing.iter("circle"))
    (line,) = (one for one in drawing.iter("line") if one.get("class") == "reference")
    assert better < float(line.get("x1", "")) == pytest.approx((better + worse) / 2, abs=0.2)
    assert {"0.1", "1", "10"} <= {element.text for element in drawing.iter("text")}


def test_a_single_student_has_errors_and_no_line() -> None:
    html = analysis_page([estimation(3, ("prior",))], "One")
    assert "mean squared difference, logarithmic" in html
    assert 'class="reference"' not in html


def test_weights_of_a_surface_are_told_apart() -> None:
    (drawing, *_) = drawings(analysis_page([surface()], "One"))
    texts = [element.text or "" for element in drawing.iter("text")]
    assert any("layer.0" in text for text in texts) and any("layer.1" in text for text in texts)


def test_hostile_names_are_text(tmp_path: Path) -> None:
    records: list[Analysis] = [
        Eigenvalues({HOSTILE: {HOSTILE: (1.0, 2.0)}, "x": {HOSTILE: (1.0, 2.0)}}),
        LossSurface((HOSTILE, HOSTILE), (0.0,), {HOSTILE: ((1.0,),)}),
        BitSensitivity({HOSTILE: 1.0}, {HOSTILE: {HOSTILE: {HOSTILE: 1.0}}}),
        EstimationError({HOSTILE: {HOSTILE: 1.0}, "x": {HOSTILE: 2.0}}),
    ]
    written = write_analysis(records, tmp_path / "a.html", title=HOSTILE)
    html = written.read_text(encoding="utf-8")
    assert "<script" not in html and "<img" not in html
    assert drawings(html)


def test_the_file_is_a_function_of_the_analyses(tmp_path: Path) -> None:
    first = write_analysis([curvature(), path()], tmp_path / "a.html", title="All \ud800")
    second = write_analysis([curvature(), path()], tmp_path / "deep" / "b.html", title="All \ud800")
    assert first.read_bytes() == second.read_bytes()
    assert sorted(each.name for each in tmp_path.rglob("*.*")) == ["a.html", "b.html"]
    with pytest.raises(RunError, match="no analysis to write"):
        write_analysis([], tmp_path / "c.html")
