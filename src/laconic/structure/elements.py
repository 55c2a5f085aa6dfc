"""Elements of axes: their weights as rows, what computes and what reads them, masks."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from laconic.errors import AxisError
from laconic.structure._record import UNSEEN
from laconic.structure.axes import Axis, Use, find_axes, slice_
from laconic.structure.examples import example_inputs
from laconic.structure.ranking import padded
from laconic.weights.laid import bake, laid_tensors, latent_of, mask_of, narrow
from laconic.weights.representation import Float

if TYPE_CHECKING:
    from laconic.scope import Scope
    from laconic.tasks import Task

__all__ = [
    "KINDS",
    "Matrices",
    "Role",
    "alive",
    "apart",
    "axes_of",
    "gather",
    "hide_",
    "mask_",
    "matrices",
    "roles",
    "slice_masked_",
    "zero_",
]

logger = logging.getLogger(__name__)

# Kinds of axes and what a step calls them; the empty ones cannot be asked for.
KINDS = {
    "channel": "channels",
    "head": "heads",
    "head_dim": "",
    "neuron": "neurons",
    "hidden": "hidden",
    "other": "",
}
# How many examples the axes are found on: more where some do not run the whole network.
EXAMPLES = (2, 64)
# How many axes an error names.
SHOWN = 5

Role = Literal["produced", "bias", "norm", "consumed"]
Matrices = Literal["produced", "consumed", "both"]


def gather(uses: Iterable[Use], tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the numbers of each element in several tensors, [size, numbers]."""
    return torch.cat([use.rows(tensors[use.name]) for use in uses], dim=1)


def axes_of(model: nn.Module, task: Task | None, kind: str, scope: Scope) -> list[Axis]:
    """Return the axes of a kind that may change and that modules of a scope alone compute.

    Those that are frozen are logged, with the reason.

    Args:
        model: the network; called once with two training examples, and left as it is.
        task: gives the examples.
        kind: "channels", "heads", "neurons" or "hidden".
        scope: all matrices and kernels that compute an axis must be of its modules.

    Raises:
        AxisError: there is none; why not, for each candidate.
        TaskError: there is no task.
        ModelError: the forward fails.
    """
    every = _found(model, task)
    selected = scope.select(model).keys()
    makers = {axis: _makers(model, axis) for axis in every if KINDS[axis.kind] == kind}
    # What nothing computes is an input.
    inside = [axis for axis, paths in makers.items() if paths and paths <= selected]
    free = [axis for axis in inside if axis.frozen is None]
    if not free:
        packed = any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
        advice = "; put the step 'unpack' before, for torch's attention" if packed else ""
        raise AxisError(_why_none(kind, scope, every, makers, selected) + advice)
    if len(free) < len(inside):
        logger.info("%s: %s", kind, _listed(axis for axis in inside if axis not in free))
    return free


def _found(model: nn.Module, task: Task | None) -> list[Axis]:
    """Return the axes of a network, on as many examples as run all of it, if need be."""
    for count in EXAMPLES:
        inputs, named = example_inputs(model, task, count=count)
        axes = find_axes(model, *inputs, **named)
        if not any((axis.frozen or "").startswith(UNSEEN) for axis in axes):
            break
    return axes


def apart(axes: Sequence[Axis]) -> list[Axis]:
    """Return axes of which no two are factors of one dimension, in their order.

    The channels of a convolution in groups are groups times channels of each: a fraction of both
    would be its square of the channels. Larger factors come first, then inner ones.

    >>> layers = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 1, 1)
    >>> found = find_axes(nn.Sequential(*layers), torch.ones(1, 1, 2, 2))
    >>> free = [axis for axis in found if axis.frozen is None]
    >>> [axis.size for axis in free], [axis.size for axis in apart(free)]
    ([2, 4, 4], [4, 4])
    """
    inner = {axis: max(use.position for use in axis.uses) for axis in axes}
    taken: set[tuple[str, int, int]] = set()
    chosen: set[Axis] = set()
    for axis in sorted(axes, key=lambda axis: (-axis.size, -inner[axis])):
        places = {(use.name, use.dim, use.offset) for use in axis.uses if len(use.sizes) > 1}
        if taken.isdisjoint(places):
            taken |= places
            chosen.add(axis)
    return [axis for axis in axes if axis in chosen]


def _why_none(
    kind: str,
    scope: Scope,
    axes: Sequence[Axis],
    makers: Mapping[Axis, AbstractSet[str]],
    selected: AbstractSet[str],
) -> str:
    """Return why no axis of a kind may change, and what may."""
    ours = {axis: paths for axis, paths in makers.items() if paths}
    inside = {axis: paths for axis, paths in ours.items() if paths <= selected}
    partly = {axis: paths - selected for axis, paths in ours.items() if paths & selected}
    if not ours:
        free = {KINDS[axis.kind] for axis in axes if axis.frozen is None} - {""}
        return f"the network has no {kind}; prunable here: {', '.join(sorted(free)) or 'nothing'}"
    if inside:
        return f"{kind} cannot be pruned in '{scope}': {_listed(inside)}"
    if partly:
        axis, others = next(iter(partly.items()))
        return (
            f"no {kind} are computed by modules of '{scope}' alone; widen it: {axis} is computed "
            f"by {_names(others)} too"
        )
    every = {path for paths in ours.values() for path in paths}
    return (
        f"no {kind} are computed by modules of '{scope}'; those of this network are computed by "
        f"{_names(every)}"
    )


def _listed(axes: Iterable[Axis]) -> str:
    reasons = [f"{axis} is frozen ({axis.frozen})" for axis in axes]
    more = [f"and {len(reasons) - SHOWN} more"] if len(reasons) > SHOWN else []
    return "; ".join([*reasons[:SHOWN], *more])


def _names(paths: Collection[str]) -> str:
    shown = [f"'{path}'" for path in sorted(paths)[:SHOWN]]
    return ", ".join([*shown, "..."] if len(paths) > SHOWN else shown)


def roles(model: nn.Module, axis: Axis) -> dict[Role, tuple[Use, ...]]:
    """Return the uses of an axis by what they do with its elements.

    - ``produced``: matrices and kernels that compute them (a depthwise kernel too), embeddings,
    - ``bias``: what is added to them by the modules of these,
    - ``norm``: scales, shifts and statistics of norms, other vectors,
    - ``consumed``: matrices and kernels that read them.

    Args:
        model: the network the axis is of.
        axis: one that ``find_axes`` returned.
    """
    found: dict[Role, list[Use]] = {"produced": [], "bias": [], "norm": [], "consumed": []}
    vectors, seen = [], set()
    for use in axis.uses:
        tensor = latent_of(model, use.name)[1]
        # A tied tensor is there under all its names.
        place = (id(tensor), use.dim, use.offset, use.position)
        if place in seen:
            continue
        seen.add(place)
        if tensor.dim() < 2:
            vectors.append(use)
        else:
            found["consumed" if use.consumed else "produced"].append(use)
    makers = {_path(use) for use in found["produced"]}
    for use in vectors:
        found["bias" if _path(use) in makers else "norm"].append(use)
    return {role: tuple(uses) for role, uses in found.items()}


def matrices(model: nn.Module, axis: Axis, which: Matrices) -> tuple[Use, ...]:
    """Return the matrices and kernels that compute an axis, that read it, or both.

    Raises:
        AxisError: there is none.
    """
    by_role = roles(model, axis)
    wanted: tuple[Role, ...] = ("produced", "consumed") if which == "both" else (which,)
    found = tuple(use for role in wanted for use in by_role[role])
    if not found:
        verb = "reads" if which == "consumed" else "computes"
        raise AxisError(
            f"{axis} cannot be scored: no matrix or kernel {verb} it; score it by another "
            "criterion, or narrow the scope"
        )
    return found


def alive(model: nn.Module, axis: Axis) -> Tensor:
    """Return which elements are left, bool [size]: those that something may still read.

    An element is gone where masks hide all of it from every matrix that reads it (from every
    parameter of it, where no matrix does), whether an axis or single weights were pruned.
    """
    readers = roles(model, axis)["consumed"] or _parameters(model, axis)
    left = torch.zeros(axis.size, dtype=torch.bool)
    for use in readers:
        mask = mask_of(model, use.name)
        if mask is None:
            return torch.ones(axis.size, dtype=torch.bool)
        left |= use.rows(mask).any(dim=1).cpu()
    return left


def mask_(model: nn.Module, kept: Mapping[Axis, Tensor]) -> None:
    """Mask the weights of all other elements, so that the network computes as if sliced.

    Whatever computes, shifts, scales or reads an element is masked, and its statistics are
    zeroed: masking a convolution alone would leave the shift of the norm behind it.

    Args:
        model: the network, changed in place.
        kept: axis -> bool [size].
    """
    masks: dict[str, Tensor] = {}
    for axis, elements in kept.items():
        for use in axis.uses:
            tensor = latent_of(model, use.name)[1]
            mask = _along(elements, use, tensor)
            masks[use.name] = masks[use.name] & mask if use.name in masks else mask
    for name, mask in masks.items():
        tensor = latent_of(model, name)[1]
        if isinstance(tensor, nn.Parameter):
            before = mask_of(model, name)
            narrow(model, name, mask if before is None else before & mask)
        else:
            hide_(tensor, mask)


def slice_masked_(
    model: nn.Module, axes: Sequence[Axis], *, multiple_of: int = 1
) -> dict[Axis, Tensor]:
    """Take what is masked out of a network; return what is left of each axis, bool [size].

    Args:
        model: the network, changed in place; masks that hide nothing any more are gone.
        axes: of the network.
        multiple_of: so many elements of each axis, or a multiple of it, are left.
    """
    kept = {axis: padded(alive(model, axis), multiple_of) for axis in axes}
    smaller = {axis: mask.nonzero()[:, 0] for axis, mask in kept.items() if not bool(mask.all())}
    slice_(model, {axis: places.tolist() for axis, places in smaller.items()})
    _unmask_(model, {use.name for axis in axes for use in axis.uses})
    return kept


def _unmask_(model: nn.Module, names: Collection[str]) -> None:
    """Bake what is laid on these tensors for the sake of a mask that hides nothing any more."""
    for name, (layer, _) in laid_tensors(model).items():
        whole = layer.mask is not None and bool(layer.mask.all())
        if name in names and whole and isinstance(layer.representation, Float):
            bake(model, name)


def zero_(model: nn.Module, kept: Mapping[Axis, Tensor]) -> None:
    """Zero the weights that compute all other elements; they may learn again.

    Norms stay: with a zero scale as well, no gradient would ever reach the weights.

    Args:
        model: the network, changed in place.
        kept: axis -> bool [size].
    """
    for axis, elements in kept.items():
        by_role = roles(model, axis)
        for use in (*by_role["produced"], *by_role["bias"]):
            tensor = latent_of(model, use.name)[1]
            hide_(tensor, _along(elements, use, tensor))


def hide_(tensor: Tensor, mask: Tensor) -> None:
    """Zero a tensor where a mask is False."""
    with torch.no_grad():
        tensor.masked_fill_(~mask, 0.0)


def _makers(model: nn.Module, axis: Axis) -> set[str]:
    """Return the modules that compute an axis."""
    return {_path(use) for use in roles(model, axis)["produced"]}


def _along(elements: Tensor, use: Use, tensor: Tensor) -> Tensor:
    """Return a mask of elements as one of a tensor [its shape]."""
    shape = [1] * tensor.dim()
    shape[use.dim] = -1
    flat = use.along(elements.to(tensor.device), True)
    return flat.reshape(shape).expand(tensor.shape)


def _parameters(model: nn.Module, axis: Axis) -> tuple[Use, ...]:
    return tuple(u for u in axis.uses if isinstance(latent_of(model, u.name)[1], nn.Parameter))


def _path(use: Use) -> str:
    return use.name.rpartition(".")[0]
