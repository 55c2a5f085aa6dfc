"""What the command line prints: results, events and messages."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import typer

from laconic.progress import reporting

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["Output", "jsonable"]

# What is not read on a terminal is not folded: wide enough for any table.
UNFOLDED = 400
DETAIL = logging.INFO


def jsonable(data: Any) -> Any:
    """Return data that JSON can hold: paths, and numbers that are none, become text.

    >>> jsonable({"loss": float("nan"), "shape": (2, 3)})
    {'loss': 'nan', 'shape': [2, 3]}
    """
    if isinstance(data, Mapping):
        return {str(key): jsonable(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [jsonable(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    return data if data is None or isinstance(data, (bool, int, float, str)) else str(data)


@dataclass(frozen=True)
class Output:
    """How a command answers.

    Attributes:
        json: one JSON object per line on standard output, and nothing else there.
        quiet: the result alone: no bars, no steps of the way.
        debug: a traceback besides the message.

    >>> Output(json=True).event("result", size_bytes=3)
    {"event": "result", "size_bytes": 3}
    """

    json: bool = False
    quiet: bool = False
    debug: bool = False

    def event(self, kind: str, **fields: Any) -> None:
        """Write one JSON line, where JSON was asked for."""
        if self.json:
            typer.echo(json.dumps(jsonable({"event": kind, **fields}), allow_nan=False))

    def line(self, text: str = "") -> None:
        """Write one line of a result for people to read."""
        if not self.json:
            typer.echo(printable(text))

    def note(self, text: str) -> None:
        """Write one line on what is going on; not with --quiet."""
        self.event("note", message=text)
        if not self.quiet:
            self.line(text)

    def error(self, message: str) -> None:
        """Write why a command stopped, on standard error."""
        self.event("error", message=message)
        typer.echo(printable(message), err=True)

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        text: Sequence[str] = (),
        spare: Sequence[str] = (),
    ) -> None:
        """Print a table for people to read.

        Args:
            columns: headings.
            rows: cells.
            text: headings of the columns, besides the first, that hold words, not numbers.
            spare: headings to leave out, first to last, until the terminal is wide enough.
        """
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        kept = _fitting(columns, rows, spare, console_of(stderr=False).width)
        for place in kept:
            words = columns[place] in text
            left = words or not place
            table.add_column(columns[place], justify="left" if left else "right", no_wrap=not words)
        for row in rows:
            table.add_row(*(_plain(row[place]) for place in kept))
        self.show(table)

    def show(self, drawing: RenderableType) -> None:
        """Print what rich draws."""
        if self.json:
            return
        console = console_of(stderr=False)
        if console.is_terminal:
            console.print(drawing, highlight=False)
            return
        with console.capture() as printed:
            console.print(drawing, highlight=False)
        for line in printed.get().splitlines():
            typer.echo(line.rstrip())

    @contextmanager
    def working(self, *, about: str = "laconic") -> Iterator[None]:
        """Show log lines and progress bars for the duration of a with block.

        Args:
            about: the part of laconic whose log lines are shown; of others, warnings alone.
        """
        logger = logging.getLogger("laconic")
        level, propagate = logger.level, logger.propagate
        bars, handler = self._live() if self._lively() else (None, self._handler())
        handler.addFilter(lambda record: record.name.startswith(about) or record.levelno > DETAIL)
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING if self.quiet else DETAIL)
        logger.propagate = False
        try:
            with reporting(bars):
                yield
        finally:
            if bars is not None:
                bars.close()
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate

    def _lively(self) -> bool:
        return _is_terminal(sys.stderr) and not self.quiet and not self.json

    def _live(self) -> tuple[Any, logging.Handler]:
        from laconic.bars import Bars

        bars = Bars(console_of(stderr=True))
        return bars, bars.handler()

    def _handler(self) -> logging.Handler:
        if self.json:
            return _JsonLines(self)
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
        return handler


class _JsonLines(logging.Handler):
    """Writes every log line as a JSON event."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self.output = output

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self.output.event("log", level=record.levelname.lower(), message=record.getMessage())


def console_of(*, stderr: bool) -> Console:
    """Return a console that folds lines on a terminal alone."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if _is_terminal(stream) else UNFOLDED)


def printable(text: str) -> str:
    r"""Return a text that may come from a file without what would be orders to a terminal.

    >>> print(printable("a" + chr(27) + "[31m"))
    a\x1b[31m
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _is_terminal(stream: IO[str] | None) -> bool:
    return stream is not None and stream.isatty()  # there is none where it was closed


def _plain(cell: str) -> Any:
    from rich.text import Text

    return Text(printable(cell))


def _fitting(
    columns: Sequence[str], rows: Sequence[Sequence[str]], spare: Sequence[str], width: int
) -> list[int]:
    """Return the positions of the columns that fit, giving up spare ones first to last."""
    wide = [max(len(row[place]) for row in [columns, *rows]) + 2 for place in range(len(columns))]
    kept = list(range(len(columns)))
    for heading in spare:
        if sum(wide[place] for place in kept) <= width:
            break
        kept = [place for place in kept if columns[place] != heading]
    return kept
