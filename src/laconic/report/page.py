"""The page of a report: its sections as elements, from history and facts alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from laconic.ledger import Layer, Measurement, size_text
from laconic.report.charts import Mark, bar, curve, histogram, stacked_bar, tradeoff
from laconic.report.markup import details, document, legend, section, table
from laconic.report.summary import Tile, headline, sentences, tiles, verdict
from laconic.report.svg import breakable, node
from laconic.report.tables import (
    LOSS,
    MINUS,
    PARTS,
    byte_columns,
    condition_rows,
    curve_columns,
    curves_of,
    layer_columns,
    ledger_columns,
    main_metric,
    parts_of,
    short_text,
    sparsity,
    step_names,
    stored_bits,
    work_columns,
)

__all__ = ["page"]

WIDE = (520, 400)
NARROW = (344, 320)
THIN, THICK = 5, 22
NUMBERS = "The same in numbers"


def page(history: Sequence[Measurement], facts: Mapping[str, Any]) -> str:
    """Return the report as one HTML document that needs nothing else.

    Args:
        history: at least one measurement, the uncompressed network first.
        facts: of the run.

    >>> from laconic.measure import measure
    >>> from laconic.models import digits_cnn
    >>> page([measure(digits_cnn())], {})[:15]
    '<!doctype html>'
    """
    sections = [
        _header(history, facts),
        _ledger(history),
        _pictures(history),
        *_layers(history),
        *_weights(history),
        *_curves(history),
        _conditions(facts),
    ]
    return document(f"Laconic report: {headline(history, facts)}", sections)


def _header(history: Sequence[Measurement], facts: Mapping[str, Any]) -> Element:
    chain = [node("li", None, node("span", None, name)) for name in step_names(history)]
    judged = verdict(history, facts)
    return node(
        "header",
        None,
        node("p", {"class": "kicker"}, "Laconic report"),
        node("h1", None, headline(history, facts)),
        node("p", {"class": "lead"}, sentences(history, facts)),
        *([node("p", {"class": "lead"}, judged)] if judged else []),
        node("ol", {"class": "chain", "aria-label": "Steps"}, *chain),
        node("dl", {"class": "tiles"}, *map(_tile, tiles(history))),
    )


def _tile(tile: Tile) -> Element:
    change: list[Element | str] = [node("span", None, tile.after)]
    if tile.before:
        change = [node("span", {"class": "from"}, f"{tile.before} →"), " ", *change]
    return node(
        "div",
        None,
        node("dt", None, tile.title),
        node("dd", {"class": "change"}, *change),
        node("dd", {"class": "detail"}, tile.detail),
    )


def _ledger(history: Sequence[Measurement]) -> Element:
    return section(
        "What every step gained",
        "Codes alone counts the bits of codes and float parameters, as papers do; file compares "
        "what is on disk, with positions, tables and header. The factors of the steps multiply "
        "to the factor so far.",
        table(ledger_columns(history), "Ledger of the steps"),
        kind="ledger",
    )


def _pictures(history: Sequence[Measurement]) -> Element:
    left = [*_tradeoff(history), *_work(history)]
    columns = [node("div", None, *left)] if left else []
    kind = "pair" if left else "single"
    return node("div", {"class": kind}, *columns, node("div", None, _bytes(history)))


def _work(history: Sequence[Measurement]) -> list[Element]:
    columns = work_columns(history)
    if len(columns) == 1:
        return []
    return [
        section(
            "What one example takes",
            "Bit operations: multiply-accumulates (MACs) by the bits of both factors, pruned "
            "weights skipped. Memory: of a forward with plain weights.",
            table(columns, "Work and memory of one example"),
        )
    ]


def _tradeoff(history: Sequence[Measurement]) -> list[Element]:
    metric = main_metric(history)
    if metric is None:
        return []
    scores = [one.metrics.get(metric.name, math.nan) for one in history]
    axis = f"{metric.title}, {metric.unit}" if metric.unit else metric.title
    marks = [
        Mark(
            name,
            one.size_bytes,
            100 * score if metric.share else score,
            f"{name}: {size_text(one.size_bytes)}, {metric.title} {metric.text(score)} "
            f"{metric.unit}".rstrip(),
        )
        for name, one, score in zip(step_names(history), history, scores, strict=True)
        if math.isfinite(score)
    ]
    if len(marks) < 2:
        return []
    title = f"Size against {metric.name.replace('_', ' ')}"
    drawings = [
        tradeoff(marks, title=title, axis=axis, size=size, attributes={"class": kind})
        for size, kind in ((WIDE, "tradeoff wide"), (NARROW, "tradeoff narrow"))
    ]
    better = "down" if metric.name == LOSS else "up"
    return [section(title, f"The steps in order; {better} and to the left is better.", *drawings)]


def _bytes(history: Sequence[Measurement]) -> Element:
    most = max(one.size_bytes for one in history)
    rows = []
    for name, one in zip(step_names(history), history, strict=True):
        parts, size = parts_of(one), size_text(one.size_bytes)
        thin = stacked_bar(parts, title=f"{name}: {size}", whole=most, height=THIN, shares=False)
        thick = stacked_bar(
            parts, title=f"{name}: shares", whole=one.size_bytes, height=THICK, shares=True
        )
        words = [node("span", {"class": "step"}, name), node("span", {"class": "size"}, size)]
        rows.append(node("li", None, *words, thin, thick))
    return section(
        "Where the bytes are",
        "Thin bars: file sizes, on one scale. Thick bars: what each file is made of.",
        _part_legend(history),
        node("ol", {"class": "bytes"}, *rows),
        details(byte_columns(history), "Bytes of the file after every step", NUMBERS),
    )


def _part_legend(history: Sequence[Measurement]) -> Element:
    used = {part for one in history for part, size in parts_of(one).items() if size}
    return legend((part, word) for part, word in PARTS.items() if part in used)


def _layers(history: Sequence[Measurement]) -> list[Element]:
    layers = history[-1].layers
    if not layers:
        return []
    columns = layer_columns(history)
    most = max([1, *(layer.size_bytes for layer in layers)])
    bits = max([1.0, *map(stored_bits, layers)])
    none: list[Element | None] = [None, None]
    bars = {
        ("Bits per weight", "stored"): [
            *(bar(stored_bits(one) / bits, f"{stored_bits(one):.2f} bits") for one in layers),
            *none,
        ],
        ("", "Sparsity"): [
            *(bar(sparsity(one), f"{sparsity(one):.1%} zero") for one in layers),
            *none,
        ],
        ("Size", "after"): [*(_layer_bar(one, most) for one in layers), *none],
    }
    return [
        section(
            "Layer by layer",
            "Code bits are those of one surviving weight; stored bits are what the file spends on "
            "each number of the weight, with positions and tables. Sparsity is the share of zeros.",
            table(columns, "Layers of the last step", bars=bars, ends=("rest", "sum")),
            kind="layers",
        )
    ]


def _layer_bar(layer: Layer, most: int) -> Element:
    title = f"{layer.name}: {size_text(layer.size_bytes)}"
    return stacked_bar(parts_of(layer), title=title, whole=most, height=10, shares=False)


def _weights(history: Sequence[Measurement]) -> list[Element]:
    before = {layer.name: layer.histogram for layer in history[0].layers}
    alone = len(history) == 1
    figures = []
    for layer in history[-1].layers:
        old = None if alone else before.get(layer.name)
        title = f"{layer.name}: distribution of its weights"
        drawn, bound = histogram(old, layer.histogram, title=title)
        ends = [node("span", None, text) for text in (f"{MINUS}{bound:.3g}", "0", f"{bound:.3g}")]
        name, scale = (
            node("p", {"class": "name"}, *breakable(layer.name)),
            node("p", {"class": "range"}, *ends),
        )
        figures.append(node("li", None, name, drawn, scale))
    if not figures:
        return []
    marks = [("line", "now")] if alone else [("area", "before"), ("line", "after")]
    return [
        section(
            "Weights before and after" if not alone else "Weights",
            "Heights are square roots of the number of weights per unit of value, before and "
            "after on one scale. Zeros are left out.",
            legend(marks),
            node("ul", {"class": "multiples"}, *figures),
        )
    ]


def _curves(history: Sequence[Measurement]) -> list[Element]:
    """Return a section for every step that trained something."""
    return [
        section(
            f"Losses in step {name}",
            "The loss from the first update to the last, on a scale of its own: logarithmic, with "
            "a line at every power of ten, where it is positive throughout. Long curves are "
            "means of a hundred stretches.",
            node("ul", {"class": "multiples"}, *(_curve(*each) for each in found.items())),
            details(curve_columns(one), "First and last losses of the step", NUMBERS),
        )
        for name, one in zip(step_names(history), history, strict=True)
        if (found := curves_of(one))
    ]


def _curve(part: str, losses: Sequence[float]) -> Element:
    ends = [short_text(loss) for loss in (losses[0], losses[-1])]
    drawn = curve(losses, title=f"{part}: loss {ends[0]} to {ends[1]}")
    scale = node("p", {"class": "range"}, *(node("span", None, end) for end in ends))
    return node("li", None, node("p", {"class": "name"}, *breakable(part)), drawn, scale)


def _conditions(facts: Mapping[str, Any]) -> Element:
    rows = []
    for key, value in condition_rows(facts):
        rows += [node("dt", None, key), node("dd", None, value)]
    notes = [node("li", None, str(note)) for note in facts.get("notes") or ()]
    return section(
        "Recipe and conditions",
        "The same recipe, network, seed, versions, threads and precision give the same file, "
        "byte for byte.",
        *([node("ul", {"class": "notes"}, *notes)] if notes else []),
        node(
            "div",
            {"class": "pair inner"},
            node("pre", {"aria-label": "Recipe"}, str(facts.get("recipe", "")).strip()),
            node("dl", {"class": "conditions"}, *rows),
        ),
    )
