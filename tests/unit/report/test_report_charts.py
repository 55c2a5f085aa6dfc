"""The drawings of the report: curves, the chart of steps, labels, bars, ticks and colours."""

from __future__ import annotations

import itertools
import math
import random
import re
from typing import Any

import pytest

from helpers.report import (
    FACTS,
    RUNS,
    STEPS,
    Reader,
    drawings,
    history,
    layer,
    learned,
    measurement,
    named,
)
from laconic.ledger import Measurement
from laconic.report.charts import curve, linear_ticks, log_ticks, stacked_bar
from laconic.report.page import page
from laconic.report.style import DARK, LIGHT, STYLE
from laconic.report.svg import Box, place, shorten, text_width
from laconic.report.tables import PARTS

TEXT_CONTRAST = 4.5  # WCAG 2.2, 1.4.3
DRAWING_CONTRAST = 3.0  # WCAG 2.2, 1.4.11


@pytest.fixture(params=sorted(RUNS))
def run(request: pytest.FixtureRequest) -> tuple[list[Measurement], dict[str, Any]]:
    return RUNS[request.param]


def test_every_drawing_has_a_title_and_finite_coordinates(
    run: tuple[list[Measurement], dict[str, Any]],
) -> None:
    found = drawings(page(*run))
    assert found
    for drawing in found:
        assert drawing.get("role") == "img"
        assert drawing[0].tag == "title"
        assert drawing[0].text
        for element in drawing.iter():
            for name, value in element.items():
                assert name == "class" or not re.search(r"nan|inf", value)


# -- curves of losses -----------------------------------------------------------------------------


def test_every_part_has_a_curve_that_ends_where_its_losses_do() -> None:
    html = page([measurement("original", (layer(),)), learned()], FACTS)
    assert "Losses in step 1 reconstruct" in Reader(html).text
    found = [one for one in drawings(html) if one.get("class") == "curve"]
    assert len(found) == 27
    assert found[1][0].text == "encoder.layer.1.output.dense: loss 2 to 1.365e-07"
    for one in found:
        points = re.findall(r"([\d.]+),([\d.]+)", named(one, "losses")[0].get("d", ""))
        assert [points[0], points[-1]] == [("0", "6"), ("200", "56")]
        assert len(points) == 100
    assert "Losses in step" not in page(history(), FACTS)


def heights(*losses: float) -> list[float]:
    path = named(curve(losses, title="t"), "losses")[0].get("d", "")
    return [float(y) for y in re.findall(r",([\d.]+)", path)]


def test_a_curve_is_logarithmic_where_all_losses_are_positive() -> None:
    assert heights(100.0, 10.0, 1.0) == [6, 31, 56]
    assert len(named(curve((100.0, 10.0, 1.0), title="t"), "grid")) == 3
    assert heights(1.0, 0.75, 0.0) == [6, 18.5, 56]
    assert named(curve((1.0, 0.75, 0.0), title="t"), "grid") == []


def test_a_curve_of_one_height_is_level_in_the_middle() -> None:
    assert heights(2.0, 2.0, 2.0) == heights(0.0, 0.0, 0.0) == [31] * 3
    assert named(curve((3.0,), title="t"), "losses")[0].get("d") == "M0,31H200"


def test_what_is_not_finite_is_left_out_of_a_curve() -> None:
    drawn = curve((math.inf, 10.0, math.nan, 1.0, 1.0), title="t")
    assert named(drawn, "losses")[0].get("d") == "M50,6L150,56L200,56"
    assert named(curve((math.nan,), title="t"), "losses") == []


# -- the chart of steps, and bars -----------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 5, 12, 13])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spread", [1.0, 0.12, 0.0])
def test_labels_never_overlap(steps: int, seed: int, spread: float) -> None:
    draw = random.Random(seed)
    area, dot = Box(50, 20, 340, 280), 6.0
    points = [
        (195 + spread * draw.uniform(-140, 140), 150 + spread * draw.uniform(-125, 125))
        for _ in range(steps)
    ]
    texts = [[f"{index} {STEPS[index % 4]}", str(index)] for index in range(steps)]
    labels = place(texts, points, area=area, size=12, dot=dot)
    found = [label for label in labels if label is not None]
    assert labels[0] is not None
    assert labels[-1] is not None
    assert len(found) >= min(steps, 8)
    for label in found:
        assert label.box.inside(area)
        assert label.box.right - label.box.left >= text_width(label.text, 12)
        assert not any(label.box.overlaps(Box(x, y, x, y).grown(dot)) for x, y in points)
    for one, other in itertools.combinations(found, 2):
        assert not one.box.overlaps(other.box)
        assert one.leader is None or not other.box.crossed(one.leader)


@pytest.mark.parametrize("steps", [2, 5, 13])
def test_chart_names_every_step_in_both_widths(steps: int) -> None:
    charts = [one for one in drawings(page(history(steps), FACTS)) if named(one, "tradeoff")]
    assert [one.get("class") for one in charts] == ["tradeoff wide", "tradeoff narrow"]
    for chart in charts:
        assert len(named(chart, "dot")) == steps
        words = {one.text for one in named(chart, "name")}
        assert "0 original" in words
        assert len(words) >= min(steps, 10)
        titles = [dot[0].text for dot in named(chart, "dot")]
        assert titles[0].startswith("0 original: 52.4 kB (51.2 KiB), Accuracy 95.00 %")


def test_steps_that_change_nothing_share_a_dot() -> None:
    runs = history(2)
    html = page([*runs, runs[1], runs[1]], FACTS)
    chart = next(one for one in drawings(html) if named(one, "tradeoff"))
    assert [one.text for one in named(chart, "name")] == ["0 original", "1\u20133 prune"]
    assert (named(chart, "dot")[1][0].text or "").count("\n") == 2


def test_larger_files_stand_further_right_and_better_scores_higher() -> None:
    runs = history(5)
    chart = next(one for one in drawings(page(runs, FACTS)) if named(one, "tradeoff"))
    dots = [(float(one.get("cx", 0)), float(one.get("cy", 0))) for one in named(chart, "dot")]
    for (one, spot), (other, place_of_other) in itertools.combinations(
        zip(runs, dots, strict=True), 2
    ):
        if one.size_bytes > 1.02 * other.size_bytes:
            assert spot[0] > place_of_other[0]
        if one.metrics["accuracy"] > other.metrics["accuracy"] + 0.01:
            assert spot[1] < place_of_other[1]


@pytest.mark.parametrize("sizes", [(800, 500, 64, 200, 1000), (0, 0, 0, 7, 0), (1, 1, 1, 1, 10**9)])
def test_segments_of_a_bar_fill_it_in_order(sizes: tuple[int, ...]) -> None:
    parts = dict(zip(PARTS, sizes, strict=True))
    drawn = stacked_bar(parts, title="bar", whole=sum(sizes), height=20, shares=True)
    segments = drawn.findall("rect")
    assert [one.get("class") for one in segments] == [part for part in PARTS if parts[part]]
    ends = [(float(one.get("x", "")[:-1]), float(one.get("width", "")[:-1])) for one in segments]
    assert sum(width for _, width in ends) == pytest.approx(100, abs=0.05)
    for (left, width), (following, _) in itertools.pairwise(ends):
        assert left + width == pytest.approx(following, abs=0.02)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (97.3, 98.1), (-5, 1e6), (0.1, 0.1001)])
def test_ticks_are_few_and_within_the_axis(low: float, high: float) -> None:
    ticks = linear_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


@pytest.mark.parametrize(("low", "high"), [(1, 1e12), (164_000, 171_000), (9e3, 2e5)])
def test_size_ticks_are_within_the_axis(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert len(ticks) >= 2
    assert all(low <= tick <= high for tick in ticks)


def test_long_names_are_shortened_in_the_middle() -> None:
    assert shorten("abcdefghij", 5) == "ab…ij"
    assert shorten("abc", 3) == "abc"


# -- colours and styles ---------------------------------------------------------------------------


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast(colours: dict[str, str]) -> None:
    for text, ground in (("ink", "paper"), ("ink", "panel"), ("soft", "paper"), ("soft", "panel")):
        assert contrast(colours[text], colours[ground]) >= TEXT_CONTRAST
    assert contrast(colours["accent"], colours["paper"]) >= TEXT_CONTRAST
    assert contrast(colours["past"], colours["paper"]) >= DRAWING_CONTRAST
    for part in ("codes", "positions", "tables", "dense", "header"):
        assert contrast(colours[f"on-{part}"], colours[part]) >= TEXT_CONTRAST
        assert contrast(colours[part], colours["paper"]) >= DRAWING_CONTRAST


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    values = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_every_class_of_a_drawing_has_a_style() -> None:
    html = page([*history(5), learned()], {**FACTS, "notes": ["a note"]})
    used = {
        name
        for one in drawings(html)
        for part in one.iter()
        for name in part.get("class", "").split()
    }
    unstyled = {name for name in used if not re.search(rf"\.{name}\b", STYLE)}
    # Names take the colour of all text.
    assert unstyled == {"name"} - set(re.findall(r"\.(name)\b", STYLE))
    assert STYLE.count("{") == STYLE.count("}")
    assert set(re.findall(r"var\(--([\w-]+)\)", STYLE)) <= set(LIGHT) == set(DARK)
