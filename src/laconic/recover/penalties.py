"""Penalties on weights, added to the loss while training: L1 and L2."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from laconic.step import Value

__all__ = ["L1", "L2", "Penalty", "absolute_sum", "square_sum"]


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
