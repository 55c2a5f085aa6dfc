"""Laid embeddings that decode only what is looked up compute, and learn, the same."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laconic.recover import Adam, descent
from laconic.recover.descent import Descent
from laconic.weights import Binary, Laid, LearnedStep, LossAware, Symmetric, Ternary, lay
from laconic.weights.laid import tie_
from laconic.weights.lookup import looked_up

ROWS, WIDTH = 40, 12
IDS = torch.tensor([[3, 5, 3, 0], [17, 0, 39, 5]])


def table(representation: Any = None, **fields: Any) -> nn.Sequential:
    """Return an embedding, laid by row unless told otherwise, before a linear layer."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(ROWS, WIDTH, **fields), nn.Linear(WIDTH, 2))
    lay(network, "0.weight", representation or Ternary("row"))
    return network


def trained(network: nn.Module) -> list[Tensor]:
    """Return what some updates make of the parameters, and the losses."""
    parameters = [*network.parameters()]
    down = Descent(Adam(1e-2), network, ["0", "1"], networks=[parameters], name="train")
    losses = [down.update(lambda: network(IDS).square().sum(), 0.0, "here") for _ in range(3)]
    return [*parameters, torch.tensor(losses)]


def decoded_rows(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many rows are decoded each time that the network looks up."""
    counts: list[int] = []
    plain = Ternary.shortcut

    def counting(self: Ternary, weight: Tensor, *rest: Any) -> Tensor:
        counts.append(len(weight))
        return plain(self, weight, *rest)

    with monkeypatch.context() as patch, looked_up(network):
        patch.setattr(Ternary, "shortcut", counting)
        network(IDS)
    return counts


@pytest.mark.parametrize(
    "representation",
    [
        Ternary("row"),
        Binary("row"),
        Symmetric(3, granularity="row"),
        LearnedStep(4, granularity="row"),
        LossAware(2, granularity="row"),
    ],
)
@pytest.mark.parametrize("fields", [{}, {"padding_idx": 0}, {"scale_grad_by_freq": True}])
def test_training_is_the_same_bit_for_bit(
    representation: Any, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = trained(table(representation, **fields))
    monkeypatch.setattr(descent, "looked_up", lambda model: contextlib.nullcontext())
    whole = trained(table(representation, **fields))
    assert all(torch.equal(own, other) for own, other in zip(some, whole, strict=True))


def test_only_the_rows_of_a_batch_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoded_rows(table(), monkeypatch) == [len(IDS.unique())]


def test_where_rows_depend_on_others_all_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoded_rows(table(Ternary()), monkeypatch) == [ROWS]


def test_what_is_masked_is_decoded_whole() -> None:
    network = table()
    lay(network, "0.weight", Ternary("row"), mask=torch.rand(ROWS, WIDTH) > 0.5)
    before = network(IDS)
    with looked_up(network):
        assert "forward" not in vars(network[0])
        assert torch.equal(network(IDS), before)


@pytest.mark.parametrize("representation", [Ternary("row"), LossAware(2, granularity="row")])
def test_a_row_alone_is_decoded_as_among_others(representation: Any) -> None:
    network = table(representation, padding_idx=0)
    before = network[0].weight
    with looked_up(network):
        assert all(
            torch.equal(network[0](torch.tensor([row])), before[row : row + 1])
            for row in range(ROWS)
        )


def test_it_is_called_as_any_embedding() -> None:
    network = table()
    before = network[0](IDS)
    with looked_up(network):
        assert torch.equal(network[0](input=IDS), before)
        assert network[0](IDS[:0]).shape == (0, *before.shape[1:])


def test_a_forward_of_its_own_stays() -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * 2

    module = Scaled(ROWS, WIDTH)
    lay(module, "weight", Ternary("row"))
    before = module(IDS)
    with looked_up(module):
        assert torch.equal(module(IDS), before)


def test_a_tied_decoder_and_a_penalty_read_the_whole_weight() -> None:
    network = nn.Sequential(nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, ROWS, bias=False))
    tie_(network, {"1.weight": "0.weight"})
    lay(network, "0.weight", Ternary("row"))
    with torch.nn.utils.parametrize.cached(), looked_up(network):
        network[0](IDS)
        assert torch.equal(network[0].weight, network[1].weight)
        assert isinstance(network[0].parametrizations.weight[0], Laid)


def test_the_forward_comes_back_whatever_happens() -> None:
    network = table()
    with pytest.raises(IndexError), looked_up(network):
        network(torch.tensor([ROWS]))
    assert "forward" not in vars(network[0])
    assert network(IDS).shape == (*IDS.shape, 2)
