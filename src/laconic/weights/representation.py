"""Representation: how the numbers of a weight are stored as codes and decoded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from laconic.errors import ModelError
from laconic.step import Value

__all__ = [
    "Codes",
    "Float",
    "Granularity",
    "Groups",
    "Representation",
    "Stream",
    "group_sizes",
    "grouped",
    "ste",
]

Count = Annotated[int, Field(ge=1)]


class Groups(Value):
    """A granularity: so many groups of consecutive weights in every tensor.

    The 128 groups of Q-BERT (Shen et al. 2020, section 3.2) are ``Groups(128)``.

    Attributes:
        groups: how many; they divide the weight.

    >>> grouped(torch.arange(6.0), Groups(2)).tolist()
    [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    """

    positional: ClassVar[tuple[str, ...]] = ("groups",)

    groups: Count


Granularity = Literal["tensor", "row"] | Count | Groups

POSITION = "position"


@dataclass(frozen=True, eq=False)
class Stream:
    """Unsigned integers of a fixed width.

    Attributes:
        tensor: uint8, of the weight's shape or, once masked, [survivors].
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


def ste(decoded: Tensor, surrogate: Tensor) -> Tensor:
    """Return exactly ``decoded``, with the gradient of ``surrogate``.

    Straight-through, as ``decoded + (surrogate - surrogate)``: the usual ``w + (q - w)``
    differs from q in about 8 % of float32 values. A decoded -0.0 would become 0.0, so
    decoding ends in + 0.0.

    >>> weight = torch.tensor([0.3], requires_grad=True)
    >>> ste(torch.tensor([1.0]), weight).item()
    1.0
    """
    return decoded.detach() + (surrogate - surrogate.detach())


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
        return weight.reshape(weight.shape[0], -1)
    counted = isinstance(granularity, Groups)
    number = granularity.groups if counted else granularity
    if weight.numel() % number:
        words = f"{number} groups" if counted else f"groups of {number}"
        raise ModelError(
            f"{words} do not divide a weight {tuple(weight.shape)} of {weight.numel()} numbers; "
            "choose a divisor, 'row' or 'tensor'"
        )
    return weight.reshape(number, -1) if counted else weight.reshape(-1, number)


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
    with a mask, streams hold survivors only, plus the 1-bit "position" stream.

    Laws: the forward of ``Laid`` equals ``decode(encode(weight))`` bit for bit; ``values`` uses
    only look-up, +, - and * (``pow`` and ``exp2`` differ between math libraries).

    Attributes:
        needs: what training brings up to date in the state after every update ("curvature").
        learned: names of the state's tensors that training optimises.
        idempotent: encoding a decoded weight gives the same codes.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    learned: ClassVar[frozenset[str]] = frozenset()
    idempotent: ClassVar[bool] = False

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
            name: Stream(stream.tensor[mask], stream.bits) for name, stream in codes.streams.items()
        }
        streams[POSITION] = Stream(mask.to(torch.uint8), 1)
        return Codes(streams, codes.tables, codes.shape, codes.dtype)

    def _scatter(self, codes: Codes, mask: Tensor) -> Codes:
        streams = {}
        for name, stream in codes.streams.items():
            if name != POSITION:
                dense = torch.zeros(codes.shape, dtype=torch.uint8, device=mask.device)
                dense[mask] = stream.tensor
                streams[name] = Stream(dense, stream.bits)
        return Codes(streams, codes.tables, codes.shape, codes.dtype)

    @classmethod
    def shorthand(cls, value: Any) -> tuple[str, Any] | None:
        """Return the meaning of a bare number: symmetric with so many bits."""
        plain = isinstance(value, int) and not isinstance(value, bool)
        return ("symmetric", {"bits": value}) if plain else None


def masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    """Return the weight with +0.0 wherever the mask is False."""
    return weight if mask is None else torch.where(mask, weight, weight.new_zeros(()))


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
