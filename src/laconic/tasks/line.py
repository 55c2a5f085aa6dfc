"""The ``task:`` line of a recipe."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from laconic.errors import TaskError, nearest
from laconic.tasks.task import Task

__all__ = ["anchored_task", "task_from_dict"]


def task_from_dict(
    spec: Mapping[str, Any] | str, *, base: Path = Path(), tokenizer: Any = None
) -> Task:
    """Return the Task that the ``task:`` line of a recipe describes.

    ``digits``, ``{mnist: folder}``, ``{npz: {path: file, augment: flip}}`` or, the same,
    ``{npz: file, augment: flip}``; ``{glue: folder, tokenizer: folder, max_length: 64}``. With
    ``few: {per_class: 5}`` or ``few: {total: 4096, seed: 1}`` beside it, few examples are drawn.

    Args:
        spec: the name of a kind of task, and its options.
        base: folder of the recipe; relative paths start there.
        tokenizer: what reads texts where the line names none; a folder or a tokenizer.

    Raises:
        TaskError: an unknown kind or option, or data that cannot be used.

    >>> task_from_dict({"digits": {}}, base=Path()).name
    'digits'
    """
    builder, name, options, drawn = _parsed(spec)
    arguments = _arguments(builder, name, options, base)
    if tokenizer is not None and "tokenizer" in inspect.signature(builder).parameters:
        arguments.setdefault("tokenizer", tokenizer)
    built: Task = builder(**arguments)
    return _few(built, drawn["few"]) if drawn else built


def anchored_task(spec: Mapping[str, Any] | str, base: Path) -> dict[str, Any]:
    """Return a ``task:`` line that says the same wherever it stands: its paths are absolute.

    Args:
        spec: as for ``task_from_dict``, which takes it.
        base: folder where its relative paths start.

    >>> anchored_task({"mnist": "data"}, Path("/data"))
    {'mnist': {'path': '/data/data'}}
    """
    builder, name, options, drawn = _parsed(spec)
    known = _paths(builder) & options.keys()
    places = {option: str((base / options[option]).absolute()) for option in known}
    return {name: options | places} | drawn


def _parsed(
    spec: Mapping[str, Any] | str,
) -> tuple[Callable[..., Task], str, dict[str, Any], dict[str, Any]]:
    """Return what makes a task, its name, its options, and what few examples are drawn."""
    from laconic import tasks

    given = {spec: None} if isinstance(spec, str) else dict(spec)
    name = next((key for key in given if key in tasks.KINDS), None)
    if name is None:
        wrong = str(next(iter(given), ""))
        raise TaskError(f"task: no kind of task is called '{wrong}'{nearest(wrong, tasks.KINDS)}")
    main = given.pop(name)
    drawn = {"few": given.pop("few")} if "few" in given else {}
    first = dict(main) if isinstance(main, Mapping) else {} if main is None else {"path": main}
    return getattr(tasks, name), name, first | given, drawn


def _paths(builder: Callable[..., Task]) -> set[str]:
    """Return the options of a task that are paths."""
    hints = typing.get_type_hints(builder)
    return {option for option, kind in hints.items() if Path in (kind, *typing.get_args(kind))}


def _few(task: Task, options: Any) -> Task:
    """Return a task with the few examples that a recipe asks for."""
    if not isinstance(options, Mapping):
        raise TaskError(f"task: few: {options!r}: write {{per_class: 5}} or {{total: 100}}")
    numbers = _arguments(task.few, "few", options)
    for option, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TaskError(f"task: few: '{option}' must be a whole number, got {value!r}")
    return task.few(**numbers)


def _arguments(
    builder: Callable[..., Task], name: str, options: Mapping[str, Any], base: Path = Path()
) -> dict[str, Any]:
    known = inspect.signature(builder).parameters
    for option in options:
        if option not in known:
            hint = nearest(option, known) if known else "; it takes no option"
            raise TaskError(f"task: {name}: '{option}' is not an option{hint}")
    for parameter in known.values():
        if parameter.default is parameter.empty and parameter.name not in options:
            raise TaskError(f"task: {name}: '{parameter.name}' is missing; write {{{name}: ...}}")
    paths = _paths(builder)
    for option in paths & set(options):
        if not isinstance(options[option], str | Path):
            raise TaskError(f"task: {name}: '{option}' must be a path, got {options[option]!r}")
    return {option: base / value if option in paths else value for option, value in options.items()}
