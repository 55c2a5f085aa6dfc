"""The unpack step: torch's attention as a layer each for queries, keys, values and outputs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.errors import ChainError, ModelError, ScopeError
from laconic.models.attention import PROJECTIONS, UnpackedAttention
from laconic.step import State, Step
from laconic.structure.factorization import refuse_root
from laconic.structure.outlines import outlined
from laconic.structure.surgery import replace_
from laconic.weights.laid import lay, mask_of
from laconic.weights.quantize import coded
from laconic.weights.representation import Float, Representation

if TYPE_CHECKING:
    from laconic.scope import Scope
    from laconic.tasks import Task

__all__ = ["Unpack", "unpacked"]

logger = logging.getLogger(__name__)

PACKED = "in_proj_weight"
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class Unpack(Step):
    """Give attentions of torch a layer each for queries, keys, values and outputs.

    ``nn.MultiheadAttention`` keeps three matrices in one tensor that no layer owns and fixes its
    sizes, so that its heads cannot be pruned, its inputs not rounded and its matrices not
    factorised. Unpacked, they can; the network computes the same but for the order of sums. It is
    what torch's own Transformer layers, torchvision's ViT and many others attend with. Only what
    ``nn.TransformerEncoder`` returns where there is padding may differ: in evaluation it packs
    padded batches and returns zeros there; unpacked, it returns what it does in training.

    What adds keys of its own (``add_bias_kv``, ``add_zero_attn``) and subclasses stay as they are.

    In a recipe::

        - unpack
        - prune: {axes: heads, keep: 0.5}

    Attributes:
        scope: the attentions.

    >>> state = State(nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8)))
    >>> Unpack().apply(state)
    >>> state.model[0].self_attn.q_proj
    Linear(in_features=4, out_features=4, bias=True)
    """

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse a scope without such attentions, and weights that are codes by then.

        Raises:
            ScopeError: there is none in the scope.
            ModelError: the network is one itself.
            ChainError: an earlier step quantises one.
        """
        found = _packed(model, self.scope)
        before = any(isinstance(m, UnpackedAttention) for m in self.scope.select(model).values())
        if not found and not before:
            raise ScopeError(
                f"unpack: '{self.scope}' selects no nn.MultiheadAttention without add_bias_kv and "
                "add_zero_attn; networks with layers of their own need no unpacking"
            )
        codes = coded(model, self.scope, earlier)
        for path, attention in found.items():
            refuse_root(path, self.name)
            held = _held(path, attention, codes)
            if held and earlier:
                raise ChainError(
                    f"unpack after quantize ({codes[held[0]].name}) at '{held[0]}': the codes "
                    "would change; unpack first"
                )

    def apply(self, state: State) -> None:
        """Replace every attention of the scope; one that holds codes stays."""
        self.check(state.model, state.task)
        found, codes = _packed(state.model, self.scope), coded(state.model, self.scope, ())
        left = {path: each for path, each in found.items() if not _held(path, each, codes)}
        for path, attention in left.items():
            _unpack(state.model, path, attention)
        kept = len(found) - len(left)
        logger.info("unpack: %d attentions unpacked, %d kept that hold codes", len(left), kept)

    def outline(self, model: nn.Module, earlier: tuple[Step, ...] = ()) -> nn.Module:
        """Return a copy with its attentions unpacked, which later steps select from."""
        with outlined(model) as outline:
            for path, attention in _packed(outline, self.scope).items():
                _unpack(outline, path, attention)
        return outline


def unpacked(attention: nn.MultiheadAttention) -> UnpackedAttention:
    """Return the same attention with layers of its own, in the same mode.

    Raises:
        ModelError: it adds keys of its own, or is of a subclass.

    >>> attention = nn.MultiheadAttention(4, 2).eval()
    >>> x = torch.ones(3, 1, 4)
    >>> torch.allclose(unpacked(attention)(x, x, x)[0], attention(x, x, x)[0])
    True
    """
    if not _plain(attention):
        raise ModelError(
            "an attention with add_bias_kv or add_zero_attn, or of a subclass, cannot be unpacked"
        )
    with torch.enable_grad():  # so that a part of a parameter tells whether it is trained
        weights, biases = _parts(attention)
    described = [
        {"Linear": {"in_features": w.shape[1], "out_features": w.shape[0], "bias": b is not None}}
        for w, b in zip(weights, biases, strict=True)
    ]
    with torch.device("meta"):  # where no random numbers are drawn
        made = UnpackedAttention(
            *described,
            head_dim=attention.head_dim,
            dropout=attention.dropout,
            batch_first=attention.batch_first,
        )
    made.to(weights[0].dtype).to_empty(device=weights[0].device)
    for name, weight, bias in zip(PROJECTIONS, weights, biases, strict=True):
        for own, given in zip(made.get_submodule(name).parameters(), (weight, bias), strict=False):
            own.data.copy_(cast("Tensor", given))
            own.requires_grad_(cast("Tensor", given).requires_grad)
    return made.train(attention.training)


def _plain(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    # A subclass may compute something else.
    if parametrize.type_before_parametrizations(module) is not nn.MultiheadAttention:
        return False
    attention = cast("nn.MultiheadAttention", module)
    return attention.bias_k is None and attention.bias_v is None and not attention.add_zero_attn


def _packed(model: nn.Module, scope: Scope) -> dict[str, nn.MultiheadAttention]:
    """Return the attentions of a scope that can be unpacked, by path."""
    return {path: module for path, module in scope.select(model).items() if _plain(module)}


def _matrices(attention: nn.MultiheadAttention) -> list[str]:
    """Return the names of the tensors that hold its four matrices."""
    inner = SEPARATE if attention.in_proj_weight is None else (PACKED,)
    return [*inner, "out_proj.weight"]


def _held(
    path: str, attention: nn.MultiheadAttention, codes: Mapping[str, Representation]
) -> list[str]:
    """Return which of its matrices are codes."""
    return [f"{path}.{name}" for name in _matrices(attention) if f"{path}.{name}" in codes]


def _parts(attention: nn.MultiheadAttention) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return weights and biases in the order of ``PROJECTIONS``."""
    if attention.in_proj_weight is None:
        weights = [cast("Tensor", getattr(attention, name)) for name in SEPARATE]
    else:
        weights = [*attention.in_proj_weight.chunk(3)]
    bias, out = attention.in_proj_bias, attention.out_proj
    biases = [None] * 3 if bias is None else [*bias.chunk(3)]
    return [*weights, out.weight], [*biases, out.bias]


def _unpack(model: nn.Module, path: str, attention: nn.MultiheadAttention) -> None:
    masks: list[Tensor | None] = []
    for name in _matrices(attention):
        mask = mask_of(model, f"{path}.{name}")
        if name == PACKED:
            masks += [None] * 3 if mask is None else mask.chunk(3)
        else:
            masks.append(mask)
    replace_(model, path, unpacked(attention))
    for name, mask in zip(PROJECTIONS, masks, strict=True):
        if mask is not None:
            lay(model, f"{path}.{name}.weight", Float(), mask=mask)
