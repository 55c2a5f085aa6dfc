"""What several commands need: threads, models, tasks, the ledger."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laconic.cli.output import Output
from laconic.errors import LaconicError, RecipeError

if TYPE_CHECKING:
    from torch import nn

    from laconic.ledger import Measurement
    from laconic.tasks import Task

__all__ = [
    "Threads",
    "folder",
    "network_of",
    "reserved",
    "task_of",
    "tell_ledger",
    "tokenizer_in",
    "use",
]

# What a narrow terminal does without, first to last.
SPARE = (
    *("Parameters", "Tables", "Index", "Codes alone", "File"),
    *("Non-zero", "Time", "Codes alone, all"),
)

Threads = Annotated[
    int | None,
    typer.Option(
        min=1, max=1024, metavar="N", help="Threads to compute with; all cores by default."
    ),
]


def use(threads: int | None) -> None:
    """Set the number of threads torch computes with; None leaves it."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def folder(text: str) -> Path:
    """Return the folder that an option names; an empty shell variable names none."""
    if not text:
        raise typer.BadParameter("it is empty; name a folder, or leave the option out")
    return Path(text)


def reserved(path: Path) -> Path:
    """Return where a file goes at the end of some work, once it is known that it can be written.

    Raises:
        LaconicError: its folder cannot be made, or takes no file.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise LaconicError(
            f"{path}: nothing can be written there ({error.strerror}); choose another --out"
        ) from None


def network_of(text: str | None) -> nn.Module | None:
    """Return the network that an option describes in YAML; paths start at the current folder.

    Raises:
        LaconicError: it is no YAML, or there is no such network.
    """
    if text is None:
        return None
    from laconic.cli.own_code import own_code
    from laconic.models import load_model

    line = _yaml("--model", text)
    with own_code("model", line):
        return load_model(line, base=Path())


def task_of(text: str | None, file: Path) -> Task | None:
    """Return the task that an option describes in YAML; paths start at the current folder.

    Args:
        text: of the option, if it was given.
        file: an artefact, whose tokenizer reads texts where the option names none.

    Raises:
        LaconicError: it is no YAML, or there is no such task; the file is damaged.
    """
    if text is None:
        return None
    from laconic.cli.own_code import own_code
    from laconic.tasks import task_from_dict

    line = _yaml("--task", text)
    with own_code("task", line):
        return task_from_dict(line, base=Path(), tokenizer=tokenizer_in(file))


def tokenizer_in(file: Path) -> Any:
    """Return the tokenizer that an artefact holds, or None.

    Raises:
        ArtifactError: the file is damaged or hostile.
    """
    from laconic.ship.content import inputs_of
    from laconic.tasks import tokenizer_of

    own = inputs_of(file).get("tokenizer")
    return None if own is None else tokenizer_of(own)


def _yaml(option: str, text: str) -> Any:
    from laconic.problems import read_yaml

    try:
        found = read_yaml(text)
    except RecipeError:
        found = None
    if not isinstance(found, (str, dict)):
        raise RecipeError(f"{option} {text}: write a name or one key, such as {{mnist: folder}}")
    return found


def tell_ledger(output: Output, history: Sequence[Measurement]) -> None:
    """Print what every step contributed."""
    from laconic.ledger import ledger_table

    table = ledger_table(history)
    output.table(table.columns, table.rows, spare=SPARE)
