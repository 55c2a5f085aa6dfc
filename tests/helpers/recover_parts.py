"""A chain of blocks, small encoders, their tasks, and Reconstruct's parts run on them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laconic.recover import Adam, Gradient, Reconstruct
from laconic.step import State, run_step
from laconic.tasks import Batch, Task
from laconic.weights import Quantize

TOKENS, WORDS, EXAMPLES = 6, 30, 20


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
