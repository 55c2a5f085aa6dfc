"""What teachers answered once, kept for every epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from laconic.errors import FeatureError
from laconic.models.capture import Features
from laconic.tasks import Batch

__all__ = ["Recall"]

# Which dimensions of a feature are tokens, [batch] counted.
TOKENS: dict[str, tuple[int, ...]] = {
    "logits": (),
    "hidden": (1,),
    "query": (2,),
    "key": (2,),
    "value": (2,),
    "attention": (2, 3),
}
# Bytes that a tensor takes beside its numbers, about.
BESIDE = 700


class Recall:
    """Features of examples, one by one and without their padding, up to a number of bytes.

    What is recalled is what was noted: an example's features do not depend on the batch in which
    they are asked for again, but for zeros where its tokens end.

    Args:
        limit: bytes; beyond it nothing is kept, not even what was noted before.

    >>> recall = Recall(1 << 20)
    >>> batch = Batch((torch.zeros(2, 1),), index=torch.tensor([7, 4]))
    >>> recall.note(batch, Features({"logits": torch.tensor([[1.0], [2.0]])}))
    >>> recall.features(batch.first(1))["logits"]
    tensor([[1.]])
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self.layers = limit, 0, 0
        self.kept: dict[int, dict[str, Tensor]] = {}

    @property
    def full(self) -> bool:
        """Return whether more was noted than may be kept."""
        return self.bytes > self.limit

    def note(self, batch: Batch, features: Features) -> None:
        """Keep the features of a batch that has an index.

        Raises:
            FeatureError: of padded texts, a feature by path: which of its dimensions are tokens is
                not known.
        """
        mask = features.get("mask")
        taken = {name: tensor for name, tensor in features.items() if name != "mask"}
        self.layers = features.layers
        for place, key in enumerate(_index(batch)):
            real = None if mask is None else mask[place].nonzero()[:, 0]
            row = {name: _cut(name, tensor[place], real) for name, tensor in taken.items()}
            self.bytes += sum(tensor.nbytes + BESIDE for tensor in row.values())
            self.kept[key] = row
        if self.full:
            self.kept.clear()

    def features(self, batch: Batch) -> Features:
        """Return the features of a batch, all of whose examples were noted."""
        rows = [self.kept[key] for key in _index(batch)]
        inputs = batch.inputs if isinstance(batch.inputs, Mapping) else {}
        mask = inputs.get("attention_mask")
        found = {name: _joined(name, [row[name] for row in rows], mask) for name in rows[0]}
        if mask is not None:
            found["mask"] = mask.bool()
        return Features(found, layers=self.layers)


def _index(batch: Batch) -> list[int]:
    index: list[int] = [] if batch.index is None else batch.index.tolist()
    return index


def _tokens(name: str, dims: int) -> tuple[int, ...]:
    """Return which dimensions of one example's feature are tokens."""
    found = TOKENS.get(name.partition(".")[0])
    if name == "logits" and dims > 1:  # of every token
        return (0,)
    if found is None:
        raise FeatureError(
            f"'{name}' of padded texts cannot be kept, because which of its dimensions are tokens "
            "is not known; learn from hidden.N instead, or leave 'recall' out of the recipe"
        )
    return tuple(dim - 1 for dim in found)


def _cut(name: str, tensor: Tensor, real: Tensor | None) -> Tensor:
    """Return one example's feature at the places of its tokens, in memory of its own."""
    if real is not None:
        for dim in _tokens(name, tensor.dim()):
            tensor = tensor.index_select(dim, real.to(tensor.device))
    return tensor.clone()


def _joined(name: str, rows: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Return the features of several examples, zeros where a mask [batch, tokens] has no token."""
    if mask is None:
        return torch.stack(list(rows))
    found = []
    for row, own in zip(rows, mask.to(rows[0].device), strict=True):
        spread, real = row, own.nonzero()[:, 0]
        for dim in _tokens(name, row.dim()):
            shape = [len(own) if d == dim else size for d, size in enumerate(spread.shape)]
            spread = spread.new_zeros(shape).index_copy_(dim, real, spread)
        found.append(spread)
    return torch.stack(found)
