"""Rounding: where a network rounds what flows through it, inputs and operands of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from laconic.errors import ModelError
from laconic.names import QUANTIZERS

__all__ = [
    "INPUT",
    "OPERANDS",
    "attend",
    "carry_",
    "check_attention",
    "place_",
    "quantizer_of",
    "quantizers_of",
    "round_input",
    "rounded",
    "rounds_operands",
    "use_attention_",
]

INPUT = "input"
# Of the two products in attention: Q K^T and probabilities V.
OPERANDS = ("query", "key", "probabilities", "value")
ATTENTION = "laconic"


class _Places(nn.ModuleDict):
    """What rounds the tensors that come to a module, by place."""


def place_(module: nn.Module, place: str, quantizer: nn.Module) -> None:
    """Let a module round what it is given; a quantiser that stood there goes.

    Args:
        module: a layer for its "input"; the module that computes attention for operands.
        place: "input", or one of ``OPERANDS``.
        quantizer: tensor -> tensor of the same shape and dtype.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> place_(layer, "input", nn.ReLU())
    >>> layer(torch.tensor([-1.0])).item()
    0.0
    """
    quantizers = _held(module)
    if quantizers is None:
        quantizers = _Places()
        module.add_module(QUANTIZERS, quantizers)
    if place == INPUT and INPUT not in quantizers:
        module.register_forward_pre_hook(round_input, with_kwargs=True)
    quantizers[place] = quantizer.train(module.training)


def round_input(
    module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Round the first input of a module: the hook by which it rounds what it is given.

    >>> round_input(nn.Linear(1, 1), (1.0,), {})
    ((1.0,), {})
    """
    # A function of the module and not a closure: copies of a network have hooks of their own.
    if inputs:
        return (rounded(module, INPUT, inputs[0]), *inputs[1:]), named
    name = next(iter(named))
    return inputs, named | {name: rounded(module, INPUT, named[name])}


def rounded(module: nn.Module, place: str, tensor: Tensor) -> Tensor:
    """Return what a module rounds a tensor to; the tensor where it does not.

    >>> rounded(nn.Linear(1, 1), "input", torch.ones(1))
    tensor([1.])
    """
    quantizer = quantizer_of(module, place)
    return tensor if quantizer is None else quantizer(tensor)


def quantizer_of(module: nn.Module, place: str) -> nn.Module | None:
    """Return what rounds the tensors that come to a place of a module; None: nothing does.

    >>> quantizer_of(nn.Linear(1, 1), "input") is None
    True
    """
    quantizers = _held(module)
    return None if quantizers is None or place not in quantizers else quantizers[place]


def rounds_operands(module: nn.Module) -> bool:
    """Return whether a module rounds an operand of its attention.

    >>> rounds_operands(nn.Identity())
    False
    """
    quantizers = _held(module)
    return quantizers is not None and any(place in quantizers for place in OPERANDS)


def carry_(old: nn.Module, new: nn.Module) -> None:
    """Let a module round its input as another did, in whose place it is put.

    Where the other is a part of it, that goes on rounding by itself.

    >>> old, new = nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    >>> place_(old, "input", nn.ReLU())
    >>> carry_(old, new)
    >>> list(quantizers_of(new))
    ['0']
    """
    quantizer = quantizer_of(old, INPUT)
    if quantizer is None or any(part is old for part in new.modules()):
        return
    while isinstance(new, nn.Sequential):
        new = new[0]
    place_(new, INPUT, quantizer)


def quantizers_of(model: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """Return path -> place -> what rounds there.

    >>> quantizers_of(nn.Linear(1, 1))
    {}
    """
    held = {path: _held(module) for path, module in model.named_modules()}
    return {path: dict(each.items()) for path, each in held.items() if each is not None}


def _held(module: nn.Module) -> _Places | None:
    found = dict(module.named_children()).get(QUANTIZERS)
    return found if isinstance(found, _Places) else None


def use_attention_(model: nn.Module) -> None:
    """Let a network of Hugging Face compute attention so that its operands can be rounded.

    The function is registered with transformers under a name of its own, with the mask it needs:
    that of eager attention, whose results are the same.

    Raises:
        ModelError: its attention cannot be exchanged.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    check_attention(model)
    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    model.set_attn_implementation(ATTENTION)  # type: ignore[operator]


def check_attention(model: nn.Module) -> None:
    """Refuse a network of Hugging Face whose attention cannot be exchanged.

    Raises:
        ModelError: so it is.

    >>> check_attention(nn.Identity())
    Traceback (most recent call last):
        ...
    laconic.errors.ModelError: the attention of Identity cannot be exchanged, ...
    """
    exchangeable = getattr(model, "_can_set_attn_implementation", None)
    if exchangeable is None or not exchangeable():
        raise ModelError(
            f"the attention of {type(model).__name__} cannot be exchanged, so the operands of its "
            "products cannot be rounded; leave them as they are (operands: false)"
        )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **named: Any,
) -> tuple[Tensor, Tensor]:
    """Return context [batch, tokens, heads, head size] and probabilities, each operand rounded.

    In the form that transformers asks of an attention; what eager attention computes.

    Args:
        module: what computes attention, with its quantisers.
        query: [batch, heads, tokens, head size].
        key: the same.
        value: the same.
        attention_mask: added to the scores; broadcast to [batch, heads, tokens, tokens].
        scaling: of the scores; None: 1 / sqrt(head size).
        dropout: chance of a probability to be dropped, in training.
        **named: what other implementations need.

    >>> ones = torch.ones(1, 2, 3, 4)
    >>> context, chances = attend(nn.Identity(), ones, ones, ones, None)
    >>> context.shape, chances.shape
    (torch.Size([1, 3, 2, 4]), torch.Size([1, 2, 3, 3]))
    """
    query, key = rounded(module, "query", query), rounded(module, "key", key)
    value = rounded(module, "value", value)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    chances = torch.softmax(scores, dim=-1)
    chances = nn.functional.dropout(chances, p=dropout, training=module.training)
    chances = rounded(module, "probabilities", chances)
    return (chances @ value).transpose(1, 2).contiguous(), chances
