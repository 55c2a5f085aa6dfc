"""The quantize step: how weights, embeddings and activations of a scope are represented."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import model_validator
from torch import Tensor, nn

from laconic.errors import ModelError, ScopeError, few
from laconic.models.halves import Halves
from laconic.models.rounding import INPUT, OPERANDS
from laconic.names import joined, module_of
from laconic.scope import KINDS, Scope
from laconic.step import State, Step
from laconic.tasks.task import needed
from laconic.weights.activations import Activation
from laconic.weights.laid import check_table, laid_tensors, lay_each, ties_of, weights_of
from laconic.weights.quantizer import Quantizer, attach_, attention_paths, calibrate, check_places
from laconic.weights.representation import Float, Representation, check_groups

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["Quantize", "coded", "look", "planned"]

logger = logging.getLogger(__name__)

# Layers whose input is rounded.
LAYERS = (*KINDS["linear"], *KINDS["conv"])
# Batches, and examples in each, that give activations their first range.
FIRST_LOOK = (8, 32)


class Quantize(Step):
    """Store weights in a representation, and round activations.

    Training goes through both. Matrices and kernels are quantised (two dimensions or more); biases
    and norms stay float. Masks of pruned weights are kept, and statistics are taken over survivors.
    Rounded are the inputs of the linear layers and convolutions of the scope and, where its
    attention modules are those of a Hugging Face encoder, the operands of both products. What a
    network keeps in floats (its head, position embeddings, first layer) is left out of the scope;
    what it keeps in other widths is a step of its own. Weights that are codes in the network that
    is given are refused until ``quantize: float`` has made floats of them; a file comes as floats.

    Attributes:
        weight: the representation, or a number of bits (symmetric; 1: binary); None: weights
            stay as they are.
        embedding: of the weights of embeddings; None: as ``weight``.
        activation: how activations are rounded, or a number of bits (the tensor's own range);
            None: they are not. Ranges that need data are found on 8 batches of 32.
        operands: whether the operands of attention are rounded too.
        probabilities: how those of attention are, which are never negative; None: as
            ``activation``.

    >>> Quantize(4)
    Quantize(Symmetric(4))
    """

    positional: ClassVar[tuple[str, ...]] = ("weight",)

    weight: Representation | None = None
    embedding: Representation | None = None
    activation: Activation | None = None
    operands: bool = True
    probabilities: Activation | None = None

    @model_validator(mode="after")
    def _something(self) -> Quantize:
        if (self.weight, self.embedding, *self._activations) == (None, None):
            raise ValueError("nothing is quantised: give weight, embedding or activation")
        if self.probabilities is not None and not self.operands:
            raise ValueError("probabilities are operands of attention; leave out operands: false")
        return self

    @property
    def _activations(self) -> list[Activation]:
        given = (self.activation, self.probabilities)
        return [each for each in given if each is not None]

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse a scope without what is quantised, weights that are codes, ranges without data.

        Raises:
            ScopeError: the scope has nothing of what a field is for.
            ModelError: its weights are codes in the network that the recipe starts from.
            TaskError: ranges need data.
        """
        plain, apart = self._weights(model)
        if self.weight is not None and not plain:
            beside = " beside those of embeddings" if apart else ""
            raise ScopeError(f"'{self.scope}' selects no weight of two or more dimensions{beside}")
        if self.embedding is not None and not apart:
            raise ScopeError(f"'{self.scope}' selects no embedding")
        for name in plain | apart:
            check_table(model, name)
        check_groups(self.represented(model))
        self._check_codes(model, earlier)
        if self._activations:
            self._check_activations(model, task)

    def _check_codes(self, model: nn.Module, earlier: tuple[Step, ...]) -> None:
        """Refuse weights that were codes before the recipe; say which an earlier step makes such.

        Either way the floats that were trained behind the codes go.
        """
        laid = self.represented(model)
        names = {n for each, weights in laid if not isinstance(each, Float) for n in weights}
        found = coded(model, self.scope, earlier)
        codes = {name: each.name for name, each in found.items() if name in names}
        came = [name for name in codes if name in coded(model, self.scope, ())]
        shown = few([repr(name) for name in came or codes], 1)
        if came:
            raise ModelError(
                f"{shown}: quantised already ({codes[came[0]]}) in the network that is given; put "
                "'quantize: float' before this to go on from the rounded weights, or give the "
                "network as it was before"
            )
        if codes:
            logger.warning(
                "quantize: %s: quantised before (%s), and now again from what that rounded them "
                "to; leave them out of one of the scopes, unless that is meant",
                shown,
                next(iter(codes.values())),
            )

    def _check_activations(self, model: nn.Module, task: Task | None) -> None:
        places = self._places(model)
        if not places:
            kinds = "linear layer, convolution or " if self.activation is not None else ""
            raise ScopeError(f"'{self.scope}' selects no {kinds}attention")
        check_places(model, places)
        for activation in self._activations:
            if activation.needs_data:
                needed(task, f"quantize needs data for the range of {activation!r}")

    def apply(self, state: State) -> None:
        """Lay the representations and attach what rounds."""
        for representation, weights in self.represented(state.model):
            lay_each(state.model, weights, representation)
        if not self._activations:
            return
        before = set(state.model.modules())
        attach_(state.model, self._places(state.model))
        look(
            state, (module for module in state.model.modules() if module not in before), "quantize"
        )

    def represented(self, model: nn.Module) -> list[tuple[Representation, Mapping[str, Tensor]]]:
        """Return the representations, each with the weights of the scope that it is laid on."""
        laid = zip((self.weight, self.embedding), self._weights(model), strict=True)
        return [(each, weights) for each, weights in laid if each is not None and weights]

    def _weights(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the weights of the scope, and apart from them those of ``embedding``."""
        found = weights_of(model, self.scope)
        if self.embedding is None:
            return found, {}
        ties = ties_of(model)  # a table may be known by the name of a head that reads it too
        modules = model.named_modules()
        paths = (path for path, module in modules if isinstance(module, KINDS["embedding"]))
        tables = {ties.get(name, name) for name in (joined(path, "weight") for path in paths)}
        plain = {name: weight for name, weight in found.items() if name not in tables}
        return plain, {name: weight for name, weight in found.items() if name in tables}

    def _places(self, model: nn.Module) -> dict[str, dict[str, Activation]]:
        """Return path -> place -> activation, of all that is rounded."""
        chosen, attentions = self.scope.select(model), set(attention_paths(model))
        found: dict[str, dict[str, Activation]] = {}
        for path, module in chosen.items():
            above = module_of(path)
            if isinstance(split := model.get_submodule(above), Halves):
                path, module = above, split  # both halves see what comes to the layer
            layer = module.first if isinstance(module, Halves) else module
            if isinstance(layer, LAYERS):
                places = {INPUT: self.activation}
            elif self.operands and path in attentions:
                places = dict.fromkeys(OPERANDS, self.activation)
                places["probabilities"] = self.probabilities or self.activation
            else:
                continue
            asked = {place: each for place, each in places.items() if each is not None}
            found |= {path: asked} if asked else {}
        return found


def look(state: State, modules: Iterable[nn.Module], step: str) -> None:
    """Let those of some modules that round by data find their first range, on 8 batches of 32.

    Args:
        state: the network and the task.
        modules: of the network.
        step: who asks, for messages.

    Raises:
        TaskError: they need data, and there is no task.

    >>> look(State(nn.Linear(1, 1)), [], "quantize")
    """
    quantizers = [module for module in modules if isinstance(module, Quantizer)]
    asking = [each for each in quantizers if each.activation.needs_data]
    if not asking:
        return
    task = needed(state.task, f"{step} needs data for the range of {asking[0].activation!r}")
    count, size = FIRST_LOOK
    drawn = task.train.batches(size, seed=state.seed, device=state.device)
    calibrate(state.model.to(state.device), task, itertools.islice(drawn, count), asking)


def represented(
    step: Step, model: nn.Module
) -> list[tuple[Representation, Mapping[str, Tensor]]] | None:
    """Return what a step lays on the weights that a network has.

    None: on those of modules that it has not, which another step puts there or takes away.

    >>> represented(Quantize(4, scope="1.0"), nn.Sequential(nn.Linear(2, 2))) is None
    True
    """
    try:
        return step.represented(model)
    except ScopeError:
        return None


def planned(
    model: nn.Module, scope: Scope, earlier: Sequence[Step]
) -> list[tuple[str, Representation]]:
    """Return what the weights of a scope may be stored in after some steps.

    Args:
        model: the network before them; weights that are plain then and stay so are left out.
        scope: of the weights.
        earlier: the steps.

    Returns:
        Names and representations; several of a weight where data decide among them.

    >>> planned(nn.Sequential(nn.Linear(2, 2)), Scope("*"), (Quantize(4),))
    [('0.weight', Symmetric(4))]
    """
    found = {name: [layer.representation] for name, (layer, _) in laid_tensors(model).items()}
    for step in earlier:
        anew: dict[str, list[Representation]] = {}
        for representation, weights in represented(step, model) or ():
            for name in weights:
                anew.setdefault(name, []).append(representation)
        found |= anew
    return [(name, each) for name in weights_of(model, scope) for each in found.get(name, [])]


def coded(model: nn.Module, scope: Scope, earlier: Sequence[Step]) -> dict[str, Representation]:
    """Return which weights of a scope may be codes after some steps, and of what.

    Args:
        model: the network before them.
        scope: of the weights.
        earlier: the steps.

    >>> coded(nn.Sequential(nn.Linear(2, 2)), Scope("*"), (Quantize("float"),))
    {}
    """
    found = planned(model, scope, earlier)
    return {name: each for name, each in found if not isinstance(each, Float)}
