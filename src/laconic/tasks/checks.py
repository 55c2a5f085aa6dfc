"""What a task refuses when it is made: a loss, targets and labels that cannot serve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from laconic.errors import TaskError
from laconic.tasks.split import Split, required

__all__ = ["check_classes", "check_labels", "check_loss", "check_targets"]

# Where the losses of torch are defined.
TORCHS = (F.__name__, nn.CrossEntropyLoss.__module__)


def check_loss(loss: Any, name: str) -> None:
    """Refuse a loss of torch, which takes targets where a task's takes the batch.

    Args:
        loss: what was given.
        name: of the task.

    Raises:
        TaskError: it is such a loss, or no function at all.

    >>> check_loss(lambda outputs, batch: F.mse_loss(outputs, batch.targets), "mine")
    """
    # A call would only construct a class; torch's own losses take (outputs, targets).
    torchs = getattr(loss, "__module__", "") in TORCHS
    if not callable(loss) or isinstance(loss, type) or torchs:
        shown = getattr(loss, "__name__", type(loss).__name__)
        raise TaskError(
            f"{name}: loss is {shown}; give a function of the outputs and the Batch, such as "
            "loss=lambda outputs, batch: F.cross_entropy(outputs, batch.targets)"
        )


def check_targets(parts: Mapping[str, Split]) -> None:
    """Refuse splits without targets, but training examples where others choose and report.

    Args:
        parts: "train", "test" and, if it was given, "validate".

    Raises:
        TaskError: test or validate have none; or train, of which 5 % would be held out.

    >>> from laconic.tasks.split import Arrays
    >>> labels, none = Arrays([[1.0]], [0]), Arrays([[1.0]])
    >>> check_targets({"train": none, "test": labels, "validate": labels})
    """
    for part in ("test", "validate"):
        if part in parts and not parts[part].labelled:
            raise TaskError(
                f"{part}: the examples have no targets, which loss and metrics need; give "
                "(inputs, targets): only training examples may be without"
            )
    if not parts["train"].labelled and "validate" not in parts:
        raise TaskError(
            "train: the examples have no targets, so none of them can be held out to choose the "
            "best checkpoint; give validate= with targets, or give train as (inputs, targets)"
        )


def check_labels(parts: Mapping[str, Split], classes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the labels, given or counted, once every label is in range.

    Args:
        parts: by name; those without targets do not count.
        classes: the names; empty: as many as the labels of all splits but test.

    Raises:
        TaskError: labels are no whole numbers, below 0 or above the last class.

    >>> from laconic.tasks.split import Arrays
    >>> check_labels({"train": Arrays([[1.0], [2.0]], [0, 1])}, ())
    ('0', '1')
    """
    known = {name: part for name, part in parts.items() if part.labelled}
    labels = {name: _labels(part, name) for name, part in known.items()}
    if not classes and all(part.in_memory for part in known.values()):
        largest = max(int(labels[name].max()) for name in labels if name != "test")
        classes = tuple(str(label) for label in range(largest + 1))
    for name, values in labels.items():
        low, high = int(values.min()), int(values.max())
        if low < 0 or (classes and high >= len(classes)):
            wrong = low if low < 0 else high
            known_labels = f"0 to {len(classes) - 1}" if classes else "0 and above"
            remedy = ", or give classes= with every label"
            if low < 0:
                remedy = "; if such examples do not count, give loss= and metrics= without them"
            raise TaskError(
                f"{name}: label {wrong} (example {int((values == wrong).nonzero()[0, 0])}) is out "
                f"of range; labels are {known_labels}: repair it{remedy}"
            )
    return classes


def _labels(split: Split, name: str) -> Tensor:
    # Examples outside memory may be many and slow: the first batch stands for all.
    labels = required(split.targets() if split.in_memory else next(split.batches(1)).targets)
    if labels.is_floating_point() or labels.is_complex():
        raise TaskError(
            f"{name}: labels are {labels.dtype}, not integers; convert them, or give loss= and "
            "metrics= for targets that are values"
        )
    return labels


def check_classes(name: str, outputs: Tensor, targets: Tensor) -> None:
    """Refuse targets that do not say one class for every place that outputs are for.

    Args:
        name: of the task.
        outputs: [examples, classes, ...].
        targets: [examples, ...], or probabilities of the shape of the outputs.

    Raises:
        TaskError: they have another shape.

    >>> import torch
    >>> check_classes("mine", torch.zeros(8, 3), torch.zeros(8, dtype=torch.int64))
    """
    places = (outputs.shape[0], *outputs.shape[2:])
    if targets.is_floating_point() or tuple(targets.shape) == places:
        return
    remedy = "give loss= and metrics= for such targets"
    if targets.shape == (*places, 1):
        remedy = "give labels[..., 0]"
    elif targets.shape == outputs.shape:
        remedy = "give labels.argmax(1), if each has one class; else loss= and metrics="
    raise TaskError(
        f"{name}: the targets have shape {[*targets.shape]} where outputs of shape "
        f"{[*outputs.shape]} need {[*places]}, a class for each: {remedy}"
    )
