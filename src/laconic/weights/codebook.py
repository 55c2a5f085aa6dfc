"""Weight sharing: a k-means codebook whose entries are trained, assignments fixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from laconic.step import Count
from laconic.weights.representation import Codes, Representation, Stream
from laconic.weights.workspace import wide_dtype

__all__ = [
    "KMeans",
    "cluster_means",
    "lloyd",
    "nearest_edges",
    "nearest_word",
    "start_centroids",
]

Start = Literal["linear", "density", "random"]


class KMeans(Representation):
    """Weight sharing: surviving weights share 2^bits values, which are then trained.

    Clusters are found once, when the representation is laid; then only the codebook moves,
    with the gradient of entry k the sum of dL/dW over the weights assigned to it
    (Han, Mao and Dally 2016, Deep Compression, section 3).

    Attributes:
        bits: width of an index, 1 to 8.
        start: "linear" between the extremes (the paper's best), "density" or "random".
        iterations: at most so many Lloyd iterations.

    >>> weight = torch.tensor([[0.0, 0.1, 0.2, 1.0, 1.1, 5.0]])
    >>> representation = KMeans(2)
    >>> state = representation.fit(weight)
    >>> representation.decode(representation.encode(weight, state=state)).unique().numel()
    3
    """

    positional: ClassVar[tuple[str, ...]] = ("bits",)
    learned: ClassVar[frozenset[str]] = frozenset({"codebook"})
    fixed: ClassVar[bool] = True

    bits: Annotated[int, Field(ge=1, le=8)] = 5
    start: Start = "linear"
    iterations: Count = 100

    def fit(self, weight: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Cluster the survivors; return the assignments and the codebook [2^bits]."""
        survivors = weight[mask] if mask is not None else weight.flatten()
        # Sums run in float64 on sorted numbers, so the clusters do not depend on threads.
        numbers = np.sort(survivors.cpu().double().numpy())
        centroids = start_centroids(numbers, 2**self.bits, self.start)
        centroids = lloyd(numbers, centroids, self.iterations)
        codebook = torch.from_numpy(centroids).to(weight) + 0.0
        return {"index": nearest_word(weight, codebook), "codebook": codebook}

    def codes(self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]) -> Codes:
        """Return the fixed assignments and the codebook as trained so far."""
        streams = {"index": Stream(state["index"], self.bits)}
        tables = {"codebook": state["codebook"].detach() + 0.0}
        return Codes(streams, tables, weight.shape, weight.dtype)

    def values(self, codes: Codes) -> Tensor:
        """Look every index up in the codebook."""
        index = codes.streams["index"].tensor
        codebook = codes.table("codebook", 2**self.bits)
        return codebook.index_select(0, index.flatten().int()).reshape(codes.shape)

    def surrogate(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Return codebook[index], whose gradient sums over each cluster."""
        return state["codebook"].take(state["index"].long())


def start_centroids(numbers: np.ndarray, count: int, start: Start) -> np.ndarray:
    """Return ascending first centroids [count].

    Args:
        numbers: sorted float64 [n]; empty gives zeros.
        count: how many.
        start: "linear": equally spaced between the extremes; "density": equally spaced
            quantiles; "random": numbers drawn with torch's seeded generator.
    """
    if numbers.size == 0:
        return np.zeros(count)
    if start == "linear":
        return np.linspace(numbers[0], numbers[-1], count)
    if start == "density":
        return np.quantile(numbers, (np.arange(count) + 0.5) / count)
    drawn = torch.randint(numbers.size, (count,)).numpy()
    return np.sort(numbers[drawn])


def lloyd(numbers: np.ndarray, centroids: np.ndarray, iterations: int) -> np.ndarray:
    """Return 1-D k-means centroids after Lloyd's iterations; an empty cluster keeps its own.

    Args:
        numbers: sorted float64 [n].
        centroids: ascending start [k].
        iterations: at most so many; stops at a fixed point.
    """
    sums = np.concatenate([[0.0], np.cumsum(numbers)])
    for _ in range(iterations):
        means = cluster_means(sums, nearest_edges(numbers, centroids), centroids)
        if np.array_equal(means, centroids):
            break
        centroids = means
    return centroids


def nearest_word(weight: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the nearest word of every number, uint8 [shape of the weight].

    Args:
        weight: numbers of any shape.
        codebook: ascending [k]; half way the higher word is taken.

    >>> nearest_word(torch.tensor([[0.4, 3.0]]), torch.tensor([0.0, 1.0, 5.0]))
    tensor([[0, 2]], dtype=torch.uint8)
    """
    words = codebook.to(wide_dtype(codebook))
    middles = words[1:] / 2 + words[:-1] / 2
    numbers = weight.to(words.dtype).contiguous()
    return torch.bucketize(numbers, middles, right=True).to(torch.uint8)


def nearest_edges(numbers: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Return where the cluster of each centroid begins, and where the last one ends [k + 1].

    Args:
        numbers: sorted float64 [n].
        centroids: ascending [k]; a number belongs to the nearest.

    >>> nearest_edges(np.array([0.0, 0.1, 1.0, 5.0]), np.array([0.0, 4.0])).tolist()
    [0, 3, 4]
    """
    cuts = np.searchsorted(numbers, (centroids[1:] + centroids[:-1]) / 2)
    return np.concatenate([[0], cuts, [numbers.size]])


def cluster_means(sums: np.ndarray, edges: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """Return the mean of each cluster [k], or what stands for one that is empty.

    Args:
        sums: of the first 0, 1, ..., n sorted numbers [n + 1].
        edges: as ``nearest_edges`` returns them [k + 1].
        empty: stands for empty clusters [k].

    >>> cluster_means(np.array([0.0, 1.0, 3.0]), np.array([0, 2, 2]), np.array([9.0, 9.0])).tolist()
    [1.5, 9.0]
    """
    sizes = np.diff(edges)
    means: np.ndarray = empty.copy()
    np.divide(sums[edges[1:]] - sums[edges[:-1]], sizes, out=means, where=sizes > 0)
    # Means of neighbours that are all but equal may be in another order, by rounding of the sums.
    ascending: np.ndarray = np.maximum.accumulate(means)
    return ascending
