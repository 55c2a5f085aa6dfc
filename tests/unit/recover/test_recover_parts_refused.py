"""Reconstruct's parts: networks, recipes, teachers and losses that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.recover_parts import Block, Chain, chain, encoder, quantised, step, task, texts
from laconic.errors import ChainError, ModelError, RecipeError, RunError, ScopeError
from laconic.recover import SGD, Gradient, LeastSquares, ProximalWeights, Reconstruct
from laconic.scope import Scope
from laconic.step import State, run_step
from laconic.weights import LossAware, Quantize


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
