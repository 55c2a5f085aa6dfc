"""Attention: torch's, with a layer each for queries, keys, values and outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.errors import ModelError
from laconic.models.layers import describe, layer
from laconic.models.rounding import attend, rounds_operands

__all__ = ["PROJECTIONS", "UnpackedAttention", "hand_on_padded_"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class UnpackedAttention(nn.Module):
    """What ``nn.MultiheadAttention`` computes, by layers that can be changed one by one.

    ``y = W_o concat_h(softmax(Q_h K_h^T / sqrt(d)) V_h)`` with ``Q = W_q query`` and so on (Vaswani
    et al. 2017, section 3.2.2). torch keeps the three first matrices as one tensor that no layer
    owns, so that neither heads nor inputs of layers are there to be pruned or rounded. It is
    called as torch's is. There are as many heads as ``q_proj`` has room for.

    Args:
        q_proj: description of a layer (see models.layers) into heads * head_dim features.
        k_proj: the same for keys.
        v_proj: the same for values.
        out_proj: description of the layer out of them.
        head_dim: features of a head.
        scale: what scores are multiplied by, whatever becomes of head_dim; None: 1 / sqrt(d).
        dropout: chance of a probability to be dropped, in training.
        batch_first: whether sequences are [batch, tokens, features], not [tokens, batch, features].

    Raises:
        ModelError: a description is not one, or a number is out of bounds.

    >>> linear = {"Linear": {"in_features": 6, "out_features": 6}}
    >>> attention = UnpackedAttention(linear, linear, linear, linear, head_dim=3, batch_first=True)
    >>> x = torch.zeros(2, 5, 6)
    >>> output, chances = attention(x, x, x)
    >>> output.shape, chances.shape
    (torch.Size([2, 5, 6]), torch.Size([2, 5, 5]))
    """

    # What torch's encoder layers ask their attention for, to know what they may compute fused.
    in_proj_weight = None
    in_proj_bias = None

    def __init__(
        self,
        q_proj: Mapping[str, Any],
        k_proj: Mapping[str, Any],
        v_proj: Mapping[str, Any],
        out_proj: Mapping[str, Any],
        *,
        head_dim: int,
        scale: float | None = None,
        dropout: float = 0.0,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        if type(head_dim) is not int or head_dim < 1 or not 0 <= dropout <= 1:
            raise ModelError(
                f"UnpackedAttention: head_dim {head_dim!r} must be a positive whole number, and "
                f"dropout {dropout!r} from 0 to 1"
            )
        self.q_proj, self.k_proj, self.v_proj = layer(q_proj), layer(k_proj), layer(v_proj)
        self.out_proj = layer(out_proj)
        self.head_dim, self.dropout, self.batch_first = head_dim, dropout, batch_first
        self.scale = head_dim**-0.5 if scale is None else scale

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments, with the layers as they are now."""
        return {
            **{name: describe(self.get_submodule(name)) for name in PROJECTIONS},
            "head_dim": self.head_dim,
            "scale": self.scale,
            "dropout": self.dropout,
            "batch_first": self.batch_first,
        }

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, and the probabilities where they are asked for.

        Args:
            query: [batch, L, features], [L, batch, features] or, without a batch, [L, features].
            key: the same with S for L.
            value: as key.
            key_padding_mask: [batch, S] or [S]; True, or minus infinity, where nothing is read.
            need_weights: whether the probabilities are returned.
            attn_mask: [L, S] or [batch * heads, L, S]; the same for single scores.
            average_attn_weights: whether they are averaged over heads.
            is_causal: a hint that ``attn_mask`` is causal; the mask itself counts.

        Returns:
            [as query], and [batch, L, S] or [batch, heads, L, S] or None.

        Raises:
            ModelError: causal without a mask, as torch refuses it.
        """
        if is_causal and attn_mask is None:
            raise ModelError("is_causal is a hint about attn_mask; give that mask too")
        batched = query.dim() == 3
        queries, keys, values = (
            self._heads(project(self._batch_first(given, batched)))
            for project, given in zip(
                (self.q_proj, self.k_proj, self.v_proj), (query, key, value), strict=True
            )
        )
        mask = _mask(queries, attn_mask, key_padding_mask)
        chances = None
        if need_weights or rounds_operands(self):
            context, chances = attend(
                self, queries, keys, values, mask, scaling=self.scale, dropout=self.dropout
            )
        else:
            dropped = self.dropout if self.training else 0.0
            context = F.scaled_dot_product_attention(
                queries, keys, values, mask, dropped, scale=self.scale
            ).transpose(1, 2)
        output = self.out_proj(context.flatten(2))
        if not batched:
            output = output.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        if not need_weights or chances is None:
            return output, None
        chances = chances.mean(1) if average_attn_weights else chances
        return output, chances if batched else chances.squeeze(0)

    def _batch_first(self, tensor: Tensor, batched: bool) -> Tensor:
        if not batched:
            return tensor.unsqueeze(0)
        return tensor if self.batch_first else tensor.transpose(0, 1)

    def _heads(self, tensor: Tensor) -> Tensor:
        """Return [batch, tokens, features] as [batch, heads, tokens, head_dim]."""
        return tensor.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _mask(
    queries: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
) -> Tensor | None:
    """Return what is added to scores [batch, heads, L, S], or None."""
    mask = None
    if attn_mask is not None:
        mask = _added(attn_mask, queries.dtype)
        if mask.dim() == 3:
            mask = mask.unflatten(0, (queries.shape[0], -1))
    if key_padding_mask is not None:
        padding = _added(key_padding_mask, queries.dtype)
        padding = padding.reshape(queries.shape[0], 1, 1, -1)
        mask = padding if mask is None else mask + padding
    return mask


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as numbers to add; a boolean one is True where nothing is read."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def hand_on_padded_(model: nn.Module, changed: Iterable[nn.Module]) -> None:
    """Let torch's encoders hand padded batches to layers that were changed, in evaluation too.

    They may pack a padded batch into a nested tensor, which only their own fused layers read, and
    which has no extremes to round by. What they return where there is padding is zeros then, and
    otherwise what the layers make of it, as in training.

    Args:
        model: the network, changed in place.
        changed: modules of it that are no longer as torch has them.

    >>> layers = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    >>> encoder = nn.TransformerEncoder(layers, 2)
    >>> hand_on_padded_(encoder, [encoder.layers[0].linear1])
    >>> encoder.use_nested_tensor
    False
    """
    # The fused layers never call a dropout.
    others = {module for module in changed if not isinstance(module, nn.Dropout)}
    for encoder in _encoders(model):
        if not others.isdisjoint(encoder.modules()):
            encoder.use_nested_tensor = False


@contextmanager
def handing_on_padded(*models: nn.Module) -> Iterator[None]:
    """Let torch's encoders hand on padded batches inside a with block, for features to be seen.

    >>> layers = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    >>> encoder = nn.TransformerEncoder(layers, 2)
    >>> with handing_on_padded(encoder):
    ...     encoder.use_nested_tensor
    False
    >>> encoder.use_nested_tensor
    True
    """
    packing = [each for model in models for each in _encoders(model) if each.use_nested_tensor]
    try:
        for encoder in packing:
            encoder.use_nested_tensor = False
        yield
    finally:
        for encoder in packing:
            encoder.use_nested_tensor = True


def _encoders(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
