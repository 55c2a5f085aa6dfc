"""Ternary weight splitting of a network: the same outputs, what is kept and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.split import (
    IDENTITY,
    LOGITS,
    after,
    drawn,
    granularities,
    images,
    network,
    ternary_network,
    thresholds,
)
from laconic.errors import ChainError, LaconicError
from laconic.models import digits_cnn
from laconic.models.halves import Halves
from laconic.recover import AdamW, Train
from laconic.scope import Scope
from laconic.step import State, run_step
from laconic.structure import PlanSplit, Prune, Split
from laconic.tasks import Task
from laconic.weights import Binary, Float, MinMax, Quantize, Symmetric, Ternary, activations_of
from laconic.weights.laid import laid_tensors, lay, mask_of, tie_


@granularities
@thresholds
def test_a_split_network_computes_the_same(granularity: Any, threshold: Any) -> None:
    granularity = 2 if granularity == 5 else granularity
    model = ternary_network(Ternary(granularity, threshold=threshold)).double()
    wanted = model(images().double())
    after(Split(), model)
    assert torch.allclose(model(images().double()), wanted, rtol=0, atol=IDENTITY)
    for name, (laid, _) in laid_tensors(model).items():
        assert laid.representation == Binary(granularity), name
    assert len(laid_tensors(model)) == 8
    assert type(model[1]) is nn.BatchNorm2d


def test_single_precision() -> None:
    model = ternary_network()
    wanted = model(images())
    after(Split(), model)
    torch.testing.assert_close(model(images()), wanted, rtol=0, atol=LOGITS)


def test_biases_are_halved_and_only_where_there_are_any() -> None:
    model = ternary_network()
    bias = model[6].bias.detach().clone()
    after(Split(), model)
    assert torch.equal(model[6].first.bias, bias / 2)
    assert torch.equal(model[6].second.bias, bias / 2)
    assert model[0].first.bias is None


def test_a_laid_bias_is_halved_as_the_network_uses_it() -> None:
    model = ternary_network()
    lay(model, "8.bias", Float(), mask=torch.tensor([True, False, True]))
    wanted = model(images())
    after(Split(), model)
    assert model[8].first.bias[1] == 0
    torch.testing.assert_close(model(images()), wanted, rtol=0, atol=LOGITS)


def test_pruned_weights_stay_pruned_in_both_halves() -> None:
    model = after(Prune("weights", keep=0.4), network())
    after(Quantize(Ternary("row")), model)
    masks = {name: mask_of(model, name) for name in laid_tensors(model)}
    wanted = model(images())
    after(Split(), model)
    for name, mask in masks.items():
        for half in ("first", "second"):
            own = name.replace(".weight", f".{half}.weight")
            assert torch.equal(mask_of(model, own), mask)
    torch.testing.assert_close(model(images()), wanted, rtol=0, atol=LOGITS)


def test_halves_round_the_input_that_their_layer_did() -> None:
    model = digits_cnn()
    after(Quantize(Ternary(), activation=4), model)
    images = drawn(8, 1, 8, 8)
    before, places = model.eval()(images), activations_of(model)
    after(Split(), model)
    assert activations_of(model) == places
    torch.testing.assert_close(model.eval()(images), before, rtol=0, atol=LOGITS)
    for bits, scope in ((8, "*"), (7, "kind:linear, kind:conv"), (6, "*.first, *.second")):
        after(Quantize(activation=bits, scope=Scope(scope)), model)
        assert activations_of(model) == {path: {"input": MinMax(bits)} for path in places}


def test_only_what_is_ternary_in_the_scope_is_split() -> None:
    model = ternary_network(scope="3, 6")
    lay(model, "0.weight", Symmetric(4))
    after(Split(scope=Scope("kind:conv")), model)
    assert [isinstance(layer, Halves) for layer in model] == [i == 3 for i in range(9)]
    assert laid_tensors(model)["0.weight"][0].representation == Symmetric(4)
    assert laid_tensors(model)["6.weight"][0].representation == Ternary()
    after(Split(), model)
    assert isinstance(model[6], Halves)
    before = list(model.state_dict())
    after(Split(), model)
    assert list(model.state_dict()) == before


def test_only_what_is_ternary_by_its_kind_is_split() -> None:
    step, model = Quantize(Binary(), embedding=Ternary("row")), nn.Sequential(nn.Embedding(3, 2))
    model.append(nn.Linear(2, 2))
    with pytest.raises(ChainError, match="nothing in"):
        Split(scope="kind:linear").check(model, None, (step,))
    Split().check(model, None, (step,))


def test_what_may_move_and_modes_stay() -> None:
    model = ternary_network().train()
    model[3].parametrizations.weight.original.requires_grad_(False)
    model[6].bias.requires_grad_(False)
    after(Split(), model)
    still = {plain for plain, p in model.named_parameters() if not p.requires_grad}
    weights = {f"3.{half}.parametrizations.weight.original" for half in ("first", "second")}
    assert still == weights | {"6.first.bias", "6.second.bias"}
    assert all(module.training for module in model.modules())


def test_a_network_with_nothing_ternary_is_refused() -> None:
    for model, earlier in (
        (network(), ()),
        (network(), (Quantize(4),)),
        (ternary_network(), (Quantize(4),)),
        (network(), (Quantize(Ternary()), Quantize(Binary()))),
    ):
        with pytest.raises(ChainError, match=r"split: nothing in '\*' is ternary"):
            Split().check(model, None, earlier)
    Split().check(network(), None, (Quantize(4), Quantize(Ternary(), scope=Scope("3"))))


def test_a_plan_without_ternary_parts_leaves_nothing_to_split() -> None:
    model = network()
    names = list(model.state_dict())
    run_step(Split(), State(model))
    assert list(model.state_dict()) == names


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x)[0])


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tie_(model, {"1.weight": "0.weight"})
    return model


def with_a_tied_bias() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tie_(model, {"1.bias": "0.bias"})
    return model


def with_something_attached() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].add_module("extra", nn.Identity())
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Recurrent(), "split: 'lstm' is a LSTM, which cannot be split"),
        (tied(), "split: the weight of '0' is also that of '1'"),
        (with_a_tied_bias(), r"split: '0\.bias' and '1\.bias' are one parameter"),
        (nn.Sequential(nn.MultiheadAttention(4, 1)), "split: '0' is a MultiheadAttention"),
        (nn.TransformerEncoderLayer(4, 1, 8), "is a MultiheadAttention|is a Transformer"),
        (nn.Linear(4, 4), "split: the network is a single layer"),
        (with_something_attached(), "split: '0' carries 'extra'"),
    ],
    ids=["lstm", "tied", "bias", "attention", "encoder", "root", "attached"],
)
def test_what_has_no_halves_is_refused_before_any_work(model: nn.Module, message: str) -> None:
    with pytest.raises(LaconicError, match=message):
        Split().check(model, None, (Quantize(Ternary()),))
    run_step(Quantize(Ternary()), State(model))
    names = list(model.state_dict())
    with pytest.raises(LaconicError, match=message):
        run_step(Split(), State(model))
    assert list(model.state_dict()) == names


def test_a_recurrent_network_is_split_where_it_can_be() -> None:
    model = Recurrent().eval()
    run_step(Quantize(Ternary()), State(model))
    wanted = model(drawn(3, 1, 4))
    after(Split(scope=Scope("*, !lstm")), model)
    assert isinstance(model.last, Halves)
    torch.testing.assert_close(model(drawn(3, 1, 4)), wanted, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("rows", [8, 200])
def test_a_table_that_pads_computes_the_same(rows: int) -> None:
    table = nn.Sequential(nn.Embedding(rows, 16, padding_idx=0)).double()
    run_step(Quantize("ternary"), State(table))
    before = table[0].weight.detach().clone()
    run_step(Split(), State(table))
    after = table[0].first.weight + table[0].second.weight
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
    assert not table[0].first.weight[0].any()


def test_padding_rows_of_zeros_stay_so_through_training() -> None:
    table = nn.Sequential(nn.Embedding(9, 4, padding_idx=0), nn.Flatten(), nn.Linear(8, 3))
    ids = torch.arange(18).reshape(9, 2) % 9
    pair = ids, torch.arange(9) % 3
    state = State(table, Task(pair, pair, pair))
    run_step(Quantize("ternary"), state)
    learn = Train(epochs=3, batch=3, optimizer=AdamW(1e-2))
    for step in (Split(), learn):
        run_step(step, state)
        both = (state.model[0].first, state.model[0].second)
        assert not any(bool(half.weight[0].any()) for half in both)
        assert all(bool(half.weight[1:].all()) for half in both)
    plain = nn.Sequential(nn.Embedding(9, 4, padding_idx=0))
    budget = "size <= 14 B"
    run_step(PlanSplit(budget, choose="random_gain", embedding="tensor"), State(plain))
    assert not plain[0].weight[0].any() and bool(plain[0].weight[1:].all())
