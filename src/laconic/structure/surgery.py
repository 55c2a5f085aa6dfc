"""Surgery: edits of a network by path, recorded as data so that a file can repeat them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.errors import ModelError, nearest
from laconic.models.attention import hand_on_padded_
from laconic.models.families import SHAPE_ATTRIBUTES, blocks_path, family_of
from laconic.models.layers import LARGEST, describe, layer
from laconic.models.load import builder_of
from laconic.models.notes import noted_on
from laconic.models.rounding import carry_
from laconic.names import ORIGINAL, joined, latent_name, of_laid, plain_name

__all__ = [
    "apply_edits_",
    "edits_of",
    "keep_",
    "replace_",
    "resize_",
    "set_attributes_",
]

SHOWN, LONGEST = 60, 300
# How torch's Transformer layer numbers its activations; 0 is any other.
FUSED = {nn.ReLU: 1, nn.GELU: 2}
OTHERWISE = "the network was edited otherwise already; build it again"
MOST_ELEMENTS = 1 << 60


def edits_of(model: nn.Module) -> dict[str, Any]:
    """Return what surgery changed in a network since it was built, as JSON-able data.

    Paths and names are those of the network as it is now:

    - ``lists``: path -> places in the list as it was built,
    - ``modules``: path -> description of what stands there instead,
    - ``attributes``: path -> name -> value,
    - ``shapes``: sorted names of the tensors that have another shape.

    Empty parts are left out; an unedited network has none.

    >>> edits_of(nn.Linear(2, 2))
    {}
    """
    return copy.deepcopy(dict(noted_on(model).get("edits", {})))


def replace_(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module where another stands, everywhere that one stands.

    The new module gets the mode of the old one and what rounds its input; edits below the old
    one are forgotten.

    Args:
        model: the network, changed in place.
        path: dotted, from the root.
        module: of layers that ``models.layers`` can describe.

    Raises:
        ModelError: nothing stands there, it is the root, or the module cannot be described.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> replace_(model, "1", nn.GELU())
    >>> edits_of(model)
    {'modules': {'1': {'GELU': {}}}}
    """
    old = _at(_index(model), path)
    if old is model:
        raise ModelError("the root of a network cannot be replaced; name a module below it")
    describe(module)
    records = _read(model)
    carry_(old, module)
    _put(_places(model)[old], module.train(old.training))
    hand_on_padded_(model, [module])
    records.modules[module] = {}
    _write(model, records, module)


def keep_(model: nn.Module, path: str, indices: Sequence[int]) -> None:
    """Keep some children of a list, in the order given, renumbered from zero.

    Children with names of their own (an ordered Sequential) keep them.

    Args:
        model: the network, changed in place.
        path: of a ModuleList or Sequential; the empty one is the root.
        indices: places in the list as it is now.

    Raises:
        ModelError: no list stands there, or the places are none of it, none at all or repeated.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 2))
    >>> keep_(model, "", [0, 1, 3])
    >>> len(model), edits_of(model)
    (3, {'lists': {'': [0, 1, 3]}})
    """
    kept = _list(_index(model), path)
    _check_indices(path, indices, len(kept))
    records = _read(model)
    before = records.lists.get(kept, list(range(len(kept))))
    records.lists[kept] = [before[index] for index in indices]
    _keep(kept, indices)
    _write(model, records, kept)


def set_attributes_(model: nn.Module, path: str, values: Mapping[str, int | Sequence[int]]) -> None:
    """Set what a module remembers of its tensors' shapes.

    Args:
        model: the network, changed in place.
        path: of the module.
        values: name -> number or numbers; the names are those of ``SHAPE_ATTRIBUTES`` alone, and
            the module must have them, of the same kind.

    Raises:
        ModelError: no such module or attribute, or a value of another kind or absurd.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> set_attributes_(model, "0", {"out_features": 1})
    >>> model[0].out_features
    1
    """
    module = _at(_index(model), path)
    for name, value in values.items():
        _check_attribute(path, module, name, value)
    edits = edits_of(model)
    attributes = edits.setdefault("attributes", {})
    for place in _paths(model)[module]:
        attributes[place] = attributes.get(place, {}) | {
            name: value if isinstance(value, int) else list(value) for name, value in values.items()
        }
    _set(module, values)
    _note(model, edits)


def resize_(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor of another size in the place of a parameter or buffer, in all its owners.

    The latent weight of a laid one is ``PATH.parametrizations.NAME.original``; it is recorded
    under its plain name, and what else is there (masks, tables) is not recorded.

    Args:
        model: the network, changed in place.
        name: dotted, from the root.
        tensor: of as many dimensions; copied.

    Raises:
        ModelError: no such tensor, or the new one has other dimensions, dtype or device.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> resize_(model, "0.weight", torch.zeros(1, 2))
    >>> model[0].weight.shape, edits_of(model)
    (torch.Size([1, 2]), {'shapes': ['0.weight']})
    """
    index = _index(model)
    old = _tensor(index, name)
    same = (tensor.dim(), tensor.dtype, tensor.device) == (old.dim(), old.dtype, old.device)
    if not same or not tensor.numel():
        raise ModelError(
            f"'{name}' is {old.dtype} with {old.dim()} dimensions on {old.device}; give another "
            f"such tensor with elements, not {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )
    owners = {
        joined(path, key): (owner, key)
        for path, owner in index.items()
        for key, held in _tensors(owner)
        if held is old
    }
    _install([*owners.values()], old, tensor.detach().clone())
    if tensor.shape == old.shape:
        return
    edits = edits_of(model)
    # What a representation keeps beside the weight is not there once it is baked.
    plain = {plain_name(name) for name in owners if not of_laid(name) or name.endswith(ORIGINAL)}
    edits["shapes"] = sorted({*edits.get("shapes", ()), *plain})
    _note(model, edits)


def apply_edits_(
    model: nn.Module, edits: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> None:
    """Repeat recorded edits on a network as it was built; resized tensors hold no numbers yet.

    Args:
        model: the network as its builder made it, changed in place; it may be on the meta device.
            What it carries of these edits already is left as it is.
        edits: what ``edits_of`` returned; of a network that had edits before, for one with these.
        shapes: name -> shape of at least the tensors in ``edits["shapes"]``.

    Raises:
        ModelError: it has other edits, or these do not fit it; it may be half edited then.

    >>> model, again = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    >>> resize_(model, "0.bias", torch.zeros(1))
    >>> apply_edits_(again, edits_of(model), {"0.bias": [1]})
    >>> again[0].bias.shape
    torch.Size([1])
    """
    before = edits_of(model)
    if before == edits:
        return
    wanted = copy.deepcopy(dict(edits))
    lists = wanted.get("lists", {})
    if before:
        before = _kept_further(model, before, lists)
        missing = {name for kind in before for name in set(before[kind]) - {*wanted.get(kind, ())}}
        # What was edited in a module that was replaced later is part of its description.
        if any(not _inside_any(name, wanted.get("modules", {})) for name in missing):
            raise ModelError(OTHERWISE)
    else:
        _apply_lists(model, lists)
    done, modules = before.get("modules", {}), wanted.get("modules", {})
    _apply_modules(model, {p: modules[p] for p in modules if modules[p] != done.get(p)})
    index = _index(model)
    for path, values in wanted.get("attributes", {}).items():
        module = _at(index, path)
        for name, value in values.items():
            _check_attribute(path, module, name, value)
        _set(module, values)
    _apply_shapes(model, wanted.get("shapes", ()), shapes)
    _note(model, wanted)


def _kept_further(
    model: nn.Module, before: Mapping[str, Any], lists: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Cut lists of an edited network down to these children; return its edits then."""
    for path in sorted(lists, key=_outer_first):
        there = before.get("lists", {}).get(path)
        children = range(len(_list(_index(model), path))) if there is None else there
        if not set(lists[path]) <= set(children):
            raise ModelError(OTHERWISE)
        places = [list(children).index(child) for child in lists[path]]
        if len(places) < len(children):
            keep_(model, path, places)
            before = edits_of(model)
    return dict(before)


def _outer_first(path: str) -> tuple[int, str]:
    return (path.count(".") + bool(path), path)


def _apply_lists(model: nn.Module, lists: Mapping[str, Sequence[int]]) -> None:
    # Outer lists first: the paths of inner ones are those of the network as it became.
    for path in sorted(lists, key=_outer_first):
        kept = _list(_index(model), path)
        _check_indices(path, lists[path], len(kept))
        _keep(kept, lists[path])


def _apply_modules(model: nn.Module, modules: Mapping[str, Any]) -> None:
    index, places = _index(model), _places(model)
    placed: dict[nn.Module, nn.Module] = {}
    for path, spec in modules.items():
        old = _at(index, path)
        # Tied modules are recorded under all their names.
        if old in placed:
            continue
        if old is model or any(other in placed for other in _above(index, path)):
            raise ModelError(f"'{path}' is the root or within a module that is replaced too")
        placed[old] = layer(spec).train(old.training)
        _put(places[old], placed[old])
    hand_on_padded_(model, placed.values())


def _above(index: Mapping[str, nn.Module], path: str) -> Iterator[nn.Module]:
    while path:
        path = path.rpartition(".")[0]
        yield index[path]


def _apply_shapes(
    model: nn.Module, names: Sequence[str], shapes: Mapping[str, Sequence[int]]
) -> None:
    index, owners = _index(model), _owners(model)
    for name in names:
        old, shape = _tensor(index, name), list(shapes.get(name, ()))
        fits = len(shape) == old.dim() and all(size >= 1 for size in shape)
        if not fits or math.prod(shape) >= MOST_ELEMENTS:
            raise ModelError(f"'{name}' {list(old.shape)} cannot be resized to {shape}"[:LONGEST])
        if list(old.shape) == shape:
            continue
        new = torch.empty(shape, dtype=old.dtype, device=old.device)
        found = owners[id(old)]
        installed = _install(found, old, new)
        owners[id(installed)] = found


@dataclass
class _Records:
    """Edits by the modules they are of, whatever their paths."""

    lists: dict[nn.Module, list[int]] = field(default_factory=dict)
    modules: dict[nn.Module, dict[str, Any]] = field(default_factory=dict)
    attributes: dict[nn.Module, dict[str, Any]] = field(default_factory=dict)
    shapes: list[tuple[nn.Module, str]] = field(default_factory=list)


def _read(model: nn.Module) -> _Records:
    """Return the recorded edits of a network, each with its module."""
    index, edits = _index(model), edits_of(model)
    split = [name.rpartition(".") for name in edits.get("shapes", ())]
    try:
        return _Records(
            {index[path]: kept for path, kept in edits.get("lists", {}).items()},
            {index[path]: spec for path, spec in edits.get("modules", {}).items()},
            {index[path]: values for path, values in edits.get("attributes", {}).items()},
            [(index[path], name) for path, _, name in split],
        )
    except KeyError as error:
        raise ModelError(
            f"{error} was edited and is gone; change the modules of an edited network through "
            "laconic.structure.surgery alone"
        ) from None


def _write(model: nn.Module, records: _Records, edited: nn.Module) -> None:
    """Record edits under the paths that their modules have now; forget what has gone.

    Of what was replaced before, only that is described anew in which a module was edited: all
    others are as they were described, but for attributes and shapes, which come after.
    """
    paths = _paths(model)
    replaced = {path: module for module in records.modules for path in paths.get(module, ())}
    outer = {path for path in replaced if not any(_within(path, other) for other in replaced)}
    for module in {replaced[path] for path in outer}:
        if any(part is edited for part in module.modules()):
            records.modules[module] = describe(module)
    lists: dict[str, list[int]] = {}
    for module, kept in records.lists.items():
        # What stands in a replaced module is part of its description.
        free = (
            path
            for path in paths.get(module, ())
            if path not in outer and not any(_within(path, other) for other in outer)
        )
        lists |= dict.fromkeys([*free][:1], kept)
    _note(
        model,
        {
            "lists": lists,
            "modules": {path: records.modules[replaced[path]] for path in outer},
            "attributes": {
                path: values
                for module, values in records.attributes.items()
                for path in paths.get(module, ())
            },
            "shapes": sorted(
                {
                    joined(path, name)
                    for module, name in records.shapes
                    for path in paths.get(module, ())
                }
            ),
        },
    )


def _inside_any(name: str, paths: Iterable[str]) -> bool:
    return any(name == path or _within(name, path) for path in paths)


def _within(path: str, other: str) -> bool:
    return path.startswith(f"{other}.")


def _note(model: nn.Module, edits: Mapping[str, Any]) -> None:
    ordered = {
        part: dict(sorted(edits[part].items())) if isinstance(edits[part], dict) else edits[part]
        for part in ("lists", "modules", "attributes", "shapes")
        if edits.get(part)
    }
    # The builder is noted now: a configuration may be changed later to fit what was edited.
    # nn.Module types its attributes as tensors or modules; this one is plain data.
    object.__setattr__(model, "laconic", {"builder": builder_of(model), "edits": ordered})
    _tell_depth(model, ordered.get("lists", {}))


def _tell_depth(model: nn.Module, lists: Mapping[str, Sequence[int]]) -> None:
    """Let the configuration say how many blocks there are, for whoever saves the network."""
    family = family_of(model)
    if family is None or not lists or blocks_path(model) not in lists:
        return
    for name in (name for name, kind in family.config.items() if kind == "layer"):
        setattr(model.config, name, len(lists[blocks_path(model)]))


def _index(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module by each of its paths; a property that returns one is no path."""
    return dict(model.named_modules(remove_duplicate=False))


def _paths(model: nn.Module) -> dict[nn.Module, list[str]]:
    found: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(path)
    return found


def _places(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Return every module with the parents that hold it, and as what."""
    found: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                found.setdefault(child, []).append((parent, name))
    return found


def _put(places: Sequence[tuple[nn.Module, str]], module: nn.Module) -> None:
    for parent, name in places:
        parent._modules[name] = module
        if name == "activation" and isinstance(parent, nn.TransformerEncoderLayer):
            # Its fused forward computes by number what its plain one calls.
            parent.activation_relu_or_gelu = next(
                (number for kind, number in FUSED.items() if isinstance(module, kind)), 0
            )


def _at(index: Mapping[str, nn.Module], path: str) -> nn.Module:
    if path not in index:
        word = path[:SHOWN]
        raise ModelError(f"the network has no module '{word}'{nearest(word, filter(None, index))}")
    return index[path]


def _list(index: Mapping[str, nn.Module], path: str) -> nn.ModuleList | nn.Sequential:
    module = _at(index, path)
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        raise ModelError(
            f"'{path}' is a {type(module).__name__}; only children of a ModuleList or a "
            "Sequential can be dropped"
        )
    return module


def _check_indices(path: str, indices: Sequence[int], size: int) -> None:
    whole = all(type(index) is int and 0 <= index < size for index in indices)
    if not indices or not whole or len(set(indices)) < len(indices):
        raise ModelError(
            f"'{path}' has the children 0 to {size - 1}; {list(indices)[:10]} cannot be kept: name "
            "at least one of them, none twice"
        )


def _keep(kept: nn.ModuleList | nn.Sequential, indices: Sequence[int]) -> None:
    children = list(kept._modules.items())
    numbered = [name for name, _ in children] == [str(place) for place in range(len(children))]
    kept._modules.clear()
    for place, index in enumerate(indices):
        name, child = children[index]
        kept._modules[str(place) if numbered else name] = child


def _check_attribute(path: str, module: nn.Module, name: str, value: Any) -> None:
    # Of the instance: a property of a class runs code.
    if name not in SHAPE_ATTRIBUTES or name not in vars(module):
        options = SHAPE_ATTRIBUTES & vars(module).keys()
        raise ModelError(
            f"'{path}' has no attribute '{name[:SHOWN]}' that may be set"
            f"{nearest(name[:SHOWN], options)}"
        )
    old = vars(module)[name]
    several = isinstance(value, list | tuple)
    numbers = value if several else [value]
    if isinstance(old, tuple):
        fits = several and len(numbers) == len(old)
    else:
        fits = not several and type(old) is int
    if not fits or not all(type(number) is int and 1 <= number <= LARGEST for number in numbers):
        raise ModelError(
            f"'{path}': {name} is {old!r} and cannot become {repr(value)[:SHOWN]}; give as many "
            f"whole numbers from 1 to {LARGEST}"
        )


def _set(module: nn.Module, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(module, name, value if isinstance(value, int) else tuple(value))


def _tensor(index: Mapping[str, nn.Module], name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    module = _at(index, path)
    if parametrize.is_parametrized(module, attribute):
        raise ModelError(
            f"'{name[:SHOWN]}' is laid; resize its latent weight "
            f"'{latent_name(joined(path, attribute))}', or bake it first"
        )
    found = dict(_tensors(module))
    if attribute not in found:
        word = attribute[:SHOWN]
        raise ModelError(f"'{path}' has no tensor '{word}'{nearest(word, found)}")
    return found[attribute]


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return who holds each tensor, by the identity of the tensor, and as what."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, tensor in _tensors(module):
            found.setdefault(id(tensor), []).append((module, name))
    return found


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    named = [*module._parameters.items(), *module._buffers.items()]
    return [(name, tensor) for name, tensor in named if tensor is not None]


def _install(owners: Sequence[tuple[nn.Module, str]], old: Tensor, new: Tensor) -> Tensor:
    made = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    for owner, name in owners:
        setattr(owner, name, made)
    return made
