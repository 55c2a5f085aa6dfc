"""The factorize step: layers of a scope, each replaced by several smaller ones."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from laconic.errors import ModelError, ScopeError
from laconic.models.attention import handing_on_padded
from laconic.models.capture import padding_mask
from laconic.progress import progress
from laconic.step import State, Step
from laconic.structure.columns import columns, groups_of
from laconic.structure.depth import refuse_shared
from laconic.structure.factorization import (
    Factorization,
    Source,
    break_even,
    check_runs,
    latent,
    refuse_needed,
    refuse_tied,
    shape_of,
)
from laconic.structure.outlines import blank, outlined
from laconic.structure.surgery import edits_of, replace_
from laconic.tasks.task import full_precision, needed
from laconic.weights.laid import copied, mask_of
from laconic.weights.slopes import drawn

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["Factorize"]

logger = logging.getLogger(__name__)

MOMENTS = "factorize needs batches for moments of inputs"


class Factorize(Step):
    """Replace layers by products of smaller ones: low rank, Tucker, tensor train.

    Every layer of the scope that the method splits is replaced by a Sequential of ordinary
    layers (or by one of ``laconic.models``), which the file rebuilds; the bias stands in the
    last. The parts of ``fc1`` are ``fc1.0``, ``fc1.1``, ..., and a later step's scope ``fc1``
    selects them too. A layer that no rank makes smaller stays, and so do subclasses of nn.Linear
    and the like.

    A laid weight is split as the network computes it, pruned and quantised; its parts are plain
    floats, and zeros do not stay zero: quantise or prune after this step, not before. A weight
    shared with another layer is refused: its parts would no longer be that layer's.

    In a recipe::

        - factorize: svd
        - factorize: {method: {svd: {energy: 0.9}}, scope: "encoder.* kind:linear"}
        - factorize: {method: {embedding: 128}, scope: "*.word_embeddings"}
        - factorize: {method: {tucker2: {ranks: [32, 16]}}, scope: "kind:conv, !conv1"}

    Attributes:
        scope: the layers that are split.
        method: into what.

    >>> from laconic.structure import SVD
    >>> state = State(nn.Sequential(nn.Linear(64, 64), nn.ReLU()))
    >>> Factorize(SVD(ratio=0.5)).apply(state)
    >>> state.model[0]
    Sequential(
      (0): Linear(in_features=64, out_features=16, bias=False)
      (1): Linear(in_features=16, out_features=64, bias=True)
    )
    """

    positional: ClassVar[tuple[str, ...]] = ("method",)

    method: Factorization

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse what cannot be split, as far as shapes tell.

        Raises:
            ScopeError: the scope has no layer that the method splits.
            ModelError: a layer would become larger, has a tied weight, or does not fit.
            TaskError: the method needs batches of data and there is no task.
            ChainError: an earlier step ties the layers of the scope to each other.
        """
        if self.method.samples is not None:
            needed(task, MOMENTS)
        refuse_shared(model, self._targets(model), earlier, self.name)

    def outline(self, model: nn.Module, earlier: tuple[Step, ...] = ()) -> nn.Module:
        """Return a copy with its layers split, in which the parts have no numbers.

        Where numbers decide a rank, it is the largest that saves weights.
        """
        with outlined(model) as outline:
            for name, module in self._targets(outline).items():
                replace_(outline, name, self._blank_parts(module))
        return outline

    def apply(self, state: State) -> None:
        """Split every fitting layer of the scope."""
        targets = self._targets(state.model)
        moments = self._moments(state, targets)
        made = {}
        # All are split before any is replaced: a refusal leaves the network as it was.
        for name, module in progress(targets.items(), "factorize", len(targets)):
            made[name] = self._split(name, module, state.generator(name), moments.get(name))
        for name, module in made.items():
            before = latent(targets[name]).numel()
            replace_(state.model, name, module)
            logger.info("factorize: '%s': %d weights are now %d", name, before, _weights(module))
        check_runs(state, "factorize")

    def _targets(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the layers to split by name, each checked."""
        selected = self.scope.select(model)
        fitting = {name: module for name, module in selected.items() if self.method.fits(module)}
        if not fitting and selected.keys() & edits_of(model).get("modules", {}).keys():
            logger.info("factorize: what '%s' selects was replaced before, and stays", self.scope)
        elif not fitting:
            raise ScopeError(
                f"'{self.scope}' selects no layer that {self.method!r} splits; it splits "
                f"{self.method.fitting}"
            )
        chosen = {}
        for name, module in fitting.items():
            mask_of(model, f"{name}.weight")  # refuses a parametrization that is not ours
            if break_even(self.method, shape_of(module)):
                self._check(model, name, module)
                chosen[name] = module
            else:
                logger.info("factorize: '%s' stays: no rank makes it smaller", name)
        return chosen

    def _check(self, model: nn.Module, name: str, module: nn.Module) -> None:
        refuse_needed(model, name, "factorize")
        refuse_tied(model, name, "factorize")
        try:
            self.method.check(module)
        except ModelError as error:
            raise ModelError(f"factorize: '{name}': {error}") from None
        planned = self.method.planned(shape_of(module))
        if planned is not None:
            self._check_smaller(name, module, planned * groups_of(module))

    def _check_smaller(self, name: str, module: nn.Module, after: int) -> None:
        before, shape = latent(module).numel(), list(latent(module).shape)
        if after >= before:
            raise ModelError(
                f"factorize: '{name}' {shape}: {self.method!r} makes {after:,} weights of "
                f"{before:,}; at most rank {break_even(self.method, shape_of(module))} makes it "
                f"smaller: choose less, or leave it out of the scope with '!{name}'"
            )

    def _split(
        self, name: str, module: nn.Module, generator: torch.Generator, moments: Tensor | None
    ) -> nn.Module:
        weight = cast("Tensor", module.weight).detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(f"factorize: '{name}' holds NaN or infinity; train it again")
        made = self.method.split(Source(module, weight, generator, moments))
        self._check_smaller(name, module, _weights(made))
        return made

    def _blank_parts(self, module: nn.Module) -> nn.Module:
        """Return what replaces a layer, without numbers; they are looked at only if they must be.

        On the device "meta" tensors have shapes alone, and what looks at no number is quick.
        """
        weight, method = latent(module), self.method.foreseen()
        if not method.by_shape:
            numbers = weight.detach().to("cpu", torch.float64).nan_to_num()
            return method.split(Source(module, numbers, torch.Generator()))
        hollow = copied(module, {id(p): _hollow(p) for p in module.parameters()})
        numbers = latent(hollow).detach().double()
        groups, size = groups_of(module), math.prod(shape_of(module)[1:])
        moments = None if method.samples is None else numbers.new_empty(groups, size, size)
        return blank(method.split(Source(hollow, numbers, torch.Generator(), moments)), weight)

    def _moments(self, state: State, targets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Return X X^T [groups, n, n] of the inputs of every layer, if the method needs them."""
        if self.method.samples is None:
            return {}
        task, (batches, size) = needed(state.task, MOMENTS), self.method.samples
        padded = handing_on_padded(state.model)
        real: list[Tensor | None] = [None]
        with padded, _watched(targets, real) as moments, full_precision(state.model):
            for batch in drawn(state, task, batches, size, "factorize: inputs"):
                real[0] = padding_mask(batch)
                task.call(state.model, batch)
        for name in targets:
            if name not in moments or not bool(torch.isfinite(moments[name]).all()):
                problem = "are not finite" if name in moments else "were never computed"
                raise ModelError(
                    f"factorize: the inputs of '{name}' {problem}, so {self.method!r} cannot "
                    "weigh them; leave it out of the scope, or use SVD"
                )
        return {name: moment.cpu() for name, moment in moments.items()}


def _hollow(parameter: nn.Parameter) -> nn.Parameter:
    """Return a parameter of the same shape without numbers."""
    return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)


def _weights(module: nn.Module) -> int:
    named = module.named_parameters()
    return sum(p.numel() for name, p in named if name.rpartition(".")[2] != "bias")


@contextlib.contextmanager
def _watched(
    targets: Mapping[str, nn.Module], real: Sequence[Tensor | None]
) -> Iterator[dict[str, Tensor]]:
    """Add up the second moments of what enters the layers during a with block.

    Args:
        targets: layers, by name.
        real: one mask [batch, tokens] of what is no padding, that of the current batch.
    """
    moments: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        entered = args[0] if args else next(iter(kwargs.values()))
        rows = columns(module, entered.detach(), real[0]).double()
        moment = rows.transpose(1, 2) @ rows
        moments[name] = moments[name] + moment if name in moments else moment

    with contextlib.ExitStack() as hooks:
        for name, module in targets.items():
            noting = functools.partial(watch, name)
            hooks.enter_context(module.register_forward_pre_hook(noting, with_kwargs=True))
        yield moments
