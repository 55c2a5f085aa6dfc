"""Derivatives of the task's loss for named weights of a plain copy of a network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor, nn

from laconic.curvature import LossFunction, gradients, top_eigenvalue
from laconic.errors import ModelError
from laconic.progress import progress
from laconic.step import State, generator_of
from laconic.tasks.split import Batch, map_tensors
from laconic.tasks.task import needed
from laconic.weights.laid import baked, owner
from laconic.weights.workspace import wide_dtype

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = [
    "Per",
    "drawn",
    "eigenvalues",
    "examples",
    "finite",
    "losses",
    "mean",
    "probe",
    "products",
]

Key = TypeVar("Key", bound=Hashable)
Per = Literal["batch", "sample"]


def products(
    state: State, names: Iterable[str], *, batches: int, batch: int, per: Per, label: str
) -> Iterator[dict[str, Tensor]]:
    """Yield g * w of every weight, for one batch or example after the other.

    Gradients are those of the weight the network uses, in evaluation mode, on training examples
    that are drawn by the step's seed and not augmented.

    Args:
        state: the model, left as it is, and the task.
        names: dotted names of weights, as in the plain network.
        batches: at most so many; one epoch if the split has fewer.
        batch: examples per batch.
        per: what one gradient is taken of.
        label: who asks: shown beside the progress, and in errors.

    Raises:
        TaskError: there is no task.
        ModelError: a weight carries a parametrization that is not laconic's.
    """
    task = needed(state.task, f"{label} needs batches")
    network, tensors = probe(state.model, names)
    found = drawn(state, task, batches, batch, label)
    for loss_function in losses(network, task, found if per == "batch" else examples(found)):
        slopes = gradients(loss_function, list(tensors.values()))
        yield {
            name: slope.to(wide_dtype(slope)) * tensor.detach()
            for (name, tensor), slope in zip(tensors.items(), slopes, strict=True)
        }


def mean(
    found: Iterable[Mapping[Key, Tensor]], function: Callable[[Tensor], Tensor]
) -> dict[Key, Tensor]:
    """Return, by key, the mean of a function over all that is found.

    >>> pieces = [{"w": torch.tensor([-1.0])}, {"w": torch.tensor([3.0])}]
    >>> mean(pieces, torch.abs)
    {'w': tensor([2.])}
    """
    total: dict[Key, Tensor] = {}
    count = 0
    for piece in found:
        count += 1
        for key, tensor in piece.items():
            value = function(tensor)
            total[key] = total[key].add_(value) if key in total else value
    return {key: sum_ / count for key, sum_ in total.items()}


def probe(model: nn.Module, names: Iterable[str]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a plain copy of the network and its weights of these names.

    Baked, the weight the network uses is itself a parameter, shared where it is tied, so its
    gradient is one even where the latent weight behind a codebook gets none; and the network
    that is being compressed keeps its gradients, modes and caches.

    Raises:
        ModelError: a weight carries a parametrization that is not laconic's.
    """
    network = baked(model).requires_grad_(False).eval()
    tensors = {}
    for name in names:
        module, attribute = owner(network, name)
        tensor = getattr(module, attribute)
        if not isinstance(tensor, nn.Parameter):
            raise ModelError(
                f"'{name}' carries a parametrization that is not laconic's; remove it before "
                "compressing"
            )
        tensors[name] = tensor.requires_grad_(True)
    return network, tensors


def drawn(state: State, task: Task, count: int, size: int, label: str) -> Iterator[Batch]:
    """Yield training batches by the step's seed, not augmented."""
    batches = task.train.plain().batches(size, seed=state.seed, device=state.device)
    return progress(itertools.islice(batches, count), label, count)


def losses(network: nn.Module, task: Task, batches: Iterator[Batch]) -> Iterator[LossFunction]:
    """Yield a function that computes the loss, for every batch."""

    def of(batch: Batch) -> Callable[[], Tensor]:
        return lambda: task.loss(task.call(network, batch), batch)

    return (of(batch) for batch in batches)


def eigenvalues(
    loss_functions: Iterable[LossFunction],
    blocks: Mapping[Key, Sequence[Tensor]],
    *,
    seed: int,
    iterations: int,
    find: Callable[..., float] = top_eigenvalue,
) -> dict[Key, list[float]]:
    """Return an eigenvalue of every block's Hessian for every loss, by the block's name.

    Args:
        loss_functions: one per batch.
        blocks: tensors that require gradients, by name.
        seed: of the first vectors.
        iterations: of the power iteration, at most.
        find: ``top_eigenvalue`` or ``largest_eigenvalue``.

    Raises:
        ModelError: one is not finite.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> found = eigenvalues([lambda: (w**2).sum()], {"w": [w]}, seed=0, iterations=9)
    >>> [round(value, 3) for value in found["w"]]
    [2.0]
    """
    found: dict[Key, list[float]] = {name: [] for name in blocks}
    for index, loss_function in enumerate(loss_functions):
        for name, tensors in blocks.items():
            draws = generator_of(seed, name, index)
            value = find(loss_function, tensors, generator=draws, iterations=iterations)
            if not math.isfinite(value):
                raise ModelError(
                    f"the second derivative of the loss for '{name}' is not finite; check the "
                    "data and the model"
                )
            found[name].append(value)
    return found


def examples(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield every example of the batches as a batch of its own."""
    for batch in batches:
        for index in range(batch.size):
            yield _rows(batch, slice(index, index + 1))


def _rows(batch: Batch, rows: slice) -> Batch:
    targets = None if batch.targets is None else batch.targets[rows]
    return Batch(map_tensors(lambda tensor: tensor[rows], batch.inputs), targets)


def finite(scores: Mapping[str, Tensor], criterion: str) -> None:
    """Refuse scores that are not finite.

    Raises:
        ModelError: names the weight.
    """
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise ModelError(
                f"{criterion}: the derivative of the loss for '{name}' is not finite on the "
                "training batches; check the data and the model, or rank by magnitude"
            )
