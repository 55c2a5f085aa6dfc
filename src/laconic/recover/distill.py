"""Objectives on outputs: divergences and distances between logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from laconic.errors import FeatureError
from laconic.recover.objectives import Taught
from laconic.recover.pairing import token_mean
from laconic.step import Count

if TYPE_CHECKING:
    from laconic.models.capture import Features
    from laconic.tasks import Batch, Task

__all__ = [
    "Annealing",
    "Logits",
    "Mutual",
    "annealing",
    "divergence",
    "reduced",
    "soft_cross_entropy",
]

Reduction = Literal["batch", "elements"]


def divergence(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return T^2 KL(softmax(z_T / T) || softmax(z_S / T)), one summand per class.

    T^2 keeps the gradient's scale as the temperature grows (Hinton et al. 2015, section 2.1).

    Args:
        student: logits z_S [..., classes].
        teacher: logits z_T [..., classes].
        temperature: T.

    >>> divergence(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 4.0])).sum()
    tensor(0.2437)
    """
    own = torch.log_softmax(student / temperature, dim=-1)
    target = torch.log_softmax(teacher / temperature, dim=-1)
    return temperature**2 * target.exp() * (target - own)


def soft_cross_entropy(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return -softmax(z_T / T) log softmax(z_S / T), one summand per class.

    Not multiplied by T^2, as in TinyBERT (Jiao et al. 2020, equation 10).

    Args:
        student: logits z_S [..., classes].
        teacher: logits z_T [..., classes].
        temperature: T.

    >>> soft_cross_entropy(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 4.0])).sum()
    tensor(0.5180)
    """
    own = torch.log_softmax(student / temperature, dim=-1)
    return -torch.softmax(teacher / temperature, dim=-1) * own


def _absolute(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    return ((student - teacher) / temperature).abs()


def _square(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    return ((student - teacher) / temperature).square()


def reduced(values: Tensor, reduction: Reduction, mask: Tensor | None = None) -> Tensor:
    """Return a mean over everything but the last dimension, which is summed or averaged.

    Args:
        values: [..., classes].
        reduction: "batch" sums over the classes, "elements" averages over them too.
        mask: bool [batch, tokens] of values [batch, tokens, classes]; see token_mean.

    >>> reduced(torch.ones(4, 10), "batch"), reduced(torch.ones(4, 10), "elements")
    (tensor(10.), tensor(1.))
    """
    each = values.sum(dim=-1) if reduction == "batch" else values.mean(dim=-1)
    return token_mean(each, mask)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "kl": divergence,
    "cross_entropy": soft_cross_entropy,
    "l1": _absolute,
    "l2": _square,
}


class Logits(Taught):
    """Agree with the teacher's logits (Hinton et al. 2015; Ba and Caruana 2014).

    With z the logits divided by the temperature T, the loss is one of ``kl``: T^2 KL(softmax
    z_T || softmax z_S); ``cross_entropy``: -sum softmax(z_T) log softmax(z_S), without T^2;
    ``l2``: ||z_T - z_S||_2^2; ``l1``: ||z_T - z_S||_1. The gradients of the first two differ by
    T^2. The l2 loss averaged over elements is the logit regression of Ba and Caruana.

    Logits are [batch, classes], [batch, tokens, classes] or maps [batch, classes, height, width];
    those of padding do not count. Values [batch] and [batch, 1] have no distribution and take
    ``l2`` or ``l1``.

    Reductions of the papers' code: DynaBERT and MATE-KD "batch"; TinyBERT, TernaryBERT, BinaryBERT
    and DAP-BERT (cross entropy), PKD and TAKD (KL) "elements", which is smaller by the number of
    classes.

    Attributes:
        temperature: divides all logits.
        loss: how they are compared.
        reduction: "batch" sums over classes and averages over examples and what is no padding of
            them; "elements" averages over classes too.

    >>> Logits(4.0)
    Logits(4.0)
    """

    positional: ClassVar[tuple[str, ...]] = ("temperature",)

    temperature: Annotated[float, Field(gt=0)] = 1.0
    loss: Literal["kl", "cross_entropy", "l1", "l2"] = "kl"
    reduction: Reduction = "batch"

    def pairs(self, student: int, teacher: int) -> tuple[tuple[str, str], ...]:
        """Return the logits of both."""
        return (("logits", "logits"),)

    def compare(
        self,
        student: Features,
        teacher: Features,
        *,
        learned: nn.Module | None = None,
        progress: float = 0.0,
    ) -> Tensor:
        """Return the reduced loss.

        Raises:
            FeatureError: the shapes differ, or a single logit would be normalised.
        """
        own, target, mask = _logits(student, teacher)
        if self.loss in ("kl", "cross_entropy"):
            _refuse_single(own, f"logits with {self.loss}")
        values = LOSSES[self.loss](own, target, temperature=self.temperature)
        return reduced(values, self.reduction, mask)


class Annealing(Taught):
    """Regress the teacher's logits as they grow to full (Jafari et al. 2021).

    ||z_S - z_T Phi(T)||^2, summed over classes and averaged over examples, where Phi(T) =
    1 - (T - 1) / T_max and T falls from T_max to 1 in equal parts of the training. Train it
    first, and on the labels alone afterwards.

    Attributes:
        highest: T_max, how many temperatures there are.

    >>> Annealing(10)
    Annealing(10)
    """

    positional: ClassVar[tuple[str, ...]] = ("highest",)

    highest: Count = 7

    def pairs(self, student: int, teacher: int) -> tuple[tuple[str, str], ...]:
        """Return the logits of both."""
        return (("logits", "logits"),)

    def compare(
        self,
        student: Features,
        teacher: Features,
        *,
        learned: nn.Module | None = None,
        progress: float = 0.0,
    ) -> Tensor:
        """Return the mean over examples of the squared distance.

        Raises:
            FeatureError: the shapes differ.
        """
        own, target, mask = _logits(student, teacher)
        temperature = max(1, self.highest - int(progress * self.highest))
        distance = own - target * annealing(temperature, self.highest)
        return reduced(distance.square(), "batch", mask)


def annealing(temperature: int, highest: int) -> float:
    """Return Phi(T) = 1 - (T - 1) / T_max, the share of the teacher's logits.

    >>> [round(annealing(t, 5), 1) for t in (5, 4, 3, 2, 1)]
    [0.2, 0.4, 0.6, 0.8, 1.0]
    """
    return 1 - (temperature - 1) / highest


class Mutual(Taught):
    """Learn with a teacher that learns too (Zhang et al. 2018, deep mutual learning).

    KL(p_T || p_S) for the student, and the task's loss plus KL(p_S || p_T) for the teacher, with
    p the softmax of logits divided by T, and T^2 as in Logits. Neither gradient flows into the
    other network. A trained copy of the teacher, its peer, begins as the teacher is and is given
    up in the end; both take their step at once, where the paper's take turns. The student's own
    labels are another term: ``Label() + Mutual()``. What other terms ask of this teacher, the
    peer answers, and learns nothing from them.

    Attributes:
        temperature: T; the paper has 1.

    >>> Mutual(teacher=1)
    Mutual(teacher=1)
    """

    positional: ClassVar[tuple[str, ...]] = ("temperature",)
    needs_targets: ClassVar[bool] = True

    temperature: Annotated[float, Field(gt=0)] = 1.0

    @property
    def peers(self) -> frozenset[int]:
        """Return the index of its teacher."""
        return self.teachers

    def pairs(self, student: int, teacher: int) -> tuple[tuple[str, str], ...]:
        """Return the logits of both."""
        return (("logits", "logits"),)

    def compare(
        self,
        student: Features,
        teacher: Features,
        *,
        learned: nn.Module | None = None,
        progress: float = 0.0,
    ) -> Tensor:
        """Return the mean over examples of both divergences.

        Raises:
            FeatureError: the shapes differ, or a single logit would be normalised.
        """
        own, peer, mask = _logits(student, teacher)
        _refuse_single(own, self.name)
        to_student = divergence(own, peer.detach(), temperature=self.temperature)
        to_peer = divergence(peer, own.detach(), temperature=self.temperature)
        return reduced(to_student + to_peer, "batch", mask)

    def __call__(
        self,
        student: Features,
        teachers: Sequence[Features],
        batch: Batch,
        *,
        task: Task,
        learned: nn.Module | None = None,
        progress: float = 0.0,
    ) -> Tensor:
        """Return ``weight`` times the divergences and the peer's own loss."""
        peer = teachers[self.teacher]
        mutual = self.compare(student, peer, learned=learned, progress=progress)
        return self.weight * (mutual + task.loss(peer["logits"], batch))


def _refuse_single(logits: Tensor, name: str) -> None:
    if logits.shape[-1] == 1:
        raise FeatureError(
            f"{name}: a single output of shape {list(logits.shape)} has no distribution, so "
            "it would teach nothing; use logits with loss: l2"
        )


def _logits(student: Features, teacher: Features) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the logits of both, the classes last, and the mask of their tokens."""
    own, target = student["logits"], teacher["logits"]
    if own.shape != target.shape:
        raise FeatureError(
            f"logits: the student's are {list(own.shape)} and the teacher's {list(target.shape)}; "
            "give a teacher of the same classes"
        )
    return _classes_last(own), _classes_last(target), student.get("mask")


def _classes_last(logits: Tensor) -> Tensor:
    if logits.dim() == 1:  # one value for each example
        return logits[:, None]
    return logits.movedim(1, -1) if logits.dim() >= 4 else logits  # of maps
