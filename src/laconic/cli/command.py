"""How a function becomes a command: options every command has, errors, exit codes."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import typer

from laconic.cli.output import Output
from laconic.errors import LaconicError

__all__ = ["DONE", "EXCEEDED", "STOPPED", "UNCOMPARED", "Debug", "Json", "Quiet", "app", "command"]

DONE, EXCEEDED, REFUSED, UNCOMPARED, STOPPED = 0, 1, 2, 3, 130

app = typer.Typer(
    name="laconic",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

PANEL = "Options of every command"
Json = Annotated[
    bool,
    typer.Option("--json", help="One JSON object per line.", metavar="", rich_help_panel=PANEL),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", help="The result alone.", metavar="", rich_help_panel=PANEL)
]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug", help="A traceback besides the message.", metavar="", rich_help_panel=PANEL
    ),
]
EVERYWHERE: dict[str, Any] = {"json": Json, "quiet": Quiet, "debug": Debug}


def command(*examples: str, name: str = "") -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a function ``(output, **options) -> exit code`` as a command.

    It gains --json, --quiet and --debug, which are understood before the command's name too.
    What laconic raises becomes a message on standard error and exit code 2; Ctrl-C is 130.

    Args:
        *examples: command lines for its help, without the word laconic.
        name: of the command; the function's own by default.
    """

    def register(function: Callable[..., int]) -> Callable[..., int]:
        parameters = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

        @functools.wraps(function)
        def run(**options: Any) -> None:
            context = options.pop("context")
            given = {key: options.pop(key) or context.obj[key] for key in EVERYWHERE}
            _import_torch()
            with _silent_beside_others(given):
                raise typer.Exit(_guarded(function, Output(**given), options))

        everywhere = [_keyword(key, False, kind) for key, kind in EVERYWHERE.items()]
        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        context = _keyword("context", inspect.Parameter.empty, typer.Context)
        # Typer reads options from the signature: the wrapper shows the one it has.
        del run.__wrapped__
        run.__signature__ = inspect.Signature([context, *own, *everywhere])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (context, *own, *everywhere)}
        app.command(name or function.__name__, help=_help(function, examples))(run)
        return function

    return register


def _help(function: Callable[..., int], examples: Sequence[str]) -> str:
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    lines = "\n".join(f"[cyan]laconic {example}[/cyan]" for example in examples)
    return f"{text}\n\n[bold]Example[/bold]\n\n{lines}"


def _keyword(name: str, default: Any, kind: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _import_torch() -> None:
    """Import torch, which every command needs; Ctrl-C ends the process at once meanwhile.

    Nothing was done yet. An exception there would leave half of numpy behind, whose errors hide
    it, or end inside torch as a core dump.
    """
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if "torch" in sys.modules or not heard:
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    import torch  # noqa: F401

    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def _silent_beside_others(given: dict[str, Any]) -> Iterator[None]:
    """Print nothing but errors where another process of torchrun prints the same."""
    from laconic import ranks

    if ranks.prints():
        yield
        return
    given["quiet"] = True
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        yield


def _guarded(function: Callable[..., int], output: Output, options: dict[str, Any]) -> int:
    """Run a command and return its exit code, whatever happens that may happen."""
    try:
        return function(output, **options)
    except LaconicError as error:
        return _refused(output, str(error))
    except KeyboardInterrupt:
        output.error("stopped")
        return STOPPED
    except BrokenPipeError:
        # Who reads has seen enough, as in `| head`; Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        return _refused(
            output, f"{error.filename}: {error.strerror}" if error.filename else str(error)
        )
    except Exception as error:  # noqa: BLE001 - code 1 would say that a budget is exceeded
        traceback.print_exc()
        output.error(f"laconic itself failed ({type(error).__name__}); please report the above")
        return REFUSED


def _refused(output: Output, message: str) -> int:
    if output.debug:
        traceback.print_exc()
    output.error(message)
    return REFUSED
