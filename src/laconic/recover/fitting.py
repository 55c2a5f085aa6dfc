"""Fitting: one part of the student on its way to the same part of the teacher."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from laconic.errors import ModelError, RecipeError, RunError, ScopeError
from laconic.models.capture import blocks_of
from laconic.recover.descent import Descent, autocast, check_curvature, parameters_of
from laconic.recover.feeding import Mixture, mixed
from laconic.recover.matching import hidden_difference
from laconic.recover.parts import (
    Answer,
    Part,
    check_chain,
    even_parts,
    modules_of,
    own_blocks,
)
from laconic.recover.solve import Gradient, Solve
from laconic.recover.stream import Flow, flattened
from laconic.step import State, derive
from laconic.tasks.task import evaluation, needed
from laconic.weights.quantizer import Quantizer

if TYPE_CHECKING:
    from laconic.recover.reconstruct import Reconstruct
    from laconic.tasks import Batch

__all__ = ["Fitting", "difference", "fittings_of", "gradient_of", "parts_of"]

logger = logging.getLogger(__name__)


def difference(student: Answer, teacher: Answer) -> Tensor:
    """Return the sum over a part's blocks l of the mean of (f^_l - f_l)^2 (Bai et al. 2022).

    Over what is no padding, in float32; before the first part's blocks counts what enters them.

    Args:
        student: f^_l, each [batch, ...].
        teacher: f_l, of the same shapes.

    >>> ones, zeros = Answer([torch.ones(1, 2)] * 2, {}), Answer([torch.zeros(1, 2)] * 2, {})
    >>> difference(ones, zeros)
    tensor(2.)
    """
    mask = teacher.beside.get("mask")
    pairs = zip(student.outputs, teacher.outputs, strict=True)
    each = [hidden_difference(own.float(), other.float(), mask) for own, other in pairs]
    return torch.stack(each).sum()


class Fitting:
    """A part of the student on its way to the teacher's.

    Args:
        step: what is asked.
        state: the student and its teacher.
        part: of both.
        number: of the part, from 1, and how many there are.
        modules: the names of those that the part runs through.
    """

    def __init__(
        self,
        step: Reconstruct,
        state: State,
        part: Part,
        *,
        number: tuple[int, int],
        modules: set[str],
    ) -> None:
        self.state, self.part, self.number, self.modules = state, part, number, modules
        self.feed, self.solve = step.feed, gradient_of(step.solve)
        self.task = needed(state.task, "reconstruct needs examples")
        self.teacher = state.teacher[0]
        scope = modules & step.scope.select(state.model).keys()
        moving = [p for p in parameters_of(state.model, scope) if p.requires_grad]
        self.quantizers = [
            module
            for name, module in state.model.named_modules()
            if name in scope and isinstance(module, Quantizer)
        ]
        self.descent: Descent | None = None
        if moving:
            self.descent = Descent(
                self.solve.optimizer, state.model, scope, networks=[moving], name=step.name
            )
        self.finished = 0
        self.first = self.last = 0.0

    @property
    def label(self) -> str:
        """Return which part this is."""
        return f"part {self.number[0]}: {self.part.label}"

    def begin(self) -> None:
        """Let what rounds activations in this part follow what it sees."""
        for quantizer in self.quantizers:
            quantizer.train()

    def finish(self) -> None:
        """Leave the part as it shall stay, and say what became of its loss."""
        for quantizer in self.quantizers:
            quantizer.eval()
        if self.descent is not None:
            self.descent.finish()
            self.descent = None  # with what its optimiser remembers
        logger.info(
            "reconstruct: part %d of %d (%s): loss %.6g -> %.6g",
            *(*self.number, self.part.label, self.first, self.last),
        )

    def update(self, flow: Flow) -> Flow:
        """Take one step down the loss of a batch; return what the next part is sent.

        Of several terms, the one that feeds the student most of its own is sent.
        """
        done = self.finished / self.solve.updates
        terms = [self._own(term) for term in self.feed.mixtures(done)]
        taught = {share: self._taught(flow, share) for share in {1.0, *(t.teacher for t in terms)}}
        torch.manual_seed(derive(self.state.seed, "update", self.number[0], self.finished))
        learned: dict[float, Answer] = {}

        def loss() -> Tensor:
            learned.update(
                {share: self._learned(flow, share) for share in {t.student for t in terms}}
            )
            return torch.stack(
                [t.weight * difference(learned[t.student], taught[t.teacher]) for t in terms]
            ).sum()

        if self.descent is None:
            with torch.no_grad():
                value = loss().item()
        else:
            where = f"in part {self.number[0]}, update {self.finished + 1}"
            value = self.descent.update(loss, done, where)
        self._count(value)
        return _sent(learned[max(learned)], taught[1.0])

    def both(self, flow: Flow) -> tuple[Answer, Answer]:
        """Return what the student's part makes of its own, as it is, and the teacher's."""
        with evaluation(self.state.model):
            own = self._learned(flow, 1.0)
        return own, self._taught(flow, 1.0)

    def taught(self, flow: Flow) -> Flow:
        """Return what leaves the teacher's part, as if the student answered the same."""
        answer = self._taught(flow, 1.0)
        return Flow(answer.outputs[-1], answer.outputs[-1], answer.beside)

    def passed(self, flow: Flow) -> Flow:
        """Return what leaves the part as it is."""
        return _sent(*self.both(flow))

    def answered(self, flow: Flow) -> Flow:
        """Return what enters the part, with what the teacher's makes of its own."""
        return replace(flow, answers=self._taught(flow, 1.0).outputs)

    def counters(self) -> list[float]:
        """Return where the fitting stands."""
        return [self.finished, self.first, self.last]

    def tensors(self) -> dict[str, Tensor]:
        """Return what its optimiser remembers, by name."""
        return {} if self.descent is None else self.descent.tensors()

    def restore(self, counters: Sequence[float], tensors: Mapping[str, Tensor]) -> None:
        """Continue from what ``counters`` and ``tensors`` returned."""
        self.stand(counters)
        if self.descent is not None:
            self.descent.restore(tensors)

    def stand(self, counters: Sequence[float]) -> None:
        """Stand where ``counters`` says."""
        self.finished, self.first, self.last = int(counters[0]), counters[1], counters[2]

    def _own(self, term: Mixture) -> Mixture:
        """Return a term as it is here: what enters the first part is the same for both."""
        return term if self.part.start else Mixture(term.weight, 1.0, 1.0)

    def _taught(self, flow: Flow, share: float) -> Answer:
        if share == 1.0 and flow.answers:
            return Answer([*flow.answers], flow.beside)
        fed = mixed(flow.teacher, flow.student, share)
        # Outside the cache of the student's forward: without gradients, it would poison it.
        with evaluation(self.teacher), autocast(self.state):
            return self.part.answer(self.teacher, self.task, fed, flow.beside)

    def _learned(self, flow: Flow, share: float) -> Answer:
        fed = mixed(flow.student, flow.teacher, share)
        with autocast(self.state):
            return self.part.answer(self.state.model, self.task, fed, flow.beside)

    def _count(self, loss: float) -> None:
        self.state.note(self.label, loss)
        self.first = loss if not self.finished else self.first
        self.last = loss
        self.finished += 1


def gradient_of(solve: Solve) -> Gradient:
    """Return how a part of several layers is fitted.

    Raises:
        RecipeError: in another way than by its gradient, or with a penalty.
    """
    if not isinstance(solve, Gradient):
        raise RecipeError(
            f"reconstruct: {solve.name} solves for one layer, not for a part of blocks; write "
            "parts: layer, or solve: gradient"
        )
    if solve.penalty is not None:
        raise RecipeError(
            f"reconstruct: {solve.penalty.name} removes weights or channels of one layer, not of a "
            "part of blocks; write parts: layer, or prune in a step before"
        )
    return solve


def fittings_of(step: Reconstruct, state: State, parts: list[Part] | None = None) -> list[Fitting]:
    """Return the parts that a step asks for, each ready to learn.

    Args:
        step: asks for "block" or for a number of parts.
        state: the student and its teacher.
        parts: those that are asked for, where that is decided already.

    Raises:
        RunError: there is no teacher.
        ModelError: the blocks form no chain; the student has not as many as the teacher, or
            their features have other shapes; parts share weights.
        ScopeError: no part has a parameter of the scope that can move.
    """
    if not state.teacher:
        raise RunError("reconstruct: parts learn from a teacher, and there is none; give teacher=")
    task = needed(state.task, "reconstruct needs examples")
    batch = task.example_batch(2).to(state.device)
    state.model.to(state.device).eval()
    teacher = state.teacher[0].to(state.device)
    for network in (state.model, teacher):
        check_chain(network, task, batch)
    own, other = len(blocks_of(state.model)), len(blocks_of(teacher))
    if own != other:
        raise ModelError(
            f"reconstruct: the student has {own} blocks and the teacher {other}, so their parts do "
            "not correspond; give as teacher= one of as many"
        )
    parts = parts_of(step, state.model) if parts is None else parts
    modules = [modules_of(part, state.model, task, batch) for part in parts]
    _check_shared(state.model, parts, modules)
    fittings = [
        Fitting(step, state, part, number=(number, len(parts)), modules=names)
        for number, (part, names) in enumerate(zip(parts, modules, strict=True), 1)
    ]
    if all(fitting.descent is None for fitting in fittings):
        raise ScopeError(
            f"reconstruct: '{step.scope}' selects no parameter in a block, or before the blocks, "
            "that can move; widen the scope, or set requires_grad"
        )
    check_curvature(step, gradient_of(step.solve).optimizer, state.model)
    _check_alike(fittings, batch)
    return fittings


def parts_of(step: Reconstruct, model: nn.Module) -> list[Part]:
    """Return the parts of a network that a step asks for, as even as they can be.

    Raises:
        ModelError: it has no blocks, or shares them.
        RecipeError: it has fewer blocks.
    """
    blocks = len(own_blocks(model))
    return even_parts(blocks, step.parts if isinstance(step.parts, int) else blocks)


def _check_shared(model: nn.Module, parts: list[Part], modules: list[set[str]]) -> None:
    """Refuse parts that would move the same numbers."""
    held: dict[nn.Parameter, Part] = {}
    for part, names in zip(parts, modules, strict=True):
        for parameter in parameters_of(model, names):
            other = held.setdefault(parameter, part)
            if other is not part:
                raise ModelError(
                    f"reconstruct: {other.label} and {part.label} share a weight of shape "
                    f"{tuple(parameter.shape)}, which two parts would move; make them one part"
                )


def _check_alike(fittings: list[Fitting], batch: Batch) -> None:
    """Refuse features that differ in shape or are not finite, and what cannot be sent on."""
    flow = Flow(batch, batch, {})
    for fitting in fittings:
        own, other = fitting.both(flow)
        shapes = [[tuple(each.shape) for each in side.outputs] for side in (own, other)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"reconstruct: {fitting.part.label} of the student gives {shapes[0]} where the "
                f"teacher's gives {shapes[1]}; give as teacher= one of the same width"
            )
        if not all(bool(each.isfinite().all()) for each in other.outputs):
            raise ModelError(
                f"reconstruct: {fitting.part.label} of the teacher gives NaN or infinity on "
                "examples of the training split; give another teacher"
            )
        flow = _sent(own, other)
        flattened(flow)


def _sent(own: Answer, other: Answer) -> Flow:
    return Flow(other.outputs[-1], own.outputs[-1].detach(), other.beside)
