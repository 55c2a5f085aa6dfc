"""The set_dropout step: how much of what flows is dropped in training."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import nn

from laconic.errors import ScopeError
from laconic.models.attention import UnpackedAttention
from laconic.step import State, Step, UpToOne
from laconic.structure.surgery import replace_

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["SetDropout"]

KINDS = (nn.Dropout, nn.Dropout2d)  # of those that a file may name


class SetDropout(Step):
    """Set the chance of every dropout, for the trainings that follow.

    A network that only learns from its teacher cannot overfit labels, and few bits have no numbers
    to spare: 0 suits the low-bit recipes. A pruned network overfits less than the whole one: Han et
    al. 2015, section 3.2, multiply by the square root of the share of weights that are left.

    What is no ``nn.Dropout``, ``nn.Dropout2d`` or unpacked attention stays: inside
    ``nn.MultiheadAttention`` until the step ``unpack`` has run, in recurrent layers, and what some
    networks of Hugging Face keep as a number (the attention of ViT).

    In a recipe::

        - set_dropout: 0
        - train: {objective: [hidden, attention, logits]}

    Attributes:
        scope: the dropouts.
        chance: of a number to be dropped, from 0 to 1.

    >>> state = State(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))
    >>> SetDropout(0).apply(state)
    >>> state.model[1]
    Dropout(p=0.0, inplace=False)
    """

    positional: ClassVar[tuple[str, ...]] = ("chance",)

    chance: UpToOne

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse a scope without dropout.

        Raises:
            ScopeError: there is none.
        """
        if not self._dropouts(model):
            raise ScopeError(f"set_dropout: '{self.scope}' selects no nn.Dropout or nn.Dropout2d")

    def apply(self, state: State) -> None:
        """Replace every dropout of the scope by one of the same kind."""
        for path, module in self._dropouts(state.model).items():
            if isinstance(module, UnpackedAttention):
                module.dropout = self.chance
                replace_(state.model, path, module)  # by itself: files describe it anew
            else:
                replace_(state.model, path, type(module)(self.chance))

    def _dropouts(self, model: nn.Module) -> dict[str, nn.Module]:
        return {
            path: module
            for path, module in self.scope.select(model).items()
            if type(module) in (*KINDS, UnpackedAttention)
        }
