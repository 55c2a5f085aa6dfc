"""The reset step: a network's shape and masks without what it has learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from laconic.errors import ModelError, ScopeError
from laconic.names import of_laid
from laconic.scope import Scope, left_out
from laconic.step import State, Step, derive
from laconic.weights.laid import bake, laid_tensors, lay
from laconic.weights.quantize import look

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["Reset"]

Draw = Callable[[], None]


class Reset(Step):
    """Draw parameters anew, as torch's layers do, and keep masks and representations.

    With a Train after it, the control of Liu et al. 2019 ("Rethinking the value of network
    pruning"): what a pruned network reaches from scratch. Every module draws by its own
    ``reset_parameters``, statistics of norms start again, representations are fitted to the new
    numbers, and ranges of activations are found as ``Quantize`` finds them. Frozen parameters
    stay.

    Attributes:
        scope: modules whose parameters are drawn.

    >>> state = State(nn.Linear(4, 4))
    >>> before = state.model.weight.clone()
    >>> Reset().apply(state)
    >>> bool((state.model.weight == before).any())
    False
    """

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse modules that do not know how they start.

        Raises:
            ScopeError: the scope selects no parameter.
            ModelError: a module has parameters and no ``reset_parameters``.
        """
        _resettable(model, self.scope)

    def apply(self, state: State) -> None:
        """Draw every parameter of the scope by the step's seed."""
        chosen = _resettable(state.model, self.scope)
        parameters = [p for module, _ in chosen.values() for p in module.parameters()]
        frozen = [(p, p.detach().clone()) for p in parameters if not p.requires_grad]
        laid = {
            name: layer
            for name, (layer, latent) in laid_tensors(state.model).items()
            if name.rpartition(".")[0] in chosen and latent.requires_grad
        }
        for name in laid:
            bake(state.model, name)
        with torch.no_grad():
            for name, (_, draw) in chosen.items():
                torch.manual_seed(derive(state.seed, "reset", name))
                draw()
            for parameter, value in frozen:
                parameter.copy_(value)
        for name, layer in laid.items():
            # The first owner of a tied weight lays them all.
            if name not in laid_tensors(state.model):
                lay(state.model, name, layer.representation, mask=layer.mask)
        look(state, (module for module, _ in chosen.values()), self.name)


def _reset_of(module: nn.Module) -> Draw | None:
    """Return how a module draws its own parameters; torch's attention hides it."""
    for name in ("reset_parameters", "_reset_parameters"):
        found = getattr(module, name, None)
        if callable(found):
            return cast("Draw", found)
    return None


def _resettable(model: nn.Module, scope: Scope) -> dict[str, tuple[nn.Module, Draw]]:
    """Return the modules of a scope by dotted name, each with what draws it anew."""
    found: dict[str, tuple[nn.Module, Draw]] = {}
    moving = False
    for name, module in scope.select(model).items():
        if of_laid(name):
            continue  # what is laid belongs to the module it is laid on
        owned = parametrize.is_parametrized(module) or _any(module.parameters(recurse=False))
        draw = _reset_of(module)
        moving = moving or owned
        if draw is not None and (owned or _any(module.buffers(recurse=False))):
            found[name] = (module, draw)
        elif owned:
            raise ModelError(
                f"reset: '{name}' ({type(module).__name__}) has parameters and no "
                f"reset_parameters(); give it one, or {left_out(name)}"
            )
    if not moving:
        raise ScopeError(f"'{scope}' selects no module with parameters to reset")
    return found


def _any(tensors: Iterable[object]) -> bool:
    return any(True for _ in tensors)
