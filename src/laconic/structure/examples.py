"""Example inputs: what a network is called with, on a small batch of its task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from laconic.errors import ModelError, TaskError
from laconic.step import undisturbed
from laconic.tasks.task import device_of, evaluation

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["example_inputs"]

# What a network raises that is called with inputs it was not made for.
_MISFIT = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def example_inputs(
    model: nn.Module, task: Task | None, *, count: int = 2
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that a task calls a network with, for its first few examples.

    Always the same ones, not augmented; the global generators are left alone.

    Args:
        model: called once, in evaluation mode; left as it is.
        task: its training split gives the examples.
        count: how many of them.

    Raises:
        TaskError: there is no task, or it does not call the model itself.
        ModelError: the forward fails.

    >>> from laconic.models import digits_cnn
    >>> from laconic.tasks import digits
    >>> (images,), named = example_inputs(digits_cnn(), digits())
    >>> images.shape, named
    (torch.Size([2, 1, 8, 8]), {})
    """
    if task is None:
        raise TaskError("the axes of a network are found on a batch of data; give task=")
    batch = task.example_batch(count).to(device_of(model))
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append((inputs, named))

    watched = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with watched, undisturbed(), evaluation(model):
            task.call(model, batch)
    except _MISFIT as error:
        raise ModelError(
            f"{type(model).__name__} fails on {count} examples of {task.name} "
            f"({type(error).__name__}: {error}); the task's call decides what it is fed"
        ) from error
    if not calls:
        raise TaskError(
            f"{task.name}: call= does not call the model but parts of it, so its axes cannot be "
            "found; let it call the model itself"
        )
    return calls[0]
