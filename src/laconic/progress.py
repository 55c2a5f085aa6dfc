"""Progress of long loops: silent unless a reporter is installed."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

__all__ = ["Reporter", "progress", "reporting"]

Item = TypeVar("Item")


class Reporter(Protocol):
    """What shows progress: the CLI's bars, a notebook's, a test's list."""

    def start(self, label: str, total: int | None) -> int:
        """Open a bar and return its handle."""

    def advance(self, handle: int) -> None:
        """Count one item."""

    def stop(self, handle: int) -> None:
        """Close the bar."""


_reporter: contextvars.ContextVar[Reporter | None] = contextvars.ContextVar(
    "laconic_reporter", default=None
)


@contextlib.contextmanager
def reporting(reporter: Reporter | None) -> Iterator[None]:
    """Install a reporter for the duration of a with block.

    >>> with reporting(None):
    ...     list(progress(range(2), "counting"))
    [0, 1]
    """
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)


def progress(iterable: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items of an iterable and report each one.

    Args:
        iterable: what to loop over.
        label: what the user reads beside the bar.
        total: number of items, where the iterable has no length.

    >>> list(progress([1, 2], "adding"))
    [1, 2]
    """
    reporter = _reporter.get()
    if reporter is None:
        yield from iterable
        return
    if total is None:
        total = len(iterable) if isinstance(iterable, (list, tuple, range)) else None
    handle = reporter.start(label, total)
    try:
        for item in iterable:
            yield item
            reporter.advance(handle)
    finally:
        reporter.stop(handle)
