"""Laid: the one parametrization that puts a representation and a mask on a weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.errors import ModelError, nearest
from laconic.scope import Scope
from laconic.weights.representation import Codes, Float, Representation, masked, ste

__all__ = ["Laid", "bake", "laid_tensors", "lay", "mask_of", "narrow", "owner", "weights_of"]


class Laid(nn.Module):
    """A weight's representation in training: mask, learned tables, fixed assignments.

    The forward of a weight ``w`` is ``ste(decode(encode(w)), surrogate(w))`` and, last, zero
    where the mask is False, so a pruned weight never revives. It changes only through
    ``update`` (after an optimiser step) and the optimiser itself (learned tables).
    """

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

    def forward(self, weight: Tensor) -> Tensor:
        """Return the shipped weight, with a straight-through gradient."""
        state = self.state
        with torch.no_grad():
            codes = self.representation.codes(weight.detach(), self.mask, state)
            decoded = self.representation.values(codes)
        return masked(ste(decoded, self.representation.surrogate(weight, state)), self.mask)

    def encode(self, weight: Tensor) -> Codes:
        """Return the codes that are shipped for this latent weight."""
        with torch.no_grad():
            return self.representation.encode(weight, mask=self.mask, state=self.state)

    def update(self) -> None:
        """Advance what changes with every optimiser step."""
        with torch.no_grad():
            self.representation.update(self.state)


def owner(model: nn.Module, tensor: str) -> tuple[nn.Module, str]:
    """Return the module that owns a dotted tensor name, and the attribute.

    Raises:
        ModelError: there is no such tensor; the nearest name is given.
    """
    path, _, attribute = tensor.rpartition(".")
    try:
        module = model.get_submodule(path)
        getattr(module, attribute)
    except AttributeError:
        names = [*dict(model.named_parameters()), *laid_tensors(model)]
        raise ModelError(f"the model has no weight '{tensor}'{nearest(tensor, names)}") from None
    return module, attribute


def laid_tensors(model: nn.Module) -> dict[str, tuple[Laid, Tensor]]:
    """Return every laid tensor by its dotted name, with its latent weight."""
    found = {}
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for attribute, layers in module.parametrizations.items():
                if isinstance(layers[0], Laid):
                    name = f"{path}.{attribute}" if path else attribute
                    found[name] = (layers[0], layers.original)
    return found


def weights_of(model: nn.Module, scope: Scope) -> dict[str, Tensor]:
    """Return the matrices and kernels of a scope by dotted name, as the network uses them.

    A parameter shared by several modules appears once, under its first name.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in scope.select(model).items():
        for attribute, latent in _parameters(module):
            if latent.dim() >= 2 and id(latent) not in seen:
                seen.add(id(latent))
                found[f"{path}.{attribute}" if path else attribute] = getattr(module, attribute)
    return found


def _parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    if parametrize.is_parametrized(module):
        for attribute, layers in module.parametrizations.items():
            yield attribute, layers.original


def mask_of(model: nn.Module, tensor: str) -> Tensor | None:
    """Return the mask of a weight [its shape], or None."""
    module, attribute = owner(model, tensor)
    layers = _layers(module, attribute)
    return layers[0].mask if layers is not None else None


def _layers(module: nn.Module, attribute: str) -> parametrize.ParametrizationList | None:
    if not parametrize.is_parametrized(module, attribute):
        return None
    layers = module.parametrizations[attribute]
    if len(layers) != 1 or not isinstance(layers[0], Laid):
        raise ModelError(
            f"'{attribute}' carries a parametrization that is not laconic's "
            f"({type(layers[0]).__name__}); remove it before compressing"
        )
    return layers


def lay(
    model: nn.Module,
    tensor: str,
    representation: Representation,
    *,
    mask: Tensor | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Put a representation on a weight for training, on every owner of the parameter.

    Laying again starts from the value the network computes now and keeps the mask.

    Args:
        model: the network, changed in place.
        tensor: dotted name of the weight from the root.
        representation: how its numbers are stored from now on.
        mask: bool [shape of the weight]; True survives. None keeps the mask it has.
        state: what the representation has learned so far; None fits it to the weight.

    Raises:
        ModelError: no such weight, or it is not a finite floating-point tensor.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> lay(model, "0.weight", Float(), mask=torch.eye(2).bool())
    >>> int((model[0].weight != 0).sum())
    2
    """
    module, attribute = owner(model, tensor)
    current = getattr(module, attribute).detach().clone()
    _check(tensor, current, mask)
    mask = mask_of(model, tensor) if mask is None else mask
    owners = _owners(model, module, attribute)
    for holder, name in owners:
        _unlay(holder, name)
    if state is None:
        state = representation.fit(current, mask)
    laid, latent = Laid(representation, mask, state), nn.Parameter(current)
    for holder, name in owners:
        if parametrize.is_parametrized(holder):
            _separate(holder, name)
        setattr(holder, name, latent)
        parametrize.register_parametrization(holder, name, laid, unsafe=True)


def narrow(model: nn.Module, tensor: str, mask: Tensor) -> None:
    """Give a weight this mask, keeping its representation and what that has learned.

    Args:
        model: the network, changed in place.
        tensor: dotted name of the weight.
        mask: bool [shape of the weight].
    """
    module, attribute = owner(model, tensor)
    layers = _layers(module, attribute)
    if layers is None:
        lay(model, tensor, Float(), mask=mask)
    elif layers[0].mask is None:
        layers[0].mask = mask.clone()
    else:
        layers[0].mask.copy_(mask)


def bake(model: nn.Module, tensor: str | None = None) -> None:
    """Replace laid representations by the plain numbers they stand for.

    Our own, because removing torch's parametrization from a deep copy breaks the original.

    Args:
        model: the network, changed in place.
        tensor: dotted name of one weight; None bakes all.
    """
    for name in [tensor] if tensor is not None else list(laid_tensors(model)):
        module, attribute = owner(model, name)
        if not parametrize.is_parametrized(module, attribute):
            continue  # a tied owner was baked with the first one
        value = nn.Parameter(getattr(module, attribute).detach().clone())
        for holder, own in _owners(model, module, attribute):
            _unlay(holder, own)
            setattr(holder, own, value)


def _owners(model: nn.Module, module: nn.Module, attribute: str) -> list[tuple[nn.Module, str]]:
    latent = dict(_parameters(module))[attribute]
    return [
        (holder, name)
        for holder in model.modules()
        for name, parameter in list(_parameters(holder))
        if parameter is latent
    ]


def _unlay(module: nn.Module, attribute: str) -> None:
    layers = _layers(module, attribute)
    if layers is None:
        return
    # Asked before the deletion: torch does not see a parametrized class without any left.
    latent, plain = layers.original, parametrize.type_before_parametrizations(module)
    del module.parametrizations[attribute]
    if len(module.parametrizations):
        _separate(module, attribute)
    else:
        module.__class__ = plain
        del module.parametrizations
    module.register_parameter(attribute, nn.Parameter(latent.detach()))


def _separate(module: nn.Module, attribute: str) -> None:
    # Deep copies share the class torch injects: a property added to or removed from it for one
    # would change them all. So a module gets a class of its own, without this attribute's.
    shared = type(module)
    names = {name: value for name, value in vars(shared).items() if name != attribute}
    module.__class__ = type(shared.__name__, shared.__bases__, names)


def _check(tensor: str, weight: Tensor, mask: Tensor | None) -> None:
    if not weight.is_floating_point() or not bool(torch.isfinite(weight).all()):
        raise ModelError(f"'{tensor}' holds NaN, infinity or integers; nothing can represent it")
    if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool):
        raise ModelError(
            f"the mask of '{tensor}' is {mask.dtype} {tuple(mask.shape)}, "
            f"the weight {tuple(weight.shape)}; give a bool mask of its shape"
        )
