"""The ``task:`` line of a recipe."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from laconic.errors import TaskError, nearest
from laconic.own import anchored_own, call_own, colon_hint, is_own
from laconic.tasks.task import Task

__all__ = ["anchored_task", "task_from_dict"]


def task_from_dict(
    spec: Mapping[str, Any] | str, *, base: Path = Path(), tokenizer: Any = None
) -> Task:
    """Return the Task that the ``task:`` line of a recipe describes.

    ``digits``, ``{mnist: folder}``, ``{npz: {path: file, augment: flip}}`` or, the same,
    ``{npz: file, augment: flip}``; ``{glue: folder, tokenizer: folder, max_length: 64}``. A
    function of the user's own, ``package.module:function`` or ``{"package.module:function":
    {...}}`` with its arguments, returns the Task. With ``few: {per_class: 5}`` or
    ``few: {total: 4096, seed: 1}`` beside it, few examples are drawn.

    Args:
        spec: the name of a kind of task or of a function, and its options.
        base: folder of the recipe; relative paths start there, and a function's module is looked
            for there first.
        tokenizer: what reads texts where the line names none; a folder or a tokenizer.

    Raises:
        TaskError: an unknown kind or option, data that cannot be used, a module that cannot be
            imported, or a function that returns no Task.

    >>> task_from_dict({"digits": {}}, base=Path()).name
    'digits'
    """
    name, options, drawn = _parsed(spec)
    built = _own(name, options, base) if is_own(name) else _known(name, options, base, tokenizer)
    return _few(built, drawn["few"]) if drawn else built


def _own(name: str, arguments: Mapping[str, Any], base: Path) -> Task:
    built = call_own("task", name, arguments, base=base, refusal=TaskError)
    if not isinstance(built, Task):
        raise TaskError(f"task: {name!r} returned {type(built).__name__}, not a Task")
    return built


def _known(name: str, options: Mapping[str, Any], base: Path, tokenizer: Any) -> Task:
    builder = _builder(name)
    arguments = _arguments(builder, name, options, base)
    if tokenizer is not None and "tokenizer" in inspect.signature(builder).parameters:
        arguments.setdefault("tokenizer", tokenizer)
    return builder(**arguments)


def anchored_task(spec: Mapping[str, Any] | str, base: Path) -> dict[str, Any]:
    """Return a ``task:`` line that says the same wherever it stands.

    Its paths are absolute, and a function's module comes with its folder.

    Args:
        spec: as for ``task_from_dict``, which takes it.
        base: folder where its relative paths start.

    >>> anchored_task({"mnist": "data"}, Path("/data"))
    {'mnist': {'path': '/data/data'}}
    """
    name, options, drawn = _parsed(spec)
    if is_own(name):
        return {anchored_own(name, base): options} | drawn
    known = _paths(_builder(name)) & options.keys()
    places = {option: str((base / options[option]).absolute()) for option in known}
    return {name: options | places} | drawn


def _parsed(spec: Mapping[str, Any] | str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the name of what makes a task, its options, and what few examples are drawn."""
    from laconic import tasks

    given = {spec: None} if isinstance(spec, str) else dict(spec)
    name = next((key for key in given if key in tasks.KINDS or is_own(key)), None)
    if name is None:
        wrong = str(next(iter(given), ""))
        hint = colon_hint(wrong) or nearest(wrong, tasks.KINDS)
        raise TaskError(f"task: no kind of task is called '{wrong}'{hint}")
    main = given.pop(name)
    if is_own(name) and not isinstance(main, Mapping | None):
        raise TaskError(
            f"task: {name}: options must be a mapping, got {main!r}; write "
            f'{{"{name}": {{argument: value}}}}'
        )
    drawn = {"few": given.pop("few")} if "few" in given else {}
    first = dict(main) if isinstance(main, Mapping) else {} if main is None else {"path": main}
    return name, first | given, drawn


def _builder(name: str) -> Callable[..., Task]:
    from laconic import tasks

    builder: Callable[..., Task] = getattr(tasks, name)
    return builder


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
