"""Progress bars and log lines on a terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from laconic.progress import reporting

__all__ = ["Bars", "showing"]


class Bars:
    """Progress bars: label, count, rate, time gone and left; log lines above them.

    Args:
        console: of the terminal.

    >>> bars = Bars(Console(quiet=True))
    >>> handle = bars.start("train", 10)
    >>> bars.advance(handle)
    >>> bars.stop(handle), bars.close()
    (None, None)
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=24, style="dim", complete_style="cyan", finished_style="cyan"),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("left", style="dim"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )

    def start(self, label: str, total: int | None) -> int:
        """Open a bar and return its handle."""
        self._progress.start()
        return self._progress.add_task(label, total=total)

    def advance(self, handle: int) -> None:
        """Count one item."""
        self._progress.advance(TaskID(handle))

    def stop(self, handle: int) -> None:
        """Take a bar away; without any, the terminal is free for other lines."""
        self._progress.remove_task(TaskID(handle))
        if not self._progress.tasks:
            self._progress.stop()

    def close(self) -> None:
        """Take every bar away and give the terminal back."""
        self._progress.stop()

    def handler(self) -> logging.Handler:
        """Return what prints log lines above the bars."""
        handler = RichHandler(
            console=self.console,
            show_level=False,
            show_path=False,
            omit_repeated_times=False,
            log_time_format="%H:%M:%S",
            keywords=[],
        )
        handler.highlighter = None  # type: ignore[assignment]
        return handler


@contextmanager
def showing() -> Iterator[None]:
    """Show progress, on a terminal or in a notebook, throughout a with block.

    >>> from laconic.progress import progress
    >>> with showing():
    ...     sum(progress([1, 2], "adding"))
    3
    """
    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        yield
        return
    bars = Bars(console)
    try:
        with reporting(bars):
            yield
    finally:
        bars.close()


class _Rate(ProgressColumn):
    """Items per second, or seconds per item where that is the larger number."""

    def render(self, task: Task) -> Text:
        """Return the rate of a bar."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each", style="dim")
