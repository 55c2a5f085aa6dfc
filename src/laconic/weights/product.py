"""Product quantisation: blocks of neighbouring weights share the codewords of a codebook."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from laconic.step import Count
from laconic.weights.representation import Codes, Representation, Stream, full_mask, masked, rows_of

__all__ = ["Product", "lloyd_codewords", "nearest_codewords", "to_blocks"]

# How many distances are held at once: what fits into a processor's cache.
PIECE = 1 << 18


class Product(Representation):
    """Product quantisation: blocks of neighbouring weights share 2^bits codewords.

    Every row (a slice of the first dimension, [outputs, ...]) is cut into blocks of consecutive
    weights; the last one may be shorter. Codewords are found once, by k-means, when the
    representation is laid; then only the codebook moves, with the gradient of a codeword the
    sum over its blocks (Stock et al. 2020, And the Bit Goes Down; Fan et al. 2021, Training with
    Quantization Noise). Where weights are pruned, distances and means are over survivors,
    and the indices of all blocks are stored besides the positions.

    Attributes:
        bits: width of an index, 1 to 8.
        block: weights to a codeword, 1 to 64; at most a row. The papers take 8 for matrices,
            9 for 3x3 kernels.
        iterations: at most so many Lloyd iterations.

    >>> weight = torch.tensor([[0.0, 1.0, 0.0, 1.2], [5.0, 5.0, 0.0, 1.1]])
    >>> representation = Product(1, block=2)
    >>> codes = representation.encode(weight, state=representation.fit(weight))
    >>> codes.streams["index"].tensor.shape, representation.decode(codes)[1].tolist()
    (torch.Size([2, 2]), [5.0, 5.0, 0.0, 1.100000023841858])
    """

    positional: ClassVar[tuple[str, ...]] = ("bits", "block")
    learned: ClassVar[frozenset[str]] = frozenset({"codebook"})
    fixed: ClassVar[bool] = True

    bits: Annotated[int, Field(ge=1, le=8)] = 8
    block: Annotated[int, Field(ge=1, le=64)] = 8
    iterations: Count = 20

    def stream_shape(self, stream: str, shape: torch.Size) -> torch.Size:
        """Return [rows, blocks of a row] for the index of blocks; else the weight's shape."""
        width = self._width(shape)
        if stream != "index" or width == 1:
            return shape
        rows, length = rows_of(shape)
        return torch.Size((rows, math.ceil(length / width)))

    def fit(self, weight: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Cluster the blocks; return the index [rows, blocks] and the codebook, flat.

        The first codewords are drawn with torch's seeded generator.
        """
        width = self._width(weight.shape)
        known = full_mask(mask, weight)
        # On the CPU, where sums do not depend on what runs first, and in units of the largest
        # weight, so that squares neither overflow nor vanish.
        numbers = masked(weight, mask).cpu().double()
        unit = numbers.abs().amax() if numbers.numel() else numbers.new_ones(())
        unit = torch.where(unit > 0, unit, 1.0)
        blocks = to_blocks((numbers / unit).float(), width)
        known = to_blocks(known.cpu(), width)
        index, codewords = lloyd_codewords(blocks, known, 2**self.bits, self.iterations)
        index = index.to(weight.device, torch.uint8)
        index = index.reshape(self.stream_shape("index", weight.shape))
        # Flat, because a table of one dimension is what weight decay leaves alone.
        codebook = (codewords.double() * unit).flatten().to(weight) + 0.0
        return {"index": index, "codebook": codebook}

    def sliced(
        self,
        state: Mapping[str, Tensor],
        dim: int,
        index: Tensor,
        weight: Tensor,
        mask: Tensor | None,
    ) -> dict[str, Tensor]:
        """Return the state of fewer rows; within rows, blocks are clustered anew as trained."""
        if dim == 0 and weight.dim() > 1:
            return {**state, "index": state["index"].index_select(0, index)}
        trained = self.values(self.codes(weight, None, state))
        return self.fit(trained.index_select(dim, index), mask)

    def codes(self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]) -> Codes:
        """Return the fixed index and the codebook [2^bits, block] as trained so far."""
        codebook = state["codebook"].detach().reshape(2**self.bits, -1) + 0.0
        streams = {"index": Stream(state["index"], self.bits)}
        return Codes(streams, {"codebook": codebook}, weight.shape, weight.dtype)

    def values(self, codes: Codes) -> Tensor:
        """Look the codeword of every block up."""
        codebook = codes.table("codebook", 2**self.bits, self._width(codes.shape))
        return _looked_up(codebook, codes.streams["index"].tensor, codes.shape)

    def surrogate(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Return codebook[index], whose gradient sums over the blocks of each codeword."""
        codebook = state["codebook"].reshape(2**self.bits, -1)
        return _looked_up(codebook, state["index"], weight.shape)

    def _width(self, shape: torch.Size) -> int:
        return min(self.block, max(rows_of(shape)[1], 1))


def _looked_up(codebook: Tensor, index: Tensor, shape: torch.Size) -> Tensor:
    rows, length = rows_of(shape)
    padded = codebook.index_select(0, index.flatten().long()).reshape(rows, -1)
    return padded[:, :length].reshape(shape)


def to_blocks(weight: Tensor, width: int) -> Tensor:
    """Return the blocks of all rows [blocks, width], zero (False) after the end of a row.

    Args:
        weight: numbers or a mask [rows, ...]; a vector is one row.
        width: of a block.

    >>> to_blocks(torch.arange(6).reshape(2, 3), 2).tolist()
    [[0, 1], [2, 0], [3, 4], [5, 0]]
    """
    rows, length = rows_of(weight.shape)
    return F.pad(weight.reshape(rows, length), (0, -length % width)).reshape(-1, width)


def nearest_codewords(blocks: Tensor, known: Tensor, codewords: Tensor) -> tuple[Tensor, Tensor]:
    """Return for every block which codeword is nearest, and the squared distance, [blocks] each.

    ``argmin_k sum_j m_j (w_j - c_kj)^2``, the sum over what is known of the block; of equals
    the last.

    Args:
        blocks: w [blocks, width], zero where not known.
        known: m, bool [blocks, width].
        codewords: c [count, width].

    >>> words = torch.tensor([[0.0, 0.0], [1.0, 9.0]])
    >>> known = torch.tensor([[True, True], [True, False]])
    >>> nearest_codewords(torch.tensor([[0.9, 0.0], [0.9, 0.0]]), known, words)[0].tolist()
    [0, 1]
    """
    squares, places = codewords.square(), torch.arange(len(codewords)).to(codewords)
    whole = bool(known.all())
    length = max(PIECE // len(codewords), 1)
    index, distance = [], []
    for part, mask in zip(blocks.split(length), known.split(length), strict=True):
        # Without the block's own square, which is the same for all codewords.
        offset = squares.sum(1) if whole else mask.to(squares) @ squares.T
        found = torch.addmm(offset, part, codewords.T, alpha=-2)
        least = found.amin(1, keepdim=True)
        distance.append(least[:, 0] + part.square().sum(1))
        # The place of the least, in a fifth of the time that argmin takes.
        index.append(found.le_(least).mul_(places).amax(1).long())
    return torch.cat(index), torch.cat(distance)


def lloyd_codewords(
    blocks: Tensor, known: Tensor, count: int, iterations: int
) -> tuple[Tensor, Tensor]:
    """Return the codeword of every block [blocks] and the codewords [count, width].

    k-means: each block goes to the nearest codeword, each codeword to the mean of what is known
    of its blocks, by turns. A codeword without blocks takes one of the farthest ones'. It starts
    from blocks drawn with torch's generator.

    Args:
        blocks: float [blocks, width], zero where not known.
        known: bool [blocks, width].
        count: of codewords.
        iterations: at most so many; fewer where no block changes its codeword.

    >>> blocks = torch.tensor([[0.0, 1.0], [5.0, 5.0], [0.0, 2.0]])
    >>> index, codewords = lloyd_codewords(blocks, blocks > -1, 2, 10)
    >>> sorted(codewords.tolist()), bool(index[0] == index[2] != index[1])
    ([[0.0, 1.5], [5.0, 5.0]], True)
    """
    if not len(blocks):
        return torch.zeros(0, dtype=torch.int64), blocks.new_zeros(count, blocks.shape[1])
    drawn = torch.randperm(len(blocks))[torch.arange(count) % len(blocks)]
    codewords = blocks[drawn]
    index, distance = nearest_codewords(blocks, known, codewords)
    for _ in range(iterations):
        codewords = _means(blocks, known, index, codewords)
        empty = (torch.bincount(index, minlength=count) == 0).nonzero()[:, 0]
        far = distance.topk(min(len(empty), len(blocks))).indices
        codewords[empty[: len(far)]] = blocks[far]
        before = index
        index, distance = nearest_codewords(blocks, known, codewords)
        if torch.equal(index, before):
            break
    return index, codewords


def _means(blocks: Tensor, known: Tensor, index: Tensor, empty: Tensor) -> Tensor:
    """Return the mean of what is known of each codeword's blocks, in float64 sums."""
    sums = torch.zeros_like(empty, dtype=torch.float64)
    sizes = sums.clone().index_add_(0, index, known.double())
    sums.index_add_(0, index, blocks.double())
    return torch.where(sizes > 0, sums / sizes.clamp(min=1), empty.double()).to(blocks.dtype)
