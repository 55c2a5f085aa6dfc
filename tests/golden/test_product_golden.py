"""Product quantisation: blocks, k-means against brute force, masks, gradients, slices, the file."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from laconic import load, save
from laconic.errors import RecipeError
from laconic.recover import SGD, AdamW, Constant, Stop, Train
from laconic.ship import inspect
from laconic.step import State, run_step
from laconic.tasks import Task
from laconic.weights import Codes, KMeans, Laid, Product, lay
from laconic.weights.laid import laid_tensors
from laconic.weights.product import lloyd_codewords, nearest_codewords, to_blocks

# Sums of float32 numbers near one in another order.
ROUNDING = 1e-5


def encoded(representation: Product, weight: Tensor, mask: Tensor | None = None) -> Codes:
    return representation.encode(weight, mask=mask, state=representation.fit(weight, mask))


def error(blocks: Tensor, known: Tensor, index: Tensor, codewords: Tensor) -> float:
    return float(((blocks - codewords[index]) * known).double().square().sum())


# Blocks.


def test_blocks_are_neighbours_of_a_row() -> None:
    weight = torch.arange(24.0).reshape(2, 3, 2, 2)
    blocks = to_blocks(weight, 5)
    assert blocks[0].tolist() == [0, 1, 2, 3, 4]
    assert blocks[2].tolist() == [10, 11, 0, 0, 0]
    assert blocks[3].tolist() == [12, 13, 14, 15, 16]
    assert to_blocks(torch.arange(3), 3).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("shape", "block", "layout", "width"),
    [
        ((4, 16), 8, (4, 2), 8),
        ((4, 17), 8, (4, 3), 8),
        ((4, 3), 8, (4, 1), 3),
        ((6, 2, 3, 3), 9, (6, 2), 9),
        ((20,), 8, (1, 3), 8),
        ((5, 7), 1, (5, 7), 1),
        ((3, 2, 2, 2), 1, (3, 2, 2, 2), 1),
        ((9, 1), 8, (9, 1), 1),
    ],
)
def test_an_index_stands_for_a_block(
    shape: tuple[int, ...], block: int, layout: tuple[int, ...], width: int
) -> None:
    weight = torch.randn(shape)
    codes = encoded(Product(2, block=block), weight)
    assert codes.streams["index"].tensor.shape == layout
    assert codes.tables["codebook"].shape == (4, width)
    assert Product(2, block=block).stream_shape("index", weight.shape) == layout


def test_decoded_blocks_are_codewords() -> None:
    weight = torch.randn(6, 20)
    codes = encoded(Product(3, block=8), weight)
    decoded = Product(3, block=8).decode(codes)
    index, codebook = codes.streams["index"].tensor.long(), codes.tables["codebook"]
    for row, place in itertools.product(range(6), range(3)):
        own = decoded[row, 8 * place : 8 * place + 8]
        assert torch.equal(own, codebook[index[row, place]][: len(own)])


def test_as_many_codewords_as_blocks_reproduce_the_weight() -> None:
    weight = torch.randn(4, 24)
    assert torch.allclose(Product(4).decode(encoded(Product(4), weight)), weight, atol=ROUNDING)
    few = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(8, 4)
    assert torch.equal(Product(8, block=2).decode(encoded(Product(8, block=2), few)), few)


# k-means.


def test_the_nearest_codeword_is_the_nearest_of_all() -> None:
    blocks, codewords = torch.randn(200, 5), torch.randn(16, 5)
    known = torch.rand(200, 5) < 0.7
    blocks *= known
    index, distance = nearest_codewords(blocks, known, codewords)
    every = ((blocks[:, None] - codewords) * known[:, None]).square().sum(2)
    assert torch.equal(index, every.argmin(1))
    assert torch.allclose(distance, every.amin(1), atol=ROUNDING)


def test_distances_are_found_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, codewords = torch.randn(50, 4), torch.randn(8, 4)
    known = torch.ones(50, 4, dtype=torch.bool)
    whole = nearest_codewords(blocks, known, codewords)
    monkeypatch.setattr("laconic.weights.product.PIECE", 24)
    assert torch.equal(nearest_codewords(blocks, known, codewords)[0], whole[0])


def best_partition(blocks: Tensor, known: Tensor, count: int) -> float:
    """Return the least error over every way to share codewords out."""
    best = torch.inf
    for taken in itertools.product(range(count), repeat=len(blocks)):
        index = torch.tensor(taken)
        codewords = torch.zeros(count, blocks.shape[1])
        for k in range(count):
            own = (index == k)[:, None] & known
            codewords[k] = (blocks * own).sum(0) / own.sum(0).clamp(min=1)
        best = min(best, error(blocks, known, index, codewords))
    return best


@pytest.mark.parametrize("masked", [False, True])
def test_lloyd_from_a_few_starts_finds_the_best_partition(masked: bool) -> None:
    known = torch.rand(7, 3) < 0.7 if masked else torch.ones(7, 3, dtype=torch.bool)
    blocks = torch.randn(7, 3) * known
    errors = [error(blocks, known, *lloyd_codewords(blocks, known, 2, 50)) for _ in range(20)]
    assert min(errors) == pytest.approx(best_partition(blocks, known, 2), rel=ROUNDING)
    assert all(each >= min(errors) for each in errors)


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_no_iteration_raises_the_error(share: float) -> None:
    known = torch.rand(400, 6) < share
    blocks = torch.randn(400, 6) * known
    errors = []
    for iterations in range(1, 12):
        torch.manual_seed(3)
        errors.append(error(blocks, known, *lloyd_codewords(blocks, known, 16, iterations)))
    assert all(now <= before * (1 + ROUNDING) for before, now in itertools.pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


def test_empty_codewords_are_seeded_again() -> None:
    """Of two far clusters, and a start in one of them alone, no codeword stays unused."""
    blocks = torch.cat([torch.zeros(60, 2), torch.randn(4, 2) + 50])
    known = torch.ones(64, 2, dtype=torch.bool)
    index, codewords = lloyd_codewords(blocks, known, 5, 20)
    assert len(index.unique()) == 5
    assert error(blocks, known, index, codewords) == pytest.approx(0, abs=1e-6)


def test_the_same_seed_gives_the_same_codewords() -> None:
    weight = torch.randn(40, 64)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(Product(4).fit(weight)["codebook"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_blocks_of_one_weight_are_weight_sharing() -> None:
    weight = torch.randn(30, 40)
    product = (Product(3, block=1).decode(encoded(Product(3, block=1), weight)) - weight).square()
    single = KMeans(3, start="density")
    shared = single.decode(single.encode(weight, state=single.fit(weight)))
    assert float(product.sum()) < 1.3 * float((shared - weight).square().sum())


# Masks.


def test_distances_and_means_are_over_survivors() -> None:
    weight = torch.tensor([[1.0, 9.0, 1.0, 2.0, 5.0, 5.0, 5.0, 7.0]])
    mask = torch.tensor([[True, False, True, True, True, True, True, True]])
    codes = encoded(Product(1, block=2), weight, mask)
    decoded = Product(1, block=2).decode(codes)
    assert decoded.tolist() == [[1.0, 0.0, 1.0, 2.0, 5.0, 6.0, 5.0, 6.0]]
    assert codes.streams["index"].tensor.shape == (1, 4)
    assert codes.streams["position"].tensor.tolist() == [[1, 0, 1, 1, 1, 1, 1, 1]]


# Training.


def test_the_codebook_gradient_sums_over_the_blocks_of_each_codeword() -> None:
    model = nn.Linear(12, 5).double()
    lay(model, "weight", Product(2, block=5))
    laid, inputs = model.parametrizations.weight[0], torch.randn(6, 12, dtype=torch.float64)
    leaf = model.weight.detach().requires_grad_()
    loss = nn.functional.linear(inputs, leaf, model.bias).sin().sum()
    (by_weight,) = torch.autograd.grad(loss, leaf)
    model(inputs).sin().sum().backward()
    slopes = to_blocks(by_weight, 5)
    sums = torch.zeros(4, 5, dtype=torch.float64).index_add_(0, laid.index.flatten().int(), slopes)
    assert torch.allclose(laid.codebook.grad, sums.flatten())


def task() -> Task:
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(24, 16, generator=generator), torch.arange(24) % 3
    return Task((inputs, labels), (inputs, labels), (inputs, labels))


def test_training_moves_the_codebook_alone_and_does_not_decay_it() -> None:
    model = nn.Sequential(nn.Linear(16, 3))
    lay(model, "0.weight", Product(1))
    layer, latent = laid_tensors(model)["0.weight"]
    state = {name: tensor.detach().clone() for name, tensor in layer.state.items()}
    before = latent.detach().clone()
    train = Train(batch=8, optimizer=AdamW(0.01), stop=Stop(keep="last"))
    run_step(train, State(model, task()))
    assert torch.equal(latent, before) and torch.equal(layer.index, state["index"])
    assert not torch.equal(layer.codebook, state["codebook"])
    assert torch.equal(model[0].weight, layer.representation.decode(layer.encode(latent)))
    heavy = SGD(1e-6, weight_decay=1000.0, momentum=0.0, decay=Constant())
    trained = layer.codebook.detach().clone()
    run_step(Train(batch=8, optimizer=heavy, stop=Stop(keep="last")), State(model, task()))
    assert torch.allclose(layer.codebook, trained, atol=1e-4)


# Slices.


def test_fewer_rows_keep_codewords_and_index() -> None:
    weight, rows = torch.randn(6, 16), torch.tensor([5, 0, 3])
    laid = Laid(Product(2), None, Product(2).fit(weight))
    sliced = laid.sliced(0, rows, weight)
    assert torch.equal(sliced.codebook, laid.codebook)
    assert torch.equal(sliced(weight[rows]), laid(weight)[rows])


@pytest.mark.parametrize("columns", [[0, 1, 2, 3, 4, 5, 6, 7], [9, 2, 30]])
def test_fewer_columns_are_clustered_anew_from_what_was_trained(columns: list[int]) -> None:
    weight, kept = torch.randn(6, 32), torch.tensor(columns)
    laid = Laid(Product(5), None, Product(5).fit(weight))
    with torch.no_grad():
        laid.codebook.mul_(3)
    mask = torch.rand(6, 32) < 0.8
    laid.mask = mask
    sliced = laid.sliced(1, kept, weight)
    left = laid(weight).detach()[:, kept]
    assert torch.allclose(sliced(weight[:, kept]), left, atol=ROUNDING)


# The file.


def test_a_bit_a_weight(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(512, 512, bias=False))
    lay(model, "0.weight", Product())
    path = tmp_path / "model.safetensors"
    save(model, path)
    parts = inspect(path)
    assert 0.9 < 8 * parts.code_bytes / 512**2 <= 1.01
    assert parts.table_bytes >= 256 * 8 * 4
    loaded = load(path, model=nn.Sequential(nn.Linear(512, 512, bias=False)))
    assert torch.equal(loaded[0].weight, model[0].weight)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(256, 4096), (1, 64)])
def test_even_the_longest_blocks_of_one_bit_are_written_and_read(
    shape: tuple[int, int], masked: bool, tmp_path: Path
) -> None:
    rows, columns = shape
    model = nn.Sequential(nn.Linear(columns, rows, bias=False))
    nn.init.constant_(model[0].weight, 0.5)
    mask = torch.rand(shape) < 0.3 if masked else None
    lay(model, "0.weight", Product(1, block=64), mask=mask)
    path = tmp_path / "model.safetensors"
    save(model, path)
    loaded = load(path, model=nn.Sequential(nn.Linear(columns, rows, bias=False)))
    assert torch.equal(loaded[0].weight, model[0].weight)


@pytest.mark.parametrize("fields", [{"bits": 0}, {"bits": 9}, {"block": 0}, {"block": 65}])
def test_fields_out_of_bounds_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match=next(iter(fields))):
        Product(**fields)
