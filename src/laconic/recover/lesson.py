"""Teachers, and a lesson: an objective at work with those it asks and what is learned beside."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laconic.errors import ModelError, RunError
from laconic.models.capture import Features, layer_count, observe, refuse_tokens_first
from laconic.progress import progress
from laconic.recover.descent import autocast
from laconic.recover.objectives import Objective
from laconic.recover.recall import Recall
from laconic.step import State
from laconic.tasks import Batch, Task
from laconic.tasks.task import evaluation
from laconic.weights.laid import baked, copied

__all__ = ["Lesson", "Teachers"]

logger = logging.getLogger(__name__)

ANSWERED = 64  # examples at once where teachers answer all of them


class Teachers(Sequence[nn.Module]):
    """Frozen copies of networks, each made when it is first asked for.

    Args:
        originals: left untouched; their weights may be laid.
        device: where the copies live.

    >>> any(p.requires_grad for p in Teachers((nn.Linear(2, 2),), "cpu")[0].parameters())
    False
    """

    def __init__(self, originals: tuple[nn.Module, ...], device: str) -> None:
        self.originals, self.device = originals, device
        self.copies: dict[int, nn.Module] = {}

    def __len__(self) -> int:
        return len(self.originals)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        index = range(len(self))[index]  # an IndexError ends an iteration
        if index not in self.copies:
            network = baked(self.originals[index])
            self.copies[index] = network.to(self.device).eval().requires_grad_(False)
        return self.copies[index]


class Lesson(nn.Module):
    """An objective at work: the teachers it runs, what it reads and what it learns.

    Its parameters are all that is learned beside the student: peers (teachers that learn too) and
    what the objective builds.

    Args:
        objective: what is minimised.
        state: the student, its teachers, precision and device.
        task: that of the state.
        repeated: whether examples are learned from more than once, so that recalling pays.

    Raises:
        RunError: the objective learns from a teacher that is not there.
        ModelError: a teacher's features are not finite.
        FeatureError: features do not exist, or do not fit.
    """

    def __init__(
        self, objective: Objective, state: State, task: Task, *, repeated: bool = True
    ) -> None:
        super().__init__()
        self.objective, self.state, self.task = objective, state, task
        teachers = _teachers(objective, state)
        counts = [layer_count(teachers[i]) if i in teachers else 0 for i in _indices(state)]
        # A plain dict, so that teachers are no part of what is learned.
        self.teachers = {i: teachers[i] for i in teachers if i not in objective.peers}
        self.peers = nn.ModuleDict({str(i): _peer(teachers[i]) for i in sorted(objective.peers)})
        self.wants = objective.wants(layer_count(state.model), counts)
        self.learned: nn.Module | None = None
        self.recalled: dict[int, Recall] = {}
        if teachers or self.wants.student:
            self.prepare()
        if self.teachers and state.recall and repeated:
            self.remember()

    def prepare(self) -> None:
        """Build what the objective learns; refuse features that do not fit before training."""
        batch = self.task.example_batch(2).to(self.state.device)
        taught = self.teach(batch, self.state.seed)
        with torch.no_grad(), evaluation(self.state.model), evaluation(self.peers):
            student = self.features(batch, taught)
            for name, feature in student.items():
                refuse_tokens_first(name, feature, student.get("mask"))
            for index in self.objective.teachers:
                _check_finite(index, taught[index])
            learned = self.objective.build(student, taught, self.state.generator("learned"))
            if learned is not None:
                self.learned = learned.to(self.state.device)
            self.objective(student, taught, batch, task=self.task, learned=self.learned)

    def remember(self) -> None:
        """Let the teachers answer every training example, if all answers can be kept."""
        train = self.task.train
        if next(train.batches(1, seed=self.state.seed)).index is None:
            logger.info("train: nothing is recalled; examples are augmented, or a loader's own")
            return
        share = self.state.recall // len(self.teachers)
        recalled = {index: Recall(share) for index in self.teachers}
        batches = train.any_order(ANSWERED, device=self.state.device)
        for batch in progress(batches, "train: teachers answer", train.batch_count(ANSWERED)):
            taught = self.teach(batch, self.state.seed)
            for index, recall in recalled.items():
                recall.note(batch, taught[index])
            if any(recall.full for recall in recalled.values()):
                logger.warning(
                    "train: what teachers answer is more than %d bytes, so nothing is recalled",
                    self.state.recall,
                )
                return
        self.recalled = recalled

    def teach(self, batch: Batch, seed: int) -> list[Features]:
        """Return the features of every teacher; empty for peers and for one that is not asked."""
        taught = [Features() for _ in _indices(self.state)]
        for index, teacher in self.teachers.items():
            if index in self.recalled:
                taught[index] = self.recalled[index].features(batch)
                continue
            torch.manual_seed(seed)
            wanted = sorted(self.wants.teachers.get(index, ()))
            # Outside the cache of the student's forward: without gradients, it would poison it.
            with evaluation(teacher), autocast(self.state):
                taught[index] = observe(self.task, teacher, batch, wanted)
        return taught

    def features(self, batch: Batch, taught: list[Features]) -> Features:
        """Return the features of the student, and fill in those of its peers."""
        with autocast(self.state):
            student = observe(self.task, self.state.model, batch, sorted(self.wants.student))
            for name, peer in self.peers.items():
                wanted = sorted(self.wants.teachers.get(int(name), ()))
                taught[int(name)] = observe(self.task, peer, batch, wanted)
        return student

    def loss(self, batch: Batch, taught: Sequence[Features], done: float) -> Tensor:
        """Return the objective of a batch, in float32."""
        features = list(taught)
        student = self.features(batch, features)
        return self.objective(
            student, features, batch, task=self.task, learned=self.learned, progress=done
        )

    def projections(self) -> list[nn.Parameter]:
        """Return the parameters of what the objective built."""
        return [] if self.learned is None else [*self.learned.parameters()]


def _indices(state: State) -> range:
    return range(len(state.teacher))


def _teachers(objective: Objective, state: State) -> dict[int, nn.Module]:
    """Return the teachers that an objective asks, by index."""
    missing = [index for index in objective.teachers if index >= len(state.teacher)]
    if missing:
        raise RunError(
            f"train: the objective learns from teacher {missing[0]}, and there are "
            f"{len(state.teacher)}, counted from 0; give several: teacher=(first, second)"
        )
    return {i: state.teacher[i].to(state.device) for i in sorted(objective.teachers)}


def _peer(teacher: nn.Module) -> nn.Module:
    """Return a copy of a teacher that learns."""
    peer = copied(teacher).train()
    for parameter in peer.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return peer


def _check_finite(index: int, features: Features) -> None:
    for name, tensor in features.items():
        if not bool(tensor.isfinite().all()):
            raise ModelError(
                f"train: '{name}' of teacher {index} holds NaN or infinity on examples of the "
                "training split; nothing can be learned from it, give another teacher"
            )
