"""Layers that torch has none of: they compute with the matrix they stand for, and ship."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from laconic.errors import ModelError
from laconic.models.factored import BlockDiagonalLinear, BlockTermLinear, Reorder, TTLinear
from laconic.models.layers import OWN, describe, layer
from laconic.structure.decompose import paired, tensor_train, train_matrix
from laconic.structure.tensors import block_term, tucker_tensor
from laconic.weights import Symmetric, lay
from laconic.weights.laid import bake

Inputs = Callable[..., Tensor]

# float32 sums of a few dozen products of order one.
ROUNDING = 1e-5

LAYERS: dict[str, nn.Module] = {
    "BlockDiagonalLinear": BlockDiagonalLinear(6, 9, 3),
    "BlockTermLinear": BlockTermLinear((2, 3), (4, 1), 2, (2, 3)),
    "Reorder": Reorder(4, dim=1),
    "TTLinear": TTLinear((2, 3), (4, 5), (3,)),
}
own = pytest.mark.parametrize("name", LAYERS)

MODES = [
    ((2, 3), (4, 5), (6,), (3, 2)),
    ((2, 3, 4), (3, 1, 5), (4, 3), (4, 3, 2)),
    ((2, 2, 1, 2), (1, 2, 3, 2), (2, 4, 2), (2, 3, 1, 2)),
    ((3,), (4,), (), (3,)),
]


def matrix_of(
    blocks: list[tuple[Tensor, list[Tensor]]], rows: tuple[int, ...], columns: tuple[int, ...]
) -> Tensor:
    """Return the matrix of Tucker blocks over modes (i_k, j_k)."""
    whole = torch.stack([tucker_tensor(*block) for block in blocks]).sum(0)
    apart = whole.reshape([size for pair in zip(rows, columns, strict=True) for size in pair])
    order = [*range(0, 2 * len(rows), 2), *range(1, 2 * len(rows), 2)]
    return apart.permute(order).reshape(math.prod(rows), math.prod(columns))


@pytest.mark.parametrize(("rows", "columns", "ranks", "_"), MODES)
def test_a_tensor_train_computes_with_its_matrix(
    inputs: Inputs,
    rows: tuple[int, ...],
    columns: tuple[int, ...],
    ranks: tuple[int, ...],
    _: object,
) -> None:
    weight = inputs(math.prod(rows), math.prod(columns)).double()
    cores = tensor_train(weight, rows, columns, rank=max(ranks, default=1))
    made = TTLinear(rows, columns, [core.shape[3] for core in cores[:-1]])
    made.set_cores_(cores)
    made.bias.data.copy_(torch.arange(math.prod(rows)))
    x = inputs(3, 2, math.prod(columns))
    expected = x @ train_matrix(cores).float().T + made.bias
    assert torch.allclose(made(x), expected, atol=ROUNDING * 10)
    assert sum(p.numel() for p in made.parameters()) == sum(c.numel() for c in cores) + len(
        made.bias
    )


@pytest.mark.parametrize(("rows", "columns", "_", "ranks"), MODES)
def test_block_terms_compute_with_their_matrix(
    inputs: Inputs,
    rows: tuple[int, ...],
    columns: tuple[int, ...],
    _: object,
    ranks: tuple[int, ...],
) -> None:
    weight = inputs(math.prod(rows), math.prod(columns)).double()
    blocks = block_term(paired(weight, rows, columns), 2, ranks, sweeps=1)
    made = BlockTermLinear(rows, columns, 2, ranks, bias=False)
    made.set_blocks_(blocks)
    x = inputs(3, 2, math.prod(columns))
    expected = x @ matrix_of(blocks, rows, columns).float().T
    assert torch.allclose(made(x), expected, atol=ROUNDING * 10)


def test_a_block_diagonal_layer_computes_with_its_matrix(inputs: Inputs) -> None:
    made = BlockDiagonalLinear(6, 9, 3)
    made.bias.data.copy_(torch.arange(9.0))
    whole = torch.block_diag(*made.weight.reshape(3, 3, 2))
    for shape in [(6,), (4, 6), (2, 4, 6)]:
        x = inputs(*shape)
        assert torch.allclose(made(x), x @ whole.T + made.bias, atol=ROUNDING)


def test_a_reordering_moves_one_dimension(inputs: Inputs) -> None:
    made = Reorder(4, dim=1)
    made.order.copy_(torch.tensor([2, 0, 3, 1]))
    x = inputs(2, 4, 3)
    assert torch.equal(made(x), x[:, [2, 0, 3, 1]])
    assert torch.equal(Reorder(3)(x), x)


@own
def test_every_number_matters_and_learns(name: str, inputs: Inputs) -> None:
    made = layer(describe(LAYERS[name]))
    size = {"BlockDiagonalLinear": 6, "BlockTermLinear": 4, "Reorder": 4, "TTLinear": 20}[name]
    x = inputs(3, size).requires_grad_(True)
    made(x).square().sum().backward()
    assert bool((x.grad != 0).all())
    for key, parameter in made.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), key


@own
def test_a_description_builds_the_same_layer(name: str) -> None:
    made = LAYERS[name]
    assert name in OWN
    again = layer(describe(made))
    assert type(again) is type(made)
    assert str(again) == str(made)
    shapes = {key: tensor.shape for key, tensor in made.state_dict().items()}
    assert {key: tensor.shape for key, tensor in again.state_dict().items()} == shapes
    again.load_state_dict(made.state_dict())
    x = torch.linspace(-1, 1, 40).reshape(2, 20)[
        :, : {"TTLinear": 20, "BlockDiagonalLinear": 6}.get(name, 4)
    ]
    assert torch.equal(again(x), made(x))


@own
def test_a_skeleton_needs_no_memory(name: str) -> None:
    with torch.device("meta"):
        assert all(tensor.is_meta for tensor in layer(describe(LAYERS[name])).state_dict().values())


FRESH = {
    "train": lambda: TTLinear((3, 4, 3), (4, 4, 4), (6, 6)),
    "terms": lambda: BlockTermLinear((6, 6), (8, 8), 3, (4, 4)),
    "blocks": lambda: BlockDiagonalLinear(64, 36, 2),
}


@pytest.mark.parametrize("name", FRESH)
def test_a_fresh_layer_varies_like_a_linear_one(name: str, inputs: Inputs) -> None:
    variances = []
    for _ in range(20):
        made = FRESH[name]()
        assert bool((made.bias == 0).all())
        variances.append(float(made(inputs(64, 64)).detach().var()))
    mean = sum(variances) / len(variances)
    assert 1 / 9 < mean < 1  # nn.Linear: 1 / 3, which few factors meet on average alone


def test_cores_are_laid_like_any_weight(inputs: Inputs) -> None:
    made = nn.Sequential(TTLinear((2, 3), (4, 5), (3,)), BlockTermLinear((2, 2), (3, 2), 2, (2, 2)))
    x = inputs(3, 20)
    for name in ("0.core_0", "1.core_1", "1.factor_0_1"):
        lay(made, name, Symmetric(4))
    laid = made(x)
    assert made[0].core_0.unique().numel() <= 16
    with torch.no_grad():
        alone = made(x)
    bake(made)
    made.requires_grad_(False)
    assert torch.equal(made(x), laid)
    assert torch.equal(made(x), alone)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Reorder(0), "size is 0"),
        (lambda: BlockDiagonalLinear(4, 6, 4), "4 blocks do not divide 4 inputs and 6 outputs"),
        (lambda: BlockDiagonalLinear(4, 6, 0), "blocks is 0"),
        (lambda: TTLinear((2, 3), (4,), (3,)), "2 rows, 1 columns and 1 ranks"),
        (lambda: TTLinear((2, 3), (4, 5), ()), "1 to 16, and 1 ranks"),
        (lambda: TTLinear((), (), ()), "0 rows"),
        (lambda: TTLinear((2, 3), (4, 0), (3,)), "mode 3 is 0"),
        (lambda: TTLinear((1,) * 17, (1,) * 17, (1,) * 16), "17 rows"),
        (lambda: BlockTermLinear((2, 3), (4, 5), 2, (3,)), "and 2 ranks"),
        (lambda: BlockTermLinear((2, 3), (4, 5), 65, (3, 3)), "65 blocks; choose 1 to 64"),
        (lambda: BlockTermLinear((2, 3), (4, 5), 0, (3, 3)), "blocks is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build()


@pytest.mark.parametrize(
    "spec",
    [
        {"TTLinear": {"rows": [2], "columns": [2, 2], "ranks": []}},
        {"TTLinear": {"rows": 3, "columns": [2], "ranks": []}},
        {"TTLinear": {"rows": [2**24] * 16, "columns": [2**24] * 16, "ranks": [2**24] * 15}},
        {"BlockTermLinear": {"rows": [2], "columns": [2], "blocks": 2**20, "ranks": [2]}},
        {"BlockDiagonalLinear": {"in_features": 4, "out_features": 4, "blocks": 3}},
        {"Reorder": {"size": "many"}},
    ],
    ids=lambda spec: str(spec)[:60],
)
def test_a_hostile_description_is_refused(spec: dict[str, object]) -> None:
    with pytest.raises(ModelError):
        layer(spec)


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "Reorder"])
def test_a_layer_trains_under_autocast(name: str) -> None:
    layer = copy.deepcopy(LAYERS[name])
    size = {"BlockDiagonalLinear": 6, "BlockTermLinear": 4, "TTLinear": 20}[name]
    before = nn.Linear(3, size)
    with torch.autocast("cpu", torch.bfloat16):
        for x in (torch.ones(2, size), before(torch.ones(2, 3))):
            layer(x).float().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
