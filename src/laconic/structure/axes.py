"""Axes: coupled dimensions of tensors, found in one forward; sliced, permuted, widened."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from laconic.errors import AxisError, LaconicError, ModelError
from laconic.structure._atoms import Atom, root
from laconic.structure._record import Recording, plain_copy, record, shapes_in_training
from laconic.structure._resize import Selection, changes_of, check, select_
from laconic.structure._rules import KERNEL
from laconic.weights.laid import latent_of
from laconic.weights.representation import Float

__all__ = ["Axis", "Edit", "Use", "find_axes", "permute_", "slice_", "sliced_shapes", "widen_"]

SHOWN = 160


@dataclass(frozen=True)
class Use:
    """Where an axis stands in one dimension of one tensor.

    The dimension, from ``offset`` on, is a product of axes, the outermost first. A head axis of
    12 in a query weight [768, 768] is ``Use("query.weight", 0, (12, 64), 0)``; the second of two
    joined outputs of 16 channels each, in the kernel that reads them, is
    ``Use("conv.weight", 1, (16,), 0, offset=16, length=32)``.

    Attributes:
        name: of the tensor, dotted from the root, as in the baked network.
        dim: which dimension.
        sizes: of the product of axes.
        position: which of them this one is.
        offset: where the product begins along the dimension.
        length: of the whole dimension; by default, where the product ends.
        consumed: a product or convolution sums over it; not so of a weight that is tied, where
            another computes it.

    >>> Use("query.weight", dim=0, sizes=(2, 3), position=0).places()
    tensor([[0, 1, 2],
            [3, 4, 5]])
    """

    name: str
    dim: int
    sizes: tuple[int, ...]
    position: int
    offset: int = 0
    length: int = 0
    consumed: bool = False

    def __post_init__(self) -> None:
        if not self.length:
            object.__setattr__(self, "length", self.offset + self._span)

    @property
    def _span(self) -> int:
        return int(torch.Size(self.sizes).numel())

    def places(self) -> Tensor:
        """Return where along the dimension each element is, int64 [size, places]."""
        block = torch.arange(self.offset, self.offset + self._span).reshape(self.sizes)
        return block.movedim(self.position, 0).reshape(self.sizes[self.position], -1)

    def rows(self, tensor: Tensor) -> Tensor:
        """Return what belongs to each element, [size, numbers].

        Args:
            tensor: the one that has this name [any shape].
        """
        places = self.places()
        moved = tensor.movedim(self.dim, 0)[places.flatten().to(tensor.device)]
        return moved.reshape(len(places), -1)

    def along(self, values: Tensor, rest: float) -> Tensor:
        """Return one number per element as one per place [length].

        Args:
            values: [size].
            rest: what stands where the dimension is no part of the axis.
        """
        places = self.places().to(values.device)
        spread = torch.full((self.length,), rest, device=values.device).to(values.dtype)
        spread[places] = values[:, None].expand_as(places)
        return spread


@dataclass(eq=False)
class _Found:
    """The axes that were found together: an edit of one moves the others."""

    axes: list[Axis] = field(default_factory=list)


@dataclass(frozen=True)
class Axis:
    """Coupled dimensions: elements that can only come and go together.

    Attributes:
        size: how many elements.
        kind: "channel" (of convolutions), "head", "head_dim", "neuron" (between two linear
            layers), "hidden" (normalised over, or a residual stream of linear layers) or "other".
        uses: where it stands; a tied parameter appears under all its names.
        frozen: why it may not change, or None.
        matched: a product of what was computed, as of queries with keys, sums over it, so that it
            cannot be widened.

    >>> axes = find_axes(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), torch.ones(1, 2))
    >>> [(axis.size, axis.kind, axis.frozen) for axis in axes]
    [(3, 'neuron', None), (2, 'other', 'an input')]
    """

    size: int
    kind: str
    uses: tuple[Use, ...]
    frozen: str | None = None
    matched: bool = False
    _found: _Found = field(default_factory=_Found, compare=False, repr=False)

    def __str__(self) -> str:
        more = f" and {len(self.uses) - 1} more" if len(self.uses) > 1 else ""
        return f"the {self.kind} axis of {self.size} in '{self.uses[0].name}'{more}"


@dataclass(frozen=True)
class Edit:
    """What an edit did to the axes of a network.

    Attributes:
        axes: all of them as they are now, in the order in which they were found.
        replaced: each one as it was -> as it is.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> hidden = find_axes(model, torch.ones(1, 2))[0]
    >>> slice_(model, {hidden: [0, 2]}).replaced[hidden].size
    2
    """

    axes: list[Axis]
    replaced: Mapping[Axis, Axis]


def find_axes(model: nn.Module, *args: Any, **kwargs: Any) -> list[Axis]:
    """Return the axes of a network, found by running it on an example.

    Every operation of the forward says which dimensions it couples; one without a rule freezes
    what it touches, and so does an input, an output, a constant. Then the network is run again
    with every axis that is left a little longer, and with two or three elements of each, in
    training mode too: where the forward does not follow, because a size is written in its code,
    the axis is frozen too. So an axis that is not frozen can be sliced to any size, in any order,
    with all others; to one element only if no ``squeeze`` without a dimension takes it away then.

    Args:
        model: any network; it is left as it is. What is laid on weights is looked through.
        *args: of its forward.
        **kwargs: of its forward. Two short examples do: all that is computed is held meanwhile.
            What the example does not run is frozen.

    Raises:
        ModelError: the forward fails, or returns no tensor.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    >>> for use in find_axes(model, torch.ones(1, 1, 5, 5))[0].uses:
    ...     print(use.name, use.dim, use.sizes)
    0.weight 0 (4,)
    0.bias 0 (4,)
    1.weight 0 (4,)
    1.bias 0 (4,)
    2.weight 1 (4,)
    1.running_mean 0 (4,)
    1.running_var 0 (4,)
    """
    network = plain_copy(model)
    # A copy for each run: a forward may keep things for the next one.
    recording = record(plain_copy(network), args, kwargs)
    try:
        trained = shapes_in_training(network, args, kwargs)
    except ModelError:  # it only evaluates, or needs more than this example there
        trained = None
    trial = _Trial(network, recording.trace, trained, (args, kwargs), _axes(recording))
    reasons = trial.refused([axis for axis in trial.axes if axis.frozen is None])
    return _together([replace(axis, frozen=reasons.get(axis, axis.frozen)) for axis in trial.axes])


def slice_(model: nn.Module, kept: Mapping[Axis, Sequence[int]]) -> Edit:
    """Keep some elements of axes, in all tensors and in what modules remember.

    The network computes what it would with the weights of all other elements at zero, but where
    a norm over the axis has fewer to average, and where a product of two activations over it
    would still meet what a function makes of zero. Parameters are new objects; an optimiser must be
    made anew. What is laid on a weight is sliced with it; statistics that it draws from the
    weight are from then on those of what is left.

    Args:
        model: the network that the axes were found in, or a copy; changed in place.
        kept: axis -> which elements, in the order in which they shall stand.

    Returns:
        The axes as they are now, so that they need not be found again.

    Raises:
        AxisError: an axis is frozen, stale or of another model; elements are none, out of range
            or repeated. The model is as before.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> hidden = find_axes(model, torch.ones(1, 2))[0]
    >>> _ = slice_(model, {hidden: [0, 2]})
    >>> model[0], model[2].weight.shape
    (Linear(in_features=2, out_features=2, bias=True), torch.Size([1, 2]))
    """
    selection = {axis: _elements(axis, indices) for axis, indices in kept.items()}
    for axis, indices in selection.items():
        if len(set(indices)) < len(indices):
            raise AxisError(f"{axis}: an element is kept twice; name each once, or use widen_")
    return _edit(model, selection)


def permute_(model: nn.Module, axis: Axis, order: Sequence[int]) -> Edit:
    """Put the elements of an axis in another order; the network computes the same.

    Args:
        model: the network, changed in place.
        axis: one of its axes.
        order: which element stands where: every one, once.

    Raises:
        AxisError: the axis is frozen or stale, or it is no order of its elements.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> hidden = find_axes(model, torch.ones(1, 2))[0]
    >>> before = model(torch.ones(1, 2))
    >>> _ = permute_(model, hidden, [1, 0])
    >>> torch.allclose(model(torch.ones(1, 2)), before)
    True
    """
    indices = _elements(axis, order)
    if sorted(indices) != list(range(axis.size)):
        raise AxisError(
            f"{axis} has the elements 0 to {axis.size - 1}; an order names every one, once"
        )
    return _edit(model, {axis: indices})


def widen_(model: nn.Module, axis: Axis, source: Sequence[int]) -> Edit:
    """Copy elements of an axis: new element j is like old element ``source[j]``.

    What reads the elements is divided by how many copies there are, so that the network computes
    the same (Chen et al. 2016, Net2Net, section 2.2). Not the same: a norm over the axis, unless
    each element has as many copies; a weight that is tied to an embedding.

    Args:
        model: the network, changed in place.
        axis: one of its axes.
        source: which old element each new one copies; every old one at least once.

    Raises:
        AxisError: the axis is frozen or stale, an element is left out or out of range, or what
            reads the axis cannot be divided: it is quantised, or no parameter (queries with keys).

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> hidden = find_axes(model, torch.ones(1, 2))[0]
    >>> before = model(torch.ones(1, 2))
    >>> _ = widen_(model, hidden, [0, 1, 1])
    >>> model[0].out_features, torch.allclose(model(torch.ones(1, 2)), before)
    (3, True)
    """
    indices = _elements(axis, source)
    copies = torch.bincount(torch.tensor(indices), minlength=axis.size)
    if not bool(copies.all()):
        missing = int((copies == 0).nonzero()[0])
        raise AxisError(f"{axis}: element {missing} has no copy; name it, or use slice_ first")
    check(model, [axis])
    if axis.matched:
        raise AxisError(
            f"{axis} cannot be widened: a product of what the forward computed, such as queries "
            "with keys, sums over it and would grow with the copies"
        )
    factors = {}
    for use in (use for use in axis.uses if use.consumed):
        laid, _ = latent_of(model, use.name)
        if laid is not None and not isinstance(laid.representation, Float):
            raise AxisError(
                f"{axis} cannot be widened: '{use.name}' is quantised, so it cannot be divided "
                "among copies; widen before quantising, or bake it"
            )
        factors[use.name, use.dim] = use.along(1 / copies, 1.0)
    return _edit(model, {axis: indices}, factors)


def sliced_shapes(
    model: nn.Module, kept: Mapping[Axis, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes that ``slice_`` would give to tensors, changing nothing.

    Args:
        model: the network.
        kept: axis -> which elements.

    Raises:
        AxisError: an axis is frozen or stale.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> sliced_shapes(model, {find_axes(model, torch.ones(1, 2))[0]: [1]})
    {'0.weight': (1, 2), '0.bias': (1,), '1.weight': (1, 1)}
    """
    check(model, list(kept))
    found: dict[str, list[int]] = {}
    for (name, dim), change in changes_of(kept).items():
        found.setdefault(name, list(latent_of(model, name)[1].shape))[dim] = change.size
    return {name: tuple(shape) for name, shape in found.items()}


def _elements(axis: Axis, indices: Sequence[int]) -> list[int]:
    numbers = [operator.index(index) for index in indices]
    if not numbers:
        raise AxisError(f"{axis}: no element is named; at least one must be left")
    wrong = [number for number in numbers if not 0 <= number < axis.size]
    if wrong:
        raise AxisError(f"{axis} has the elements 0 to {axis.size - 1}; {wrong[0]} is none of them")
    return numbers


def _edit(
    model: nn.Module,
    selection: Selection,
    factors: Mapping[tuple[str, int], Tensor] | None = None,
) -> Edit:
    check(model, list(selection))
    changes = select_(model, selection, factors)
    replaced = {}
    # Axes of one recording move together; those given that are of none stand for themselves.
    groups = {id(axis._found): axis._found.axes or [axis] for axis in selection}
    for axis in (axis for group in groups.values() for axis in group):
        uses = tuple(
            changes[use.name, use.dim].renewed(use) if (use.name, use.dim) in changes else use
            for use in axis.uses
        )
        replaced[axis] = replace(axis, size=len(selection.get(axis, range(axis.size))), uses=uses)
    axes = _together(list(replaced.values()))
    return Edit(axes, dict(zip(replaced, axes, strict=True)))


def _together(axes: Sequence[Axis]) -> list[Axis]:
    found = _Found()
    found.axes = [replace(axis, _found=found) for axis in axes]
    return found.axes


def _axes(recording: Recording) -> list[Axis]:
    """Return the axes of a recording, in the order of the tensors that they are found in."""
    dims = [(each, *found) for each in recording.tracked for found in enumerate(each.dims)]
    for *_, dim in dims:
        dim.parts()  # what this freezes must be frozen before an axis is made
    uses: dict[Atom, list[Use]] = {}
    for each, index, dim in dims:
        places = [
            Use(name, index, (), 0, consumed=dim.read and not dim.made) for name in each.names
        ]
        for atom, use in (found for place in places for found in _uses(place, dim.parts())):
            uses.setdefault(atom, []).append(use)
    return _together(
        [
            Axis(atom.size, _kind(atom.roles), tuple(found), atom.frozen, "matched" in atom.roles)
            for atom, found in uses.items()
            if atom.frozen != KERNEL
        ]
    )


def _uses(use: Use, terms: Sequence[Sequence[Atom]]) -> Iterator[tuple[Atom, Use]]:
    spans = [tuple(atom.size for atom in term) for term in terms]
    lengths = [int(torch.Size(sizes).numel()) for sizes in spans]
    for index, (sizes, term) in enumerate(zip(spans, terms, strict=True)):
        placed = replace(use, sizes=sizes, offset=sum(lengths[:index]), length=sum(lengths))
        for position, atom in enumerate(term):
            yield root(atom), replace(placed, position=position)


def _kind(roles: set[str]) -> str:
    ranked = (
        ("head", "head"),
        ("head_dim", "head_dim"),
        ("normed", "hidden"),
        ("channel", "channel"),
        ("residual", "hidden"),
        ("scaled", "hidden"),
    )
    for role, kind in ranked:
        if role in roles:
            return kind
    return "neuron" if {"made", "read"} <= roles else "other"


@dataclass(frozen=True)
class _Trial:
    """Runs a network with longer and with shorter axes, to see whether its code follows."""

    network: nn.Module
    trace: list[str]
    trained: list[torch.Size] | None
    called: tuple[tuple[Any, ...], dict[str, Any]]
    axes: list[Axis]

    def refused(self, axes: Sequence[Axis]) -> dict[Axis, str]:
        """Return the axes that cannot change, with the reason; halves are tried in turn."""
        why = self._why(axes) if axes else None
        if why is None:
            return {}
        if len(axes) == 1:
            return {axes[0]: why}
        ordered = sorted(axes, key=lambda axis: axis.kind)
        found: dict[Axis, str] = {}
        for half in (ordered[: len(axes) // 2], ordered[len(axes) // 2 :]):
            found |= self.refused(half)
        # What passes alone might not pass together.
        left = [axis for axis in axes if axis not in found]
        why = self._why(left) if left and found else why if left else None
        return found | (dict.fromkeys(left, why) if why is not None else {})

    def _why(self, axes: Sequence[Axis]) -> str | None:
        """Return why these cannot grow or shrink together, or None: they can."""
        longer: dict[Axis, Sequence[int]] = {}
        shorter: dict[Axis, Sequence[int]] = {}
        twins: Counter[int] = Counter()
        for axis in axes:
            # Those of one size by numbers that differ: code might need two of the same size.
            twins[axis.size] += 1
            longer[axis] = [*range(axis.size), *[0] * twins[axis.size]]
            # Not to one element, which is not told from a dimension of size 1.
            shorter[axis] = range(min(axis.size, 3 - twins[axis.size] % 2))
        return self._strays(longer) or self._strays(shorter)

    def _strays(self, selection: Selection) -> str | None:
        """Return where the forward does something else with these elements, or None."""
        network = plain_copy(self.network)
        try:
            edit = _edit(network, selection)
            trained = self.trained and shapes_in_training(network, *self.called)
            again = record(network, *self.called)
        except LaconicError as error:
            cause = error.__cause__ or error
            return f"the forward does not follow it: {type(cause).__name__}: {str(cause)[:SHOWN]}"
        for before, after in zip(self.trace, again.trace, strict=False):
            if before != after:
                return f"the forward does not follow it: {before[:SHOWN]} becomes {after[:SHOWN]}"
        if len(again.trace) != len(self.trace) or _axes(again) != edit.axes:
            return "the forward does not follow it: it reads a size that is written in its code"
        if trained != self.trained:
            return "an output in training mode"
        return None
