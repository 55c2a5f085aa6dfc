"""The application: its own options, and every command registered."""

from __future__ import annotations

from typing import Annotated

import typer

from laconic.cli import compressing, reading
from laconic.cli.command import Debug, Json, Quiet, app

# Importing a module of commands registers them, in this order.
__all__ = ["app", "compressing", "main", "reading"]


def main() -> None:
    """Run the command line: the console script ``laconic``."""
    app(prog_name="laconic")


def _version(asked: bool) -> None:
    if asked:
        from laconic import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def everywhere(
    context: typer.Context,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", help="Print the version.", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Say the same in fewer bits: make a trained network small, and ship it as one file.

    Start with [bold]laconic demo[/bold]: it needs no data and no arguments.
    """
    context.obj = {"json": json, "quiet": quiet, "debug": debug}
