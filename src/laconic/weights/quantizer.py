"""Quantizer: the module that rounds what flows into a layer, and learns its range."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from laconic.errors import ModelError, TaskError, nearest
from laconic.models.attention import UnpackedAttention, hand_on_padded_
from laconic.models.families import blocks_path, family_of
from laconic.models.rounding import (
    INPUT,
    OPERANDS,
    check_attention,
    place_,
    quantizers_of,
    use_attention_,
)
from laconic.names import joined
from laconic.tasks.task import device_of, full_precision
from laconic.weights.activations import Activation
from laconic.weights.workspace import traced, wide_dtype

if TYPE_CHECKING:
    from laconic.tasks import Batch, Task

__all__ = [
    "Quantizer",
    "activations_data",
    "activations_of",
    "attach_",
    "attach_data_",
    "attention_paths",
    "calibrate",
    "check_places",
    "quantizing",
]

Mode = Literal["round", "calibrate", "pass"]


class Quantizer(nn.Module):
    """Rounds a tensor as an activation says; owns what that learns.

    It computes in float32 whatever autocast says, and what it learns stays in float32 when a
    network is turned to half precision. In training it follows what it sees first.

    Attributes:
        activation: how numbers are rounded.
        mode: "round"; "calibrate": follow what passes and leave it as it is; "pass": do nothing.

    >>> from laconic.weights import MinMax
    >>> Quantizer(MinMax(2))(torch.tensor([0.0, 0.4, 3.0]))
    tensor([0., 0., 3.])
    >>> Quantizer(MinMax(2))
    Quantizer(MinMax(2))
    """

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.mode: Mode = "round"
        state = activation.start()
        self.names = tuple(state)
        for name, tensor in state.items():
            if name in activation.learned:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    @property
    def state(self) -> dict[str, Tensor]:
        """Return what the activation has learned, each []."""
        return {name: getattr(self, name) for name in self.names}

    @property
    def blank(self) -> bool:
        """Return whether it needs data for its range and has seen none."""
        seen = any(bool(tensor.any()) for tensor in self.state.values())
        return self.activation.needs_data and not seen

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            wide = moved.dtype == wide_dtype(moved)
            return moved if wide else tensor.to(moved.device, wide_dtype(moved))

        return super()._apply(kept, recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Return what ``print`` shows of it."""
        return repr(self.activation)

    def reset_parameters(self) -> None:
        """Forget what was learned; a range that needs data has seen none then."""
        with torch.no_grad():
            for name, tensor in self.activation.start().items():
                getattr(self, name).copy_(tensor)

    def forward(self, tensor: Tensor) -> Tensor:
        """Return the tensor on its grid, in its dtype."""
        if self.mode == "pass" or not (traced() or tensor.numel()):
            return tensor
        with torch.autocast(tensor.device.type, enabled=False):
            if self.training or self.mode == "calibrate":
                with torch.no_grad():
                    self.activation.observe(tensor.detach(), self.state, training=self.training)
            if self.mode == "calibrate":
                return tensor
            return self.activation.rounded(tensor, self.state)


def activations_of(model: nn.Module) -> dict[str, dict[str, Activation]]:
    """Return path -> place -> how the numbers that come there are rounded.

    >>> from laconic.weights import MinMax
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> attach_(model, {"0": {"input": MinMax(4)}})
    >>> activations_of(model)
    {'0': {'input': MinMax(4)}}
    """
    return {
        path: {place: each.activation for place, each in found.items()}  # type: ignore[misc]
        for path, found in quantizers_of(model).items()
    }


@torch.inference_mode(False)  # what is made here is trained later
def attach_(model: nn.Module, activations: Mapping[str, Mapping[str, Activation]]) -> None:
    """Let modules of a network round what flows into them.

    Args:
        model: the network, changed in place.
        activations: path -> place -> how; a place is "input" of a layer, or an operand of
            attention ("query", "key", "probabilities", "value") of a module that computes it.

    Raises:
        ModelError: no such module or place, or an attention that cannot be exchanged.

    >>> from laconic.weights import MinMax
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False))
    >>> attach_(model, {"0": {"input": MinMax(2)}})
    >>> bool(model(torch.tensor([[0.1], [3.0]]))[0] == 0)
    True
    """
    check_places(model, activations)
    device = device_of(model)
    for path, places in activations.items():
        for place, activation in places.items():
            place_(model.get_submodule(path), place, Quantizer(activation).to(device))
    if _exchanges(model, activations):
        use_attention_(model)
    hand_on_padded_(model, map(model.get_submodule, activations))


def _exchanges(model: nn.Module, activations: Mapping[str, Mapping[str, Activation]]) -> bool:
    """Return whether operands are rounded in a network that has its attention exchanged."""
    operands = any(places.keys() - {INPUT} for places in activations.values())
    return operands and family_of(model) is not None


def check_places(model: nn.Module, activations: Mapping[str, Mapping[str, Activation]]) -> None:
    """Refuse places where a network cannot round.

    Args:
        model: the network.
        activations: as for ``attach_``.

    Raises:
        ModelError: no such module or place, a module that computes with its child itself, or an
            attention that cannot be exchanged.

    >>> check_places(nn.Linear(1, 1), {})
    """
    modules, attentions = dict(model.named_modules()), attention_paths(model)
    for path, places in activations.items():
        if path not in modules:
            raise ModelError(
                f"the network has no module '{path}'{nearest(path, filter(None, modules))}"
            )
        for place in places.keys() - {INPUT}:
            if place not in OPERANDS or path not in attentions:
                raise ModelError(
                    f"'{path}' has no '{place}' to round; layers have an '{INPUT}', modules "
                    f"that compute attention {', '.join(OPERANDS)}"
                )
        parent = path.rpartition(".")[0]
        if INPUT in places and path and isinstance(modules[parent], nn.MultiheadAttention):
            raise ModelError(
                f"'{parent}' is a MultiheadAttention, which computes with the weight of '{path}' "
                f"itself and never calls it, so its input cannot be rounded; put the step "
                f"'unpack' before, or leave it out of the scope with '!{path}'"
            )
    if _exchanges(model, activations):
        check_attention(model)


def activations_data(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what ``activations_of`` does, as a recipe would write it.

    >>> activations_data(nn.Linear(2, 2))
    {}
    """
    return {
        path: {place: activation.to_data() for place, activation in places.items()}
        for path, places in activations_of(model).items()
    }


def attach_data_(model: nn.Module, data: Mapping[str, Mapping[str, Any]]) -> None:
    """Attach what ``activations_data`` returned.

    Args:
        model: the network, changed in place.
        data: path -> place -> what a recipe would write.

    Raises:
        ModelError: as ``attach_``; or something is no activation.
    """
    try:
        wanted = {
            path: {place: Activation.understood(value) for place, value in places.items()}
            for path, places in data.items()
        }
    except ValueError as error:
        raise ModelError(f"the activations cannot be read: {error}") from None
    attach_(model, wanted)


def calibrate(
    model: nn.Module, task: Task, batches: Iterable[Batch], quantizers: Sequence[Quantizer]
) -> int:
    """Let quantisers find their ranges from what flows through the network in floats.

    What training learns (clips, spacings) stays as it is, once it has begun. No gradient, no
    dropout, float32.

    Args:
        model: the network.
        task: knows how it is called.
        batches: on its device.
        quantizers: of the network; they change.

    Returns:
        How many batches there were.

    Raises:
        TaskError: there were none.
        ModelError: what flows through the network is not finite.

    >>> from laconic.models import digits_cnn
    >>> from laconic.tasks import digits
    >>> from laconic.weights import Percentile
    >>> model, task = digits_cnn(), digits()
    >>> attach_(model, {"conv1": {"input": Percentile(8)}})
    >>> calibrate(model, task, [task.example_batch(50)], [model.conv1.quantizers["input"]])
    1
    """
    count = 0
    for quantizer in quantizers:
        if not quantizer.activation.learned:
            quantizer.reset_parameters()
    with full_precision(model), quantizing(model, "pass"):
        for quantizer in quantizers:
            quantizer.mode = "calibrate"
        for batch in batches:
            task.call(model, batch)
            count += 1
    if not count:
        raise TaskError("there are no examples to calibrate activations on; give at least a batch")
    _check_finite(model, quantizers)
    return count


def _check_finite(model: nn.Module, quantizers: Sequence[Quantizer]) -> None:
    for name, module in model.named_modules():
        if module in quantizers and not all(
            bool(t.isfinite()) for t in module.state_dict().values()
        ):
            raise ModelError(
                f"'{name}' was fed values that are not finite while its range was searched; look "
                "for such values in the data, or the steps before have broken the network: lower "
                "their learning rate or compress less"
            )


def attention_paths(model: nn.Module) -> list[str]:
    """Return the modules that compute attention so that its operands can be rounded.

    They are those of a family's blocks, and of other networks the attentions that were unpacked.

    >>> attention_paths(nn.Linear(2, 2))
    []
    """
    family = family_of(model)
    if family is None:
        modules = model.named_modules()
        return [path for path, module in modules if isinstance(module, UnpackedAttention)]
    base = blocks_path(model)
    blocks = model.get_submodule(base)
    return [joined(f"{base}.{name}", family.attention) for name, _ in blocks.named_children()]


@contextmanager
def quantizing(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Have all quantisers of a network in a mode inside a with block.

    >>> from laconic.weights import MinMax
    >>> model = nn.Sequential(nn.Linear(1, 1))
    >>> attach_(model, {"0": {"input": MinMax(2)}})
    >>> with quantizing(model, "pass"):
    ...     model[0].quantizers["input"](torch.tensor([0.3, 0.9]))
    tensor([0.3000, 0.9000])
    """
    quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
    before = [quantizer.mode for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.mode = mode
        yield
    finally:
        for quantizer, kept in zip(quantizers, before, strict=True):
            quantizer.mode = kept
