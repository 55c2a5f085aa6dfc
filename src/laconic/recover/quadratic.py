"""A layer's reconstruction loss as a quadratic form: what enters it is summed up once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from laconic.recover.feeding import Mixture
from laconic.structure.columns import columns, groups_of
from laconic.weights.workspace import wide_dtype

__all__ = ["Moments", "Quadratic", "is_fitted", "matrix_of", "patches", "weight_of"]

# Numbers of patches that are unfolded at once.
UNFOLDED = 1 << 24

Fitted = nn.Linear | nn.Conv1d | nn.Conv2d


@dataclass(frozen=True)
class Quadratic:
    """``(tr(W' G W) - 2 tr(W' P) + c) / n``: the mean squared error of a layer with matrix W.

    Attributes:
        gram: G, of what enters the layer [groups, inputs, inputs].
        product: P, of that with the answers to learn [groups, inputs, outputs].
        constant: c, the sum of the squares of the answers.
        count: n, how many answers there are.

    >>> one = torch.ones(1, 1, 1)
    >>> Quadratic(one, 2 * one, 4.0, 1)(3 * one).item()  # (3 - 2)^2
    1.0
    """

    gram: Tensor
    product: Tensor
    constant: float
    count: int

    def __call__(self, matrix: Tensor) -> Tensor:
        """Return the loss of a matrix W [groups, inputs, outputs], a scalar."""
        loss: Tensor = _Loss.apply(matrix, self)  # type: ignore[no-untyped-call]
        return loss

    def to(self, dtype: torch.dtype) -> Quadratic:
        """Return the same form in another precision."""
        gram, product = self.gram.to(dtype), self.product.to(dtype)
        return Quadratic(gram, product, self.constant, self.count)


class _Loss(torch.autograd.Function):
    """The loss of a form; one product serves its value and its gradient 2 (G W - P) / n."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, form: Quadratic) -> Tensor:
        answered = form.gram @ matrix
        ctx.save_for_backward(2 * (answered - form.product) / form.count)
        loss: Tensor = ((answered - 2 * form.product) * matrix).sum() + form.constant
        return loss / form.count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.saved_tensors[0], None


class Moments:
    """Second moments of what enters a layer: A_T in the teacher, A_S in the student.

    A row is what one answer of the layer is computed from: a token's features or a patch of an
    image, and a 1 where there is a bias. The number of examples does not show in the size of what
    is kept. Beside A_T it is the difference ``A_S - A_T`` whose moments are kept, which may be
    small; A_S itself where the student's layer reads fewer channels.

    Args:
        teacher: the teacher's layer.
        student: the student's; it may read fewer channels.

    >>> layer = nn.Linear(2, 3)
    >>> moments = Moments(layer, layer)
    >>> moments.add(torch.ones(5, 2), torch.ones(5, 2))
    >>> moments.rows, moments.own.shape, moments.own.sum().item()
    (5, torch.Size([1, 3, 3]), 0.0)
    """

    def __init__(self, teacher: Fitted, student: Fitted) -> None:
        self.layers = teacher, student
        sizes = [_inputs(layer) for layer in self.layers]
        self.alike = sizes[0] == sizes[1]
        groups = groups_of(student)
        device = student.weight.device

        def zeros(first: int, second: int) -> Tensor:
            return torch.zeros(groups, first, second, dtype=torch.float64, device=device)

        self.teacher = zeros(sizes[0], sizes[0])
        self.cross = zeros(sizes[1], sizes[0])
        self.own = zeros(sizes[1], sizes[1])
        self.rows = 0

    def add(self, teacher: Tensor, student: Tensor, mask: Tensor | None = None) -> None:
        """Add what entered both layers for the same examples.

        Args:
            teacher: what entered the teacher's [batch, ...].
            student: what entered the student's [batch, ...].
            mask: bool [batch, tokens]; rows of other tokens are left out.
        """
        both = self._rows(1, student, mask), self._rows(0, teacher, mask)
        for own, other in zip(*both, strict=True):
            own = own - other if self.alike else own
            # Summed in double precision over pieces; within one, single is four times as fast.
            self.own += own.transpose(1, 2) @ own
            self.cross += own.transpose(1, 2) @ other
            self.teacher += other.transpose(1, 2) @ other
            self.rows += own.shape[1]

    def _rows(self, side: int, inputs: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        layer = self.layers[side]
        largest = max(_inputs(each) for each in self.layers) * groups_of(layer)
        per_example = largest * math.prod(_positions(layer, inputs))
        mask = mask if isinstance(layer, nn.Linear) else None  # others read no tokens
        for piece, kept in _pieces(inputs, mask, max(1, UNFOLDED // per_example)):
            rows = patches(layer, piece.to(wide_dtype(piece)))
            yield rows if kept is None else rows[:, kept.flatten()]

    def quadratic(self, terms: Sequence[Mixture], start: Tensor | None = None) -> Quadratic:
        """Return the loss of the student's layer under the terms of a feeding rule.

        A term feeds ``X = (1-b) A_T + b A_S`` and asks for ``Y = (a A_T + (1-a) A_S) W_T``. With
        ``R = X W_0 - Y`` it is ``||X (W - W_0) + R||^2``, so G = X'X, P = -X'R and c = R'R: sums of
        the three moments. Near W_T they are those of differences, so nothing cancels.

        Args:
            terms: of the rule.
            start: W_0; the form is one of the difference to it [groups, inputs, outputs], float64;
                None: 0.
        """
        theirs = matrix_of(self.layers[0]).detach().double()
        if start is None:
            start = theirs.new_zeros(len(theirs), self.own.shape[1], theirs.shape[2])
        gram, product, constant = torch.zeros_like(self.own), torch.zeros_like(start), 0.0
        for term in terms:
            fed, wrong = self._sides(term, theirs, start)
            toward = [sum(self._moment(i, j) @ wrong[j] for j in (0, 1)) for i in (0, 1)]
            for i in (each for each in (0, 1) if fed[each]):
                product -= term.weight * fed[i] * toward[i]
                for j in (each for each in (0, 1) if fed[each]):
                    gram += term.weight * fed[i] * fed[j] * self._moment(i, j)
            errors = sum(float((wrong[i] * toward[i]).sum()) for i in (0, 1))
            constant += term.weight * errors
        return Quadratic(gram, product, constant, self.rows * self.layers[0].weight.shape[0])

    def _sides(
        self, term: Mixture, theirs: Tensor, start: Tensor
    ) -> tuple[tuple[float, float], tuple[Tensor, Tensor]]:
        """Return X and R as sums of A_T and of what is kept beside it: the factors of both."""
        a, b = term.teacher, term.student
        if self.alike:
            return (1.0, b), (start - theirs, b * start - (1 - a) * theirs)
        return (0.0, 1.0), (-theirs, start)  # each is fed its own

    def _moment(self, left: int, right: int) -> Tensor:
        """Return ``A' B`` of two of: 0, A_T; 1, what is kept beside it."""
        if left == right:
            return self.own if left else self.teacher
        return self.cross if left else self.cross.transpose(1, 2)


def is_fitted(module: nn.Module | None) -> TypeGuard[Fitted]:
    """Return whether a module's answers are products of its inputs with its weight.

    Not those of a subclass with a forward of its own, such as one that standardises the weight.

    >>> is_fitted(nn.Linear(2, 2)), is_fitted(nn.ReLU())
    (True, False)
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return any(isinstance(module, k) and type(module).forward is k.forward for k in kinds)


def patches(layer: Fitted, inputs: Tensor) -> Tensor:
    """Return the rows that a layer's answers are products of [groups, rows, inputs].

    Rows come in the order of the examples and positions; the last column is 1 where the layer
    has a bias. ``patches(layer, x) @ matrix_of(layer)`` is the layer's answer.

    Args:
        layer: linear or convolution.
        inputs: what enters it [batch, ...].

    >>> patches(nn.Conv2d(2, 4, 3, bias=False), torch.zeros(1, 2, 5, 5)).shape
    torch.Size([1, 9, 18])
    """
    rows = columns(layer, inputs)
    if layer.bias is None:
        return rows
    return torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2)


def matrix_of(layer: Fitted, weight: Tensor | None = None) -> Tensor:
    """Return a layer's weight and bias as one matrix [groups, inputs, outputs].

    Args:
        layer: linear or convolution.
        weight: as the layer uses it; None: asked of the layer.

    >>> matrix_of(nn.Linear(2, 3)).shape
    torch.Size([1, 3, 3])
    """
    weight = layer.weight if weight is None else weight
    groups = groups_of(layer)
    matrix = weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)
    if layer.bias is None:
        return matrix
    return torch.cat([matrix, layer.bias.reshape(groups, 1, -1)], dim=1)


def weight_of(layer: Fitted, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the weight [its shape] and the bias [outputs] that a matrix is made of.

    >>> layer = nn.Linear(2, 3)
    >>> bool((weight_of(layer, matrix_of(layer))[0] == layer.weight).all())
    True
    """
    body = matrix if layer.bias is None else matrix[:, :-1]
    weight = body.transpose(1, 2).reshape(layer.weight.shape)
    return weight, None if layer.bias is None else matrix[:, -1].flatten()


def _inputs(layer: Fitted) -> int:
    """Return how many numbers one answer is computed from."""
    return math.prod(layer.weight.shape[1:]) + (layer.bias is not None)


def _positions(layer: Fitted, inputs: Tensor) -> Sequence[int]:
    """Return the places of one example, at most: those of the input."""
    return inputs.shape[1:-1] if isinstance(layer, nn.Linear) else inputs.shape[2:]


def _pieces(
    inputs: Tensor, mask: Tensor | None, count: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield some examples at once, with the tokens that count where they are known."""
    known = mask is not None and inputs.shape[:-1] == mask.shape
    masks = mask.split(count) if known and mask is not None else None
    for index, piece in enumerate(inputs.split(count)):
        yield piece, None if masks is None else masks[index]
