"""Factorize: what replaces a layer, what is kept of it, what is refused, and what data weigh."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from laconic.errors import LaconicError, ModelError, RecipeError, ScopeError, TaskError
from laconic.models import digits_cnn, resnet, vgg
from laconic.models.factored import BlockDiagonalLinear, BlockTermLinear, Reorder, TTLinear
from laconic.recipe import Recipe
from laconic.scope import Scope
from laconic.ship import load, save
from laconic.step import State, run_step
from laconic.structure.columns import groups_of
from laconic.structure.factorization import (
    Factorization,
    Source,
    break_even,
    latent,
    shape_of,
)
from laconic.structure.factorize import Factorize
from laconic.structure.kernels import CP, DepthwiseSeparable, Separable, Tucker2, TwoThrees
from laconic.structure.matrices import (
    SVD,
    BlockDiagonal,
    BlockTerm,
    DataSVD,
    Embedding,
    TensorTrain,
)
from laconic.structure.surgery import apply_edits_, edits_of
from laconic.tasks import Task
from laconic.weights import Quantize, Symmetric, lay
from laconic.weights.laid import laid_tensors

# float32 sums of a few hundred products of order one.
CLOSE = 1e-4

DATA = DataSVD(batches=2, batch=8)
LINEAR: list[Factorization] = [SVD(), DATA, BlockDiagonal(), TensorTrain(4), BlockTerm(2, sweeps=2)]
LINEAR += [SVD(energy=0.3), BlockDiagonal(2, order="energy"), TensorTrain(eps=0.9)]
CONV: list[Factorization] = [SVD(), DATA, BlockDiagonal(), Tucker2(), CP(sweeps=3), Separable()]
CONV += [DepthwiseSeparable(), Tucker2((3, 2)), Tucker2(energy=0.4), TwoThrees(sweeps=2)]
CONV += [BlockDiagonal(2, order="energy"), DepthwiseSeparable(1), Separable(energy=0.4)]


def network() -> nn.Sequential:
    """Return [batch, 4, 9, 9] -> [batch, 6]."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 24),
        nn.ReLU(),
        nn.Linear(24, 6),
    ).eval()


def task(examples: int = 24) -> Task:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(examples, 4, 9, 9, generator=generator)
    labels = torch.arange(examples) % 3
    return Task((images, labels), (images, labels), (images[:6], labels[:6]))


def source(module: nn.Module, moments: Tensor | None = None) -> Source:
    weight = module.weight.detach().double()  # type: ignore[union-attr, operator]
    return Source(module, weight, torch.Generator().manual_seed(0), moments)


def split(method: Factorization, module: nn.Module, moments: Tensor | None = None) -> nn.Module:
    return method.split(source(module, moments))


def factorized(step: Factorize, model: nn.Module | None = None, seed: int = 0) -> nn.Module:
    state = State(network() if model is None else model, task(), seed=seed)
    step.check(state.model, state.task)
    run_step(step, state)
    return state.model


def weights(module: nn.Module) -> int:
    named = module.named_parameters()
    return sum(p.numel() for name, p in named if not name.endswith("bias"))


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------ at full rank nothing changes

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"padding": (2, 1)},
    "strided": {"stride": (2, 3), "padding": 2},
    "dilated": {"dilation": (2, 1), "padding": (4, 2)},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid", "stride": 2},
    "grouped": {"groups": 2, "padding": 2, "stride": 2},
    "depthwise": {"groups": 4},
    "reflected": {"padding": 2, "padding_mode": "reflect"},
    "circular": {"padding": (1, 2), "padding_mode": "circular"},
    "no bias": {"bias": False},
}


def full(kind: str, conv: nn.Conv2d) -> Factorization:
    """Return a factorization of a rank at which it is exact."""
    outputs, inputs, height, width = shape_of(conv)
    made: dict[str, Factorization] = {
        "svd": SVD(min(outputs, inputs * height * width)),
        "tucker": Tucker2((outputs, inputs), sweeps=1),
        "separable": Separable(min(inputs * height, outputs * width)),
        "depthwise": DepthwiseSeparable(min(outputs, height * width)),
        "threes": TwoThrees(4 * inputs, sweeps=1),
    }
    return made[kind]


@pytest.mark.parametrize("kind", ["svd", "tucker", "separable", "depthwise", "threes"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_convolution_at_full_rank_computes_the_same(kind: str, geometry: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 5, **GEOMETRIES[geometry])
    made = split(full(kind, conv), conv)
    x = images(2, 4, 12, 11)
    assert torch.allclose(made(x), conv(x), atol=CLOSE)
    assert isinstance(made, nn.Sequential) and {type(part) for part in made} == {nn.Conv2d}


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (2, 4)])
def test_kernels_of_any_extent_are_split(shape: tuple[int, int]) -> None:
    conv = nn.Conv2d(3, 6, shape, stride=2, padding=(0, 0))
    x = images(2, 3, 9, 9)
    for kind in ("svd", "tucker", "separable", "depthwise"):
        made = split(full(kind, conv), conv)
        assert torch.allclose(made(x), conv(x), atol=CLOSE)
    rank = math.prod(shape) * 3
    assert split(CP(rank, sweeps=1), conv)(x).shape == conv(x).shape


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_cp_of_a_kernel_of_known_rank_computes_the_same(geometry: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 5, **GEOMETRIES[geometry])
    outputs, inputs, height, width = shape_of(conv)
    sizes = (groups_of(conv), outputs, inputs, height, width)
    out, into, rows, columns = (torch.randn(sizes[0], size, 2) for size in sizes[1:])
    kernels = torch.einsum("gor,gir,ghr,gwr->goihw", out, into, rows, columns)
    conv.weight.data.copy_(kernels.flatten(0, 1))
    made = split(CP(2, sweeps=500), conv)
    x = images(2, 4, 12, 11)
    assert torch.allclose(made(x), conv(x), rtol=1e-2, atol=0.05)
    assert [part.groups for part in made] == [  # type: ignore[union-attr]
        sizes[0], 2 * sizes[0], 2 * sizes[0], sizes[0]
    ]  # fmt: skip


@pytest.mark.parametrize("order", ["given", "energy"])
@pytest.mark.parametrize("groups", [1, 2])
def test_block_diagonal_convolutions_keep_their_blocks(order: str, groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, padding=1, stride=2, groups=groups)
    shuffle = torch.randperm(12 // groups), torch.randperm(8 // groups)
    pattern = torch.block_diag(*torch.ones(2, 6 // groups, 4 // groups))
    if order == "energy":
        pattern = pattern[shuffle[0]][:, shuffle[1]]
    conv.weight.data *= pattern.repeat(groups, 1)[:, :, None, None]
    x = images(2, 8, 7, 7)
    made = split(BlockDiagonal(2, order=order), conv)  # type: ignore[arg-type]
    assert torch.allclose(made(x), conv(x), atol=CLOSE)
    assert weights(made) == conv.weight.numel() // 2


@pytest.mark.parametrize("order", ["given", "energy"])
def test_a_block_diagonal_linear_layer_keeps_its_blocks(order: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 12)
    whole = torch.block_diag(*torch.rand(4, 3, 2) + 0.1)
    if order == "energy":
        whole = whole[torch.randperm(12)][:, torch.randperm(8)]
    linear.weight.data.copy_(whole)
    made = split(BlockDiagonal(4, order=order), linear)  # type: ignore[arg-type]
    for shape in [(8,), (3, 8), (2, 3, 8)]:
        assert torch.allclose(made(images(*shape)), linear(images(*shape)), atol=CLOSE)
    kinds = [BlockDiagonalLinear] if order == "given" else [Reorder, BlockDiagonalLinear, Reorder]
    assert [type(part) for part in made.modules() if not list(part.children())] == kinds


@pytest.mark.parametrize(
    "method", [SVD(12), TensorTrain(10**6), TensorTrain(eps=1e-6), TensorTrain(99, rows=(3, 4))]
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_at_full_rank_computes_the_same(method: Factorization, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 12, bias=bias)
    made = split(method, linear)
    for shape in [(16,), (5, 16), (2, 5, 16)]:
        assert torch.allclose(made(images(*shape)), linear(images(*shape)), atol=CLOSE)


def test_block_terms_of_full_rank_compute_the_same() -> None:
    linear = nn.Linear(12, 8)
    made = split(BlockTerm(100, blocks=1, cores=2), linear)
    assert isinstance(made, BlockTermLinear)
    assert torch.allclose(made(images(3, 12)), linear(images(3, 12)), atol=CLOSE)


def test_an_embedding_of_full_width_gives_the_same_rows() -> None:
    table = nn.Embedding(9, 5, padding_idx=2)
    made = split(Embedding(5), table)
    indices = torch.tensor([[0, 2, 8], [1, 1, 7]])
    assert torch.allclose(made(indices), table(indices), atol=CLOSE)
    assert [type(part) for part in made.children()] == [nn.Embedding, nn.Linear]
    assert made[0].padding_idx == 2  # type: ignore[index]


# ------------------------------------------------------------------ what is planned comes out


@pytest.mark.parametrize("method", [*LINEAR, *CONV], ids=repr)
def test_the_planned_count_is_the_count(method: Factorization) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(32, 24), nn.Conv2d(8, 16, 5), nn.Conv2d(8, 16, 5, groups=2)]
    fitting = [module for module in layers if method.fits(module)]
    assert fitting
    for module in fitting:
        side = math.prod(latent(module).shape[1:])
        moments = torch.eye(side).double().expand(groups_of(module), side, side)
        made = split(method, module, moments)
        planned = method.planned(shape_of(module))
        if planned is not None:
            assert weights(made) == planned * groups_of(module)
        assert weights(made) < latent(module).numel()


@pytest.mark.parametrize(
    "method", [SVD(), DATA, Separable(), CP(), DepthwiseSeparable(), TwoThrees()], ids=repr
)
def test_a_ratio_is_the_most_that_is_left(method: Any) -> None:
    for shape in [(64, 32, 5, 5), (7, 11, 3, 5)]:
        for ratio in (0.1, 0.25, 0.5, 0.9):
            chosen = method.model_copy(update={"ratio": ratio})
            rank, most = chosen.chosen(shape), ratio * math.prod(shape)
            assert chosen.planned(shape) == method.count(shape, rank)
            assert method.count(shape, rank) <= most or rank == 1
            assert method.count(shape, rank + 1) > most
        assert method.planned(shape) == method.model_copy(update={"ratio": 0.5}).planned(shape)


def test_a_ratio_of_tucker_divides_both_channels_alike() -> None:
    for ratio in (0.1, 0.25, 0.5, 0.9):
        planned = Tucker2(ratio=ratio).planned((64, 32, 3, 3))
        assert planned is not None and 0.9 * ratio < planned / (64 * 32 * 9) <= ratio
    made = split(Tucker2(ratio=0.5), nn.Conv2d(32, 64, 3))
    outer, inner = made[1].out_channels, made[1].in_channels  # type: ignore[index]
    assert outer // 2 == inner


def test_an_energy_is_reached_and_no_rank_below_reaches_it() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, groups=2)
    for method in (SVD(energy=0.7), Separable(energy=0.7), DepthwiseSeparable(energy=0.7)):
        rank = method.rank_for(source(conv))
        squares = method.spectrum(source(conv))
        assert float(squares.sum()) == pytest.approx(
            float(conv.weight.data.square().sum()), rel=1e-5
        )
        assert float(squares[:rank].sum()) >= 0.7 * float(squares.sum())
        assert float(squares[: rank - 1].sum()) < 0.7 * float(squares.sum())


def test_the_break_even_rank_is_the_largest_that_is_smaller() -> None:
    for method in (SVD(), CP(), Separable(), Tucker2(), DepthwiseSeparable(), TwoThrees()):
        shape = (16, 8, 5, 5)
        rank = break_even(method, shape)
        assert method.count(shape, rank) < math.prod(shape) <= method.count(shape, rank + 1)
    assert break_even(SVD(), (1, 9)) == 0


# ------------------------------------------------------------------ what is kept


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


# ------------------------------------------------------------------ low rank on data


def error_on_data(model: nn.Module, plain: nn.Module, x: Tensor, upto: int) -> float:
    """Return the squared error of a layer's outputs on its inputs in the plain network."""
    entered = plain[:upto](x)  # type: ignore[index]
    return float((model[upto](entered) - plain[upto](entered)).detach().square().sum())  # type: ignore[index]


@pytest.mark.parametrize("name", ["0", "2", "5", "7"])
def test_data_make_the_error_on_them_smaller(name: str) -> None:
    # All training examples at once: the error on them is what is minimised.
    everything = next(task().train.batches(64)).inputs[0]
    plain, place = network(), int(name)
    scope = Scope(name)
    found = factorized(Factorize(DataSVD(1, batches=1, batch=64), scope=scope))
    blind = factorized(Factorize(SVD(1), scope=scope))
    weighed, unweighed = (
        error_on_data(model, plain, everything, place) for model in (found, blind)
    )
    assert weighed <= unweighed
    assert weighed < 0.99 * unweighed or name in ("0", "2")


@pytest.mark.parametrize("geometry", [name for name in GEOMETRIES if name != "depthwise"])
def test_moments_of_a_convolution_are_those_of_its_patches(geometry: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, **GEOMETRIES[geometry])
    conv.bias = None
    model = nn.Sequential(conv)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, 9, 9, generator=generator)
    labels = torch.zeros(12).long()
    data = Task((x, labels), (x, labels), (x, labels))
    step = Factorize(DataSVD(2, batches=2, batch=6))
    moments = step._moments(State(model, data), {"0": conv})["0"]
    # |W X|_F^2 = tr(W C W^T) is the energy of what the convolution computes.
    kernels = conv.weight.detach().double().flatten(1).chunk(groups_of(conv))
    energy = sum(float((w @ m @ w.T).trace()) for w, m in zip(kernels, moments, strict=True))
    assert energy == pytest.approx(float(conv(x).detach().double().square().sum()), rel=1e-5)


def test_moments_are_summed_over_batches_and_calls() -> None:
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = images(20, 6)
    labels = torch.arange(20) % 2
    data = Task((x, labels), (x, labels), (x, labels))
    state = State(model, data)
    moments = Factorize(DataSVD(batches=2, batch=5))._moments(state, {"0": layer})["0"][0]
    seen = torch.cat([batch.inputs[0] for batch in list(data.train.batches(5, seed=0))[:2]])
    entered = torch.cat([seen, model[:2](seen)]).detach().double()
    assert torch.allclose(moments, entered.T @ entered, atol=1e-5)
    assert not layer._forward_pre_hooks


def test_data_are_drawn_by_the_seed_and_the_network_is_left_as_found() -> None:
    step = Factorize(DataSVD(3, batches=1, batch=4), scope=Scope("5"))
    model = network().train()
    model[1].eval()
    one, same = factorized(step, copy.deepcopy(model)), factorized(step, copy.deepcopy(model))
    other = factorized(step, copy.deepcopy(model), seed=1)
    assert torch.equal(one[5][0].weight, same[5][0].weight)
    assert not torch.equal(one[5][0].weight, other[5][0].weight)
    assert not one[1].training and one[0].training and one[5].training


def test_an_energy_on_data_is_that_of_the_outputs() -> None:
    linear = nn.Linear(8, 8, bias=False)
    inputs = images(30, 8).double() * torch.tensor([9.0] * 2 + [0.01] * 6)
    moments = (inputs.T @ inputs)[None]
    assert DataSVD(energy=0.99).rank_for(source(linear, moments)) == 2
    made = split(DataSVD(energy=0.99), linear, moments)
    expected = linear(inputs.float())
    lost = float((made(inputs.float()) - expected).detach().square().sum())
    assert lost <= 0.011 * float(expected.detach().square().sum())


def test_a_layer_that_no_batch_reaches_is_refused() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    x, labels = images(20, 6), torch.arange(20) % 2
    data = Task((x, labels), (x, labels), (x, labels))
    with pytest.raises(ModelError, match="inputs of 'idle' were never computed"):
        run_step(Factorize(DataSVD()), State(Lazy(), data))
    model = Lazy()
    model.used.weight.data.fill_(1e30)
    chained = nn.Sequential(model, nn.Linear(6, 6), nn.Linear(6, 6))
    chained[1].weight.data.fill_(1e30)
    with pytest.raises(ModelError, match="inputs of '2' are not finite"):
        run_step(Factorize(DataSVD(), scope=Scope("2")), State(chained, data))


def test_data_need_a_task() -> None:
    with pytest.raises(TaskError, match="there is no task"):
        Factorize(DATA).check(network(), None)
    with pytest.raises(TaskError, match="there is no task"):
        run_step(Factorize(DATA), State(network()))
    Factorize(SVD()).check(network(), None)


# ------------------------------------------------------------------ what is refused


def refused(
    step: Factorize, model: nn.Module, message: str, kind: type[LaconicError] = ModelError
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(kind, match=message):
        step.check(model, None)
    with pytest.raises(kind, match=message):
        run_step(step, State(model))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_rank_that_makes_a_layer_larger_is_refused_with_the_numbers() -> None:
    message = (
        r"factorize: '5' \[24, 32\]: SVD\(14\) makes 784 weights of 768; at most rank 13 makes it "
        r"smaller: choose less, or leave it out of the scope with '!5'"
    )
    refused(Factorize(SVD(14), scope=Scope("5")), network(), message)
    factorized(Factorize(SVD(13), scope=Scope("5")))
    # Grouped: twice 2 x (4 + 36) weights are 160 of 288.
    refused(
        Factorize(SVD(4), scope=Scope("2")), network(), "makes 320 weights of 288; at most rank 3"
    )
    refused(Factorize(Embedding(5)), nn.Sequential(nn.Embedding(9, 6)), "75 weights of 54.*rank 3")
    refused(Factorize(Tucker2((8, 8)), scope=Scope("0")), network(), "makes 880 weights of 800")


def test_an_energy_that_makes_a_layer_larger_is_refused_when_the_rank_is_known() -> None:
    model, step = network(), Factorize(SVD(energy=0.9999), scope=Scope("5"))
    step.check(model, None)
    with pytest.raises(ModelError, match=r"SVD\(energy=0.9999\) makes .* of 768; at most rank 13"):
        run_step(step, State(model))
    assert type(model[5]) is nn.Linear
    with pytest.raises(ModelError, match=r"TensorTrain\(eps=0.001\) makes"):
        run_step(Factorize(TensorTrain(eps=0.001), scope=Scope("5")), State(network()))


@pytest.mark.parametrize(
    ("method", "scope", "kinds"),
    [
        (SVD(), "1", "nn.Linear and nn.Conv2d"),
        (Embedding(2), "*", "nn.Embedding"),
        (Tucker2(), "kind:linear", "nn.Conv2d with a kernel larger than 1 x 1"),
        (TwoThrees(), "2", "nn.Conv2d with a 5 x 5 kernel"),
        (TensorTrain(), "kind:conv", "nn.Linear"),
    ],
)  # fmt: skip
def test_a_scope_without_a_fitting_layer_is_refused(
    method: Factorization, scope: str, kinds: str
) -> None:
    refused(Factorize(method, scope=Scope(scope)), network(), f"it splits {kinds}$", ScopeError)


def test_one_by_one_kernels_are_left_to_svd() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1))
    for method in (Tucker2(), CP(), Separable(), DepthwiseSeparable()):
        assert not method.fits(model[0])
    assert SVD().fits(model[0]) and BlockDiagonal().fits(model[0])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.middle, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.middle(self.table(x)))


@pytest.mark.parametrize("laid", [False, True], ids=["plain", "laid"])
def test_a_weight_that_another_layer_shares_is_refused(laid: bool) -> None:
    model = Tied()
    if laid:
        lay(model, "out.weight", Symmetric(4))
    refused(Factorize(SVD(2)), model, "the weight of 'out' is also that of 'table'")
    refused(Factorize(Embedding(2)), model, "the weight of 'table' is also that of 'out'.*'!table'")
    run_step(Factorize(SVD(2), scope=Scope("*, !out")), State(model))
    assert model(torch.tensor([1, 2])).shape == (2, 20)


def test_what_cannot_be_replaced_is_refused() -> None:
    refused(Factorize(SVD()), nn.Linear(8, 8), "the network is a single layer")
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16))
    refused(Factorize(SVD()), encoder, "'0' is a TransformerEncoderLayer.*leave it out")
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)))
    refused(Factorize(SVD()), normed, "parametrization that is not laconic's")
    broken = nn.Sequential(nn.Linear(8, 8))
    broken[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match="'0' holds NaN or infinity"):
        run_step(Factorize(SVD()), State(broken))


@pytest.mark.parametrize(
    ("method", "module", "message"),
    [
        (BlockDiagonal(5), nn.Linear(8, 12), r"5 blocks do not divide \[12, 8\].*divisor of 4"),
        (BlockDiagonal(2), nn.Conv2d(6, 6, 3, groups=2), r"2 blocks do not divide \[3, 3\]"),
        (Tucker2(), nn.Conv2d(8, 8, 4, padding="same"), "not the same on both sides"),
        (SVD(), nn.Conv2d(8, 8, (3, 2), padding="same"), "not the same on both sides"),
        (TensorTrain(rows=(2, 3), columns=(2, 4)), nn.Linear(8, 8), "do not multiply to a weight"),
        (Embedding(2), nn.Embedding(30, 8, max_norm=1.0), "max_norm"),
    ],
)  # fmt: skip
def test_what_the_parts_cannot_have_is_refused(
    method: Factorization, module: nn.Module, message: str
) -> None:
    refused(Factorize(method), nn.Sequential(module), f"factorize: '0': .*{message}")


def test_a_parent_that_reads_a_weight_is_found_where_there_are_data() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.to(self.inner.weight.dtype))

    x, labels = images(20, 6), torch.arange(20) % 2
    data = Task((x, labels), (x, labels), (x, labels))
    with pytest.raises(ModelError, match=r"runs no more: .*'weight', which '.*self\.inner\.weight"):
        run_step(Factorize(SVD(2)), State(Reader(), data))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SVD(rank=3, energy=0.5), "rank and energy each decide the rank"),
        (lambda: SVD(ratio=0.5, energy=0.5), "ratio and energy each decide"),
        (lambda: CP(rank=3, ratio=0.5), "rank and ratio each decide"),
        (lambda: Tucker2((3, 2), energy=0.5), "ranks and energy each decide"),
        (lambda: Tucker2((3, 2, 1)), "at most 2 items"),
        (lambda: TensorTrain(rows=(2, 3), columns=(2,)), "2 rows and 1 columns"),
        (lambda: SVD(rank=0), "greater than or equal to 1"),
        (lambda: SVD(ratio=1.0), "less than 1"),
        (lambda: BlockDiagonal(1), "greater than or equal to 2"),
    ],
)
def test_fields_that_contradict_are_refused(build: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build()


def test_an_earlier_split_postpones_what_shapes_tell() -> None:
    first, then = Factorize(SVD(4), scope=Scope("5")), Factorize(SVD(1), scope=Scope("5.1"))
    with pytest.raises(ScopeError, match="selects no module"):
        then.check(network(), None)
    then.check(network(), None, (first,))
    state = State(network())
    run_step(first, state)
    run_step(then, state, key=1)
    assert [type(part) for part in state.model[5]] == [nn.Linear, nn.Sequential]
    with pytest.raises(ScopeError):
        run_step(Factorize(SVD(1), scope=Scope("nowhere")), state)


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


# ------------------------------------------------------------------ whole networks


@pytest.mark.parametrize(
    "method",
    [SVD(), Tucker2(sweeps=1), CP(sweeps=1), Separable(), DepthwiseSeparable(), BlockDiagonal()],
    ids=repr,
)
@pytest.mark.parametrize("build", [lambda: resnet(8), lambda: vgg("small")], ids=["resnet", "vgg"])
def test_image_networks_run_with_every_layer_split(method: Factorization, build: Any) -> None:
    model = build().eval()
    first = next(name for name, part in model.named_modules() if isinstance(part, nn.Conv2d))
    scope = f"kind:conv, !{first}"
    before = sum(p.numel() for p in model.parameters())
    run_step(Factorize(method, scope=Scope(scope)), State(model))
    assert sum(p.numel() for p in model.parameters()) < 0.6 * before
    assert bool(model(images(2, 3, 32, 32)).isfinite().all())


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def text_task() -> Task:
    tokens = torch.randint(0, 64, (12, 7), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 3
    data = (tokens, labels)
    return Task(data, data, data, call=lambda model, batch: model(input_ids=batch.inputs[0]).logits)


@pytest.mark.parametrize(
    "method",
    [SVD(), DATA, TensorTrain(4), BlockTerm(2, sweeps=1), BlockDiagonal(2, order="energy")],
    ids=repr,
)
def test_bert_runs_with_every_linear_layer_split(method: Factorization) -> None:
    model = bert()
    step = Factorize(method, scope=Scope("kind:linear, !classifier"))
    state = State(model, text_task())
    step.check(model, state.task)
    run_step(step, state)
    assert len(edits_of(model)["modules"]) == 2 * 6 + 1
    tokens = text_task().train.plain().batches(4)
    assert state.task.call(model, next(tokens)).shape == (4, 3)


def test_bert_runs_with_a_factorized_embedding() -> None:
    model, data = bert(), text_task()
    run_step(Factorize(Embedding(4), scope=Scope("*.word_embeddings")), State(model, data))
    table, wide = model.bert.embeddings.word_embeddings
    assert (table.weight.shape, wide.weight.shape) == ((64, 4), (16, 4))
    assert table.padding_idx == 0
    assert data.call(model, data.example_batch(2)).shape == (2, 3)
