"""The train step: the one training loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from laconic.errors import RunError, ScopeError, TaskError
from laconic.models.capture import Features
from laconic.names import below
from laconic.progress import progress
from laconic.recover.descent import Descent, check_curvature, check_numbers, parameters_of
from laconic.recover.lesson import Lesson
from laconic.recover.objectives import Label, Objective
from laconic.recover.optimize import AdamW, Optimizer, Stop
from laconic.recover.penalties import Penalty
from laconic.recover.recalibrate import TOO_FEW, normalised
from laconic.step import Count, During, State, Step, derive, inside
from laconic.tasks.loader import Loader
from laconic.tasks.task import labelled, needed
from laconic.weights.quantizer import Quantizer

if TYPE_CHECKING:
    from laconic.tasks import Batch, Task

__all__ = ["Train"]

logger = logging.getLogger(__name__)

WITHOUT = "an objective that learns from the teacher alone, such as logits"


class Train(Step):
    """Train the network through its masks and representations.

    What is outside the scope stays as it is: a BatchNorm there normalises with the statistics
    it has, and a range of activations follows nothing. Teachers answer in evaluation mode, in
    the precision of the training; they never change. What an objective learns beside the network
    (projections, peers) moves with it and is not kept. A last batch of one example that BatchNorm
    cannot normalise is passed over. What a representation needs of the loss's curvature is Adam's
    second moment, after every update. The loss of every update, penalty included, is noted under
    the name of the objective; trainings within one step go on with the curve.

    Attributes:
        scope: modules whose parameters move.
        objective: what is minimised.
        epochs: passes over the training split.
        batch: examples per update.
        optimizer: how parameters move.
        penalty: added to the objective, over the matrices and kernels of the scope.
        stop: early stop, and which epoch is kept.
        during: steps that change the network while it trains (gradual pruning, ...).

    >>> Train(epochs=2, optimizer=AdamW(1e-4))
    Train(epochs=2, optimizer=AdamW(0.0001))
    """

    positional: ClassVar[tuple[str, ...]] = ("objective",)

    objective: Objective = Label()
    epochs: Count = 1
    batch: Count = 128
    optimizer: Optimizer = AdamW()
    penalty: Penalty | None = None
    stop: Stop = Stop()
    during: tuple[During, ...] = ()

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse to train without a task or its targets, nothing, or with the wrong optimiser."""
        super().check(model, task, earlier)
        needed(task, "train needs data")
        for each in inside(self.objective, Objective):
            if each.needs_targets:
                labelled(task, f"train: {each.name} reads targets", WITHOUT)
        moving = parameters_of(model, self.scope.select(model))
        if not moving:
            raise ScopeError(f"'{self.scope}' selects no module with parameters to train")
        check_numbers("train", moving)
        if not earlier:
            _trained(self, model)  # refuses a scope where all is frozen
        if self.penalty is not None:
            self.penalty.tensors(model, self.scope)  # refuses a scope without what it is of
        check_curvature(self, self.optimizer, model, earlier)
        for index, step in enumerate(self.during):
            step.check(model, task, (*earlier, *self.during[:index]))

    def abridged(self, repeats: int = 1) -> tuple[Step, ...]:
        """Return what changes the network while it trains, each on its own."""
        return tuple(part for each in self.during for part in each.abridged())

    def apply(self, state: State) -> None:
        """Run the loop, from where a resumed run stopped."""
        _Loop(self, state).run()


class _Loop:
    """One run of a Train: the optimiser, the clock and the best epoch so far."""

    def __init__(self, train: Train, state: State) -> None:
        self.train, self.state, self.task = train, state, needed(state.task, "train needs data")
        self.model = state.model.to(state.device)
        self.scope = train.scope.select(self.model)
        self.lesson = Lesson(train.objective, state, self.task, repeated=train.epochs > 1)
        # One gradient norm each, so that a peer's does not shrink the student's step.
        networks = [[*_trained(train, self.model), *self.lesson.projections()]]
        networks += [_learning(peer) for peer in self.lesson.peers.values()]
        self.descent = Descent(
            train.optimizer, self.model, self.scope, networks=networks, name=train.name
        )
        check_curvature(train, train.optimizer, self.model)
        self.per_epoch = self.task.train.batch_count(train.batch)
        self.updates = train.epochs * self.per_epoch
        self.epoch = self.batch = self.stale = 0
        self.best_score: tuple[float, float] | None = None
        self.best: dict[str, Tensor] = {}
        if state.training:
            self.restore(state.training)
            state.training = {}

    def run(self) -> None:
        """Train to the last epoch or the early stop, and leave the kept epoch's weights."""
        label = f"{self.train.name} {self.train.epochs} epochs"
        for batch in progress(self.batches(), label, self.updates - self.finished):
            self.update(batch)
        self.descent.finish()
        if self.best:
            self.model.load_state_dict(self.best)
        self.model.eval()

    @property
    def finished(self) -> int:
        """Return how many updates have been taken."""
        return self.epoch * self.per_epoch + self.batch

    def batches(self) -> Iterator[Batch]:
        """Yield every batch left; judge each epoch when its last batch is done."""
        for epoch in range(self.epoch, self.train.epochs):
            self.enter_training()
            for batch in self.task.train.batches(
                self.train.batch,
                seed=self.state.seed,
                epoch=epoch,
                start=self.batch,
                device=self.state.device,
            ):
                yield batch
                self.batch += 1
                self.state.checkpoint(self.payload)
            self.epoch, self.batch = epoch + 1, 0
            if self.judge():
                return
            self.state.checkpoint(self.payload)

    def enter_training(self) -> None:
        """Switch to training mode, but for what learns statistics outside the scope."""
        self.model.train()
        for name, module in self.model.named_modules():
            if isinstance(module, _NormBase | Quantizer) and name not in self.scope:
                module.eval()

    def update(self, batch: Batch) -> None:
        """Take one optimiser step; its draws depend on (seed, epoch, batch) alone."""
        learnable = self.learnable(batch)
        taught = self.lesson.teach(batch, derive(self.state.seed, "teach", self.epoch, self.batch))
        torch.manual_seed(derive(self.state.seed, "update", self.epoch, self.batch))
        if learnable:
            self.learn(batch, taught)
        for step in self.train.during:
            done = self.finished / self.updates
            step.update(self.state, (self.finished + 1) / self.updates, since=done)

    def learn(self, batch: Batch, taught: Sequence[Features]) -> None:
        """Move the parameters by one batch."""
        done = self.finished / self.updates
        where = f"at epoch {self.epoch + 1}, batch {self.batch + 1}"
        found = self.descent.update(lambda: self.loss(batch, taught, done), done, where)
        self.state.note(f"{self.train.name}: {self.train.objective.words}", found)

    def learnable(self, batch: Batch) -> bool:
        """Return whether BatchNorm can normalise a batch; one of one example is passed over.

        Raises:
            TaskError: it cannot even at the start of an epoch, so nothing may be learned.
        """
        if batch.size > 1:
            return True
        networks = (self.model, *self.lesson.peers.values())
        if all(normalised(self.task, each, batch) for each in networks):
            return True
        if self.batch == 0:
            own = isinstance(self.task.train, Loader)
            what = "let the DataLoader begin with more" if own else "choose a batch of at least 2"
            raise TaskError(f"train: a batch has one example, {TOO_FEW}; {what}")
        return False

    def loss(self, batch: Batch, taught: Sequence[Features], done: float) -> Tensor:
        """Return objective plus penalty, in float32."""
        loss = self.lesson.loss(batch, taught, done)
        penalty = self.train.penalty
        if penalty is not None:
            loss = loss + penalty(penalty.tensors(self.model, self.train.scope))
        return loss

    def judge(self) -> bool:
        """Score the validation split, keep the best epoch, return whether to stop."""
        if not self.train.stop.decides:
            return False
        scores = self.task.score(self.model, split="validate", device=self.state.device)
        score = (scores[self.task.main_metric], -scores["loss"])
        logger.debug(
            "train: epoch %d of %d, validation %s %.4f, loss %.4f",
            self.epoch,
            self.train.epochs,
            self.task.main_metric,
            score[0],
            scores["loss"],
        )
        self.descent.refuse(scores["loss"], f"on the validation split after epoch {self.epoch}")
        # What still changes the network would be undone by going back to an earlier epoch.
        settled = max((step.settled for step in self.train.during), default=0.0)
        if self.epoch / self.train.epochs < settled:
            return False
        if not math.isfinite(score[0]):
            metric = self.task.main_metric
            logger.warning("train: %s is %s, so this epoch is not the best", metric, score[0])
        if math.isfinite(score[0]) and (self.best_score is None or score > self.best_score):
            self.best_score, self.stale = score, 0
            if self.train.stop.keep == "best":
                self.best = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        else:
            self.stale += 1
        return self.train.stop.patience is not None and self.stale >= self.train.stop.patience

    def payload(self) -> dict[str, Any]:
        """Return all that a resumed loop needs: counters and named tensors."""
        tensors = {f"best/{name}": tensor for name, tensor in self.best.items()}
        tensors |= {f"lesson/{name}": tensor for name, tensor in self.lesson.state_dict().items()}
        tensors |= {f"optimizer/{name}": t for name, t in self.descent.tensors().items()}
        counters = {
            "epoch": self.epoch,
            "batch": self.batch,
            "stale": self.stale,
            "best_score": self.best_score,
        }
        return {"counters": counters, "tensors": tensors}

    def restore(self, payload: Mapping[str, Any]) -> None:
        """Continue from what ``payload`` returned."""
        counters, tensors = payload["counters"], payload["tensors"]
        self.epoch, self.batch, self.stale = (counters[k] for k in ("epoch", "batch", "stale"))
        if counters["best_score"] is not None:
            self.best_score = tuple(counters["best_score"])
        self.best = below("best/", tensors)
        self.lesson.load_state_dict(below("lesson/", tensors))
        self.descent.restore(below("optimizer/", tensors))


def _learning(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _trained(train: Train, model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that move, in an order that laying a weight does not change."""
    selected = train.scope.select(model)
    chosen = [p for p in parameters_of(model, selected) if p.requires_grad]
    if not chosen:
        raise RunError(
            f"train: every parameter in scope '{train.scope}' is frozen; set requires_grad, or "
            "widen the scope"
        )
    return chosen
