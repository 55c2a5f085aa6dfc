"""The formulas of pruning criteria, penalties and the knapsack, on numbers known beforehand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laconic.budget import knapsack
from laconic.curvature import diagonal_hutchinson, gradients, hessian_vector_product
from laconic.recover.penalties import L1, L2
from laconic.structure.criteria import (
    combined,
    second_order,
    standardized,
)
from laconic.structure.importance import distances
from laconic.structure.obs import compensated, inverse_diagonal
from laconic.structure.ranking import Ranking

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
    predicted = (gradient * change).sum() + 0.5 * (change * product).sum()
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
    (gradient,) = gradients(lambda: slope @ weight, [weight])
    scores = combined((gradient * w)[:, None], "sum")
    for index in range(3):
        without = w.clone()
        without[index] = 0.0
        assert float(scores[index]) == abs(float(slope @ without - slope @ w))
    assert scores.tolist() == [2.0, 4.0, 1.0]


def test_a_groups_first_order_score_is_exact_for_a_linear_loss() -> None:
    slope = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    w = torch.tensor([[1.0, 4.0], [-2.0, 1.0]])
    weight = w.clone().requires_grad_(True)
    (gradient,) = gradients(lambda: (slope * weight).sum(), [weight])
    scores = combined(gradient * w, "sum")
    assert scores.tolist() == [2.0, 2.0]
    for group in range(2):
        without = w.clone()
        without[group] = 0.0
        assert float(scores[group]) == abs(float((slope * without).sum() - (slope * w).sum()))
    assert combined(gradient * w, "absolute").tolist() == [6.0, 4.0]
    assert combined(gradient * w, "square").tolist() == [20.0, 10.0]


def obs_update(weight: Tensor, inverse: Tensor, index: int) -> Tensor:
    """Return ``dw = -(w_i / [H^-1]_ii) H^-1 e_i`` (Hassibi and Stork 1993, eq. 5)."""
    return -(weight[index] / inverse[index, index]) * inverse[:, index]


@pytest.mark.parametrize("seed", range(3))
def test_obs_is_the_constrained_optimum_and_its_score_the_cost(seed: int) -> None:
    a, _, w = quadratic(6, seed)
    hessian = a @ a + torch.eye(6, dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    for index in range(6):
        change = obs_update(w, inverse, index)
        # Minimise 0.5 d H d subject to d_i = -w_i, by the equations of Lagrange.
        system = torch.zeros(7, 7, dtype=torch.float64)
        system[:6, :6] = hessian
        system[index, 6] = system[6, index] = 1.0
        right = torch.zeros(7, dtype=torch.float64)
        right[6] = -w[index]
        assert torch.allclose(change, torch.linalg.solve(system, right)[:6], atol=EXACT)
        cost = 0.5 * change @ hessian @ change
        every = torch.ones(1, 6, dtype=torch.bool)
        score = second_order(1 / inverse_diagonal(hessian, every)[0], w)[index]
        assert float(score) == pytest.approx(float(cost), rel=EXACT)
        mask = every.clone()
        mask[0, index] = False
        row = compensated(w[None], hessian, mask, tolerance=1e-12)[0]
        assert torch.allclose(row, w + change, atol=EXACT)


def test_obs_one_by_one_is_obs_at_once() -> None:
    a, _, w = quadratic(6, 4)
    hessian = a @ a + torch.eye(6, dtype=torch.float64)
    left, current = list(range(6)), w.clone()
    for gone in (3, 0, 5):
        inverse = torch.linalg.inv(hessian[left][:, left])
        current[left] += obs_update(current[left], inverse, left.index(gone))
        left.remove(gone)
    mask = torch.tensor([[index in left for index in range(6)]])
    at_once = compensated(w[None], hessian, mask, tolerance=1e-12)[0]
    assert torch.allclose(current, at_once, atol=EXACT)


def test_obs_is_obd_where_the_hessian_is_diagonal() -> None:
    generator = torch.Generator().manual_seed(0)
    diagonal = torch.rand(5, generator=generator, dtype=torch.float64) + 0.5
    w = torch.randn(5, generator=generator, dtype=torch.float64)
    hessian = torch.diag(diagonal)
    inverse = inverse_diagonal(hessian, torch.ones(1, 5, dtype=torch.bool))[0]
    assert torch.allclose(second_order(1 / inverse, w), second_order(diagonal, w), rtol=EXACT)
    others = obs_update(w, torch.linalg.inv(hessian), 2)
    others[2] += w[2]
    assert not bool(others.any())


def test_sums_of_distances_to_all_other_filters() -> None:
    filters = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 8.0]])
    assert distances(filters).tolist() == [13.0, 10.0, 13.0]


def test_widths_of_dynabert_in_heads_and_neurons() -> None:
    shares = (0.25, 0.5, 0.75, 1.0)
    assert [Ranking().count(12, share) for share in shares] == [3, 6, 9, 12]
    assert [Ranking().count(3072, share) for share in shares] == [768, 1536, 2304, 3072]


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
