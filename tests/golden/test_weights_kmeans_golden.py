"""The formulas of k-means weights: Lloyd's algorithm, shared weights, codebook gradients."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from helpers.weights import ROUNDING, encoded
from laconic.weights import Gobo, KMeans, lay
from laconic.weights.codebook import lloyd, start_centroids


def test_three_means_vector() -> None:
    numbers = np.array([0, 0.1, 0.2, 1, 1.1, 5])
    centroids = lloyd(numbers, start_centroids(numbers, 3, "density"), 100)
    assert centroids == pytest.approx([0.1, 1.05, 5.0])
    assert squared_distance(numbers, centroids) == pytest.approx(0.025)
    assert clusters_by_cuts(numbers, 3) == pytest.approx(0.025)


def clusters_by_cuts(numbers: np.ndarray, count: int) -> float:
    """Return the least squared error over every way to cut sorted numbers."""
    ordered = np.sort(numbers)
    ways = itertools.combinations(range(1, len(ordered)), count - 1)
    return min(
        sum(float(part.var() * part.size) for part in np.split(ordered, list(cuts)))
        for cuts in ways
    )


def squared_distance(numbers: np.ndarray, centroids: np.ndarray) -> float:
    return float(np.square(np.abs(numbers[:, None] - centroids).min(1)).sum())


@pytest.mark.parametrize("start", ["linear", "density", "random"])
def test_lloyd_is_no_worse_than_its_start(start: str) -> None:
    generator = np.random.default_rng(0)
    for _ in range(5):
        numbers = np.sort(generator.normal(size=120))
        first = start_centroids(numbers, 8, start)
        found = lloyd(numbers, first, 100)
        assert squared_distance(numbers, found) <= squared_distance(numbers, first) + 1e-12
        assert bool((np.diff(found) >= 0).all())


def test_lloyd_ends_where_every_centroid_is_the_mean_of_its_cluster() -> None:
    numbers = np.sort(np.random.default_rng(1).normal(size=300))
    found = lloyd(numbers, start_centroids(numbers, 4, "linear"), 1000)
    nearest = np.abs(numbers[:, None] - found).argmin(1)
    for cluster in range(4):
        assert found[cluster] == pytest.approx(numbers[nearest == cluster].mean())


def test_an_empty_cluster_keeps_its_centroid() -> None:
    numbers = np.array([0.0, 0.1, 10.0])
    found = lloyd(numbers, np.array([0.0, 5.0, 10.0]), 10)
    assert found.tolist() == [0.05, 5.0, 10.0]


def test_shared_weights_are_codebook_entries() -> None:
    weight, mask = torch.randn(20, 30), torch.rand(20, 30) < 0.4
    representation = KMeans(3)
    codes = encoded(representation, weight, mask)
    index = codes.streams["index"].tensor
    assert torch.equal(representation.decode(codes)[mask], codes.tables["codebook"][index.long()])
    for cluster in index.unique().tolist():
        mean = float(weight[mask][index == cluster].mean())
        assert float(codes.tables["codebook"][cluster]) == pytest.approx(mean, abs=ROUNDING)


@pytest.mark.parametrize("representation", [KMeans(4), Gobo(4)])
def test_large_weights_of_float16_fall_into_the_nearest_cluster(
    representation: KMeans | Gobo,
) -> None:
    numbers = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 3e4
    weight = numbers.clamp(-6e4, 6e4).half()  # the sum of two such centroids is infinite
    state = representation.fit(weight)
    distances = (weight.double()[:, None] - state["codebook"].double()).abs()
    chosen = distances.gather(1, state["index"].long()[:, None])[:, 0]
    nearest = chosen <= distances.min(1).values + 32  # a middle is rounded to float16
    assert bool(nearest[~state.get("outlier", torch.zeros(2000, dtype=torch.bool))].all())


def test_sixteen_weights_and_four_centroids_compress_3_2_times() -> None:
    # r = n b / (n log2 k + k b) = 512 / (32 + 128), Han, Mao and Dally 2016, figure 3.
    codes = encoded(KMeans(2), torch.randn(4, 4))
    coded = sum(stream.tensor.numel() * stream.bits for stream in codes.streams.values())
    tables = sum(table.numel() * 32 for table in codes.tables.values())
    assert (coded, tables) == (32, 128)
    assert 16 * 32 / (coded + tables) == pytest.approx(3.2)


def test_the_codebook_gradient_sums_over_each_cluster() -> None:
    model = nn.Linear(12, 5).double()
    mask = torch.rand(5, 12) < 0.7
    lay(model, "weight", KMeans(2), mask=mask)
    laid, inputs = model.parametrizations.weight[0], torch.randn(6, 12, dtype=torch.float64)
    leaf = model.weight.detach().requires_grad_()
    loss = nn.functional.linear(inputs, leaf, model.bias).sin().sum()
    (by_weight,) = torch.autograd.grad(loss, leaf)
    model(inputs).sin().sum().backward()
    for cluster in range(4):
        members = (laid.index == cluster) & mask
        assert float(laid.codebook.grad[cluster]) == pytest.approx(float(by_weight[members].sum()))


def test_the_codebook_gradient_is_the_finite_difference() -> None:
    model = nn.Linear(12, 5).double()
    lay(model, "weight", KMeans(2))
    laid, inputs = model.parametrizations.weight[0], torch.randn(6, 12, dtype=torch.float64)
    model(inputs).sin().sum().backward()
    step = 1e-6
    for cluster in range(4):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                laid.codebook[cluster] += sign * step
                sides.append(float(model(inputs).sin().sum()))
                laid.codebook[cluster] -= sign * step
        slope = (sides[0] - sides[1]) / (2 * step)
        assert float(laid.codebook.grad[cluster]) == pytest.approx(slope, rel=1e-5, abs=1e-7)
