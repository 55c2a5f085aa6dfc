"""Laid: the one parametrization that puts a representation and a mask on a weight."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from itertools import product
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves

from laconic.errors import ModelError, nearest
from laconic.names import joined, of_laid
from laconic.scope import KINDS, Scope
from laconic.weights.representation import Codes, Float, Representation, ste

if TYPE_CHECKING:
    from laconic.weights.noise import QuantNoise

__all__ = [
    "Laid",
    "as_stored",
    "bake",
    "baked",
    "check_table",
    "is_stored",
    "laid_tensors",
    "latent_of",
    "lay",
    "lay_each",
    "mask_of",
    "narrow",
    "owner",
    "shifts_of",
    "swap_",
    "tie_",
    "ties_of",
    "weights_of",
    "without_padding",
]

# Hooks by which torch makes a weight from other tensors -> what in them says which, what ends it.
HOOKED: dict[type, tuple[str, str]] = {
    WeightNorm: ("name", "torch.nn.utils.remove_weight_norm(layer)"),
    SpectralNorm: ("name", "torch.nn.utils.remove_spectral_norm(layer)"),
    BasePruningMethod: ("_tensor_name", "torch.nn.utils.prune.remove(layer, 'weight')"),
}


class Laid(nn.Module):
    """A weight's representation in training: mask, learned tables, fixed assignments.

    The forward of a weight ``w`` is ``ste(decode(encode(w)), surrogate(w))`` and, last, zero
    where the mask is False, so a pruned weight never revives. It changes only through
    ``update`` (after an optimiser step) and the optimiser itself (learned tables).

    Attributes:
        quant_noise: in training, which blocks alone are quantised; set by that step, never stored.

    >>> Laid(Float(), mask=torch.tensor([True, False]))(torch.tensor([1.0, 2.0]))
    tensor([1., 0.])
    >>> Laid(Float(), mask=torch.tensor([True, False]))
    Laid(Float(), keep=0.5)
    """

    mask: Tensor | None
    quant_noise: QuantNoise | None = None

    def __init__(
        self,
        representation: Representation,
        mask: Tensor | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.representation = representation
        self.register_buffer("mask", None if mask is None else mask.clone())
        self.names = tuple(state or {})
        for name, tensor in (state or {}).items():
            if name in representation.learned:
                self.register_parameter(name, nn.Parameter(tensor.clone()))
            else:
                self.register_buffer(name, tensor.clone())

    @property
    def state(self) -> dict[str, Tensor]:
        """Return the tensors encoding needs besides the weight."""
        return {name: getattr(self, name) for name in self.names}

    def extra_repr(self) -> str:
        """Return what ``print`` shows of it: the representation, and how much is masked."""
        if self.mask is None:
            return repr(self.representation)
        return f"{self.representation!r}, keep={self.mask.float().mean():.4g}"

    def forward(self, weight: Tensor) -> Tensor:
        """Return the shipped weight, with a straight-through gradient."""
        state = self.state
        with torch.no_grad():
            decoded = self.representation.quantized(weight.detach(), self.mask, state)
        surrogate = self.representation.surrogate(weight, state)
        if self.quant_noise is not None and self.training:
            decoded, surrogate = self.quant_noise.mixed(weight, decoded, surrogate)
        value = ste(decoded, surrogate)
        if self.mask is not None:
            # A factor takes a third of the time of a choice; what it makes of -1 is -0.0.
            value = value.mul(self.mask).add_(0.0)
        if torch.is_grad_enabled():
            return value
        # As bake leaves it: which kernel torch takes, and so the last bit of what is computed,
        # depends on the layout of a weight, and on whether it is learned, here too.
        same = value.stride() == weight.stride()
        value = value.detach() if same else torch.empty_like(weight).copy_(value)
        # Not under autocast, which keeps what it casts of a weight that is learned.
        cast = torch.is_autocast_enabled(weight.device.type)
        return value.requires_grad_(weight.requires_grad and not cast)

    def encode(self, weight: Tensor) -> Codes:
        """Return the codes that are shipped for this latent weight."""
        with torch.no_grad():
            return self.representation.encode(weight, mask=self.mask, state=self.state)

    def update(self, curvature: Tensor | None = None) -> None:
        """Advance what changes with every optimiser step.

        Args:
            curvature: of the loss, for a representation that needs it [shape of the weight];
                None: what is known of it stays.
        """
        with torch.no_grad():
            if curvature is not None:
                self.state["curvature"].copy_(curvature)
            self.representation.update(self.state)

    def sliced(self, dim: int, index: Tensor, weight: Tensor) -> Laid:
        """Return what is laid on ``weight.index_select(dim, index)``.

        Masks, assignments and the tables of rows are sliced with the weight. Where its groups
        do not fall on groups, what was learned of them is fitted anew. A codebook stays.

        Args:
            dim: of the weight.
            index: int64 [new size], places along it; some may be left out, or repeated.
            weight: latent, before it is sliced [any shape].

        Raises:
            ModelError: the granularity does not divide what is left.

        >>> laid = Laid(Float(), mask=torch.tensor([[True, False, True]]))
        >>> laid.sliced(1, torch.tensor([2, 1]), torch.ones(1, 3)).mask
        tensor([[ True, False]])
        """
        mask = None if self.mask is None else self.mask.index_select(dim, index)
        with torch.no_grad():
            state = self.representation.sliced(self.state, dim, index, weight.detach(), mask)
        found = Laid(self.representation, mask, state)
        found.learns(all(table.requires_grad for table in self.parameters()))
        return found

    def learns(self, really: bool) -> None:
        """Let learned tables be trained; those of a frozen weight are frozen too."""
        for table in self.parameters():
            table.requires_grad_(really)


def owner(model: nn.Module, tensor: str) -> tuple[nn.Module, str]:
    """Return the module that owns a dotted tensor name, and the attribute.

    Raises:
        ModelError: there is no such tensor; the nearest name is given.
    """
    path, _, attribute = tensor.rpartition(".")
    try:
        module = model.get_submodule(path)
        found = getattr(module, attribute)
    except AttributeError:
        found = None
    if not isinstance(found, Tensor):
        names = [*dict(model.named_parameters()), *laid_tensors(model)]
        raise ModelError(f"the model has no weight '{tensor}'{nearest(tensor, names)}") from None
    return module, attribute


def latent_of(model: nn.Module, tensor: str) -> tuple[Laid | None, Tensor]:
    """Return what is laid on a parameter or buffer, and the numbers below it.

    Args:
        model: the network.
        tensor: dotted name, as in the baked network.

    Raises:
        ModelError: there is no such tensor, or something else than laconic's is laid on it.

    >>> model = nn.Sequential(nn.Linear(2, 3))
    >>> latent_of(model, "0.weight")[1] is model[0].weight
    True
    """
    path, _, attribute = tensor.rpartition(".")
    try:
        module = model.get_submodule(path)
        found = _laid(module, attribute)
        plain = getattr(module, attribute) if found is None else found[1]
    except AttributeError:
        plain = None
    if not isinstance(plain, Tensor):
        raise ModelError(f"the model has no tensor '{tensor}'")
    return (None, plain) if found is None else found


def laid_tensors(model: nn.Module) -> dict[str, tuple[Laid, Tensor]]:
    """Return every laid tensor by its dotted name, with its latent weight."""
    found = {}
    for path, module in model.named_modules():
        for attribute, layers in _parametrizations(module).items():
            if isinstance(layers[0], Laid):
                name = joined(path, attribute)
                found[name] = (layers[0], layers.original)
    return found


def weights_of(model: nn.Module, scope: Scope) -> dict[str, Tensor]:
    """Return the matrices and kernels of a scope by dotted name, as the network uses them.

    One that holds no numbers is left out, and so are biases and norms of any shape. A parameter
    shared by several modules appears once, under its first name. Those of one module are sorted
    by name: laying moves them about, and a ranking breaks ties by order.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in scope.select(model).items():
        for attribute, latent in sorted(_parameters(module), key=lambda named: named[0]):
            matrix = latent.dim() >= 2 and latent.numel() and not _shifts(module, attribute)
            if matrix and id(latent) not in seen:
                seen.add(id(latent))
                found[joined(path, attribute)] = getattr(module, attribute)
    return found


def shifts_of(model: nn.Module) -> set[Tensor]:
    """Return the biases and what norms learn, of any shape: they only shift and scale.

    >>> len(shifts_of(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm([2, 2]))))
    3
    """
    return {
        latent
        for module in model.modules()
        for attribute, latent in _parameters(module)
        if _shifts(module, attribute)
    }


def _shifts(module: nn.Module, attribute: str) -> bool:
    return isinstance(module, KINDS["norm"]) or attribute.startswith("bias")


def ties_of(model: nn.Module) -> dict[str, str]:
    """Return name -> first name of every parameter that has several, laid or not.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    >>> tie_(model, {"1.weight": "0.weight"})
    >>> ties_of(model)
    {'1.weight': '0.weight'}
    """
    first: dict[int, str] = {}
    ties = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if of_laid(path):
            continue  # what is in there has a plain name
        for attribute, parameter in sorted(_parameters(module), key=lambda named: named[0]):
            name = joined(path, attribute)
            kept = first.setdefault(id(parameter), name)
            if kept != name:
                ties[name] = kept
    return ties


def tie_(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Let each parameter be the same as another one, in a network without laid weights.

    Args:
        model: the network, changed in place.
        ties: dotted name -> name of the parameter that takes its place.

    Raises:
        ModelError: there is no such parameter.
    """
    for name, first in ties.items():
        module, attribute = owner(model, name)
        module.register_parameter(attribute, getattr(*owner(model, first)))


def _parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    for attribute, layers in _parametrizations(module).items():
        # Several for some parametrizations that are not ours (weight norm).
        yield from ((attribute, original) for original in layers.parameters(recurse=False))


def _parametrizations(
    module: nn.Module,
) -> MutableMapping[str, parametrize.ParametrizationList]:
    if not parametrize.is_parametrized(module):
        return {}
    # Torch types every attribute of a module as a tensor or a module.
    return cast("MutableMapping[str, parametrize.ParametrizationList]", module.parametrizations)


def copied(model: nn.Module, shared: Mapping[int, Any] | None = None) -> nn.Module:
    """Return a copy of a network, laid or not, whatever was computed with it and is kept in it.

    Args:
        model: the network, or a part of it.
        shared: id of a tensor -> what stands for it in the copy; all else is copied.

    >>> model = nn.LSTM(2, 2)
    >>> lay(model, "weight_hh_l0", Float())
    >>> loss = model(torch.zeros(1, 2))[0].sum()  # torch keeps the decoded weight and its graph
    >>> list(laid_tensors(copied(model)))
    ['weight_hh_l0']
    """
    held = (each for module in model.modules() for each in tree_leaves(vars(module)))
    computed = [each for each in held if isinstance(each, Tensor) and not each.is_leaf]
    cut = {id(each): each.detach().clone() for each in computed}  # torch copies no graph
    return copy.deepcopy(model, cut | dict(shared or {}))


def owners_of(model: nn.Module, parameter: Tensor) -> list[str]:
    """Return every plain name of a parameter, laid or not.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> tie_(model, {"1.weight": "0.weight"})
    >>> owners_of(model, model[0].weight)
    ['0.weight', '1.weight']
    """
    return [
        joined(path, name)
        for path, module in model.named_modules()
        if not of_laid(path)
        for name, tensor in _parameters(module)
        if tensor is parameter
    ]


def mask_of(model: nn.Module, tensor: str) -> Tensor | None:
    """Return the mask of a weight [its shape], or None."""
    module, attribute = owner(model, tensor)
    found = _laid(module, attribute)
    return found[0].mask if found is not None else None


def _refuse_hooked(module: nn.Module, attribute: str) -> None:
    """Refuse a tensor that is part of what one of torch's hooks makes a weight from."""
    hooks = module._forward_pre_hooks.values()
    for hook, (kind, (named, remedy)) in product(hooks, HOOKED.items()):
        made = getattr(hook, named) if isinstance(hook, kind) else None
        if made and (attribute == made or attribute.startswith(f"{made}_")):
            raise ModelError(
                f"'{attribute}' of a {type(module).__name__}: its '{made}' is made anew in every "
                f"forward ({type(hook).__name__}); call {remedy} before"
            )


def _laid(module: nn.Module, attribute: str) -> tuple[Laid, nn.Parameter] | None:
    """Return what is laid on a tensor, and the latent weight."""
    _refuse_hooked(module, attribute)
    parametrizations = _parametrizations(module)
    if attribute not in parametrizations:
        return None
    layers = parametrizations[attribute]
    laid = layers[0]
    if len(layers) != 1 or not isinstance(laid, Laid):
        kind = parametrize.type_before_parametrizations(module).__name__
        raise ModelError(
            f"'{attribute}' of a {kind} carries a parametrization that is not laconic's "
            f"({type(laid).__name__}); call "
            f"torch.nn.utils.parametrize.remove_parametrizations(layer, '{attribute}') before"
        )
    return laid, cast("nn.Parameter", layers.original)


@torch.inference_mode(False)  # what is made here is trained later
def lay(
    model: nn.Module,
    tensor: str,
    representation: Representation | str | Mapping[str, Any],
    *,
    mask: Tensor | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Put a representation on a weight for training, on every owner of the parameter.

    Laying again starts from the value the network computes now and keeps the mask.

    Args:
        model: the network, changed in place.
        tensor: dotted name of the weight from the root.
        representation: how its numbers are stored from now on; or what a recipe writes for it.
        mask: bool [shape of the weight]; True survives. None keeps the mask it has.
        state: what the representation has learned so far; None fits it to the weight.

    Raises:
        ModelError: no such weight, or it is not a finite floating-point tensor.
        RecipeError: no such representation, or its fields are wrong.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> lay(model, "0.weight", Float(), mask=torch.eye(2).bool())
    >>> int((model[0].weight != 0).sum())
    2
    """
    representation = Representation.understood(representation)
    module, attribute = owner(model, tensor)
    latent = dict(_parameters(module)).get(attribute)
    if latent is None:
        raise ModelError(
            f"'{tensor}' is no parameter, but a buffer or computed from others (weight_norm); "
            "only parameters can be represented otherwise"
        )
    current = getattr(module, attribute).detach().clone()
    _check(tensor, current, mask)
    check_table(model, tensor)
    mask = mask_of(model, tensor) if mask is None else mask
    if state is None:
        state = representation.fit(current, mask)
    laid = Laid(representation, mask, state)
    laid.learns(latent.requires_grad)
    # What does not fit this weight is refused before the model changes.
    if not bool(torch.isfinite(representation.decode(laid.encode(current))).all()):
        raise ModelError(
            f"'{tensor}' becomes NaN or infinity as {representation!r}: {current.dtype} is too "
            "narrow for sums over its numbers; scale it, or compress the network in float32"
        )
    for holder, name in _plain_owners(model, module, attribute, current):
        if parametrize.is_parametrized(holder):
            _separate(holder, name)
        parametrize.register_parametrization(holder, name, laid, unsafe=True)


def check_table(model: nn.Module, tensor: str) -> None:
    """Refuse a table of embeddings on which nothing can be laid.

    Args:
        model: the network.
        tensor: dotted name of a weight.

    Raises:
        ModelError: its module has a max_norm, or sparse gradients.

    >>> check_table(nn.Embedding(2, 2), "weight")
    """
    module, _ = owner(model, tensor)
    if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return
    if module.max_norm is not None:
        raise ModelError(
            f"'{tensor}': max_norm changes rows in place when they are looked up, which what is "
            "laid on them cannot follow; set max_norm = None, or leave it out of the scope"
        )
    if module.sparse:
        raise ModelError(
            f"'{tensor}': sparse gradients cannot flow through what is laid on it; set sparse = "
            "False, which computes the same, or leave it out of the scope"
        )


def lay_each(
    model: nn.Module, weights: Mapping[str, Tensor], representation: Representation
) -> None:
    """Lay a representation on several weights, the choices that they share made over all.

    A row of a table that pads stays zero: it is masked where codes would make something of it.

    Args:
        model: the network, changed in place.
        weights: dotted name -> what the network uses.
        representation: how they are stored from now on.

    >>> from laconic.weights import FixedPoint
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> lay_each(model, weights_of(model, Scope("*")), FixedPoint(4))
    >>> len({layer.representation for layer, _ in laid_tensors(model).values()})
    1
    """
    survivors = {name: weight.detach().flatten() for name, weight in weights.items()}
    for name in weights:
        mask = mask_of(model, name)
        if mask is not None:
            survivors[name] = weights[name].detach()[mask]
    for name, resolved in representation.resolve(survivors).items():
        lay(model, name, resolved, mask=without_padding(model, name, resolved))


def without_padding(model: nn.Module, tensor: str, representation: Representation) -> Tensor | None:
    """Return the mask of a table without its padding row, if codes would make that other than 0.

    Args:
        model: the network.
        tensor: dotted name of the table, or of any other weight, which has no such row.
        representation: what is to be laid on it.

    >>> from laconic.weights import Binary
    >>> table = nn.Sequential(nn.Embedding(3, 2, padding_idx=0))
    >>> without_padding(table, "0.weight", Binary("tensor"))[:2].tolist()
    [[False, False], [True, True]]
    """
    module, attribute = owner(model, tensor)
    table, mask = getattr(module, attribute).detach(), mask_of(model, tensor)
    names = owners_of(model, dict(_parameters(module))[attribute])
    if table.is_meta:
        return None  # whether such a row is zero is not known
    padding = [getattr(owner(model, name)[0], "padding_idx", None) for name in names]
    rows = [row for row in padding if row is not None and not bool(table[row].any())]
    if not rows:
        return None
    decoded = representation.decode(
        representation.encode(table, mask=mask, state=representation.fit(table, mask))
    )
    if not bool(decoded[rows].any()):
        return None
    rest = torch.ones_like(table, dtype=torch.bool) if mask is None else mask.clone()
    rest[rows] = False
    return rest


def narrow(model: nn.Module, tensor: str, mask: Tensor) -> None:
    """Give a weight this mask, keeping its representation and what that has learned.

    Args:
        model: the network, changed in place.
        tensor: dotted name of the weight.
        mask: bool [shape of the weight].

    Raises:
        ModelError: no such weight, or the mask is not a bool of its shape.
    """
    module, attribute = owner(model, tensor)
    found = _laid(module, attribute)
    if found is None:
        lay(model, tensor, Float(), mask=mask)
        return
    laid, latent = found
    _check(tensor, latent, mask)
    if laid.mask is None:
        laid.mask = mask.clone()
    else:
        laid.mask.copy_(mask)


def swap_(model: nn.Module, tensor: str, laid: Laid) -> None:
    """Lay this instead of what is laid on a weight, on every owner; the latent stays.

    Args:
        model: the network, changed in place.
        tensor: dotted name of a laid weight.
        laid: what fits its latent weight.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> lay(model, "0.weight", Float())
    >>> swap_(model, "0.weight", Laid(Float(), mask=torch.zeros(2, 2).bool()))
    >>> int(model[0].weight.count_nonzero())
    0
    """
    old, _ = latent_of(model, tensor)
    for module in model.modules():
        for layers in _parametrizations(module).values():
            if layers[0] is old:
                layers[0] = laid


def bake(model: nn.Module, tensor: str | None = None) -> None:
    """Replace laid representations by the plain numbers they stand for.

    Our own, because removing torch's parametrization from a deep copy breaks the original.

    Args:
        model: the network, changed in place.
        tensor: dotted name of one weight; None bakes all.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> lay(model, "0.weight", Float(), mask=torch.eye(2).bool())
    >>> bake(model)
    >>> list(laid_tensors(model)), int((model[0].weight != 0).sum())
    ([], 2)
    """
    for name in [tensor] if tensor is not None else list(laid_tensors(model)):
        module, attribute = owner(model, name)
        if not parametrize.is_parametrized(module, attribute):
            continue  # a tied owner was baked with the first one
        _plain_owners(model, module, attribute, getattr(module, attribute).detach().clone())


def as_stored(model: nn.Module) -> nn.Module:
    """Return a network, its numbers in the order of a file's: sums over them depend on it.

    Args:
        model: changed in place.

    >>> layer = nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)
    >>> as_stored(layer).weight.stride()
    (18, 9, 3, 1)
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if not is_stored(tensor):
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return model


def is_stored(tensor: Tensor) -> bool:
    """Return whether numbers lie in the order of a file's; sparse ones have no order.

    Not as is_contiguous: convolutions read the layout off the strides of dimensions of one too.

    >>> is_stored(torch.ones(2, 3)), is_stored(torch.ones(2, 3).t())
    (True, False)
    """
    plain = torch.empty(tensor.shape, device="meta").stride()
    return tensor.layout is not torch.strided or tensor.stride() == plain


def baked(model: nn.Module) -> nn.Module:
    """Return an independent copy of a network with plain weights, equal bit for bit.

    >>> bool((baked(model := nn.Linear(2, 2)).weight == model.weight).all())
    True
    """
    network = copied(model)
    bake(network)
    return network


def _plain_owners(
    model: nn.Module, module: nn.Module, attribute: str, value: Tensor
) -> list[tuple[nn.Module, str]]:
    """Set a parameter to a value, plain, in every owner; return the owners.

    The parameter stays the same object: an optimiser at work goes on moving it.
    """
    latent = dict(_parameters(module))[attribute]
    owners = [owner(model, name) for name in owners_of(model, latent)]
    with torch.no_grad():
        latent.copy_(value)
    for holder, name in owners:
        _unlay(holder, name)
    return owners


def _unlay(module: nn.Module, attribute: str) -> None:
    found = _laid(module, attribute)
    if found is None:
        return
    _, latent = found
    # Asked before the deletion: torch does not see a parametrized class without any left.
    plain = parametrize.type_before_parametrizations(module)
    parametrizations = _parametrizations(module)
    del parametrizations[attribute]
    if parametrizations:
        _separate(module, attribute)
    else:
        module.__class__ = plain
        del module.parametrizations
    module.register_parameter(attribute, latent)


def _separate(module: nn.Module, attribute: str) -> None:
    # Deep copies share the class torch injects: a property added to or removed from it for one
    # would change them all. So a module gets a class of its own, without this attribute's.
    shared = type(module)
    names = {name: value for name, value in vars(shared).items() if name != attribute}
    module.__class__ = type(shared.__name__, shared.__bases__, names)


def _check(tensor: str, weight: Tensor, mask: Tensor | None) -> None:
    if not weight.dim() or not weight.numel():
        raise ModelError(
            f"'{tensor}' has the shape {tuple(weight.shape)}; only what has rows of numbers can be "
            "represented"
        )
    if not weight.is_floating_point() or not bool(torch.isfinite(weight).all()):
        raise ModelError(f"'{tensor}' holds NaN, infinity or integers; nothing can represent it")
    if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool):
        raise ModelError(
            f"the mask of '{tensor}' is {mask.dtype} {tuple(mask.shape)}, "
            f"the weight {tuple(weight.shape)}; give a bool mask of its shape"
        )
