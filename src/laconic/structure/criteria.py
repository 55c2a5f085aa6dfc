"""Criteria: how much a weight matters; larger scores are kept."""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from laconic.curvature import LossFunction, diagonal_fisher, diagonal_hutchinson, gradients
from laconic.errors import ModelError, TaskError
from laconic.progress import progress
from laconic.step import State, Value
from laconic.tasks.split import Batch, map_tensors
from laconic.weights.laid import bake, mask_of, owner

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = [
    "Criterion",
    "Hessian",
    "Magnitude",
    "Random",
    "Taylor",
    "first_order",
    "loss_change",
    "second_order",
    "standardized",
]

Count = Annotated[int, Field(ge=1)]

# Survivors that are all equal have no spread; then no q * std prunes any of them, so their
# scores are huge, yet finite in float32.
_LEAST_SPREAD = 1e-30


def loss_change(gradient: Tensor, product: Tensor, change: Tensor) -> Tensor:
    """Return ``g . d + 0.5 d . (H d)``: what the loss changes by when w becomes w + d.

    Every criterion is a part of this expansion for ``d = -w``; it is exact for a quadratic.

    Args:
        gradient: g = dl/dw [any shape].
        product: H d, the Hessian times the change [same shape].
        change: d [same shape].

    >>> loss_change(torch.tensor([1.0]), torch.tensor([4.0]), torch.tensor([2.0]))
    tensor(6.)
    """
    return (gradient * change).sum() + 0.5 * (change * product).sum()


def first_order(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return ``|g * w|``, the first-order change of the loss when one weight becomes zero.

    Args:
        gradient: dl/dw [any shape].
        weight: w [same shape].

    >>> first_order(torch.tensor([2.0, -1.0]), torch.tensor([3.0, 0.0]))
    tensor([6., 0.])
    """
    return (gradient * weight).abs()


def second_order(diagonal: Tensor, weight: Tensor) -> Tensor:
    """Return ``0.5 * H_ii * w^2``, Optimal Brain Damage's saliency (LeCun et al. 1990, eq. 5).

    The change of the loss when one weight becomes zero, at a minimum and without the Hessian's
    off-diagonal terms.

    Args:
        diagonal: H_ii [any shape].
        weight: w [same shape].

    >>> second_order(torch.tensor([4.0]), torch.tensor([3.0]))
    tensor([18.])
    """
    return 0.5 * diagonal * weight**2


def standardized(weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return ``|w| / std(survivors)``, so one threshold q means ``q * std`` in every layer.

    Args:
        weight: w [any shape].
        mask: bool, of the weight's shape; True survives. None: all do.

    >>> standardized(torch.tensor([2.0, -2.0, 0.0]), torch.tensor([True, True, False]))
    tensor([1., 1., 0.])
    """
    survivors = weight if mask is None else weight[mask]
    spread = survivors.std(correction=0) if survivors.numel() else weight.new_ones(())
    return weight.abs() / spread.clamp_min(_LEAST_SPREAD)


class Criterion(Value, ABC):
    """How weights are ranked: a score for each, larger = keep.

    A pruned weight is zero and scores zero (but random scores do not look at it), so only
    survivors should be compared.
    """

    def check(self, task: Task | None) -> None:
        """Refuse, before any work, a task that cannot serve.

        Raises:
            TaskError: the criterion needs batches of data and there is no task.
        """

    @abstractmethod
    def scores(self, state: State, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return one score per weight, in the weight's shape.

        The model, its gradients and its modes are left as they were.

        Args:
            state: the model, and the task and generator where a criterion needs them.
            weights: dotted name -> weight as the network uses it (``weights_of``).
        """


class Magnitude(Criterion):
    """Score a weight by its absolute value (Han et al. 2015).

    Attributes:
        normalize: "none": |w|; "std": |w| / standard deviation of the layer's survivors, so
            that a global ranking cuts every layer at Han's threshold q * std.

    >>> layer = nn.Linear(2, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
    >>> Magnitude().scores(State(layer), {"weight": layer.weight})["weight"]
    tensor([[3., 4.]])
    """

    positional: ClassVar[tuple[str, ...]] = ("normalize",)

    normalize: Literal["none", "std"] = "none"

    def scores(self, state: State, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return |w|, in units of the layer's standard deviation if asked."""
        plain = {name: weight.detach().float() for name, weight in weights.items()}
        if self.normalize == "none":
            return {name: weight.abs() for name, weight in plain.items()}
        return {
            name: standardized(weight, mask_of(state.model, name)) for name, weight in plain.items()
        }


class Random(Criterion):
    """Score weights at random: the control every other criterion has to beat.

    The draw depends on the step's seed and the weight's name alone.

    >>> layer = nn.Linear(2, 1)
    >>> Random().scores(State(layer), {"weight": layer.weight})["weight"].shape
    torch.Size([1, 2])
    """

    def scores(self, state: State, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return uniform numbers from 0 to 1."""
        return {
            name: torch.rand(weight.shape, generator=state.generator("random", name)).to(
                weight.device
            )
            for name, weight in weights.items()
        }


class Taylor(Criterion):
    """Score a weight by the first-order change of the loss without it: ``E |g * w|``.

    The expectation runs over the gradients of mini-batches ("batch", as SNIP and most code do)
    or of single examples ("sample"); the absolute value is taken inside it. Gradients are those
    of the weight the network uses, in evaluation mode, on training examples that are drawn by
    the step's seed and not augmented (Molchanov et al. 2017).

    Attributes:
        batches: at most so many; one epoch if the split has fewer.
        batch: examples per batch.
        per: what one gradient is taken of, "batch" or "sample" (slower).

    >>> Taylor(batches=4)
    Taylor(batches=4)
    """

    batches: Count = 8
    batch: Count = 64
    per: Literal["batch", "sample"] = "batch"

    def check(self, task: Task | None) -> None:
        """Refuse to run without a task."""
        _required(task, self.name)

    def scores(self, state: State, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean of |g * w|."""
        task = _required(state.task, self.name)
        network, tensors = _probe(state.model, weights)
        batches = _drawn(state, task, self.batches, self.batch, self.name)
        pieces = batches if self.per == "batch" else _examples(batches)
        total = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        count = 0
        for loss_function in _losses(network, task, pieces):
            slopes = gradients(loss_function, list(tensors.values()))
            for (name, tensor), slope in zip(tensors.items(), slopes, strict=True):
                total[name] += first_order(slope, tensor.detach())
            count += 1
        return _finite({name: sum_ / count for name, sum_ in total.items()}, self.name)


class Hessian(Criterion):
    """Score a weight by Optimal Brain Damage, ``0.5 H_ii w^2`` (LeCun et al. 1990).

    H_ii is estimated by the empirical Fisher matrix, ``E g_i^2`` over single examples (one
    backward pass each; never negative), or by Hutchinson's ``E v * (H v)`` over vectors of random
    signs (the true Hessian's diagonal, but so noisy that a few vectors rank no better than
    chance, and negative where the loss curves down). Evaluation mode, training examples drawn
    by the step's seed and not augmented.

    Attributes:
        batches: at most so many; one epoch if the split has fewer.
        batch: examples per batch.
        estimator: "fisher" or "hutchinson".
        vectors: random vectors per batch, for "hutchinson"; one double backward pass each.

    >>> Hessian(batches=4, estimator="hutchinson")
    Hessian(batches=4, estimator='hutchinson')
    """

    batches: Count = 8
    batch: Count = 64
    estimator: Literal["fisher", "hutchinson"] = "fisher"
    vectors: Count = 32

    def check(self, task: Task | None) -> None:
        """Refuse to run without a task."""
        _required(task, self.name)

    def scores(self, state: State, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return 0.5 * H_ii * w^2 with the estimated diagonal."""
        task = _required(state.task, self.name)
        network, tensors = _probe(state.model, weights)
        batches = _drawn(state, task, self.batches, self.batch, self.name)
        wanted = list(tensors.values())
        if self.estimator == "fisher":
            diagonals = diagonal_fisher(_losses(network, task, _examples(batches)), wanted)
        else:
            losses, generator = _losses(network, task, batches), state.generator("hutchinson")
            diagonals = _mean_hutchinson(losses, wanted, self.vectors, generator)
        scores = {
            name: second_order(diagonal, tensors[name].detach())
            for name, diagonal in zip(tensors, diagonals, strict=True)
        }
        return _finite(scores, self.name)


def _mean_hutchinson(
    losses: Iterator[LossFunction],
    tensors: list[Tensor],
    vectors: int,
    generator: torch.Generator,
) -> tuple[Tensor, ...]:
    """Return the mean over the losses of each one's estimated diagonal."""
    total, count = [torch.zeros_like(tensor) for tensor in tensors], 0
    for loss_function in losses:
        found = diagonal_hutchinson(loss_function, tensors, samples=vectors, generator=generator)
        for sum_, diagonal in zip(total, found, strict=True):
            sum_ += diagonal
        count += 1
    return tuple(sum_ / count for sum_ in total)


def _probe(model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a plain copy of the network and its weights of these names.

    Baked, the weight the network uses is itself a parameter, shared where it is tied, so its
    gradient is one even where the latent weight behind a codebook gets none; and the network
    that is being compressed keeps its gradients, modes and caches.
    """
    network = copy.deepcopy(model)
    bake(network)
    network.requires_grad_(False).eval()
    tensors = {}
    for name in weights:
        module, attribute = owner(network, name)
        tensor = getattr(module, attribute)
        if not isinstance(tensor, nn.Parameter):
            raise ModelError(
                f"'{name}' carries a parametrization that is not laconic's; remove it before "
                "compressing"
            )
        tensors[name] = tensor.requires_grad_(True)
    return network, tensors


def _drawn(state: State, task: Task, count: int, size: int, label: str) -> Iterator[Batch]:
    batches = task.train.plain().batches(size, seed=state.seed, device=state.device)
    return progress(itertools.islice(batches, count), label, count)


def _losses(network: nn.Module, task: Task, batches: Iterator[Batch]) -> Iterator[LossFunction]:
    def of(batch: Batch) -> Callable[[], Tensor]:
        return lambda: task.loss(task.call(network, batch), batch)

    return (of(batch) for batch in batches)


def _examples(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield every example of the batches as a batch of its own."""
    for batch in batches:
        for index in range(_length(batch)):
            yield _rows(batch, slice(index, index + 1))


def _length(batch: Batch) -> int:
    lengths: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        lengths.append(len(tensor))
        return tensor

    map_tensors(note, batch.inputs)
    return lengths[0]


def _rows(batch: Batch, rows: slice) -> Batch:
    targets = None if batch.targets is None else batch.targets[rows]
    return Batch(map_tensors(lambda tensor: tensor[rows], batch.inputs), targets)


def _required(task: Task | None, name: str) -> Task:
    if task is None:
        raise TaskError(f"{name} needs gradients on batches, and there is no task; give task=")
    return task


def _finite(scores: dict[str, Tensor], criterion: str) -> dict[str, Tensor]:
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise ModelError(
                f"{criterion}: the derivative of the loss for '{name}' is not finite on the "
                "training batches; check the data and the model, or rank by magnitude"
            )
    return scores
