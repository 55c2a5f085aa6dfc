"""Tables of what was measured, rendered from files of results: nothing is typed by hand."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from laconic.report.tables import byte_scale

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "papers" / "results"
BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->"
# What the front page shows of which file, in this order, and how it is called there. A row that
# several tasks have is named with its task.
FRONT = {
    "deep_compression": {
        "LeNet-300-100 keep 0.04, 4 bit, 20 epochs bfloat16": "LeNet-300-100, pruned, 4 bits",
        "LeNet-5 keep 0.06, 4 bit, 12 epochs float32": "LeNet-5, pruned, 4 bits",
    },
    "chaining_resnet20": {
        "resnet20 pruned + distilled + DFP 6-32-32": "ResNet-20, pruned, taught, 6 bits",
        "resnet20 DFP 4-32-32": "ResNet-20, 4 bits",
    },
    "factorize": {
        "resnet20, Separable(ratio=0.5), trained": "ResNet-20, separable kernels",
    },
    "cross_distillation": {
        "resnet56, L1-norm, structured, 5 images of a class": "ResNet-56, half the inner channels",
        "resnet56, CD, structured, 5 images of a class": "the same, rebuilt from 50 images",
    },
    "quantization": {
        "resnet20, ternary weights, activations of 8 bits": "ResNet-20, ternary, 8-bit activations",
        "resnet20, binary weights, activations of 8 bits": "ResNet-20, binary, 8-bit activations",
        "MRPC dev: GOBO 3-4-32": "6-layer encoder, 3-4-32, without training",
    },
    "width_depth": {
        "SST-2, width 0.5, depth 1, distilled": "6-layer encoder, half the heads and neurons",
        "SST-2, width 0.25, depth 1, distilled": "6-layer encoder, a quarter of both",
    },
    "ternarybert": {
        "MRPC dev: 3-3-8, learned steps": "6-layer encoder, 3-3-8, learned steps, taught by itself",
        "SST-2 dev: TernaryBERT TWN 2-2-8": "6-layer encoder, 2-2-8, taught by itself in floats",
        "MRPC dev: TernaryBERT TWN 2-2-8": "the same",
    },
    "binarybert": {
        "SST-2 dev: TWS 1-1-8": "6-layer encoder, 1-1-8, split from a ternary of half the width",
        "MRPC dev: TWS 1-1-8": "the same",
    },
    "mrem": {
        "MREM-S, 250 updates 4-4-8": "6-layer encoder, 4-4-8, 4,096 texts without labels",
        "MREM-S, 250 updates 2-2-8": "6-layer encoder, 2-2-8, 4,096 texts without labels",
    },
}
FRONT_INTRO = """Accuracy on full test and dev sets, a mean over seeds ± their standard deviation.
*Before* is that of the uncompressed network, *file* everything on disk, for encoders with their
tokenizer, *smaller* its ratio to the float32 file. Settings of the LeNets and of the 6 bit row
were chosen by test score, the rate at which encoders are fine-tuned by score on the dev sets of
MRPC and CoLA, and 3-3-8 is the best of three variants on MRPC's; these rows are slightly
optimistic. Every table, with the papers' figures, commands, machine, settings and what did not
work, is in [papers/README.md](papers/README.md)."""
PAPERS_INTRO = """# Tables of the papers

One script per table. A script runs the methods, puts the published figure beside ours, where the
paper has one for that task and metric, and writes `papers/results/<name>.json`; the tables below
are rendered from those files, and what stands before each is the script's own account of it. Scores
are such that higher is better; a share of layers and a count of parameters are no scores.
*Baseline* is our own uncompressed network on the same data; for the parameters of ghosts it is 0.
± is the standard deviation over seeds. Times are those of a machine that did other work beside.
Rows were measured on the code of their day, and a file is put together from runs of several days
and machines: a run replaces its rows, or adds its seeds to them where they are others (`--first`),
and leaves the rest. Its head is that of the last run; rows of another say so in their notes. A row
of a script that is not here has not been run. Rows of encoders can be run one by one, in several
processes at once (`--row`).

*Settings* are the steps that a row ran, as Python writes them, with what is not at its default.
What was done to the network before them, the account says.

The 6-layer encoder is all-MiniLM-L6-v2, which was trained to embed sentences: hidden size 384, 12
heads a layer, 22.7 million parameters. `papers/encoders.py` fine-tunes it at a rate of 1e-4 for 1
to 5 epochs, on RTE after MNLI. These settings were compared by dev score on MRPC and CoLA.

The data lie in the folder that the environment variable `LACONIC_DATA` names:

- `mnist/`: the four gzipped files of MNIST.
- `cifar10/`: CIFAR-10 as WebP sheets, in `cifar10_train_0.npz`, `cifar10_train_1.npz` and
  `cifar10_test.npz`, and `classes.txt`. `papers/convert.py` says how the sheets are laid out, and
  makes a file of images of them.
- `teachers_cifar10/`: `resnet20.safetensors` and `resnet56.safetensors`, trained networks.
- `encoder_minilm_l6_h384/`: the encoder and its tokenizer, a Hugging Face folder.
- `glue/`: a folder for each of `CoLA`, `MNLI`, `MRPC`, `RTE`, `SST-2` and `STS-B`, with its
  tab-separated files.
"""
BENCHMARKS_INTRO = """# Time and memory

One script per table, which writes `benchmarks/results/<name>.json`; the tables below are rendered
from those files, and what stands before each is the script's own account of it. What counts is the
*ratio* to a baseline of the same run: seconds and bytes are those of the machine that is named.
"""
COLUMNS = (
    "row", "task", "metric", "ours", "seeds", "baseline", "published",
    "size_bytes", "ratio", "seconds",
)  # fmt: skip
HEADINGS = {"size_bytes": "size (bytes)", "ratio": "times smaller", "seconds": "time of a run (s)"}
TIMED = {"size_bytes": "bytes"}


def table(rows: Iterable[Iterable[str]], headings: Iterable[str]) -> str:
    """Return a Markdown table."""
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def cell(row: Mapping[str, Any], column: str) -> str:
    """Return one cell of a table of results."""
    value = row.get(column)
    if value is None:
        return ""
    if column == "ours" and row.get("std") is not None:
        return f"{value:.4g} ± {row['std']:.2g}"
    if column == "published" and row.get("published_setting"):
        return f"{value:.4g} ({row['published_setting']})"
    if column == "seeds":
        return str(len(value) if isinstance(value, list) else value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def loaded(name: str) -> dict[str, Any]:
    """Return a file of results."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def account(command: str) -> str:
    """Return what the script that a command runs says of its table."""
    named = re.search(r"(papers|benchmarks)/\w+\.py", command)
    path = ROOT / named[0] if named else ROOT
    if not path.is_file():
        return ""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def results(path: Path, names: Mapping[str, str] = HEADINGS) -> str:
    """Return the part on one file of results; columns without a value are left out."""
    data = json.loads(path.read_text(encoding="utf-8"))
    ordered = in_order(data["rows"])
    shown = [name for name in COLUMNS if any(row.get(name) is not None for row in ordered)]
    rows = [[cell(row, name) for name in shown] for row in ordered]
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    run = f"`{data['command']}`, {data['date']}, {data['hardware']}; {versions}."
    headings = [names.get(name, name) for name in shown]
    said = account(data["command"])
    parts = [f"## {path.stem}", said, run, table(rows, headings), notes(ordered)]
    return "\n\n".join(part for part in parts if part).strip()


def in_order(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return rows task by task, those of every task in the same order."""
    tasks, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "row"))
    return sorted(rows, key=lambda row: (tasks.index(row["task"]), names.index(row["row"])))


def notes(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what the notes of rows say, each thing once; how rows were made comes last, folded."""
    said: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        for part in statements(row.get("note") or ""):
            said.setdefault(part, []).append(place)
    made = {part: places for part, places in said.items() if part.startswith("`")}
    facts = bullets(rows, {part: places for part, places in said.items() if part not in made})
    settings = f"<details><summary>Settings</summary>\n\n{bullets(rows, made)}\n\n</details>"
    return "\n\n".join(part for part in (facts, settings if made else "") if part)


def bullets(rows: Sequence[Mapping[str, Any]], said: Mapping[str, Sequence[int]]) -> str:
    """Return a list of statements with the rows they hold for, those that hold for most first."""
    together: dict[tuple[int, ...], list[str]] = {}
    for part, places in said.items():
        together.setdefault(tuple(places), []).append(part)
    widest = sorted(together.items(), key=lambda item: -len(item[0]))
    return "\n".join(f"- {called(rows, places)}: {'; '.join(parts)}" for places, parts in widest)


def statements(note: str) -> Iterator[str]:
    """Yield the parts of a note; those of earlier seeds say of which they are.

    >>> list(statements("slow; (Train(),); of seeds 0: slow; (Prune(),)"))
    ['slow', '`(Train(),)`', '`(Prune(),)` (seeds 0)']
    """
    newest, *earlier = note.split("; of seeds ")
    known = newest.split("; ") if newest else []
    yield from map(as_code, known)
    for block in earlier:
        seeds, _, rest = block.partition(": ")
        parts = [part for part in rest.split("; ") if part not in known]
        yield from (f"{as_code(part)} (seeds {seeds})" for part in parts)


def as_code(part: str) -> str:
    """Return a part of a note, steps as code."""
    return f"`{part}`" if part.startswith(("(", "Recipe(")) else part


def called(rows: Sequence[Mapping[str, Any]], places: Sequence[int]) -> str:
    """Return what some rows are called: a row by its name, and by its tasks where not by all."""
    if len(places) == len(rows) > 1:
        return "every row"
    tasks: dict[str, list[str]] = {}
    for place in places:
        tasks.setdefault(rows[place]["row"], []).append(
            (rows[place]["task"] or "").removesuffix(" dev")
        )
    every = Counter(row["row"] for row in rows)
    return ", ".join(
        name if len(found) == every[name] else f"{name} ({', '.join(found)})"
        for name, found in tasks.items()
    )


def papers(note: str) -> str:
    """Return the page of every table of the papers that has been run."""
    return page(note, PAPERS_INTRO, RESULTS)


def benchmarks(note: str) -> str:
    """Return the page of every benchmark that has been run."""
    return page(note, BENCHMARKS_INTRO, ROOT / "benchmarks" / "results", TIMED)


def page(note: str, intro: str, folder: Path, names: Mapping[str, str] = HEADINGS) -> str:
    """Return the page of a folder's files of results."""
    found = [results(path, names) for path in sorted(folder.glob("*.json"))]
    parts = [note, intro, *found]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def readme() -> str:
    """Return the front page with its table of results made anew."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{front()}\n{END}{after}"


def front() -> str:
    """Return the table of the front page."""
    lines = []
    for name, labels in FRONT.items():
        data = loaded(name)
        rows = {row["row"]: row for row in data["rows"]}
        rows |= {f"{row['task']}: {row['row']}": row for row in data["rows"]}
        lines += [front_row(rows[row], label) for row, label in labels.items()]
    headings = ("network", "data", "accuracy, %", "seeds", "before", "file", "smaller")
    return f"{FRONT_INTRO}\n\n{table(lines, headings)}"


def front_row(row: Mapping[str, Any], label: str) -> tuple[str, ...]:
    """Return one line of the front page's table."""
    spread = f" ± {row['std']:.2f}" if row["std"] is not None else ""
    unit = byte_scale([row["size_bytes"]])
    return (
        label,
        row["task"],
        f"{row['ours']:.2f}{spread}",
        str(row["seeds"] or 1),
        f"{row['baseline']:.2f}",
        f"{unit.text(row['size_bytes'])} {unit.unit}",
        f"{row['ratio']:.1f}x",
    )
