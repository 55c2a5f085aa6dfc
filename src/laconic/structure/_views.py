"""Rules of the operations that move, join and cut dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from laconic.structure._atoms import Atom, Dim, cut, fixed, freeze, reshape, unify
from laconic.structure._rules import RULES, Call, rule

if TYPE_CHECKING:
    from laconic.structure._record import Recording

__all__ = ["RULES"]


@rule("alias", "clone", "detach", "lift", "lift_fresh", "_to_copy")
def _same(recording: Recording, call: Call) -> None:
    recording.view(call, recording.dims(call.source))


@rule("t", "transpose", "permute")
def _permuted(recording: Recording, call: Call) -> None:
    dims = recording.dims(call.source)
    order = list(range(len(dims)))
    if call.name.startswith("t_") or call.name == "t":
        order.reverse()
    elif "dims" in call.arguments:
        order = call.dims("dims") if dims else []
    elif dims:
        (one,), (other,) = call.dims("dim0"), call.dims("dim1")
        order[one], order[other] = other, one
    recording.view(call, [dims[index] for index in order])


@rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def _viewed(recording: Recording, call: Call) -> None:
    dims = recording.dims(call.source)
    if call.out.dtype == call.source.dtype:
        recording.view(call, reshape(dims, call.out.shape))
    else:
        recording.view(call, _frozen(dims, call.out, "seen as numbers of another kind"))


def _frozen(dims: Sequence[Dim], out: Tensor, why: str) -> list[Dim]:
    """Freeze what was; return new dimensions that are frozen too."""
    for dim in dims:
        freeze(dim, why)
    return [fixed(size, why) for size in out.shape]


@rule("unsqueeze")
def _unsqueezed(recording: Recording, call: Call) -> None:
    dims = list(recording.dims(call.source))
    dims.insert(call["dim"] % (len(dims) + 1), Dim([[]]))
    recording.view(call, dims)


@rule("squeeze")
def _squeezed(recording: Recording, call: Call) -> None:
    # The source of an in-place one has its new shape by now, so sizes are asked of the dims.
    dims = recording.dims(call.source)
    named = call.arguments.get("dim")
    listed = range(len(dims)) if named is None else named if isinstance(named, list) else [named]
    gone = {index % max(len(dims), 1) for index in listed}
    recording.view(
        call, [dim for index, dim in enumerate(dims) if index not in gone or dim.size != 1]
    )


@rule("expand")
def _expanded(recording: Recording, call: Call) -> None:
    dims, shape = recording.dims(call.source), call.out.shape
    lead = len(shape) - len(dims)
    made = [Dim([[Atom(size)]]) for size in shape[:lead]]
    made += [
        dim if dim.size == size else Dim([[Atom(size)]])
        for dim, size in zip(dims, shape[lead:], strict=True)
    ]
    recording.view(call, made)


@rule("repeat")
def _repeated(recording: Recording, call: Call) -> None:
    dims, shape = recording.dims(call.source), call.out.shape
    lead = len(shape) - len(dims)
    made = [Dim([[Atom(size)]]) for size in shape[:lead]]
    for dim, size in zip(dims, shape[lead:], strict=True):
        if dim.size not in (1, size):
            freeze(dim, "it is repeated")
            made.append(fixed(size, "it is repeated"))
        else:
            made.append(dim.copy() if dim.size == size else Dim([[Atom(size)]]))
    recording.give(call.out, made)


# ------------------------------------------------------------ pieces


@rule("slice")
def _sliced(recording: Recording, call: Call) -> None:
    dims = list(recording.dims(call.source))
    (index,) = call.dims()
    size, step = dims[index].size, call["step"]
    start, end, _ = slice(call["start"], call["end"]).indices(size)
    length = call.out.shape[index]
    if step != 1:
        freeze(dims[index], "every few elements of it are taken")
        dims[index] = fixed(length, "every few elements of it are taken")
    elif length != size:
        sizes = [start, length, size - max(end, start)]
        dims[index] = _cut(recording, dims[index], sizes)[1]
    recording.view(call, dims)


def _cut(recording: Recording, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    """Cut a dimension; the pieces must turn out to be the same axes, or else they freeze."""
    why = dim.frozen()
    pieces = None if why is not None else cut(dim, sizes)
    if pieces is None:
        why = why or "cut where its factors do not end"
        freeze(dim, why)
        return [fixed(size, why) for size in sizes]
    recording.pieces.append(pieces)
    return pieces


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk")
def _split(recording: Recording, call: Call) -> None:
    dims = recording.dims(call.source)
    (index,) = call.dims()
    if len(call.outs) == 1:
        recording.put(call.out, dims)
        return
    pieces = _cut(recording, dims[index], [out.shape[index] for out in call.outs])
    for out, piece in zip(call.outs, pieces, strict=True):
        recording.put(out, [*dims[:index], piece, *dims[index + 1 :]])


@rule("glu")
def _gated(recording: Recording, call: Call) -> None:
    dims = [dim.copy() for dim in recording.dims(call.source)]
    (index,) = call.dims()
    half = call.out.shape[index]
    values, gates = _cut(recording, dims[index], [half, half])
    unify(values, gates)
    recording.give(call.out, [*dims[:index], values, *dims[index + 1 :]])


@rule("select", "unbind")
def _selected(recording: Recording, call: Call) -> None:
    dims = list(recording.dims(call.source))
    (index,) = call.dims()
    freeze(dims.pop(index), "its elements are told apart")
    for out in call.outs:
        recording.put(out, dims)


@rule("index")
def _indexed(recording: Recording, call: Call) -> None:
    dims, indices = recording.dims(call["self"]), list(call["indices"])
    why = "its elements are picked by index"
    chosen = [place for place, index in enumerate(indices) if index is not None]
    if any(indices[place].dtype in (torch.bool, torch.uint8) for place in chosen):
        recording.give(call.out, _frozen(dims, call.out, why))
        return
    for place in chosen:
        freeze(dims[place], why)
    left = [dim.copy() for place, dim in enumerate(dims) if place not in chosen]
    # Where other dimensions stand between them, what they pick comes first.
    together = chosen == list(range(chosen[0], chosen[-1] + 1))
    first = chosen[0] if together else 0
    count = call.out.dim() - len(left)
    picked = [fixed(size, why) for size in call.out.shape[first : first + count]]
    recording.give(call.out, [*left[:first], *picked, *left[first:]])


@rule("index_select")
def _index_selected(recording: Recording, call: Call) -> None:
    dims = [dim.copy() for dim in recording.dims(call["self"])]
    (index,) = call.dims()
    freeze(dims[index], "its elements are picked by index")
    dims[index] = fixed(call.out.shape[index], "its elements are picked by index")
    recording.give(call.out, dims)


@rule("flip", "roll")
def _reordered(recording: Recording, call: Call) -> None:
    dims = recording.dims(call.source)
    for index in call.dims("dims"):
        freeze(dims[index], "its elements are put in another order")
    recording.give(call.out, [dim.copy() for dim in dims])


# ------------------------------------------------------------ joins


@rule("cat")
def _joined(recording: Recording, call: Call) -> None:
    # Torch ignores empty vectors, whatever the others' shapes.
    parts = [each for each in call.tensors if each.dim() == call.out.dim()]
    index = call["dim"] % max(call.out.dim(), 1)
    dims = [[dim.copy() for dim in recording.dims(part)] for part in parts]
    for other in dims[1:]:
        for place, (one, twin) in enumerate(zip(dims[0], other, strict=True)):
            if place != index:
                unify(one, twin)
    terms = [term for part in dims for term in part[index].parts()]
    recording.give(call.out, [*dims[0][:index], Dim(terms), *dims[0][index + 1 :]])


@rule("stack")
def _stacked(recording: Recording, call: Call) -> None:
    dims = [[dim.copy() for dim in recording.dims(part)] for part in call.tensors]
    for other in dims[1:]:
        for one, twin in zip(dims[0], other, strict=True):
            unify(one, twin)
    place = call["dim"] % call.out.dim()
    layers = fixed(len(dims), "tensors are stacked")
    recording.give(call.out, [*dims[0][:place], layers, *dims[0][place:]])


@rule("constant_pad_nd")
def _padded(recording: Recording, call: Call) -> None:
    dims = [dim.copy() for dim in recording.dims(call.source)]
    pairs = list(zip(call["pad"][::2], call["pad"][1::2], strict=True))
    for index, (before, after) in enumerate(pairs, start=1):
        dim = dims[-index]
        if min(before, after) < 0:
            freeze(dim, "it is cropped")
            dims[-index] = fixed(call.out.shape[-index], "it is cropped")
        elif before or after:
            ends = [[[Atom(size, "padding")]] if size else [] for size in (before, after)]
            dims[-index] = Dim([*ends[0], *dim.parts(), *ends[1]])
    recording.give(call.out, dims)
