"""Checkpoints: exact to the last bit, and refused in words where they do not fit."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laconic.errors import ArtifactError, RunError
from laconic.models import digits_cnn
from laconic.ship import load, save
from laconic.ship.checkpoint import load_checkpoint, model_hash, save_checkpoint
from laconic.ship.container import raw_bytes, read, write
from laconic.step import State, members
from laconic.structure.surgery import edits_of, keep_, replace_, resize_
from laconic.weights import Float, KMeans, Representation, Symmetric, Ternary, bake, lay
from laconic.weights.laid import laid_tensors, tie_, ties_of


class Network(nn.Module):
    """Tied weights, a norm, a module in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.decoder = nn.Embedding(9, 8), nn.Linear(8, 9)
        self.decoder.weight = self.table.weight
        self.norm = nn.BatchNorm1d(8)
        self.block = nn.Linear(8, 8)
        self.again = self.block

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.again(self.block(self.table(tokens))).relu()
        return self.decoder(self.norm(hidden))


def network(seed: int = 0) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Network()


def laid() -> Network:
    model = network()
    lay(model, "table.weight", KMeans(3), mask=torch.arange(72).reshape(9, 8) % 3 > 0)
    lay(model, "block.weight", Symmetric(4, rounding="stochastic", range="mse"))
    lay(model, "block.bias", Ternary())
    lay(model, "decoder.bias", Float(), mask=torch.arange(9) > 3)
    return model


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Train a little, as a training loop does."""
    tokens = torch.arange(36).reshape(36) % 9
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(tokens), (tokens + 1) % 9).backward()
        optimizer.step()
        for layer in dict.fromkeys(layer for layer, _ in laid_tensors(model).values()):
            layer.update()


def payload(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    tensors = {
        f"{index}/{key}": torch.as_tensor(value)
        for index, slots in optimizer.state_dict()["state"].items()
        for key, value in slots.items()
    }
    return {"counters": {"epoch": 3, "best_score": [0.1, -1e-300]}, "tensors": tensors}


def restore(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition("/")
        slots.setdefault(int(index), {})[key] = tensor
    whole = optimizer.state_dict()
    optimizer.load_state_dict({**whole, "state": slots})


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and bytes(raw_bytes(left[name])) == bytes(raw_bytes(right[name]))
        for name in left
    )


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Path, Network, torch.optim.Optimizer]:
    model = laid()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    trained(model, optimizer, 5)
    state = State(model, position=[2, 1])
    save_checkpoint(state, payload(optimizer), tmp_path / "a", run={"step": 2, "note": "ü"})
    return tmp_path / "a", model, optimizer


def test_training_goes_on_as_if_nothing_had_happened(kept):
    path, model, optimizer = kept
    state = State(network(1))
    run = load_checkpoint(state, path)
    assert run == {"step": 2, "note": "ü"}
    assert state.saved == [2, 1]
    assert state.training["counters"] == {"epoch": 3, "best_score": [0.1, -1e-300]}
    assert same(state.model.state_dict(), model.state_dict())
    other = torch.optim.AdamW(state.model.parameters(), lr=0.05)
    restore(other, state.training["tensors"])
    trained(model, optimizer, 4)
    trained(state.model, other, 4)
    assert same(state.model.state_dict(), model.state_dict())


def test_what_is_tied_or_shared_stays_so(kept):
    path, _, _ = kept
    state = State(network(1))
    load_checkpoint(state, path)
    layers = laid_tensors(state.model)
    assert layers["table.weight"][0] is layers["decoder.weight"][0]
    assert layers["table.weight"][1] is layers["decoder.weight"][1]
    assert state.model.again is state.model.block
    assert len(list(state.model.parameters())) == len(list(laid().parameters()))


def test_the_artefacts_of_both_are_the_same_bytes(kept, tmp_path):
    path, model, _ = kept
    state = State(network(1))
    load_checkpoint(state, path)
    save(model, tmp_path / "b")
    save(state.model, tmp_path / "c")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


@pytest.mark.parametrize("name", members(Representation, every=True))
@pytest.mark.parametrize("masked", [False, True])
def test_every_representation_comes_back(name, masked, tmp_path):
    model = network()
    mask = torch.rand(8, 8) < 0.5 if masked else None
    lay(model, "block.weight", members(Representation)[name](), mask=mask)
    for layer, _ in laid_tensors(model).values():
        layer.update()
    save_checkpoint(State(model), {}, tmp_path / "a", run={})
    state = State(network(1))
    load_checkpoint(state, tmp_path / "a")
    assert state.training == {}
    assert same(state.model.state_dict(), model.state_dict())
    found, expected = laid_tensors(state.model), laid_tensors(model)
    assert found["block.weight"][0].representation == expected["block.weight"][0].representation
    assert torch.equal(state.model.block.weight, model.block.weight)


def test_a_plain_network_and_odd_tensors(tmp_path):
    model = nn.Linear(3, 2)
    model.register_buffer("generator", torch.get_rng_state())
    model.register_buffer("infinite", torch.tensor([torch.inf, -torch.inf, torch.nan]))
    model.register_buffer("none", torch.zeros(0, 5))
    model.register_buffer("scalar", torch.tensor(-0.0, dtype=torch.float64))
    model.weight = nn.Parameter(torch.arange(60.0).reshape(6, 10).t()[2:4, 1:4])
    shared = torch.arange(6.0)
    training = {"counters": {}, "tensors": {"a": shared, "b": shared, "c": shared[2:]}}
    save_checkpoint(State(model), training, tmp_path / "a", run={})
    other = copy.deepcopy(model)
    for tensor in other.state_dict().values():
        tensor.zero_()
    state = State(other)
    load_checkpoint(state, tmp_path / "a")
    assert same(other.state_dict(), model.state_dict())
    assert same(state.training["tensors"], training["tensors"])


def test_the_same_state_is_the_same_bytes(kept, tmp_path):
    path, model, optimizer = kept
    state = State(model, position=[2, 1])
    run = {"note": "ü", "step": 2}
    save_checkpoint(state, payload(optimizer), tmp_path / "b", run=run)
    assert path.read_bytes() == (tmp_path / "b").read_bytes()


def test_damage_is_said(kept):
    path, _, _ = kept
    data, generator = path.read_bytes(), random.Random(0)
    for _ in range(200):
        damaged = bytearray(data)
        damaged[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=str(path)):
            load_checkpoint(State(network()), path)
    for length in (0, 7, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError, match=str(path)):
            load_checkpoint(State(network()), path)


def wider() -> nn.Module:
    model = network()
    model.block = model.again = nn.Linear(8, 12)
    return model


@pytest.mark.parametrize("make", [wider, lambda: nn.Linear(3, 2), nn.Identity])
def test_another_network_is_refused(make, kept):
    path, _, _ = kept
    with pytest.raises(
        RunError, match=r"(?s)does not fit this network .*; resume with the network"
    ):
        load_checkpoint(State(make()), path)


def test_an_artefact_is_no_checkpoint_and_the_other_way_round(kept, tmp_path):
    path, model, _ = kept
    save(model, tmp_path / "b")
    with pytest.raises(ArtifactError, match=r"no checkpoint of a run; laconic.load reads"):
        load_checkpoint(State(network()), tmp_path / "b")
    with pytest.raises(ArtifactError, match="a checkpoint is no artefact"):
        load(path)


def test_what_json_has_not_is_refused_before_the_old_one_is_lost(kept):
    path, model, _ = kept
    before = path.read_bytes()
    for run in ({"score": float("nan")}, {"set": {1}}):
        with pytest.raises(ArtifactError, match="cannot be written as JSON"):
            save_checkpoint(State(model), {}, path, run=run)
    assert path.read_bytes() == before


def test_the_hash_of_a_network_sees_everything():
    model = network()
    before = model_hash(model)
    assert model_hash(copy.deepcopy(model)) == before == model_hash(network())
    with torch.no_grad():
        model.norm.running_mean[0] = -0.0
    assert model_hash(model) != before
    other = network()
    other.norm.num_batches_tracked += 1
    assert model_hash(other) != before
    assert model_hash(nn.Linear(3, 2)) != model_hash(nn.Linear(2, 3))


def edited(model: nn.Module) -> None:
    """Drop a block, put another layer in the place of one, and cut a laid weight."""
    keep_(model, "", [0, 1, 3])
    replace_(model, "1", nn.GELU())
    lay(model, "0.weight", Float(), mask=torch.eye(4).bool())
    latent = dict(model.named_parameters())["0.parametrizations.weight.original"]
    laid_tensors(model)["0.weight"][0].mask = torch.ones(3, 4, dtype=torch.bool)
    resize_(model, "0.parametrizations.weight.original", latent[:3])
    resize_(model, "0.bias", model[0].bias[:3])
    resize_(model, "2.weight", model[2].weight[:, :3])


def test_an_edited_network_comes_back(tmp_path):
    def original() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Tanh(), nn.Linear(4, 2))

    with torch.random.fork_rng():
        model, again = original(), original()
    edited(model)
    save_checkpoint(State(model), {}, tmp_path / "checkpoint", run={})
    state = State(again)
    load_checkpoint(state, tmp_path / "checkpoint")
    assert edits_of(state.model) == edits_of(model) != {}
    inputs = torch.eye(4)
    assert torch.equal(state.model(inputs), model(inputs))
    assert isinstance(state.model[1], nn.GELU) and state.model[0].weight.shape == (3, 4)


def test_types_and_frozen_parameters_of_what_was_put_in_come_back(tmp_path):
    def original() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double()
        model[2].weight.requires_grad_(False)
        return model

    model = original()
    replace_(model, "0", nn.Linear(4, 4).double())
    model[0].bias.requires_grad_(False)
    save_checkpoint(State(model), {}, tmp_path / "checkpoint", run={})
    state = State(original())
    load_checkpoint(state, tmp_path / "checkpoint")
    assert {tensor.dtype for tensor in state.model.parameters()} == {torch.float64}
    frozen = [name for name, p in state.model.named_parameters() if not p.requires_grad]
    assert frozen == ["0.bias", "2.weight"]
    assert torch.equal(state.model(torch.eye(4).double()), model(torch.eye(4).double()))


def test_a_run_may_begin_with_a_network_that_is_cut_and_laid(tmp_path):
    def start() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Tanh(), nn.Linear(4, 2))
        edited(model)
        return model

    model = start()
    bake(model)
    lay(model, "2.weight", Ternary())
    keep_(model, "", [0, 2])
    save_checkpoint(State(model), {}, tmp_path / "checkpoint", run={})
    state = State(start())
    load_checkpoint(state, tmp_path / "checkpoint")
    assert list(laid_tensors(state.model)) == ["1.weight"]
    assert torch.equal(state.model(torch.eye(4)), model(torch.eye(4)))


def test_what_a_step_tied_stays_tied(tmp_path):
    def original() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, again = original(), original()
    tie_(model, {"1.weight": "0.weight", "2.bias": "1.bias"})
    lay(model, "0.weight", Ternary())
    save_checkpoint(State(model), {}, tmp_path / "checkpoint", run={})
    load_checkpoint(State(again), tmp_path / "checkpoint")
    assert ties_of(again) == ties_of(model) == {"1.weight": "0.weight", "2.bias": "1.bias"}
    assert list(laid_tensors(again)) == list(laid_tensors(model)) == ["0.weight", "1.weight"]
    assert torch.equal(again(torch.eye(4)), model(torch.eye(4)))


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    save_checkpoint(State(digits_cnn()), {}, tmp_path / "checkpoint", run={"step": 1})
    manifest, tensors = read(tmp_path / "checkpoint")
    del manifest["activations"]
    write(tmp_path / "checkpoint", manifest, tensors)
    with pytest.raises(ArtifactError, match="no checkpoint of a run"):
        load_checkpoint(State(digits_cnn()), tmp_path / "checkpoint")
