"""What learns beside a student: peers in mutual learning, and projections of features."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.teacher import BATCH, HIDDEN, close, network, short, task, teacher, trained
from helpers.tensors import same
from laconic.errors import FeatureError
from laconic.recover import SGD, AdamW, Constant, Hint, Label, Logits, Mutual
from laconic.recover.lesson import Lesson
from laconic.recover.train import _Loop
from laconic.ship.checkpoint import load_checkpoint, save_checkpoint
from laconic.step import State, derive

# ------------------------------------------------------------------ teachers that learn too


def mutual_by_hand(model: nn.Module, peer: nn.Module, seed: int) -> nn.Module:
    """Return the network after deep mutual learning, in one step for both."""
    data, parameters = task(), [*model.parameters(), *peer.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for epoch in range(2):
        model.train()
        peer.train()
        for index, batch in enumerate(data.train.batches(BATCH, seed=seed, epoch=epoch)):
            torch.manual_seed(derive(seed, "update", epoch, index))
            own, other = model(*batch.inputs), peer(*batch.inputs)
            learned = F.cross_entropy(own, batch.targets) + F.cross_entropy(other, batch.targets)
            p, q = own.log_softmax(1), other.log_softmax(1)
            options: dict[str, Any] = {"reduction": "batchmean", "log_target": True}
            agreed = F.kl_div(p, q.detach(), **options) + F.kl_div(q, p.detach(), **options)
            optimizer.zero_grad()
            (learned + agreed).backward()
            optimizer.step()
    return model.eval()


def test_two_networks_that_learn_together_are_those_of_a_loop_by_hand() -> None:
    model = trained(short(Label() + Mutual()), network(), (teacher(),))
    close(model, mutual_by_hand(network(), teacher(), derive(0, "train", 0)))


def test_a_peer_is_a_copy_and_the_teacher_stays_as_it_is() -> None:
    teach = teacher()
    lesson = Lesson(Label() + Mutual(), State(network(), task(), teacher=(teach,)), task())
    assert not lesson.teachers and same(lesson.peers["0"], teach)
    before = copy.deepcopy(teach)
    trained(short(Label() + Mutual()), network(), (teach,))
    assert same(teach, before)


def test_a_peer_learns_from_no_other_term() -> None:
    both = Logits() + Hint("output:first", of="output:norm", weight=2.0) + 1e-30 * Mutual()
    teach, data = teacher(width=8), task()
    lesson = Lesson(both, State(network(), data, teacher=(teach,)), data)
    batch = next(data.train.batches(BATCH))
    lesson.loss(batch, lesson.teach(batch, 0), 0.0).backward()
    gradients = [p.grad for p in lesson.peers["0"].parameters() if p.grad is not None]
    assert gradients and max(float(g.abs().max()) for g in gradients) < 1e-20


def test_a_peers_gradient_does_not_shrink_the_students_step() -> None:
    clipped = SGD(0.1, momentum=0.0, clip=1e-3, decay=Constant())
    state = State(network(), task(), teacher=(teacher(),))
    loop = _Loop(short(Label() + Mutual(), optimizer=clipped), state)
    loop.enter_training()
    loop.update(next(loop.batches()))
    for each in (state.model, loop.lesson.peers["0"]):
        norm = torch.stack([p.grad.norm() for p in each.parameters() if p.grad is not None]).norm()
        assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_a_peer_of_other_classes_is_refused_before_training() -> None:
    with pytest.raises(FeatureError, match="same classes"):
        trained(short(Mutual()), network(), (teacher(classes=5),))


# ------------------------------------------------------------------ what is learned beside


def test_a_projection_learns_with_the_network_and_is_not_shipped() -> None:
    state = State(network(), task(), teacher=(teacher(),))
    loop = _Loop(short(HIDDEN), state)
    learned = loop.lesson.learned
    assert learned is not None
    start = copy.deepcopy(learned.state_dict())
    (weight,) = [t for t in start.values() if t.dim() == 2]
    assert weight.shape == (12, 8)
    names = set(network().state_dict())
    loop.run()
    assert all(not torch.equal(start[n], t) for n, t in learned.state_dict().items())
    assert set(state.model.state_dict()) == names
    assert all(parameter.grad is None for parameter in learned.parameters())


def test_the_start_of_a_projection_depends_on_the_seed_alone() -> None:
    states = []
    for seed in (0, 0, 1):
        torch.rand(3)
        loop = _Loop(short(HIDDEN), State(network(), task(), teacher=(teacher(),), seed=seed))
        assert loop.lesson.learned is not None
        states.append(loop.lesson.learned.state_dict()["1.weight"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_training_with_a_projection_goes_on_where_it_stopped(stop: int, tmp_path: Path) -> None:
    train = short(HIDDEN, optimizer=AdamW(0.01))

    def fresh() -> State:
        return State(network(), task(), teacher=(teacher(),))

    whole = fresh()
    _Loop(train, whole).run()
    state = fresh()
    loop = _Loop(train, state)
    for batch in itertools.islice(loop.batches(), stop):
        loop.update(batch)
    # What would be written in the middle of the generator, after its batch is counted.
    loop.batch += 1
    save_checkpoint(state, loop.payload(), tmp_path / "checkpoint", run={})
    other = fresh()
    load_checkpoint(other, tmp_path / "checkpoint")
    resumed = _Loop(train, other)
    if resumed.batch == resumed.per_epoch:
        resumed.epoch, resumed.batch = resumed.epoch + 1, 0
    resumed.run()
    assert same(other.model, whole.model)
