"""Rules: what each operation of a forward says about the dimensions of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from laconic.structure._atoms import Atom, Dim, fixed, freeze, mark, unify

if TYPE_CHECKING:
    from laconic.structure._record import Recording

__all__ = ["ELEMENTWISE", "KERNEL", "RULES", "Call", "constant", "pointwise", "rule", "unknown"]

# Not listed among the axes of a network: the pixels of a kernel.
KERNEL = "pixels of a kernel"
SPATIAL = "pixels, not features"


@dataclass(frozen=True, eq=False)
class Call:
    """One operation: its arguments by the names of its schema, and what it returned."""

    name: str
    arguments: Mapping[str, Any]
    result: Any

    def __getitem__(self, argument: str) -> Any:
        """Return an argument."""
        return self.arguments[argument]

    @property
    def tensors(self) -> list[Tensor]:
        """Return the tensors among the arguments, lists taken apart."""
        return [each for each in tree_leaves(list(self.arguments.values())) if _is_tensor(each)]

    @property
    def source(self) -> Tensor:
        """Return the first tensor."""
        return self.tensors[0]

    @property
    def outs(self) -> list[Tensor]:
        """Return the tensors that it returned."""
        return [each for each in tree_leaves(self.result) if _is_tensor(each)]

    @property
    def out(self) -> Tensor:
        """Return the first of them."""
        return self.outs[0]

    def dims(self, argument: str = "dim") -> list[int]:
        """Return the dimensions of the source that an argument names; None: all of them."""
        count, named = self.source.dim(), self.arguments.get(argument)
        if named is None or named == [] or not count:  # a single number has none to name
            return list(range(count))
        return [dim % count for dim in (named if isinstance(named, Sequence) else [named])]


Rule = Callable[["Recording", Call], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register what follows for operations of these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


# ------------------------------------------------------------ one element at a time

# What torch does not tag as pointwise, though it is.
ELEMENTWISE = frozenset(
    "_fused_dropout _prelu_kernel _to_copy bernoulli copy dropout empty_like fill full_like "
    "hardswish log_sigmoid_forward masked_fill native_dropout ones_like rand_like randn_like "
    "rrelu_with_noise rsub zero zeros_like".split()
)
_SUMS = frozenset({"add", "add_", "sub", "sub_", "rsub"})


def pointwise(recording: Recording, call: Call) -> None:
    """Unify what is computed element by element; size 1 is stretched."""
    shape, joined = call.out.shape, [Dim([[]]) for _ in call.out.shape]
    role = _role(recording, call)
    for tensor in call.tensors:
        lead = len(shape) - tensor.dim()
        for index, dim in enumerate(recording.dims(tensor), start=lead):
            if joined[index].size == dim.size and dim.size > 1:
                _meet(joined[index], dim, role)
            elif dim.size == shape[index]:
                joined[index] = dim.copy()
    for out in call.outs:
        if out.shape == shape:
            recording.give(out, [dim.copy() for dim in joined])


def _meet(one: Dim, other: Dim, role: str | None) -> None:
    known = one.roots() == other.roots() or (role == "residual" and _fresh(one) and _fresh(other))
    unify(one, other)
    if role is not None and not known:
        mark(other, role)


def _fresh(dim: Dim) -> bool:
    """Return whether a linear layer has just made it: two such are halves, and no stream."""
    return all("made" in atom.roles and "read" not in atom.roles for atom in dim.leaves())


def _role(recording: Recording, call: Call) -> str | None:
    """Return what joining different dimensions makes of them."""
    vectors = [recording.is_weight(each) and each.dim() == 1 for each in call.tensors]
    activations = [each for each in call.tensors if not recording.is_weight(each)]
    if call.name in ("mul", "mul_") and any(vectors):
        return "scaled"  # a norm without statistics, as MobileBERT's
    return "residual" if call.name in _SUMS and len(activations) > 1 else None


def constant(recording: Recording, call: Call) -> None:
    """Freeze what has its size from the code."""
    for out in call.outs:
        recording.give(out, [fixed(size, "a constant meets it") for size in out.shape])


def unknown(recording: Recording, call: Call) -> None:
    """Freeze all that an operation without a rule touches."""
    why = f"no rule for {call.name}"
    for tensor in call.tensors:
        for dim in recording.dims(tensor):
            freeze(dim, why)
    for out in call.outs:
        recording.give(out, [fixed(size, why) for size in out.shape])


# ------------------------------------------------------------ products


def _contract(recording: Recording, tensors: tuple[Tensor, Tensor], dims: tuple[Dim, Dim]) -> None:
    """Sum over one dimension of either tensor."""
    unify(*dims)
    if not any(map(recording.is_weight, tensors)):
        mark(dims[0], "matched")
    for tensor, dim in zip(tensors, dims, strict=True):
        if recording.is_weight(tensor):
            dim.read = True
            mark(dim, "read")


def _made(recording: Recording, tensor: Tensor, dim: Dim) -> None:
    if recording.is_weight(tensor):
        dim.made = True
        mark(dim, "made")


@rule("mm", "addmm", "bmm", "baddbmm")
def _product(recording: Recording, call: Call) -> None:
    *_, left, right = call.tensors
    ours, theirs = recording.dims(left), recording.dims(right)
    _contract(recording, (left, right), (ours[-1], theirs[-2]))
    _made(recording, left, ours[-2])
    _made(recording, right, theirs[-1])
    if not recording.is_weight(left) and not recording.is_weight(right):
        for dim in (*ours[-2:], theirs[-1]):
            mark(dim, "head_dim")
        if len(ours) == 3:
            mark(ours[0], "head")
    if len(ours) == 3:
        unify(ours[0], theirs[0])
    out = [dim.copy() for dim in (*ours[:-1], theirs[-1])]
    if len(call.tensors) == 3:
        _broadcast(recording, call.source, out)
    recording.give(call.out, out)


def _broadcast(recording: Recording, tensor: Tensor, dims: Sequence[Dim]) -> None:
    """Make a tensor's dimensions those of a result, where it is not stretched."""
    for dim, other in zip(reversed(recording.dims(tensor)), reversed(dims), strict=False):
        if dim.size == other.size:
            unify(dim, other)


@rule("linear")
def _linear(recording: Recording, call: Call) -> None:
    inputs, weight = recording.dims(call["input"]), recording.dims(call["weight"])
    _contract(recording, (call["input"], call["weight"]), (inputs[-1], weight[1]))
    _made(recording, call["weight"], weight[0])
    out = [dim.copy() for dim in (*inputs[:-1], weight[0])]
    if call["bias"] is not None:
        _broadcast(recording, call["bias"], out)
    recording.give(call.out, out)


@rule("convolution", "_convolution")
def _convolution(recording: Recording, call: Call) -> None:
    inputs, weight = recording.dims(call["input"]), recording.dims(call["weight"])
    made, read = weight[:2] if not call["transposed"] else weight[1::-1]
    groups = int(call["groups"])
    if groups == 1:
        _contract(recording, (call["input"], call["weight"]), (inputs[1], read))
    elif not call["transposed"]:
        _grouped(groups, inputs[1], weight)
    else:
        unknown(recording, Call("transposed convolution in groups", call.arguments, call.result))
        return
    for dim in (inputs[1], made, read):
        mark(dim, "channel")
    for dims, why in ((inputs[2:], SPATIAL), (weight[2:], KERNEL)):
        for dim in dims:
            freeze(dim, why)
    made.made = True
    if call["bias"] is not None:
        unify(recording.dims(call["bias"])[0], made)
    pixels = [fixed(size, SPATIAL) for size in call.out.shape[2:]]
    recording.give(call.out, [inputs[0].copy(), made.copy(), *pixels])


def _grouped(groups: int, channels: Dim, weight: Sequence[Dim]) -> None:
    """Every group reads its own inputs: whole groups come and go, or a part of each."""
    group = Atom(groups)
    read, made = Atom(channels.size // groups), Atom(weight[0].size // groups)
    unify(channels, Dim([[group, read]]))
    unify(weight[0], Dim([[group, made]]))
    unify(weight[1], Dim([[read]]))
    weight[1].read = True


@rule("mkldnn_rnn_layer")
def _recurrent(recording: Recording, call: Call) -> None:
    inputs, weight = recording.dims(call.source), recording.dims(call["weight0"])
    _contract(recording, (call.source, call["weight0"]), (inputs[2], weight[1]))
    why = "the state of a recurrent layer"
    for tensor in call.tensors[2:]:
        for dim in recording.dims(tensor):
            freeze(dim, why)
    freeze(weight[0], why)
    recording.give(call.out, [*(dim.copy() for dim in inputs[:2]), fixed(call.out.shape[2], why)])


@rule("embedding")
def _embedding(recording: Recording, call: Call) -> None:
    rows, features = recording.dims(call["weight"])
    freeze(rows, "its rows are looked up")
    features.made = True
    places = [dim.copy() for dim in recording.dims(call["indices"])]
    recording.give(call.out, [*places, features.copy()])


# ------------------------------------------------------------ norms


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "cudnn_batch_norm",
    "miopen_batch_norm",
)
def _batch_norm(recording: Recording, call: Call) -> None:
    dims = recording.dims(call.source)
    for vector in call.tensors[1:]:
        unify(recording.dims(vector)[0], dims[1])
    for dim in (dims[0], *dims[2:]):
        freeze(dim, "a batch norm averages over it")
    recording.give(call.out, [dim.copy() for dim in dims])


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(recording: Recording, call: Call) -> None:
    dims = recording.dims(call.source)
    over = dims[-len(call["normalized_shape"]) :]
    for dim in over:
        mark(dim, "normed")
    for vector in call.tensors[1:]:
        for dim, other in zip(recording.dims(vector), over, strict=True):
            unify(dim, other)
    recording.give(call.out, [dim.copy() for dim in dims])


@rule("native_group_norm")
def _group_norm(recording: Recording, call: Call) -> None:
    dims = recording.dims(call.source)
    groups = int(call["group"])
    group, within = Atom(groups), Atom(dims[1].size // groups)
    for vector in call.tensors[1:]:
        unify(recording.dims(vector)[0], dims[1])
    unify(dims[1], Dim([[group, within]]))
    if groups == 1:
        mark(dims[1], "normed")
    else:
        freeze(Dim([[within]]), "a group of a GroupNorm")
    recording.give(call.out, [dim.copy() for dim in dims])


# ------------------------------------------------------------ over a dimension


@rule("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "logcumsumexp")
def _over(recording: Recording, call: Call) -> None:
    dims = recording.dims(call.source)
    for index in call.dims():
        freeze(dims[index], f"{call.name.strip('_')} over it")
    recording.give(call.out, [dim.copy() for dim in dims])


@rule(
    *("sum", "nansum", "mean", "prod", "amax", "amin", "max", "min", "any", "all"),
    *("argmax", "argmin", "var", "std", "logsumexp"),
)
def _reduced(recording: Recording, call: Call) -> None:
    if len(call.tensors) > 1:  # the larger of two tensors
        pointwise(recording, call)
        return
    dims, over = recording.dims(call.source), call.dims()
    for index in over:  # a sum too: what is cut off need not have been zero
        freeze(dims[index], f"{call.name} over it")
    whole = call.arguments.get("keepdim", False)
    left = [
        Dim([[]]) if index in over else dim.copy()
        for index, dim in enumerate(dims)
        if whole or index not in over
    ]
    for out in call.outs:
        recording.give(out, [dim.copy() for dim in left])


def _pixels(count: int) -> Rule:
    def resampled(recording: Recording, call: Call) -> None:
        dims = recording.dims(call.source)
        for dim in dims[-count:]:
            freeze(dim, SPATIAL)
        for out in call.outs:
            pixels = [fixed(size, SPATIAL) for size in out.shape[-count:]]
            recording.give(out, [*(dim.copy() for dim in dims[:-count]), *pixels])

    return resampled


for _count in (1, 2, 3):
    rule(
        f"max_pool{_count}d_with_indices",
        f"avg_pool{_count}d",
        f"_adaptive_avg_pool{_count}d",
        f"adaptive_avg_pool{_count}d",
        f"adaptive_max_pool{_count}d",
        f"reflection_pad{_count}d",
        f"replication_pad{_count}d",
        f"upsample_nearest{_count}d",
        f"_upsample_nearest_exact{_count}d",
    )(_pixels(_count))
rule("upsample_linear1d")(_pixels(1))
rule(
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)(_pixels(2))
rule("upsample_trilinear3d")(_pixels(3))
