"""Penalties on weights, added to the loss while training: L1, L2 and BatchNorm's scales."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from laconic.errors import ScopeError
from laconic.names import joined
from laconic.scope import Scope
from laconic.step import Value
from laconic.weights.laid import weights_of

__all__ = ["L1", "L2", "Penalty", "Slimming", "absolute_sum", "square_sum"]


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
