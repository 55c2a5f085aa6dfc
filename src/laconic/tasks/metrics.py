"""Metrics of a whole split: each maps outputs and targets to one number, higher is better."""

from __future__ import annotations

from torch import Tensor

from laconic.errors import TaskError

__all__ = ["accuracy", "top5_accuracy"]


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Return the fraction, 0 to 1, of examples whose largest output is the label.

    Args:
        outputs: scores [examples, classes].
        targets: labels [examples].

    Raises:
        TaskError: the shapes do not belong together.

    >>> import torch
    >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    0.5
    """
    return _top(outputs, targets, 1)


def top5_accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Return the fraction, 0 to 1, of labels among the five largest outputs.

    Args:
        outputs: scores [examples, classes]; with fewer than five classes all count.
        targets: labels [examples].

    Raises:
        TaskError: the shapes do not belong together.

    >>> import torch
    >>> top5_accuracy(torch.arange(10.0).repeat(2, 1), torch.tensor([5, 4]))
    0.5
    """
    return _top(outputs, targets, 5)


def _top(outputs: Tensor, targets: Tensor, count: int) -> float:
    if outputs.ndim != 2 or targets.shape != outputs.shape[:1]:
        raise TaskError(
            f"accuracy needs outputs [examples, classes] and labels [examples], got "
            f"{list(outputs.shape)} and {list(targets.shape)}; give the task other metrics"
        )
    best = outputs.topk(min(count, outputs.shape[1]), dim=1).indices
    found = (best == targets[:, None]).any(dim=1)
    return int(found.sum()) / len(found)
