"""Code of the user's own: functions that recipes name, and what is said where it fails."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from laconic.errors import LaconicError, TaskError, nearest

__all__ = ["anchored_own", "call_own", "colon_hint", "explained", "is_own", "plain_own"]


def is_own(name: Any) -> bool:
    """Return whether a recipe's line names a function by its module.

    >>> is_own("nets.small:build"), is_own("digits")
    (True, False)
    """
    return ":" in str(name)


def plain_own(name: str) -> str:
    """Return a name without the folder it may begin with.

    >>> plain_own("/projects/nets.small:build")
    'nets.small:build'
    """
    place, _, function = name.rpartition(":")
    return f"{place.rpartition('/')[2]}:{function}"


def colon_hint(name: Any) -> str:
    """Return how a function is written, where dots alone look like one.

    >>> colon_hint("nets.build"), colon_hint("digits")
    ("; a function of your own is written with a colon: 'nets:build'", '')
    """
    module, _, function = str(name).rpartition(".")
    if not module or not all(part.isidentifier() for part in str(name).split(".")):
        return ""
    return f"; a function of your own is written with a colon: '{module}:{function}'"


def anchored_own(name: str, base: Path) -> str:
    """Return a name that means the same everywhere: with the folder of its module.

    A module that lies neither beside the recipe nor in the current folder keeps its name.

    Args:
        name: ``package.module:function``, behind a folder or not.
        base: folder of the recipe.

    >>> anchored_own("laconic:load", Path("/tmp"))
    'laconic:load'
    """
    module = plain_own(name).partition(":")[0]
    for folder in _folders(name, base):
        if PathFinder.find_spec(_top(module), [folder]) is not None:
            return f"{folder}/{plain_own(name)}"
    return name


def call_own(
    line: str, name: str, arguments: Mapping[str, Any], *, base: Path, refusal: type[LaconicError]
) -> Any:
    """Return what a function of the user's own returns; what it raises goes through.

    Its module is looked for in the folder that the name begins with, if any (``nets/small:build``),
    else in that of the recipe; then in the current folder; then where Python looks.

    Args:
        line: of the recipe, for messages.
        name: ``package.module:function``.
        arguments: of the function, by name.
        base: folder of the recipe.
        refusal: what is raised.

    Raises:
        LaconicError: there is no such module, function or argument.

    >>> call_own("model", "torch.nn:Identity", {}, base=Path(), refusal=LaconicError)
    Identity()
    """
    module_name, _, function_name = plain_own(name).rpartition(":")
    if not function_name.isidentifier():
        raise refusal(
            f"{line}: in {name!r}, '{function_name}' is no name of a function; write "
            "package.module:function, or a space after the colon where an option is meant"
        )
    folders = _folders(name, base)
    with _looked_in(folders):
        try:
            module = importlib.import_module(module_name)
        except (ImportError, ValueError) as error:
            raise refusal(
                f"{line}: '{module_name}' of {name!r} cannot be imported ({error}); it is looked "
                f"for in {', '.join(folders)} and where Python looks: put its folder on "
                "PYTHONPATH, or install it"
            ) from error
        _refuse_namesake(line, module_name, folders, refusal)
        function = _member(line, name, module, function_name, refusal)
        try:
            inspect.signature(function).bind(**arguments)
        except (TypeError, ValueError) as error:
            raise refusal(
                f"{line}: {name!r} cannot be called with {dict(arguments)} ({error}); name a "
                f"function that returns the {line}, and its arguments"
            ) from error
        return function(**arguments)


def _member(
    line: str, name: str, module: ModuleType, wanted: str, refusal: type[LaconicError]
) -> Callable[..., Any]:
    """Return a function of a module."""
    try:
        found: Callable[..., Any] = getattr(module, wanted)
    except AttributeError as error:
        own = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        hint = nearest(wanted, getattr(module, "__all__", own))
        raise refusal(f"{line}: '{module.__name__}' of {name!r} has no '{wanted}'{hint}") from error
    return found


def _folders(name: str, base: Path) -> list[str]:
    """Return the folders where a module is looked for first, absolute."""
    given = name.rpartition(":")[0].rpartition("/")[0]
    return list(dict.fromkeys(str(each.absolute()) for each in (base / given, Path())))


def _top(module: str) -> str:
    return module.partition(".")[0]


@contextlib.contextmanager
def _looked_in(folders: Sequence[str]) -> Iterator[None]:
    """Let Python look in folders first; afterwards it still does, last.

    What the module imports later, and another process that unpickles what it holds, find it then,
    and it hides nothing that is installed.
    """
    importlib.invalidate_caches()
    sys.path[:0] = folders
    try:
        yield
    finally:
        for folder in folders:
            sys.path.remove(folder)
        sys.path += [folder for folder in folders if folder not in sys.path]


def _refuse_namesake(
    line: str, module: str, folders: Sequence[str], refusal: type[LaconicError]
) -> None:
    """Refuse a module that was imported before from another place than where it is meant."""
    there = PathFinder.find_spec(_top(module), list(folders))
    meant = None if there is None else there.origin
    known = getattr(sys.modules.get(_top(module)), "__file__", None)
    if meant and known and Path(meant).resolve() != Path(known).resolve():
        raise refusal(
            f"{line}: '{module}' was imported from {known} before, and {meant} is meant; rename "
            "one of them"
        )


@contextlib.contextmanager
def explained(what: str, advice: str) -> Iterator[None]:
    """Say where code that is not ours failed, and how it is called.

    Args:
        what: was asked of it.
        advice: what to do.

    Raises:
        TaskError: it failed, as its cause.

    >>> with explained("the loss failed", "give one that takes a Batch"):
    ...     raise ValueError("no batch")
    Traceback (most recent call last):
    laconic.errors.TaskError: the loss failed (ValueError: no batch); give one that takes a Batch
    """
    try:
        yield
    except LaconicError:
        raise
    except Exception as error:
        raise TaskError(f"{what} ({type(error).__name__}: {error}); {advice}") from error
