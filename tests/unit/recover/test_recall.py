"""What teachers answered once: kept by example, cut to its tokens, used in every epoch."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laconic import compress, rundir
from laconic.errors import FeatureError, RecipeError
from laconic.models.capture import Features, observe
from laconic.recipe import Recipe
from laconic.recover import (
    SGD,
    Attention,
    Hidden,
    Hint,
    Label,
    Logits,
    Objective,
    Stop,
    Train,
    recall,
)
from laconic.recover.lesson import Lesson
from laconic.recover.recall import Recall
from laconic.step import State
from laconic.tasks import Arrays, Batch, Task
from laconic.tasks.task import evaluation

EXAMPLES, PLENTY = 70, 10**9  # more than teachers answer at once


def images(**options: Any) -> Task:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(EXAMPLES, 6, generator=generator)
    held = inputs[:9], torch.arange(9) % 3
    return Task(Arrays(inputs, torch.arange(EXAMPLES) % 3, **options), held, held)


def network(width: int, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))


class Counting(nn.Module):
    """A network that counts the examples it was asked."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.asked = inner, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.asked += len(inputs)
        outputs: Tensor = self.inner(inputs)
        return outputs


BOTH = Label() + Logits(2.0)


def train(objective: Objective = BOTH) -> Train:
    return Train(objective, epochs=3, batch=16, optimizer=SGD(0.1), stop=Stop(keep="last"))


def taught(task: Task, *, recall: int, teacher: nn.Module | None = None) -> nn.Module:
    """Return the network after a training from its teacher."""
    model = network(4, seed=1)
    train().apply(State(model, task, teacher=(teacher or network(8, seed=2),), recall=recall))
    return model


def largest_difference(left: nn.Module, right: nn.Module) -> float:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max(float((one - two).detach().abs().max()) for one, two in pairs)


def test_a_teacher_answers_every_example_once() -> None:
    teacher, asked_always = Counting(network(8, seed=2)), Counting(network(8, seed=2))
    once = taught(images(), recall=PLENTY, teacher=teacher)
    always = taught(images(), recall=0, teacher=asked_always)
    assert teacher.asked == EXAMPLES + 2  # two to see what they answer at all
    assert asked_always.asked == 3 * EXAMPLES + 2
    assert largest_difference(once, always) < 1e-6


def test_in_one_epoch_there_is_nothing_to_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recall, "note", lambda *_: pytest.fail("kept for nobody"))
    state = State(network(4, 1), images(), teacher=(network(8, 2),), recall=PLENTY)
    train().model_copy(update={"epochs": 1}).apply(state)


def test_what_does_not_fit_is_not_recalled(caplog: pytest.LogCaptureFixture) -> None:
    bytes_needed = EXAMPLES * (3 * 4 + recall.BESIDE)
    with caplog.at_level(logging.WARNING):
        small = taught(images(), recall=bytes_needed - 1)
    assert f"more than {bytes_needed - 1} bytes" in caplog.text
    assert largest_difference(small, taught(images(), recall=0)) == 0
    caplog.clear()
    taught(images(), recall=bytes_needed)
    assert not caplog.records


def test_augmented_examples_are_asked_for_every_time(caplog: pytest.LogCaptureFixture) -> None:
    def noisy(inputs: Tensor, generator: torch.Generator) -> Tensor:
        return inputs + torch.randn(inputs.shape, generator=generator)

    task = images(augment=noisy)
    with caplog.at_level(logging.INFO):
        found = taught(task, recall=PLENTY)
    assert "nothing is recalled; examples are augmented" in caplog.text
    assert largest_difference(found, taught(task, recall=0)) == 0


def test_an_interrupted_run_recalls_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(BaseException):
        pass

    write = rundir.Keeper.write

    def write_and_die(self: Any, state: State, training: dict[str, Any]) -> None:
        write(self, state, training)
        if training.get("counters", {}).get("epoch") == 1:
            raise Stopped

    recipe, lent = Recipe((train(),), recall="1 MB"), network(8, seed=2)

    def compressed(out: Path, **options: Any) -> bytes:
        compress(network(4, 1), images(), recipe, teacher=lent, out=out, **options)
        return (out / rundir.ARTIFACT).read_bytes()

    whole = compressed(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(rundir.Keeper, "write", write_and_die)
        with pytest.raises(Stopped):
            compressed(tmp_path / "cut", checkpoint_seconds=0)
    assert compressed(tmp_path / "cut", resume=True) == whole


@pytest.mark.parametrize("text", ["much", "2", "2 TB", "-1 GB"])
def test_an_amount_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=f"recipe:1: recall.*'{text}' is no amount of memory"):
        Recipe.parse(f"recall: '{text}'\nsteps: [recalibrate]")


# ------------------------------------------------------------------ texts of several lengths


def texts() -> Task:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, **{f"w{i}": i + 1 for i in range(20)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[PAD]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    sentences = [" ".join(f"w{(i * k) % 20}" for k in range(1 + i % 7)) for i in range(20)]
    pairs = [(sentence, i % 2) for i, sentence in enumerate(sentences)]
    return Task.from_texts(pairs, pairs, tokenizer, validate=pairs, max_length=8)


def encoder(seed: int = 0) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=21,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=16,
        max_position_embeddings=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = transformers.BertForSequenceClassification(config)
    return model.eval()


NAMES = ("hidden.0", "hidden.2", "attention.1", "query.1", "value.2")


def test_features_of_texts_come_back_in_any_other_batch() -> None:
    task, model, recall = texts(), encoder(), Recall(PLENTY)
    with evaluation(model):
        for batch in task.train.any_order(6):
            recall.note(batch, observe(task, model, batch, NAMES))
        for batch in task.train.batches(5, seed=3):
            fresh, kept = observe(task, model, batch, NAMES), recall.features(batch)
            assert kept.keys() == fresh.keys() and kept.layers == fresh.layers
            real = fresh["mask"]
            for name in ("hidden.0", "hidden.2"):
                torch.testing.assert_close(kept[name][real], fresh[name][real])
                assert not kept[name][~real].any()
            pairs = (real[:, None, :, None] & real[:, None, None, :]).expand(-1, 3, -1, -1)
            torch.testing.assert_close(kept["attention.1"][pairs], fresh["attention.1"][pairs])
            heads = real[:, None, :].expand(-1, 3, -1)
            for name in ("query.1", "value.2"):
                torch.testing.assert_close(kept[name][heads], fresh[name][heads])


def test_a_student_learns_the_same_from_what_is_recalled() -> None:
    objective = Logits(loss="cross_entropy") + Hidden() + Attention()
    task, losses = texts(), []
    for limit in (0, PLENTY):
        student, teacher = encoder(1), encoder(2)
        lesson = Lesson(objective, State(student, task, teacher=(teacher,), recall=limit), task)
        batches = task.train.batches(5, seed=0)
        losses.append([lesson.loss(batch, lesson.teach(batch, 0), 0.0) for batch in batches])
    torch.testing.assert_close(losses[0], losses[1])


def test_texts_padded_on_the_left_come_back_as_well() -> None:
    ids = torch.tensor([[0, 0, 3, 4], [0, 5, 6, 7], [1, 2, 3, 4]])
    inputs, labels = {"input_ids": ids, "attention_mask": (ids > 0).long()}, torch.arange(3) % 2
    task, model, recall = Task((inputs, labels), (inputs, labels)), encoder(), Recall(PLENTY)
    batch = next(iter(task.train.batches(3)))
    names = ("hidden.1", "attention.1")
    with evaluation(model):
        fresh = observe(task, model, batch, names)
    recall.note(batch, fresh)
    kept, real = recall.features(batch), fresh["mask"]
    assert torch.equal(kept["hidden.1"][real], fresh["hidden.1"][real])
    pairs = (real[:, None, :, None] & real[:, None, None, :]).expand(-1, 3, -1, -1)
    assert torch.equal(kept["attention.1"][pairs], fresh["attention.1"][pairs])


def test_a_feature_whose_tokens_are_not_known_is_refused() -> None:
    task, teacher = texts(), encoder()
    state = State(copy.deepcopy(teacher), task, teacher=(teacher,), recall=PLENTY)
    with pytest.raises(FeatureError, match=r"cannot be kept.*learn from hidden.N instead"):
        Lesson(Hint("output:bert.encoder.layer.0"), state, task)


def test_an_example_has_one_index_in_every_epoch() -> None:
    for split in (images().train, texts().train):
        seen: dict[int, Tensor] = {}
        for epoch in range(2):
            for batch in split.batches(8, seed=0, epoch=epoch):
                assert batch.index is not None and batch.targets is not None
                values = batch.inputs[0] if isinstance(batch.inputs, tuple) else batch.targets
                for key, value in zip(batch.index.tolist(), values, strict=True):
                    assert torch.equal(seen.setdefault(key, value), value)
        assert len(seen) == len(split)
        index = split.subset([5, 2]).example(2).index
        assert index is not None and index.tolist() == [5, 2]


def test_nothing_is_kept_beyond_the_limit() -> None:
    recall = Recall(7)
    recall.note(
        Batch((torch.zeros(2, 1),), index=torch.arange(2)),
        Features({"logits": torch.zeros(2, 1)}),
    )
    assert recall.full and not recall.kept
