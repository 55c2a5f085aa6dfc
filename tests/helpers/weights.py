"""A vector of eight weights, what a representation makes of weights, and its squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from laconic.weights import Codes, Laid, Representation

VECTOR = torch.tensor([0.9, -1.1, 0.3, -0.2, 0.05, -0.6, 0.4, 1.5])
# Half a unit in the last printed place of the hand-computed figures.
PRINTED = 5e-8
# A few float32 roundings of numbers near one.
ROUNDING = 1e-6


def encoded(representation: Representation, weight: Tensor, mask: Tensor | None = None) -> Codes:
    return representation.encode(weight, mask=mask, state=representation.fit(weight, mask))


def shipped(representation: Representation, weight: Tensor) -> Tensor:
    return representation.decode(encoded(representation, weight))


def sse(weight: Tensor, other: Tensor) -> float:
    return float((weight.double() - other.double()).square().sum())


def gradient(representation: Representation, weight: Tensor) -> Tensor:
    latent = weight.clone().requires_grad_()
    laid = Laid(representation, None, representation.fit(weight))
    return torch.autograd.grad(laid(latent).sum(), latent)[0]
