"""The formulas of pruning criteria, penalties and the knapsack, on numbers known beforehand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laconic.budget import knapsack
from laconic.curvature import diagonal_hutchinson, gradients, hessian_vector_product
from laconic.recover.penalties import L1, L2
from laconic.structure.criteria import first_order, loss_change, second_order, standardized

EXACT = 1e-6  # what the expansion of a quadratic may lose, relative to the loss change


def quadratic(size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return symmetric A [size, size], b [size] and a point w [size]."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(size, size, generator=generator, dtype=torch.float64)
    b = torch.randn(size, generator=generator, dtype=torch.float64)
    w = torch.randn(size, generator=generator, dtype=torch.float64)
    return draw + draw.T, b, w


@pytest.mark.parametrize("seed", range(3))
def test_expansion_of_a_quadratic_is_the_true_change(seed: int) -> None:
    a, b, w = quadratic(6, seed)

    def loss(at: Tensor) -> Tensor:
        return 0.5 * at @ a @ at + b @ at

    weight, change = w.clone().requires_grad_(True), -w * torch.tensor([1, 0, 1, 1, 0, 0])
    (gradient,) = gradients(lambda: loss(weight), [weight])
    (product,) = hessian_vector_product(lambda: loss(weight), [weight], [change])
    predicted = loss_change(gradient, product, change)
    assert float(predicted) == pytest.approx(float(loss(w + change) - loss(w)), rel=EXACT)


def test_obd_is_exact_where_the_hessian_is_diagonal() -> None:
    generator = torch.Generator().manual_seed(0)
    diagonal = torch.rand(5, generator=generator, dtype=torch.float64) + 0.5
    minimum = torch.randn(5, generator=generator, dtype=torch.float64)

    def loss(at: Tensor) -> Tensor:
        return 0.5 * (diagonal * (at - minimum) ** 2).sum()

    weight = minimum.clone().requires_grad_(True)
    (found,) = diagonal_hutchinson(lambda: loss(weight), [weight], samples=1, generator=generator)
    scores = second_order(found, minimum)
    removed = torch.tensor([True, False, True, True, False])
    change = loss(torch.where(removed, 0.0, minimum)) - loss(minimum)
    assert float(scores[removed].sum()) == pytest.approx(float(change), rel=EXACT)


def test_obd_of_several_weights_misses_the_cross_terms() -> None:
    a = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    minimum = torch.tensor([1.0, 1.0])
    scores = second_order(a.diagonal(), minimum)
    assert scores.tolist() == [1.0, 1.0]
    assert float(0.5 * minimum @ a @ minimum) == 3.0  # removing both: 1 + 1 + the cross term 1


def test_first_order_is_exact_for_a_linear_loss() -> None:
    slope, w = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 4.0, -2.0])
    weight = w.clone().requires_grad_(True)
    scores = first_order(*gradients(lambda: slope @ weight, [weight]), w)
    for index in range(3):
        without = w.clone()
        without[index] = 0.0
        assert float(scores[index]) == abs(float(slope @ without - slope @ w))
    assert scores.tolist() == [2.0, 4.0, 1.0]


def test_standardized_scores_cut_every_layer_at_q_times_its_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    q = 0.7
    for spread in (0.01, 3.0):
        w = spread * torch.randn(200, generator=generator, dtype=torch.float64)
        survives = w.abs() >= q * w.std(correction=0)
        assert torch.equal(standardized(w) >= q, survives)
        assert 0 < int(survives.sum()) < 200


@pytest.mark.parametrize(
    ("capacity", "value", "chosen"),
    [(0, 0, ()), (5, 8, (3,)), (10, 15, (0, 1, 3)), (20, 29, (0, 1, 2, 3, 4))],
)
def test_knapsack(capacity: int, value: int, chosen: tuple[int, ...]) -> None:
    utilities = (3, 4, 5, 8, 9)
    assert knapsack((2, 3, 4, 5, 6), utilities, capacity) == chosen
    assert sum(utilities[item] for item in chosen) == value


def test_penalties_and_their_gradients() -> None:
    weight = torch.tensor([0.9, -1.1, 0.0, 1.5], requires_grad=True)
    absolute = L1(0.1)({"w": weight})
    square = L2(0.1)({"w": weight})
    assert absolute.item() == pytest.approx(0.35)
    assert square.item() == pytest.approx(0.427)
    assert torch.allclose(*torch.autograd.grad(absolute, weight), torch.tensor([0.1, -0.1, 0, 0.1]))
    assert torch.allclose(*torch.autograd.grad(square, weight), 0.2 * weight.detach())
