"""Text tasks: GLUE folders, lists of texts, tables with named columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laconic.errors import TaskError, nearest
from laconic.tasks.glue_files import TASKS, class_names, find_glue, glue_name, read_glue
from laconic.tasks.metrics import pearson, spearman
from laconic.tasks.task import Task, squared_error
from laconic.tasks.tokens import Texts, as_tokenizer

__all__ = ["glue", "texts"]

# Columns of well-known data sets: a table is read by the first line whose columns it has.
TEXT_COLUMNS = (
    ("sentence",),
    ("text",),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
)
LABEL_COLUMNS = ("label", "labels")
SHOWN = 60


def glue(
    path: Path,
    *,
    tokenizer: Path | Any = None,
    max_length: int = 128,
    name: str | None = None,
    train: str | None = None,
    test: str | None = None,
    validate: str | None = None,
    classes: Sequence[str] | None = None,
    padding: str = "longest",
    multiple: int = 1,
) -> Task:
    """Return one GLUE task from its folder of tab-separated files, plain or gzipped.

    The tasks are CoLA, MNLI, MRPC, QNLI, QQP, RTE, SST-2, STS-B and WNLI, with their official
    metrics: Matthews' correlation (CoLA), Pearson's and Spearman's (STS-B, trained with the
    squared error), accuracy and F1 (MRPC, QQP), accuracy (the others). The test split is the dev
    file, because GLUE keeps its test labels to itself; the network is given input_ids,
    attention_mask and token_type_ids.

    Args:
        path: the folder of one task.
        tokenizer: the folder of a Hugging Face model, or its tokenizer.json.
        max_length: tokens of one example, special ones included.
        name: of the task; the folder's own name by default.
        train: file of the training examples; train or train_subset by default. It may be without
            the column of the labels, and then ``validate`` is needed.
        test: file of the test split, such as dev_mismatched; dev, dev_matched or heldout_subset
            by default.
        validate: file that chooses the best checkpoint; 5 % of train by default.
        classes: the labels in the order of the network's outputs; entailment, neutral,
            contradiction; entailment, not_entailment; 0, 1 by default.
        padding: "longest" in each batch, or always to "max_length".
        multiple: lengths are padded up to a multiple of this many tokens.

    Raises:
        TaskError: no tokenizer; a file is missing, damaged or not that of the task; a line is
            broken, its text is empty or its label unknown.
        MissingExtra: tokenizers is not installed.

    >>> glue(Path("glue/MRPC"), tokenizer=Path("bert")).main_metric  # doctest: +SKIP
    'accuracy'
    """
    path = Path(path)
    name = glue_name(path, name)
    if tokenizer is None:
        raise TaskError(
            f"glue: {name} needs a tokenizer; name the folder of the model, or its tokenizer.json: "
            "{glue: {path: ..., tokenizer: ...}}"
        )
    coder = as_tokenizer(tokenizer, max_length=max_length, padding=padding, multiple=multiple)
    files = {"train": find_glue(path, "train", train), "test": find_glue(path, "test", test)}
    if validate is not None:
        files["validate"] = find_glue(path, "validate", validate)
    splits = {
        part: _split(
            part, *read_glue(file, name, classes=classes, unlabelled=part == "train"), coder
        )
        for part, file in files.items()
    }
    return _task(
        splits,
        coder,
        metrics=dict(TASKS[name].metrics),
        classes=class_names(name, classes),
        name=name,
    )


def texts(
    train: Any,
    test: Any,
    tokenizer: Any,
    *,
    validate: Any = None,
    columns: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    max_length: int = 128,
    padding: str = "longest",
    multiple: int = 1,
    **options: Any,
) -> Task:
    """Return a Task over texts in memory; see Task.from_texts.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> words = Tokenizer(models.WordLevel({"[PAD]": 0, "good": 1, "bad": 2}, "[PAD]"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> rows = [("good", "yes"), ("bad", "no"), ("good good", "yes")]
    >>> texts(rows, rows, words).classes
    ('no', 'yes')
    """
    coder = as_tokenizer(tokenizer, max_length=max_length, padding=padding, multiple=multiple)
    given = {"test": test, "validate": validate, "train": train}
    tables: dict[str, tuple[list[Any], list[Any] | None]] = {}
    for part, data in given.items():
        if data is not None:
            tables[part] = _table(data, part, columns, like=tables.get("test"))
    labels = {part: found for part, (_, found) in tables.items() if found is not None}
    if labels.keys() == {"test"}:
        raise TaskError(
            "train: the texts have no labels, so none of them can be held out to choose the best "
            "checkpoint; give validate= with labels, or columns=(text, label) to name them"
        )
    named = classes or _named_classes(train, columns) or _named_classes(test, columns) or ()
    named = tuple(str(each) for each in named)
    targets, named = _targets(labels, named)
    splits = {
        part: _split(part, rows, targets.get(part), coder) for part, (rows, _) in tables.items()
    }
    return _task(splits, coder, classes=named, **options)


def _task(splits: Mapping[str, Any], coder: Any, **options: Any) -> Task:
    if splits["test"].labels.is_floating_point():
        options = {
            "loss": squared_error,
            "metrics": {"pearson": pearson, "spearman": spearman},
        } | options
    return Task(**splits, tokenizer=coder.to_str().encode(), **options)


def _split(part: str, rows: Sequence[Any], targets: Any, coder: Any) -> Texts:
    try:
        return Texts(rows, targets, coder)
    except TaskError as error:
        raise TaskError(f"{part}: {error}") from error


def _table(
    data: Any, part: str, columns: Sequence[str] | None, *, like: tuple[list[Any], Any] | None
) -> tuple[list[Any], list[Any] | None]:
    """Return the texts and the labels of rows, or of a table; without labels None for them.

    Args:
        data: what the user gave.
        part: "train", "test" or "validate".
        columns: names of texts and, last, of the label.
        like: the texts and labels of test, which say how many texts an example has.
    """
    if isinstance(data, list | tuple) and data and all(isinstance(row, Mapping) for row in data):
        data = {name: [row.get(name) for row in data] for name in data[0]}
    names = _column_names(data)
    if names is None:
        rows, labels = _rows(data, part, len(like[0][0]) if like and like[0] else 1)
    else:
        texts, label = _chosen(names, part, columns)
        rows = list(zip(*([*data[name]] for name in texts), strict=True))
        labels = [None] * len(rows) if label is None else [*data[label]]
    missing = [number for number, each in enumerate(labels) if each is None]
    if missing and (part != "train" or len(missing) < len(labels)):
        raise TaskError(
            f"{part}: example {missing[0]}, {rows[missing[0]]!r:.{SHOWN}}, has no label; only "
            "training examples may be without, and then all of them"
        )
    return rows, None if missing else labels


def _column_names(data: Any) -> list[str] | None:
    """Return the columns of a mapping, a data set of Hugging Face or a data frame."""
    for attribute in ("column_names", "columns"):
        found = getattr(data, attribute, None)
        if found is not None:
            return list(found)
    return list(data) if isinstance(data, Mapping) else None


def _chosen(
    names: Sequence[str], part: str, columns: Sequence[str] | None
) -> tuple[tuple[str, ...], str | None]:
    """Return the names of the columns of texts and that of labels, which train may lack."""
    optional = part == "train"
    if columns is not None:
        if isinstance(columns, str) or len(columns) not in (2, 3):
            raise TaskError(f"columns {columns!r} must name one or two texts and, last, the label")
        *texts, label = columns
        missing = next((name for name in columns if name not in names), None)
        if missing is not None and not (optional and missing == label):
            raise TaskError(f"{part}: there is no column '{missing}'{nearest(missing, names)}")
        return tuple(texts), label if missing is None else None
    found = next((wanted for wanted in TEXT_COLUMNS if set(wanted) <= set(names)), None)
    named = next((wanted for wanted in LABEL_COLUMNS if wanted in names), None)
    if found is None or (named is None and not optional):
        raise TaskError(
            f"{part}: which of the columns {', '.join(map(str, names))[:SHOWN]} are text and "
            "label? Give columns=(text, label) or columns=(text, second text, label)"
        )
    return found, named


def _rows(data: Any, part: str, count: int) -> tuple[list[Any], list[Any]]:
    """Return the texts of rows and their labels, None for a row without one.

    Args:
        data: what the user gave.
        part: "train", "test" or "validate".
        count: a row of so many items is texts alone.
    """
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        raise TaskError(
            f"{part}: {type(data).__name__} is no data; give a list of (text, label) or "
            "(text, second text, label), or a table with named columns"
        )
    texts, labels = [], []
    for number, row in enumerate(data):
        items = (row,) if isinstance(row, str) else row
        if not isinstance(items, tuple | list) or len(items) not in (1, 2, 3):
            raise TaskError(
                f"{part}: example {number}, {row!r:.{SHOWN}}, is not (text, label) or "
                "(text, second text, label)"
            )
        alone = len(items) in (1, count)
        texts.append(tuple(items if alone else items[:-1]))
        labels.append(None if alone else items[-1])
    return texts, labels


def _named_classes(data: Any, columns: Sequence[str] | None) -> Sequence[str] | None:
    """Return the label names that a data set of Hugging Face carries."""
    features = getattr(data, "features", None)
    if not isinstance(features, Mapping):
        return None
    _, label = _chosen(list(features), "train", columns)
    return None if label is None else getattr(features[label], "names", None)


def _targets(
    labels: Mapping[str, list[Any]], classes: tuple[str, ...]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return labels as numbers, and their names."""
    arrays = {part: _array(found, part) for part, found in labels.items()}
    kinds = {array.dtype.kind for array in arrays.values()}
    if "U" not in kinds:
        # Whole scores of one part are values if those of another are not whole.
        kind = torch.float32 if "f" in kinds else torch.int64
        return {part: torch.tensor(array, dtype=kind) for part, array in arrays.items()}, classes
    if len(kinds) > 1:
        raise TaskError("labels are names in one split and numbers in another; use one kind")
    names = classes or tuple(
        sorted({name for part, found in labels.items() if part != "test" for name in found})
    )
    return {part: _places(found, names, part) for part, found in labels.items()}, names


def _array(labels: list[Any], part: str) -> Any:
    if not labels:
        raise TaskError(f"{part}: there is no example; give at least one")
    words = [isinstance(label, str) for label in labels]
    try:
        # numpy would turn the numbers of a mixed list into words.
        array = np.asarray(labels, None if all(words) or not any(words) else object)
    except ValueError:  # lists of several lengths
        array = np.empty(0, object)
    if array.ndim != 1 or array.dtype.kind not in "biufU":
        shown = ", ".join(sorted({type(label).__name__ for label in labels}))
        raise TaskError(
            f"{part}: labels are {shown}; give one name (str), place (int) or value (float) each"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        wrong = int(np.flatnonzero(~np.isfinite(array))[0])
        raise TaskError(f"{part}: the label of example {wrong} is {array[wrong]}; repair it")
    return array


def _places(labels: list[str], classes: tuple[str, ...], part: str) -> Tensor:
    places = {name: place for place, name in enumerate(classes)}
    unknown = next((number for number, label in enumerate(labels) if label not in places), None)
    if unknown is not None:
        raise TaskError(
            f"{part}: label '{labels[unknown]}' of example {unknown} is not one of "
            f"{', '.join(classes)[:SHOWN]}; repair it, or give classes= with every label"
        )
    return torch.tensor([places[label] for label in labels])
