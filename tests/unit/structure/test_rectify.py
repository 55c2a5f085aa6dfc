"""ReLU for smooth activations, and the chance of dropout: what changes, files, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from laconic import load, save
from laconic.errors import RecipeError, ScopeError
from laconic.recipe import Recipe
from laconic.recover import SGD, Logits, Train
from laconic.run import compress
from laconic.scope import Scope
from laconic.step import State, Step, run_step
from laconic.structure import Rectify, SetDropout, Unpack
from laconic.tasks import Task


class Net(nn.Module):
    """Two blocks with a smooth activation, dropout, and one activation that both have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.smooth, self.shared = nn.GELU(), nn.SiLU()
        self.again, self.gate, self.drop = self.shared, nn.Tanh(), nn.Dropout(0.5)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.smooth(self.first(x)))
        return self.last(self.gate(self.again(self.shared(self.second(hidden)))))


def network() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


def task() -> Task:
    generator = torch.Generator().manual_seed(0)
    pair = (torch.randn(24, 6, generator=generator), torch.arange(24) % 3)
    return Task(pair, pair, pair)


def after(step: Step, model: nn.Module | None = None) -> nn.Module:
    state = State(model or network(), task())
    step.check(state.model, state.task)
    run_step(step, state)
    return state.model


def test_smooth_activations_become_relu_everywhere_and_others_stay() -> None:
    model = after(Rectify())
    assert isinstance(model, Net)
    assert type(model.smooth) is type(model.shared) is nn.ReLU
    assert model.again is model.shared and type(model.gate) is nn.Tanh
    part = after(Rectify(scope=Scope("smooth")))
    assert isinstance(part, Net)
    assert type(part.smooth) is nn.ReLU and type(part.shared) is nn.SiLU


def test_a_rectified_network_is_what_a_file_holds(tmp_path: Path) -> None:
    model, inputs = after(Rectify()), torch.randn(4, 6)
    save(model, tmp_path / "net")
    assert torch.equal(load(tmp_path / "net", model=network())(inputs), model(inputs))
    assert not torch.equal(network()(inputs), model(inputs))


def test_networks_of_other_libraries_are_rectified() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
    )
    model = after(Rectify(), transformers.BertForSequenceClassification(config).eval())
    for name in ("0.intermediate", "1.intermediate"):
        inner = model.get_submodule(f"bert.encoder.layer.{name}.intermediate_act_fn")
        assert type(inner) is nn.ReLU
    assert type(model.get_submodule("bert.pooler.activation")) is nn.Tanh


def test_the_teacher_keeps_its_activations() -> None:
    """A network that learned from itself as it is now would have nothing to learn."""
    learn = Train(Logits(loss="l2"), batch=8, optimizer=SGD(0.1))
    steps = [SetDropout(0), Rectify(), learn]
    found = compress(network(), task(), steps).model.state_dict()
    assert not torch.equal(found["last.weight"], network().state_dict()["last.weight"])


def test_every_dropout_gets_the_chance() -> None:
    model = nn.Sequential(nn.Dropout(0.1), nn.Linear(6, 3), nn.Dropout2d(0.5))
    found = after(SetDropout(0.25, scope=Scope("0, 2")), model)
    assert [repr(found.get_submodule(name)) for name in ("0", "2")] == [
        "Dropout(p=0.25, inplace=False)",
        "Dropout2d(p=0.25, inplace=False)",
    ]


def test_training_with_a_chance_of_zero_is_that_of_a_network_without_dropout() -> None:
    def trained(model: Net) -> Tensor:
        state = State(model, task())
        run_step(Train(batch=8, optimizer=SGD(0.1)), state)
        return state.model.get_parameter("first.weight").detach()

    without = network()
    without.drop = nn.Dropout(0.0)
    wanted = trained(without)
    assert torch.equal(trained(cast("Net", after(SetDropout(0)))), wanted)
    assert not torch.equal(trained(network()), wanted)


def test_what_selects_nothing_is_refused() -> None:
    with pytest.raises(ScopeError, match="rectify: 'kind:linear' selects no module such as GELU"):
        Rectify(scope=Scope("kind:linear")).check(network(), task())
    with pytest.raises(ScopeError, match=r"set_dropout: 'last' selects no nn\.Dropout"):
        SetDropout(0, scope=Scope("last")).check(network(), task())
    with pytest.raises(RecipeError, match="chance: input should be less than or equal to 1"):
        Recipe.parse("steps: [set_dropout: 2]")


def test_a_gate_is_no_activation() -> None:
    class SwishGLU(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return nn.functional.silu(first) * second

    model = nn.Sequential(nn.Linear(6, 16), SwishGLU(), nn.Linear(8, 3), nn.SiLU())
    found = after(Rectify(), model)
    assert [type(found.get_submodule(name)) for name in "13"] == [SwishGLU, nn.ReLU]


@pytest.mark.filterwarnings("ignore:.*nested tensor.*")
def test_the_fused_forward_of_torch_is_rectified_too(tmp_path: Path) -> None:
    def build() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            block = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.GELU(), batch_first=True)
            return nn.Sequential(block).eval()

    inputs = torch.randn(2, 5, 8)
    model = build()
    Rectify().apply(State(model))
    save(model, tmp_path / "net")
    for each in (model, load(tmp_path / "net", model=build())):
        with torch.no_grad():
            fused = each(inputs)
        torch.testing.assert_close(fused, each(inputs))


def test_the_dropout_of_unpacked_attention_is_set_and_kept(tmp_path: Path) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return cast("Tensor", self.attention(x, x, x)[0])

    state = State(Attending())
    for step in (Unpack(), SetDropout(0)):
        step.check(state.model, None)
        step.apply(state)
    inputs = torch.randn(2, 5, 8)
    save(state.model, tmp_path / "net")
    for model in (state.model.train(), load(tmp_path / "net", model=Attending()).train()):
        assert torch.equal(model(inputs), model(inputs))
