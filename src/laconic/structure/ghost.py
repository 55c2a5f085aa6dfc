"""The ghost step: more features of a small network from cheap operations."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from laconic.errors import ChainError, ModelError, ScopeError
from laconic.models.families import FAMILIES, Family, blocks_path, family_of
from laconic.models.ghosts import MOST_GHOSTS, MOST_TAPS, GhostConv2d, GhostProjection
from laconic.models.layers import describe
from laconic.names import joined
from laconic.scope import Scope
from laconic.step import State, Step, Value
from laconic.structure.factorization import bias_of, latent, refuse_tied
from laconic.structure.outlines import outlined
from laconic.structure.surgery import replace_
from laconic.weights.laid import bake, laid_tensors, lay

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["ChannelGhosts", "Ghost", "Ghosts", "TokenGhosts"]

logger = logging.getLogger(__name__)

# Logit of the middle tap where the others have 0: of three, it weighs 0.987.
CENTRE = 5.0
# By what a filter's squares are divided at least.
TINY = 1e-12


class Ghosts(Value, ABC):
    """Which cheap features a network gets, and where."""

    @abstractmethod
    def places(self, model: nn.Module, scope: Scope) -> list[str]:
        """Return the paths of the modules that get ghosts.

        Raises:
            ModelError: the network is of a kind that cannot have them.
        """

    @abstractmethod
    def attach_(self, model: nn.Module, path: str) -> None:
        """Put a layer with ghosts in the place of a module, with that one's weights."""


class TokenGhosts(Ghosts):
    """Ghosts of the attention and feed-forward outputs of a Transformer.

    GhostBERT (Huang et al. 2021): every projection out of heads, and out of neurons, becomes a
    ``GhostProjection``, which adds to its features their means over neighbouring tokens, with a
    learned kernel for each channel. Heads and neurons may have been pruned before; that is what
    ghosts make up for.

    The defaults are the layout of the paper's m = 12/12, one kernel for each channel of a
    sublayer: 55,296 parameters for BERT-base. No code is published: the ReLU is known from
    summaries of the paper alone, and the start of the kernels and how many ghosts a network of
    fewer heads has are not known.

    Attributes:
        ghosts: kernels of each part, F in the paper.
        per: what a kernel sees: the sublayer's sum, or the feature of one head (and of as many
            folds of neurons) on its own.
        taps: tokens under a kernel, k.
        gain: factor of the ghosts. At 1, the paper's, a sublayer starts with up to twice its
            features. With "learned" it is a parameter of each sublayer that starts at 0, so
            that the network starts as it was.
        activation: of a ghost.
        start: of the kernels: "mean" weighs all taps alike, "centre" the token itself.

    >>> TokenGhosts(gain="learned")
    TokenGhosts(gain='learned')
    """

    ghosts: Annotated[int, Field(ge=1, le=MOST_GHOSTS)] = 1
    per: Literal["sublayer", "head"] = "sublayer"
    taps: Annotated[int, Field(ge=1, le=MOST_TAPS)] = 3
    gain: float | Literal["learned"] = 1.0
    activation: Literal["none", "relu"] = "relu"
    start: Literal["mean", "centre"] = "mean"

    def places(self, model: nn.Module, scope: Scope) -> list[str]:
        """Return the projections of every block that are in the scope and have no ghosts."""
        family, selected = _family(model), scope.select(model)
        modules, places = dict(model.named_modules()), []
        for block, _ in model.get_submodule(blocks_path(model)).named_children():
            for part in (family.output, family.outer):
                path = f"{blocks_path(model)}.{block}.{part}"
                if path in selected and not isinstance(modules[path], GhostProjection):
                    places.append(path)
        return places

    def attach_(self, model: nn.Module, path: str) -> None:
        """Put the projection into a layer that adds its ghosts; the bias is added last."""
        linear = model.get_submodule(path)
        if not isinstance(linear, nn.Linear):
            raise ChainError(
                f"ghost: '{path}' is a {type(linear).__name__}, not a linear layer; attach ghosts "
                "before the steps that replace it"
            )
        found = laid_tensors(model).get(f"{path}.weight")
        parts = 1 if self.per == "sublayer" else _heads(model, path)
        if parts > 1:
            refuse_tied(model, path, "ghost")
        ghosted = self._built(linear, parts, path)
        if parts == 1:
            # The layer itself: what is laid on its weight stays exactly as it is.
            if linear.bias is not None:
                bake(model, f"{path}.bias")
            linear.register_parameter("bias", None)
            ghosted.dense[0] = linear
        replace_(model, path, ghosted)
        if parts > 1 and found is not None:
            masks = _pieces(found[0].mask, parts, dim=1)
            for place, mask in enumerate(masks):
                name = f"{path}.dense.{place}.weight"
                lay(model, name, found[0].representation, mask=mask)

    def _built(self, linear: nn.Linear, parts: int, path: str) -> GhostProjection:
        inputs, outputs = linear.in_features, linear.out_features
        if inputs % parts:
            raise ModelError(
                f"ghost: the {inputs} inputs of '{path}' cannot be cut into {parts} equal parts; "
                "use per='sublayer', or prune to a multiple of the heads"
            )
        dense = {"in_features": inputs // parts, "out_features": outputs, "bias": False}
        ghosted = GhostProjection(
            [{"Linear": dense}] * parts,
            outputs,
            ghosts=self.ghosts,
            taps=self.taps,
            gain=self.gain,
            activation=self.activation,
            bias=linear.bias is not None,
        ).to(linear.weight)
        ghosted.register_parameter("bias", bias_of(linear))
        with torch.no_grad():
            for place, weight in enumerate(linear.weight.chunk(parts, dim=1)):
                cast("nn.Linear", ghosted.dense[place]).weight.copy_(weight)
            middle = CENTRE if self.start == "centre" else 0.0
            ghosted.logits.view(-1, self.taps)[:, self.taps // 2] = middle
        return ghosted


class ChannelGhosts(Ghosts):
    """Ghosts of a convolution's channels (Han et al. 2020, GhostNet).

    Every plain convolution becomes a ``GhostConv2d``: 1 / ratio of the filters are kept, the
    first ones, and the channels of the others are made from theirs by small depthwise kernels.
    These start as the multiple of a kept filter that is nearest to the filter it stands for;
    the network needs training afterwards.

    Attributes:
        ratio: channels for each filter that is kept, s in the paper.
        taps: pixels a side of the small kernels, d in the paper; odd.

    >>> ChannelGhosts(ratio=4)
    ChannelGhosts(ratio=4)
    """

    ratio: Annotated[int, Field(ge=2)] = 2
    taps: Annotated[int, Field(ge=1, le=MOST_TAPS)] = 3

    @field_validator("taps")
    @classmethod
    def _odd(cls, taps: int) -> int:
        if taps % 2 == 0:
            raise ValueError(f"{taps} taps have no middle; give an odd number")
        return taps

    def places(self, model: nn.Module, scope: Scope) -> list[str]:
        """Return the convolutions of the scope with one group, enough filters and no ghosts."""
        inside = {
            joined(path, "primary")
            for path, module in model.named_modules()
            if isinstance(module, GhostConv2d)
        }
        return [
            path
            for path, module in scope.select(model).items()
            if isinstance(module, nn.Conv2d) and path not in inside
            if module.groups == 1 and module.out_channels >= self.ratio
        ]

    def attach_(self, model: nn.Module, path: str) -> None:
        """Keep the first filters and make the channels of the others from theirs."""
        refuse_tied(model, path, "ghost")
        conv = cast("nn.Conv2d", model.get_submodule(path))
        found = laid_tensors(model).get(f"{path}.weight")
        weight = conv.weight.detach()
        count = math.ceil(conv.out_channels / self.ratio)
        ((name, arguments),) = describe(conv).items()
        primary = {name: arguments | {"out_channels": count, "bias": False}}
        ghosted = GhostConv2d(
            primary,
            count,
            conv.out_channels,
            ratio=self.ratio,
            taps=self.taps,
            bias=conv.bias is not None,
        ).to(weight)
        ghosted.register_parameter("bias", bias_of(conv))
        with torch.no_grad():
            cast("nn.Conv2d", ghosted.primary).weight.copy_(weight[:count])
            ghosted.cheap.weight.zero_()
            scales = nearest_multiples(weight[:count], weight[count:], self.ratio - 1)
            ghosted.cheap.weight[: len(scales), 0, self.taps // 2, self.taps // 2] = scales
        for parameter in ghosted.parameters():
            parameter.requires_grad_(latent(conv).requires_grad)
        replace_(model, path, ghosted)
        if found is not None:
            mask = None if found[0].mask is None else found[0].mask[:count]
            lay(model, f"{path}.primary.weight", found[0].representation, mask=mask)


def nearest_multiples(kept: Tensor, others: Tensor, each: int) -> Tensor:
    """Return the scale of a kept filter that is nearest to each other filter.

    ``s_j = <V_j, W_i> / <W_i, W_i>``, the least squares of ``V_j - s_j W_i``, for
    ``i = j // each``: as the groups of a depthwise convolution are ordered.

    Args:
        kept: W [filters, ...].
        others: V [at most each * filters, ...].
        each: others to one kept filter.

    Returns:
        s [others].

    >>> nearest_multiples(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 4.0]]), 1)
    tensor([3.])
    """
    wanted = others.flatten(1)
    own = kept.flatten(1).repeat_interleave(each, dim=0)[: len(wanted)]
    return (wanted * own).sum(dim=1) / own.square().sum(dim=1).clamp_min(TINY)


class Ghost(Step):
    """Give a small network more features from cheap operations.

    For Transformers ``TokenGhosts`` (GhostBERT, Huang et al. 2021), for convolutions
    ``ChannelGhosts`` (GhostNet, Han et al. 2020). What has ghosts already is left alone.

    Attributes:
        by: which ghosts.

    >>> Ghost(TokenGhosts())
    Ghost(TokenGhosts())
    """

    positional: ClassVar[tuple[str, ...]] = ("by",)

    by: Ghosts

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse a network or a scope without a place for such ghosts.

        Raises:
            ModelError: the network is of a kind that cannot have them.
            ScopeError: nothing in the scope can.
        """
        super().check(model, task, earlier)
        if not self.by.places(model, self.scope) and not _has_ghosts(model):
            raise ScopeError(
                f"ghost: nothing in '{self.scope}' can have {self.by.name.replace('_', ' ')}; "
                "widen the scope"
            )

    def outline(self, model: nn.Module, earlier: tuple[Step, ...] = ()) -> nn.Module:
        """Return a copy with the ghosts attached."""
        with outlined(model) as outline:
            self._attach_(outline)
        return outline

    def apply(self, state: State) -> None:
        """Attach the ghosts."""
        places = self._attach_(state.model)
        logger.info("ghost: %d layers have %s now", len(places), self.by.name.replace("_", " "))

    def _attach_(self, model: nn.Module) -> list[str]:
        """Attach ghosts and return where."""
        places = self.by.places(model, self.scope)
        for path in places:
            self.by.attach_(model, path)
        return places


def _has_ghosts(model: nn.Module) -> bool:
    return any(isinstance(module, GhostConv2d | GhostProjection) for module in model.modules())


def _family(model: nn.Module) -> Family:
    family = family_of(model)
    if family is None:
        known = ", ".join(kind for each in FAMILIES for kind in each.model_types)
        raise ModelError(
            f"ghost: {type(model).__name__} is no Transformer whose parts have known names "
            f"({known}); use channel_ghosts for convolutions"
        )
    return family


def _heads(model: nn.Module, path: str) -> int:
    """Return the heads of the block that a projection is in."""
    family, blocks = _family(model), blocks_path(model)
    block = ".".join(path.split(".")[: blocks.count(".") + 2])
    attention = model.get_submodule(f"{block}.{family.attention}")
    size = next(name for name, kind in family.attributes.items() if kind == "head_dim")
    output = model.get_submodule(f"{block}.{family.query}")
    return int(output.out_features // getattr(attention, size))


def _pieces(mask: Tensor | None, parts: int, dim: int) -> list[Tensor | None]:
    return [None] * parts if mask is None else list(mask.chunk(parts, dim))
