"""Criteria of axes alone: importance of heads and neurons, norm scales, geometric median."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from laconic.errors import AxisError
from laconic.step import Count, State
from laconic.structure.criteria import Criterion, first_order_means, grouped, used
from laconic.structure.elements import matrices, roles
from laconic.weights.slopes import Per

if TYPE_CHECKING:
    from laconic.structure.axes import Axis, Use

__all__ = [
    "FPGM",
    "AxisCriterion",
    "BatchNormScale",
    "HeadImportance",
    "NeuronImportance",
    "distances",
]

# A layer without any importance is divided by this instead of by zero.
_LEAST_NORM = 1e-30


def distances(groups: Tensor) -> Tensor:
    """Return, for each row, the sum of its Euclidean distances to all rows [rows].

    The least are nearest to the geometric median, so others can stand in for them (He et al.
    2019, eq. 4).

    Args:
        groups: [rows, numbers].

    >>> distances(torch.tensor([[0.0], [1.0], [3.0]]))
    tensor([4., 3., 5.])
    """
    # By products of matrices it is faster, and a filter's distance to itself is not zero.
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(groups, groups, compute_mode=mode).sum(dim=1)


class AxisCriterion(Criterion, ABC):
    """A criterion that ranks elements of axes and not single weights."""

    def scores(self, state: State, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Refuse to rank weights.

        Raises:
            RecipeError: always.
        """
        raise self.misfit("weights")


class HeadImportance(AxisCriterion):
    """Score heads by the gradient of a gate on each (Michel et al. 2019).

    ``E |dL/d xi_h|``: the gate scales what head h gives to the output projection, so its
    gradient is that of the loss times the weights that read the head, ``|sum g w| =
    |Att_h . dL/dAtt_h|`` (eq. 2). Evaluation mode, training examples drawn by the step's seed
    and not augmented.

    Attributes:
        batches: at most so many; one epoch if the split has fewer.
        batch: examples per batch.
        per: what the absolute value is taken of, "batch" (as most code does) or "sample" (as
            the paper writes; slower).
        normalize: "layer": divide each layer's scores by their L2 norm (the paper's section
            2.3), which a global ranking needs; "none".

    >>> HeadImportance(per="sample")
    HeadImportance(per='sample')
    """

    ranks: ClassVar[tuple[str, ...]] = ("heads",)
    needs_data: ClassVar[bool] = True
    needs_targets: ClassVar[bool] = True

    batches: Count = 8
    batch: Count = 64
    per: Per = "batch"
    normalize: Literal["layer", "none"] = "layer"

    def check_axes(self, model: nn.Module, axes: Sequence[Axis]) -> None:
        """Refuse heads that no matrix reads."""
        for axis in axes:
            matrices(model, axis, "consumed")

    def axis_scores(self, state: State, axes: Sequence[Axis]) -> dict[Axis, Tensor]:
        """Return the mean of |dL/d xi_h| for every head, normalised."""
        groups = {axis: matrices(state.model, axis, "consumed") for axis in axes}
        found = first_order_means(
            state, groups, batches=self.batches, batch=self.batch, per=self.per, label=self.name
        )
        if self.normalize == "none":
            return found
        return {axis: score / score.norm().clamp_min(_LEAST_NORM) for axis, score in found.items()}


class NeuronImportance(AxisCriterion):
    """Score neurons by the change of the loss without them (DynaBERT).

    ``E |sum w_in g_in + b g_b| + |sum w_out g_out|`` over the weights into a neuron, its bias,
    and the weights out of it (Hou et al. 2020). Evaluation mode, training examples drawn by the
    step's seed and not augmented.

    Attributes:
        batches: at most so many; one epoch if the split has fewer.
        batch: examples per batch.
        per: what the absolute values are taken of, "batch" (as the authors' code) or "sample".

    >>> NeuronImportance(batches=4)
    NeuronImportance(batches=4)
    """

    ranks: ClassVar[tuple[str, ...]] = ("neurons",)
    needs_data: ClassVar[bool] = True
    needs_targets: ClassVar[bool] = True

    batches: Count = 8
    batch: Count = 64
    per: Per = "batch"

    def check_axes(self, model: nn.Module, axes: Sequence[Axis]) -> None:
        """Refuse neurons that no matrix computes, or none reads."""
        for axis in axes:
            _into(model, axis)
            matrices(model, axis, "consumed")

    def axis_scores(self, state: State, axes: Sequence[Axis]) -> dict[Axis, Tensor]:
        """Return the mean of both terms for every neuron."""
        ends = {(axis, "in"): _into(state.model, axis) for axis in axes}
        ends |= {(axis, "out"): matrices(state.model, axis, "consumed") for axis in axes}
        found = first_order_means(
            state, ends, batches=self.batches, batch=self.batch, per=self.per, label=self.name
        )
        return {axis: found[axis, "in"] + found[axis, "out"] for axis in axes}


class BatchNormScale(AxisCriterion):
    """Score channels by ``|gamma|``, BatchNorm's scale (Liu et al. 2017).

    Network slimming: it tells channels apart once ``Slimming`` has pushed scales to zero in
    training; the paper ranks globally. Where several norms scale one axis (a residual stream),
    their mean.

    >>> BatchNormScale().ranks
    ('channels',)
    """

    ranks: ClassVar[tuple[str, ...]] = ("channels",)

    def check_axes(self, model: nn.Module, axes: Sequence[Axis]) -> None:
        """Refuse channels that no BatchNorm scales."""
        for axis in axes:
            _scales(axis)

    def axis_scores(self, state: State, axes: Sequence[Axis]) -> dict[Axis, Tensor]:
        """Return the mean of |gamma| over the norms of every channel."""
        groups = {axis: _scales(axis) for axis in axes}
        found = grouped(used(state.model, groups), groups)
        return {axis: scales.detach().abs().mean(dim=1) for axis, scales in found.items()}


class FPGM(AxisCriterion):
    """Score channels by their distance to all others (He et al. 2019, FPGM).

    A filter near the geometric median of its layer can be replaced by others, however large it
    is. An axis that several layers compute has the filters of all of them side by side.

    >>> FPGM().ranks
    ('channels', 'neurons')
    """

    ranks: ClassVar[tuple[str, ...]] = ("channels", "neurons")

    def check_axes(self, model: nn.Module, axes: Sequence[Axis]) -> None:
        """Refuse axes that no matrix or kernel computes."""
        for axis in axes:
            matrices(model, axis, "produced")

    def axis_scores(self, state: State, axes: Sequence[Axis]) -> dict[Axis, Tensor]:
        """Return the sum of distances to all other filters, for every filter."""
        groups = {axis: matrices(state.model, axis, "produced") for axis in axes}
        found = grouped(used(state.model, groups), groups)
        return {axis: distances(filters.detach().float()) for axis, filters in found.items()}


def _into(model: nn.Module, axis: Axis) -> tuple[Use, ...]:
    """Return the weights into the elements of an axis, and their biases."""
    return (*matrices(model, axis, "produced"), *roles(model, axis)["bias"])


def _scales(axis: Axis) -> tuple[Use, ...]:
    """Return the scales of the BatchNorms of an axis."""
    names = {use.name for use in axis.uses}
    found = tuple(
        use
        for use in axis.uses
        # What has running statistics of these channels is a BatchNorm.
        if use.name.endswith("weight") and f"{use.name[:-6]}running_mean" in names
    )
    if not found:
        raise AxisError(
            f"{axis} has no BatchNorm, so no scale to rank by; rank by magnitude, or leave "
            "it out of the scope"
        )
    return found
