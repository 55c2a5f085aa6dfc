"""GOBO: which weights are outliers, which centroids are taken, what a file holds of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from laconic import load, save
from laconic.recover import AdamW, Stop, Train
from laconic.ship import inspect
from laconic.step import State, run_step
from laconic.tasks import Task
from laconic.weights import Codes, Gobo, Laid, lay
from laconic.weights.laid import laid_tensors, narrow
from laconic.weights.outliers import log_likelihood, population_centroids

SIGMA = 0.04


def encoded(representation: Gobo, weight: Tensor, mask: Tensor | None = None) -> Codes:
    return representation.encode(weight, mask=mask, state=representation.fit(weight, mask))


def test_log_likelihood_is_torchs_log_density() -> None:
    numbers = torch.randn(500, dtype=torch.float64) * SIGMA + 0.01
    fitted = torch.distributions.Normal(numbers.mean(), numbers.std(correction=0))
    assert log_likelihood(numbers.numpy()) == pytest.approx(fitted.log_prob(numbers).numpy())


def test_the_threshold_is_beyond_three_and_a_half_of_the_papers_sigmas() -> None:
    """-4 = -log(sigma sqrt(2 pi)) - z^2 / 2 at z = 3.55 for sigma 0.04: 0.04 % of a normal."""
    edge = math.sqrt(2 * (4 - math.log(SIGMA * math.sqrt(2 * math.pi))))
    assert edge == pytest.approx(3.5496, abs=1e-4)
    weight = torch.randn(1_000_000, generator=torch.Generator().manual_seed(1)) * SIGMA
    share = float(Gobo().fit(weight)["outlier"].double().mean())
    assert share == pytest.approx(math.erfc(edge / math.sqrt(2)), rel=0.1)


def test_outliers_are_exact_and_the_others_share_a_codebook() -> None:
    weight = torch.randn(60, 50) * SIGMA
    weight[3, 4], weight[50, 2] = 1.0, -0.9
    codes = encoded(Gobo(3), weight)
    decoded = Gobo(3).decode(codes)
    outlier = codes.streams["outlier"].tensor.bool()
    assert bool(outlier[3, 4]) and bool(outlier[50, 2]) and int(outlier.sum()) < 10
    assert torch.equal(decoded[outlier], weight[outlier])
    assert torch.equal(codes.tables["outliers"], weight[outlier])
    assert set(decoded[~outlier].tolist()) <= set(codes.tables["codebook"].tolist())
    assert float(codes.tables["codebook"].abs().max()) < 0.2
    assert codes.streams["index"].bits == 3


def test_every_other_weight_goes_to_the_nearest_centroid() -> None:
    weight = torch.randn(3000) * SIGMA
    codes = encoded(Gobo(4), weight)
    inner = ~codes.streams["outlier"].tensor.bool()
    distance = (weight[:, None] - codes.tables["codebook"]).abs()
    found = (weight - Gobo(4).decode(codes)).abs()
    assert torch.allclose(found[inner], distance.amin(1)[inner], atol=1e-7)


def curve(numbers: np.ndarray, count: int, turns: int) -> list[tuple[float, np.ndarray]]:
    """Return the summed absolute error and the centroids of every turn, done naively."""
    found = np.array([part.mean() for part in np.array_split(numbers, count)])
    seen = []
    for _ in range(turns):
        nearest = np.abs(numbers[:, None] - found).argmin(1)
        seen.append((float(np.abs(numbers - found[nearest]).sum()), found))
        found = np.array([numbers[nearest == k].mean() for k in range(count)])
    return seen


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("power", [1, 3])
def test_the_minimum_of_the_error_curve_is_taken(bits: int, power: int) -> None:
    numbers = np.sort(np.random.default_rng(bits).normal(size=16 * 50) ** power)
    seen = curve(numbers, 2**bits, 200)
    errors = [error for error, _ in seen]
    first_rise = next(turn for turn in range(1, 200) if errors[turn] >= errors[turn - 1])
    assert population_centroids(numbers, 2**bits) == pytest.approx(seen[first_rise - 1][1])
    assert errors[first_rise - 1] == min(errors[: first_rise + 1])


def test_the_error_is_less_than_that_of_equal_bins() -> None:
    numbers = np.sort(np.random.default_rng(0).normal(size=4000))
    equal = np.array([part.mean() for part in np.array_split(numbers, 8)])
    found = population_centroids(numbers, 8)
    l1 = [np.abs(numbers[:, None] - each).min(1).sum() for each in (found, equal)]
    assert l1[0] < 0.96 * l1[1]
    assert bool((np.diff(found) > 0).all())


@pytest.mark.parametrize("size", [0, 1, 3])
def test_fewer_numbers_than_centroids(size: int) -> None:
    numbers = np.arange(float(size))
    found = population_centroids(numbers, 8)
    assert found.shape == (8,) and bool(np.isfinite(found).all())
    assert set(numbers) <= set(found.tolist())


@pytest.mark.parametrize("count", [3, 20, 31])
def test_centroids_ascend_where_all_doubles_are_the_same(count: int) -> None:
    # 0.04 is no sum of few powers of two: means by differences of sums differ in their last bits.
    found = population_centroids(np.full(count, 0.04), 8)
    assert bool((np.diff(found) >= 0).all()) and found == pytest.approx(0.04)


def test_a_constant_weight_has_no_outliers() -> None:
    for number in (0.0, 0.3, 1e30):
        codes = encoded(Gobo(2), torch.full((4, 5), number))
        assert not bool(codes.streams["outlier"].tensor.any())
        assert torch.equal(Gobo(2).decode(codes), torch.full((4, 5), number))


def test_statistics_are_of_survivors_and_a_narrower_mask_drops_its_outliers() -> None:
    weight, mask = torch.randn(40, 50) * SIGMA, torch.rand(40, 50) < 0.5
    weight[0, :2] = 1.0
    mask[0, :2] = torch.tensor([True, False])
    codes = encoded(Gobo(3), weight, mask)
    assert 1.0 in codes.tables["outliers"].tolist()
    assert len(codes.tables["outliers"]) == int(codes.streams["outlier"].tensor.sum())
    model = nn.Linear(50, 40)
    model.weight.data.copy_(weight)
    lay(model, "weight", Gobo(3), mask=mask)
    mask[0, 0] = False
    narrow(model, "weight", mask)
    assert bool((model.weight.abs() < 0.5).all())
    assert not bool(model.weight[~mask].any())


def test_training_moves_the_outliers_and_the_codebook_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(24, 30, generator=generator), torch.arange(24) % 3
    task = Task((inputs, labels), (inputs, labels), (inputs, labels))
    model = nn.Sequential(nn.Linear(30, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(3, 30) * SIGMA)
        model[0].weight[1, 7] = 0.8
    lay(model, "0.weight", Gobo(2))
    layer, latent = laid_tensors(model)["0.weight"]
    before, codebook = latent.detach().clone(), layer.codebook.detach().clone()
    optimizer = AdamW(0.01, weight_decay=0.0)
    run_step(
        Train(epochs=2, batch=8, optimizer=optimizer, stop=Stop(keep="last")), State(model, task)
    )
    moved = latent.detach() != before
    assert torch.equal(moved, layer.outlier) and bool(moved[1, 7])
    assert not torch.equal(layer.codebook, codebook)
    assert torch.equal(model[0].weight, layer.representation.decode(layer.encode(latent)))


def test_a_smaller_weight_keeps_its_outliers() -> None:
    weight = torch.randn(6, 8) * SIGMA
    weight[4, 5] = 2.0
    laid = Laid(Gobo(2), None, Gobo(2).fit(weight))
    rows = torch.tensor([4, 1])
    sliced = laid.sliced(0, rows, weight)
    assert torch.equal(sliced(weight[rows]), laid(weight)[rows])


def test_the_file_is_as_small_as_the_paper_counts(tmp_path: Path) -> None:
    """3 bits a weight, and less than a tenth of a bit for where the outliers are and for them."""
    model = nn.Sequential(nn.Linear(512, 512, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(512, 512) * SIGMA)
    shipped = model[0].weight.numel()
    lay(model, "0.weight", Gobo(3))
    size = save(model, tmp_path / "model.safetensors")
    parts = inspect(tmp_path / "model.safetensors")
    outliers = int(laid_tensors(model)["0.weight"][0].outlier.sum())
    assert 50 < outliers < 300
    assert parts.table_bytes >= 4 * (8 + outliers)
    assert 8 * (size - parts.header_bytes) / shipped < 3.1
    loaded = load(tmp_path / "model.safetensors", model=nn.Sequential(nn.Linear(512, 512, False)))
    assert torch.equal(loaded[0].weight, model[0].weight)
