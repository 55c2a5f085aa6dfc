"""What objectives on pairs of features share: how they are read, projected and averaged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from laconic.errors import FeatureError
from laconic.recover.objectives import Taught

if TYPE_CHECKING:
    from laconic.models.capture import Features

__all__ = [
    "Named",
    "Paired",
    "named",
    "projection",
    "token_mean",
    "tokens",
]

# (feature of the student, feature of the teacher).
Named = tuple[tuple[str, str], ...]


def token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over what is not padding.

    Args:
        values: [batch, tokens], or [batch, tokens, tokens] of pairs.
        mask: bool of the same shape, True where nothing is padding; None: nowhere is any. One of
            another shape is not about these values.

    >>> token_mean(torch.tensor([[1.0, 5.0]]), torch.tensor([[True, False]]))
    tensor(1.)
    """
    if mask is None or mask.shape != values.shape:
        return values.mean()
    return values.where(mask, 0.0).sum() / mask.sum()


def projection(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Return a linear layer with torch's usual start, drawn from a generator.

    Args:
        inputs: width of what it takes.
        outputs: width of what it gives.
        generator: every initial value is drawn from it.

    >>> projection(4, 8, torch.Generator().manual_seed(0)).weight.shape
    torch.Size([8, 4])
    """
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    bound = inputs**-0.5
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer


def named(kind: str, pairs: Iterable[tuple[int, int]]) -> Named:
    """Return the pairs of a kind of feature."""
    return tuple((f"{kind}.{own}", f"{kind}.{other}") for own, other in pairs)


def tokens(features: Features, name: str) -> Tensor:
    """Return a feature with its channels last; the pixels of a map are its tokens."""
    feature = features[name]
    return feature.movedim(1, -1) if feature.dim() >= 4 else feature


class Paired(Taught, ABC):
    """An objective that adds up how far the features of its pairs are from each other.

    Attributes:
        weight: factor of this term.
        teacher: which of several teachers, from 0.
        advice: what to do where the features of a pair differ in shape.
    """

    advice: ClassVar[str]

    def read(self, features: Features, name: str) -> Tensor:
        """Return a feature as it is compared."""
        return tokens(features, name)

    @abstractmethod
    def difference(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Return how far the features of one pair are from each other, a scalar."""

    def combined(self, differences: Tensor) -> Tensor:
        """Return what the differences [pairs] come to: their sum."""
        return differences.sum()

    def compare(
        self,
        student: Features,
        teacher: Features,
        *,
        learned: nn.Module | None = None,
        progress: float = 0.0,
    ) -> Tensor:
        """Return what the differences of all pairs come to.

        Raises:
            FeatureError: the features of a pair differ in shape.
        """
        found = []
        for own, other in self.pairs(student.layers, teacher.layers):
            here, there = self.read(student, own), self.read(teacher, other)
            here = here if learned is None else learned(here)
            if here.shape != there.shape:
                raise FeatureError(
                    f"{self.name}: '{own}' of the student is {list(student[own].shape)}, "
                    f"'{other}' of the teacher {list(teacher[other].shape)}; {self.advice}"
                )
            found.append(self.difference(here, there, student.get("mask")))
        return self.combined(torch.stack(found))
