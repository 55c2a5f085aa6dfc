"""Curvature: Hessian-vector products, diagonals and eigenvalues of known functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.curvature import (
    diagonal_fisher,
    diagonal_hutchinson,
    gradients,
    hessian_vector_product,
    largest_eigenvalue,
    top_eigenvalue,
)
from laconic.errors import ModelError


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quadratic(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return symmetric A [size, size] and a weight [size] that requires gradients."""
    generator = draws(seed)
    half = torch.randn(size, size, generator=generator, dtype=torch.float64)
    weight = torch.randn(size, generator=generator, dtype=torch.float64)
    return half + half.T, weight.requires_grad_(True)


def test_product_of_a_quadratic_is_its_matrix_times_the_vector() -> None:
    a, weight = quadratic(7)
    vector = torch.randn(7, generator=draws(1), dtype=torch.float64)
    (product,) = hessian_vector_product(lambda: 0.5 * weight @ a @ weight, [weight], [vector])
    assert torch.allclose(product, a @ vector, rtol=1e-12)


def test_product_counts_the_derivatives_across_tensors() -> None:
    x = torch.tensor([2.0], requires_grad=True)
    y = torch.tensor([[3.0]], requires_grad=True)
    found = hessian_vector_product(
        lambda: (x**2 * y).sum(), [x, y], [torch.tensor([1.0]), torch.tensor([[10.0]])]
    )
    # H = [[2y, 2x], [2x, 0]]
    assert [piece.tolist() for piece in found] == [[46.0], [[4.0]]]


def test_what_the_loss_does_not_depend_on_gets_zeros() -> None:
    used = torch.tensor([2.0], requires_grad=True)
    unused = torch.tensor([5.0, 6.0], requires_grad=True)
    tensors, vectors = [used, unused], [torch.ones(1), torch.ones(2)]
    assert [g.tolist() for g in gradients(lambda: used.sum(), tensors)] == [[1.0], [0.0, 0.0]]
    linear = hessian_vector_product(lambda: used.sum(), tensors, vectors)
    assert [piece.tolist() for piece in linear] == [[0.0], [0.0, 0.0]]
    square = hessian_vector_product(lambda: (used**2).sum(), tensors, vectors)
    assert [piece.tolist() for piece in square] == [[2.0], [0.0, 0.0]]


def test_nothing_leaks_into_grad_and_no_grad_does_not_matter() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    weight.grad = torch.tensor([7.0, 7.0])
    with torch.no_grad():
        (slope,) = gradients(lambda: (weight**2).sum(), [weight])
        (product,) = hessian_vector_product(
            lambda: (weight**2).sum(), [weight], [torch.ones_like(weight)]
        )
    assert slope.tolist() == [2.0, 4.0]
    assert product.tolist() == [2.0, 2.0]
    assert weight.grad.tolist() == [7.0, 7.0]
    assert not slope.requires_grad
    assert not product.requires_grad


def test_hutchinson_is_exact_for_a_diagonal_hessian_and_close_otherwise() -> None:
    weight = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    scale = torch.tensor([1.0, 2.0, -3.0])
    (exact,) = diagonal_hutchinson(
        lambda: 0.5 * (scale * weight**2).sum(), [weight], samples=1, generator=draws()
    )
    assert exact.tolist() == scale.tolist()
    a, weight = quadratic(5)
    (close,) = diagonal_hutchinson(
        lambda: 0.5 * weight @ a @ weight, [weight], samples=2000, generator=draws()
    )
    # Four standard errors, from the variance of the estimator.
    deviation = ((a**2).sum(1) - a.diagonal() ** 2).sqrt() / 2000**0.5
    assert bool(((close - a.diagonal()).abs() <= 4 * deviation).all())
    assert not torch.allclose(close, a.diagonal())


def test_hutchinson_repeats_with_its_generator() -> None:
    a, weight = quadratic(5)

    def found(seed: int) -> Tensor:
        (diagonal,) = diagonal_hutchinson(
            lambda: 0.5 * weight @ a @ weight, [weight], samples=2, generator=draws(seed)
        )
        return diagonal

    assert torch.equal(found(3), found(3))
    assert not torch.equal(found(3), found(4))


def test_fisher_is_the_mean_of_squared_gradients() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    slopes = torch.tensor([[1.0, 0.0], [-3.0, 2.0]])
    losses = [lambda row=row: row @ weight for row in slopes]
    assert diagonal_fisher(losses, [weight])[0].tolist() == [5.0, 2.0]
    with pytest.raises(ValueError, match="no loss"):
        diagonal_fisher([], [weight])


def test_fisher_approaches_the_hessian_of_a_model_that_is_right() -> None:
    # Bernoulli examples drawn from the model itself: the two diagonals have one expectation.
    x = torch.randn(4000, 2, generator=draws(), dtype=torch.float64)
    weight = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    labels = torch.bernoulli(torch.sigmoid(x @ weight.detach()), generator=draws(1))

    def loss(row: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(x[row] @ weight, labels[row])

    fisher = diagonal_fisher((lambda row=row: loss(row) for row in range(4000)), [weight])[0]
    p = torch.sigmoid(x @ weight.detach())
    hessian = (x**2 * (p * (1 - p))[:, None]).mean(0)
    assert torch.allclose(fisher, hessian, rtol=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_top_eigenvalue_of_a_quadratic(seed: int) -> None:
    a, weight = quadratic(6, seed)
    values = torch.linalg.eigvalsh(a)
    largest = values[values.abs().argmax()]
    found = top_eigenvalue(
        lambda: 0.5 * weight @ a @ weight,
        [weight],
        generator=draws(),
        iterations=2000,
        tolerance=1e-9,
    )
    assert found == pytest.approx(float(largest), rel=1e-5)


@pytest.mark.parametrize("values", [[-5.0, 1.0, 3.0], [-1.0, 2.0, 4.0], [-4.0, -3.0, -1.0]])
def test_the_largest_eigenvalue_has_its_sign(values: list[float]) -> None:
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    spectrum = torch.tensor(values, dtype=torch.float64)
    found = largest_eigenvalue(
        lambda: 0.5 * (spectrum * weight.square()).sum(),
        [weight],
        generator=draws(),
        iterations=1000,
        tolerance=1e-9,
    )
    assert found == pytest.approx(max(values), rel=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-9, 1e-12])
def test_the_top_eigenvalue_is_as_exact_however_small(scale: float) -> None:
    spectrum = torch.linspace(0.01, 1.0, 50, dtype=torch.float64)
    weight = torch.ones(50, dtype=torch.float64, requires_grad=True)
    found = [
        top_eigenvalue(
            lambda: factor * 0.5 * (spectrum * weight.square()).sum(),  # noqa: B023
            [weight],
            generator=draws(),
        )
        for factor in (scale, 1.0)
    ]
    assert found[0] / scale == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_eigenvalues_of_a_saddle_do_not_depend_on_where_the_search_starts(seed: int) -> None:
    """Those of x y are 1 and -1, between which the Rayleigh quotient turns."""
    weight = torch.tensor([1.0, 1.0], requires_grad=True)
    found, largest = (
        find(lambda: weight[0] * weight[1], [weight], generator=draws(seed))
        for find in (top_eigenvalue, largest_eigenvalue)
    )
    assert abs(found) == pytest.approx(1, rel=1e-4)
    assert largest == pytest.approx(1, rel=1e-3)


def test_eigenvalues_of_mixed_signs_are_found_as_exactly() -> None:
    for seed in range(40):
        a, weight = quadratic(20, seed)
        values = torch.linalg.eigvalsh(a)

        def loss(a: Tensor = a, weight: Tensor = weight) -> Tensor:
            return 0.5 * weight @ a @ weight

        top = abs(top_eigenvalue(loss, [weight], generator=draws(seed)))
        assert top == pytest.approx(float(values.abs().max()), rel=0.05)
        largest = largest_eigenvalue(loss, [weight], generator=draws(seed))
        assert largest == pytest.approx(float(values.max()), rel=0.1)


def test_sums_over_examples_keep_what_half_precision_would_lose() -> None:
    weight = torch.ones(2, dtype=torch.float16, requires_grad=True)
    slopes = [1e-4, 1.0]  # the square of the first is zero in float16
    losses = [lambda: (weight * torch.tensor(slopes).half()).sum()] * 3000
    (fisher,) = diagonal_fisher(losses, [weight])
    assert fisher.tolist() == pytest.approx([1e-8, 1.0], rel=2e-3)


def test_top_eigenvalue_of_a_flat_loss_is_zero() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    assert top_eigenvalue(lambda: weight.sum(), [weight], generator=draws()) == 0.0


def test_attention_kernels_do_not_stand_in_the_way() -> None:
    projection = nn.Linear(4, 4)
    tokens = torch.randn(1, 2, 3, 4, generator=draws())

    def loss() -> Tensor:
        mixed = projection(tokens)
        return F.scaled_dot_product_attention(mixed, mixed, tokens).square().mean()

    vector = torch.ones_like(projection.weight)
    (product,) = hessian_vector_product(loss, [projection.weight], [vector])
    with torch.no_grad():
        step = 1e-2
        projection.weight += step * vector
        (after,) = gradients(loss, [projection.weight])
        projection.weight -= 2 * step * vector
        (before,) = gradients(loss, [projection.weight])
    assert torch.allclose(product, (after - before) / (2 * step), rtol=1e-2, atol=1e-4)
    assert float(product.abs().max()) > 1e-3


def test_gradients_of_sparse_tables_are_dense() -> None:
    tables = [nn.Embedding(5, 2, sparse=sparse) for sparse in (True, False)]
    tables[0].load_state_dict(tables[1].state_dict())
    rows = torch.tensor([1, 3])
    found = [gradients(lambda t=t: t(rows).square().sum(), [t.weight])[0] for t in tables]
    assert torch.equal(found[0], found[1])


def test_what_torch_cannot_differentiate_twice_is_named() -> None:
    bag = nn.EmbeddingBag(5, 2)
    with pytest.raises(ModelError, match=r"no second derivative \(.*embedding_bag.*scope"):
        top_eigenvalue(
            lambda: bag(torch.tensor([[1, 3]])).square().sum(), [bag.weight], generator=draws()
        )
