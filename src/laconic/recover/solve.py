"""Inner problems of reconstruct: how the numbers of one part are found."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from laconic.progress import progress
from laconic.recover.optimize import Adam, Optimizer
from laconic.recover.penalties import Proximal, ProximalChannels
from laconic.recover.quadratic import Quadratic
from laconic.step import Count, Share, Value

if TYPE_CHECKING:
    from laconic.recover.layers import LayerPart

__all__ = [
    "Gradient",
    "Greedy",
    "Lasso",
    "LeastSquares",
    "Pointwise",
    "Solve",
    "closest",
    "contributions",
    "greedy_channels",
    "lasso_channels",
]


# Directions in which inputs vary less than this, of the most they vary in any, do not determine
# weights: moments are sums of float32 products.
UNDETERMINED = 1e-6


class Solve(Value, ABC):
    """How the numbers of a part are found so that it answers as the teacher's."""

    @property
    def selects(self) -> bool:
        """Return whether it chooses which input channels of a layer are left."""
        return False

    @abstractmethod
    def fit(self, part: LayerPart) -> None:
        """Find the numbers of one layer."""


class Gradient(Solve):
    """Descend on the part's loss, straight through masks and representations.

    Attributes:
        updates: of every part.
        batch: examples of each; a layer's loss is always that of all examples.
        optimizer: how the parameters move. At a constant rate what is rounded ends above losses
            that it had before. Where channels go, cross distillation's reference code divides
            the rate by 10 once they are chosen.
        penalty: removes weights or input channels of a layer on the way.

    >>> Gradient(250).updates
    250
    """

    positional: ClassVar[tuple[str, ...]] = ("updates",)

    updates: Count = 1000
    batch: Count = 32
    optimizer: Optimizer = Adam(lr=5e-4)
    penalty: Proximal | None = None

    @property
    def selects(self) -> bool:
        """Return whether the penalty is on input channels."""
        return isinstance(self.penalty, ProximalChannels)

    def fit(self, part: LayerPart) -> None:
        """Descend on the quadratic form; remove what the penalty no longer lets in.

        Without a penalty a layer that would end no nearer than it was stays as it was.
        """
        # First: a mask that is laid on a weight makes another parameter of it.
        removal = None if self.penalty is None else _Removal(self.penalty, part, self.updates)
        descent = part.descent(self.optimizer)
        start = part.matrix().to(part.precision)
        form, before, began = part.around(start, 0.0), part.numbers(), part.loss_now()
        for step in progress(range(self.updates), part.label):
            done = step / self.updates
            if step and (step - 1) / self.updates < part.feed.settled:
                form = part.around(start, done)
            where = f"in layer '{part.path}', update {step + 1}"
            part.note(descent.update(functools.partial(part.loss, form, start), done, where))
            if removal is not None:
                removal.step(step)
        descent.finish()
        if removal is None and began < part.loss_now():
            part.put_back(before)
        part.note_loss()


class _Removal:
    """A proximal penalty at work on one layer."""

    def __init__(self, penalty: Proximal, part: LayerPart, updates: int) -> None:
        self.penalty, self.part, self.updates = penalty, part, updates
        self.last_step = max(1, math.ceil(penalty.end * updates)) - 1
        part.narrow(torch.ones_like(part.weight(), dtype=torch.bool))
        sizes = penalty.sizes(part.weight())
        self.total = self.left = len(sizes)
        self.goal = penalty.goal(self.total)
        self.threshold, self.largest = 0.0, self.largest_to_go(sizes)

    def step(self, step: int) -> None:
        """Take the proximal step after a gradient step, counted from 0."""
        if self.left <= self.goal:
            return
        if self.penalty.mode == "soft":
            self.shrink(1 + self.last_step - step)
        if step == self.last_step:
            self.keep(self.goal)
        elif self.penalty.mode == "topk":
            self.keep(self.penalty.due(self.total, step, self.updates))

    def shrink(self, rest: int) -> None:
        """Raise the threshold, and shrink all elements by it.

        It grows along a straight line that is planned anew every time: in the steps that are left
        it adds up to the largest element to go and to all that gradients will give back to that
        one, if each gives as much as the last did. So it meets the goal, in the last step at most.

        Args:
            rest: how many steps are left, this one among them.
        """
        weight = self.part.weight()
        largest = self.largest_to_go(self.penalty.sizes(weight))
        given = max(0.0, largest - self.largest)
        lacking = largest + (rest - 1) * given - rest * self.threshold
        self.threshold += max(0.0, 2 * lacking / (rest * (rest + 1)))
        shrunk = self.penalty.shrunk(weight, min(self.threshold, largest))
        self.part.write_weight(shrunk)
        sizes = self.penalty.sizes(shrunk)
        self.largest = self.largest_to_go(sizes)
        left = sizes > 0
        if self.goal <= int(left.sum()) < self.left:
            self.remove(left)

    def largest_to_go(self, sizes: Tensor) -> float:
        """Return the largest of the sizes below that of the last element that is to stay."""
        last = sizes.kthvalue(self.total - self.goal + 1).values
        below = sizes[sizes < last]
        return float(below.max()) if below.numel() else 0.0

    def keep(self, count: int) -> None:
        """Keep the largest elements; of equal ones the first."""
        if count < self.left:
            sizes = self.penalty.sizes(self.part.weight())
            order = sizes.sort(descending=True, stable=True).indices
            left = torch.zeros_like(sizes, dtype=torch.bool)
            left[order[:count]] = True
            self.remove(left)

    def remove(self, left: Tensor) -> None:
        """Mask all other elements for good."""
        self.left = int(left.sum())
        self.part.narrow(self.penalty.spread(left, self.part.weight()))


class LeastSquares(Solve):
    """Solve a layer exactly.

    Of all minima of its loss, the one that is closest to its weights as they are. Masked weights
    stay masked. What the examples do not determine stays as it is.

    >>> LeastSquares()
    LeastSquares()
    """

    def fit(self, part: LayerPart) -> None:
        """Solve the normal equations of every answer over the weights that are left."""
        part.note_loss()
        part.write(closest(part.quadratic(1.0), part.matrix(), part.left()))
        part.note_loss()


class Pointwise(Solve):
    """Solve a 1x1 convolution behind a layer, and absorb it (Li et al. 2020, FSKD).

    ``min_Q ||X W Q - Y||^2`` and ``W <- W Q``: as few numbers as answers squared, so that few
    examples suffice. Of all minima, by least squares, the one closest to the identity.

    >>> Pointwise()
    Pointwise()
    """

    def fit(self, part: LayerPart) -> None:
        """Solve for Q and multiply the layer with it."""
        part.note_loss()
        part.refuse_scattered()
        form, fixed = part.quadratic(1.0), part.fixed()
        matrix = part.matrix() - fixed
        answers = matrix.transpose(1, 2) @ form.gram @ matrix
        wanted = matrix.transpose(1, 2) @ (form.product - form.gram @ fixed)
        start = torch.eye(answers.shape[1], dtype=answers.dtype, device=answers.device)
        inner = Quadratic(answers, wanted, form.constant, form.count)
        part.write(matrix @ closest(inner, start.expand_as(answers)) + fixed)
        part.note_loss()


class Greedy(Solve):
    """Remove input channels one by one, the least missed (Luo et al. 2017, ThiNet).

    Of all channels, the next is the one with which the sum of all removed contributions to the
    layer's answers stays smallest. Then a factor for every channel left is solved by least
    squares. The paper samples answers; here all answers of all examples count.

    Attributes:
        keep: fraction of the channels left, (0, 1].

    >>> Greedy(0.5).selects
    True
    """

    positional: ClassVar[tuple[str, ...]] = ("keep",)

    keep: Share

    @property
    def selects(self) -> bool:
        """Return True."""
        return True

    def fit(self, part: LayerPart) -> None:
        """Choose channels, then rescale them."""
        part.note_loss()
        inner, answers = part.contributions()
        kept = greedy_channels(inner, part.goal(self.keep))
        part.select(kept)
        within = inner[kept][:, kept]
        factors = torch.zeros_like(answers)
        factors[kept] = 1 + _solved(within, answers[kept] - within.sum(dim=1))
        part.scale(factors)
        part.note_loss()


class Lasso(Solve):
    """Choose input channels by LASSO, then solve the layer (He et al. 2017, CP).

    ``min_b 1/(2N) ||Y - sum_i b_i X_i W_i||^2 + l sum |b_i|`` with every W_i scaled to norm 1; l
    falls from where all channels are out until as many as wanted are in.

    Attributes:
        keep: fraction of the channels left, (0, 1].

    >>> Lasso(0.5).selects
    True
    """

    positional: ClassVar[tuple[str, ...]] = ("keep",)

    keep: Share

    @property
    def selects(self) -> bool:
        """Return True."""
        return True

    def fit(self, part: LayerPart) -> None:
        """Choose channels, then solve the weights that are left."""
        part.note_loss()
        inner, answers = part.contributions()
        norms = part.norms().clamp(min=torch.finfo(torch.float32).tiny)
        scaled = inner / norms[:, None] / norms
        part.select(lasso_channels(scaled, answers / norms, part.goal(self.keep)))
        part.write(closest(part.quadratic(1.0), part.matrix(), part.left()))
        part.note_loss()


def contributions(form: Quadratic, matrix: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the inner products of what the channels contribute to the answers of a layer.

    Element (i, j) is ``<X_i W_i, X_j W_j>`` and element i of the second
    ``<X_i W_i, Y - b>``, summed over all examples; b is the bias, which no channel contributes.
    Channel i of a layer in groups is the i-th of every group.

    Args:
        form: of the layer.
        matrix: W [groups, inputs, outputs], inputs in the order of channels, the bias last.
        shape: how many channels there are in a group, and the inputs of each.

    >>> form = Quadratic(torch.eye(4)[None], torch.ones(1, 4, 1), 1.0, 1)
    >>> contributions(form, torch.ones(1, 4, 1), (2, 2))[0].tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """
    products = (form.gram * (matrix @ matrix.transpose(1, 2))).sum(dim=0)
    toward = (form.product * matrix).sum(dim=(0, 2))
    end = shape[0] * shape[1]
    toward = toward - products[:, end:].sum(dim=1)
    split = products[:end, :end].reshape(*shape, *shape)
    return split.sum(dim=(1, 3)), toward[:end].reshape(shape).sum(dim=1)


def greedy_channels(inner: Tensor, keep: int) -> Tensor:
    """Return which channels stay when the least missed is removed again and again, bool [channels].

    Args:
        inner: products of the channels' contributions [channels, channels].
        keep: how many stay.

    >>> greedy_channels(torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.5]]), 1)
    tensor([False,  True, False])
    """
    kept = torch.ones(len(inner), dtype=torch.bool, device=inner.device)
    # What the sum over the removed grows by with each channel: Q_cc + 2 sum_r Q_cr.
    growth = inner.diagonal().clone()
    for _ in range(len(inner) - keep):
        least = int(torch.where(kept, growth, torch.inf).argmin())
        kept[least] = False
        growth += 2 * inner[least]
    return kept


def lasso_channels(inner: Tensor, toward: Tensor, keep: int) -> Tensor:
    """Return which channels LASSO lets in first, bool [channels].

    Args:
        inner: products of the channels' contributions [channels, channels].
        toward: products of these with the answers to learn [channels].
        keep: how many may be in.

    >>> lasso_channels(torch.eye(3), torch.tensor([1.0, -3.0, 2.0]), 2)
    tensor([False,  True,  True])
    >>> lasso_channels(torch.diag(torch.tensor([0.0, 1.0, 1.0])), torch.tensor([0.0, 1.0, 0.0]), 2)
    tensor([False,  True,  True])
    """
    from sklearn.linear_model import lars_path_gram

    products, answers = inner.cpu().numpy(), toward.cpu().numpy()
    # How many answers there are scales l alone. Channels leave on the way, too, so the path has
    # more turns than channels.
    turns = 8 * len(answers)
    _, _, path = lars_path_gram(
        Xy=answers, Gram=products, n_samples=1, max_iter=turns, method="lasso"
    )
    sizes = torch.from_numpy(path).abs()
    fitting = [index for index in range(sizes.shape[1]) if int((sizes[:, index] > 0).sum()) <= keep]
    chosen = sizes[:, fitting[-1]]
    # Where channels come or go together, those in longest are taken first.
    stays = (chosen > 0) * sizes.shape[1] + (sizes > 0).sum(dim=1)
    # Where none are left that help, those that contribute most.
    largest = inner.diagonal().cpu().argsort(descending=True, stable=True)
    order = largest[torch.argsort(stays[largest], descending=True, stable=True)]
    kept = torch.zeros(len(toward), dtype=torch.bool, device=toward.device)
    kept[order[:keep].to(kept.device)] = True
    return kept


def closest(form: Quadratic, matrix: Tensor, left: Tensor | None = None) -> Tensor:
    """Return the minimum of a quadratic form that is closest to a matrix.

    ``W + G^+ (P - G W)`` for every column, over the rows that may move.

    Args:
        form: in float64.
        matrix: W [groups, inputs, outputs].
        left: bool [groups, inputs, outputs], what may move; None: all of it.

    >>> form = Quadratic(2 * torch.eye(2)[None], torch.ones(1, 2, 1), 0.0, 1)
    >>> closest(form, torch.zeros(1, 2, 1)).flatten().tolist()
    [0.5, 0.5]
    """
    rest = form.product - form.gram @ matrix
    if left is None or bool(left.all()):
        return matrix + _solved(form.gram, rest)
    found = matrix.clone()
    for group in range(len(matrix)):
        patterns, which = left[group].T.unique(dim=0, return_inverse=True)
        for index, rows in enumerate(patterns):
            columns = (which == index).nonzero()[:, 0]
            place = (group, rows.nonzero(), columns)
            found[place] += _solved(form.gram[group][rows][:, rows], rest[place])
    return found


def _solved(gram: Tensor, product: Tensor) -> Tensor:
    """Return ``G^+ P``: the smallest solution of the normal equations."""
    return torch.linalg.pinv(gram, rtol=UNDETERMINED, hermitian=True) @ product
