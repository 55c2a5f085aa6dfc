"""Second derivatives of a loss: Hessian-vector products, the diagonal, the top eigenvalue."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from laconic.errors import ModelError

__all__ = [
    "LossFunction",
    "diagonal_fisher",
    "diagonal_hutchinson",
    "gradients",
    "hessian_vector_product",
    "largest_eigenvalue",
    "top_eigenvalue",
]

LossFunction = Callable[[], Tensor]


def gradients(loss_function: LossFunction, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return dl/dw of every tensor, zeros where the loss does not depend on it.

    No ``.grad`` is read or written.

    Args:
        loss_function: computes a scalar loss from the tensors, afresh at every call.
        tensors: each requires gradients, any shape; those of sparse tables are dense here.

    >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> gradients(lambda: (weight**2).sum(), [weight])
    (tensor([2., 4.]),)
    """
    with torch.enable_grad():
        return _grad(loss_function(), tensors)


def hessian_vector_product(
    loss_function: LossFunction, tensors: Sequence[Tensor], vectors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return H v, the Hessian of the loss times a vector, one piece per tensor.

    ``H v = d(g . v)/dw`` with ``g = dl/dw`` (Pearlmutter 1994).

    Args:
        loss_function: computes a scalar, twice differentiable loss, deterministically.
        tensors: each requires gradients, any shape.
        vectors: one of the same shape per tensor.

    >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hessian_vector_product(lambda: (weight**3).sum(), [weight], [torch.ones(2)])
    (tensor([ 6., 12.]),)
    """
    return _product(_graph(loss_function, tensors), tensors, vectors)


def diagonal_hutchinson(
    loss_function: LossFunction,
    tensors: Sequence[Tensor],
    *,
    samples: int,
    generator: torch.Generator,
) -> tuple[Tensor, ...]:
    """Return an unbiased estimate of H_ii: the mean of ``v * (H v)`` over signs v.

    The variance of H_ii's estimate is ``sum_j H_ij^2, j != i``, divided by ``samples``, so a
    diagonal Hessian is found exactly (Hutchinson 1990; Bekas, Kokiopoulou and Saad 2007).

    Args:
        loss_function: computes a scalar, twice differentiable loss; called once.
        tensors: each requires gradients, any shape.
        samples: how many v, each +1 or -1 with equal probability.
        generator: on the CPU, so that every device draws the same signs.

    >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> draws = torch.Generator().manual_seed(0)
    >>> diagonal_hutchinson(lambda: (weight**3).sum(), [weight], samples=1, generator=draws)
    (tensor([ 6., 12.]),)
    """
    slopes = _graph(loss_function, tensors)
    total = [torch.zeros_like(_wide(tensor)) for tensor in tensors]
    for _ in range(samples):
        signs = [_signs(tensor, generator) for tensor in tensors]
        for sum_, v, hv in zip(total, signs, _product(slopes, tensors, signs), strict=True):
            sum_ += v * _wide(hv) / samples
    return tuple(total)


def diagonal_fisher(
    losses: Iterable[LossFunction], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return the diagonal of the empirical Fisher matrix: the mean of ``g_i^2``.

    It stands for H_ii where each loss is the negative log-likelihood of one example and the
    model fits the data; the square of a batch's mean gradient is not the mean of the squares.

    Args:
        losses: one function per example, each computes a scalar loss.
        tensors: each requires gradients, any shape.

    Raises:
        ValueError: there is no loss.

    >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> diagonal_fisher([lambda: weight.sum(), lambda: 3 * weight[0]], [weight])
    (tensor([5.0000, 0.5000]),)
    """
    total, count = [torch.zeros_like(_wide(tensor)) for tensor in tensors], 0
    for loss_function in losses:
        for sum_, g in zip(total, gradients(loss_function, tensors), strict=True):
            sum_ += _wide(g) ** 2
        count += 1
    if not count:
        raise ValueError("the Fisher matrix of no loss was asked for; give at least one")
    return tuple(sum_ / count for sum_ in total)


def top_eigenvalue(
    loss_function: LossFunction,
    tensors: Sequence[Tensor],
    *,
    generator: torch.Generator,
    iterations: int = 100,
    tolerance: float = 1e-3,
) -> float:
    """Return the Hessian's eigenvalue of largest magnitude, by power iteration.

    ``v <- H v / ||H v||`` until ``||H v||``, which only grows, grows by less than
    ``tolerance``, relatively; the sign is that of ``v . (H v)``. The tensors form one block:
    their cross derivatives count.

    Args:
        loss_function: computes a scalar, twice differentiable loss; called once.
        tensors: each requires gradients, any shape.
        generator: on the CPU; draws the first v.
        iterations: at most so many products.
        tolerance: relative change at which to stop.

    >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> draws = torch.Generator().manual_seed(0)
    >>> round(top_eigenvalue(lambda: (weight**3).sum(), [weight], generator=draws), 2)
    12.0
    """
    size, quotient = _power(loss_function, tensors, generator, iterations, tolerance)
    return math.copysign(size, quotient)


def largest_eigenvalue(
    loss_function: LossFunction,
    tensors: Sequence[Tensor],
    *,
    generator: torch.Generator,
    iterations: int = 100,
    tolerance: float = 1e-3,
) -> float:
    """Return the Hessian's algebraically largest eigenvalue, by power iteration.

    Where that of largest magnitude is ``lambda < 0``, it is ``top(H + |lambda| I) - |lambda|``:
    the steepest way up of a loss that curves down as steeply, or more, elsewhere.

    Args:
        loss_function: computes a scalar, twice differentiable loss; called once or twice.
        tensors: each requires gradients, any shape.
        generator: on the CPU; draws the first v.
        iterations: at most so many products, each time.
        tolerance: relative change at which to stop.

    >>> weight = torch.tensor([1.0, -2.0], requires_grad=True)
    >>> draws = torch.Generator().manual_seed(0)
    >>> round(largest_eigenvalue(lambda: (weight**3).sum(), [weight], generator=draws), 1)
    6.0
    """
    size, quotient = _power(loss_function, tensors, generator, iterations, tolerance)
    # An eigenvector of +size is its own direction; else some of v is one of a negative number.
    if quotient >= (1 - tolerance) * size:
        return size

    def shifted() -> Tensor:
        bowl = torch.stack([(tensor - tensor.detach()).square().sum() for tensor in tensors])
        return loss_function() + size / 2 * bowl.sum()

    # Finer, because a difference of two numbers is relatively less sure than they are.
    return _power(shifted, tensors, generator, iterations, tolerance / 10)[0] - size


def _power(
    loss_function: LossFunction,
    tensors: Sequence[Tensor],
    generator: torch.Generator,
    iterations: int,
    tolerance: float,
) -> tuple[float, float]:
    """Return ``||H v||`` and ``v . (H v)`` of the unit vector at which the iteration stops."""
    slopes, size, quotient = _graph(loss_function, tensors), math.nan, math.nan
    v = [torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device) for t in tensors]
    for _ in range(iterations):
        v = _unit(v)
        hv = _product(slopes, tensors, v)
        last, size, quotient = size, float(_dot(hv, hv).sqrt()), float(_dot(v, hv))
        if abs(size - last) <= tolerance * size:
            break
        v = list(hv)
    return size, quotient


def _graph(loss_function: LossFunction, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    # The fused kernels of scaled dot-product attention have no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        return _grad(loss_function(), tensors, create_graph=True)


def _product(
    slopes: Sequence[Tensor], tensors: Sequence[Tensor], vectors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    return _grad(_dot(slopes, vectors), tensors, retain_graph=True)


def _grad(
    scalar: Tensor,
    tensors: Sequence[Tensor],
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> tuple[Tensor, ...]:
    if not scalar.requires_grad:  # constant in every tensor: a linear loss has no Hessian
        return tuple(torch.zeros_like(tensor) for tensor in tensors)
    try:
        found = torch.autograd.grad(
            scalar,
            tensors,
            create_graph=create_graph,
            retain_graph=retain_graph,
            materialize_grads=True,
        )
    except NotImplementedError as error:  # of torch's EmbeddingBag
        raise ModelError(
            f"the loss has no second derivative ({error}); leave the layer out of the scope, or "
            "use one that has, such as nn.Embedding"
        ) from error
    return tuple(each.to_dense() if each.is_sparse else each for each in found)


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    with torch.enable_grad():
        products = [(_wide(a) * b).sum() for a, b in zip(first, second, strict=True)]
        return torch.stack(products).sum()


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 at least: sums of narrower numbers lose the small ones."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _unit(vectors: Sequence[Tensor]) -> list[Tensor]:
    norm = _dot(vectors, vectors).sqrt()
    norm = norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return [(vector / norm).to(vector.dtype) for vector in vectors]


def _signs(tensor: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(0, 2, tensor.shape, generator=generator)
    return (2 * drawn - 1).to(tensor)
