"""Training from teachers: the loop by hand, what stays untouched, a Transformer, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers.teacher import BATCH, Blocks, close, network, short, task, teacher, trained
from helpers.tensors import same
from laconic import compress, load, save
from laconic.errors import FeatureError, ModelError, RunError, TaskError
from laconic.recover import AdamW, Attention, Hidden, Hint, Label, Logits, Objective, Train
from laconic.recover.train import _Loop
from laconic.step import State, Value, derive
from laconic.tasks import Task
from laconic.weights import Ternary, bake, lay
from laconic.weights.laid import laid_tensors

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
