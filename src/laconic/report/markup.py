"""Pieces of a page in HTML: the document, its sections, columns as a table."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from xml.etree.ElementTree import Element, tostring

from laconic.report.style import STYLE
from laconic.report.svg import breakable, node
from laconic.report.tables import Column, heading

__all__ = ["details", "document", "legend", "section", "table"]

# (group, title) of a column -> one drawing per row, in a column of its own to the right.
Bars = Mapping[tuple[str, str], Sequence[Element | None]]


def document(title: str, sections: Sequence[Element]) -> str:
    """Return a page that needs nothing else, as text.

    >>> document("sizes", [])[:15]
    '<!doctype html>'
    """
    head = node(
        "head",
        None,
        node("meta", {"charset": "utf-8"}),
        node("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        node("title", None, title),
        node("style", None, STYLE),
    )
    whole = node("html", {"lang": "en"}, head, node("body", None, node("main", None, *sections)))
    for element in whole.iter():
        # One row a line, so that two reports can be compared as text.
        if element.tag in {"section", "tr", "li", "div", "dd"}:
            element.tail = "\n"
    return f"<!doctype html>\n{tostring(whole, encoding='unicode', method='html')}\n"


def section(title: str, note: str, *children: Element, kind: str = "") -> Element:
    """Return a section with a heading and a line below it.

    >>> section("Sizes", "in bytes")[1].text
    'in bytes'
    """
    found = [node("h2", None, title), node("p", {"class": "note"}, note), *children]
    return node("section", {"class": kind} if kind else None, *found)


def legend(marks: Iterable[tuple[str, str]]) -> Element:
    """Return what the marks of a drawing mean: class of each and words.

    >>> len(legend([("line", "now"), ("dashes", "before")]))
    2
    """
    items = [node("li", None, node("i", {"class": kind}), words) for kind, words in marks]
    return node("ul", {"class": "legend"}, *items)


def details(columns: Sequence[Column], caption: str, summary: str = "") -> Element:
    """Return a table that a click on a line unfolds.

    >>> details([Column("Step", ("prune",))], "Steps", "In numbers").findtext("summary")
    'In numbers'
    """
    return node("details", None, node("summary", None, summary or caption), table(columns, caption))


def table(
    columns: Sequence[Column], caption: str, *, bars: Bars | None = None, ends: Sequence[str] = ()
) -> Element:
    """Return a table in a box of its own that scrolls when the page is narrow.

    Args:
        columns: the first one names the rows.
        caption: what a screen reader announces.
        bars: drawings beside columns.
        ends: classes of the last rows.

    >>> table([Column("Step", ("0 original",))], "steps").get("aria-label")
    'steps'
    """
    bars = bars or {}
    runs = [list(run) for _, run in itertools.groupby(columns, _run)]
    count = len(columns[0].cells)
    kinds = [""] * (count - len(ends)) + list(ends)
    rows = [
        node("tr", {"class": kind}, *_row(runs, index, bars)) for index, kind in enumerate(kinds)
    ]
    frame = {"class": "scroll", "role": "region", "aria-label": caption, "tabindex": 0}
    return node("div", frame, node("table", None, _head(runs, bars), node("tbody", None, *rows)))


def _run(column: Column) -> tuple[str, str]:
    return column.group, "" if column.group else column.title


def _head(runs: Sequence[Sequence[Column]], bars: Bars) -> Element:
    above: list[Element] = []
    below: list[Element] = []
    for run in runs:
        grouped = bool(run[0].group)
        if grouped:
            width = len(run) + sum((column.group, column.title) in bars for column in run)
            spans = {"class": "group open", "scope": "colgroup", "colspan": width}
            above.append(node("th", spans, node("span", None, run[0].group)))
        for column in run:
            row, rows = (below, {}) if grouped else (above, {"rowspan": 2})
            kind = {"class": _kind(column, column is run[0]), "scope": "col", **rows}
            row.append(node("th", kind, heading(column)))
            if (column.group, column.title) in bars:
                row.append(node("td", {"class": "bar", **rows}))
    return node("thead", None, node("tr", None, *above), node("tr", None, *below))


def _kind(column: Column, opens: bool) -> str:
    return " ".join(["number" if column.number else "word", *(["open"] if opens else [])])


def _row(runs: Sequence[Sequence[Column]], index: int, bars: Bars) -> list[Element]:
    cells: list[Element] = []
    for run in runs:
        for column in run:
            kind = {"class": _kind(column, column is run[0])}
            if cells:
                cells.append(node("td", kind, column.cells[index]))
            else:
                cells.append(node("th", {**kind, "scope": "row"}, *breakable(column.cells[index])))
            drawings = bars.get((column.group, column.title))
            if drawings is not None:
                drawn = drawings[index]
                cells.append(node("td", {"class": "bar"}, *([] if drawn is None else [drawn])))
    return cells
