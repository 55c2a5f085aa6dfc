"""A codebook for almost all weights, and plain numbers for the few that fit no Gaussian (GOBO)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from laconic.weights.codebook import cluster_means, nearest_edges, nearest_word, start_centroids
from laconic.weights.representation import Codes, Representation, Stream, full_mask

__all__ = ["Gobo", "log_likelihood", "population_centroids"]


def log_likelihood(numbers: np.ndarray) -> np.ndarray:
    """Return the natural log density of every number under the normal fitted to all of them.

    ``-log(sigma sqrt(2 pi)) - (w - mu)^2 / (2 sigma^2)``, infinite where all are the same.

    Args:
        numbers: float64 [n].

    >>> log_likelihood(np.array([-1.0, 1.0])).round(4).tolist()
    [-1.4189, -1.4189]
    """
    deviation = numbers.std() if numbers.size else 0.0
    if not deviation:
        return np.full(numbers.shape, np.inf)
    distance = (numbers - numbers.mean()) / deviation
    density: np.ndarray = -math.log(deviation * math.sqrt(2 * math.pi)) - distance**2 / 2
    return density


def population_centroids(numbers: np.ndarray, count: int) -> np.ndarray:
    """Return ascending centroids [count] of little absolute error.

    Bins of equal population first; then numbers go to the nearest centroid and centroids to the
    mean of their numbers, by turns, as long as ``sum |w - centroid|`` falls. Those of the least
    sum are returned (Zadeh et al. 2020, GOBO).

    Args:
        numbers: sorted float64 [n]; empty gives zeros.
        count: how many.

    >>> population_centroids(np.array([0.0, 0.5, 2.0, 3.0]), 2).tolist()
    [0.25, 2.5]
    """
    sums = np.concatenate([[0.0], np.cumsum(numbers)])
    bins = np.linspace(0, numbers.size, count + 1).round().astype(np.int64)
    found = cluster_means(sums, bins, start_centroids(numbers, count, "density"))
    best, least = found, np.inf
    while True:
        edges = nearest_edges(numbers, found)
        error = np.abs(numbers - np.repeat(found, np.diff(edges))).sum()
        if error >= least:
            return best
        best, least = found, error
        found = cluster_means(sums, edges, found)


class Gobo(Representation):
    """A codebook for almost all weights, plain numbers for outliers.

    Of every tensor a normal distribution is fitted; weights whose log-likelihood is below the
    threshold are outliers, kept as they are. The others share 2^bits values (Zadeh et al. 2020,
    GOBO). All is found once, when the representation is laid, and good without training;
    training moves the outliers and, as in ``KMeans``, the codebook.

    The log-likelihood is the natural log density of the weights as they are, not standardised:
    the paper's share of outliers, about 0.1 %, follows from -4 in that way alone. At its sigma
    of 0.04 it is beyond 3.5 sigma; an encoder of six layers has 0.2 % there, and 1.8 % where
    standardised weights are below -4. It depends on the scale: with sigma above 22 all weights
    are outliers, so give another threshold for a network whose weights are that large.

    Attributes:
        bits: width of an index, 1 to 8.
        threshold: log-likelihood below which a weight is an outlier.

    >>> weight = torch.cat([torch.linspace(-0.05, 0.05, 999), torch.tensor([0.7])])
    >>> codes = Gobo(3).encode(weight, state=Gobo(3).fit(weight))
    >>> codes.tables["outliers"], Gobo(3).decode(codes).unique().numel()
    (tensor([0.7000]), 9)
    """

    positional: ClassVar[tuple[str, ...]] = ("bits",)
    learned: ClassVar[frozenset[str]] = frozenset({"codebook"})
    fixed: ClassVar[bool] = True
    verbatim: ClassVar[frozenset[str]] = frozenset({"outliers"})

    bits: Annotated[int, Field(ge=1, le=8)] = 3
    threshold: float = -4.0

    def fit(self, weight: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return outliers, assignments [shape of the weight] and the codebook [2^bits]."""
        kept = full_mask(mask, weight)
        numbers = weight[kept].cpu().double().numpy()
        far = log_likelihood(numbers) < self.threshold
        outlier = torch.zeros_like(kept)
        outlier[kept] = torch.from_numpy(far).to(kept.device)
        centroids = population_centroids(np.sort(numbers[~far]), 2**self.bits)
        codebook = torch.from_numpy(centroids).to(weight) + 0.0
        # One and the same index where none is looked up is the shortest to write.
        index = nearest_word(weight, codebook).masked_fill_(outlier, 0)
        return {"index": index, "codebook": codebook, "outlier": outlier}

    def codes(self, weight: Tensor, mask: Tensor | None, state: Mapping[str, Tensor]) -> Codes:
        """Return the assignments, where outliers are, the codebook and the outliers [count]."""
        outlier = state["outlier"] if mask is None else state["outlier"] & mask
        streams = {
            "index": Stream(state["index"], self.bits),
            "outlier": Stream(outlier.to(torch.uint8), 1),
        }
        tables = {
            "codebook": state["codebook"].detach() + 0.0,
            "outliers": weight[outlier] + 0.0,
        }
        return Codes(streams, tables, weight.shape, weight.dtype)

    def values(self, codes: Codes) -> Tensor:
        """Look every index up in the codebook; put the outliers where they belong."""
        index = codes.streams["index"].tensor
        outlier = codes.streams["outlier"].tensor.reshape(codes.shape).bool()
        codebook = codes.table("codebook", 2**self.bits)
        values = codebook.index_select(0, index.flatten().int()).reshape(codes.shape)
        values[outlier] = codes.table("outliers", int(outlier.count_nonzero()))
        return values

    def surrogate(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Return the weight where it is an outlier, else codebook[index]."""
        shared = state["codebook"].take(state["index"].long())
        return torch.where(state["outlier"], weight, shared)
