"""Criteria: how much a weight, or an element of an axis, matters; larger scores are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from laconic.curvature import LossFunction, diagonal_fisher, diagonal_hutchinson
from laconic.errors import RecipeError
from laconic.step import Count, State, Step, Value, members
from laconic.structure.elements import Matrices, gather, matrices
from laconic.tasks.task import labelled, needed
from laconic.weights.laid import mask_of, owner
from laconic.weights.slopes import (
    Per,
    drawn,
    examples,
    finite,
    losses,
    mean,
    probe,
    products,
)

if TYPE_CHECKING:
    from laconic.structure.axes import Axis, Use
    from laconic.tasks import Task

__all__ = [
    "PRUNABLE",
    "Criterion",
    "Hessian",
    "Magnitude",
    "Random",
    "Taylor",
    "combined",
    "first_order_means",
    "grouped",
    "second_order",
    "standardized",
    "used",
]

Combine = Literal["sum", "absolute", "square"]
Key = TypeVar("Key", bound=Hashable)

# What a prune step may remove.
PRUNABLE = ("weights", "channels", "heads", "neurons", "hidden")

# Survivors that are all equal have no spread; then no q * std prunes any of them, so their
# scores are huge, yet finite in float32.
_LEAST_SPREAD = 1e-30


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


def combined(products: Tensor, combine: Combine) -> Tensor:
    """Return the first-order score of each group from the g * w of its weights.

    - ``sum``: ``|sum g w|``, the change of the loss when the whole group becomes zero; over
      the weights that read an element it is the gradient of a gate on that element,
    - ``absolute``: ``sum |g w|``,
    - ``square``: ``sum (g w)^2`` (Molchanov et al. 2019, eq. 8).

    Args:
        products: g * w [groups, weights].
        combine: one of the three.

    >>> group = torch.tensor([[1.0, -3.0]])
    >>> combined(group, "sum"), combined(group, "absolute"), combined(group, "square")
    (tensor([2.]), tensor([4.]), tensor([10.]))
    """
    if combine == "sum":
        return products.sum(dim=1).abs()
    return (products.abs() if combine == "absolute" else products.square()).sum(dim=1)


class Criterion(Value, ABC):
    """How weights, or elements of axes, are ranked: a score for each, larger = keep.

    A pruned weight is zero and scores zero (but random scores do not look at it), so only
    survivors should be compared.

    Attributes:
        ranks: what it can rank, of "weights", "channels", "heads", "neurons" and "hidden".
        needs_data: whether it scores on batches of the task.
        needs_targets: whether it reads their targets, for the loss.
    """

    ranks: ClassVar[tuple[str, ...]] = PRUNABLE
    needs_data: ClassVar[bool] = False
    needs_targets: ClassVar[bool] = False

    def check(self, task: Task | None, axes: str = "weights") -> None:
        """Refuse, before any work, what this criterion cannot rank, or a task that cannot serve.

        Args:
            task: the data.
            axes: what shall be ranked.

        Raises:
            RecipeError: it cannot rank these; the criteria that can are named.
            TaskError: the criterion needs batches of data and there is no task, or their targets
                and there are none.
        """
        if axes not in self.ranks:
            raise self.misfit(axes)
        if self.needs_data:
            needed(task, f"{self.name} needs batches")
        if self.needs_targets:
            labelled(task, f"{self.name} reads targets", "a criterion without, such as magnitude")

    def misfit(self, axes: str) -> RecipeError:
        """Return the error that says what this criterion ranks, and what ranks these."""
        kinds: dict[str, type[Criterion]] = members(Criterion, every=True)
        able = ", ".join(name for name, kind in kinds.items() if axes in kind.ranks)
        return RecipeError(
            f"{self.name} ranks {', '.join(self.ranks)}, not {axes}; choose one of: {able}"
        )

    def check_weights(
        self, model: nn.Module, names: Iterable[str], earlier: Sequence[Step] = ()
    ) -> None:
        """Refuse weights that this criterion cannot rank.

        Args:
            model: the network.
            names: of the weights.
            earlier: the steps that will have run before.

        Raises:
            LaconicError: names one of them.
        """

    def check_axes(self, model: nn.Module, axes: Sequence[Axis]) -> None:
        """Refuse axes that this criterion cannot rank.

        Raises:
            AxisError: names one of them.
        """

    @abstractmethod
    def scores(self, state: State, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return one score per weight, in the weight's shape.

        The model, its gradients and its modes are left as they were.

        Args:
            state: the model, and the task and generator where a criterion needs them.
            weights: dotted name -> weight as the network uses it (``weights_of``).
        """

    def axis_scores(self, state: State, axes: Sequence[Axis]) -> dict[Axis, Tensor]:
        """Return one score per element of each axis, [size].

        The model, its gradients and its modes are left as they were.

        Args:
            state: the model, and the task and generator where a criterion needs them.
            axes: of ``find_axes``, of a kind that this criterion ranks.
        """
        raise self.misfit(f"{axes[0].kind}s" if axes else "axes")

    def compensate_(
        self, state: State, before: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> None:
        """Change what survived so that it makes up for what was pruned; most do nothing.

        Args:
            state: the model, pruned by now.
            before: name -> weight as the network used it.
            masks: name -> bool [its shape], what is left.
        """


class Magnitude(Criterion):
    """Score by absolute value (Han et al. 2015; Li et al. 2017 for channels).

    An element of an axis scores the norm of its weights: those that compute it (a filter, for
    a channel), or those that read it.

    Attributes:
        normalize: "none": |w|; "std": |w| / standard deviation of the layer's survivors, so
            that a global ranking cuts every layer at Han's threshold q * std; "size", of an
            axis: the norm / square root of how many weights an element has.
        norm: 1 or 2, of an element's weights.
        uses: which of an element's weights count.

    >>> layer = nn.Linear(2, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
    >>> Magnitude().scores(State(layer), {"weight": layer.weight})["weight"]
    tensor([[3., 4.]])
    """

    positional: ClassVar[tuple[str, ...]] = ("normalize",)

    normalize: Literal["none", "std", "size"] = "none"
    norm: Literal[1, 2] = 1
    uses: Matrices = "produced"

    def check_axes(self, model: nn.Module, axes: Sequence[Axis]) -> None:
        """Refuse axes without the matrices that count."""
        _of(model, axes, self.uses)

    def scores(self, state: State, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return |w|, in units of the layer's standard deviation if asked."""
        plain = {name: weight.detach().float() for name, weight in weights.items()}
        if self.normalize != "std":
            return {name: weight.abs() for name, weight in plain.items()}
        return {
            name: standardized(weight, mask_of(state.model, name)) for name, weight in plain.items()
        }

    def axis_scores(self, state: State, axes: Sequence[Axis]) -> dict[Axis, Tensor]:
        """Return the norm of each element's weights."""
        groups = _of(state.model, axes, self.uses)
        found = grouped(self.scores(state, used(state.model, groups)), groups)
        norms = {axis: weights.norm(self.norm, dim=1) for axis, weights in found.items()}
        if self.normalize != "size":
            return norms
        return {axis: norm / found[axis].shape[1] ** 0.5 for axis, norm in norms.items()}


class Random(Criterion):
    """Score at random: the control every other criterion has to beat.

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

    def axis_scores(self, state: State, axes: Sequence[Axis]) -> dict[Axis, Tensor]:
        """Return uniform numbers from 0 to 1."""
        return {
            axis: torch.rand(axis.size, generator=state.generator("random", *_place(axis)))
            for axis in axes
        }


class Taylor(Criterion):
    """Score by the first-order change of the loss: ``E |g * w|``.

    The expectation runs over the gradients of mini-batches ("batch", as SNIP and most code do)
    or of single examples ("sample"); the absolute value is taken inside it. Gradients are those
    of the weight the network uses, in evaluation mode, on training examples that are drawn by
    the step's seed and not augmented. An element of an axis scores, by default, the gradient
    of a gate on it (Molchanov et al. 2017, eq. 8).

    Attributes:
        batches: at most so many; one epoch if the split has fewer.
        batch: examples per batch.
        per: what one gradient is taken of, "batch" or "sample" (slower).
        combine: how the g * w of an element's weights make one score; see ``combined``.
        uses: which of an element's weights count.

    >>> Taylor(batches=4)
    Taylor(batches=4)
    """

    needs_data: ClassVar[bool] = True
    needs_targets: ClassVar[bool] = True

    batches: Count = 8
    batch: Count = 64
    per: Per = "batch"
    combine: Combine = "sum"
    uses: Matrices = "consumed"

    def check_axes(self, model: nn.Module, axes: Sequence[Axis]) -> None:
        """Refuse axes without the matrices that count."""
        _of(model, axes, self.uses)

    def scores(self, state: State, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean of |g * w|."""
        pieces = products(
            state, weights, batches=self.batches, batch=self.batch, per=self.per, label=self.name
        )
        found = mean(pieces, torch.abs)
        finite(found, self.name)
        return found

    def axis_scores(self, state: State, axes: Sequence[Axis]) -> dict[Axis, Tensor]:
        """Return the mean of what the g * w of each element come to."""
        return first_order_means(
            state,
            _of(state.model, axes, self.uses),
            combine=self.combine,
            batches=self.batches,
            batch=self.batch,
            per=self.per,
            label=self.name,
        )


class Hessian(Criterion):
    """Score by Optimal Brain Damage, ``0.5 H_ii w^2`` (LeCun et al. 1990).

    H_ii is estimated by the empirical Fisher matrix, ``E g_i^2`` over single examples (one
    backward pass each; never negative), or by Hutchinson's ``E v * (H v)`` over vectors of random
    signs (the true Hessian's diagonal, but so noisy that a few vectors rank no better than
    chance, and negative where the loss curves down). Evaluation mode, training examples drawn
    by the step's seed and not augmented. An element of an axis scores the sum over its weights.

    Attributes:
        batches: at most so many; one epoch if the split has fewer.
        batch: examples per batch.
        estimator: "fisher" or "hutchinson".
        vectors: random vectors per batch, for "hutchinson"; one double backward pass each.
        uses: which of an element's weights count.

    >>> Hessian(batches=4, estimator="hutchinson")
    Hessian(batches=4, estimator='hutchinson')
    """

    needs_data: ClassVar[bool] = True
    needs_targets: ClassVar[bool] = True

    batches: Count = 8
    batch: Count = 64
    estimator: Literal["fisher", "hutchinson"] = "fisher"
    vectors: Count = 32
    uses: Matrices = "produced"

    def check_axes(self, model: nn.Module, axes: Sequence[Axis]) -> None:
        """Refuse axes without the matrices that count."""
        _of(model, axes, self.uses)

    def scores(self, state: State, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return 0.5 * H_ii * w^2 with the estimated diagonal."""
        task = needed(state.task, f"{self.name} needs batches")
        network, tensors = probe(state.model, weights)
        batches = drawn(state, task, self.batches, self.batch, self.name)
        wanted = list(tensors.values())
        if self.estimator == "fisher":
            diagonals = diagonal_fisher(losses(network, task, examples(batches)), wanted)
        else:
            generator = state.generator("hutchinson")
            diagonals = _mean_hutchinson(
                losses(network, task, batches), wanted, self.vectors, generator
            )
        scores = {
            name: second_order(diagonal, tensors[name].detach())
            for name, diagonal in zip(tensors, diagonals, strict=True)
        }
        finite(scores, self.name)
        return scores

    def axis_scores(self, state: State, axes: Sequence[Axis]) -> dict[Axis, Tensor]:
        """Return the sum of 0.5 * H_ii * w^2 over each element's weights."""
        groups = _of(state.model, axes, self.uses)
        found = grouped(self.scores(state, used(state.model, groups)), groups)
        return {axis: scores.sum(dim=1) for axis, scores in found.items()}


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


def first_order_means(
    state: State,
    groups: Mapping[Key, Sequence[Use]],
    *,
    combine: Combine = "sum",
    batches: int,
    batch: int,
    per: Per,
    label: str,
) -> dict[Key, Tensor]:
    """Return the mean, over batches or examples, of each element's first-order score [size].

    Args:
        state: the model, left as it is, and the task.
        groups: key -> the uses whose weights count as one element's.
        combine: how the g * w of an element make one score; see ``combined``.
        batches: at most so many; one epoch if the split has fewer.
        batch: examples per batch.
        per: what one gradient is taken of.
        label: who asks.

    Raises:
        TaskError: there is no task.
        ModelError: a gradient is not finite.
    """
    names = used(state.model, groups)
    pieces = products(state, names, batches=batches, batch=batch, per=per, label=label)
    found = mean((grouped(p, groups) for p in pieces), lambda p: combined(p, combine))
    finite({groups[key][0].name: score for key, score in found.items()}, label)
    return found


def _of(model: nn.Module, axes: Sequence[Axis], which: Matrices) -> dict[Axis, tuple[Use, ...]]:
    return {axis: matrices(model, axis, which) for axis in axes}


def used(model: nn.Module, groups: Mapping[Key, Sequence[Use]]) -> dict[str, Tensor]:
    """Return the tensors of groups of uses by name, as the network uses them."""
    names = dict.fromkeys(use.name for uses in groups.values() for use in uses)
    return {name: getattr(*owner(model, name)) for name in names}


def grouped(
    tensors: Mapping[str, Tensor], groups: Mapping[Key, Sequence[Use]]
) -> dict[Key, Tensor]:
    """Return the numbers of each element of each group, [size, numbers]."""
    return {key: gather(uses, tensors) for key, uses in groups.items()}


def _place(axis: Axis) -> tuple[str, int, int]:
    """Return what tells an axis from all others, whatever its size."""
    first = axis.uses[0]
    return first.name, first.dim, first.position
