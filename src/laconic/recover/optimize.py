"""How training moves: optimisers with their learning-rate decay, and when it stops."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from laconic.step import Count, UpToOne, Value

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Constant",
    "Cosine",
    "Decay",
    "Linear",
    "Milestones",
    "Optimizer",
    "Stop",
    "curvature_of",
]

# Added to a curvature, so that a weight whose gradient was always zero counts for something.
EPSILON = 1e-8

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Decay(Value, ABC):
    """The learning rate's factor over training."""

    @abstractmethod
    def factor(self, progress: float) -> float:
        """Return what the learning rate is multiplied by at this progress, 0 to 1."""


class Constant(Decay):
    """The same learning rate throughout.

    >>> Constant().factor(0.7)
    1.0
    """

    def factor(self, progress: float) -> float:
        """Return 1."""
        return 1.0


class Cosine(Decay):
    """Half a cosine from 1 to 0, after a linear warm-up.

    Attributes:
        warmup: share of training spent warming up.

    >>> Cosine().factor(0.5)
    0.5
    """

    warmup: UpToOne = 0.0

    def factor(self, progress: float) -> float:
        """Return (1 + cos(pi t)) / 2 with t counted after the warm-up."""
        if progress < self.warmup:
            return progress / self.warmup
        t = (progress - self.warmup) / max(1.0 - self.warmup, 1e-12)
        return round((1 + math.cos(math.pi * t)) / 2, 12)


class Linear(Decay):
    """A straight line from 1 to 0, after a linear warm-up.

    Attributes:
        warmup: share of training spent warming up.

    >>> Linear().factor(0.25)
    0.75
    """

    warmup: UpToOne = 0.0

    def factor(self, progress: float) -> float:
        """Return 1 - t with t counted after the warm-up."""
        if progress < self.warmup:
            return progress / self.warmup
        return (1.0 - progress) / max(1.0 - self.warmup, 1e-12)


class Milestones(Decay):
    """A drop by a fixed factor at each milestone.

    Attributes:
        at: shares of training, ascending.
        by: factor at each.

    >>> Milestones(at=(0.5, 0.75)).factor(0.6)
    0.1
    """

    positional: ClassVar[tuple[str, ...]] = ("at",)

    at: tuple[UpToOne, ...] = (0.5, 0.75)
    by: Positive = 0.1

    def factor(self, progress: float) -> float:
        """Return by ** (milestones passed)."""
        return float(self.by ** sum(progress >= share for share in self.at))


class Optimizer(Value, ABC):
    """An optimiser as a value; ``build`` makes torch's.

    Weight decay applies to matrices and kernels, not to biases, norms and what is learned of
    representations: scales of weights, limits of activations, codebooks.

    Attributes:
        lr: learning rate at factor 1.
        weight_decay: as torch defines it for this optimiser.
        decay: the learning rate over training.
        clip: largest global norm of the gradient; None: not clipped.
        scales: learning rate of what is learned of representations; None: as of the weights.
        second_moment: whether it keeps the mean square of every gradient, as Adam.
    """

    positional: ClassVar[tuple[str, ...]] = ("lr",)
    second_moment: ClassVar[bool] = False

    lr: Positive = 1e-3
    weight_decay: NotNegative = 0.0
    decay: Decay = Cosine()
    clip: Positive | None = None
    scales: Positive | None = None

    def build(
        self,
        parameters: Iterable[nn.Parameter],
        learned: Collection[Tensor] = (),
        shifts: Collection[Tensor] = (),
    ) -> torch.optim.Optimizer:
        """Return torch's optimiser over parameters; each group keeps its ``initial_lr``.

        Args:
            parameters: all that move.
            learned: those of them that representations learn.
            shifts: biases and those of norms; all vectors count as such.
        """
        weights: list[nn.Parameter] = []
        vectors: list[nn.Parameter] = []
        scales: list[nn.Parameter] = []
        apart, shifting = set(learned), set(shifts)
        for parameter in parameters:
            vector = parameter.dim() < 2 or parameter in shifting
            plain = vectors if vector else weights
            (scales if parameter in apart else plain).append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": weights, "weight_decay": self.weight_decay, "initial_lr": self.lr},
            {"params": vectors, "weight_decay": 0.0, "initial_lr": self.lr},
            {"params": scales, "weight_decay": 0.0, "initial_lr": self.scales or self.lr},
        ]
        return self.make([group for group in groups if group["params"]])

    @abstractmethod
    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return torch's optimiser over parameter groups."""


def _in_order(groups: list[dict[str, Any]]) -> bool:
    """Return whether all numbers lie in their order, which torch's fused updates take for given."""
    return all(parameter.is_contiguous() for group in groups for parameter in group["params"])


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    One pass over the numbers for each update (torch's fused form), if they lie in their order.

    >>> AdamW(2e-5)
    AdamW(2e-05)
    """

    second_moment: ClassVar[bool] = True

    weight_decay: NotNegative = 0.01

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return torch.optim.AdamW."""
        return torch.optim.AdamW(groups, lr=self.lr, fused=_in_order(groups))


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015), weight decay added to the gradient; fused, as AdamW.

    >>> Adam(1e-3, clip=1.0).clip
    1.0
    """

    second_moment: ClassVar[bool] = True

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return torch.optim.Adam."""
        return torch.optim.Adam(groups, lr=self.lr, fused=_in_order(groups))


class SGD(Optimizer):
    """Stochastic gradient descent with momentum.

    Attributes:
        momentum: share of the last update that is kept.
        nesterov: look ahead along the momentum.

    >>> SGD(0.1).momentum
    0.9
    """

    lr: Positive = 0.01
    momentum: UpToOne = 0.9
    nesterov: bool = False

    @model_validator(mode="after")
    def _movable(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov looks ahead along the momentum; give a momentum above 0")
        return self

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return torch.optim.SGD."""
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)


def curvature_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor | None:
    """Return the loss's diagonal curvature as Adam knows it, or None where it did not move.

    ``D = sqrt(v / (1 - beta2^t)) + 1e-8`` with the second moment v after t updates (Hou and
    Kwok 2018, Loss-aware Weight Quantization of Deep Networks).

    Args:
        optimizer: torch's Adam or AdamW.
        parameter: one of those it moves [any shape].

    >>> weight = nn.Parameter(torch.zeros(2))
    >>> adam = torch.optim.Adam([weight])
    >>> (weight * torch.tensor([3.0, -4.0])).sum().backward()
    >>> adam.step()
    >>> [round(number, 4) for number in curvature_of(adam, weight).tolist()]
    [3.0, 4.0]
    """
    slots = optimizer.state.get(parameter)
    if not slots:
        return None
    ours = (g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    _, beta2 = next(ours)["betas"]
    moment: Tensor = slots["exp_avg_sq"]
    return (moment / (1 - beta2 ** float(slots["step"]))).sqrt_().add_(EPSILON)


class Stop(Value):
    """When training ends and which epoch is kept.

    The validation split decides; its score is the task's main metric, ties go to lower loss. It is
    not scored where the last epoch is kept and nothing ends early.

    Attributes:
        patience: epochs without improvement before stopping; None: never early.
        keep: "best" keeps the best epoch's weights, "last" the last one's.

    >>> Stop(patience=3).keep
    'best'
    """

    patience: Count | None = None
    keep: Literal["best", "last"] = "best"

    @property
    def decides(self) -> bool:
        """Return whether anything depends on the score of an epoch."""
        return self.keep == "best" or self.patience is not None
