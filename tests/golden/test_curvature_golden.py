"""The formulas of curvature: what is measured of a block, on numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from laconic.curvature import diagonal_hutchinson, largest_eigenvalue, top_eigenvalue
from laconic.weights.mixed import most_sensitive, sensitivity

# Power iteration stops when the eigenvalue changes by less.
CLOSE = 1e-3


@pytest.mark.parametrize(
    ("eigenvalues", "wanted"),
    [([1.0, 3.0], 3.0), ([-1.0, -3.0], 3.0), ([-1.0, 1.0], 1.0), ([2.0], 2.0)],
)
def test_sensitivity_is_the_size_of_the_mean_and_the_deviation(
    eigenvalues: list[float], wanted: float
) -> None:
    """Shen et al. 2020: |mean| + std, such as |(1 + 3) / 2| + 1."""
    assert sensitivity(eigenvalues) == wanted


def test_the_most_sensitive_blocks() -> None:
    """Means 2, -2, 0 and 1 with deviations 1, 0, 3 and 0.5: sensitivities 3, 2, 3 and 1.5."""
    values = {"a": [1.0, 3.0], "b": [-2.0, -2.0], "c": [-3.0, 3.0], "d": [0.5, 1.5]}
    found = {name: sensitivity(each) for name, each in values.items()}
    assert found == {"a": 3.0, "b": 2.0, "c": 3.0, "d": 1.5}
    assert most_sensitive(found, 0.5) == ["a", "c"]


def test_eigenvalues_of_a_matrix_worked_out_by_hand() -> None:
    """[[1, 2], [2, -2]] has the eigenvalues 2 and -3: the larger one, and the larger in size."""
    matrix = torch.tensor([[1.0, 2.0], [2.0, -2.0]])
    weight = torch.zeros(2, requires_grad=True)
    found = [
        find(
            lambda: 0.5 * weight @ matrix @ weight,
            [weight],
            generator=torch.Generator().manual_seed(0),
            tolerance=1e-6,
        )
        for find in (largest_eigenvalue, top_eigenvalue)
    ]
    assert found == pytest.approx([2.0, -3.0], rel=CLOSE)


def test_a_diagonal_hessian_is_found_by_any_number_of_vectors() -> None:
    weight = torch.tensor([1.0, 2.0, -1.0], requires_grad=True)
    for samples in (1, 2, 4):
        (found,) = diagonal_hutchinson(
            lambda: (weight**3).sum(), [weight], samples=samples, generator=torch.Generator()
        )
        assert found.tolist() == [6, 12, -6]
