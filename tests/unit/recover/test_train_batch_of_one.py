"""Train: a last batch of one example, with and without a norm that cannot take it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from helpers.teacher import network, task
from helpers.tensors import same
from laconic.errors import TaskError
from laconic.recover import SGD, Mutual, Stop, Train
from laconic.step import During, State, Step, Value, derive, run_step
from laconic.tasks import Task


class Clock(During):
    """Notes the progress it is told."""

    def apply(self, state: State) -> None: ...

    def update(self, state: State, progress: float, *, since: float) -> None:
        TOLD.append(progress)


Value._registry[Step].pop("clock")
Value._registry[During].pop("clock", None)
TOLD: list[float] = []


def test_a_last_batch_of_one_that_a_norm_cannot_take_is_passed_over() -> None:
    TOLD.clear()
    train = Train(batch=4, stop=Stop(keep="last"), during=(Clock(),))
    model, seen = network(), []
    model.register_forward_hook(lambda m, i, o: seen.append(len(o)) if m.training else None)
    run_step(train, State(model, task(9)))
    assert seen == [4, 4]
    assert pytest.approx([1 / 3, 2 / 3, 1]) == TOLD
    assert int(model.norm.num_batches_tracked) == 2
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_last_batch_of_one_that_a_peers_norm_cannot_take_is_passed_over() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    seen: list[int] = []
    model.register_forward_hook(lambda m, i, o: seen.append(len(o)) if m.training else None)
    peer = (network(),)
    run_step(Train(Mutual(), batch=4), State(model, task(9), teacher=peer))
    assert seen == [4, 4]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)),
        nn.Sequential(
            nn.Unflatten(1, (1, 6)), nn.BatchNorm1d(1), nn.Flatten(), nn.Dropout(), nn.Linear(6, 3)
        ),
    ],
    ids=["no BatchNorm", "several values per channel"],
)
def test_a_last_batch_of_one_is_learned_from_where_it_can_be(model: nn.Sequential) -> None:
    seen: list[int] = []
    model[-1].register_forward_hook(lambda m, i, o: seen.append(len(o)) if m.training else None)
    seed = derive(0, "train", 0)
    twin = copy.deepcopy(model).train()
    run_step(Train(batch=8, optimizer=SGD(0.1, momentum=0.0)), State(model, task(9)))
    assert seen[:1] == [8] and seen[-1] == 1
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for number, batch in enumerate(task(9).train.batches(8, seed=seed)):
        torch.manual_seed(derive(seed, "update", 0, number))
        optimizer.param_groups[0]["lr"] = 0.1 * Train().optimizer.decay.factor(number / 2)
        loss = F.cross_entropy(twin(*batch.inputs), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert same(model, twin)


def test_batches_of_one_that_a_norm_cannot_take_are_refused() -> None:
    with pytest.raises(TaskError, match="BatchNorm cannot normalise; choose a batch of at least 2"):
        run_step(Train(batch=1), State(network(), task()))
    inputs, targets = next(task(9).train.batches(9)).inputs[0], torch.arange(9) % 3
    ready = DataLoader([(inputs[:1], targets[:1]), (inputs[1:], targets[1:])], batch_size=None)
    data = Task(ready, ready, ready)
    with pytest.raises(TaskError, match="let the DataLoader begin with more"):
        run_step(Train(), State(network(), data))
    frozen = Train(scope="last", batch=1)
    run_step(frozen, State(network(), task(4)))  # its norm has statistics to use
