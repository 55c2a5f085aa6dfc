"""Reconstruct's parts: what they are, and what they learn in every order."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.recover_parts import after, chain, encoder, quantised, step, task, texts
from helpers.tensors import same
from laconic.models import resnet
from laconic.progress import reporting
from laconic.recover import (
    Adam,
    Cross,
    Feed,
    Mixed,
    Order,
    Parallel,
    Reconstruct,
    Sequential,
    SoftCross,
    Student,
    Teacher,
)
from laconic.recover.fitting import difference
from laconic.recover.parts import Answer, Part, check_chain, even_parts, modules_of
from laconic.scope import Scope
from laconic.step import State, derive, run_step
from laconic.tasks import Batch, Task
from laconic.weights import Float, MovingAverage, Quantize
from laconic.weights.laid import laid_tensors

CLOSE = {"atol": 1e-6, "rtol": 1e-5}  # the same sums, perhaps in another order
FEEDS = [Student(), Teacher(), Mixed(), Cross(), SoftCross()]
ORDERS = [Sequential(), Parallel(2)]

# ------------------------------------------------------------------ what a part is


@pytest.mark.parametrize(
    ("blocks", "count", "cuts"),
    [(6, 3, [2, 4, 6]), (6, 1, [6]), (6, 6, [1, 2, 3, 4, 5, 6]), (12, 5, [3, 6, 8, 10, 12])],
)
def test_parts_are_as_even_as_they_can_be(blocks: int, count: int, cuts: list[int]) -> None:
    parts = even_parts(blocks, count)
    assert [part.stop for part in parts] == cuts
    assert [part.start for part in parts] == [0, *cuts[:-1]]


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra", "DistilBert"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_parts_of_an_encoder_give_its_hidden_states(family: str, attention: str) -> None:
    network = encoder(family, attn_implementation=attention)
    batch = next(texts().train.batches(4))
    check_chain(network, texts(), batch)
    with torch.no_grad():
        wanted = network(**batch.inputs, output_hidden_states=True).hidden_states
        first = Part(0, 1).answer(network, texts(), batch, {})
        second = Part(1, 3).answer(network, texts(), first.outputs[-1], first.beside)
    found = [*first.outputs, *second.outputs]
    assert len(found) == 4
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_parts_of_a_cnn_give_its_stages() -> None:
    network, images = resnet(8).eval(), torch.randn(2, 3, 32, 32)
    data = Task((images, torch.arange(2)), (images, torch.arange(2)), (images, torch.arange(2)))
    check_chain(network, data, Batch((images,)))
    first = Part(0, 2).answer(network, data, Batch((images,)), {})
    last = Part(2, 3).answer(network, data, first.outputs[-1], first.beside).outputs[-1]
    pooled = last.mean(dim=(2, 3)) if last.dim() == 4 else last
    torch.testing.assert_close(network.linear(pooled), network(images), **CLOSE)


def test_the_first_part_holds_what_comes_before_and_none_what_comes_after() -> None:
    network, batch = chain(), task().example_batch(2)
    first, second = (modules_of(part, network, task(), batch) for part in even_parts(4, 2))
    assert {"stem", "norm", "blocks.0", "blocks.1.inner"} <= first
    assert "blocks.2.inner" in second and not first & second
    assert not {"head", "blocks.2"} & first


# ------------------------------------------------------------------ what parts learn


def by_hand(asked: Reconstruct, state: State) -> nn.Module:
    """Return what one part of all blocks becomes, written as users write it."""
    model, teacher, seed = state.model, state.teacher[0], derive(0, "reconstruct", 0)
    names = ["stem", "norm", "blocks"]
    moving = [p for name in names for p in model.get_submodule(name).parameters()]
    optimizer = torch.optim.Adam(moving, lr=1e-2)
    flows = task().train.batches(8, seed=derive(seed, "flows", 1))
    for number in range(asked.solve.updates):
        batch = next(flows)
        hidden = []
        for network in (model, teacher):
            features = [network.norm(network.stem(batch.inputs[0]))]
            for block in network.blocks:
                features.append(block(features[-1]))
            hidden.append(features)
        loss = sum((s - t.detach()).square().mean() for s, t in zip(*hidden, strict=True))
        optimizer.param_groups[0]["lr"] = 1e-2 * Adam(1e-2).decay.factor(
            number / asked.solve.updates
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("feed", FEEDS, ids=repr)
@pytest.mark.parametrize("order", ORDERS, ids=repr)
def test_one_part_is_distillation_of_hidden_states_whatever_it_is_fed(
    feed: Feed, order: Order
) -> None:
    asked = step(1, steps=2, feed=feed, order=order)
    found, wanted = after(asked), by_hand(asked, quantised())
    for name, tensor in wanted.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, **CLOSE)


@pytest.mark.parametrize("feed", FEEDS, ids=repr)
@pytest.mark.parametrize("order", ORDERS, ids=repr)
def test_what_equals_its_teacher_stays(feed: Feed, order: Order) -> None:
    state = State(chain(), task(), teacher=(chain(),))
    assert same(after(step(feed=feed, order=order), state), chain())
    assert all(loss == 0 for curve in state.curves.values() for loss in curve)
    assert len(state.curves) == 4


@pytest.mark.parametrize("feed", FEEDS, ids=repr)
@pytest.mark.parametrize("order", ORDERS, ids=repr)
@pytest.mark.parametrize(("made", "data"), [(chain, task), (encoder, texts)])
def test_what_is_stored_in_floats_stays(made: Any, data: Any, feed: Feed, order: Order) -> None:
    """A representation that loses nothing leaves nothing to learn, laid as it is."""
    state = State(made(), data(), teacher=(made(),))
    run_step(Quantize(Float()), state)
    assert laid_tensors(state.model)
    after(step(2, feed=feed, order=order), state)
    assert len(state.curves) == 2
    assert all(loss == 0 for curve in state.curves.values() for loss in curve)
    batch = data().example_batch(4)
    assert torch.equal(data().call(state.model, batch), data().call(made(), batch))


def test_as_many_parts_as_blocks_is_block_by_block() -> None:
    assert same(after(step(4)), after(step("block")))


@pytest.mark.parametrize("feed", [Student(), Mixed(), Cross(0.5), SoftCross(0.9, 0.8)], ids=repr)
@pytest.mark.parametrize("order", ORDERS, ids=repr)
def test_parts_come_nearer_to_the_teacher(feed: Feed, order: Order) -> None:
    state = State(chain(), task(), teacher=(chain(),))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    start = copy.deepcopy(state.model)
    wanted = hidden(state.teacher[0])
    after(step(2, steps=60, feed=feed, order=order), state)
    far, near = ((hidden(each) - wanted).square().mean() for each in (start, state.model))
    assert float(near.detach()) < 0.1 * float(far.detach())
    assert same(state.model.head, start.head)
    assert torch.equal(state.model.norm.running_mean, start.norm.running_mean)


def inputs() -> Tensor:
    return task().train.example(8).inputs[0]


def hidden(model: Any) -> Tensor:
    feature = model.norm(model.stem(inputs()))
    for block in model.blocks:
        feature = block(feature)
    return feature


def test_without_forcing_it_is_the_student_that_is_fed() -> None:
    assert same(after(step(feed=Mixed(end=0.0))), after(step(feed=Student())))
    assert same(after(step(feed=SoftCross(1.0, 1.0))), after(step(feed=Student())))
    assert not same(after(step(feed=Mixed())), after(step(feed=Student())))


@pytest.mark.parametrize("feed", [Teacher(), SoftCross(1.0, 0.0)], ids=repr)
def test_full_forcing_makes_parts_independent(feed: Feed) -> None:
    """What becomes of the last part does not depend on the parts before it."""
    changed = quantised()
    with torch.no_grad():
        for parameter in changed.model.blocks[0].parameters():
            parameter.add_(0.3)
    one, other = after(step(feed=feed)), after(step(feed=feed), changed)
    assert not same(one.blocks[0], other.blocks[0])
    for place in (1, 2, 3):
        assert same(one.blocks[place], other.blocks[place])


def test_padding_does_not_matter() -> None:
    losses = []
    for junk in (0, 7):
        state = quantised(encoder(attn_implementation="eager"), texts(junk=junk))
        after(step(3, steps=3), state)
        losses.append(state.curves)
    assert losses[0].keys() == {"part 1: block 1", "part 2: block 2", "part 3: block 3"}
    for name, curve in losses[0].items():
        assert curve == pytest.approx(losses[1][name], rel=1e-5)


def test_a_loss_is_the_mean_over_what_is_no_padding() -> None:
    feature = torch.tensor([[[1.0], [2.0], [5.0]]])
    mask = torch.tensor([[True, True, False]])
    own, other = Answer([feature, feature], {}), Answer([feature * 0] * 2, {"mask": mask})
    assert float(difference(own, other)) == 5.0
    assert float(difference(own, Answer(other.outputs, {}))) == 20.0


def test_ranges_follow_in_the_parts_scope_alone() -> None:
    activation: Any = MovingAverage(6)
    state = quantised(activation=activation)
    before = copy.deepcopy(state.model.state_dict())
    after(step(2, scope=Scope("blocks.0*, blocks.3*")), state)
    moved = {n for n, t in state.model.state_dict().items() if not torch.equal(t, before[n])}
    assert any("quantizers" in name for name in moved)
    assert {name.split(".")[1] for name in moved} == {"0", "3"}
    assert not any(module.training for module in state.model.modules())


# ------------------------------------------------------------------ what is told


def test_each_part_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Reporter:
        def __init__(self) -> None:
            self.told: list[Any] = []

        def start(self, label: str, total: int | None) -> int:
            self.told.append((label, total))
            return 0

        def advance(self, handle: int) -> None:
            self.told.append(handle)

        def stop(self, handle: int) -> None:
            pass

    for order in ORDERS:
        reporter, state = Reporter(), quantised()
        with caplog.at_level(logging.INFO, "laconic.recover"), reporting(reporter):
            run_step(step(2, order=order), state)
        bars = {each: None for each in reporter.told if each}
        between = bars.pop(("reconstruct: what leaves part 1", 3), 0)
        assert [*bars] == [("reconstruct part 1 of 2", 5), ("reconstruct part 2 of 2", 5)]
        assert reporter.told.count(0) == (10 if between == 0 else 13)
        assert [line.split(": loss")[0] for line in caplog.messages[-2:]] == [
            "reconstruct: part 1 of 2 (blocks 1-2)",
            "reconstruct: part 2 of 2 (blocks 3-4)",
        ]
        assert {name: len(curve) for name, curve in state.curves.items()} == {
            "part 1: blocks 1-2": 5,
            "part 2: blocks 3-4": 5,
        }
