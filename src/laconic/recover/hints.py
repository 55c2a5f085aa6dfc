"""Objectives on any modules: hints with a regressor, and maps of spatial attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from laconic.errors import FeatureError
from laconic.recover.matching import hidden_difference
from laconic.recover.objectives import Taught
from laconic.recover.pairing import Named, Paired, projection, token_mean, tokens

if TYPE_CHECKING:
    from laconic.models.capture import Features

__all__ = ["AttentionTransfer", "Hint", "attention_map", "hint_l1", "map_distance"]

# The name of a feature: hidden.3, output:layer2, input:classifier.
Name = Annotated[str, Field(pattern=r"^[\w.:]+$")]


def attention_map(activation: Tensor, power: float = 2.0) -> Tensor:
    """Return where an activation is large: mean_c |x_c|^m (Zagoruyko and Komodakis 2017).

    Args:
        activation: x [batch, channels, height, width].
        power: m.

    >>> attention_map(torch.tensor([[[[3.0]], [[-1.0]]]]))
    tensor([[[[5.]]]])
    """
    return activation.abs().pow(power).mean(dim=1, keepdim=True)


def map_distance(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of (Q_S / ||Q_S|| - Q_T / ||Q_T||)^2 over examples and positions.

    As in the reference code, which multiplies it by 1000; beta / 2 times the squared norm of the
    paper is beta / 2 * height * width times this. A student's map of another size is brought to
    the teacher's by bilinear interpolation.

    Args:
        student: attention map Q_S [batch, 1, height, width].
        teacher: attention map Q_T [batch, 1, height, width].
        mask: not used: pixels are no padding.

    >>> map_distance(torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 3.0))
    tensor(0.)
    """
    if student.shape[-2:] != teacher.shape[-2:]:
        student = F.interpolate(student, teacher.shape[-2:], mode="bilinear", align_corners=False)
    own, target = (F.normalize(each.flatten(1), dim=1) for each in (student, teacher))
    return (own - target).square().mean()


def hint_l1(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of |a_S - a_T| over everything but padding.

    Args:
        student: a_S [batch, tokens, width].
        teacher: a_T [batch, tokens, width].
        mask: bool [batch, tokens]; see token_mean.

    >>> hint_l1(torch.zeros(1, 2, 2), torch.full((1, 2, 2), -3.0))
    tensor(3.)
    """
    return token_mean((student - teacher).abs().mean(dim=-1), mask)


DISTANCES = {"l1": hint_l1, "l2": hidden_difference}


class Hint(Paired):
    """Agree with the teacher's activation at a module (Romero et al. 2015, FitNets).

    The mean of (r(a_S) - a_T)^2, or of the absolute value, over examples, positions and channels.
    Where the channels differ, r is a learned 1x1 convolution (for vectors, a linear layer);
    where they do not, the identity. Maps have the same height and width.

    Attributes:
        at: the student's feature, such as ``output:layer2`` or ``hidden.3``.
        of: the teacher's feature; None: the same name.
        loss: "l2" squares differences, "l1" takes their absolute values.

    >>> Hint("output:layer2", of="output:layer3").pairs(0, 0)
    (('output:layer2', 'output:layer3'),)
    """

    positional: ClassVar[tuple[str, ...]] = ("at",)
    advice: ClassVar[str] = (
        "maps need the same height and width; choose modules of the same resolution"
    )

    at: Name
    of: Name | None = None
    loss: Literal["l1", "l2"] = "l2"

    def pairs(self, student: int, teacher: int) -> Named:
        """Return the one pair."""
        return ((self.at, self.of or self.at),)

    def build(
        self, student: Features, teachers: Sequence[Features], generator: torch.Generator
    ) -> nn.Module | None:
        """Return the regressor r where the channels differ."""
        ((at, of),) = self.pairs(0, 0)
        inputs = tokens(student, at).shape[-1]
        outputs = tokens(teachers[self.teacher], of).shape[-1]
        return None if inputs == outputs else projection(inputs, outputs, generator)

    def difference(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Return the distance."""
        return DISTANCES[self.loss](student, teacher, mask)


class AttentionTransfer(Taught):
    """Look where the teacher looks (Zagoruyko and Komodakis 2017, activation-based).

    The sum over the pairs of features of the mean over examples and positions of
    (Q_S / ||Q_S|| - Q_T / ||Q_T||)^2, Q = mean over channels of |x|^m. Usually the ends of the
    groups of one resolution.

    Attributes:
        weight: factor of this term; the reference code's is 1000.
        at: the student's features [batch, channels, height, width].
        of: the teacher's features; empty: the same names.
        power: m, at least 1: below, the slope at an activation of zero is infinite.

    >>> AttentionTransfer(("output:layer1", "output:layer2"), weight=1000.0).pairs(0, 0)
    (('output:layer1', 'output:layer1'), ('output:layer2', 'output:layer2'))
    """

    positional: ClassVar[tuple[str, ...]] = ("at",)

    at: Annotated[tuple[Name, ...], Field(min_length=1)]
    of: tuple[Name, ...] = ()
    power: Annotated[float, Field(ge=1)] = 2.0

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if self.of and len(self.of) != len(self.at):
            raise ValueError(f"'of' names {len(self.of)} features and 'at' {len(self.at)}")
        return self

    def pairs(self, student: int, teacher: int) -> Named:
        """Return the features, paired in order."""
        return tuple(zip(self.at, self.of or self.at, strict=True))

    def compare(
        self,
        student: Features,
        teacher: Features,
        *,
        learned: nn.Module | None = None,
        progress: float = 0.0,
    ) -> Tensor:
        """Return the sum over the pairs.

        Raises:
            FeatureError: a feature is no map of channels.
        """
        maps = [
            (self.mapped(student, own), self.mapped(teacher, other))
            for own, other in self.pairs(student.layers, teacher.layers)
        ]
        return torch.stack([map_distance(own, target) for own, target in maps]).sum()

    def mapped(self, features: Features, name: str) -> Tensor:
        """Return the attention map of a feature [batch, 1, height, width]."""
        feature = features[name]
        if feature.dim() != 4:
            raise FeatureError(
                f"attention_transfer: '{name}' is {list(feature.shape)}, not [batch, channels, "
                "height, width]; choose a convolution's output"
            )
        return attention_map(feature, self.power)
