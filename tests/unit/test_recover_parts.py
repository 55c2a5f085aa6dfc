"""Reconstruct's parts: what they are, and what they learn in every order."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laconic import machine
from laconic.errors import ChainError, ModelError, RecipeError, RunError, ScopeError
from laconic.models import resnet
from laconic.progress import reporting
from laconic.recover import (
    SGD,
    Adam,
    Cross,
    Feed,
    Gradient,
    LeastSquares,
    Mixed,
    Order,
    Parallel,
    ProximalWeights,
    Reconstruct,
    Sequential,
    SoftCross,
    Student,
    Teacher,
)
from laconic.recover import modulewise as ordering
from laconic.recover.fitting import difference, fittings_of
from laconic.recover.parts import Answer, Part, check_chain, even_parts, modules_of
from laconic.recover.stream import Data, Flow, Stored, flattened, restored
from laconic.run import compress
from laconic.scope import Scope
from laconic.ship.checkpoint import load_checkpoint, save_checkpoint
from laconic.step import State, derive, run_step
from laconic.tasks import Batch, Task
from laconic.weights import (
    LossAware,
    MovingAverage,
    Quantize,
)

CLOSE = {"atol": 1e-6, "rtol": 1e-5}  # the same sums, perhaps in another order
TOKENS, WORDS, EXAMPLES = 6, 30, 20
FEEDS = [Student(), Teacher(), Mixed(), Cross(), SoftCross()]
ORDERS = [Sequential(), Parallel(2)]


class Block(nn.Module):
    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(size, 5), nn.Linear(5, size)
        self.drop = nn.Dropout(0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.drop(self.outer(self.inner(hidden).relu()))


class Chain(nn.Module):
    """A stem with a norm, four blocks and a head."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.stem(inputs))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def chain(seed: int = 0, blocks: int = 4) -> Chain:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Chain(blocks).eval()


@functools.cache
def task() -> Task:
    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(EXAMPLES, 4, generator=generator), torch.arange(EXAMPLES) % 3
    return Task(pair, pair, pair)


def step(parts: Any = "block", steps: int = 5, **fields: Any) -> Reconstruct:
    return Reconstruct(parts=parts, solve=Gradient(steps, batch=8, optimizer=Adam(1e-2)), **fields)


def quantised(model: nn.Module | None = None, data: Task | None = None, **fields: Any) -> State:
    """Return a network of few bits and its teacher."""
    model = chain() if model is None else model
    data = task() if data is None else data
    state = State(copy.deepcopy(model), data, teacher=(model,))
    run_step(Quantize(3, **fields), state)
    return state


def after(step: Reconstruct, state: State | None = None) -> nn.Module:
    state = quantised() if state is None else state
    step.check(state.model, state.task)
    run_step(step, state)
    assert state.position == [] and state.saved == [] and state.training == {}
    return state.model


def same(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def encoder(family: str = "Bert", **fields: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="encoders need transformers")
    sizes: dict[str, Any] = {
        "vocab_size": WORDS,
        "hidden_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "max_position_embeddings": TOKENS + 4,
        "pad_token_id": 0,
    }
    if family == "DistilBert":
        names = {"hidden_size": "dim", "num_hidden_layers": "n_layers"}
        names |= {"num_attention_heads": "n_heads", "intermediate_size": "hidden_dim"}
        sizes = {names.get(name, name): value for name, value in sizes.items()}
    config = getattr(transformers, f"{family}Config")(**sizes | fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = getattr(transformers, f"{family}ForSequenceClassification")(config)
    return network.eval()


@functools.cache
def texts(length: int = TOKENS, junk: int = 0) -> Task:
    """Return token ids with padding; ``junk`` stands where it is."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, WORDS, (12, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, 4:] = 0
    ids = ids.where(mask.bool(), junk)
    labels = torch.arange(12) % 2

    def call(model: nn.Module, batch: Batch) -> Tensor:
        return model(**batch.inputs).logits

    data = [
        Batch({"input_ids": ids[i::3], "attention_mask": mask[i::3]}, labels[i::3])
        for i in range(3)
    ]
    loader: Any = torch.utils.data.DataLoader(data, batch_size=None)
    return Task(loader, loader, loader, classes=("0", "1"), call=call)


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
    for number in range(asked.solve.steps):
        batch = next(flows)
        hidden = []
        for network in (model, teacher):
            features = [network.norm(network.stem(batch.inputs[0]))]
            for block in network.blocks:
                features.append(block(features[-1]))
            hidden.append(features)
        loss = sum((s - t.detach()).square().mean() for s, t in zip(*hidden, strict=True))
        optimizer.param_groups[0]["lr"] = 1e-2 * Adam(1e-2).decay.factor(number / asked.solve.steps)
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


def test_reversed_order_gives_the_same_under_full_forcing() -> None:
    wanted = after(step(feed=Teacher()))
    state = quantised()
    asked = step(feed=Teacher())
    state.seed = derive(0, "reconstruct", 0)
    fittings = fittings_of(asked, state)
    with torch.random.fork_rng():
        for fitting in reversed(fittings):
            source: Any = ordering.data_of(fittings[0])
            flows = [*source.each()]
            for before in fittings[: fitting.number[0] - 1]:
                flows = [before.passed(flow) for flow in flows]
            source = source if fitting.number[0] == 1 else Kept(flows)
            ordering._fit(fitting, source, state)
    assert same(state.model, wanted)


class Kept:
    """Flows in memory, in the order in which Stored yields them."""

    def __init__(self, flows: list[Flow]) -> None:
        self.list, self._read = flows, flows.__getitem__

    def __len__(self) -> int:
        return len(self.list)

    flows = Stored.flows


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


# ------------------------------------------------------------------ all at once


def test_all_at_once_gives_the_same_bits_every_time() -> None:
    asked = step(3, order=Parallel(3), feed=Mixed(), steps=6)
    assert same(after(asked), after(asked))
    other = quantised()
    other.seed = 1
    assert not same(after(asked), after(asked, other))


def test_a_queue_of_one_is_a_pipeline() -> None:
    """Each part takes an update on what the one before has just sent."""
    asked = step(2, steps=4, order=Parallel(1))
    wanted, state = after(asked), quantised()
    state.seed = derive(0, "reconstruct", 0)
    fittings = fittings_of(asked, state)
    with torch.random.fork_rng():
        flows = ordering.data_of(fittings[0]).flows(derive(state.seed, "flows", 1))
        for flow in itertools.islice(flows, 4):
            for fitting in fittings:
                flow = fitting.update(flow)
    assert same(state.model, wanted)


def test_a_queue_holds_the_teachers_features_at_first_and_forgets_the_oldest() -> None:
    state = quantised()
    fittings = fittings_of(step(2), state)
    turns = ordering.Turns(fittings, fittings, 3)
    (queue,) = turns.queues.values()
    assert len(queue) == queue.maxlen == 3
    assert all(torch.equal(flow.teacher, flow.student) for flow in queue)
    second = queue[1]
    next(turns.each())
    assert len(queue) == 3 and queue[0] is second
    assert not torch.equal(queue[-1].teacher, queue[-1].student)
    assert not queue[-1].student.requires_grad


def test_queues_that_do_not_fit_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 examples x 6 numbers x 4 bytes for teacher and student, 3 queues of 10."""
    needed = 8 * 6 * 4 * 2 * 3 * 10
    monkeypatch.setattr(ordering, "free_memory", lambda: needed)
    after(step(order=Parallel(10), steps=1))
    monkeypatch.setattr(ordering, "free_memory", lambda: needed - 1)
    state = quantised()
    with pytest.raises(RunError, match="are free; write parallel: 9"):
        run_step(step(order=Parallel(10)), state)
    assert not state.curves
    monkeypatch.setattr(ordering, "free_memory", lambda: needed)
    monkeypatch.setattr(ordering, "ranks", SimpleNamespace(count=lambda: 2))
    with pytest.raises(RunError, match="are free; write parallel: 5"):
        run_step(step(order=Parallel(10)), quantised())


def test_free_memory_is_what_a_container_leaves(tmp_path: Path) -> None:
    assert machine._left_of_limit(tmp_path) is None
    files = {"max": "1000\n", "current": "700\n", "stat": "anon 500\ninactive_file 150\n"}
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert machine._left_of_limit(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._left_of_limit(tmp_path) is None
    assert machine.free_memory() > 0


# ------------------------------------------------------------------ checkpoints


class Keeper:
    """Writes a checkpoint at one moment, and stops there."""

    def __init__(self, at: int, path: Path) -> None:
        self.left, self.path = at, path

    def due(self) -> bool:
        self.left -= 1
        return self.left == 0

    def write(self, state: State, training: dict[str, Any]) -> None:
        save_checkpoint(state, training, self.path, run={})
        raise KeyboardInterrupt

    def scratch(self) -> AbstractContextManager[Path]:
        return State(nn.Identity()).scratch()


@pytest.mark.parametrize(
    ("order", "at"),
    [
        *itertools.product([Sequential()], [1, 4, 5, 6, 11, 15]),
        *((Parallel(2), at) for at in (1, 4, 5)),
    ],
    ids=repr,
)
def test_a_resumed_run_gives_the_same_bits(order: Order, at: int, tmp_path: Path) -> None:
    """In order, of each part's 5 updates; all at once, of 5 updates of every part."""
    asked = step(3, order=order, feed=Mixed())
    activation: Any = MovingAverage(6)
    wanted = after(asked, quantised(activation=activation))
    state = quantised(activation=activation)
    state.keeper = Keeper(at, tmp_path / "checkpoint")
    with pytest.raises(KeyboardInterrupt):
        run_step(asked, state)
    resumed = State(chain(), task(), teacher=(chain(),))
    load_checkpoint(resumed, tmp_path / "checkpoint")
    assert same(after(asked, resumed), wanted)


def test_ranges_follow_in_the_parts_scope_alone() -> None:
    activation: Any = MovingAverage(6)
    state = quantised(activation=activation)
    before = copy.deepcopy(state.model.state_dict())
    after(step(2, scope=Scope("blocks.0*, blocks.3*")), state)
    moved = {n for n, t in state.model.state_dict().items() if not torch.equal(t, before[n])}
    assert any("quantizers" in name for name in moved)
    assert {name.split(".")[1] for name in moved} == {"0", "3"}
    assert not any(module.training for module in state.model.modules())


def test_features_wait_on_disk_and_go_when_all_is_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen: list[set[str]] = []
    fit = ordering._fit
    monkeypatch.setattr(
        ordering,
        "_fit",
        lambda *a: (seen.append({p.parent.name for p in tmp_path.glob("*/*/*")}), fit(*a)),
    )
    after(step(3))
    assert seen == [set(), {"0"}, {"1"}], "more than one part's features are kept"
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(ordering, "_fit", lambda *a: 1 / 0)
    with pytest.raises(RunError, match="ZeroDivision"):
        run_step(step(3), quantised())
    assert not any(tmp_path.iterdir())


def test_features_of_a_run_wait_in_its_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, folders = tmp_path / "run", set()
    (out / "scratch-0" / "1").mkdir(parents=True)  # of a process that was killed
    write = Stored._write

    def watched(self: Stored, flow: Flow) -> None:
        folders.add(self.folder)
        assert folders > {out / "scratch-0" / "0"} or not (out / "scratch-0" / "1").exists()
        write(self, flow)

    monkeypatch.setattr(Stored, "_write", watched)
    compress(chain(1), task(), [step(3)], teacher=chain(), out=out)
    assert folders == {out / "scratch-0" / "0", out / "scratch-0" / "1"}
    assert not [*out.glob("scratch*")]


def test_a_part_that_is_done_keeps_no_state_of_its_optimiser() -> None:
    state = quantised()
    fittings = fittings_of(step(3), state)
    ordering.fit_in_order(fittings, state)
    assert [fitting.tensors() for fitting in fittings] == [{}, {}, {}]


def test_stored_flows_come_back(tmp_path: Path) -> None:
    shared = torch.randn(2, 3)
    flow = Flow(
        shared, shared, {"args": [None, (shared > 0)], "named": {"more": [1.5, shared[:1]]}}
    )
    kept = Stored(tmp_path / "kept", [flow, flow], "cpu")
    back = next(kept.each())
    assert torch.equal(back.student, shared) and torch.equal(back.beside["args"][1], shared > 0)
    assert back.beside["named"]["more"][0] == 1.5
    assert restored(*flattened(flow)).beside.keys() == flow.beside.keys()
    assert len([*itertools.islice(kept.flows(0), 5)]) == 5
    kept.close()
    assert not (tmp_path / "kept").exists()


def test_flows_go_on_where_they_stopped(tmp_path: Path) -> None:
    data = Data(task().train, 8, limit=3, seed=0, device="cpu")
    features = [flow.teacher.inputs[0] for flow in data.each()]
    stored = Stored(tmp_path / "kept", (Flow(each, each, {}) for each in features), "cpu")
    assert stored.count == 3
    whole = [flow.teacher for flow in itertools.islice(stored.flows(5), 10)]
    for start in range(8):
        assert torch.equal(next(stored.flows(5, start)).teacher, whole[start])
    whole = [flow.teacher.inputs[0] for flow in itertools.islice(data.flows(5), 10)]
    for start in range(8):
        assert torch.equal(next(data.flows(5, start)).teacher.inputs[0], whole[start])


# ------------------------------------------------------------------ what is refused, what is told


class Between(Chain):
    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.stem(inputs))
        for place, block in enumerate(self.blocks):
            hidden = block(hidden * 2 if place == 2 else hidden)
        return self.head(hidden)


class Scaled(Block):
    def forward(self, hidden: Tensor, scale: Any = None) -> Tensor:
        return super().forward(hidden) if scale is None else super().forward(hidden) * scale


class Beside(Chain):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Scaled() for _ in range(3))
        self.how, self.scale = how, nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.stem(inputs))
        for place, block in enumerate(self.blocks):
            beside = {
                "learned": self.scale,
                "differs": torch.tensor(place),
                "same": torch.tensor(2),
            }
            hidden = block(hidden, scale=beside[self.how])
        return self.head(hidden)


def test_what_is_no_chain_is_refused() -> None:
    with pytest.raises(ModelError, match="between block 2 and block 3 something"):
        run_step(step(), quantised(Between().eval()))
    with pytest.raises(ModelError, match="block 1 is called with a second tensor that is learned"):
        run_step(step(), quantised(Beside("learned").eval()))
    with pytest.raises(ModelError, match=r"block 2 is called with other named\.scale than block 1"):
        run_step(step(), quantised(Beside("differs").eval()))
    run_step(step(), quantised(Beside("same").eval()))
    with pytest.raises(ModelError, match="has no list of blocks"):
        run_step(step(), quantised(nn.Sequential(nn.Linear(4, 3))))


def test_shared_blocks_are_refused() -> None:
    with pytest.raises(ModelError, match="share one block"):
        run_step(step(), quantised(encoder("Albert", embedding_size=8), texts()))
    network = chain()
    network.blocks[2].inner.weight = network.blocks[1].inner.weight
    with pytest.raises(ModelError, match="block 2 and block 3 share a weight"):
        run_step(step(), quantised(network))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(RecipeError, match="5 parts were asked for, and the network has 4 blocks"):
        run_step(step(5), quantised())
    with pytest.raises(RecipeError, match="least_squares solves for one layer"):
        Reconstruct(parts=2, solve=LeastSquares()).check(chain(), task())
    pruning = Gradient(2, penalty=ProximalWeights(0.5))
    with pytest.raises(RecipeError, match="proximal_weights removes weights or channels"):
        Reconstruct(parts=2, solve=pruning).check(chain(), task())
    with pytest.raises(ScopeError, match="selects no parameter in a block"):
        run_step(step(scope=Scope("head")), quantised())
    with pytest.raises(ScopeError, match="no module with parameters"):
        step(scope=Scope("blocks.0.drop")).check(chain(), task())
    with pytest.raises(RunError, match="there is none"):
        run_step(step(), State(chain(), task()))
    with pytest.raises(ModelError, match="the student has 3 blocks and the teacher 4"):
        run_step(step(), State(chain(blocks=3), task(), teacher=(chain(),)))
    slow = Reconstruct(parts=2, solve=Gradient(2, batch=8, optimizer=SGD(0.1)))
    with pytest.raises(ChainError, match="needs Adam's second moment"):
        slow.check(chain(), task(), (Quantize(LossAware(2)),))


def test_a_teacher_that_is_not_finite_is_refused() -> None:
    broken = chain()
    with torch.no_grad():
        broken.blocks[1].outer.bias.fill_(torch.nan)
    with pytest.raises(ModelError, match="block 2 of the teacher gives NaN"):
        run_step(step(), State(chain(), task(), teacher=(broken,)))


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    asked = Reconstruct(parts=2, solve=Gradient(50, batch=8, optimizer=SGD(1e18)))
    with pytest.raises(RunError, match=r"in part 1, update \d+; lower the learning rate"):
        run_step(asked, quantised())


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


def test_in_a_run_with_its_directory(tmp_path: Path) -> None:
    result = compress(chain(), task(), [Quantize(3), step(2)], out=tmp_path / "run", device="cpu")
    assert [measured.step for measured in result.history] == ["original", "quantize", "reconstruct"]
