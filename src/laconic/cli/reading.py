"""The commands that say what there is: measure, analyse, report, show, verify, list, schema."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laconic.cli.command import DONE, UNCOMPARED, command
from laconic.cli.output import Output
from laconic.cli.shared import SPARE, Threads, network_of, reserved, task_of, tell_ledger, use
from laconic.errors import LaconicError, RunError

if TYPE_CHECKING:
    from laconic.cli.methods import Method
    from laconic.ledger import Measurement

__all__ = ["analyse", "list_", "measure", "report", "schema", "show", "verify"]

Artefact = Annotated[Path, typer.Argument(metavar="FILE", help="An artefact.")]
Plain = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="YAML",
        help="The plain network, for a file whose builder is your own: package.module:function.",
    ),
]


@command("measure runs/1", "measure runs/1 runs/2", "measure model.safetensors --task digits")
def measure(
    output: Output,
    targets: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE-OR-RUN...", help="An artefact, or the folder of a run, or of several."
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(metavar="YAML", help="Data to score a file on: digits, {mnist: folder}, ..."),
    ] = None,
    model: Plain = None,
    threads: Threads = None,
) -> int:
    """Say what a network costs and scores.

    Bytes, parameters and how many are not zero; with data, operations, time and metrics too. Of
    several runs, what each came to stands in one table.
    """
    use(threads)
    target, *others = targets
    if others:
        return _compare_runs(output, targets, {"--task": task, "--model": model})
    if target.is_dir():
        return _measure_run(output, target, {"--task": task, "--model": model})
    from laconic.cli.contents import file_costs

    found = file_costs(target, model=network_of(model), task=task_of(task, target))
    output.event("result", **found)
    output.table(("Cost", "Amount"), _cost_rows(found))
    return DONE


def _measure_run(output: Output, run: Path, given: Mapping[str, str | None]) -> int:
    """Show what was measured of a run, on the data that it was made with."""
    from laconic.rundir import ARTIFACT, read_history

    history, facts = read_history(run)
    for option, text in given.items():
        if text is not None:
            words = ["laconic", "measure", str(run / ARTIFACT), option, text]
            raise LaconicError(
                f"{run} is a run, whose measurements are made already; {option} is for its file: "
                f"{shlex.join(words)}"
            )
    open_end = _open_end(run, history, facts)
    data = [measured.to_data() for measured in history]
    output.event("result", history=data, unfinished=open_end)
    tell_ledger(output, history)
    if open_end:
        output.line(f"\n{open_end}")
    return DONE


def _compare_runs(output: Output, runs: Sequence[Path], given: Mapping[str, str | None]) -> int:
    """Show what several runs came to, a row for each."""
    from laconic.ledger import comparison_table
    from laconic.rundir import read_history

    unread = [option for option, text in given.items() if text is not None]
    if unread:
        raise LaconicError(f"{unread[0]} is for one file; runs were measured when they were made")
    histories, open_ends = {}, []
    for run in dict.fromkeys(runs):
        if run.is_file():
            raise RunError(f"{run} is a file; of several, give the folders of runs")
        history, facts = read_history(run)
        if not history:
            raise RunError(f"{run}: nothing was measured yet; leave it out, or go on with --resume")
        histories[str(run)] = history
        open_ends.append(_open_end(run, history, facts))
    output.event(
        "result",
        runs=[
            {"run": name, "unfinished": left, "history": [each.to_data() for each in history]}
            for (name, history), left in zip(histories.items(), open_ends, strict=True)
        ],
    )
    table = comparison_table(histories)
    output.table(table.columns, table.rows, text=("Steps",), spare=SPARE)
    for left in filter(None, open_ends):
        output.line(f"\n{left}")
    return DONE


def _open_end(run: Path, history: Sequence[Measurement], facts: Mapping[str, Any]) -> str:
    """Return how far a run came that is not finished, and how it goes on; empty: it is."""
    from laconic.report.summary import recipe_data, unfinished
    from laconic.rundir import RECIPE

    left = unfinished(history, facts)
    if not left:
        return ""
    words = ["laconic", "compress", str(run / RECIPE), "--out", str(run), "--resume"]
    from_python = "model" not in recipe_data(facts)
    again = f"compress(..., out={str(run)!r}, resume=True)" if from_python else shlex.join(words)
    return f"{run} is unfinished: {left}; where it was stopped, it goes on with: {again}"


@command(
    "analyse model.safetensors --task digits --out analysis.html",
    "analyse float.safetensors binary.safetensors --task digits --out both.html",
)
def analyse(
    output: Output,
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Artefacts of like networks.")
    ],
    task: Annotated[
        str, typer.Option(metavar="YAML", help="Data to score on: digits, {mnist: folder}, ...")
    ],
    model: Plain = None,
    batches: Annotated[
        int, typer.Option(min=1, metavar="N", help="Batches of training examples to derive on.")
    ] = 4,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The HTML file; beside FILE by default.")
    ] = None,
    threads: Threads = None,
) -> int:
    """Say how the loss of networks curves.

    The largest eigenvalue of every part's Hessian, and what fewer bits do to one block of the
    first network at a time, as one HTML file that needs no other. Several files, such as a
    float, a ternary and a binary one of one network, are compared.
    """
    from laconic.cli.contents import file_analyses
    from laconic.report import write_analysis
    from laconic.tasks.task import labelled

    use(threads)
    data = labelled(
        task_of(task, files[0]),
        "analyse derives the loss on training examples",
        "score the file with 'laconic measure', which reads the test examples alone",
    )
    where = reserved(out or files[0].with_suffix(".html"))
    with output.working():
        found = file_analyses(files, model=network_of(model), task=data, batches=batches)
    path = write_analysis(list(found.values()), where, title=", ".join(file.name for file in files))
    output.event("result", report=path, **{name: each.to_data() for name, each in found.items()})
    output.line(str(path))
    return DONE


@command("report runs/1", "report runs/1 --terminal")
def report(
    output: Output,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    terminal: Annotated[
        bool, typer.Option("--terminal", metavar="", help="Print it; write no file.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The HTML file; RUN/report.html by default.")
    ] = None,
) -> int:
    """Write the report of a run.

    It is one HTML file that needs no other.
    """
    from laconic.report import report as reporting
    from laconic.rundir import REPORT, read_history

    if run.is_file():
        raise RunError(f"{run} is a file; give the folder of a run, such as {run.parent}")
    history, facts = read_history(run)
    open_end = _open_end(run, history, facts)
    if terminal:
        data = [measured.to_data() for measured in history]
        output.event("result", history=data, facts=facts, unfinished=open_end)
        output.show(reporting.terminal(history, facts))
    else:
        path = reporting.write_report(history, facts, out or run / REPORT)
        output.event("result", report=path, unfinished=open_end)
        output.line(str(path))
    if open_end:
        output.line(open_end)
    return DONE


@command("show model.safetensors")
def show(output: Output, file: Artefact) -> int:
    """Say what is in an artefact.

    Its builder, how each weight is stored, which activations are rounded, and where the bytes
    are. Nothing of the file is run, and the network is not built.
    """
    from laconic.cli import contents

    manifest = contents.file_manifest(file)
    parts, rows = contents.bytes_by_part(file), contents.tensor_rows(file, manifest)
    found: dict[str, Any] = {
        "size_bytes": sum(parts.values()),
        "bytes": parts,
        "widths": contents.widths(manifest),
        "represented": contents.represented(manifest),
        "tensors": rows,
        "activations": contents.activation_rows(manifest),
    }
    output.event("result", **found, manifest=manifest.model_dump(mode="json"))
    _show_parts(output, file, parts)
    output.line(f"\nbuilder   {json.dumps(_brief(manifest.builder))}")
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    output.line(f"versions  {versions}")
    output.line(f"widths    {_width_words(found)}\n")
    columns = ("Weight", "Shape", "Representation", "Coders", "Codes", "Index", "Tables")
    words = ("Shape", "Representation", "Coders")
    spare = ("Coders", "Index", "Tables")
    output.table(columns, [_tensor_cells(row) for row in rows], text=words, spare=spare)
    for dtype, shapes in manifest.dense.items():
        noun = "tensor" if len(shapes) == 1 else "tensors"
        output.line(f"and {len(shapes)} {noun} as plain {dtype}")
    _show_activations(output, found["activations"])
    return DONE


@command("verify model.safetensors --logits")
def verify(
    output: Output,
    file: Artefact,
    logits: Annotated[
        bool,
        typer.Option("--logits", metavar="", help="Run the stored probe and compare the logits."),
    ] = False,
    model: Plain = None,
    threads: Threads = None,
) -> int:
    """Check that an artefact is what was saved.

    Its checksum, the hash of every decoded weight and, if asked, logits. Logits can be compared
    where threads, torch and processor are those of the writing.

    Exit code: 0; 2 where something does not match; 3 where logits could not be compared.
    """
    use(threads)
    from laconic.ledger import size_text
    from laconic.ship import verify as check

    found = check(file, logits=logits, model=network_of(model))
    output.event("result", **dataclasses.asdict(found))
    size = size_text(found.size_bytes)
    output.line(f"{file}  {size}  checksum and {found.tensors} decoded weights match")
    if logits and not found.logits:
        output.error(f"the logits were not compared: {found.note}")
        return UNCOMPARED
    if logits:
        output.line(found.note)
    return DONE


@command("list", "list steps", "list prune", "list ternarybert", name="list")
def list_(
    output: Output,
    kind: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="steps, models, recipes, ..., or one of them: prune."),
    ] = None,
) -> int:
    """List what recipes are written with; explain one name of it."""
    from laconic.cli.contents import catalogue
    from laconic.cli.methods import described
    from laconic.recipe import shipped_recipes

    shipped = shipped_recipes()
    texts = [shipped[kind].read_text(encoding="utf-8")] if kind in shipped else []
    methods = [] if kind is None else list(described(kind))
    if texts or methods:
        own = {"recipe": texts[0]} if texts else {}
        output.event("result", **own, methods=[dataclasses.asdict(method) for method in methods])
        for text in texts:
            output.line(text)
        for method in methods:
            _explain(output, method)
        return DONE
    found = catalogue(kind)
    output.event("result", **found)
    for name, members in found.items():
        if kind is None:
            output.line(f"{name:16}{', '.join(members)}")
        else:
            output.table((name.capitalize(), ""), list(members.items()), text=("",))
    return DONE


def _explain(output: Output, method: Method) -> None:
    """Show what a name means, and its fields."""
    output.line(f"{method.name}  ({method.family})\n")
    output.line(f"{method.prose}\n")
    if method.fields:
        rows = [(name, default or "required", text) for name, default, text in method.fields]
        output.table(("Field", "Default", ""), rows, text=("Default", ""))
        output.line()


@command("schema --out recipe.schema.json")
def schema(
    output: Output,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it there instead.")
    ] = None,
) -> int:
    """Print the JSON schema of recipes.

    With it, editors complete and check them.
    """
    from laconic.recipe import schema as recipe_schema
    from laconic.ship.container import write_file

    found = recipe_schema()
    if out is not None:
        write_file(reserved(out), f"{json.dumps(found, indent=2)}\n".encode())
        output.event("result", schema=out)
        output.line(str(out))
        return DONE
    output.event("result", schema=found)
    output.line(json.dumps(found, indent=2))
    return DONE


def _show_parts(output: Output, file: Path, parts: dict[str, int]) -> None:
    from laconic.ledger import size_text

    size = sum(parts.values())
    output.line(f"{file}  {size_text(size)}\n")
    shown = [(part, f"{amount:,}", f"{amount / size:.1%}") for part, amount in parts.items()]
    output.table(("Part", "Bytes", "Share"), shown)


def _show_activations(output: Output, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    output.line()
    cells = [
        (row["name"], ", ".join(row["places"]), row["activation"], str(row["bits"])) for row in rows
    ]
    columns = ("Rounded", "Places", "Activation", "Bits")
    output.table(columns, cells, text=("Places", "Activation"), spare=("Bits",))


def _brief(builder: dict[str, Any]) -> dict[str, Any]:
    """Return a builder without what a configuration of Hugging Face is by default."""
    return {
        kind: {key: value for key, value in options.items() if key != "defaults"}
        if isinstance(options, dict)
        else options
        for kind, options in builder.items()
    }


def _width_words(found: dict[str, Any]) -> str:
    """Return widths as papers write them: 2/4-8-8 (weights-embeddings-activations).

    Where some of a kind have codes and some have none, so many of them.
    """
    widths, counts = found["widths"], found["represented"]
    shown = ("/".join(f"{bits:g}" for bits in each) for each in widths.values())
    some = [f"{n} of {m} {kind}" for kind, (n, m) in counts.items() if 0 < n < m]
    of = f", of {' and '.join(some)}; the others are floats" if some else ""
    return f"{'-'.join(shown)} ({'-'.join(widths)}){of}"


def _tensor_cells(row: dict[str, Any]) -> tuple[str, ...]:
    coders = ", ".join(f"{name} {coder}" for name, coder in row["coders"].items())
    counts = (f"{row[part]:,}" for part in ("code_bytes", "index_bytes", "table_bytes"))
    shape = "x".join(str(size) for size in row["shape"])
    return (row["name"], shape, row["representation"], coders, *counts)


def _cost_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return costs as people read them: sizes in MB and MiB, counts with commas."""
    from laconic.ledger import factor_text, size_text

    rows = [("widths", _width_words(found))]
    for name, value in {**found, **found.get("metrics", {})}.items():
        if name.endswith("_bytes"):
            rows.append((name.removesuffix("_bytes").replace("_", " "), size_text(value)))
        elif name == "ratio":
            rows.append(("smaller than its own floats", factor_text(value)))
        elif name == "latency_ms":
            rows.append(("latency", f"{value:.3g} ms"))
        elif name not in ("metrics", "represented", "widths"):
            rows.append((name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}"))
    return rows
