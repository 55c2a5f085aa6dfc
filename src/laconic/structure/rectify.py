"""The rectify step: ReLU in the place of smooth activations."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import nn

from laconic.errors import ScopeError
from laconic.step import State, Step
from laconic.structure.surgery import replace_

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["Rectify"]

# The classes of torch, transformers and timm, by parts of their names.
SMOOTH = re.compile(r"gelu|silu|swish|mish|^[cs]?elu$|^leakyrelu$|^softplus$", re.IGNORECASE)
GATE = re.compile("glu", re.IGNORECASE)  # which halves what it is given


class Rectify(Step):
    """Replace GELU, SiLU and other activations that are nearly ReLU by ReLU.

    What ReLU returns is never negative, so all levels of a few bits lie above zero: BinaryBERT has
    it in the feed-forward parts whose outputs it rounds to 4 bits (Bai et al. 2021). The network
    computes something else until it is trained again; its teacher keeps what it has. Functions
    that a forward calls (``F.gelu``) are no modules and stay.

    In a recipe::

        - rectify
        - quantize: {weight: binary, activation: {learned_spacing: {bits: 4}}}
        - train: {objective: [hidden, attention, logits]}

    Attributes:
        scope: the activations.

    >>> state = State(nn.Sequential(nn.Linear(2, 2), nn.GELU()))
    >>> Rectify().apply(state)
    >>> state.model[1]
    ReLU()
    """

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse a scope without such activations.

        Raises:
            ScopeError: there is none.
        """
        if not self._smooth(model):
            raise ScopeError(
                f"rectify: '{self.scope}' selects no module such as GELU or SiLU; functions that a "
                "forward calls cannot be replaced"
            )

    def apply(self, state: State) -> None:
        """Replace every activation of the scope."""
        for path in self._smooth(state.model):
            replace_(state.model, path, nn.ReLU())

    def _smooth(self, model: nn.Module) -> list[str]:
        return [
            path
            for path, module in self.scope.select(model).items()
            if SMOOTH.search(type(module).__name__)
            and not GATE.search(type(module).__name__)
            and not any(True for _ in module.children())
            and not any(True for _ in module.parameters())
        ]
