"""What is written of a run and of analyses: HTML files, and the same tables for the terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laconic.errors import RunError
from laconic.ledger import Measurement
from laconic.report.analyse import Analysis
from laconic.report.analysis import analysis_page
from laconic.report.page import page
from laconic.report.summary import headline, sentences, verdict
from laconic.report.tables import (
    SHARE_GROUP,
    SIZE_GROUPS,
    Column,
    byte_columns,
    condition_rows,
    curve_columns,
    curves_of,
    layer_columns,
    ledger_columns,
    step_names,
    work_columns,
)
from laconic.ship.container import write_file

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group
    from rich.table import Table

__all__ = ["terminal", "write_analysis", "write_report"]

GAP = 2  # between two columns of a terminal, in characters


def write_report(
    history: Sequence[Measurement], facts: Mapping[str, Any], path: str | Path
) -> Path:
    """Write the report of a run as one HTML file and return its path.

    The file needs no network and no script, and is a function of history and facts alone: the
    same run gives the same bytes. It appears whole or not at all.

    Args:
        history: one measurement before the first step and one after each.
        facts: of the run: recipe, seed, model_hash, task, environment, notes; all optional.
        path: where to; an existing file is replaced.

    Raises:
        RunError: there is no measurement.

    >>> import tempfile
    >>> from laconic.measure import measure
    >>> from laconic.models import digits_cnn
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_report([measure(digits_cnn())], {}, Path(folder) / "report.html").name
    'report.html'
    """
    _check(history)
    return _written(page(history, facts), Path(path))


def write_analysis(
    analyses: Sequence[Analysis], path: str | Path, *, title: str = "Analyses of a loss"
) -> Path:
    """Write analyses as one HTML file, in the look of the report, and return its path.

    Args:
        analyses: what ``eigenvalues``, ``loss_surface``, ... found, in the order of the page.
        path: where to; an existing file is replaced.
        title: of the page.

    Raises:
        RunError: there is no analysis.

    >>> import tempfile
    >>> from laconic.report import Eigenvalues
    >>> found = Eigenvalues({"float": {"fc": (1.0, 3.0)}})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_analysis([found], Path(folder) / "analysis.html").name
    'analysis.html'
    """
    if not analyses:
        raise RunError("there is no analysis to write; make one first")
    return _written(analysis_page(analyses, title), Path(path))


def _written(text: str, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A lone surrogate in a name is no reason to have no report.
    write_file(path, text.encode("utf-8", "xmlcharrefreplace"))
    return path


def terminal(history: Sequence[Measurement], facts: Mapping[str, Any]) -> Group:
    """Return the tables of the report for ``rich`` to print.

    Args:
        history: as for ``write_report``.
        facts: as for ``write_report``.

    Raises:
        RunError: there is no measurement.

    >>> from laconic.measure import measure
    >>> from laconic.models import digits_cnn
    >>> len(terminal([measure(digits_cnn())], {}).renderables) > 3
    True
    """
    from rich.console import Group
    from rich.text import Text

    _check(history)
    judged = verdict(history, facts)
    step, *rest = ledger_columns(history)
    sizes = [column for column in rest if column.group in SIZE_GROUPS]
    shares = [column for column in rest if column.group == SHARE_GROUP]
    costs = [column for column in rest if column.group not in {*SIZE_GROUPS, SHARE_GROUP}]
    work = work_columns(history)
    conditions = [*condition_rows(facts), *(("note", str(note)) for note in facts.get("notes", ()))]
    return Group(
        Text(headline(history, facts), style="bold"),
        Text(sentences(history, facts)),
        *([Text(judged)] if judged else []),
        _Sheet("What every step gained", [step, *sizes]),
        _Sheet("Scores and costs", [step, *costs]),
        *([_Sheet("What one example takes", work)] if len(work) > 1 else []),
        _Sheet("Where the bytes are", [*byte_columns(history)[:-1], *shares]),
        _Sheet("Layer by layer", layer_columns(history)),
        *(
            _Sheet(f"Losses in step {name}", curve_columns(one))
            for name, one in zip(step_names(history), history, strict=True)
            if curves_of(one)
        ),
        Text("\nConditions", style="bold"),
        *(Text(f"{key}: {value}") for key, value in conditions),
        Text("\nRecipe", style="bold"),
        Text(str(facts.get("recipe", "")).rstrip()),
    )


@dataclass(frozen=True)
class _Sheet:
    """A table for ``rich``: on a narrow terminal several, each beginning with the names."""

    title: str
    columns: Sequence[Column]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        names, *rest = self.columns
        title = f"\n{self.title}"
        while rest:
            left = options.max_width - _width(names)
            fits = [left >= total for total in itertools.accumulate(map(_width, rest))]
            count = max(fits.count(True), 1)
            yield _table(title, [names, *rest[:count]])
            title, rest = "", rest[count:]


def _width(column: Column) -> int:
    words = [word for text in _lines(column) for word in text.split()]
    return GAP + max(map(len, (*column.cells, *words)), default=0)


def _lines(column: Column) -> list[str]:
    return [line for line in (column.group, column.title, column.unit) if line]


def _table(title: str, columns: Sequence[Column]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    table.padding = (0, GAP - 1, 0, 0)
    table.pad_edge = table.show_edge = False
    for column in columns:
        table.add_column(
            Text("\n".join(_lines(column))),
            justify="right" if column.number else "left",
            vertical="bottom",
            overflow="fold",
            width=_width(column) - GAP if column.number else None,
        )
    for cells in zip(*(column.cells for column in columns), strict=True):
        # As Text, a name in square brackets is no mark-up.
        table.add_row(*map(Text, cells))
    return table


def _check(history: Sequence[Measurement]) -> None:
    if not history:
        raise RunError("the history holds no measurement; run a recipe first, then report it")
