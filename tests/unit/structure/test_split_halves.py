"""Halves of one ternary weight, which add up exactly, and the layer that holds two halves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.split import IDENTITY, drawn, granularities, thresholds
from laconic.errors import ModelError
from laconic.models import layers
from laconic.models.halves import Halves
from laconic.structure import split_ternary
from laconic.weights import Binary, Representation, Ternary

# ------------------------------------------------------------------ one weight


def shipped(representation: Representation, weight: Tensor, mask: Tensor | None) -> Tensor:
    return representation.decode(representation.encode(weight, mask=mask))


def check_identities(weight: Tensor, ternary: Ternary, mask: Tensor | None = None) -> None:
    """Assert that latent and shipped halves add up, and that they keep what is pruned at zero."""
    halves, binary = split_ternary(weight, ternary, mask=mask), Binary(ternary.granularity)
    first, second = halves
    assert first.shape == second.shape == weight.shape
    assert first.dtype == second.dtype == weight.dtype
    assert torch.allclose(first + second, weight, rtol=0, atol=IDENTITY)
    found = sum(shipped(binary, half, mask) for half in halves)
    assert torch.allclose(found, shipped(ternary, weight, mask), rtol=0, atol=IDENTITY)
    assert mask is None or not bool(found[~mask].any())


@granularities
@thresholds
@given(seed=st.integers(0, 99), mean=st.sampled_from([0.0, 0.5, -3.0]), keep=st.floats(0.1, 1))
def test_halves_add_up(
    granularity: Any, threshold: Any, seed: int, mean: float, keep: float
) -> None:
    ternary = Ternary(granularity, threshold=threshold)
    weight = drawn(6, 10, seed=seed).double() + mean
    check_identities(weight, ternary)
    check_identities(weight, ternary, drawn(6, 10, seed=seed + 1).sigmoid() < keep)


@granularities
@thresholds
@pytest.mark.parametrize(
    "rows",
    [
        [[0.0] * 5, [0.0] * 5],
        [[2.0] * 5, [-2.0] * 5],
        [[1.0, -1.0, 1.0, -1.0, 1.0], [0.0, 0.0, 3.0, 0.0, 0.0]],
        [[0.5, 0.5, -0.5, 0.5, 1.0], [0.0, -0.0, 1e-30, -1e-30, 0.0]],
        [[1e30, 1.0, -1.0, 1e-30, 0.0], [1.0, 0.36, 0.36, 0.36, 0.36]],
        [[-1.0, -0.3, -0.3, -0.3, -0.3], [1.0, -0.36, -0.36, -0.36, -0.36]],
    ],
    ids=["zero", "no zeros", "ties", "nearly zero", "spread", "one-sided"],
)
def test_degenerate_groups(granularity: Any, threshold: Any, rows: list[list[float]]) -> None:
    weight = torch.tensor(rows, dtype=torch.float64)
    largest = float(weight.abs().max())
    check_identities(weight / (largest or 1.0), Ternary(granularity, threshold=threshold))


@pytest.mark.parametrize("value", [3.0, -3.0, 0.0])
def test_one_weight(value: float) -> None:
    weight = torch.tensor([[value]], dtype=torch.float64)
    check_identities(weight, Ternary())
    assert split_ternary(weight, Ternary())[0] == value / 2


def test_a_group_without_zeros_is_halved() -> None:
    weight = torch.tensor([1.0, -1.1, 0.9])
    assert all(torch.equal(half, weight / 2) for half in split_ternary(weight, Ternary()))


@pytest.mark.parametrize("mask", [[[False] * 4] * 2, [[True, False, False, True], [False] * 4]])
def test_rows_without_survivors(mask: list[list[bool]]) -> None:
    check_identities(drawn(2, 4).double(), Ternary("row"), torch.tensor(mask))


def test_a_weight_without_elements() -> None:
    first, second = split_ternary(torch.zeros(3, 0), Ternary("row"))
    assert first.shape == second.shape == (3, 0)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("count", [4, 6, 11, 100])
def test_one_sided_rows_have_halves_too(count: int, sign: int) -> None:
    """The paper's a is outside (0, 1) there, and the halves would not be binary as they must."""
    weight = torch.full((1, count), 0.36, dtype=torch.float64)
    weight[0, 0] = 1.0
    weight *= sign
    while not bool((Ternary().encode(weight).streams["code"].tensor == 1)[0, 1:].all()):
        weight[0, 0] *= 1.1
    rest = weight[0, 1:]
    by_paper = (weight[0, 0].abs() - sign * rest.sum()) / (2 * weight[0, 0].abs())
    assert not 0 < float(by_paper) < 1
    check_identities(weight, Ternary())
    for half in split_ternary(weight, Ternary()):
        assert 0 < float(half[0, 0] / weight[0, 0]) < 1


def test_halves_of_float32_are_computed_in_float64() -> None:
    weight = drawn(300, 400) + 0.3
    half = split_ternary(weight, Ternary("row"))[0]
    exact = split_ternary(weight.double(), Ternary("row"))[0]
    assert half.dtype == torch.float32
    assert torch.equal(half, exact.float())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(wrong: float) -> None:
    with pytest.raises(ModelError, match=r"a weight \[2\] holds NaN or infinity"):
        split_ternary(torch.tensor([1.0, wrong]), Ternary())


# ------------------------------------------------------------------ the layer


LINEAR = {"Linear": {"in_features": 4, "out_features": 6}}


@pytest.mark.parametrize(
    ("spec", "inputs"),
    [
        (LINEAR, drawn(2, 5, 4)),
        ({"Conv2d": {"in_channels": 3, "out_channels": 4, "kernel_size": 3}}, drawn(2, 3, 6, 6)),
        ({"Embedding": {"num_embeddings": 9, "embedding_dim": 4}}, torch.arange(8)[None]),
    ],
)
def test_halves_are_added_and_described(spec: dict[str, Any], inputs: Tensor) -> None:
    halves = Halves(spec, spec)
    assert torch.equal(halves(inputs), halves.first(inputs) + halves.second(inputs))
    described = layers.describe(halves)
    whole = layers.describe(layers.layer(spec))
    assert described == {"Halves": {"first": whole, "second": whole}}
    again = layers.layer(described)
    again.load_state_dict(halves.state_dict())
    assert torch.equal(again(inputs), halves(inputs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first": LINEAR}, "Halves cannot be built"),
        ({"first": LINEAR, "second": 3}, "describes no layer"),
        ({"first": LINEAR, "second": {"Bad": {}}}, "no layer is called 'Bad'"),
    ],
)
def test_a_hostile_description_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        layers.layer({"Halves": arguments})


def test_halves_without_end_are_refused() -> None:
    spec: dict[str, Any] = LINEAR
    for _ in range(30):
        spec = {"Halves": {"first": spec, "second": LINEAR}}
    with pytest.raises(ModelError, match="nest too deep"):
        layers.layer(spec)
