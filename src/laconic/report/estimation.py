"""An analysis of students: how far the output of every layer is from the teacher's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from laconic.errors import ModelError, ScopeError, nearest
from laconic.models.attention import handing_on_padded
from laconic.models.capture import padding_mask
from laconic.progress import progress
from laconic.recover.quadratic import Fitted
from laconic.report.analyse import Analysis
from laconic.scope import Scope
from laconic.tasks.task import device_of, evaluation

if TYPE_CHECKING:
    from laconic.tasks import Batch, Task

__all__ = ["EstimationError", "estimation_error"]

# Examples at once: all outputs of two networks for them are kept.
EXAMPLES = 16


@dataclass(frozen=True)
class EstimationError(Analysis):
    """How far the output of every layer of some students is from the teacher's.

    Attributes:
        errors: student -> layer -> mean squared difference, in the order of a forward; the first
            student is what others are compared with.

    >>> found = EstimationError({"prior": {"fc": 4.0, "last": 0.0}, "cd": {"fc": 1.0, "last": 0.0}})
    >>> found.ratios("cd", to="prior")
    {'fc': 0.25, 'last': 1.0}
    """

    errors: Mapping[str, Mapping[str, float]]

    def ratios(self, student: str, *, to: str) -> dict[str, float]:
        """Return the errors of a student divided by another's, for the layers of both.

        Below 1 the student generalises better; 0 / 0 is 1.

        Raises:
            ModelError: there is no such student.
        """
        own, other = self._of(student), self._of(to)
        return {layer: _ratio(own[layer], other[layer]) for layer in own if layer in other}

    def _of(self, student: str) -> Mapping[str, float]:
        if student not in self.errors:
            raise ModelError(f"there is no student '{student}'{nearest(student, self.errors)}")
        return self.errors[student]


def _ratio(own: float, other: float) -> float:
    if other:
        return own / other
    return math.inf if own else 1.0


def estimation_error(
    teacher: nn.Module,
    students: Mapping[str, nn.Module],
    task: Task,
    *,
    split: str = "test",
    scope: Scope | str = "*",
) -> EstimationError:
    """Return how far the output of every layer is from the teacher's.

    ``mean (w_T * h_T - w_S * h_S)^2`` over all that a linear layer or a convolution puts out,
    before BatchNorm and activation; each network is fed by its own layers (Bai et al. 2020, Few
    Shot Network Compression via Cross Distillation). A layer is left out where the student's has
    another shape of output, is called another number of times, or is not there. What a linear
    layer makes of padding does not count.

    Args:
        teacher: unchanged, as the students.
        students: by name, on the teacher's device; the one to compare with first.
        task: calls the networks on its examples.
        split: "train", "validate" or "test".
        scope: which modules of the teacher count.

    Raises:
        TaskError: there is no such split.
        ScopeError: the teacher calls no linear layer or convolution of the scope.
        ModelError: there is no student, or one without a layer that the teacher has.

    >>> from laconic.models import digits_cnn
    >>> from laconic.tasks import digits
    >>> network = digits_cnn()
    >>> estimation_error(network, {"same": network}, digits(), scope="fc*").errors
    {'same': {'fc1': 0.0, 'fc2': 0.0}}
    """
    if not students:
        raise ModelError("there is no student to compare with the teacher; give one by its name")
    examples, chosen = task.split(split), Scope(str(scope))
    layers = {p: layer for p, layer in chosen.select(teacher).items() if isinstance(layer, Fitted)}
    means = {name: _Means() for name in students}
    batches = examples.any_order(EXAMPLES, device=device_of(teacher))
    for batch in progress(batches, "estimation error", examples.batch_count(EXAMPLES)):
        taught, mask = _outputs(task, teacher, layers, batch), padding_mask(batch)
        if not taught:
            raise ScopeError(f"'{chosen}' selects no linear layer or convolution that is called")
        for name, student in students.items():
            own = _outputs(task, student, taught, batch)
            for path, theirs in taught.items():
                tokens = mask if isinstance(layers[path], nn.Linear) else None
                means[name].add(path, theirs, own.get(path, []), tokens)
    return EstimationError({name: mean.found(name) for name, mean in means.items()})


class _Means:
    """Mean squared differences of a student's outputs, by layer."""

    def __init__(self) -> None:
        self.squares: dict[str, float] = {}
        self.numbers: Counter[str] = Counter()

    def add(
        self, path: str, teacher: list[Tensor], student: list[Tensor], mask: Tensor | None
    ) -> None:
        """Add the outputs of all calls of a layer, if they can be compared.

        Args:
            path: of the layer.
            teacher: an output for each call [batch, ...].
            student: the same of the student.
            mask: bool [batch, tokens]; what has such tokens counts where it is True.
        """
        if [each.shape for each in teacher] != [each.shape for each in student]:
            return
        for theirs, own in zip(teacher, student, strict=True):
            difference = own.double() - theirs.double()
            if mask is not None and difference.shape[:-1] == mask.shape:
                difference = difference[mask]
            self.squares[path] = self.squares.get(path, 0.0) + float(difference.square().sum())
            self.numbers[path] += difference.numel()

    def found(self, name: str) -> dict[str, float]:
        """Return the means.

        Raises:
            ModelError: no layer could be compared.
        """
        if not self.squares:
            raise ModelError(
                f"no layer of '{name}' has the name and the shape of output of one of the "
                "teacher's; compare networks of one structure, or widen scope"
            )
        return {path: square / self.numbers[path] for path, square in self.squares.items()}


def _outputs(
    task: Task, model: nn.Module, paths: Iterable[str], batch: Batch
) -> dict[str, list[Tensor]]:
    """Return the output of every call of some modules, in the order of first calls."""
    found: dict[str, list[Tensor]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    with ExitStack() as stack:
        for path in paths:

            def note(module: nn.Module, inputs: Any, output: Any, path: str = path) -> None:
                if isinstance(output, Tensor):
                    # An activation that works in place would change it.
                    found.setdefault(path, []).append(output.clone())

            if path in modules:
                stack.enter_context(modules[path].register_forward_hook(note))
        with handing_on_padded(model), evaluation(model):
            task.call(model, batch)
    return found
