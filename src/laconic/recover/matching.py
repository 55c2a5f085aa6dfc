"""Objectives on the layers of Transformers: hidden states, attention scores and relations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.errors import FeatureError
from laconic.models.capture import attention_scores
from laconic.recover.distill import divergence
from laconic.recover.mapping import Final, LayerMap, Uniform
from laconic.recover.pairing import (
    Named,
    Paired,
    named,
    projection,
    token_mean,
    tokens,
)

if TYPE_CHECKING:
    from laconic.models.capture import Features

__all__ = [
    "Attention",
    "Hidden",
    "HiddenCosine",
    "Patience",
    "Relations",
    "attention_difference",
    "attention_divergence",
    "cosine_distance",
    "hidden_difference",
    "patience",
]

# Added to the scores of padded keys before a softmax: exp() of it is 0, sums of it are finite.
NEVER = -1e9
HEADS = "both need as many heads and the same tokens"
WIDTH = "both need the same width; 'hidden' projects"


def _squares(student: Tensor, teacher: Tensor) -> Tensor:
    # One pass over the numbers forwards and one backwards, in the place of two and three.
    return F.mse_loss(student, teacher, reduction="none")


def hidden_difference(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of (H_S - H_T)^2 over real tokens and width (Jiao et al. 2020, eq. 8).

    The reference code also averages over padding.

    Args:
        student: H_S [batch, tokens, width].
        teacher: H_T [batch, tokens, width].
        mask: bool [batch, tokens]; see token_mean.

    >>> hidden_difference(torch.zeros(1, 2, 4), torch.full((1, 2, 4), 3.0))
    tensor(9.)
    """
    return token_mean(_squares(student, teacher).mean(dim=-1), mask)


def attention_difference(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of (A_S - A_T)^2 over heads and real pairs (Jiao et al. 2020, eq. 7).

    The reference code sets the scores of padded keys to 0 and averages over them too, so its
    value shrinks with padding; this one does not depend on it.

    Args:
        student: scores before softmax A_S [batch, heads, tokens, tokens].
        teacher: scores before softmax A_T [batch, heads, tokens, tokens].
        mask: bool [batch, tokens]; see token_mean.

    >>> attention_difference(torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3))
    tensor(1.)
    """
    values = _squares(student, teacher).mean(dim=1)
    return token_mean(values, None if mask is None else mask[:, :, None] & mask[:, None, :])


def attention_divergence(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return KL(softmax A_T || softmax A_S), averaged over heads and real queries.

    Wang et al. 2020 (MiniLM), equations 5 and 8; padded keys take no part.

    Args:
        student: scores A_S [batch, heads, tokens, tokens].
        teacher: scores A_T [batch, heads, tokens, tokens].
        mask: bool [batch, tokens]; see token_mean.

    >>> attention_divergence(torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3))
    tensor(0.)
    """
    if mask is not None:
        padded = ~mask[:, None, None, :]
        student, teacher = (each.masked_fill(padded, NEVER) for each in (student, teacher))
    rows = divergence(student, teacher).sum(dim=-1)
    return token_mean(rows.mean(dim=1), mask)


def patience(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of (h_S / ||h_S|| - h_T / ||h_T||)^2 (Sun et al. 2019, equation 7).

    The paper sums over the width, the code averages; so does this.

    Args:
        student: h_S [batch, width].
        teacher: h_T [batch, width].
        mask: not used: a first token is no padding.

    >>> patience(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.6, 0.8]])) < 1e-12
    tensor(True)
    """
    return (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().mean()


def cosine_distance(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of 1 - cos(h_S, h_T) over real tokens (Sanh et al. 2019).

    Args:
        student: h_S [batch, tokens, width].
        teacher: h_T [batch, tokens, width].
        mask: bool [batch, tokens]; see token_mean.

    >>> cosine_distance(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]]))
    tensor(1.)
    """
    return token_mean(1 - F.cosine_similarity(student, teacher, dim=-1), mask)


class Hidden(Paired):
    """Agree with hidden states and embeddings (Jiao et al. 2020, TinyBERT).

    The sum over pairs (m, g(m)) of the map, and (0, 0) for the embeddings, of the mean of
    (H_S^m W - H_T^g(m))^2 over real tokens and width. Where the widths differ, W is one learned
    linear layer with bias, shared by all pairs as in the reference code; where they do not, it
    is the identity. The pixels of a convolution's maps are taken for tokens.

    Attributes:
        map: which layer learns from which.
        embeddings: whether the input of the first block learns too.

    >>> Hidden(Uniform()).pairs(2, 12)
    (('hidden.0', 'hidden.0'), ('hidden.1', 'hidden.6'), ('hidden.2', 'hidden.12'))
    """

    positional: ClassVar[tuple[str, ...]] = ("map",)
    advice: ClassVar[str] = "both must see the same tokens"

    map: LayerMap = Uniform()
    embeddings: bool = True

    def pairs(self, student: int, teacher: int) -> Named:
        """Return the hidden states that the map pairs."""
        first = ((0, 0),) if self.embeddings else ()
        return named("hidden", (*first, *self.map.pairs(student, teacher)))

    def build(
        self, student: Features, teachers: Sequence[Features], generator: torch.Generator
    ) -> nn.Module | None:
        """Return the projection W where the widths differ.

        Raises:
            FeatureError: the layers have several widths, so that no single one fits.
        """
        teacher = teachers[self.teacher]
        pairs = self.pairs(student.layers, teacher.layers)
        widths = {
            (tokens(student, own).shape[-1], tokens(teacher, other).shape[-1])
            for own, other in pairs
        }
        if all(own == other for own, other in widths):
            return None
        if len(widths) > 1:
            raise FeatureError(
                f"hidden: the pairs have widths {sorted(widths)}, and one projection is shared by "
                "all; write a hint for each layer"
            )
        return projection(*widths.pop(), generator)

    def difference(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Return the mean squared difference."""
        return hidden_difference(student, teacher, mask)


class Attention(Paired):
    """Agree with attention scores before softmax (Jiao et al. 2020, TinyBERT).

    The sum over pairs (m, g(m)) of the map of the mean of (A_S^m - A_T^g(m))^2 over heads and real
    pairs of tokens, A = Q K^T / sqrt(head size). Both networks need as many heads.

    Attributes:
        map: which layer learns from which.

    >>> Attention().pairs(2, 12)
    (('attention.1', 'attention.6'), ('attention.2', 'attention.12'))
    """

    positional: ClassVar[tuple[str, ...]] = ("map",)
    advice: ClassVar[str] = HEADS

    map: LayerMap = Uniform()

    def pairs(self, student: int, teacher: int) -> Named:
        """Return the scores that the map pairs."""
        return named("attention", self.map.pairs(student, teacher))

    def read(self, features: Features, name: str) -> Tensor:
        """Return the scores as they are."""
        return features[name]

    def difference(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Return the mean squared difference."""
        return attention_difference(student, teacher, mask)


class Relations(Paired):
    """Agree with attention and relations of values (Wang et al. 2020, MiniLM).

    For each pair of the map KL(softmax A_T || softmax A_S), plus the same with V V^T /
    sqrt(head size) in place of A; both averaged over heads and real tokens. Any widths, as
    many heads.

    Attributes:
        map: which layer learns from which; the paper's is the last from the last.

    >>> Relations().pairs(6, 12)
    (('attention.6', 'attention.12'), ('value.6', 'value.12'))
    """

    positional: ClassVar[tuple[str, ...]] = ("map",)
    advice: ClassVar[str] = HEADS

    map: LayerMap = Final()

    def pairs(self, student: int, teacher: int) -> Named:
        """Return the scores and the values that the map pairs."""
        layers = self.map.pairs(student, teacher)
        return (*named("attention", layers), *named("value", layers))

    def read(self, features: Features, name: str) -> Tensor:
        """Return scores as they are, and values as their scaled products with one another."""
        feature = features[name]
        if name.startswith("attention"):
            return feature
        return attention_scores(feature, feature, feature.shape[-1] ** -0.5)

    def difference(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Return the divergence of the distributions."""
        return attention_divergence(student, teacher, mask)


class Patience(Paired):
    """Agree with the direction of the first token's states (Sun et al. 2019, PKD).

    The mean over pairs, examples and width of (h_S / ||h_S|| - h_T / ||h_T||)^2, h the hidden
    state of the token [CLS]. The student's last layer is left out: the logits speak for it. The
    networks have the same width.

    Attributes:
        weight: factor of this term; the paper's code has 10 to 1000.
        map: which layer learns from which.

    >>> Patience().pairs(6, 12)[-1]
    ('hidden.5', 'hidden.10')
    """

    positional: ClassVar[tuple[str, ...]] = ("map",)
    advice: ClassVar[str] = WIDTH

    map: LayerMap = Uniform()

    def pairs(self, student: int, teacher: int) -> Named:
        """Return the hidden states that the map pairs, but for the student's last layer.

        Raises:
            FeatureError: the student has a single layer.
        """
        layers = [pair for pair in self.map.pairs(student, teacher) if pair[0] < student]
        if not layers:
            raise FeatureError(
                f"patience: without the last of {student} layers nothing is left to learn; use "
                "hidden instead"
            )
        return named("hidden", layers)

    def read(self, features: Features, name: str) -> Tensor:
        """Return the state of the first token, [CLS], as [batch, width]."""
        feature = features[name]
        if feature.dim() != 3:
            raise FeatureError(f"'{name}' is {list(feature.shape)}, so there is no first token")
        return feature[:, 0]

    def difference(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Return the mean squared difference of the directions."""
        return patience(student, teacher, mask)

    def combined(self, differences: Tensor) -> Tensor:
        """Return the mean over the pairs."""
        return differences.mean()


class HiddenCosine(Paired):
    """Agree with the direction of hidden states (Sanh et al. 2019, DistilBERT).

    The mean over real tokens of 1 - cos(h_S, h_T), summed over the pairs of the map.

    Attributes:
        map: which layer learns from which; the paper's is the last from the last.

    >>> HiddenCosine().pairs(6, 12)
    (('hidden.6', 'hidden.12'),)
    """

    positional: ClassVar[tuple[str, ...]] = ("map",)
    advice: ClassVar[str] = WIDTH

    map: LayerMap = Final()

    def pairs(self, student: int, teacher: int) -> Named:
        """Return the hidden states that the map pairs."""
        return named("hidden", self.map.pairs(student, teacher))

    def difference(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Return the mean of 1 - cos."""
        return cosine_distance(student, teacher, mask)
