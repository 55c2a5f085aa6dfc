"""Reconstruction layer by layer: what enters both networks, and the layer that is fitted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from laconic.errors import AxisError, ModelError, RecipeError, RunError, ScopeError
from laconic.names import joined
from laconic.progress import progress
from laconic.recover.descent import Descent
from laconic.recover.feeding import Feed
from laconic.recover.inflow import Inflow, Pair, calls_of
from laconic.recover.optimize import Optimizer
from laconic.recover.penalties import along_channels, channel_norms
from laconic.recover.quadratic import (
    Fitted,
    Moments,
    Quadratic,
    is_fitted,
    matrix_of,
    weight_of,
)
from laconic.recover.solve import Solve, contributions
from laconic.scope import Scope
from laconic.step import State
from laconic.structure.axes import Axis, find_axes
from laconic.structure.columns import groups_of
from laconic.structure.elements import mask_, roles, slice_masked_
from laconic.structure.examples import example_inputs
from laconic.tasks.task import needed
from laconic.weights.laid import latent_of, mask_of, narrow
from laconic.weights.representation import full_mask
from laconic.weights.workspace import wide_dtype

__all__ = ["LayerPart", "fit_layers", "fitted_layers", "read_alone"]

logger = logging.getLogger(__name__)

# Kinds of axes whose elements a layer may be the only one to read.
READ_ALONE = ("channel", "neuron")


class LayerPart:
    """One layer of the student that learns to answer as the teacher's.

    Args:
        state: its model has the layer.
        path: of the layer.
        moments: of what enters it in both networks.
        feed: what both sides are fed.
        label: what a progress bar calls it.
    """

    def __init__(
        self, state: State, path: str, moments: Moments, *, feed: Feed, label: str
    ) -> None:
        self.state, self.path, self.moments, self.feed = state, path, moments, feed
        self.label = label
        self.name = joined(path, "weight")
        self.layer = moments.layers[1]

    @property
    def channels(self) -> int:
        """Return how many input channels the layer reads."""
        return int(self.layer.weight.shape[1])

    def quadratic(self, progress: float, start: Tensor | None = None) -> Quadratic:
        """Return the loss at this progress, in float64; see ``Moments.quadratic``."""
        return self.moments.quadratic(self.feed.mixtures(progress), start)

    @property
    def precision(self) -> torch.dtype:
        """Return what it descends in: the precision of its weight, float32 at least."""
        latent = latent_of(self.state.model, self.name)[1]
        return wide_dtype(latent)

    def around(self, start: Tensor, progress: float) -> Quadratic:
        """Return the loss as a form of the difference to a matrix, in that one's precision."""
        return self.quadratic(progress, start.double()).to(start.dtype)

    def parameters(self) -> list[nn.Parameter]:
        """Return what moves: the latent weight, the bias, and tables that are learned."""
        return [each for each in self.layer.parameters() if each.requires_grad]

    def numbers(self) -> dict[str, Tensor]:
        """Return a copy of all that the layer holds, by name."""
        return {name: each.clone() for name, each in self.layer.state_dict().items()}

    def put_back(self, numbers: Mapping[str, Tensor]) -> None:
        """Let the layer hold again what ``numbers`` returned."""
        for name, each in self.layer.state_dict().items():
            each.copy_(numbers[name])

    def descent(self, optimizer: Optimizer) -> Descent:
        """Return an optimiser at work on what moves."""
        return Descent(
            optimizer, self.layer, [""], networks=[self.parameters()], name="reconstruct"
        )

    def loss(self, form: Quadratic, start: Tensor) -> Tensor:
        """Return the loss by a form of the difference to a matrix, which is ``start``."""
        return form(matrix_of(self.layer) - start)

    def matrix(self) -> Tensor:
        """Return weight and bias as the layer uses them [groups, inputs, outputs], float64."""
        return matrix_of(self.layer).detach().double()

    def weight(self) -> Tensor:
        """Return the latent weight, 0 where it is masked [outputs, channels, ...]."""
        latent, mask = latent_of(self.state.model, self.name)[1].detach(), self._mask()
        return latent if mask is None else torch.where(mask, latent, 0.0)

    def write(self, matrix: Tensor) -> None:
        """Set weight and bias."""
        weight, answers = weight_of(self.layer, matrix)
        self.write_weight(weight)
        bias = self.layer.bias
        if bias is not None and bias.requires_grad and answers is not None:
            with torch.no_grad():
                bias.copy_(answers)

    def write_weight(self, weight: Tensor) -> None:
        """Set the latent weight [its shape]."""
        with torch.no_grad():
            latent_of(self.state.model, self.name)[1].copy_(weight)

    def narrow(self, mask: Tensor) -> None:
        """Mask all other weights, bool [shape of the weight], besides those masked before."""
        before = self._mask()
        mask = mask.to(self.layer.weight.device)
        narrow(self.state.model, self.name, mask if before is None else before & mask)

    def left(self) -> Tensor | None:
        """Return which weights may move, bool [groups, inputs, outputs]; None: all of them."""
        mask, bias = self._mask(), self.layer.bias
        if mask is None and (bias is None or bias.requires_grad):
            return None
        mask = full_mask(mask, self.layer.weight)
        left = mask.reshape(groups_of(self.layer), -1, mask[0].numel()).transpose(1, 2)
        if bias is None:
            return left
        return torch.cat([left, torch.full_like(left[:, :1], bias.requires_grad)], dim=1)

    def fixed(self) -> Tensor:
        """Return the matrix of a bias that is frozen, 0 elsewhere [groups, inputs, outputs]."""
        matrix, bias = self.matrix(), self.layer.bias
        if bias is None or bias.requires_grad:
            return torch.zeros_like(matrix)
        matrix[:, :-1] = 0
        return matrix

    def refuse_scattered(self) -> None:
        """Stop where single weights are masked, which a sum of columns would bring back.

        Raises:
            RecipeError: answers of the layer read different inputs.
        """
        mask = self._mask()
        if mask is not None and not bool((mask == mask[:1]).all()):
            raise RecipeError(
                f"reconstruct: weights of '{self.name}' are pruned, not whole inputs, and a "
                "pointwise convolution mixes all answers of a layer; use least_squares or gradient"
            )

    def contributions(self) -> tuple[Tensor, Tensor]:
        """Return the inner products of the channels' contributions; see ``contributions``."""
        shape = self.channels, self.layer.weight[0, 0].numel()
        return contributions(self.quadratic(1.0), self.matrix(), shape)

    def norms(self) -> Tensor:
        """Return the norm of the weights of every input channel [channels], float64."""
        return channel_norms(self.layer.weight.detach().double())

    def goal(self, keep: float) -> int:
        """Return how many input channels a fraction of them is, at least one."""
        return max(1, round(keep * self.channels))

    def select(self, kept: Tensor) -> None:
        """Leave these input channels, bool [channels]; the others are masked."""
        weight = self.layer.weight
        self.narrow(along_channels(kept, weight).expand(weight.shape))

    def selected(self) -> Tensor:
        """Return which input channels anything of the layer still reads, bool [channels]."""
        mask = self._mask()
        if mask is None:
            return torch.ones(self.channels, dtype=torch.bool)
        return mask.transpose(0, 1).flatten(1).any(dim=1).cpu()

    def scale(self, factors: Tensor) -> None:
        """Multiply the weights of every input channel by a factor [channels]."""
        weight = self.weight().double()
        self.write_weight(weight * along_channels(factors, weight))

    def note(self, loss: float) -> None:
        """Add a loss to the layer's curve; rounding may have made one of 0 negative."""
        self.state.note(self.path, max(loss, 0.0))

    def loss_now(self) -> float:
        """Return the loss of the layer as it is now, fed as in the end."""
        form = self.quadratic(1.0, self.matrix())
        return max(form.constant / form.count, 0.0)

    def note_loss(self) -> None:
        """Add the loss of the layer as it is now."""
        self.note(self.loss_now())

    def _mask(self) -> Tensor | None:
        return mask_of(self.state.model, self.name)


def fit_layers(state: State, scope: Scope, *, feed: Feed, solve: Solve) -> None:
    """Fit the layers of a scope one after the other, in the order of a forward.

    Where the solver chooses input channels, only layers are fitted that alone read a free axis;
    what computes a channel that is gone is masked with it, and in the end all of it is cut out.

    Args:
        state: its model changes; its first teacher answers; its task gives the examples.
        scope: the linear layers and convolutions that may move.
        feed: what both sides are fed.
        solve: how a layer is fitted.

    Raises:
        ScopeError, ModelError: no layer of the scope can be fitted.
        AxisError: no layer of the scope alone reads channels that could go.
        RunError: what enters a layer is not finite; a loss is not.
    """
    layers = fitted_layers(state, scope, feed)
    axes = read_alone(state, layers) if solve.selects else {}
    paths = [path for path in layers if path in axes or not solve.selects]
    with state.scratch() as folder:
        inflow = Inflow(state, folder)
        done = state.saved[0] if state.saved else 0
        rounds = progress(state.rounds(len(paths)), "reconstruct: layers", len(paths) - done)
        for index in rounds:
            state.checkpoint()
            path = paths[index]
            label = f"reconstruct {path} ({index + 1} of {len(paths)})"
            moments = inflow.moments(path, layers[path])
            _check_finite(moments, path)
            part = LayerPart(state, path, moments, feed=feed, label=label)
            began = part.loss_now()
            solve.fit(part)
            logger.info("%s: loss %.4g -> %.4g", label, began, part.loss_now())
            if path in axes:
                mask_(state.model, {axes[path]: part.selected()})
    slice_masked_(state.model, list(axes.values()))


def fitted_layers(state: State, scope: Scope, feed: Feed) -> dict[str, Pair]:
    """Return the layers of a scope that the teacher's can teach, in the order of a forward.

    Raises:
        ScopeError: the scope has no linear layer or convolution that a forward calls.
        ModelError: the teacher has none of them, or feeding them needs inputs of one width.
    """
    if not len(state.teacher):
        raise ModelError("reconstruct needs a teacher; run it by compress, or give the state one")
    task, teacher = needed(state.task, "reconstruct needs examples"), state.teacher[0]
    called = calls_of(task, state.model, scope.select(state.model))
    if not called:
        raise ScopeError(
            f"reconstruct: '{scope}' selects no linear layer or convolution that a forward calls"
        )
    theirs, taught = dict(teacher.named_modules()), calls_of(task, teacher, called)
    held = Counter(p for each in state.model.modules() for p in each.parameters(recurse=False))
    pairs: dict[str, Pair] = {}
    for path, calls in called.items():
        student = cast("Fitted", state.model.get_submodule(path))
        weight = latent_of(state.model, joined(path, "weight"))[1]
        other = theirs[path] if taught[path] == calls else None
        reason = _reason(student, weight, other, shared=held[cast("nn.Parameter", weight)] > 1)
        if not reason:
            pairs[path] = Pair(cast("Fitted", other), student, calls)
            _check_feed(feed, path, pairs[path])
            continue
        logger.info("reconstruct: '%s' stays: %s", path, reason)
    if not pairs:
        raise ModelError(
            f"reconstruct: no layer of '{scope}' can be fitted ('{path}': {reason}); set "
            "requires_grad, fit whole blocks (parts: block), or reconstruct before layers are "
            "replaced"
        )
    return pairs


def _reason(student: Fitted, weight: Tensor, other: nn.Module | None, *, shared: bool) -> str:
    """Return why a layer cannot learn the answers of the teacher's; "": it can."""
    if not weight.requires_grad:
        return "its weight is frozen"
    if not weight.numel():
        return "its weight is empty"
    if shared:
        return "other modules share its weight"
    if is_fitted(other) and other.weight.shape[0] != weight.shape[0]:
        return "outputs of it were cut before; a penalty of this step cuts and fits at once"
    alike = other is not None and _answers_alike(other, student)
    return "" if alike else "the teacher's gives other answers"


def _answers_alike(teacher: nn.Module, student: Fitted) -> bool:
    """Return whether answers of the same shape come from the same positions."""
    if not is_fitted(teacher):
        return False
    names = ("kernel_size", "stride", "padding", "dilation", "groups")
    same = [getattr(teacher, name, None) == getattr(student, name, None) for name in names]
    biased = (teacher.bias is None) == (student.bias is None)
    return all(same) and biased and teacher.weight.shape[0] == student.weight.shape[0]


def _check_feed(feed: Feed, path: str, pair: Pair) -> None:
    """Refuse to mix what has not the same width."""
    own = all(
        (term.teacher, term.student) == (1, 1)
        for progress in (0.0, 1.0)
        for term in feed.mixtures(progress)
    )
    shapes = [tuple(layer.weight.shape) for layer in (pair.teacher, pair.student)]
    if not own and shapes[0] != shapes[1]:
        raise ModelError(
            f"reconstruct: '{path}' reads {shapes[1][1]} channels and the teacher's "
            f"{shapes[0][1]}, which {feed} would mix; feed it by student, or reconstruct first "
            "and let it remove channels"
        )


def _check_finite(moments: Moments, path: str) -> None:
    """Refuse to fit a layer to NaN or infinity."""
    for network, sums in (("teacher", moments.teacher), ("student", moments.own)):
        if not bool(sums.isfinite().all()):
            raise RunError(
                f"reconstruct: what enters '{path}' in the {network} holds NaN or infinity, or "
                "numbers whose squares overflow; look at the examples and the weights before it"
            )


def read_alone(state: State, paths: Iterable[str]) -> dict[str, Axis]:
    """Return the free axes of channels that one layer alone reads, by the layer's path.

    Args:
        state: the network, and examples of what it is called with.
        paths: of the layers.

    Raises:
        AxisError: none of the layers reads such an axis.

    >>> from laconic.models import digits_cnn
    >>> from laconic.tasks import digits
    >>> sorted(read_alone(State(digits_cnn(), digits()), ["conv1", "conv2", "fc2"]))
    ['conv2', 'fc2']
    """
    inputs, named = example_inputs(state.model, state.task)
    found: dict[str, Axis] = {}
    for axis in find_axes(state.model, *inputs, **named):
        readers = roles(state.model, axis)["consumed"]
        if axis.frozen is None and axis.kind in READ_ALONE and len(readers) == 1:
            path = readers[0].name.rpartition(".")[0]
            layer = state.model.get_submodule(path)
            if is_fitted(layer) and layer.weight.shape[1] == axis.size:
                found[path] = axis
    chosen = {path: found[path] for path in paths if path in found}
    if not chosen:
        raise AxisError(
            "reconstruct: no layer of the scope alone reads channels that could go; those that "
            f"do: {', '.join(found) or 'none'}"
        )
    return chosen
