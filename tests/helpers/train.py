"""Small networks and a task to train them on, short trainings, and the same loop by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.recover import SGD, Constant, Stop, Train
from laconic.step import State, derive, run_step
from laconic.tasks import Task

BATCH, EXAMPLES = 8, 20  # two full batches and a rest of four
FULL = EXAMPLES
ONE = {"batch": FULL, "epochs": 1, "stop": Stop(keep="last")}


def task(examples: int = EXAMPLES, **options: Any) -> Task:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(examples, 6, generator=generator)
    labels = torch.arange(examples) % 3
    held = torch.randn(9, 6, generator=generator), torch.arange(9) % 3
    return Task((inputs, labels), held, held, **options)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def with_norm() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
        )


def trained(train: Train, model: nn.Module | None = None, data: Task | None = None) -> Any:
    """Return the network after a training, with seed 0."""
    state = State(network() if model is None else model, task() if data is None else data)
    train.check(state.model, state.task)
    run_step(train, state)
    return state.model


def seed_of(seed: int = 0) -> int:
    """Return the seed a training gets from ``run_step`` in a run of this seed."""
    return derive(seed, "train", 0)


def plain_sgd(lr: float = 0.1, **fields: Any) -> SGD:
    return SGD(lr, momentum=0.0, **{"decay": Constant(), **fields})


def by_hand(
    train: Train, model: nn.Module, data: Task, made: Callable[..., torch.optim.Optimizer]
) -> nn.Module:
    """Return the network after the same training, written as users write it."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    decayed = {"params": matrices, "weight_decay": train.optimizer.weight_decay}
    optimizer = made([decayed, {"params": others, "weight_decay": 0.0}])
    per_epoch = math.ceil(len(data.train) / train.batch)
    for epoch in range(train.epochs):
        model.train()
        batches = data.train.batches(train.batch, seed=seed_of(), epoch=epoch)
        for number, batch in enumerate(batches):
            torch.manual_seed(derive(seed_of(), "update", epoch, number))
            done = (epoch * per_epoch + number) / (train.epochs * per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = train.optimizer.lr * train.optimizer.decay.factor(done)
            loss = F.cross_entropy(model(*batch.inputs), batch.targets)
            optimizer.zero_grad()
            loss.backward()
            if train.optimizer.clip is not None:
                # By name, as the loop has them: the order of a sum decides its last bit.
                named = sorted(model.named_parameters())
                nn.utils.clip_grad_norm_([p for _, p in named], train.optimizer.clip)
            optimizer.step()
    return model.eval()


def gradient(model: nn.Module, data: Task, names: list[str]) -> dict[str, Tensor]:
    """Return the gradient of the loss on the whole training split."""
    model.zero_grad()
    (batch,) = data.train.batches(len(data.train))
    data.loss(data.call(model, batch), batch).backward()
    return {name: model.get_parameter(name).grad.clone() for name in names}  # type: ignore[union-attr]


def scored(*values: float, loss: tuple[float, ...] = ()) -> Task:
    """Return a task whose validation says these scores, and losses, epoch by epoch."""
    script, losses = iter(values), iter(loss)
    data = task(metrics={"told": lambda outputs, targets: next(script)})
    plain = data.loss

    def told(outputs: Tensor, batch: Any) -> Tensor:
        value = plain(outputs, batch)
        # Training's losses carry a gradient; validation's are the scripted ones.
        return value if value.requires_grad or not loss else torch.tensor(next(losses))

    data.loss = told
    return data


def constant(count: int, stop: Stop) -> Train:
    return Train(epochs=count, batch=BATCH, optimizer=plain_sgd(), stop=stop)


class Tied(nn.Module):
    """A matrix that two modules share, under its first name in ``first``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.second(self.first(inputs).relu()).relu())
        return outputs
