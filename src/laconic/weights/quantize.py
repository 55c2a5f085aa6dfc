"""The quantize step: which representation the weights of a scope are stored in."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import nn

from laconic.errors import ScopeError
from laconic.scope import Scope
from laconic.step import State, Step
from laconic.weights.laid import laid_tensors, lay, mask_of, weights_of
from laconic.weights.representation import Representation

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["Quantize", "planned"]


class Quantize(Step):
    """Store weights in a representation; training afterwards is through it.

    Matrices and kernels are quantised (two dimensions or more); biases and norms stay float.
    Masks of pruned weights are kept, and statistics are taken over survivors.

    Attributes:
        weight: the representation, or a number of bits (symmetric).

    >>> Quantize(4)
    Quantize(Symmetric(4))
    """

    positional: ClassVar[tuple[str, ...]] = ("weight",)

    weight: Representation

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse a scope without a matrix or kernel."""
        if not weights_of(model, self.scope):
            raise ScopeError(f"'{self.scope}' selects no weight of two or more dimensions")

    def apply(self, state: State) -> None:
        """Lay the representation on every weight of the scope."""
        weights = weights_of(state.model, self.scope)
        masks = {name: mask_of(state.model, name) for name in weights}
        survivors = {
            name: weight.detach().flatten() if masks[name] is None else weight.detach()[masks[name]]
            for name, weight in weights.items()
        }
        for name, representation in self.weight.resolve(survivors).items():
            lay(state.model, name, representation)


def planned(model: nn.Module, scope: Scope, earlier: tuple[Step, ...]) -> dict[str, Representation]:
    """Return what the weights of a scope will be stored in after some steps.

    Args:
        model: the network before them; those that are plain then and stay so are left out.
        scope: of the weights.
        earlier: the steps.

    >>> planned(nn.Sequential(nn.Linear(2, 2)), Scope("*"), (Quantize(4),))
    {'0.weight': Symmetric(4)}
    """
    found = {name: layer.representation for name, (layer, _) in laid_tensors(model).items()}
    for step in earlier:
        if isinstance(step, Quantize):
            found |= dict.fromkeys(weights_of(model, step.scope), step.weight)
    return {name: found[name] for name in weights_of(model, scope) if name in found}
