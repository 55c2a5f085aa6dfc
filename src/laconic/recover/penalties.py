"""Penalties on weights: L1, L2, BatchNorm's scales in the loss; proximal L1 and L2,1."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from laconic.errors import ScopeError
from laconic.names import joined
from laconic.scope import Scope
from laconic.step import Share, Value
from laconic.weights.laid import weights_of

__all__ = [
    "L1",
    "L2",
    "Penalty",
    "Proximal",
    "ProximalChannels",
    "ProximalWeights",
    "Slimming",
    "absolute_sum",
    "shrink",
    "shrink_channels",
    "square_sum",
]


def absolute_sum(weights: Mapping[str, Tensor]) -> Tensor:
    """Return sum |w| over every weight; its gradient is sign(w), 0 at 0.

    Args:
        weights: dotted name -> weight [any shape].

    >>> absolute_sum({"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[3.0]])})
    tensor(6.)
    """
    return _total([weight.abs().sum() for weight in weights.values()])


def square_sum(weights: Mapping[str, Tensor]) -> Tensor:
    """Return sum w^2 over every weight; its gradient is 2w.

    Args:
        weights: dotted name -> weight [any shape].

    >>> square_sum({"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[3.0]])})
    tensor(14.)
    """
    return _total([weight.square().sum() for weight in weights.values()])


def _total(sums: list[Tensor]) -> Tensor:
    return torch.stack(sums).sum() if sums else torch.zeros(())


class Penalty(Value, ABC):
    """A term on the weights alone that training adds to the loss.

    Attributes:
        weight: factor of the term, from 0.
    """

    positional: ClassVar[tuple[str, ...]] = ("weight",)

    weight: Annotated[float, Field(ge=0)]

    def tensors(self, model: nn.Module, scope: Scope) -> dict[str, Tensor]:
        """Return what the term is of, by dotted name: the scope's matrices and kernels."""
        return weights_of(model, scope)

    @abstractmethod
    def __call__(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the term, a scalar.

        Args:
            weights: dotted name -> weight as the network uses it [any shape].
        """


class L1(Penalty):
    """Add ``weight * sum |w|`` to the loss, by its subgradient (Han et al. 2015).

    >>> L1(0.5)({"fc.weight": torch.tensor([1.0, -3.0])})
    tensor(2.)
    """

    def __call__(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return weight * sum |w|."""
        return self.weight * absolute_sum(weights)


class L2(Penalty):
    """Add ``weight * sum w^2`` to the loss (Han et al. 2015).

    >>> L2(0.5)({"fc.weight": torch.tensor([1.0, -3.0])})
    tensor(5.)
    """

    def __call__(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return weight * sum w^2."""
        return self.weight * square_sum(weights)


class Slimming(Penalty):
    """Add ``weight * sum |gamma|`` over BatchNorm's scales (Liu et al. 2017).

    Network slimming: channels whose scale training pushes to zero can then be pruned, ranked by
    ``BatchNormScale``. The paper's weight is 1e-4, or 1e-5 for VGG on larger images.

    >>> model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    >>> penalty = Slimming(0.5)
    >>> scales = penalty.tensors(model, Scope("*"))
    >>> list(scales), penalty(scales).item()
    (['1.weight'], 1.0)
    """

    def tensors(self, model: nn.Module, scope: Scope) -> dict[str, Tensor]:
        """Return the scales of the BatchNorms of a scope.

        Raises:
            ScopeError: there is none.
        """
        found: dict[str, Tensor] = {
            joined(path, "weight"): module.weight
            for path, module in scope.select(model).items()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine
        }
        if not found:
            raise ScopeError(f"{self.name}: '{scope}' selects no BatchNorm with scales; widen it")
        return found

    def __call__(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return weight * sum |gamma|."""
        return self.weight * absolute_sum(weights)


def shrink(weight: Tensor, threshold: float) -> Tensor:
    """Return ``argmin_U 1/2 ||U - W||^2 + t sum |U|``: ``sign(W) max(|W| - t, 0)``.

    Args:
        weight: W [any shape].
        threshold: t, from 0.

    >>> [round(number, 4) for number in shrink(torch.tensor([-1.0, 0.2, 0.7]), 0.5).tolist()]
    [-0.5, 0.0, 0.2]
    """
    return weight.sign() * (weight.abs() - threshold).clamp(min=0) + 0.0


def shrink_channels(weight: Tensor, threshold: float) -> Tensor:
    """Return ``argmin_U 1/2 ||U - W||^2 + t sum_i ||U_i||``: ``max(1 - t / ||W_i||, 0) W_i``.

    Args:
        weight: W [outputs, channels, ...]; W_i are the weights of input channel i.
        threshold: t, from 0.

    >>> [round(w, 4) for w in shrink_channels(torch.tensor([[3.0], [4.0]]), 1.0).flatten().tolist()]
    [2.4, 3.2]
    """
    norms = channel_norms(weight).clamp(min=torch.finfo(weight.dtype).tiny)
    # 1 - t / ||W_i||; so it is exactly 0 where the two are equal.
    factors = ((norms - threshold) / norms).clamp(min=0)
    return weight * along_channels(factors, weight) + 0.0


def channel_norms(weight: Tensor) -> Tensor:
    """Return ||W_i|| of every input channel [channels] of a weight [outputs, channels, ...]."""
    return weight.transpose(0, 1).flatten(1).norm(dim=1)


def along_channels(values: Tensor, weight: Tensor) -> Tensor:
    """Return one value per input channel, shaped so that it broadcasts to a weight."""
    return values.reshape(1, -1, *(1 for _ in weight.shape[2:]))


class Proximal(Value, ABC):
    """Remove elements of one layer while it learns: proximal steps.

    One follows every gradient step. The paper's form shrinks all elements by a threshold that grows
    until few enough are left (``soft``). Its reference code keeps the largest, fewer and fewer of
    them, and shrinks nothing (``topk``; Bai et al. 2020). What is gone stays gone.

    Attributes:
        keep: fraction of the elements left, (0, 1].
        mode: "topk": as many as a straight line from all to the goal says are left;
            "soft": all are shrunk by a threshold that grows until the goal is met.
        end: share of the updates after which no more than the goal are left.
    """

    positional: ClassVar[tuple[str, ...]] = ("keep",)

    keep: Share
    mode: Literal["topk", "soft"] = "topk"
    end: Share = 1 / 3

    @abstractmethod
    def sizes(self, weight: Tensor) -> Tensor:
        """Return the size of every element [elements]."""

    @abstractmethod
    def shrunk(self, weight: Tensor, threshold: float) -> Tensor:
        """Return a weight after the proximal operator [its shape]."""

    @abstractmethod
    def spread(self, kept: Tensor, weight: Tensor) -> Tensor:
        """Return which weights are left, bool [shape of the weight], from elements [elements]."""

    def goal(self, total: int) -> int:
        """Return how many of the elements are left in the end, at least one."""
        return max(1, round(self.keep * total))

    def due(self, total: int, step: int, updates: int) -> int:
        """Return how many elements may be left after a step, counted from 0.

        >>> [ProximalWeights(0.25, end=0.5).due(8, step, 8) for step in range(6)]
        [8, 6, 5, 3, 2, 2]
        """
        horizon, goal = self.end * updates, self.goal(total)
        left = max(horizon - step, 0.0) / horizon
        return goal + int((total - goal) * left)


class ProximalWeights(Proximal):
    """Single weights of a layer: ``t sum |w|`` (Bai et al. 2020, unstructured).

    >>> ProximalWeights(0.1)
    ProximalWeights(0.1)
    """

    def sizes(self, weight: Tensor) -> Tensor:
        """Return |w| [weights]."""
        return weight.abs().flatten()

    def shrunk(self, weight: Tensor, threshold: float) -> Tensor:
        """Return sign(w) max(|w| - t, 0)."""
        return shrink(weight, threshold)

    def spread(self, kept: Tensor, weight: Tensor) -> Tensor:
        """Return the elements in the shape of the weight."""
        return kept.reshape(weight.shape)


class ProximalChannels(Proximal):
    """Input channels of a layer: ``t sum_i ||W_i||`` (Bai et al. 2020, structured).

    >>> ProximalChannels(0.5, mode="soft")
    ProximalChannels(0.5, mode='soft')
    """

    def sizes(self, weight: Tensor) -> Tensor:
        """Return ||W_i|| [channels]."""
        return channel_norms(weight)

    def shrunk(self, weight: Tensor, threshold: float) -> Tensor:
        """Return max(1 - t / ||W_i||, 0) W_i."""
        return shrink_channels(weight, threshold)

    def spread(self, kept: Tensor, weight: Tensor) -> Tensor:
        """Return the channels repeated over a weight [outputs, channels, ...]."""
        return along_channels(kept, weight).expand(weight.shape)
