"""The fold step: BatchNorm becomes part of the layer before it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from laconic.errors import ChainError, ScopeError
from laconic.models.halves import Halves
from laconic.models.layers import describe, layer
from laconic.step import State, Step
from laconic.structure.examples import example_inputs
from laconic.structure.factorization import bias_of, refuse_tied
from laconic.structure.surgery import replace_
from laconic.tasks.split import tensors_in
from laconic.tasks.task import evaluation
from laconic.weights.laid import laid_tensors, lay, mask_of, owners_of
from laconic.weights.quantize import coded
from laconic.weights.representation import Float

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["Fold", "folded", "norms_behind"]

# What torch calls the end of a graph, a parameter.
LEAF = "torch::autograd::AccumulateGrad"

logger = logging.getLogger(__name__)

FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)


def folded(weight: Tensor, bias: Tensor | None, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of a layer that normalises its own output.

    ``y = gamma (W x + b - mean) / s + beta = (gamma / s) W x + (gamma / s) (b - mean) + beta``
    with ``s = sqrt(variance + eps)`` (Jacob et al. 2018, section 3.2).

    Args:
        weight: W [outputs, ...].
        bias: b [outputs]; None is 0.
        norm: with running statistics [outputs].

    Returns:
        Both in the dtype of the weight; computed in float64.

    >>> norm = nn.BatchNorm1d(1, eps=0).eval()
    >>> norm.running_mean.fill_(3.0), norm.running_var.fill_(4.0)
    (tensor([3.]), tensor([4.]))
    >>> folded(torch.tensor([[8.0]]), torch.tensor([1.0]), norm)
    (tensor([[4.]]), tensor([-1.]))
    """
    mean, variance = (
        cast("Tensor", each).detach().double() for each in (norm.running_mean, norm.running_var)
    )
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.detach().double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().double()
    factor = gamma / (variance + norm.eps).sqrt()
    shift = -mean if bias is None else bias.detach().double() - mean
    scaled = weight.detach().double() * factor.reshape(-1, *[1] * (weight.dim() - 1))
    return scaled.to(weight.dtype), (factor * shift + beta).to(weight.dtype)


def norms_behind(model: nn.Module, task: Task | None) -> dict[str, str]:
    """Return layer -> BatchNorm that alone reads the layer's output, by dotted names.

    They are found in one forward: of linear layers and convolutions, called once, whose output
    goes as it is into one BatchNorm with running statistics, called once, and nowhere else; and
    of which nothing else reads a parameter, nor of the norm. The norm reads what the layer calls
    outputs: dimension 1, of a linear layer's answers [batch, outputs]. Subclasses of either with a
    forward of their own, such as a norm that activates too, compute something else and are left.

    Args:
        model: in evaluation mode for the forward; left as it is.
        task: gives the example that it is called with.

    Raises:
        TaskError: there is no task.
        ModelError: the forward fails.
    """
    calls: Counter[nn.Module] = Counter()
    outputs: dict[nn.Module, tuple[Tensor, int]] = {}
    fed: dict[nn.Module, tuple[Tensor, int]] = {}

    def leave(module: nn.Module, given: Any, output: Any) -> None:
        calls[module] += 1
        outputs[module] = output, output._version

    def enter(module: nn.Module, given: tuple[Any, ...]) -> None:
        for tensor in given:
            fed[module] = tensor, tensor._version

    # A caller may be inside inference_mode, where no writes are counted.
    with torch.inference_mode(False), ExitStack() as hooks:
        inputs, named = example_inputs(model, task)
        for module in model.modules():
            if not _computes_as(module, (*FOLDABLE, _BatchNorm, nn.SyncBatchNorm)):
                continue
            hooks.enter_context(module.register_forward_hook(leave))
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                hooks.enter_context(module.register_forward_pre_hook(enter))
        with evaluation(model), _nothing_frozen(model), torch.enable_grad():
            result = model(*inputs, **named)
    readers = _readers(tensors_in(result))
    read_apart = _read_apart(model, readers)
    names = {module: name for name, module in model.named_modules()}
    return {
        names[module]: names[norm]
        for norm, (tensor, changes) in fed.items()
        for module, (output, before) in outputs.items()
        if output is tensor
        and before == changes  # nothing in between has written to it
        and isinstance(module, FOLDABLE)
        and calls[module] == calls[norm] == 1
        and output.dim() == module.weight.dim()
        and readers[tensor.grad_fn] == 1
        and not (read_apart & {*module.parameters(), *norm.parameters()})
    }


def _computes_as(module: nn.Module, kinds: Iterable[type[nn.Module]]) -> bool:
    """Return whether a module is one of these kinds, with the forward of that."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


@contextmanager
def _nothing_frozen(model: nn.Module) -> Iterator[None]:
    """Let every parameter ask for a gradient: what none asks for leaves no operation to count."""
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _readers(outputs: Iterable[Tensor]) -> Counter[Any]:
    """Return by how many operations, or as how many outputs, each operation's result is read."""
    found = Counter(tensor.grad_fn for tensor in outputs)
    left, seen = list(found), set(found)
    while left:
        node = left.pop()
        for reader, _ in () if node is None else node.next_functions:
            found[reader] += 1
            if reader not in seen:
                seen.add(reader)
                left.append(reader)
    return found


def _read_apart(model: nn.Module, readers: Mapping[Any, int]) -> set[Tensor]:
    """Return the parameters that more operations read than modules own them.

    What reads a weight besides its layer would get one that holds the norm.
    """
    leaves = [node for node in readers if node is not None and node.name() == LEAF]
    reads = {node.variable: readers[node] for node in leaves}
    return {leaf for leaf, count in reads.items() if count > len(owners_of(model, leaf))}


class Fold(Step):
    """Multiply BatchNorm into the layer before it, which then computes both.

    For training with quantised weights, the weights that will be multiplied are then those that
    are rounded (Jacob et al. 2018, section 3.2); what is left out keeps its BatchNorm. Layers
    whose output something else reads too, as in networks that normalise first, stay as they are.

    Attributes:
        scope: layers, and the BatchNorm that they take in.

    >>> Fold()
    Fold()
    """

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse a scope without such layers, and weights that are codes by then.

        Raises:
            ScopeError: no BatchNorm of the scope reads a layer of it.
            ChainError: an earlier step quantises or splits one.
            TaskError: there is no task.
        """
        super().check(model, task, earlier)
        pairs = self._pairs(model, task)
        if not pairs and not earlier:
            raise ScopeError(
                "fold: no BatchNorm with running statistics reads what a linear layer or "
                f"convolution (no transposed one) of '{self.scope}' computes, and nothing else "
                "does; name other layers"
            )
        split = (p for p, each in self.scope.select(model).items() if isinstance(each, Halves))
        if not pairs and (path := next(split, None)) is not None:
            raise ChainError(
                f"fold after split at '{path}': the codes of its halves would change; fold first"
            )
        codes = coded(model, self.scope, earlier) if earlier else {}
        for path in pairs:
            representation = codes.get(f"{path}.weight")
            if representation is not None:
                raise ChainError(
                    f"fold after quantize ({representation.name}) at '{path}': the codes would "
                    "change; fold first"
                )
            refuse_tied(model, path, self.name)

    def apply(self, state: State) -> None:
        """Fold every pair of the scope; a layer that holds codes keeps its BatchNorm."""
        pairs, laid = self._pairs(state.model, state.task), laid_tensors(state.model)
        encoded = {
            name.removesuffix(".weight")
            for name, (layer, _) in laid.items()
            if not isinstance(layer.representation, Float)
        }
        left = [path for path in pairs if path not in encoded]
        for path in left:
            refuse_tied(state.model, path, self.name)
        for path in left:
            _fold(state.model, path, pairs[path])
        kept = len(pairs) - len(left)
        logger.info("fold: %d BatchNorm layers folded, %d kept behind codes", len(left), kept)

    def _pairs(self, model: nn.Module, task: Task | None) -> dict[str, str]:
        chosen, found = self.scope.select(model), norms_behind(model, task)
        return {path: norm for path, norm in found.items() if path in chosen and norm in chosen}


def _fold(model: nn.Module, path: str, norm: str) -> None:
    old, mask = model.get_submodule(path), mask_of(model, f"{path}.weight")
    behind = cast("_BatchNorm", model.get_submodule(norm))
    weight = cast("Tensor", old.weight)
    numbers = folded(weight, bias_of(old), behind)
    ((kind, arguments),) = describe(old).items()
    new = layer({kind: {**arguments, "bias": True}}).to(weight)
    new.requires_grad_(any(p.requires_grad for each in (old, behind) for p in each.parameters()))
    with torch.no_grad():
        for parameter, number in zip((new.weight, new.bias), numbers, strict=True):
            cast("Tensor", parameter).copy_(number)
    replace_(model, path, new)
    replace_(model, norm, nn.Identity())
    if mask is not None:
        lay(model, f"{path}.weight", Float(), mask=mask)
