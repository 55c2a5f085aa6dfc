"""Ternary weight splitting: a ternary network becomes a binary one that computes the same."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.budget import Budget
from laconic.errors import BudgetError, ChainError, ModelError, ScopeError
from laconic.models.families import blocks_path, family_of
from laconic.models.halves import Halves
from laconic.models.layers import describe
from laconic.names import PARAMETRIZED, QUANTIZERS, module_of, of_laid
from laconic.scope import Scope, left_out
from laconic.step import State, Step
from laconic.structure.depth import refuse_shared
from laconic.structure.factorization import bias_of, check_runs, refuse_needed, refuse_tied
from laconic.structure.gains import Gain, MaximalGain, Part, put_
from laconic.structure.outlines import blank, outlined
from laconic.structure.surgery import replace_
from laconic.weights.laid import (
    Laid,
    laid_tensors,
    latent_of,
    lay,
    lay_each,
    mask_of,
    owners_of,
    weights_of,
    without_padding,
)
from laconic.weights.lowbit import Binary, Ternary
from laconic.weights.quantize import represented
from laconic.weights.representation import (
    Codes,
    Granularity,
    Representation,
    check_groups,
    grouped,
    masked,
)

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["PlanSplit", "Split", "split_ternary"]

logger = logging.getLogger(__name__)

# What can be split: the output is linear in weight and bias.
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)
# The least share of a weight that either half gets: nearer to zero it could lose its sign.
LEAST = 1e-3
# Bits of a byte.
BYTE = 8


# ------------------------------------------------------------------ one weight


def split_ternary(
    weight: Tensor,
    ternary: Ternary,
    *,
    mask: Tensor | None = None,
    left: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return two latent weights whose binary forms add up to the ternary of this one.

    ``w1 + w2 = w`` and ``Binary(w1) + Binary(w2) = Ternary(w)`` (Bai et al. 2021, BinaryBERT,
    section 3.1). In each group, with I the weights that are not zero once ternary, alpha their
    mean size, and Z the others:

        w1 = a w                    on I
        w1 = w / 2 + s (b + |w| / 2)    on Z
        w2 = w - w1
        a = (sum_I |w| - sum_Z s w) / (2 sum_I |w|)
        b = (alpha - mean_Z |w|) / 2

    With s = 1 these are the paper's equations: w1 is b + w where w > 0 and b elsewhere on Z, and
    ``a = (sum_I + sum_K - sum_J) / (2 sum_I)`` of sizes, J and K being the positive and the
    negative weights of Z. Both halves then have the scale alpha / 2. Where that a is not
    within (0, 1), which takes a few large weights among many small ones of one sign, s alternates
    along Z from the largest size down: |sum_Z s w| is then below every size in I. Without
    Z, or where all weights are zero, both halves are w / 2.

    Args:
        weight: w, latent [rows, ...]; the halves are computed in float64.
        ternary: as it is laid on the weight.
        mask: bool, of the weight's shape; True survives. Pruned weights have no part in sums.
        left: the mask of the halves, where they lack some of the ternary's zeros; None: the same.

    Returns:
        w1 and w2, of the weight's shape and dtype, for ``Binary`` of the same granularity.

    Raises:
        ModelError: the weight holds NaN or infinity.

    >>> first, second = split_ternary(torch.tensor([[4.0, -1.0, 1.0, 0.5]]), Ternary())
    >>> first, second
    (tensor([[1.7500, 1.5833, 2.5833, 2.0833]]), tensor([[ 2.2500, -2.5833, -1.5833, -1.5833]]))
    """
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(f"a weight {list(weight.shape)} holds NaN or infinity, and has no halves")
    code = ternary.codes(weight.detach(), mask, {}).streams["code"].tensor
    kept = code != 1
    left = mask if left is None else left
    zero = ~kept if left is None else left & ~kept
    parts = (weight.detach().double(), kept, zero)
    w, kept, zero = (grouped(part, ternary.granularity) for part in parts)
    size, rest = w.abs(), masked(w, zero)
    large = masked(size, kept).sum(1, keepdim=True)
    s = _signs(rest, large)
    a = (large - (s * rest).sum(1, keepdim=True)) / (2 * large)
    b = (large / _count(kept) - rest.abs().sum(1, keepdim=True) / _count(zero)) / 2
    first = torch.where(kept, a * w, w / 2)
    first = torch.where(zero, w / 2 + s * (b + size / 2), first)
    halves = (half.reshape(weight.shape).to(weight.dtype) for half in (first, w - first))
    return next(halves), next(halves)


def _count(chosen: Tensor) -> Tensor:
    return chosen.sum(1, keepdim=True).clamp(min=1)


def _signs(rest: Tensor, large: Tensor) -> Tensor:
    """Return s [groups, size]: 1, but in groups where that would leave a outside (0, 1)."""
    signs = torch.ones_like(rest)
    sided = rest.sum(1).abs() > (1 - 2 * LEAST) * large[:, 0]
    order = rest[sided].abs().argsort(dim=1, descending=True, stable=True)
    alternating = 1 - 2 * (order.argsort(dim=1) % 2)
    signs[sided] = torch.where(rest[sided] < 0, -alternating, alternating).to(rest)
    return signs


# ------------------------------------------------------------------ what may be split


def _check_module(model: nn.Module, path: str, step: str) -> None:
    """Refuse a module that two of its kind could not stand for."""
    module = model.get_submodule(path)
    kind = parametrize.type_before_parametrizations(module)
    if kind not in KINDS:
        parts = "put the step 'unpack' before, or " if kind is nn.MultiheadAttention else ""
        raise ModelError(
            f"{step}: '{path}' is a {kind.__name__}, which cannot be split; only Linear, Conv1d, "
            f"Conv2d and Embedding can: {parts}{left_out(path)}"
        )
    refuse_needed(model, path, step)
    refuse_tied(model, path, step)
    bias = bias_of(module)
    tied = [] if bias is None else owners_of(model, bias)
    if len(tied) > 1:
        raise ModelError(
            f"{step}: '{tied[0]}' and '{tied[1]}' are one parameter, of which '{path}' cannot have "
            f"halves; untie them, or leave it out of the scope with '!{path}'"
        )


# ------------------------------------------------------------------ splitting


class Split(Step):
    """Turn every ternary layer into two binary ones that compute the same together.

    Ternary weight splitting (Bai et al. 2021, BinaryBERT, section 3.1): binary training starts
    from what a trained ternary network computes, with twice its weights. A Linear, Conv1d, Conv2d
    or Embedding whose weight is laid with ``Ternary`` becomes ``Halves``: both halves are laid
    with ``Binary`` of the same granularity and mask, and each has half of the bias, as plain
    numbers. All else stays. Train again afterwards.

    In a recipe::

        - quantize: {weight: ternary}
        - train: {epochs: 2}
        - split
        - train: {epochs: 2}

    Attributes:
        scope: the layers that are split; what is not ternary in it stays.

    >>> from laconic.weights import Quantize
    >>> state = State(nn.Sequential(nn.Linear(6, 4)))
    >>> Quantize(Ternary()).apply(state)
    >>> x = torch.randn(5, 6)
    >>> before = state.model(x)
    >>> Split().apply(state)
    >>> torch.allclose(state.model(x), before, atol=1e-5)
    True
    >>> state.model[0].first.weight.unique().numel()
    2
    """

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse a scope where nothing is or becomes ternary, and what has no halves.

        Raises:
            ChainError: nothing is ternary, or an earlier step ties what is.
            ModelError: something ternary cannot be split.
        """
        super().check(model, task, earlier)
        paths = self._targets(model, _ternary_after(model, earlier))
        unseen = any(represented(step, model) is None for step in earlier)
        if not (paths or unseen or self._halves(model)):
            raise ChainError(
                f"split: nothing in '{self.scope}' is ternary; put 'quantize: ternary' or "
                "plan_split, and training, before it"
            )
        refuse_shared(model, paths, earlier, self.name)

    def outline(self, model: nn.Module, earlier: tuple[Step, ...] = ()) -> nn.Module:
        """Return a copy with its layers split, on whose halves nothing is laid.

        Where data decide what is ternary, all is split that may be.
        """
        with outlined(model) as outline:
            for path in self._targets(outline, _ternary_after(outline, earlier)):
                replace_(outline, path, _outlined_halves(outline, path))
        return outline

    def represented(self, model: nn.Module) -> list[tuple[Representation, Mapping[str, Tensor]]]:
        """Return binary, which both halves of a layer get."""
        halves = {
            name: weight
            for name, weight in weights_of(model, self.scope).items()
            if isinstance(model.get_submodule(module_of(module_of(name))), Halves)
        }
        return [(Binary(), halves)] if halves else []

    def apply(self, state: State) -> None:
        """Split every ternary layer of the scope."""
        paths = self._targets(state.model, _ternary_after(state.model))
        # All are computed before any is replaced: a refusal leaves the network as it was.
        made = {path: _halved(state.model, path) for path in paths}
        for path, (halves, binary, mask) in made.items():
            replace_(state.model, path, halves)
            for half in ("first", "second"):
                lay(state.model, f"{path}.{half}.weight", binary, mask=mask)
        check_runs(state, self.name)
        logger.info("split: %d ternary layers are two binary ones each now", len(paths))

    def _targets(self, model: nn.Module, ternary: Iterable[str]) -> list[str]:
        """Return the modules of the scope that own ternary weights, each checked."""
        owners = {module_of(name) for name in ternary}
        paths = [path for path in self.scope.select(model) if path in owners]
        for path in paths:
            _check_module(model, path, self.name)
            _refuse_attached(model, path)
        return paths

    def _halves(self, model: nn.Module) -> bool:
        return any(isinstance(module, Halves) for module in self.scope.select(model).values())


def _refuse_attached(model: nn.Module, path: str) -> None:
    """Refuse a module that carries more than what is laid on it or rounds its input."""
    children = model.get_submodule(path).named_children()
    attached = [name for name, _ in children if name not in (PARAMETRIZED, QUANTIZERS)]
    if attached:
        raise ChainError(
            f"split: '{path}' carries '{attached[0]}', which its halves would lose; attach it "
            "after the split"
        )


def _ternary_after(model: nn.Module, earlier: Iterable[Step] = ()) -> set[str]:
    """Return the weights that are ternary, or will be after these steps, as far as they tell."""
    names = {
        name
        for name, (laid, latent) in laid_tensors(model).items()
        if isinstance(laid.representation, Ternary) and latent.dim() > 1
    }
    for step in earlier:
        found = represented(step, model) or ()
        laid = [(isinstance(each, Ternary), {*weights}) for each, weights in found]
        # What may be ternary comes last.
        for ternary, anew in sorted(laid, key=lambda each: each[0]):
            names = names | anew if ternary else names - anew
    return names


def _halved(model: nn.Module, path: str) -> tuple[Halves, Binary, Tensor | None]:
    """Return two layers whose sum is the ternary one at a path, and what to lay on both."""
    old, spec = model.get_submodule(path), describe(model.get_submodule(path))
    laid, weight = latent_of(model, f"{path}.weight")
    ternary, bias = cast("Ternary", cast("Laid", laid).representation), bias_of(old)
    binary = Binary(granularity=ternary.granularity)
    before = cast("Laid", laid).mask
    padded = without_padding(model, f"{path}.weight", binary)
    mask = before if padded is None else padded
    halves = Halves(spec, spec).to(weight)
    numbers = split_ternary(weight, ternary, mask=before, left=mask)
    for half, number in zip((halves.first, halves.second), numbers, strict=True):
        with torch.no_grad():
            cast("Tensor", half.weight).copy_(number)
            if bias is not None:
                cast("Tensor", half.bias).copy_(bias / 2)
        half.requires_grad_(weight.requires_grad)
        if bias is not None:
            cast("Tensor", half.bias).requires_grad_(bias.requires_grad)
    return halves, binary, mask


def _outlined_halves(model: nn.Module, path: str) -> Halves:
    """Return two layers like the one at a path: one with its numbers, and one without."""
    old, spec = model.get_submodule(path), describe(model.get_submodule(path))
    weight = latent_of(model, f"{path}.weight")[1]
    with torch.device("meta"):
        halves = Halves(spec, spec).to(weight.dtype)
    for name, parameter in (("weight", weight), ("bias", bias_of(old))):
        halves.first.register_parameter(name, cast("nn.Parameter | None", parameter))
    blank(halves.second, weight)
    return halves


# ------------------------------------------------------------------ planning


class PlanSplit(Step):
    """Make the parts that a budget lets split ternary, and all others binary.

    Adaptive splitting (Bai et al. 2021, BinaryBERT, section 3.3): the network is trained with
    its sensitive parts ternary, and ``Split`` then splits these alone. Parts are, in each block of
    a Transformer, query with key, value with the projection out of heads, and the two projections
    of the feed-forward part; any other matrix or kernel is one by itself.

    A size is what papers count: a bit for every binary weight, 32 for every scale and for every
    number that stays float, and as much again for weights and biases that are split. The file has
    a header too, and is smaller where codes can be coded. ``0.1x`` is a share of what the
    network's numbers take when they are plain.

    In a recipe::

        - plan_split: {budget: size <= 16.5 MiB, choose: {maximal_gain: {by: loss}}}
        - train: {epochs: 2}
        - split

    Attributes:
        scope: the layers that become binary or ternary.
        budget: of the network once it is split; a size alone.
        choose: which parts become ternary.
        weight: how many weights of a matrix or kernel share a scale.
        embedding: the same for tables of embeddings.

    >>> state = State(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)))
    >>> PlanSplit("size <= 1200 B", choose="random_gain").apply(state)
    >>> [layer.representation.name for layer, _ in laid_tensors(state.model).values()]
    ['binary', 'ternary']
    """

    positional: ClassVar[tuple[str, ...]] = ("budget",)

    budget: Budget
    choose: Gain = MaximalGain()
    weight: Granularity = "tensor"
    embedding: Granularity = "row"

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse a budget that not even a binary network meets, and what cannot be split.

        Raises:
            ScopeError: the scope has no matrix or kernel.
            BudgetError: the budget limits more than the size, or cannot be met.
            ModelError: something in the scope cannot be split.
            ChainError: an earlier step ties layers to each other.
            TaskError: the choice needs data.
        """
        super().check(model, task, earlier)
        self._check_limits()
        self.choose.check(task)
        binary = self._binary(model)
        refuse_shared(model, map(module_of, binary), earlier, self.name)
        check_groups(self.represented(model))
        if not earlier:  # what an earlier step makes smaller may fit
            self._room(model, _coded_bits(model, binary))

    def represented(self, model: nn.Module) -> list[tuple[Representation, Mapping[str, Tensor]]]:
        """Return binary and ternary, either of which a weight may get."""
        return [
            (kind(granularity=self._granularity(model, name)), {name: weight})
            for name, weight in weights_of(model, self.scope).items()
            for kind in (Binary, Ternary)
        ]

    def abridged(self, repeats: int = 1) -> tuple[Step, ...]:
        """Return a plan that spends as much without measuring what it gains."""
        return (self.model_copy(update={"choose": self.choose.abridged()}),)

    def apply(self, state: State) -> None:
        """Lay binary on every weight, and ternary on the chosen parts instead."""
        model, binary = state.model, self._binary(state.model)
        bits = _coded_bits(model, binary)
        room = self._room(model, bits)
        weights = weights_of(model, self.scope)
        for name, representation in binary.items():
            lay_each(model, {name: weights[name]}, representation)
        parts = {
            label: _part(model, names, sum(bits[name] for name in names))
            for label, names in _labelled(model, binary).items()
        }
        chosen = self.choose.chosen(state, list(parts.values()), room)
        labels = [list(parts)[place] for place in chosen]
        for label in labels:
            put_(model, parts[label].ternary)
        shown = ", ".join(labels) or "none"
        logger.info("plan_split: %d of %d parts are ternary: %s", len(chosen), len(parts), shown)

    def _binary(self, model: nn.Module) -> dict[str, Binary]:
        """Return the binary representation of every weight of the scope, each checked."""
        names = weights_of(model, self.scope)
        if not names:
            raise ScopeError(f"'{self.scope}' selects no weight of two or more dimensions")
        found = {}
        for name in names:
            _check_module(model, module_of(name), self.name)
            found[name] = Binary(granularity=self._granularity(model, name))
        return found

    def _granularity(self, model: nn.Module, name: str) -> Granularity:
        table = isinstance(model.get_submodule(module_of(name)), nn.Embedding)
        return self.embedding if table else self.weight

    def _check_limits(self) -> None:
        limited = self.budget.fields
        if limited != {"size_bytes"}:
            raise BudgetError(
                f"plan_split: '{self.budget}' limits {', '.join(sorted(limited))}, and splits are "
                "chosen by size alone; write 'size <= ...'"
            )

    def _room(self, model: nn.Module, bits: dict[str, int]) -> int:
        """Return the bytes that may be spent on second copies of weights of so many bits."""
        self._check_limits()
        now, plain = _stored_bits(model)
        limits = self.budget.limits({"size_bytes": plain / BYTE})
        least = math.ceil(sum((now | bits).values()) / BYTE)
        room = math.floor(limits["size_bytes"]) - least
        if room < 0:
            raise BudgetError(
                f"plan_split: with all of '{self.scope}' binary the network takes {least:,} bytes, "
                f"{-room:,} more than '{self.budget}' allows; allow more, or widen the scope"
            )
        return room


def _code_bits(codes: Codes) -> int:
    streams = sum(stream.tensor.numel() * stream.bits for stream in codes.streams.values())
    return streams + BYTE * sum(table.nbytes for table in codes.tables.values())


def _coded_bits(model: nn.Module, binary: Mapping[str, Binary]) -> dict[str, int]:
    """Return the bits of codes and scales of weights once they are binary."""
    values = weights_of(model, Scope("*"))
    return {
        name: _code_bits(representation.encode(values[name], mask=mask_of(model, name)))
        for name, representation in binary.items()
    }


def _stored_bits(model: nn.Module) -> tuple[dict[str, int], int]:
    """Return the bits of every tensor of a network's file, and of all of them as plain numbers."""
    tensors = model.state_dict(keep_vars=True)
    # What stands in several places is stored once, under its first name.
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        if not of_laid(name):
            names.setdefault(id(tensor), name)
    found = {name: BYTE * tensors[name].nbytes for name in names.values()}
    plain = sum(found.values())
    seen: set[int] = set()
    for name, (layer, latent) in laid_tensors(model).items():
        if id(latent) not in seen:
            seen.add(id(latent))
            plain += BYTE * latent.nbytes
            found[name] = _code_bits(layer.encode(latent))
    return found, plain


def _labelled(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Return the weights of each part, by what the part is called."""
    family = family_of(model)
    if family is None:
        return {module_of(name): [name] for name in names}
    blocks = blocks_path(model)
    heads = {family.query: "query, key", family.key: "query, key"}
    heads |= {family.value: "value, output", family.output: "value, output"}
    found: dict[str, list[str]] = {}
    for name in names:
        label = module_of(name)
        if label.startswith(f"{blocks}."):
            block, _, inner = label.removeprefix(f"{blocks}.").partition(".")
            own = (part for path, part in heads.items() if f"{inner}.".startswith(f"{path}."))
            label = next((f"{blocks}.{block}: {part}" for part in own), label)
        found.setdefault(label, []).append(name)
    return found


def _part(model: nn.Module, names: Sequence[str], bits: int) -> Part:
    """Return a part that is binary now, whose weights take so many bits."""
    laid = laid_tensors(model)
    binary = {name: laid[name][0] for name in names}
    ternary = {
        name: Laid(
            Ternary(granularity=cast("Binary", layer.representation).granularity), layer.mask
        )
        for name, layer in binary.items()
    }
    biases = (bias_of(model.get_submodule(module_of(name))) for name in names)
    bits += BYTE * sum(bias.nbytes for bias in biases if bias is not None)
    return Part(binary, ternary, math.ceil(bits / BYTE))
