"""Recording: one forward, watched operation by operation, tells which dimensions are coupled."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from laconic.errors import ModelError
from laconic.models.families import FAMILIES
from laconic.names import joined, module_of, of_laid
from laconic.step import undisturbed
from laconic.structure._atoms import Atom, Dim, fixed, freeze, root, unify
from laconic.structure._rules import ELEMENTWISE, Call, constant, pointwise, unknown
from laconic.structure._views import RULES
from laconic.weights.laid import bake, copied, laid_tensors
from laconic.weights.quantizer import Quantizer

__all__ = [
    "ATTRIBUTES",
    "UNSEEN",
    "Recording",
    "Tracked",
    "plain_copy",
    "record",
    "shapes_in_training",
]

# What a forward reads -> the kind of axis that it counts, whatever the family.
ATTRIBUTES: dict[str, str] = {
    name: kind for family in FAMILIES for name, kind in family.attributes.items()
}
SHOWN = 200
# Why an axis is frozen that more examples might free.
UNSEEN = "the examples do not run"
# Arguments that are numbers, whatever the operation.
_FILLED = ("fill_value", "value")
Foreseen = Sequence[tuple[Any, bool]]


@dataclasses.dataclass(frozen=True, eq=False)
class Tracked:
    """A parameter, or a vector of statistics: all its names, and its dimensions."""

    tensor: Tensor
    names: tuple[str, ...]
    dims: tuple[Dim, ...]


class Recording(TorchDispatchMode):
    """The dimensions of every tensor of a forward.

    Attributes:
        tracked: what an axis may be a part of.
        pieces: dimensions that were cut, which must turn out to be cut evenly.
        trace: every operation with its numbers, but for sizes: what must not change with a size.

    Args:
        network: that will run.
        inputs: of its forward.
        foreseen: every operation, and whether it is passed over; None: all are followed.
    """

    def __init__(self, network: nn.Module, inputs: Any, foreseen: Foreseen | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._strayed = False
        self._foreseen = None if foreseen is None else iter(foreseen)
        self.pieces: list[list[Dim]] = []
        self.trace: list[str] = []
        # With the tensor itself: a number that stands for a dead tensor is given to another.
        self._dims: dict[int, tuple[Tensor, list[Dim]]] = {}
        self._weights: set[int] = set()
        self._touched: set[int] = set()
        self._run: set[int] = set()
        self._inputs = inputs
        self.tracked = [self._track(*each) for each in _tensors(network)]
        for name, buffer in network.named_buffers():
            if id(buffer) not in self._dims:
                self.put(buffer, [fixed(size, f"the buffer {name}") for size in buffer.shape])
        for tensor in _leaves(inputs):
            if id(tensor) not in self._dims:
                self.put(tensor, [fixed(size, "an input") for size in tensor.shape])

    def _track(self, tensor: Tensor, names: tuple[str, ...]) -> Tracked:
        dims = [Dim([[Atom(size)]]) for size in tensor.shape]
        self.put(tensor, dims)
        if isinstance(tensor, nn.Parameter):
            self._weights.add(id(tensor))
        return Tracked(tensor, names, tuple(dims))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._run.update(map(id, _leaves([args, kwargs])))
        if self._passes_over(func):
            return result
        schema = func._schema.arguments
        arguments = {each.name: each.default_value for each in schema if each.has_default_value()}
        arguments |= dict(zip((each.name for each in schema), args, strict=False))
        arguments |= kwargs or {}
        # Where a result is put is no source of it.
        sources = {each.name: arguments[each.name] for each in schema if not each.is_out}
        call = Call(func.overloadpacket.__name__, sources, result)
        self._touched.update(map(id, call.tensors))
        self.trace.append(f"{func} {_numbers(func, call)}")
        _follow(self, func, call)
        return result

    def _passes_over(self, func: Any) -> bool:
        if self._foreseen is None:
            return False
        expected, unread = next(self._foreseen, (None, False))
        self._strayed |= expected is not func
        return unread

    def strayed(self) -> bool:
        """Return whether the operations were others than was foreseen, or fewer."""
        return self._strayed or next(self._foreseen or iter(()), None) is not None

    def dims(self, tensor: Tensor) -> list[Dim]:
        """Return the dimensions of a tensor; one that no operation made is a constant."""
        if id(tensor) not in self._dims:
            self.put(tensor, [fixed(size, "a constant meets it") for size in tensor.shape])
        return self._dims[id(tensor)][1]

    def put(self, tensor: Tensor, dims: Sequence[Dim]) -> None:
        """Say what the dimensions of a tensor are, whatever they were."""
        if tuple(dim.size for dim in dims) != tuple(tensor.shape):
            why = "an operation that is called in an unusual way"
            self._freeze(dims, why)
            dims = [fixed(size, why) for size in tensor.shape]
        self._dims[id(tensor)] = (tensor, list(dims))

    def give(self, tensor: Tensor, dims: Sequence[Dim]) -> None:
        """Say what they are; of a tensor that was changed in place, both are the same."""
        _, before = self._dims.get(id(tensor), (tensor, None))
        if before is None or [dim.size for dim in before] != [dim.size for dim in dims]:
            self.put(tensor, dims)
            return
        for one, other in zip(before, dims, strict=True):
            unify(one, other)

    def view(self, call: Call, dims: Sequence[Dim]) -> None:
        """Say what the dimensions of a view are; the view of a weight is a weight."""
        self.put(call.out, dims)
        if self.is_weight(call.source):
            self._weights.add(id(call.out))

    def is_weight(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a parameter, or a view of one."""
        return id(tensor) in self._weights

    def close(self, network: nn.Module, outputs: Any) -> None:
        """Freeze what only the whole forward can tell."""
        found = [tensor for tensor in _leaves(outputs) if id(tensor) in self._dims]
        if not found:
            raise ModelError(
                f"{type(network).__name__} returned no tensor that it computed; its axes are "
                "found from the tensors of its output"
            )
        for tensor in found:
            self._freeze(self.dims(tensor), "an output")
        for each in self.tracked:
            if id(each.tensor) not in self._touched:
                self._freeze(each.dims, "the forward does not use it")
            elif of_laid(each.names[0]):
                self._freeze(each.dims, "a parametrization that is not laconic's")
        self._freeze_unseen(network)
        self._join_heads(network)
        self._check_pieces()

    def _freeze_unseen(self, network: nn.Module) -> None:
        """Freeze what the matrices of modules that other data may call might read."""
        unseen = [t for t in self.tracked if id(t.tensor) not in self._run and t.tensor.dim() > 1]
        if not unseen:
            return
        called = _called(network, *self._inputs)
        idle = [each for each in unseen if called.isdisjoint(map(module_of, each.names))]
        names = {size: each.names[0] for each in idle for size in each.tensor.shape if size > 1}
        for dim in (dim for each in self.tracked for dim in each.dims if dim.size in names):
            self._freeze([dim], f"{UNSEEN} '{names[dim.size]}', which may read it")

    def _freeze(self, dims: Sequence[Dim], why: str) -> None:
        for dim in dims:
            freeze(dim, why)

    def _join_heads(self, network: nn.Module) -> None:
        """Make head dimensions one where a module counts them all by one attribute."""
        counted = {path: _counts(module) for path, module in network.named_modules()}
        first: dict[tuple[str, int], Atom] = {}
        for each in self.tracked:
            above = (path for name in each.names for path in _above(name))
            owner = next((path for path in above if counted.get(path)), None)
            for atom in (atom for dim in each.dims for atom in dim.leaves()):
                if owner is None or "head_dim" not in atom.roles:
                    continue
                if atom.size in counted[owner]:
                    other = first.setdefault((owner, atom.size), atom)
                    unify(Dim([[other]]), Dim([[atom]]))

    def _check_pieces(self) -> None:
        """Freeze what was cut unevenly: where it is cut may be written in the code."""
        for pieces in self.pieces:
            terms = [part for piece in pieces for part in piece.parts()]
            if len({tuple(id(root(atom)) for atom in term) for term in terms}) > 1:
                self._freeze(pieces, "cut into parts that differ")


class _Reading(TorchDispatchMode):
    """What every operation of a forward reads and makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # With the tensors themselves: a number that stands for a dead tensor is given to another.
        self.calls: list[tuple[Any, list[Tensor], list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, _leaves([args, kwargs]), _leaves(result)))
        return result


def _foreseen(network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Foreseen:
    """Return every operation of a forward, and whether its outputs are the same without it.

    So they are without probabilities of attention, say, that nobody asked for.
    """
    with _Reading() as reading:
        outputs = network(*args, **kwargs)
    needed, found = {id(tensor) for tensor in _leaves(outputs)}, []
    for func, read, made in reversed(reading.calls):
        changes = func._schema.is_mutable or not made
        useful = changes or any(id(tensor) in needed for tensor in made)
        needed |= {id(tensor) for tensor in read} if useful else set()
        found.append((func, not useful))
    return found[::-1]


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode, its weights plain, that shares what it does not change.

    Raises:
        ModelError: the network cannot be copied.
    """
    latent = {id(original) for _, original in laid_tensors(model).values()}
    shared = {key: each for key, each in _shared(model).items() if key not in latent}
    try:
        network = copied(model, shared)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: "
            f"{str(error)[:SHOWN]}); axes are found on a copy: keep what cannot be copied outside "
            "the network"
        ) from error
    bake(network)
    for module in network.modules():
        if isinstance(module, Quantizer):
            module.mode = "pass"
    return network.eval()


def _shared(network: nn.Module) -> dict[int, Tensor]:
    return {id(each): each for each in network.parameters()}


def record(network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Recording:
    """Run a network and return what was seen of all that its outputs depend on.

    Raises:
        ModelError: its forward fails.
    """
    with torch.no_grad(), undisturbed(), _spelled_out():
        try:
            # On a copy: what a forward keeps from its first run may spare it work in the second.
            foreseen = _foreseen(copied(network, _shared(network)), args, kwargs)
            recording, outputs = _watched(network, args, kwargs, foreseen)
            if recording.strayed():
                recording, outputs = _watched(network, args, kwargs)
        except Exception as error:
            raise _failure(network, args, kwargs, error) from error
    recording.close(network, outputs)
    return recording


def shapes_in_training(
    network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[torch.Size]:
    """Return the shapes of a network's outputs in training mode.

    It is run on a copy of its own: training moves statistics, and may write to parameters.

    Raises:
        ModelError: its forward fails.
    """
    network = copied(network).train()
    with torch.no_grad(), undisturbed():
        try:
            return [tensor.shape for tensor in _leaves(network(*args, **kwargs))]
        except Exception as error:
            raise _failure(network, args, kwargs, error) from error


def _called(network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> set[str]:
    """Return the modules that a forward calls, in evaluation or in training mode."""
    found: set[str] = set()
    for training in (False, True):
        other = copied(network).train(training)
        for name, module in other.named_modules(remove_duplicate=False):
            # Bound now: a hook gets no name.
            module.register_forward_pre_hook(lambda *_, name=name: found.add(name))
        # It may not train on this example.
        with contextlib.suppress(Exception), torch.no_grad(), undisturbed():
            other(*args, **kwargs)
    return found


def _failure(
    network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], error: Exception
) -> ModelError:
    called = [_described(each) for each in args]
    called += [f"{name}={_described(each)}" for name, each in kwargs.items()]
    return ModelError(
        f"{type(network).__name__} failed when called with ({', '.join(called)}): "
        f"{type(error).__name__}: {str(error)[:SHOWN]}"
    )


def _watched(
    network: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    foreseen: Foreseen | None = None,
) -> tuple[Recording, Any]:
    recording = Recording(network, (args, kwargs), foreseen)
    with recording:
        return recording, network(*args, **kwargs)


@contextlib.contextmanager
def _spelled_out() -> Iterator[None]:
    """Have torch run small operations, none that is a whole layer."""
    fast, cudnn = torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.cudnn.enabled = False  # recurrent layers, which a graphics card would fuse
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.backends.cudnn.enabled = cudnn


def _follow(recording: Recording, op: Any, call: Call) -> None:
    """Apply the rule of an operation; without one, all that it touches is frozen."""
    plain = call.name.removesuffix("_")
    known = RULES.get(call.name) or RULES.get(plain)
    if op.namespace != "aten" or not call.outs:
        unknown(recording, call)
    elif known is not None:
        known(recording, call)
    elif not call.tensors or call.name.startswith("new_"):
        constant(recording, call)
    elif torch.Tag.pointwise in op.tags or plain in ELEMENTWISE:
        pointwise(recording, call)
    else:
        unknown(recording, call)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value)[:40]


def _tensors(network: nn.Module) -> list[tuple[Tensor, tuple[str, ...]]]:
    """Return parameters and saved vectors of numbers, each once, with all their names."""
    names: dict[int, list[str]] = {}
    found: dict[int, Tensor] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        found[id(parameter)] = parameter
        names.setdefault(id(parameter), []).append(name)
    for path, module in network.named_modules(remove_duplicate=False):
        for attribute, buffer in module._buffers.items():
            saved = attribute not in module._non_persistent_buffers_set
            if saved and buffer is not None and buffer.dim() == 1 and buffer.is_floating_point():
                found[id(buffer)] = buffer
                names.setdefault(id(buffer), []).append(joined(path, attribute))
    return [(tensor, tuple(names[key])) for key, tensor in found.items()]


def _leaves(value: Any) -> list[Tensor]:
    """Return the tensors in nested containers, mappings and dataclasses."""
    found: list[Tensor] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += _leaves(list(leaf.values()))
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += _leaves([getattr(leaf, each.name) for each in dataclasses.fields(leaf)])
    return found


def _numbers(func: Any, call: Call) -> list[float]:
    """Return the numbers of a call that are no sizes; a view's whole numbers are."""
    scalar = torch.Tag.pointwise in func.tags
    found = [
        each
        for name, value in call.arguments.items()
        for each in tree_leaves(value)
        if type(each) is float or (type(each) is int and (scalar or name in _FILLED))
    ]
    if call.name == "lift_fresh":
        found += call.source.flatten().tolist()
    return found


def _counts(module: nn.Module) -> set[int]:
    """Return the head sizes that a module's attributes hold."""
    values = vars(module)
    return {
        values[name]
        for name, kind in ATTRIBUTES.items()
        if kind == "head_dim" and type(values.get(name)) is int
    }


def _above(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name
