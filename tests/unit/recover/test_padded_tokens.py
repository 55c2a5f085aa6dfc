"""Logits of every token, and layers that tokens enter: what is padding does not count."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laconic.errors import FeatureError
from laconic.models.capture import Features
from laconic.recover import (
    SGD,
    Annealing,
    Hidden,
    LeastSquares,
    Logits,
    Mutual,
    Objective,
    Reconstruct,
    Stop,
    Train,
)
from laconic.recover.distill import reduced
from laconic.recover.lesson import Lesson
from laconic.step import State, run_step
from laconic.tasks import Task

LENGTHS = torch.tensor([3, 7, 1, 5, 2, 6])
REAL = torch.arange(7) < LENGTHS[:, None]


class Tagger(nn.Module):
    """Tokens [batch, tokens] -> a score of every class for each of them."""

    def __init__(self, *, tokens_first: bool = False) -> None:
        super().__init__()
        self.tokens_first = tokens_first
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.last = nn.Linear(6, 3)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embedding(ids.T if self.tokens_first else ids)
        for block in self.blocks:
            hidden = block(hidden)
        scores: Tensor = self.last(hidden)
        return scores.transpose(0, 1) if self.tokens_first else scores


def tagger(seed: int = 0, **options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Tagger(**options)


def tagging() -> Task:
    ids = torch.randint(1, 11, REAL.shape, generator=torch.Generator().manual_seed(0))
    inputs = {"ids": ids.where(REAL, 0), "attention_mask": REAL.long()}
    tags = inputs["ids"] % 3
    pair = inputs, tags
    return Task(pair, pair, pair)


def features(logits: Tensor, mask: Tensor | None = None) -> Features:
    return Features({"logits": logits} | ({} if mask is None else {"mask": mask}))


@pytest.mark.parametrize(
    "objective",
    [Logits(2.0), Logits(loss="l1", reduction="elements"), Annealing(3), Mutual()],
    ids=lambda objective: objective.words,
)
def test_what_padding_answers_teaches_nothing(objective: Objective) -> None:
    draws = torch.Generator().manual_seed(0)
    own, other, noise = torch.randn(3, *REAL.shape, 3, generator=draws)
    compare: Any = getattr(objective, "compare")  # noqa: B009  of what is taught alone
    plain, changed = (
        compare(features(each, REAL), features(other, REAL))
        for each in (own, own + 9 * noise * ~REAL[..., None])
    )
    assert torch.equal(plain, changed)
    every = compare(*(features(each[REAL]) for each in (own, other)))  # each token an example
    torch.testing.assert_close(plain, every)


def test_values_without_tokens_are_averaged_whole() -> None:
    values = torch.rand(6, 4)
    assert torch.equal(reduced(values, "batch", REAL), values.sum(dim=1).mean())


def test_tags_are_learned_the_same_from_what_is_recalled() -> None:
    found = []
    train = Train(Logits(2.0), epochs=3, batch=4, optimizer=SGD(0.5), stop=Stop(keep="last"))
    for limit in (0, 1 << 20):
        state = State(tagger(1), tagging(), teacher=(tagger(2),), recall=limit)
        run_step(train, state)
        found.append(dict(state.model.named_parameters()))
    torch.testing.assert_close(found[0], found[1])


def test_tokens_before_examples_are_refused_where_some_are_padding() -> None:
    task, network = tagging(), tagger(tokens_first=True)
    state = State(network, task, teacher=(copy.deepcopy(network),))
    with pytest.raises(FeatureError, match=r"'hidden\.\d' is \[\d, 2, 6\].*batch_first=True"):
        Lesson(Hidden(), state, task)
    with pytest.raises(FeatureError, match=r"'blocks\.0' is \[\d, 2, 6\].*batch_first=True"):
        run_step(Reconstruct(solve=LeastSquares(), scope="blocks.*"), state)
    batch_first = tagger()
    state = State(batch_first, task, teacher=(copy.deepcopy(batch_first),))
    run_step(Reconstruct(solve=LeastSquares(), scope="blocks.*"), state)
