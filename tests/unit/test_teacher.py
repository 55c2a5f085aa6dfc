"""Training from teachers: the loop by hand, what stays untouched, resuming, what is refused."""

from __future__ import annotations

import copy
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from laconic import compress, load, rundir, save
from laconic.errors import FeatureError, ModelError, RunError, TaskError
from laconic.recipe import Recipe
from laconic.recover import (
    SGD,
    AdamW,
    Attention,
    Constant,
    Hidden,
    Hint,
    Label,
    Logits,
    Mutual,
    Objective,
    Stop,
    Train,
    Uniform,
)
from laconic.recover.lesson import Lesson, Teachers
from laconic.recover.train import _Loop
from laconic.ship.checkpoint import load_checkpoint, model_hash, save_checkpoint
from laconic.step import During, State, Step, Value, derive, run_step
from laconic.structure import Prune
from laconic.tasks import Task
from laconic.weights import Ternary, bake, lay
from laconic.weights.laid import laid_tensors

BATCH, EXAMPLES = 8, 20  # two full batches and a rest of four


def task(examples: int = EXAMPLES, classes: int = 3) -> Task:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(examples, 6, generator=generator)
    held = torch.randn(9, 6, generator=generator), torch.arange(9) % classes
    return Task((inputs, torch.arange(examples) % classes), held, held)


class Blocks(nn.Module):
    """Residual blocks with dropout and a norm: [batch, 6] -> [batch, classes]."""

    def __init__(self, blocks: int, width: int, classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(0.5))
            for _ in range(blocks)
        )
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        outputs: Tensor = self.last(self.norm(x))
        return outputs


def network(blocks: int = 2, width: int = 8, classes: int = 3, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Blocks(blocks, width, classes)


def teacher(**options: Any) -> nn.Module:
    return network(**{"blocks": 4, "width": 12, "seed": 1, **options})


def trained(
    train: Train, model: nn.Module, teachers: tuple[nn.Module, ...], **options: Any
) -> nn.Module:
    """Return the network after a training, with seed 0."""
    state = State(model, task(), teacher=teachers, **options)
    train.check(model, state.task)
    run_step(train, state)
    return model


def same(left: nn.Module, right: nn.Module) -> bool:
    one, two = left.state_dict(), right.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def short(objective: Objective, **fields: Any) -> Train:
    options = {"epochs": 2, "batch": BATCH, "stop": Stop(keep="last")}
    optimizer = SGD(0.1, momentum=0.9, decay=Constant())
    return Train(objective, **{"optimizer": optimizer, **options, **fields})


# ------------------------------------------------------------------ against a loop by hand


def by_hand(model: nn.Module, teach: nn.Module, seed: int) -> nn.Module:
    """Return the network after label and softened logits, as users write it."""
    teach = copy.deepcopy(teach).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = task().train
    for epoch in range(2):
        model.train()
        for number, batch in enumerate(data.batches(BATCH, seed=seed, epoch=epoch)):
            with torch.no_grad():
                target = (teach(*batch.inputs) / 4).softmax(-1)
            torch.manual_seed(derive(seed, "update", epoch, number))
            outputs = model(*batch.inputs)
            logs = (outputs / 4).log_softmax(-1)
            kl = F.kl_div(logs, target, reduction="batchmean")
            loss = 0.5 * F.cross_entropy(outputs, batch.targets) + 0.5 * 16 * kl
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def close(left: nn.Module, right: nn.Module) -> None:
    for (name, one), two in zip(left.named_parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6, msg=name)


def test_the_loop_is_the_one_that_people_write() -> None:
    both = 0.5 * Label() + 0.5 * Logits(4.0)
    model = trained(short(both), network(), (teacher().train(),))
    close(model, by_hand(network(), teacher(), derive(0, "train", 0)))
    assert not same(model, trained(short(Label()), network(), ()))


def test_a_teacher_changes_no_other_draw() -> None:
    """A term of no weight leaves dropout, order and result as they are."""
    alone = trained(short(Label()), network(), ())
    beside = trained(short(Label() + 0 * Logits()), network(), (teacher(),))
    assert same(alone, beside)


def test_a_teacher_is_read_and_never_changed() -> None:
    teach = teacher().train()
    teach.blocks[0].eval()
    before, modes = copy.deepcopy(teach), [m.training for m in teach.modules()]
    trained(short(Label() + Hidden() + Logits()), network(), (teach,))
    assert same(teach, before)
    assert [m.training for m in teach.modules()] == modes
    assert all(parameter.grad is None for parameter in teach.parameters())


def test_each_teacher_that_is_asked_runs_once_for_a_batch() -> None:
    calls: list[tuple[int, bool, bool]] = []
    teachers = tuple(teacher(seed=n) for n in range(3))
    for index, each in enumerate(teachers):
        each.register_forward_hook(
            lambda m, i, o, index=index: calls.append((index, m.training, o.requires_grad))
        )
    objective = Logits() + Hidden() + Hint("hidden.1", of="hidden.2") + Logits(teacher=2)
    trained(short(objective), network(), teachers)
    assert set(calls) == {(0, False, False), (2, False, False)}
    for index in (0, 2):
        assert sum(call[0] == index for call in calls) == 6 + 1  # updates, and once before


def test_a_teacher_answers_in_the_precision_of_training() -> None:
    """Hazard 13: both under autocast, what is compared in float32."""
    teach, seen = teacher(), []
    teach.last.register_forward_hook(lambda m, i, o: seen.append(o.dtype))

    class Note(Objective):
        @property
        def teachers(self) -> frozenset[int]:
            return frozenset({0})

        def __call__(self, student: Any, teachers: Any, batch: Any, **options: Any) -> Tensor:
            seen.append(teachers[0]["logits"].dtype)
            loss: Tensor = student["logits"].square().mean()
            return loss

    Value._registry[Objective].pop("note")
    trained(short(Note()), network(), (teach,), precision="bfloat16")
    assert seen[2:] == [torch.bfloat16, torch.float32] * 6


@pytest.mark.parametrize("shared", [False, True])
def test_laid_weights_of_a_teacher_do_not_poison_the_student(shared: bool) -> None:
    """Hazard 2: decoded without gradients inside a cache, a weight would not learn."""
    model = network()
    lay(model, "blocks.0.0.weight", Ternary())
    teach = model if shared else copy.deepcopy(model)
    latent = laid_tensors(model)["blocks.0.0.weight"][1]
    before = latent.detach().clone()
    trained(short(Label() + Logits(), epochs=1), model, (teach,))
    assert not torch.equal(latent, before)


def test_laid_and_baked_teachers_teach_the_same() -> None:
    laid = teacher()
    lay(laid, "blocks.0.0.weight", Ternary())
    baked = copy.deepcopy(laid)
    bake(baked)
    results = [trained(short(Logits()), network(), (teach,)) for teach in (laid, baked)]
    assert same(*results)


# ------------------------------------------------------------------ what is learned beside it


HIDDEN = Label() + Hidden(Uniform()) + Logits(2.0)


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


# ------------------------------------------------------------------ a Transformer

TINYBERT = Hidden() + Attention() + Logits(loss="cross_entropy")


def sentences() -> Task:
    """Return padded sentences of random words, labelled by their first word."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 20, (24, 6), generator=generator)
    lengths = torch.randint(3, 7, (24, 1), generator=generator)
    mask = (torch.arange(6) < lengths).long()
    labels = words[:, 0] % 3
    items = [
        {"input_ids": w, "attention_mask": m, "labels": y}
        for w, m, y in zip(words * mask, mask, labels, strict=True)
    ]
    loaders = [DataLoader(part, batch_size=8) for part in (items, items[:8], items[:8])]
    return Task.from_loaders(*loaders, call=lambda model, batch: model(**batch.inputs).logits)


def bert(layers: int, width: int, seed: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=8, num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = transformers.BertForSequenceClassification(config)
        return model


def test_a_small_transformer_learns_all_that_tinybert_teaches() -> None:
    """Another width, half the layers, padded sentences, and sdpa that returns no scores."""
    state = State(bert(2, 8, 0), sentences(), teacher=(bert(4, 16, 1),))
    train = short(TINYBERT, epochs=12, optimizer=AdamW(5e-3))
    loop = _Loop(train, state)
    losses: list[float] = []
    learn = loop.lesson.loss
    loop.lesson.loss = lambda *a: losses.append(float((v := learn(*a)).detach())) or v
    assert loop.lesson.wants.student == {
        "hidden.0", "hidden.1", "hidden.2", "attention.1", "attention.2", "logits",
    }  # fmt: skip
    loop.run()
    assert loop.lesson.learned is not None
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3])


# ------------------------------------------------------------------ what is refused


def test_a_teacher_that_is_not_there_is_refused() -> None:
    with pytest.raises(RunError, match=r"learns from teacher 0, and there are 0.*teacher="):
        trained(short(Logits()), network(), ())
    with pytest.raises(RunError, match="learns from teacher 2, and there are 1"):
        trained(short(Logits() + Logits(teacher=2)), network(), (teacher(),))


@pytest.mark.parametrize(
    ("objective", "teach", "error", "message"),
    [
        (Logits(), {"classes": 5}, FeatureError, r"\[2, 3\] and the teacher's \[2, 5\]"),
        (Hidden(), {"blocks": 1}, FeatureError, "2 layers of the student cannot learn from 1"),
        (Hint("output:nothing"), {}, FeatureError, "no module 'nothing'"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_training(
    objective: Objective, teach: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = network()
    with pytest.raises(error, match=message):
        trained(short(Label() + objective), model, (teacher(**teach),))
    assert same(model, network())


def test_a_teacher_that_cannot_read_the_data_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"steps\.0 \(train\): teacher 0 \(Linear\) cannot read"):
        compress(Blocks(1, 4), task(), [Train(Logits())], teacher=nn.Linear(5, 3), out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_no_network_is_refused(tmp_path: Path) -> None:
    teacher: Any
    for teacher in ("resnet20", ["resnet20"]):
        with pytest.raises(ModelError, match=r"a teacher is a network \(nn\.Module\), got str"):
            compress(Blocks(1, 4), task(), [Train(Logits())], teacher=teacher)
    with pytest.raises(ModelError, match=r"save takes a network .* has a save"):
        save(compress(Blocks(1, 4), None, []), tmp_path / "x")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"load\(model=\) takes a network .*, got str"):
        load(tmp_path / "x", model="net:build")  # type: ignore[arg-type]


def test_a_teacher_that_answers_nonsense_is_refused() -> None:
    teach = teacher()
    with torch.no_grad():
        teach.last.bias[1] = torch.nan
    with pytest.raises(ModelError, match="'logits' of teacher 0 holds NaN or infinity"):
        trained(short(Logits()), network(), (teach,))


# ------------------------------------------------------------------ compress


def recipe(objective: Objective | None = None, **fields: Any) -> Recipe:
    train = short(objective or 0.5 * Label() + 0.5 * Logits(4.0))
    return Recipe([Prune("weights", keep=0.5), train], precision="float32", **fields)


def test_the_original_teaches_unless_another_is_given() -> None:
    plain = compress(network(), task(), recipe())
    itself = compress(network(), task(), recipe(), teacher=network())
    other = compress(network(), task(), recipe(), teacher=network(seed=5))
    assert same(plain.model, itself.model) and not same(plain.model, other.model)
    pair = (network(seed=5), teacher())
    second = compress(network(), task(), recipe(Logits() + Hidden(teacher=1)), teacher=pair)
    assert same(pair[0], network(seed=5)) and same(pair[1], teacher())
    assert pair[0].training and all(p.requires_grad for p in pair[1].parameters())
    assert set(second.model.state_dict()) == set(plain.model.state_dict())


def test_a_copy_is_made_when_it_is_asked_for_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    take = Teachers.__getitem__
    monkeypatch.setattr(
        Teachers, "__getitem__", lambda self, index: asked.append(index) or take(self, index)
    )
    compress(network(), task(), recipe(Label()))
    assert asked == []
    compress(network(), task(), recipe())
    assert set(asked) == {0}
    original = network()
    lay(original, "first.weight", Ternary())
    teachers = Teachers((original,), "cpu")
    assert len(teachers) == 1 and teachers[0] is teachers[0] is teachers[-1]
    assert laid_tensors(teachers[0]) == {} and laid_tensors(original)
    assert not teachers[0].training and not any(p.requires_grad for p in teachers[0].parameters())
    assert list(teachers) == [teachers[0]]


def test_a_teacher_that_the_recipe_names_is_not_forgotten() -> None:
    named = recipe(HIDDEN).model_copy(update={"teacher": ("resnet20",)})
    with pytest.raises(RunError, match="names a teacher, which only the command line loads"):
        compress(network(), task(), named)
    assert compress(network(), task(), named, teacher=teacher()).history


def test_an_index_without_a_teacher_is_refused_before_any_work() -> None:
    class Boom(Step):
        def apply(self, state: State) -> None:
            raise AssertionError

    Value._registry[Step].pop("boom")
    retrain = Prune("weights", keep=0.5, retrain=short(Label() + Logits(teacher=1)))
    with pytest.raises(RunError, match=r"steps.1 \(prune\): an objective learns from teacher 1"):
        compress(network(), task(), [Boom(), retrain])


class Stopped(BaseException):
    """What a test kills a run with, once it has written."""


def stopped(
    out: Path, patch: pytest.MonkeyPatch, made: Recipe | None = None, **options: Any
) -> None:
    write = rundir.Keeper.write

    def write_and_die(self: Any, state: Any, training: dict[str, Any]) -> None:
        write(self, state, training)
        if training:
            raise Stopped

    patch.setattr(rundir.Keeper, "write", write_and_die)
    steps = made or recipe(HIDDEN)
    with pytest.raises(Stopped):
        compress(network(), task(), steps, out=out, checkpoint_seconds=0, **options)
    patch.undo()


def test_a_run_goes_on_with_its_teacher_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compress(network(), task(), recipe(HIDDEN), teacher=teacher(), out=tmp_path / "whole")
    facts = json.loads((tmp_path / "whole" / rundir.RUN).read_text())
    assert facts["teacher"] == [model_hash(teacher())]
    out = tmp_path / "run"
    stopped(out, monkeypatch, teacher=teacher())
    for other in (None, teacher(seed=9), (teacher(), teacher())):
        with pytest.raises(RunError, match="was run with another teacher; resume with that one"):
            compress(network(), task(), recipe(HIDDEN), teacher=other, out=out, resume=True)
    resumed = compress(network(), task(), recipe(HIDDEN), teacher=teacher(), out=out, resume=True)
    assert same(resumed.model, whole.model)
    files = [(folder / rundir.ARTIFACT).read_bytes() for folder in (out, tmp_path / "whole")]
    assert files[0] == files[1]


def test_a_run_goes_on_with_its_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = recipe(Label() + Mutual())
    compress(network(), task(), both, teacher=teacher(), out=tmp_path / "whole")
    stopped(tmp_path / "cut", monkeypatch, made=both, teacher=teacher())
    compress(network(), task(), both, teacher=teacher(), out=tmp_path / "cut", resume=True)
    whole, cut = (tmp_path / name / rundir.ARTIFACT for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


# ------------------------------------------------------------------ a last batch of one, logs


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
    with pytest.raises(TaskError, match="choose a batch of at least 2, not 1"):
        run_step(Train(batch=1), State(network(), task()))
    frozen = Train(scope="last", batch=1)
    run_step(frozen, State(network(), task(4)))  # its norm has statistics to use


def test_epochs_are_told_to_those_who_debug(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="laconic"):
        prune = Prune("weights", keep=0.5)
        compress(network(), task(), [prune, short(Label(), stop=Stop())])
    lines = {
        level: [r for r in caplog.records if r.levelname == level] for level in ("INFO", "DEBUG")
    }
    assert [r.getMessage().partition(":")[0] for r in lines["INFO"]] == [
        "original",
        "prune",
        "train",
    ]
    assert sum("epoch" in r.getMessage() for r in lines["DEBUG"]) == 2
