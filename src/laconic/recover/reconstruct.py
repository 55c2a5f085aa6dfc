"""The reconstruct step: parts of the network learn to answer as the teacher's, on few data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import nn

from laconic import ranks
from laconic.errors import ChainError, RecipeError, ScopeError
from laconic.models.attention import handing_on_padded
from laconic.recover.descent import check_curvature, check_numbers, parameters_of
from laconic.recover.feeding import Feed, Student
from laconic.recover.fitting import fittings_of, gradient_of, parts_of
from laconic.recover.layers import fit_layers, read_alone
from laconic.recover.modulewise import fit_all_at_once, fit_in_order
from laconic.recover.pipeline import check_ranks, fit_on_ranks
from laconic.recover.solve import Gradient, Solve
from laconic.step import Count, State, Step, Value
from laconic.tasks.task import needed
from laconic.weights.quantize import coded

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["Order", "Parallel", "Reconstruct", "Sequential"]


class Order(Value, ABC):
    """Which part learns when."""

    @abstractmethod
    def fit(self, step: Reconstruct, state: State) -> None:
        """Let every part of blocks learn.

        Args:
            step: says which, and how.
            state: of the run.
        """


class Sequential(Order):
    """One part after the other, each on what those before it have become.

    >>> Sequential()
    Sequential()
    """

    def fit(self, step: Reconstruct, state: State) -> None:
        """Fit one part after the other."""
        fit_in_order(fittings_of(step, state), state)


class Parallel(Order):
    """All parts at once, each on what the one before sent lately (MREM-P).

    One process lets them take an update in turn, the same numbers every time. Those that torchrun
    has started share the parts among them and send features on while they train (Bai et al. 2022,
    Towards Efficient Post-training Quantization of Pre-trained Language Models).

    Attributes:
        queue: how many batches of features a part keeps of what it was sent.

    >>> Parallel(8)
    Parallel(8)
    """

    positional: ClassVar[tuple[str, ...]] = ("queue",)

    queue: Count = 16

    def fit(self, step: Reconstruct, state: State) -> None:
        """Fit all parts in turn, an update each, or on all processes that torchrun started."""
        if ranks.count() > 1:
            fit_on_ranks(step, state, self.queue)
        else:
            fit_all_at_once(fittings_of(step, state), state, self.queue)


class Reconstruct(Step):
    """Fit parts of the network to the same parts of the teacher, without labels.

    Attributes:
        scope: modules whose parameters move.
        parts: "layer": every linear layer and convolution by itself; "block": every block of the
            network; a number: so many modules of consecutive blocks.
        feed: what a part is fed, in the teacher and in the student.
        order: which part learns when.
        solve: how a part's numbers are found.

    >>> Reconstruct(parts=3)
    Reconstruct(parts=3)
    """

    parts: Literal["layer", "block"] | Count = "layer"
    feed: Feed = Student()
    order: Order = Sequential()
    solve: Solve = Gradient()

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse parts that do not exist, and ways in which they cannot learn.

        Raises:
            TaskError: there is no task.
            ScopeError: the scope has no parameters.
            ModelError: the network has no blocks, or shares them.
            RecipeError: these parts cannot be fitted in this order, or solved for.
            AxisError: no layer of the scope alone reads channels that could go.
            ChainError: a step before leaves nothing that these parts can learn.
        """
        super().check(model, task, earlier)
        needed(task, "reconstruct needs examples")
        if self.parts == "layer":
            self._check_layers(model, task, earlier)
        else:
            self._check_parts(model, earlier)
        moving = parameters_of(model, self.scope.select(model))
        if not moving:
            raise ScopeError(f"'{self.scope}' selects no module with parameters to fit")
        check_numbers("reconstruct", moving)

    def _check_layers(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...]) -> None:
        if isinstance(self.order, Parallel):
            raise RecipeError(
                "reconstruct: layers learn one after the other; order: parallel is of parts: block "
                "or of a number of parts"
            )
        if self.solve.selects:
            read_alone(State(model, task), self.scope.select(model))
        if any(step.name == "split" for step in earlier):
            raise ChainError(
                "reconstruct after split: the teacher has no layers like halves; put reconstruct "
                "before split, or fit whole blocks (parts: block)"
            )
        if isinstance(self.solve, Gradient):
            check_curvature(self, self.solve.optimizer, model, earlier)
            return
        for name, representation in coded(model, self.scope, earlier).items():
            raise ChainError(
                f"reconstruct ({self.solve.name}) after quantize ({representation.name}) at "
                f"'{name}': rounding would undo what is solved for; put reconstruct before "
                "quantize, or use gradient"
            )

    def _check_parts(self, model: nn.Module, earlier: tuple[Step, ...]) -> None:
        parts = parts_of(self, model)
        if isinstance(self.order, Parallel):
            check_ranks(len(parts))
        check_curvature(self, gradient_of(self.solve).optimizer, model, earlier)

    @property
    def repeats(self) -> int:
        """Return the updates of every part; one where its numbers are solved for."""
        return self.solve.updates if isinstance(self.solve, Gradient) else 1

    def abridged(self, repeats: int = 1) -> tuple[Step, ...]:
        """Return the same with so many updates; what is removed is removed sooner."""
        if not isinstance(self.solve, Gradient):
            return (self,)
        solve = self.solve.model_copy(update={"updates": min(repeats, self.repeats)})
        return (self.model_copy(update={"solve": solve}),)

    def apply(self, state: State) -> None:
        """Fit every part."""
        with handing_on_padded(state.model, *state.teacher[:1]):  # the one that is learned from
            if self.parts == "layer":
                fit_layers(state, self.scope, feed=self.feed, solve=self.solve)
            else:
                self.order.fit(self, state)
