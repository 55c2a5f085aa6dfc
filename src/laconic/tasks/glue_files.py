"""The nine GLUE tasks: how their files are found and read, and how each is judged."""

from __future__ import annotations

import gzip
import logging
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from laconic.errors import TaskError, nearest
from laconic.tasks.metrics import Metric, accuracy, f1, matthews, pearson, spearman

__all__ = ["TASKS", "Layout", "Rows", "class_names", "find_glue", "glue_name", "read_glue"]

logger = logging.getLogger(__name__)

# Texts, each a tuple of one or two, and labels: places of classes, or values; None: there are none.
Rows = tuple[list[tuple[str, ...]], list[int | float] | None]

SUFFIXES = (".tsv", ".tsv.gz", ".txt", ".txt.gz")
# The first file found counts. GLUE keeps its test labels to itself: dev is the test split.
SEARCH = {
    "train": ("train", "train_subset", "msr_paraphrase_train"),
    "test": ("dev", "dev_matched", "heldout_subset"),
}
# With a larger share of broken lines, a file of a lenient layout is damaged too.
MOST_BROKEN = 0.01
LARGEST_VALUE = 5.0
SHOWN = 60


@dataclass(frozen=True)
class Layout:
    """Where the files of one GLUE task keep texts and labels, and what is measured.

    Attributes:
        texts: for each text, the names its column may have.
        metrics: name -> metric, the main one first.
        label: the names the label's column may have.
        classes: names of the labels in the order of the outputs; empty: values from 0 to 5.
        bare: without a header: positions of the texts and, last, of the label.
        widths: without a header: how many columns a line may have.
        lenient: the official file has broken lines, which are left out.

    >>> TASKS["RTE"].classes
    ('entailment', 'not_entailment')
    """

    texts: tuple[tuple[str, ...], ...]
    metrics: Mapping[str, Metric]
    label: tuple[str, ...] = ("label",)
    classes: tuple[str, ...] = ("0", "1")
    bare: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    lenient: bool = False


ACCURACY = {"accuracy": accuracy}
BOTH = {"accuracy": accuracy, "f1": f1}
PAIR = (("sentence1",), ("sentence2",))
ENTAILMENT = ("entailment", "not_entailment")

TASKS = {
    "CoLA": Layout((("sentence",),), {"matthews": matthews}, bare=(3, 1), widths=(4,)),
    "MNLI": Layout(
        (("sentence1", "premise"), ("sentence2", "hypothesis")),
        ACCURACY,
        ("gold_label", "label"),
        ("entailment", "neutral", "contradiction"),
    ),
    "MRPC": Layout((("#1 String",), ("#2 String",)), BOTH, ("Quality",)),
    "QNLI": Layout((("question",), ("sentence",)), ACCURACY, classes=ENTAILMENT),
    "QQP": Layout((("question1",), ("question2",)), BOTH, ("is_duplicate",), lenient=True),
    "RTE": Layout(PAIR, ACCURACY, classes=ENTAILMENT),
    "SST-2": Layout((("sentence",),), ACCURACY),
    "STS-B": Layout(
        PAIR,
        {"pearson": pearson, "spearman": spearman},
        ("score",),
        (),
        bare=(5, 6, 4),
        widths=(7, 9),
    ),
    "WNLI": Layout(PAIR, ACCURACY),
}


def glue_name(folder: Path, name: str | None = None) -> str:
    """Return which GLUE task a folder holds, by its own name or the one given.

    Case, hyphens and underscores do not matter.

    Raises:
        TaskError: no GLUE task is called so.

    >>> glue_name(Path("data/sst2")), glue_name(Path("mine"), "cola")
    ('SST-2', 'CoLA')
    """
    asked = folder.resolve().name if name is None else str(name)
    plain = {_plain(known): known for known in TASKS}
    if _plain(asked) not in plain:
        hint = " (name= says what a folder of another name holds)" if name is None else ""
        raise TaskError(f"glue: no task is called '{asked}'{nearest(asked, TASKS)}{hint}")
    return plain[_plain(asked)]


def find_glue(folder: Path, part: str, stem: str | None = None) -> Path:
    """Return the file of a split.

    For train the first of train, train_subset and msr_paraphrase_train; for test the first of
    dev, dev_matched and heldout_subset; each as .tsv, .tsv.gz, .txt or .txt.gz.

    Args:
        folder: holds the files.
        part: "train" or "test".
        stem: name of the file, with or without its suffix; None: by the rule above.

    Raises:
        TaskError: no such folder, no such file.

    >>> find_glue(Path("glue/MNLI"), "test").name  # doctest: +SKIP
    'dev_matched.tsv.gz'
    """
    if not folder.is_dir():
        raise TaskError(f"{folder}: no such folder; give the folder of one GLUE task")
    stems = SEARCH[part] if stem is None else (stem,)
    # A name given with its suffix stands first.
    endings = SUFFIXES if stem is None else ("", *SUFFIXES)
    tried = [folder / f"{each}{ending}" for each in stems for ending in endings]
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        there = sorted(path.name for path in folder.iterdir())
        raise TaskError(
            f"{folder}: no file for {part}; {' or '.join(stems)} (.tsv or .tsv.gz) is looked for "
            f"and {', '.join(there) or 'nothing'} is there; name one with {part}="
        )
    return found


def read_glue(
    path: Path,
    name: str | None = None,
    *,
    classes: Sequence[str] | None = None,
    unlabelled: bool = False,
) -> Rows:
    """Return the texts and labels of one file, tab-separated and without quoting.

    Args:
        path: the file, UTF-8, plain or gzipped.
        name: of the GLUE task; None: the name of the file's folder.
        classes: the names of the labels in another order.
        unlabelled: a header that names the texts and no label is that of a file without labels.

    Returns:
        For each line its texts, and its label: the place in ``classes``, or a value; None where
        the file has no labels.

    Raises:
        TaskError: the file cannot be read, a column is missing, a line has another number of
            columns, an empty text or a label that the task does not have. The official QQP has
            some lines of the first two kinds: there they are left out, up to 1 % of the file.

    >>> read_glue(Path("glue/RTE/dev.tsv"))[1][:3]  # doctest: +SKIP
    [1, 0, 0]
    """
    name = glue_name(path.parent, name)
    known = class_names(name, classes)
    texts, labels = [], []
    for number, parts, label in _whole_rows(path, _lines(path), TASKS[name], unlabelled):
        texts.append(tuple(parts))
        if label is not None:
            labels.append(_label(label, known, f"{path}:{number}"))
    if not texts:
        raise TaskError(f"{path}: no example; the file is empty")
    return texts, labels or None


def class_names(name: str, classes: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of a task's labels, in the order given or the usual one.

    Raises:
        TaskError: they are not the labels of the task.

    >>> class_names("RTE", ["not_entailment", "entailment"])
    ('not_entailment', 'entailment')
    """
    usual = TASKS[name].classes
    given = usual if classes is None else tuple(str(each) for each in classes)
    if sorted(given) != sorted(usual):
        raise TaskError(
            f"{name}: classes {list(given)} are not its labels; give {list(usual)} in any order"
        )
    return given


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _lines(path: Path) -> list[str]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise TaskError(f"{path}: cannot be read ({error}); download it again") from error
    try:
        # The mark some editors put first is no text. Nothing but a line feed ends a line:
        # sentences may hold other separators of Unicode.
        lines = data.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TaskError(
            f"{path}:{line}: not UTF-8 ({error.reason}); convert the file to UTF-8"
        ) from error
    while len(lines) > 1 and not lines[-1]:
        lines.pop()
    return lines


def _columns(
    path: Path, line: str, layout: Layout, unlabelled: bool
) -> tuple[list[int], tuple[int, ...], int]:
    """Return positions of texts and label, allowed numbers of columns, the first line of data.

    A label that is not there has the position -1.
    """
    head = line.split("\t")
    wanted = (*layout.texts, layout.label)
    found = [next((head.index(name) for name in names if name in head), -1) for names in wanted]
    if min(found[:-1] if unlabelled else found) >= 0:
        return found, (len(head),), 1
    if max(found) < 0 and len(head) in layout.widths:
        return list(layout.bare), layout.widths, 0
    missing = wanted[found.index(-1)]
    shown, names = ", ".join(head)[:SHOWN], ", ".join(name for name, *_ in wanted)
    raise TaskError(
        f"{path}:1: no column '{' or '.join(missing)}'; the first line is '{shown}': give the "
        f"official file with its header, or head your own with {names}, a tab between them (only "
        "training examples may be without the label)"
    )


def _whole_rows(
    path: Path, lines: Sequence[str], layout: Layout, unlabelled: bool
) -> Iterator[tuple[int, list[str], str | None]]:
    """Yield line number, texts and label of every line that is whole."""
    places, widths, first = _columns(path, lines[0], layout, unlabelled)
    broken = []
    for number, line in enumerate(lines[first:], first + 1):
        row = line.split("\t")
        wrong = _problem(row, places, widths)
        if not wrong:
            label = None if places[-1] < 0 else row[places[-1]]
            yield number, [row[place] for place in places[:-1]], label
            continue
        broken.append(number)
        if not layout.lenient or len(broken) > max(1, MOST_BROKEN * len(lines)):
            raise TaskError(f"{path}:{number}: {wrong}; repair or remove the line")
    if broken:
        logger.warning("%s: %d broken lines are left out", path, len(broken))


def _problem(row: list[str], places: Sequence[int], widths: Sequence[int]) -> str:
    if len(row) not in widths:
        wanted = " or ".join(str(width) for width in widths)
        return f"{len(row)} columns instead of {wanted} (a tab ends each, quotes mean nothing)"
    if not all(row[place].strip() for place in places[:-1]):
        return "an empty text"
    return ""


def _label(text: str, classes: tuple[str, ...], where: str) -> int | float:
    if classes:
        if text not in classes:
            raise TaskError(
                f"{where}: label '{text[:SHOWN]}' is not one of {', '.join(classes)}; repair or "
                "remove the line"
            )
        return classes.index(text)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= LARGEST_VALUE:
        raise TaskError(
            f"{where}: score '{text[:SHOWN]}' is not a number from 0 to {LARGEST_VALUE:g}; repair "
            "or remove the line"
        )
    return value
