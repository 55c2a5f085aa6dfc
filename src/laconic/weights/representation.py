"""Representation: how the numbers of a weight are stored as codes and decoded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from laconic.errors import ModelError
from laconic.step import Count, Value

__all__ = [
    "Codes",
    "Float",
    "Granularity",
    "Groups",
    "Representation",
    "Stream",
    "check_groups",
    "group_sizes",
    "grouped",
    "rows_of",
    "ste",
]


class Groups(Value):
    """A granularity: so many groups of consecutive weights in every tensor.

    The 128 groups of Q-BERT (Shen et al. 2020) are ``Groups(128)``.

    Attributes:
        groups: how many; they divide the weight.

    >>> grouped(torch.arange(6.0), Groups(2)).tolist()
    [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    """

    positional: ClassVar[tuple[str, ...]] = ("groups",)

    groups: Count


Granularity = Literal["tensor", "row"] | Count | Groups

POSITION = "position"
# Numbers that are worked on together: a core's cache holds them with all that is made of them.
IN_CACHE = 1 << 17
# From this length on torch adds up a row that is alone in several threads, in another order.
SPREAD = 1 << 15


@dataclass(frozen=True, eq=False)
class Stream:
    """Unsigned integers of a fixed width.

    Attributes:
        tensor: uint8, of the weight's shape or, once masked, [survivors]; of another shape
            where the representation says so (``stream_shape``).
        bits: width of each integer, 1 to 8.

    >>> Stream(torch.tensor([3, 0, 1], dtype=torch.uint8), bits=2).bits
    2
    """

    tensor: Tensor
    bits: int


@dataclass(frozen=True, eq=False)
class Codes:
    """Integer streams and float tables from which a weight is rebuilt exactly.

    Attributes:
        streams: name -> stream; "position" is the 1-bit stream of a masked weight.
        tables: name -> small float tensor (scale, codebook, values).
        shape: of the weight.
        dtype: of the weight.

    >>> code = Stream(torch.tensor([[1, 0]], dtype=torch.uint8), bits=1)
    >>> Codes({"code": code}, {"scale": torch.ones(1)}, torch.Size([1, 2])).shape
    torch.Size([1, 2])
    """

    streams: Mapping[str, Stream]
    tables: Mapping[str, Tensor]
    shape: torch.Size
    dtype: torch.dtype = torch.float32

    def table(self, name: str, *shape: int) -> Tensor:
        """Return a table that must have this shape: another would blow up what it meets.

        Raises:
            ModelError: it has another shape, or there is none.
        """
        found = self.tables.get(name)
        if found is None or found.shape != shape:
            has = "missing" if found is None else tuple(found.shape)
            raise ModelError(
                f"the table '{name}' of a weight {tuple(self.shape)} is {has}, not {shape}"
            )
        return found


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decoded: Tensor, surrogate: Tensor) -> Tensor:
        return decoded.view_as(decoded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def ste(decoded: Tensor, surrogate: Tensor) -> Tensor:
    """Return exactly ``decoded``, with the gradient of ``surrogate``.

    Straight-through. The usual ``w + (q - w)`` differs from q in about 8 % of float32 values,
    and takes two more passes over the numbers.

    >>> weight = torch.tensor([0.3], requires_grad=True)
    >>> ste(torch.tensor([1.0]), weight).item()
    1.0
    """
    straight: Tensor = _StraightThrough.apply(decoded.detach(), surrogate)  # type: ignore[no-untyped-call]
    return straight


def grouped(weight: Tensor, granularity: Granularity) -> Tensor:
    """Return the weight as [groups, size]: the numbers of a row share a table.

    Args:
        weight: [rows, ...].
        granularity: "tensor" (one group), "row" (one per slice of the first dimension), a
            number of consecutive weights, or ``Groups``: so many of them.

    Raises:
        ModelError: the number does not divide the weight.
    """
    if granularity == "tensor":
        return weight.reshape(1, -1)
    if granularity == "row":
        return weight.reshape(len(weight), weight.shape[1:].numel())
    if isinstance(granularity, Groups):
        number, shape = granularity.groups, (granularity.groups, -1)
        words = f"{number} groups"
    else:
        number, shape = granularity, (-1, granularity)
        words = f"groups of {number}"
    if weight.numel() % number:
        raise ModelError(
            f"{words} do not divide a weight {tuple(weight.shape)} of {weight.numel()} numbers; "
            "choose a divisor, 'row' or 'tensor'"
        )
    return weight.reshape(shape)


def check_groups(laid: Iterable[tuple[Representation, Mapping[str, Tensor]]]) -> None:
    """Refuse representations whose groups do not divide the weights they are for.

    Args:
        laid: each with the weights it is laid on, by name.

    Raises:
        ModelError: the number does not divide a weight.

    >>> from laconic.weights import Binary
    >>> check_groups([(Binary("row"), {"weight": torch.zeros(2, 3)})])
    """
    for representation, weights in laid:
        granularity: Granularity = getattr(representation, "granularity", "tensor")
        for name, weight in weights.items():
            try:
                grouped(weight.detach().to("meta"), granularity)
            except ModelError as error:
                raise ModelError(f"'{name}': {error}") from None


def rows_of(shape: torch.Size) -> tuple[int, int]:
    """Return how many rows a weight has, and how long they are; a vector is one row.

    >>> rows_of(torch.Size([4, 3, 3])), rows_of(torch.Size([5]))
    ((4, 9), (1, 5))
    """
    return (1, shape.numel()) if len(shape) < 2 else (shape[0], shape[1:].numel())


def group_sizes(groups: Tensor, mask: Tensor | None, granularity: Granularity) -> Tensor | int:
    """Return how many survivors a mean over each group divides by: [groups], at least 1.

    Args:
        groups: weights [groups, size].
        mask: bool [shape of the weight], or None: all survive.
        granularity: of the groups.

    >>> group_sizes(torch.ones(2, 2), torch.tensor([[True, False], [False, False]]), "row").tolist()
    [1, 1]
    """
    return groups.shape[1] if mask is None else grouped(mask, granularity).sum(1).clamp(min=1)


class Representation(Value, ABC):
    """How numbers are stored: a frozen value with pure ``encode`` and ``decode``.

    A subclass writes the dense pair ``codes`` and ``values``; masking is done here, once:
    with a mask, streams of the weight's shape hold survivors only, plus the 1-bit "position".

    Laws: the forward of ``Laid`` equals ``decode(encode(weight))`` bit for bit; ``values`` uses
    only look-up, +, - and * (``pow`` and ``exp2`` differ between math libraries).

    Attributes:
        needs: what training brings up to date in the state after every update ("curvature").
        learned: names of the state's tensors that training optimises.
        idempotent: encoding a decoded weight gives the same codes.
        fixed: the streams stay as they were laid; training moves tables alone.
        verbatim: names of the tables that hold weights as they are, which count as codes do.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    learned: ClassVar[frozenset[str]] = frozenset()
    idempotent: ClassVar[bool] = False
    fixed: ClassVar[bool] = False
    verbatim: ClassVar[frozenset[str]] = frozenset()

    def resolve(self, weights: Mapping[str, Tensor]) -> dict[str, Representation]:
        """Return the representation of each weight of a scope, shared choices made.

        Args:
            weights: dotted name -> surviving weights [any] of the whole scope.
        """
        return dict.fromkeys(weights, self)

    def fit(self, weight: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return the state encoding needs besides the weight: assignments, learned tables."""
        return {}

    def update(self, state: Mapping[str, Tensor]) -> None:
        """Advance the state in place after an optimiser step (noise counters)."""

    @abstractmethod
    def codes(self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]) -> Codes:
        """Return dense codes: streams of the weight's shape, statistics over survivors."""

    @abstractmethod
    def values(self, codes: Codes) -> Tensor:
        """Return the weight of dense codes, without -0.0."""

    def surrogate(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Return what stands in for the decoded weight in the backward pass."""
        return weight

    def stream_shape(self, stream: str, shape: torch.Size) -> torch.Size:
        """Return how many symbols a stream has, and in which shape, before a mask is applied.

        Args:
            stream: its name.
            shape: of the weight.
        """
        return shape

    def sliced(
        self,
        state: Mapping[str, Tensor],
        dim: int,
        index: Tensor,
        weight: Tensor,
        mask: Tensor | None,
    ) -> dict[str, Tensor]:
        """Return the state of a weight of which some places are left.

        Args:
            state: before that.
            dim: of the weight.
            index: int64 [new size], the places along it.
            weight: latent, before it is sliced [any shape].
            mask: of what is left [its shape].
        """
        groups = _groups(self, weight.shape) if state else None
        places = None if groups is None else _sliced_groups(self, groups, dim, index)
        left = dict(state)
        for name, tensor in state.items():
            if tensor.shape == weight.shape and name not in self.learned:
                left[name] = tensor.index_select(dim, index)
            elif groups is None or tensor.shape[:1] != (int(groups.max()) + 1,):
                continue
            elif places is not None:
                left[name] = tensor.index_select(0, places)
            else:
                left[name] = self.fit(weight.index_select(dim, index), mask)[name]
        return left

    @property
    def row_by_row(self) -> bool:
        """Return whether rows share nothing, so that a few of them are decoded as all are."""
        return dict(self).get("granularity") == "row"

    @final
    def quantized(self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]) -> Tensor:
        """Return ``values(codes(...))``, bit for bit, in less time.

        Rows that depend on nothing else are done a few at a time, so that they stay in the cache.
        """
        alone = mask is None and self.row_by_row
        alone = alone and all(each.shape[:1] == weight.shape[:1] for each in state.values())
        # A few rows whose numbers lie apart torch adds up in another order than many.
        alone = alone and weight.is_contiguous()
        length = max(1, weight[0].numel()) if alone and len(weight) else SPREAD
        rows = IN_CACHE // length
        if length >= SPREAD or rows >= len(weight):
            return self.shortcut(weight, mask, state)
        out = torch.empty_like(weight, memory_format=torch.contiguous_format)
        for start in range(0, len(weight), rows):
            part = slice(start, start + rows)
            some = {name: each[part] for name, each in state.items()}
            out[part] = self.shortcut(weight[part], mask, some)
        return out

    def shortcut(self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]) -> Tensor:
        """Return ``values(codes(...))``; overridden where that is faster without the codes."""
        return self.values(self.codes(weight, mask, state))

    @final
    def encode(
        self,
        weight: Tensor,
        *,
        mask: Tensor | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> Codes:
        """Return the codes of a weight.

        Args:
            weight: float [any shape].
            mask: bool, of the weight's shape; True survives.
            state: what ``fit`` returned, as trained since.
        """
        codes = self.codes(weight.detach(), mask, state or {})
        return codes if mask is None else self._drop(codes, mask)

    @final
    def decode(self, codes: Codes) -> Tensor:
        """Return the weight the codes stand for, [codes.shape]."""
        if POSITION not in codes.streams:
            return self.values(codes)
        mask = codes.streams[POSITION].tensor.bool()
        return masked(self.values(self._scatter(codes, mask)), mask)

    def _drop(self, codes: Codes, mask: Tensor) -> Codes:
        streams = {
            name: Stream(stream.tensor[mask], stream.bits) if self._follows(name, codes) else stream
            for name, stream in codes.streams.items()
        }
        streams[POSITION] = Stream(mask.to(torch.uint8), 1)
        return Codes(streams, codes.tables, codes.shape, codes.dtype)

    def _scatter(self, codes: Codes, mask: Tensor) -> Codes:
        streams = {name: s for name, s in codes.streams.items() if name != POSITION}
        for name, stream in streams.items():
            if self._follows(name, codes):
                dense = torch.zeros(codes.shape, dtype=torch.uint8, device=mask.device)
                dense[mask] = stream.tensor
                streams[name] = Stream(dense, stream.bits)
        return Codes(streams, codes.tables, codes.shape, codes.dtype)

    def _follows(self, stream: str, codes: Codes) -> bool:
        return self.stream_shape(stream, codes.shape) == codes.shape

    @classmethod
    def shorthand(cls, value: Any) -> tuple[str, Any] | None:
        """Return the meaning of a bare number: binary for 1, else symmetric with so many bits."""
        if not isinstance(value, int) or isinstance(value, bool):
            return None
        return ("binary", None) if value == 1 else ("symmetric", {"bits": value})


def masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    """Return the weight with +0.0 wherever the mask is False."""
    return weight if mask is None else torch.where(mask, weight, weight.new_zeros(()))


def indicator(compare: Callable[..., Tensor], numbers: Tensor, limit: Tensor | float) -> Tensor:
    """Return 1 where a comparison holds and 0 elsewhere, in the type of the numbers.

    As a factor it takes an eighth of the time of a choice by booleans (torch.where).

    Args:
        compare: torch.gt, torch.eq, ...
        numbers: float, without gradient [any shape].
        limit: broadcast against them.

    >>> indicator(torch.gt, torch.tensor([1.0, 2.0]), torch.tensor(1.5)).tolist()
    [0.0, 1.0]
    """
    return compare(numbers, limit, out=torch.empty_like(numbers))


def full_mask(mask: Tensor | None, weight: Tensor) -> Tensor:
    """Return a weight's mask, all True where there is none, bool [shape of the weight]."""
    return torch.ones_like(weight, dtype=torch.bool) if mask is None else mask


class Float(Representation):
    """Plain floating point: a weight that is not quantised, and may be masked.

    >>> weight = torch.tensor([[0.5, 2.0]])
    >>> codes = Float().encode(weight, mask=weight > 1)
    >>> codes.tables["values"], Float().decode(codes)
    (tensor([2.]), tensor([[0., 2.]]))
    """

    idempotent: ClassVar[bool] = True

    def codes(self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]) -> Codes:
        """Return the weight itself as a table."""
        return Codes({}, {"values": weight + 0.0}, weight.shape, weight.dtype)

    def values(self, codes: Codes) -> Tensor:
        """Return the table."""
        return codes.tables["values"].reshape(codes.shape)

    def _drop(self, codes: Codes, mask: Tensor) -> Codes:
        kept = super()._drop(codes, mask)
        return Codes(kept.streams, {"values": codes.tables["values"][mask]}, kept.shape, kept.dtype)

    def _scatter(self, codes: Codes, mask: Tensor) -> Codes:
        dense = torch.zeros(codes.shape, dtype=codes.dtype, device=mask.device)
        dense[mask] = codes.tables["values"]
        return Codes({}, {"values": dense}, codes.shape, codes.dtype)


def _groups(representation: Representation, shape: torch.Size) -> Tensor | None:
    """Return the group of every weight [shape], or None where all of them are one."""
    granularity = dict(representation).get("granularity", "tensor")
    if granularity == "tensor":
        return None
    rows = grouped(torch.zeros(shape, dtype=torch.int64), granularity)
    return (rows + torch.arange(len(rows))[:, None]).reshape(shape)


def _sliced_groups(
    representation: Representation, groups: Tensor, dim: int, index: Tensor
) -> Tensor | None:
    """Return the old group of every new one, or None where they are mixed."""
    left = groups.index_select(dim, index.cpu())
    mixed = grouped(left, dict(representation)["granularity"])
    places = mixed[:, 0]
    return places.to(index.device) if bool((mixed == places[:, None]).all()) else None
