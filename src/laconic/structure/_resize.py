"""Selecting elements of axes: indices of tensors, and the sizes that modules remember."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from laconic.errors import AxisError, ModelError
from laconic.names import latent_name
from laconic.structure._record import ATTRIBUTES
from laconic.structure.surgery import resize_, set_attributes_
from laconic.weights.laid import Laid, latent_of, swap_

if TYPE_CHECKING:
    from laconic.structure.axes import Axis, Use

__all__ = ["Change", "Changes", "Selection", "changes_of", "check", "select_"]

Selection = Mapping["Axis", Sequence[int]]
Value = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """A product of axes within a dimension, before and after."""

    offset: int
    before: tuple[int, ...]
    chosen: Mapping[int, Tensor]

    @property
    def after(self) -> tuple[int, ...]:
        """Return the sizes after."""
        return tuple(
            len(self.chosen[place]) if place in self.chosen else size
            for place, size in enumerate(self.before)
        )

    @property
    def end(self) -> int:
        """Return where it ended before."""
        return self.offset + math.prod(self.before)

    def index(self) -> Tensor:
        """Return which places are taken, in order."""
        block = torch.arange(self.offset, self.end).reshape(self.before)
        for place, chosen in self.chosen.items():
            block = block.index_select(place, chosen)
        return block.flatten()


@dataclasses.dataclass(frozen=True)
class Change:
    """What becomes of one dimension of a tensor."""

    length: int
    parts: tuple[Part, ...]

    def index(self) -> Tensor:
        """Return the old place of every new one [new length]."""
        pieces, start = [], 0
        for part in self.parts:
            pieces += [torch.arange(start, part.offset), part.index()]
            start = part.end
        return torch.cat([*pieces, torch.arange(start, self.length)])

    @property
    def size(self) -> int:
        """Return the new length."""
        grown = sum(math.prod(part.after) - math.prod(part.before) for part in self.parts)
        return self.length + grown

    def outer(self, count: int) -> int:
        """Return how many groups there are now, of the ``count`` that the dimension was."""
        if count == 1:
            return 1
        each, rest, total = self.length // count, self.length, 0
        for part in self.parts:
            rest -= math.prod(part.before)
            place = len(part.before)
            while math.prod(part.before[place:]) < each:
                place -= 1
            total += math.prod(part.after[:place])
        return total + rest // each

    def renewed(self, use: Use) -> Use:
        """Return a use of this dimension as it is afterwards."""
        offset, sizes = use.offset, use.sizes
        for part in self.parts:
            if part.offset < use.offset:
                offset += math.prod(part.after) - math.prod(part.before)
            elif part.offset == use.offset:
                sizes = part.after
        return dataclasses.replace(use, offset=offset, sizes=sizes, length=self.size)


Changes = dict[tuple[str, int], Change]


def changes_of(selection: Selection) -> Changes:
    """Return what becomes of every dimension that an axis is a part of."""
    found: dict[tuple[str, int], dict[tuple[int, tuple[int, ...]], dict[int, Tensor]]] = {}
    lengths = {}
    for axis, chosen in selection.items():
        index = torch.tensor(list(chosen))
        for use in axis.uses:
            lengths[use.name, use.dim] = use.length
            parts = found.setdefault((use.name, use.dim), {})
            parts.setdefault((use.offset, use.sizes), {})[use.position] = index
    return {
        key: Change(lengths[key], tuple(Part(*each, parts[each]) for each in sorted(parts)))
        for key, parts in found.items()
    }


def check(model: nn.Module, axes: Sequence[Axis]) -> None:
    """Refuse axes that are frozen, stale or of another model.

    Raises:
        AxisError: says which and why.
    """
    for axis in axes:
        if axis.frozen is not None:
            raise AxisError(f"{axis} is frozen: {axis.frozen}; choose another axis")
        for use in axis.uses:
            try:
                shape = latent_of(model, use.name)[1].shape
            except ModelError as error:
                raise AxisError(f"{axis} is of another model: {error}") from None
            stale = use.dim >= len(shape) or shape[use.dim] != use.length
            if stale or use.sizes[use.position] != axis.size:
                raise AxisError(
                    f"{axis} is stale: '{use.name}' is {list(shape)}, and its dimension {use.dim} "
                    f"was {use.length}; use Edit.axes, or find the axes again"
                )


def select_(
    model: nn.Module,
    selection: Selection,
    factors: Mapping[tuple[str, int], Tensor] | None = None,
) -> Changes:
    """Take elements of axes, again and in any order; set what modules remember of sizes.

    Args:
        model: the network, changed in place.
        selection: axis -> the elements.
        factors: (name, dimension) -> what the numbers there are multiplied with first.

    Raises:
        AxisError: what is laid on a weight cannot follow; the network is as before.
    """
    changes = changes_of(selection)
    attributes = _attributes(model, selection, changes)
    new, seen = {}, set()
    for name in dict.fromkeys(name for name, _ in changes):
        layer, tensor = latent_of(model, name)
        if id(tensor) not in seen:  # a tied one is resized under its first name
            seen.add(id(tensor))
            dims = {dim: change.index() for (each, dim), change in changes.items() if each == name}
            scaled = _scaled(tensor, {dim: (factors or {}).get((name, dim)) for dim in dims})
            new[name] = _selected(name, scaled, layer, dims)
    for name, (tensor, layer) in new.items():
        resize_(model, name if layer is None else latent_name(name), tensor)
        if layer is not None:
            swap_(model, name, layer)
    for path, values in attributes.items():
        set_attributes_(model, path, values)
    return changes


def _scaled(tensor: Tensor, factors: Mapping[int, Tensor | None]) -> Tensor:
    for dim, factor in factors.items():
        if factor is not None:
            shape = [-1 if place == dim else 1 for place in range(tensor.dim())]
            tensor = tensor.detach() * factor.to(tensor).reshape(shape)
    return tensor.detach()


def _selected(
    name: str, tensor: Tensor, layer: Laid | None, dims: Mapping[int, Tensor]
) -> tuple[Tensor, Laid | None]:
    try:
        for dim, index in dims.items():
            index = index.to(tensor.device)
            layer = layer and layer.sliced(dim, index, tensor)
            tensor = tensor.index_select(dim, index)
        if layer is not None:
            layer.encode(tensor)  # refused before the model changes
    except ModelError as error:
        raise AxisError(
            f"what is laid on '{name}' does not fit {list(tensor.shape)}: {error}; bake it first, "
            "or keep another number"
        ) from error
    return tensor, layer


# ------------------------------------------------------------ what modules remember


def _attributes(
    model: nn.Module, selection: Selection, changes: Changes
) -> dict[str, dict[str, Value]]:
    """Return path -> name -> new value."""
    by_module: dict[str, dict[tuple[str, int], Change]] = {}
    for (name, dim), change in changes.items():
        path, _, attribute = name.rpartition(".")
        by_module.setdefault(path, {})[attribute, dim] = change
    found: dict[str, dict[str, Value]] = {}
    for path, tensors in by_module.items():
        module = model.get_submodule(path)
        for kind, sizes in SIZES:
            if isinstance(module, kind):
                found.setdefault(path, {}).update(sizes(module, tensors))
    for path, name, value in _counted(model, selection, changes):
        found.setdefault(path, {})[name] = value
    return {path: values for path, values in found.items() if values}


Tensors = Mapping[tuple[str, int], Change]
Sizes = Callable[[nn.Module, Tensors], dict[str, Value]]


def _named(
    names: Mapping[tuple[str, int], str],
) -> Callable[[nn.Module, Tensors], dict[str, Value]]:
    """Return a function that tells which attributes hold the sizes of which dimensions."""

    def sizes(module: nn.Module, tensors: Tensors) -> dict[str, Value]:
        return {names[key]: change.size for key, change in tensors.items() if key in names}

    return sizes


def _convolution(module: nn.Module, tensors: Tensors) -> dict[str, Value]:
    made, read = tensors.get(("weight", 0)), tensors.get(("weight", 1))
    old = vars(module)
    if old["transposed"]:
        made, read = read, made
    groups = old["groups"] if made is None else made.outer(old["groups"])
    each = old["in_channels"] // old["groups"] if read is None else read.size
    outputs = old["out_channels"] if made is None else made.size
    return {"groups": groups, "in_channels": groups * each, "out_channels": outputs}


def _layer_norm(module: nn.Module, tensors: Tensors) -> dict[str, Value]:
    shape = list(vars(module)["normalized_shape"])
    for (_, dim), change in tensors.items():
        shape[dim] = change.size
    return {"normalized_shape": tuple(shape)}


def _group_norm(module: nn.Module, tensors: Tensors) -> dict[str, Value]:
    change = next(iter(tensors.values()))
    return {"num_channels": change.size, "num_groups": change.outer(vars(module)["num_groups"])}


SIZES: tuple[tuple[type[nn.Module], Sizes], ...] = (
    (nn.Linear, _named({("weight", 0): "out_features", ("weight", 1): "in_features"})),
    (nn.Embedding, _named({("weight", 0): "num_embeddings", ("weight", 1): "embedding_dim"})),
    (nn.RNNBase, _named({("weight_ih_l0", 1): "input_size"})),
    (_NormBase, _named({("weight", 0): "num_features", ("running_mean", 0): "num_features"})),
    (_ConvNd, _convolution),
    (nn.LayerNorm, _layer_norm),
    (nn.RMSNorm, _layer_norm),
    (nn.GroupNorm, _group_norm),
)


def _counted(
    model: nn.Module, selection: Selection, changes: Changes
) -> Iterator[tuple[str, str, int]]:
    """Yield path, name and value of what families' forwards read: heads and their sizes."""
    heads = (axis for axis in selection if axis.kind in ("head", "head_dim"))
    for axis, use in ((head, use) for head in heads for use in head.uses):
        parts = changes[use.name, use.dim].parts
        part = next(part for part in parts if part.offset == use.offset)
        path, values = _reader(model, use.name)
        for name, value in values.items():
            if ATTRIBUTES[name] == axis.kind and value == axis.size:
                yield path, name, len(selection[axis])
            elif "*" in ATTRIBUTES[name] and value == math.prod(part.before):
                yield path, name, math.prod(part.after)


def _reader(model: nn.Module, name: str) -> tuple[str, dict[str, int]]:
    """Return the module nearest to a tensor that counts heads, and these attributes."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        held = vars(model.get_submodule(path))
        values = {name: held[name] for name in ATTRIBUTES if type(held.get(name)) is int}
        if values:
            return path, values
    return path, {}
