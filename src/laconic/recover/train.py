"""The train step: the one training loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from laconic.errors import RunError, TaskError
from laconic.progress import progress
from laconic.recover.objectives import Label, Objective
from laconic.recover.optimize import AdamW, Optimizer, Stop
from laconic.recover.penalties import Penalty
from laconic.step import During, State, Step, derive
from laconic.weights.laid import laid_tensors, weights_of

if TYPE_CHECKING:
    from laconic.tasks import Batch, Task

__all__ = ["Train"]

logger = logging.getLogger(__name__)


class Train(Step):
    """Train the network through its masks and representations.

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
    epochs: Annotated[int, Field(ge=1)] = 1
    batch: Annotated[int, Field(ge=1)] = 128
    optimizer: Optimizer = AdamW()
    penalty: Penalty | None = None
    stop: Stop = Stop()
    during: tuple[During, ...] = ()

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse to train without a task, or nothing."""
        super().check(model, task, earlier)
        if task is None:
            raise TaskError("train: a recipe that trains needs a task; add a 'task:' line")
        for step in self.during:
            step.check(model, task, earlier)

    def apply(self, state: State) -> None:
        """Run the loop, from where a resumed run stopped."""
        _Loop(self, state).run()


class _Loop:
    """One run of a Train: the optimiser, the clock and the best epoch so far."""

    def __init__(self, train: Train, state: State) -> None:
        if state.task is None:
            raise TaskError("train: a recipe that trains needs a task; add a 'task:' line")
        self.train, self.state, self.task = train, state, state.task
        self.model = state.model.to(state.device)
        self.parameters = _trained(train, self.model)
        self.optimizer = train.optimizer.build(self.parameters)
        self.per_epoch = math.ceil(len(self.task.train) / train.batch)
        self.epoch = self.batch = self.stale = 0
        self.best_score: tuple[float, float] | None = None
        self.best: dict[str, Tensor] = {}
        if state.training:
            self.restore(state.training)
            state.training = {}

    def run(self) -> None:
        """Train to the last epoch or the early stop, and leave the kept epoch's weights."""
        left = self.train.epochs * self.per_epoch - self.epoch * self.per_epoch - self.batch
        for batch in progress(
            self.batches(), f"{self.train.name} {self.train.epochs} epochs", left
        ):
            self.update(batch)
        if self.best and self.train.stop.keep == "best":
            self.model.load_state_dict(self.best)
        self.model.eval()

    def batches(self) -> Iterator[Batch]:
        """Yield every batch left; judge each epoch when its last batch is done."""
        for epoch in range(self.epoch, self.train.epochs):
            self.model.train()
            for batch in self.task.train.batches(
                self.train.batch,
                seed=self.state.seed,
                epoch=epoch,
                start=self.batch,
                device=self.state.device,
            ):
                yield batch
                self.batch += 1
                self.checkpoint()
            self.epoch, self.batch = epoch + 1, 0
            if self.judge():
                return
            self.checkpoint()

    def update(self, batch: Batch) -> None:
        """Take one optimiser step; its draws depend on (seed, epoch, batch) alone."""
        torch.manual_seed(derive(self.state.seed, "update", self.epoch, self.batch))
        done = (self.epoch * self.per_epoch + self.batch) / (self.train.epochs * self.per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.train.optimizer.lr * self.train.optimizer.decay.factor(done)
        loss = self.loss(batch, done)
        if not math.isfinite(loss.item()):
            raise RunError(
                f"train: the loss is {loss.item()} at epoch {self.epoch + 1}, batch "
                f"{self.batch + 1}; lower the learning rate ({self.train.optimizer.lr:g}) or clip"
            )
        self.optimizer.zero_grad()
        loss.backward()
        if self.train.optimizer.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.train.optimizer.clip)
        self.optimizer.step()
        for laid, _ in laid_tensors(self.model).values():
            laid.update()
        after = done + 1 / (self.train.epochs * self.per_epoch)
        for step in self.train.during:
            step.update(self.state, after)

    def loss(self, batch: Batch, done: float) -> Tensor:
        """Return objective plus penalty, in float32."""
        low = self.state.precision == "bfloat16"
        with torch.autocast(self.state.device.split(":")[0], torch.bfloat16, enabled=low):
            output = self.task.call(self.model, batch)
        features = {"output": output.float()}
        loss = self.train.objective(features, {}, batch, task=self.task, progress=done)
        if self.train.penalty is not None:
            loss = loss + self.train.penalty(weights_of(self.model, self.train.scope))
        return loss

    def judge(self) -> bool:
        """Score the validation split, keep the best epoch, return whether to stop."""
        scores = self.task.score(self.model, split="validate", device=self.state.device)
        score = (scores[self.task.main_metric], -scores["loss"])
        logger.info(
            "train: epoch %d of %d, validation %s %.4f, loss %.4f",
            self.epoch,
            self.train.epochs,
            self.task.main_metric,
            score[0],
            scores["loss"],
        )
        # What still changes the network would be undone by going back to an earlier epoch.
        settled = max((step.settled for step in self.train.during), default=0)
        if (self.epoch - 1) / self.train.epochs < settled and self.epoch < self.train.epochs:
            return False
        if self.best_score is None or score > self.best_score:
            self.best_score, self.stale = score, 0
            self.best = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        else:
            self.stale += 1
        return self.train.stop.patience is not None and self.stale >= self.train.stop.patience

    def checkpoint(self) -> None:
        """Let the run directory keep where training stands, when it is due."""
        keeper = self.state.keeper
        if keeper is not None and keeper.due():
            keeper.write(self.state, self.payload())

    def payload(self) -> dict[str, Any]:
        """Return all that a resumed loop needs: counters and named tensors."""
        tensors = {f"best/{name}": tensor for name, tensor in self.best.items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            for key, value in slots.items():
                tensors[f"optimizer/{index}/{key}"] = torch.as_tensor(value)
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
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "best":
                self.best[rest] = tensor
            else:
                index, _, key = rest.partition("/")
                slots.setdefault(int(index), {})[key] = tensor
        current = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": slots, "param_groups": current["param_groups"]})


def _trained(train: Train, model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that move, in an order that laying a weight does not change."""
    selected = set(train.scope.select(model))
    chosen = {}
    for name, parameter in model.named_parameters():
        holder, plain = _plain_name(name)
        if parameter.requires_grad and holder in selected:
            chosen[plain] = parameter
    if not chosen:
        raise RunError(f"train: no trainable parameter in scope '{train.scope}'")
    return [chosen[plain] for plain in sorted(chosen)]


def _plain_name(name: str) -> tuple[str, str]:
    """Return a parameter's module and its name, the same whether it is laid or not.

    >>> _plain_name("fc.parametrizations.weight.original"), _plain_name("fc.weight")
    (('fc', 'fc.weight'), ('fc', 'fc.weight'))
    """
    parts = name.split(".")
    if "parametrizations" not in parts:
        return ".".join(parts[:-1]), name
    cut = parts.index("parametrizations")
    plain = [*parts[:cut], *parts[cut + 1 :]]
    return ".".join(parts[:cut]), ".".join(plain).removesuffix(".original")
