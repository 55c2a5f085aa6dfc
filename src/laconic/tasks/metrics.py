"""Metrics of a whole split: each maps outputs and targets to one number, higher is better."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from laconic.errors import TaskError

__all__ = [
    "Metric",
    "accuracy",
    "as_values",
    "f1",
    "matthews",
    "pearson",
    "spearman",
    "top5_accuracy",
]

Metric = Callable[[Tensor, Tensor], float]


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Return the fraction, 0 to 1, of examples whose largest output is the label.

    Of equal outputs the first is the largest. NaN where an output is.

    Args:
        outputs: scores [examples, classes].
        targets: labels [examples].

    Raises:
        TaskError: the shapes do not belong together.

    >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    0.5
    """
    return _top("accuracy", outputs, targets, 1)


def top5_accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Return the fraction, 0 to 1, of labels among the five largest outputs.

    Args:
        outputs: scores [examples, classes]; with fewer than five classes all count.
        targets: labels [examples].

    Raises:
        TaskError: the shapes do not belong together.

    >>> top5_accuracy(torch.arange(10.0).repeat(2, 1), torch.tensor([5, 4]))
    0.5
    """
    return _top("top5_accuracy", outputs, targets, 5)


def f1(outputs: Tensor, targets: Tensor) -> float:
    """Return the harmonic mean, 0 to 1, of precision and recall of class 1.

    F1 = 2 TP / (2 TP + FP + FN); 0.0 where class 1 is neither predicted nor true. NaN where an
    output is.

    Args:
        outputs: scores [examples, 2]; the larger one is the prediction.
        targets: labels 0 or 1 [examples].

    Raises:
        TaskError: the shapes do not belong together, or there are not two classes.

    >>> f1(torch.eye(2)[[1, 1, 0, 0]], torch.tensor([1, 0, 1, 1]))
    0.4
    """
    _check_labels("f1", outputs, targets)
    if outputs.shape[1] != 2:
        raise TaskError(
            f"f1 is of class 1 against class 0, and there are {outputs.shape[1]} outputs per "
            "example; give the task other metrics"
        )
    if bool(outputs.isnan().any()):
        return math.nan
    (_, false_positive), (false_negative, true_positive) = _confusion(outputs, targets)
    total = 2 * true_positive + false_positive + false_negative
    return 2 * true_positive / total if total else 0.0


def matthews(outputs: Tensor, targets: Tensor) -> float:
    """Return Matthews' correlation, -1 to 1, of predicted and true classes.

    With s examples, c of them right, p_k predicted and t_k true ones of class k:
    (c s - sum p_k t_k) / sqrt((s^2 - sum p_k^2) (s^2 - sum t_k^2)); for two classes the usual
    phi coefficient. 0.0 where one class is always predicted, or always true. NaN where an
    output is. (Gorodkin 2004, equation 8.)

    Args:
        outputs: scores [examples, classes]; the largest one is the prediction.
        targets: labels [examples].

    Raises:
        TaskError: the shapes do not belong together.

    >>> matthews(torch.eye(2)[[1, 1, 0, 0]], torch.tensor([1, 1, 0, 0]))
    1.0
    """
    _check_labels("matthews", outputs, targets)
    if bool(outputs.isnan().any()):
        return math.nan
    table = _confusion(outputs, targets)
    true, predicted = [sum(row) for row in table], [sum(row) for row in zip(*table, strict=True)]
    count, right = sum(true), sum(row[place] for place, row in enumerate(table))
    # Whole numbers of any size: no rounding before the last division.
    shared = right * count - sum(p * t for p, t in zip(predicted, true, strict=True))
    spread_predicted = count**2 - sum(p * p for p in predicted)
    spread_true = count**2 - sum(t * t for t in true)
    if not spread_predicted or not spread_true:
        return 0.0
    return shared / math.sqrt(spread_predicted * spread_true)


def pearson(outputs: Tensor, targets: Tensor) -> float:
    """Return the linear correlation, -1 to 1, of outputs and true values.

    0.0 where the outputs or the targets are all the same.

    Args:
        outputs: values [examples] or [examples, 1].
        targets: true values [examples].

    Raises:
        TaskError: the shapes do not belong together.

    >>> pearson(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0.0, 2.0, 4.0]))
    1.0
    """
    return _correlation(as_values(outputs, targets).double(), targets.double())


def spearman(outputs: Tensor, targets: Tensor) -> float:
    """Return the correlation, -1 to 1, of the ranks of outputs and true values.

    Equal values share the mean of their ranks. 0.0 where the outputs or the targets are all the
    same.

    Args:
        outputs: values [examples] or [examples, 1].
        targets: true values [examples].

    Raises:
        TaskError: the shapes do not belong together.

    >>> spearman(torch.tensor([1.0, 10.0, 100.0]), torch.tensor([1.0, 2.0, 3.0]))
    1.0
    """
    values = as_values(outputs, targets)
    if bool(values.isnan().any()):
        return math.nan  # NaN has no rank
    return _correlation(_ranks(values), _ranks(targets))


def as_values(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return one value per example [examples], from [examples] or [examples, 1].

    Raises:
        TaskError: there is not one output for each target.

    >>> as_values(torch.zeros(3, 1), torch.zeros(3)).shape
    torch.Size([3])
    """
    values = outputs[:, 0] if outputs.ndim == 2 and outputs.shape[1] == 1 else outputs
    if values.ndim != 1 or values.shape != targets.shape or not values.numel():
        remedy = "give the network one output (num_labels=1)"
        if targets.shape == (len(values), 1):
            remedy = "give targets[:, 0]"
        raise TaskError(
            f"values need outputs [examples, 1] and targets [examples], got "
            f"{list(outputs.shape)} and {list(targets.shape)}; {remedy}, or the task another loss "
            "and other metrics"
        )
    return values


def _top(name: str, outputs: Tensor, targets: Tensor, count: int) -> float:
    _check_labels(name, outputs, targets)
    if bool(outputs.isnan().any()):
        return math.nan
    labels = targets.long()[:, None]
    own, places = outputs.gather(1, labels), torch.arange(outputs.shape[1], device=outputs.device)
    # Of equal outputs the first goes first, as in argmax; topk would take any.
    ahead = (outputs > own) | ((outputs == own) & (places < labels))
    return int((ahead.sum(dim=1) < count).sum()) / len(targets)


def _check_labels(name: str, outputs: Tensor, targets: Tensor) -> None:
    if outputs.ndim != 2 or targets.shape != outputs.shape[:1] or not outputs.numel():
        raise TaskError(
            f"{name} needs outputs [examples, classes] and labels [examples], got "
            f"{list(outputs.shape)} and {list(targets.shape)}; give the task other metrics"
        )
    lowest, highest, classes = int(targets.min()), int(targets.max()), outputs.shape[1]
    if lowest < 0 or highest >= classes:
        raise TaskError(
            f"labels go from {lowest} to {highest} and there are {classes} outputs per example; "
            "give the network one output for each class"
        )


def _confusion(outputs: Tensor, targets: Tensor) -> list[list[int]]:
    """Return how many examples of each true class (row) were taken for each class (column)."""
    classes = outputs.shape[1]
    pairs = targets.long() * classes + outputs.argmax(dim=1)
    counts = pairs.bincount(minlength=classes * classes)
    table: list[list[int]] = counts.reshape(classes, classes).tolist()
    return table


def _correlation(one: Tensor, other: Tensor) -> float:
    # Asked of the values: rounding leaves a spread of equal values that is not quite zero.
    if one.min() == one.max() or other.min() == other.max():
        return 0.0
    one, other = one - one.mean(), other - other.mean()
    return float((one @ other / torch.sqrt((one @ one) * (other @ other))).clamp(-1, 1))


def _ranks(values: Tensor) -> Tensor:
    """Return ranks from 1, equal values sharing the mean of theirs, float64 [examples]."""
    _, places, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[places]
