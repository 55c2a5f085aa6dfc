"""Factorize: what replaces a layer, what is kept of it, and how a recipe writes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers.factorize import CLOSE, CONV, LINEAR, factorized, images, network, split, task
from laconic.errors import ScopeError
from laconic.models import digits_cnn
from laconic.models.factored import BlockDiagonalLinear, BlockTermLinear, TTLinear
from laconic.recipe import Recipe
from laconic.scope import Scope
from laconic.ship import load, save
from laconic.step import State, run_step
from laconic.structure.factorization import Factorization
from laconic.structure.factorize import Factorize
from laconic.structure.kernels import Tucker2
from laconic.structure.matrices import SVD, BlockDiagonal, Embedding, TensorTrain
from laconic.structure.surgery import apply_edits_, edits_of
from laconic.weights import Quantize, Symmetric, lay
from laconic.weights.laid import laid_tensors


@pytest.mark.parametrize("method", LINEAR, ids=repr)
def test_every_method_splits_linear_layers(method: Factorization) -> None:
    model = factorized(Factorize(method, scope=Scope("5")))
    made = model[5]
    kinds = {"tensor_train": TTLinear, "block_term": BlockTermLinear}
    assert isinstance(made, kinds.get(method.name, (nn.Sequential, BlockDiagonalLinear)))
    assert not made.training
    assert model(images(2, 4, 9, 9)).shape == (2, 6)
    plain = network()
    for name in ("0.weight", "2.weight", "7.weight"):
        assert torch.equal(model.get_parameter(name), plain.get_parameter(name))


@pytest.mark.parametrize("method", CONV, ids=repr)
def test_every_method_splits_convolutions(method: Factorization) -> None:
    model = factorized(Factorize(method, scope=Scope("0")))
    assert type(model[0]) in (nn.Sequential, nn.Conv2d)
    with torch.no_grad():
        before, after = network()[0](images(2, 4, 9, 9)), model[0](images(2, 4, 9, 9))
    assert before.shape == after.shape
    assert float((after - before).norm() / before.norm()) < 1


@pytest.mark.parametrize("method", [*LINEAR, *CONV], ids=repr)
def test_the_file_can_rebuild_what_was_made(method: Factorization) -> None:
    scope = Scope("5" if method in LINEAR else "0")
    model, again = factorized(Factorize(method, scope=scope)), network()
    apply_edits_(again, edits_of(model), {})
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images(2, 4, 9, 9)), model(images(2, 4, 9, 9)))


def test_a_saved_network_computes_the_same(tmp_path: Path) -> None:
    model = digits_cnn()
    steps = {
        "conv2": Tucker2((12, 8)),
        "conv3": BlockDiagonal(2, order="energy"),
        "fc1": TensorTrain(6),
    }
    for name, method in steps.items():
        run_step(Factorize(method, scope=Scope(name)), State(model))
    run_step(Quantize(4, scope=Scope("fc1, conv2.*")), State(model))
    save(model, tmp_path / "model.safetensors")
    x = images(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "model.safetensors")(x), model.eval()(x))


def test_bias_type_mode_and_what_may_move_are_kept() -> None:
    model = network().double().train()
    model[5].weight.requires_grad_(False)
    bias = model[5].bias
    factorized_task = task()
    for name, method in {"5": SVD(3), "7": TensorTrain(1), "0": Tucker2((2, 2))}.items():
        run_step(Factorize(method, scope=Scope(name)), State(model))
    assert model[5][1].bias is bias
    assert [p.requires_grad for p in model[5].parameters()] == [False, False, True]
    assert all(p.requires_grad for p in model[0].parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert len(factorized_task.train) > 0


def test_a_bias_shared_with_another_layer_stays_shared() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].bias = model[0].bias
    run_step(Factorize(SVD(2)), State(model))
    assert model[0][1].bias is model[1][1].bias


def test_a_reordered_bias_follows_its_rows() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4, 4)
    linear.weight.data.copy_(torch.eye(4)[torch.tensor([2, 0, 3, 1])])
    linear.bias.data.copy_(torch.arange(4.0))
    linear.bias.requires_grad_(False)
    made = split(BlockDiagonal(2, order="energy"), linear)
    assert torch.allclose(made(images(3, 4)), linear(images(3, 4)), atol=CLOSE)
    assert [p.requires_grad for name, p in made.named_parameters() if "bias" in name] == [False]


def test_a_laid_weight_is_split_as_the_network_computes_it() -> None:
    model = network()
    mask = torch.rand(24, 32) < 0.5
    lay(model, "5.weight", Symmetric(3), mask=mask)
    lay(model, "7.weight", Symmetric(4))
    computed = model[5].weight.detach()
    run_step(Factorize(SVD(13), scope=Scope("5")), State(model))
    a, b = model[5][1].weight.detach(), model[5][0].weight.detach()
    values = torch.linalg.svdvals(computed.double())
    lost = float((a.double() @ b.double() - computed.double()).square().sum())
    assert lost == pytest.approx(float((values[13:] ** 2).sum()), rel=1e-3)
    assert list(laid_tensors(model)) == ["7.weight"]
    assert bool((a != 0).all())


def test_a_laid_bias_is_kept_as_it_is_computed() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    lay(model, "0.bias", Symmetric(2))
    computed = model[0].bias.detach().clone()
    run_step(Factorize(SVD(2)), State(model))
    assert torch.equal(model[0][1].bias, computed)


def test_layers_of_other_kinds_and_subclasses_stay() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Scaled(16, 16), nn.Linear(16, 16), nn.LayerNorm(16))
    run_step(Factorize(SVD(2)), State(model))
    assert type(model[0]) is Scaled
    assert type(model[1]) is nn.Sequential


def test_a_layer_that_cannot_become_smaller_stays(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(16, 1), nn.Linear(1, 16), nn.Linear(16, 16))
    with caplog.at_level("INFO"):
        run_step(Factorize(SVD(energy=0.1)), State(model))
    assert [type(part) for part in model] == [nn.Linear, nn.Linear, nn.Sequential]
    assert "'0' stays: no rank makes it smaller" in caplog.text
    assert "'2': 256 weights are now" in caplog.text


def test_a_step_may_be_repeated_on_the_parts() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    for _ in range(2):
        run_step(Factorize(SVD()), State(model))
    assert [type(part) for part in model[0]] == [nn.Sequential, nn.Sequential]
    again = nn.Sequential(nn.Linear(64, 64))
    apply_edits_(again, edits_of(model), {})
    again.load_state_dict(model.state_dict())


@pytest.mark.parametrize("method", [SVD(), TensorTrain(2)], ids=repr)
def test_repeating_a_step_by_name_changes_nothing(method: Factorization) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    step = Factorize(method, scope=Scope("0"))
    run_step(step, State(model))
    made = model[0]
    step.check(model, None)
    run_step(step, State(model))
    assert model[0] is made
    with pytest.raises(ScopeError, match="'1' selects no layer"):
        run_step(Factorize(method, scope=Scope("1")), State(model))


def test_a_module_that_stands_twice_is_replaced_in_both_places() -> None:
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    run_step(Factorize(SVD(2)), State(model))
    assert model[0] is model[2] and type(model[0]) is nn.Sequential


def test_recipes_write_it_as_it_prints() -> None:
    text = """
    steps:
      - factorize: svd
      - factorize: {method: {svd: {energy: 0.9}}, scope: "5"}
      - factorize: {method: {embedding: 64}}
      - factorize: {method: {tucker2: {ranks: [32, 16]}}, scope: "kind:conv, !0"}
      - factorize: {method: {block_diagonal: {blocks: 4, order: energy}}}
    """
    steps = Recipe.parse(text).steps
    assert steps[0] == Factorize(SVD())
    assert steps[1] == Factorize(SVD(energy=0.9), scope=Scope("5"))
    assert steps[2] == Factorize(Embedding(64))
    assert repr(steps[3]) == "Factorize(Tucker2((32, 16)), scope=Scope('kind:conv, !0'))"
    assert repr(steps[4]) == "Factorize(BlockDiagonal(4, order='energy'))"
    assert Recipe.parse(Recipe(list(steps)).to_yaml()).steps == steps
