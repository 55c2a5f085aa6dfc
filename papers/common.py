"""What the paper scripts share: where data are, and the one shape of a result file."""

from __future__ import annotations

import argparse
import datetime
import fcntl
import json
import logging
import os
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from convert import convert, write
from torch import nn

from laconic import Result, Task
from laconic.measure import environment
from laconic.models import load_model
from laconic.tasks import npz

RESULTS = Path(__file__).parent / "results"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FIELDS = (
    "row task metric ours std seeds scores baseline published published_setting size_bytes ratio "
    "seconds note"
).split()
MEANS = ("baseline", "size_bytes", "ratio", "seconds")  # over the seeds of a row, as its score is


def parser(about: str | None) -> argparse.ArgumentParser:
    """Return the arguments every script takes: data, working directory, seeds."""
    made = argparse.ArgumentParser(description=about)
    data = os.environ.get("LACONIC_DATA")
    made.add_argument("--data", type=Path, default=data and Path(data), help="LACONIC_DATA")
    made.add_argument("--work", type=Path, default=Path("runs"), help="run directories, resumable")
    made.add_argument("--seeds", type=int, default=3, help="how many")
    return made


def parser_of_rows(about: str | None) -> argparse.ArgumentParser:
    """Return the arguments of a table that may be run row by row, in several processes."""
    made = parser(about)
    made.add_argument("--first", type=int, default=0, help="first seed; those of a row add up")
    made.add_argument(
        "--row", action="append", help="this row; may be repeated, and run in several processes"
    )
    return made


def asked(options: argparse.Namespace, label: str) -> bool:
    """Return whether a row was asked for."""
    return not options.row or label in options.row


@contextmanager
def in_turn(out: Path) -> Iterator[None]:
    """Let one process at a time make, or read, a run that several rows start from."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / f".{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def data_folder(arguments: argparse.Namespace) -> Path:
    """Return the data folder or stop with what to do."""
    if arguments.data is None or not arguments.data.is_dir():
        sys.exit("no data: set LACONIC_DATA or pass --data (a folder with mnist/, cifar10/, ...)")
    return Path(arguments.data)


def cifar10(options: argparse.Namespace) -> Task:
    """Return CIFAR-10 as the trained ResNets of the data folder expect it."""
    sheet = options.work / "cifar10.npz"
    if not sheet.is_file():
        write(convert(data_folder(options) / "cifar10"), sheet, compress=False)
    return npz(sheet, mean=IMAGENET_MEAN, std=IMAGENET_STD, augment="pad-crop-flip")


def trained_resnet(options: argparse.Namespace, name: str) -> nn.Module:
    """Return a published CIFAR ResNet with its weights."""
    weights = data_folder(options) / "teachers_cifar10" / f"{name}.safetensors"
    return load_model({name: {"weights": str(weights)}})


def artefact(result: Result) -> Path:
    """Return the file that a run ended with."""
    if result.out is None:
        raise ValueError("the run kept no files")
    return result.out / "model.safetensors"


def file_bytes(result: Result) -> int:
    """Return the size of a run's artefact on disk, everything in it."""
    return artefact(result).stat().st_size


def row(**fields: Any) -> dict[str, Any]:
    """Return a result row with every field, null where it does not apply."""
    unknown = set(fields) - set(FIELDS)
    if unknown:
        raise TypeError(f"not fields of a result row: {sorted(unknown)}")
    return {field: fields.get(field) for field in FIELDS}


def published(figure: float | None, setting: str) -> dict[str, Any]:
    """Return a paper's figure and how its setting differs; neither where it gives none."""
    return {"published": figure, "published_setting": None if figure is None else setting}


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and standard deviation (None for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def costs(results: Sequence[Result], plain: int | None = None) -> dict[str, float]:
    """Return what runs take, in their mean: bytes, how many times fewer than before, seconds.

    Args:
        results: the runs of a row, one for each seed.
        plain: bytes of the network before; by default those of the file it had then.
    """
    size = statistics.fmean(file_bytes(result) for result in results)
    before = results[0].history[0].size_bytes if plain is None else plain
    seconds = [sum(measured.seconds for measured in result.history) for result in results]
    return {
        "size_bytes": round(size),
        "ratio": before / size,
        "seconds": statistics.fmean(seconds),
    }


def write_table(
    name: str, rows: Iterable[dict[str, Any]], *, order: Callable[[Any], Any] | None = None
) -> None:
    """Run a table, or the part of it that was asked for; every row is written when it is done.

    Args:
        name: of the file.
        rows: made one by one.
        order: what the rows of the file are sorted by; None: those of a task as they came.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if not [write_results(name, [found], order=order) for found in rows]:
        sys.exit("the table has no such row for this task and these seeds; see papers/README.md")


def write_results(
    name: str, rows: Sequence[dict[str, Any]], *, order: Callable[[Any], Any] | None = None
) -> Path:
    """Write rows into papers/results/<name>.json, beside the others of that file; return its path.

    A row that is there already, of the same task, is replaced. One that stays from another day or
    machine says so in its note.
    """
    here = environment()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    body = {
        "command": command(sys.argv),
        "date": datetime.date.today().isoformat(),
        "hardware": f"{here['cpu']}, {os.cpu_count()} cores, {here['threads']} threads, {device}",
        "versions": {key: here[key] for key in ("python", "torch", "laconic", "numpy")},
    }
    with (RESULTS / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may run other rows of the table
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": []}
        found = beside(before, rows, {key: body[key] for key in ("date", "hardware")})
        body["rows"] = sorted(found, key=order) if order else found
        path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    return path


def command(called: Sequence[str]) -> str:
    """Return the command of a run, without where its files lie.

    >>> command(["papers/mrem.py", "--seeds", "1", "--work", "runs/a", "--row", "TWS 1-1-4"])
    "python papers/mrem.py --seeds 1 --row 'TWS 1-1-4'"
    """
    arguments = called[1:]
    places = {"--work", "--data"}
    shown = [
        word
        for word, before in zip(arguments, ["", *arguments], strict=False)
        if not places & {word, before}
    ]
    return shlex.join(["python", f"papers/{Path(called[0]).name}", *shown])


def beside(
    before: Mapping[str, Any], rows: Iterable[dict[str, Any]], here: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return the rows of a file with new ones among them, task by task.

    Args:
        before: the file.
        rows: the new ones.
        here: date and hardware of these.
    """
    when = {key: before.get(key) for key in here}
    found = {(each["task"], each["row"]): each for each in before["rows"]}
    if when != here:
        for each in found.values():
            stamp, note = "{date}, {hardware}".format(**when), each["note"] or ""
            if not re.match(r"\d{4}-\d\d-\d\d, ", note):
                each["note"] = "; ".join(part for part in (stamp, note) if part)
    for each in rows:
        key = each["task"], each["row"]
        found[key] = combined(found[key], each) if key in found else each
    tasks = list(dict.fromkeys(task for task, _ in found))
    return sorted(found.values(), key=lambda each: tasks.index(each["task"]))


def combined(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row over the seeds of two runs of it, if these differ; else the newer one.

    A run of some of the seeds that is only read again changes nothing.

    Args:
        before: the row that is there; of a single score without a seed, the seed is 0.
        now: the new one.
    """
    old = before.get("scores") or ({"0": before["ours"]} if before.get("seeds") == 1 else {})
    new = now.get("scores") or {}
    if new and old | new == old and len(old) > len(new):
        return dict(before)
    if not old or not new or old.keys() & new.keys():
        return dict(now)
    scores = {seed: (old | new)[seed] for seed in sorted(old | new, key=int)}
    made = {**now, "scores": scores, "seeds": len(scores)}
    made["ours"], made["std"] = spread([*scores.values()])
    for name in MEANS:
        pair = before.get(name), now.get(name)
        known = None not in pair
        made[name] = (len(old) * pair[0] + len(new) * pair[1]) / len(scores) if known else None
    if made["size_bytes"] is not None:
        made["size_bytes"] = round(made["size_bytes"])
    if before["note"] != now["note"]:
        made["note"] = f"{now['note']}; of seeds {', '.join(old)}: {before['note']}"
    return made
