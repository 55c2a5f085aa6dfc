"""Tables of measured results, rendered from papers/results: nothing is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "papers" / "results"
BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->"
# What the front page shows, in this order; papers/README.md shows every file.
FRONT = ("deep_compression", "chaining_resnet20", "shipped_recipe")
FRONT_INTRO = """Measured on full test sets. *File* is everything on disk, *smaller* its ratio to a
float32 safetensors file of the same network, *before* the accuracy of our own uncompressed network.
Training settings of the LeNets and of the 6 bit rows were chosen or kept by test score, so these
rows are slightly optimistic; a row without ± is one seed. Every table, with command, machine and
settings, is in [papers/README.md](papers/README.md)."""
PAPERS_INTRO = """# Tables of the papers

One script per table. A script runs the methods, prints the published figure beside ours, and writes
`papers/results/<name>.json`; the tables below are rendered from those files. Scores are such that
higher is better; *baseline* is our own uncompressed network on the same data. Times are those of a
machine that did other work beside; rows were measured on the code of their day, and where a row's
note says another day, the file was put together from finished runs. The data are found through the
environment variable `LACONIC_DATA`.
"""
COLUMNS = (
    "row", "task", "metric", "ours", "seeds", "baseline", "published",
    "size_bytes", "ratio", "seconds",
)  # fmt: skip
HEADINGS = {"size_bytes": "size (bytes)", "ratio": "times smaller", "seconds": "time (s)"}


def table(rows: Iterable[Iterable[str]], headings: Iterable[str]) -> str:
    """Return a Markdown table."""
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def cell(row: Mapping[str, Any], column: str) -> str:
    """Return one cell of a table of results."""
    value = row.get(column)
    if value is None:
        return ""
    if column == "ours" and row.get("std") is not None:
        return f"{value:.4g} ± {row['std']:.2g}"
    if column == "published" and row.get("published_setting"):
        return f"{value:.4g} ({row['published_setting']})"
    if column == "seeds":
        return str(len(value) if isinstance(value, list) else value)
    if column == "size_bytes":
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def results(path: Path) -> str:
    """Return the part on one file of results; columns without a value are left out."""
    data = json.loads(path.read_text(encoding="utf-8"))
    shown = [name for name in COLUMNS if any(row.get(name) is not None for row in data["rows"])]
    rows = [[cell(row, name) for name in shown] for row in data["rows"]]
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    run = f"`{data['command']}`, {data['date']}, {data['hardware']}; {versions}."
    headings = [HEADINGS.get(name, name) for name in shown]
    notes = [f"- {row['row']}: {row['note']}" for row in data["rows"] if row.get("note")]
    return "\n\n".join([f"## {path.stem}", run, table(rows, headings), "\n".join(notes)]).strip()


def papers(note: str) -> str:
    """Return the page of every table of the papers that has been run."""
    found = [results(path) for path in sorted(RESULTS.glob("*.json"))]
    parts = [note, PAPERS_INTRO, *found]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def readme() -> str:
    """Return the front page with its table of results made anew."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{front()}\n{END}{after}"


def front() -> str:
    """Return the table of the front page."""
    lines = []
    for name in FRONT:
        path = RESULTS / f"{name}.json"
        if path.is_file():
            lines += [front_row(row) for row in json.loads(path.read_text("utf-8"))["rows"]]
    headings = ("network", "data", "accuracy, %", "before", "published", "file", "smaller")
    return f"{FRONT_INTRO}\n\n{table(lines, headings)}" if lines else FRONT_INTRO


def front_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return one line of the front page's table."""
    published = "" if row["published"] is None else f"{row['published']:.2f}"
    spread = "" if row["std"] is None else f" ± {row['std']:.2f}"
    return (
        row["row"],
        row["task"],
        f"{row['ours']:.2f}{spread}",
        f"{row['baseline']:.2f}",
        published,
        f"{row['size_bytes'] / 1000:,.1f} kB",
        f"{row['ratio']:.1f}x",
    )
