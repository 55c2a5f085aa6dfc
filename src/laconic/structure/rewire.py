"""The rewire step: the elements of every axis in the order of their scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from laconic.step import State, Step
from laconic.structure.axes import permute_
from laconic.structure.criteria import Criterion, Magnitude
from laconic.structure.elements import axes_of

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["Rewire"]


class Rewire(Step):
    """Sort the elements of every axis by score, best first.

    The network computes the same. DynaBERT's network rewiring (Hou et al. 2020): afterwards the
    first heads and neurons of every layer are its best, so a narrower network is a prefix of a
    wider one.

    Attributes:
        scope: modules that compute what is sorted.
        axes: what is sorted; "heads" and "neurons" for DynaBERT.
        by: the criterion that ranks.

    >>> from laconic.structure import HeadImportance
    >>> Rewire("heads", by=HeadImportance())
    Rewire('heads', by=HeadImportance())
    """

    positional: ClassVar[tuple[str, ...]] = ("axes",)

    axes: Literal["channels", "heads", "neurons", "hidden"]
    by: Criterion = Magnitude()

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse a scope without such axes, and a criterion that cannot rank them."""
        self.by.check(task, self.axes)
        self.by.check_axes(model, axes_of(model, task, self.axes, self.scope))

    def apply(self, state: State) -> None:
        """Permute the elements of every axis; ties keep their order."""
        axes = axes_of(state.model, state.task, self.axes, self.scope)
        for axis, scores in self.by.axis_scores(state, axes).items():
            order = torch.sort(scores.float().cpu(), descending=True, stable=True).indices
            permute_(state.model, axis, order.tolist())
