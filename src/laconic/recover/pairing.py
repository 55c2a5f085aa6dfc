"""What objectives on pairs of features share: how they are read, projected and averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from laconic.errors import FeatureError

if TYPE_CHECKING:
    from laconic.models.capture import Features
    from laconic.recover.objectives import Taught

__all__ = [
    "Named",
    "differences",
    "first_token",
    "named",
    "plain",
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


def plain(features: Features, name: str) -> Tensor:
    """Return a feature as it is."""
    return features[name]


def tokens(features: Features, name: str) -> Tensor:
    """Return a feature with its channels last; the pixels of a map are its tokens."""
    feature = features[name]
    return feature.movedim(1, -1) if feature.dim() == 4 else feature


def first_token(features: Features, name: str) -> Tensor:
    """Return the feature of the first token, [CLS], as [batch, width]."""
    feature = features[name]
    if feature.dim() != 3:
        raise FeatureError(f"'{name}' is {list(feature.shape)}, so there is no first token")
    return feature[:, 0]


def differences(
    objective: Taught,
    student: Features,
    teacher: Features,
    *,
    read: Callable[[Features, str], Tensor],
    difference: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    advice: str,
    learned: nn.Module | None = None,
) -> Tensor:
    """Return the difference of each pair [pairs]."""
    losses = []
    for own, other in objective.pairs(student.layers, teacher.layers):
        here, there = read(student, own), read(teacher, other)
        here = here if learned is None else learned(here)
        if here.shape != there.shape:
            raise FeatureError(
                f"{objective.name}: '{own}' of the student is {list(student[own].shape)}, "
                f"'{other}' of the teacher {list(teacher[other].shape)}; {advice}"
            )
        losses.append(difference(here, there, student.get("mask")))
    return torch.stack(losses)
