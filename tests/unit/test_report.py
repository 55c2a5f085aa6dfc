"""The report: one page that stands alone, never wrong, never cut, whatever the run was."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from laconic.errors import RunError
from laconic.ledger import Layer, Measurement
from laconic.report import terminal, write_report
from laconic.report.charts import curve, linear_ticks, log_ticks, stacked_bar
from laconic.report.page import page
from laconic.report.style import DARK, LIGHT, STYLE
from laconic.report.svg import Box, place, shorten, text_width
from laconic.report.tables import (
    PARTS,
    TIMES,
    byte_scale,
    curve_columns,
    layer_columns,
    ledger_columns,
    main_metric,
)

VOID = {"meta", "wbr", "link", "br", "img", "hr", "input", "col"}
TEXT_CONTRAST = 4.5  # WCAG 2.2, 1.4.3
DRAWING_CONTRAST = 3.0  # WCAG 2.2, 1.4.11
STEPS = ("prune", "train", "quantize", "train")
HOSTILE = "</title></style><script>alert('1')</script>\"'><img src=x onerror=alert(2)>&amp;[red]"


def layer(name: str = "fc.weight", **changes: Any) -> Layer:
    counts = [round(1000 * math.exp(-(((index - 20) / 7) ** 2))) for index in range(41)]
    first = Layer(
        name=name,
        shape=(64, 100),
        parameters=6400,
        survivors=6400,
        nonzero=6400,
        bits=32.0,
        representation="float",
        code_bytes=0,
        index_bytes=0,
        table_bytes=0,
        dense_bytes=25_600,
        macs=6400,
        histogram={"low": -0.5, "high": 0.5, "counts": counts},
    )
    return dataclasses.replace(first, **changes)


def squeezed(name: str = "fc.weight") -> Layer:
    return layer(
        name,
        survivors=1600,
        nonzero=1600,
        bits=4.0,
        representation="kmeans 4 bit",
        code_bytes=800,
        index_bytes=500,
        table_bytes=64,
        dense_bytes=0,
    )


def measurement(step: str, layers: tuple[Layer, ...], **changes: Any) -> Measurement:
    parts = {part: sum(getattr(one, part, 0) for one in layers) for part in PARTS}
    parts["dense_bytes"] += 200
    parts["header_bytes"] = 1000
    found = Measurement(
        step=step,
        parameters=sum(one.parameters for one in layers) + 50,
        nonzero=sum(one.nonzero for one in layers) + 50,
        size_bytes=sum(parts.values()),
        nominal_bits=round(sum(one.survivors * one.bits for one in layers)) + 1600,
        macs=6400,
        bit_operations=6_400_000,
        latency_ms=0.25,
        peak_memory_bytes=40_000,
        metrics={"accuracy": 0.95, "loss": 0.2},
        seconds=12.0,
        layers=layers,
        **parts,
    )
    return dataclasses.replace(found, **changes)


def history(steps: int = 3, layers: int = 2, *, seed: int = 0) -> list[Measurement]:
    """Return a run of so many measurements; every second step leaves the size alone."""
    draw = random.Random(seed)
    names = [f"encoder.layer.{index}.attention.self.query.weight" for index in range(layers)]
    found = [measurement("original", tuple(layer(name) for name in names))]
    for step in range(1, steps):
        weights = tuple(squeezed(name) for name in names)
        smaller = tuple(
            dataclasses.replace(one, code_bytes=one.code_bytes // (1 + step // 2))
            for one in weights
        )
        scores = {"accuracy": draw.uniform(0.5, 0.95), "loss": 0.2 + step}
        name = STEPS[(step - 1) % len(STEPS)]
        found.append(measurement(name, smaller, metrics=scores))
    return found


FACTS: dict[str, Any] = {
    "recipe": "steps:\n- prune: {keep: 0.25}\n- train: {epochs: 3}\n",
    "seed": 12345,
    "model_hash": "8eba45",
    "task": {
        "name": "digits",
        "examples": {"train": 1365, "validate": 72, "test": 360},
        "metrics": ["accuracy"],
        "classes": ["zero", "one"],
        "image": None,
        "drawn": None,
    },
    "environment": {"torch": "2.13.0", "gpu": None, "precision": {"dtype": "float32"}},
    "notes": [],
}


ODD: dict[str, tuple[float, ...]] = {
    "one": (0.5,),
    "two": (0.5, 0.25),
    "equal": (2.0,) * 9,
    "zero": (0.0,) * 9,
    "ends at zero": (1.0, 0.5, 0.0),
    "below zero": (1.0, -1.0),
    "not finite": (math.inf, 1.0, math.nan, 0.5),
    "nothing finite": (math.nan,),
    "tiny": (1e-300, 1e-17, 1e-30),
    "huge and level": (-1e20,) * 3,
    "no loss": (),
}


def learned(parts: int = 27) -> Measurement:
    """Return the measurement of a step that trained so many parts, each with its curve."""
    curves = {
        f"encoder.layer.{part}.output.dense": tuple(
            (1 + part) * math.exp(-index / (5 + part)) for index in range(100)
        )
        for part in range(parts)
    }
    return measurement("reconstruct", (layer(),), curves=curves)


def _runs() -> dict[str, tuple[list[Measurement], dict[str, Any]]]:
    untasked = {"metrics": {}, "macs": None, "bit_operations": None}
    untasked |= {"latency_ms": None, "peak_memory_bytes": None}
    plain, long = history(), history(13, 5)
    huge = {"size_bytes": 3 * 10**12, "dense_bytes": 3 * 10**12, "parameters": 10**12}
    nothing = {"low": 0.0, "high": 0.0, "counts": [0] * 41}
    return {
        "two": (history(2), FACTS),
        "five": (history(5), FACTS),
        "twelve steps": (long, FACTS),
        "sixty layers": (history(3, 60), FACTS),
        "one measurement": (plain[:1], FACTS),
        "no task": ([dataclasses.replace(m, **untasked) for m in plain], {**FACTS, "task": None}),
        "no layers": ([dataclasses.replace(m, layers=()) for m in plain], FACTS),
        "no facts": (plain, {}),
        "same accuracy": ([dataclasses.replace(m, metrics={"accuracy": 0.9}) for m in long], FACTS),
        "same size": ([plain[0]] * 4, FACTS),
        "larger": ([plain[-1], plain[0]], FACTS),
        "huge": ([dataclasses.replace(plain[0], **huge), plain[-1]], FACTS),
        "only a loss": ([dataclasses.replace(m, metrics={"loss": 2.0}) for m in plain], FACTS),
        "no number": (
            [dataclasses.replace(m, metrics={"accuracy": math.nan}) for m in plain[:2]]
            + [dataclasses.replace(plain[-1], metrics={"accuracy": math.inf})],
            FACTS,
        ),
        "a metric appears": (
            [dataclasses.replace(plain[0], metrics={}), *plain[1:]],
            FACTS,
        ),
        "layers come and go": ([plain[0], measurement("factorize", (squeezed("new"),))], FACTS),
        "all zero": (
            [
                measurement(
                    "original", (layer(nonzero=0, parameters=0, dense_bytes=0, histogram=nothing),)
                )
            ],
            FACTS,
        ),
        "notes": (plain, {**FACTS, "notes": ["resumed with other threads"]}),
        "many curves": ([plain[0], learned(60)], FACTS),
        "odd curves": ([plain[0], dataclasses.replace(plain[1], curves=ODD)], FACTS),
    }


RUNS = _runs()


@pytest.fixture(params=sorted(RUNS))
def run(request: pytest.FixtureRequest) -> tuple[list[Measurement], dict[str, Any]]:
    return RUNS[request.param]


class Reader(HTMLParser):
    """Follows the tags of a page and keeps its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append(data.strip())


def drawings(html: str) -> list[ElementTree.Element]:
    return [
        ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    ]


def named(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [one for one in root.iter() if name in (one.get("class") or "").split()]


def test_page_is_well_formed_and_stands_alone(
    run: tuple[list[Measurement], dict[str, Any]],
) -> None:
    html = page(*run)
    reader = Reader(html)
    assert reader.open == []
    assert html.startswith("<!doctype html>\n<html")
    for outside in ("http:", "https:", "//", "url(", "@import", "src="):
        assert outside not in html
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(reader.tags)
    assert not {name for name, _ in reader.attributes if name.startswith("on")}
    assert {"h1", "table", "svg"} <= set(reader.tags)


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


def test_tables_are_rectangular(run: tuple[list[Measurement], dict[str, Any]]) -> None:
    for table in re.findall(r"<table>.*?</table>", page(*run), re.DOTALL):
        root = ElementTree.fromstring(table.replace("<wbr>", ""))
        above, below = root.findall("thead/tr")
        spans = sum(int(cell.get("colspan", 1)) for cell in above)
        assert spans == len(below) + sum(cell.get("rowspan") == "2" for cell in above)
        assert {len(row) for row in root.findall("tbody/tr")} == {spans}


def test_report_is_a_function_of_history_and_facts(tmp_path: Path) -> None:
    first = write_report(history(), FACTS, tmp_path / "a.html").read_bytes()
    again = [Measurement.from_data(one.to_data()) for one in history()]
    second = write_report(again, dict(FACTS), tmp_path / "deeper" / "b.html").read_bytes()
    assert first == second
    other = write_report(history(seed=1), FACTS, tmp_path / "a.html").read_bytes()
    assert other != first
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["a.html", "b.html"]


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


def test_losses_are_told_in_numbers() -> None:
    cells = [column.cells for column in curve_columns(measurement("train", (), curves=ODD))]
    rows = {part: ends for part, *ends in zip(*cells, strict=True)}
    assert rows["two"] == ["0.5", "0.25", f"2{TIMES}"]
    assert rows["ends at zero"] == ["1", "0", "\u2013"]
    assert rows["nothing finite"] == ["\u2013"] * 3
    assert "no loss" not in rows


def test_hostile_names_are_text(tmp_path: Path) -> None:
    weights = (layer(HOSTILE), layer("x", representation=HOSTILE))
    runs = [
        measurement(step, weights, metrics={HOSTILE: score}, curves={HOSTILE: (1.0,)})
        for step, score in (("original", 0.9), (HOSTILE, 0.8))
    ]
    facts = {
        "recipe": HOSTILE,
        "task": {"name": HOSTILE, "examples": {HOSTILE: 1}},
        "environment": {HOSTILE: HOSTILE},
        "notes": [HOSTILE],
    }
    html = write_report(runs, facts, tmp_path / "a.html").read_text(encoding="utf-8")
    reader = Reader(html)
    assert reader.open == []
    assert {"script", "img"}.isdisjoint(reader.tags)
    assert "<script" not in html
    assert sum(HOSTILE in text for text in reader.text) >= 8
    assert drawings(html)


def test_a_name_that_is_no_unicode_is_written(tmp_path: Path) -> None:
    path = write_report([measurement("original", (layer("a\ud800"),))], {}, tmp_path / "a.html")
    assert "a&#55296;" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "make", [lambda h, p: write_report(h, {}, p), lambda h, _: terminal(h, {})]
)
def test_an_empty_history_is_refused(make: Any, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no measurement"):
        make([], tmp_path / "a.html")
    assert list(tmp_path.iterdir()) == []


def test_headline_names_sizes_factor_and_scores() -> None:
    before = measurement("original", (layer(),), size_bytes=164_000)
    after = measurement("prune", (squeezed(),), size_bytes=41_000, metrics={"accuracy": 0.9311})
    text = " ".join(Reader(page([before, after], FACTS)).text)
    for expected in (
        f"digits: 4.00{TIMES} smaller",
        "164.0 kB (160.2 KiB) became 41.0 kB (40.0 KiB).",
        "Accuracy went from 95.00% to 93.11% on 360 test examples, 1.89 points lower.",
    ):
        assert expected in text
    assert f"digits: 4.00{TIMES} larger" in page([after, before], FACTS)
    assert "stayed at 95.00%" in page([before, before], FACTS)


def test_what_papers_count_is_told_by_one_name() -> None:
    before = measurement("original", (layer(),), nominal_bits=64_000)
    after = measurement("prune", (squeezed(),), nominal_bits=2_000)
    said = " ".join(Reader(page([before, after], FACTS)).text)
    assert f"Counted by codes alone, as papers do, the factor is 32.0{TIMES}." in said
    titles = [one.title for one in ledger_columns([before, after]) if one.group == "So far"]
    assert titles == ["codes alone", "file"]
    assert "predicted" not in said.lower()


def budgeted(text: str, steps: int = 1) -> dict[str, Any]:
    return {**FACTS, "recipe": f"budget: {text}\nsteps: [{', '.join(['train'] * steps)}]\n"}


@pytest.mark.parametrize(
    ("budget", "verdict"),
    [
        ("size <= 50 kB", "Budget: met (size <= 50 kB)."),
        ("size <= 40 kB", "Budget: exceeded by 1.00 kB (0.98 KiB) in size (size <= 40 kB)."),
        ("macs <= 0.5x", "Budget: exceeded by 3,200 in macs (macs <= 0.5x)."),
        ("latency <= 0.2 ms", "Budget: exceeded by 0.05 ms in latency (latency <= 0.2 ms)."),
    ],
)
def test_the_verdict_on_the_budget_stands_where_people_look(budget: str, verdict: str) -> None:
    runs = [
        measurement(step, (layer(),), size_bytes=size, macs=6400)
        for step, size in (("original", 164_000), ("prune", 41_000))
    ]
    assert verdict in Reader(page(runs, budgeted(budget))).text
    assert verdict in printed(runs, budgeted(budget), 120)


def test_a_budget_on_what_was_not_measured_is_not_judged() -> None:
    runs = [measurement("original", (layer(),), macs=None)]
    text = printed(runs, budgeted("macs <= 1 M", steps=0), 200)
    assert "Budget: not known; the budget limits macs, which was not measured" in text


def test_a_run_that_is_not_finished_is_not_judged() -> None:
    text = Reader(page(history(2), budgeted("size <= 1 kB", steps=3))).text
    assert "Unfinished: 1 of 3 steps are done." in text
    assert not any(line.startswith("Budget") for line in text)
    done = printed(history(3), FACTS, 100)
    assert "Unfinished" not in done and "Budget" not in done


def test_a_dotted_name_breaks_at_its_dots_alone() -> None:
    assert ">encoder.<wbr>layer.<wbr>0.<wbr>attention" in page(history(2, 1), FACTS)


def test_notes_seed_versions_and_recipe_are_shown() -> None:
    text = Reader(page(history(), {**FACTS, "notes": ["bytes may differ"]})).text
    for expected in ("bytes may differ", "12345", "2.13.0", "dtype float32"):
        assert expected in text
    assert FACTS["recipe"].strip() in text


def test_ledger_shows_every_step_with_its_factors_and_costs() -> None:
    runs = history(4)
    columns = {(one.group, one.title or one.unit): one.cells for one in ledger_columns(runs)}
    sizes = [one.size_bytes for one in runs]
    assert columns["So far", "file"][-1] == f"{sizes[0] / sizes[-1]:.1f}{TIMES}"
    assert columns["This step", "file"][0] == f"1.00{TIMES}"
    assert columns["One example", "latency"] == ("0.25",) * 4
    assert columns["", "Time"] == ("12.0",) * 4
    shown = [float(cell.replace(",", "")) for cell in columns["File size", "kB"]]
    assert shown == pytest.approx([size / 1000 for size in sizes], abs=0.06)


def test_layer_table_adds_up_to_the_file() -> None:
    runs = history(3, 4)
    columns = {(one.group, one.title): one.cells for one in layer_columns(runs)}
    after = [float(cell.replace(",", "")) for cell in columns["Size", "after"]]
    assert sum(after[:-1]) == after[-1] == runs[-1].size_bytes
    assert columns["", "Sparsity"][0] == "75.0"
    assert columns["Bits per weight", "stored"][0] == f"{8 * 964 / 6400:.2f}"


@pytest.mark.parametrize(
    ("sizes", "unit", "texts"),
    [
        ([164_016, 9_675], "kB", ["164.02", "9.68"]),
        ([438_000_000, 13_200_000], "MB", ["438.0", "13.2"]),
        ([118_016, 288], "B", ["118,016", "288"]),
        ([2_359_296, 200], "kB", ["2,359.3", "0.2"]),
        ([93_763_584, 3_072], "kB", ["93,764", "3"]),
        ([12, 0], "B", ["12", "0"]),
        ([], "B", []),
    ],
)
def test_byte_columns_share_a_unit_that_fits(sizes: list[int], unit: str, texts: list[str]) -> None:
    scale = byte_scale(sizes)
    assert scale.unit == unit
    assert [scale.text(size) for size in sizes] == texts


def test_main_metric_is_the_first_that_is_no_loss() -> None:
    both = measurement("original", (), metrics={"loss": 0.5, "spearman": -0.2, "score": 3.0})
    metric = main_metric([both])
    assert metric is not None
    assert (metric.name, metric.share, metric.text(-0.2)) == ("spearman", True, "-20.00")
    loss = main_metric([dataclasses.replace(both, metrics={"loss": 0.5})])
    assert loss is not None
    assert (loss.share, loss.text(0.5)) == (False, "0.5000")


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


def printed(history_: list[Measurement], facts: dict[str, Any], width: int) -> str:
    from rich.console import Console

    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(terminal(history_, facts))
    return capture.get()


@pytest.mark.parametrize("width", [50, 80, 200])
def test_terminal_prints_every_cell_of_the_tables(width: int) -> None:
    runs = [*history(4), learned(3)]
    text = printed(runs, FACTS, width)
    assert max(map(len, text.splitlines())) <= width
    words = set(text.split())
    for column in (*ledger_columns(runs), *curve_columns(runs[-1])):
        assert {word for cell in column.cells for word in cell.split()} <= words
    assert {"12345", "1,365,", "digits:"} <= words


def test_terminal_prints_whatever_the_page_shows(
    run: tuple[list[Measurement], dict[str, Any]],
) -> None:
    assert run[0][-1].step in printed(*run, width=100)


def test_terminal_reads_no_markup_in_names() -> None:
    runs = [measurement("[bold]original[/bold]", (layer("[red]fc"),))]
    text = printed(runs, {"notes": ["[blink]note"]}, 120)
    assert "[bold]original[/bold]" in text
    assert "[red]fc" in text
    assert "[blink]note" in text
