"""The user's own code, which lines of a recipe name: what it does wrong becomes a sentence."""

from __future__ import annotations

import contextlib
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from laconic.errors import LaconicError
from laconic.own import is_own, plain_own

__all__ = ["own_code"]

OURS = Path(__file__).parents[1]
PYTHONS = Path(sysconfig.get_path("stdlib"))
INSTALLED = {"site-packages", "dist-packages"}


@contextlib.contextmanager
def own_code(key: str, line: Mapping[str, Any] | str) -> Iterator[None]:
    """Say in a with block what the code that a line names has raised, and where.

    Args:
        key: of the line: model, teacher or task.
        line: what stands behind it. Where it names no code of the user's own, what is raised is
            a mistake of laconic's, and goes through.

    Raises:
        LaconicError: the code raised something.

    >>> with own_code("model", "digits_cnn"):
    ...     raise ValueError("a mistake")
    Traceback (most recent call last):
    ValueError: a mistake
    """
    names = [line] if isinstance(line, str) else list(line)
    name = next((plain_own(each) for each in names if is_own(each)), "")
    try:
        yield
    except (Exception, SystemExit) as error:
        # What a module raises is sometimes taken for a slip in the line that names it.
        cause = error.__cause__ if isinstance(error, LaconicError) else error
        place = _place(cause) if cause is not None else ""
        if not place or not name or name.partition(":")[0].partition(".")[0] == "laconic":
            raise
        raise LaconicError(f"{key}: '{name}' raised {_said(cause)} ({place})") from error


def _said(error: BaseException | None) -> str:
    """Return the kind of an exception and the first line of what it says."""
    text = str(error.msg if isinstance(error, SyntaxError) else error).partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _place(error: BaseException) -> str:
    """Return file and line of the user's code where something was raised; empty: not in any.

    It is the innermost place outside installed packages; where the code is one itself, the
    outermost.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}, line {error.lineno}"
    places = [
        (Path(frame.filename), frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<") and not Path(frame.filename).is_relative_to(OURS)
    ]
    installed = [place for place in places if not INSTALLED.isdisjoint(place[0].parts)]
    own = [
        place for place in places if place not in installed and not place[0].is_relative_to(PYTHONS)
    ]
    found = own[-1:] or installed[:1]
    return f"{found[0][0].name}, line {found[0][1]}" if found else ""
