"""Laws of representations by rows and groups: sums as in the file, rows looked up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn.utils import parametrize

from helpers.representations import (
    VARIANTS,
    check_exact,
    every,
    laid_on,
    masks,
    normal,
    same_bytes,
    same_codes,
    weights,
)
from laconic.errors import ModelError
from laconic.weights import Binary, Groups, Laid, Representation, Ternary
from laconic.weights.lookup import looked_up


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "representation", [Binary("row"), Ternary("row"), Ternary("row", threshold="exact")], ids=repr
)
@pytest.mark.parametrize("shape", [(31, 40_000), (3, 70_000)], ids=str)
def test_long_rows_are_added_up_as_in_the_file(
    representation: Representation, shape: tuple[int, int], two_threads: None
) -> None:
    # What is left over is one row, which two threads would add up in another order.
    weight = torch.randn(shape)
    decoded = representation.decode(representation.encode(weight))
    assert torch.equal(representation.quantized(weight, None, {}), decoded)


@pytest.mark.parametrize(
    "representation", [Binary("row"), Ternary("row"), Ternary("row", threshold="exact")], ids=repr
)
def test_rows_that_lie_apart_are_added_up_as_in_the_file(representation: Representation) -> None:
    weight = torch.randn(3000, 100).t()  # more rows than are done together, the last ones few
    decoded = representation.decode(representation.encode(weight))
    assert torch.equal(representation.quantized(weight, None, {}), decoded)


@pytest.mark.parametrize("representation", [v for v in VARIANTS if v.row_by_row], ids=repr)
def test_rows_that_are_looked_up_are_those_of_the_whole(representation: Representation) -> None:
    ids = torch.tensor([[8, 0, 3], [3, 5, 0]])
    for name, weight in weights((9, 7)).items():
        table = nn.Embedding.from_pretrained(weight.contiguous(), freeze=False)
        laid = Laid(representation, state=representation.fit(weight))
        parametrize.register_parametrization(table, "weight", laid, unsafe=True)
        whole, expected = _looked_up(table, ids)
        with looked_up(table):
            some, found = _looked_up(table, ids)
        assert torch.equal(whole, some), name
        assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True)), name


def _looked_up(table: nn.Embedding, ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    out = table(ids)
    factors = torch.arange(1.0, 1 + out.numel()).reshape(out.shape)
    return out, torch.autograd.grad((out * factors).sum(), [*table.parameters()])


@every
def test_groups_of_a_number_of_weights(representation: Representation) -> None:
    if "granularity" not in type(representation).model_fields:
        return
    by_three = representation.model_copy(update={"granularity": 3})
    for name, mask in masks((4, 6)).items():
        check_exact(by_three, normal(4, 6), mask)
        assert name
    blocks = normal(8, 3)
    row = representation.model_copy(update={"granularity": "row"})
    torch.manual_seed(0)
    expected = laid_on(row, blocks).encode(blocks)
    torch.manual_seed(0)
    flat = laid_on(by_three, blocks.reshape(4, 6)).encode(blocks.reshape(4, 6))
    for key, table in expected.tables.items():
        assert same_bytes(table, flat.tables[key])
    with pytest.raises(ModelError, match="groups of 3 do not divide"):
        laid_on(by_three, normal(4, 7)).encode(normal(4, 7))


@every
def test_a_number_of_groups(representation: Representation) -> None:
    if "granularity" not in type(representation).model_fields:
        return
    two = type(representation)(**{**dict(representation), "granularity": {"groups": 2}})
    twelve = representation.model_copy(update={"granularity": 12})
    assert two == representation.model_copy(update={"granularity": Groups(2)})
    assert Representation.coerce(yaml.safe_load(yaml.safe_dump(two.to_data()))) == two
    for mask in masks((4, 6)).values():
        check_exact(two, normal(4, 6), mask)
        found = []
        for each in (two, twelve):
            torch.manual_seed(0)
            found.append(laid_on(each, normal(4, 6), mask).encode(normal(4, 6)))
        assert same_codes(*found)
    with pytest.raises(ModelError, match="2 groups do not divide"):
        laid_on(two, normal(3, 7)).encode(normal(3, 7))
