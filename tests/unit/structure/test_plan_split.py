"""Adaptive splitting: which parts a budget lets be ternary, and how they are chosen."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize
from torch import Tensor, nn

import laconic
from laconic.budget import knapsack
from laconic.errors import BudgetError, ChainError, LaconicError, ModelError, ScopeError, TaskError
from laconic.names import module_of
from laconic.recipe import Recipe
from laconic.recover import SGD, LeastSquares, Reconstruct, Train
from laconic.run import compress
from laconic.scope import Scope
from laconic.step import State, run_step
from laconic.structure import (
    Gain,
    MaximalGain,
    MinimalGain,
    PlanSplit,
    Prune,
    RandomGain,
    ShareLayers,
    Split,
    gains,
)
from laconic.tasks import Task
from laconic.weights import Binary, Quantize, QuantNoise, Ternary
from laconic.weights.laid import laid_tensors, latent_of, lay

# What 32-bit numbers, a scale and 1-bit codes take.
FLOAT, SCALE = 4, 4


def network() -> nn.Sequential:
    """Return a network of three linear layers [batch, 8] -> [batch, 3]."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
        ).eval()


def task() -> Task:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    inputs = torch.randn(60, 8, generator=generator) + labels[:, None]
    return Task((inputs, labels), (inputs[:12], labels[:12]), (inputs[:12], labels[:12]))


WEIGHTS, BIASES = (8 * 16, 16 * 32, 32 * 3), (16, 32, 3)
COSTS = [weights // 8 + SCALE + FLOAT * bias for weights, bias in zip(WEIGHTS, BIASES, strict=True)]
LEAST = sum(COSTS)  # all binary: what a second copy of everything takes once more


def planned(budget: str, choose: Gain | None = None, seed: int = 0, **fields: Any) -> Any:
    model = network()
    step = PlanSplit(budget, choose=choose or RandomGain(), **fields)
    step.check(model, task())
    run_step(step, State(model, task(), seed=seed))
    return model


def ternary(model: nn.Module) -> list[str]:
    """Return the names of the ternary weights; all others must be binary."""
    laid = {name: layer.representation for name, (layer, _) in laid_tensors(model).items()}
    assert set(map(type, laid.values())) <= {Binary, Ternary}
    return [name for name, kind in laid.items() if isinstance(kind, Ternary)]


# ------------------------------------------------------------------ budgets


def test_a_budget_of_the_binary_network_leaves_all_binary() -> None:
    model = planned(f"size <= {LEAST} B")
    assert ternary(model) == [] and len(laid_tensors(model)) == 3


def test_a_budget_of_twice_that_makes_all_ternary() -> None:
    assert len(ternary(planned(f"size <= {2 * LEAST} B"))) == 3
    assert len(ternary(planned(f"size <= {2 * LEAST} B", MaximalGain(batches=1)))) == 3
    assert len(ternary(planned(f"size <= {2 * LEAST - 1} B"))) == 2
    assert len(ternary(planned("size <= 1x", MinimalGain(batches=1)))) == 3


def test_a_part_is_ternary_only_if_it_fits() -> None:
    for extra in range(0, LEAST, 7):
        chosen = ternary(planned(f"size <= {LEAST + extra} B"))
        spent = sum(COSTS[int(name[0]) // 2] for name in chosen)
        left = [cost for place, cost in enumerate(COSTS) if f"{2 * place}.weight" not in chosen]
        assert spent <= extra < spent + min(left, default=LEAST)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (f"size <= {LEAST - 1} B", f"takes {LEAST} bytes, 1 more than 'size"),
        ("size <= 0.01x", "more than 'size <= 0.01x' allows"),
        ("parameters <= 1 M, size <= 1 MiB", "limits parameters, size_bytes, and splits"),
        ("macs <= 1 M", "write 'size <= ...'"),
        ("size <= 1x, macs <= 0.5x", "limits macs, size_bytes, and splits"),
    ],
)
def test_what_cannot_be_met_is_refused_before_any_work(budget: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        PlanSplit(budget, choose=RandomGain()).check(network(), None)
    model = network()
    with pytest.raises(BudgetError, match=message):
        run_step(PlanSplit(budget, choose=RandomGain()), State(model))
    assert not laid_tensors(model)


def test_another_limit_is_refused_before_what_stands_before_the_plan() -> None:
    plan = PlanSplit("macs <= 0.5x", choose=RandomGain())
    with pytest.raises(BudgetError, match="limits macs, and splits"):
        Recipe([Train(), plan]).check(network(), task())


def test_the_plan_is_what_the_split_network_takes() -> None:
    """Codes, scales and floats of the file add up to no more than the budget."""
    for budget in (LEAST, LEAST + COSTS[0], 2 * LEAST):
        model = planned(f"size <= {budget} B")
        run_step(Split(), State(model))
        stored = sum(
            latent.numel() / 8 + SCALE for _, (_, latent) in laid_tensors(model).items()
        ) + sum(FLOAT * p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
        assert stored <= budget


# ------------------------------------------------------------------ what is laid


def test_latent_weights_stay_as_they_were() -> None:
    model = planned("size <= 1 MiB")
    for name, plain in network().named_parameters():
        if name.endswith("weight"):
            assert torch.equal(latent_of(model, name)[1], plain)


def test_masks_stay() -> None:
    model = network()
    run_step(Prune("weights", keep=0.5), State(model))
    masks = {name: layer.mask.clone() for name, (layer, _) in laid_tensors(model).items()}
    run_step(PlanSplit("size <= 1 MiB", choose=MinimalGain(batches=1)), State(model, task()))
    assert len(ternary(model)) == 3
    for name, (layer, _) in laid_tensors(model).items():
        assert torch.equal(layer.mask, masks[name])


def test_tables_have_a_granularity_of_their_own() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    run_step(PlanSplit("size <= 1 MiB", choose=RandomGain()), State(model))
    found = {name: layer.representation for name, (layer, _) in laid_tensors(model).items()}
    assert found == {"0.weight": Ternary("row"), "1.weight": Ternary()}
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    step = PlanSplit("size <= 60 B", choose=RandomGain(), weight=8, embedding="tensor")
    run_step(step, State(model))
    found = {name: layer.representation for name, (layer, _) in laid_tensors(model).items()}
    assert found["0.weight"].granularity == "tensor" and found["1.weight"].granularity == 8


def test_a_row_that_pads_costs_what_any_other_does() -> None:
    found = []
    for padding in (None, 0):
        model = nn.Sequential(nn.Embedding(400, 8, padding_idx=padding))
        step = PlanSplit("size <= 410 B", choose=RandomGain(), embedding="tensor")
        step.check(model, None)
        run_step(step, State(model))
        found.append(
            {name: layer.representation for name, (layer, _) in laid_tensors(model).items()}
        )
    assert found[0] == found[1] == {"0.weight": Binary("tensor")}


def test_the_scope_says_where() -> None:
    model = planned("size <= 1 MiB", scope=Scope("2, 4"))
    assert list(laid_tensors(model)) == ["2.weight", "4.weight"]


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Sequential(nn.ReLU()), ScopeError, "selects no weight"),
        (nn.Sequential(nn.LSTM(4, 4)), ModelError, "plan_split: '0' is a LSTM"),
        (nn.Linear(4, 4), ModelError, "plan_split: the network is a single layer"),
    ],
)
def test_what_could_not_be_split_is_refused(
    model: nn.Module, error: type[LaconicError], message: str
) -> None:
    with pytest.raises(error, match=message):
        PlanSplit("size <= 1 MiB", choose=RandomGain()).check(model, None)


def test_data_are_asked_for_where_they_are_needed() -> None:
    for choose in (MaximalGain(), MinimalGain()):
        with pytest.raises(TaskError, match=f"{choose.name} scores the network"):
            PlanSplit("size <= 1 MiB", choose=choose).check(network(), None)


def test_blocks_that_share_weights_are_refused() -> None:
    model = nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))
    with pytest.raises(ChainError, match=r"plan_split: '0\.0' shares its weight"):
        PlanSplit("size <= 1 MiB", choose=RandomGain()).check(model, None, (ShareLayers(),))


def test_what_stands_in_two_places_is_counted_once() -> None:
    body = nn.Linear(8, 8)
    model = nn.Sequential(body, nn.ReLU(), body, nn.Linear(8, 3))
    least = (8 * 8 + 8 * 3) // 8 + 2 * SCALE + FLOAT * (8 + 3)
    for again in (model, planned_on(model, f"size <= {least} B")):
        PlanSplit(f"size <= {least} B", choose=RandomGain()).check(again, None)
        with pytest.raises(BudgetError, match=f"takes {least} bytes, 1 more"):
            PlanSplit(f"size <= {least - 1} B", choose=RandomGain()).check(again, None)


def planned_on(model: nn.Module, budget: str) -> nn.Module:
    """Return a network all of whose weights are binary."""
    run_step(PlanSplit(budget, choose=RandomGain()), State(model))
    return model


# ------------------------------------------------------------------ gains


def test_gains_are_those_of_one_ternary_part() -> None:
    """u_i = metric(all binary but part i) - metric(all binary), at least 0."""
    data, found = task(), MaximalGain(batches=2, batch=30, by="loss")
    model = planned(f"size <= {LEAST} B")
    parts = [
        gains.Part({name: layer}, {name: laid_of(name)}, 1)
        for name, (layer, _) in laid_tensors(model).items()
    ]
    before = model(torch.ones(1, 8))
    measured = found.measured(State(model, data), parts)
    assert torch.equal(model(torch.ones(1, 8)), before), "the network is left as it was"
    data.test = data.train
    everything = data.score(model)["loss"]
    for name, gain in zip(laid_tensors(model), measured, strict=True):
        one = network()
        for each, plain in laid_tensors(model).items():
            lay(one, each, Ternary() if each == name else plain[0].representation)
        assert gain == pytest.approx(max(0, everything - data.score(one)["loss"]), abs=1e-5)
    assert max(measured) > 0 and min(measured) >= 0


@pytest.mark.parametrize("by", ["loss", "metric"])
def test_gains_that_are_not_numbers_are_refused(by: Any) -> None:
    model = network()
    data = task()
    data.metrics = {"broken": lambda outputs, targets: math.nan} | dict(data.metrics)
    if by == "loss":
        with torch.no_grad():
            model[4].bias.fill_(math.inf)
    with pytest.raises(LaconicError, match=rf"maximal_gain: the {by} of train is nan"):
        run_step(PlanSplit("size <= 0.5x", choose=MaximalGain(by=by)), State(model, data))


def laid_of(name: str) -> Any:
    model = network()
    lay(model, name, Ternary())
    return laid_tensors(model)[name][0]


def test_only_so_many_examples_are_scored() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return self.last(x)

    choose = MaximalGain(batches=3, batch=4)
    run_step(PlanSplit("size <= 1 MiB", choose=choose), State(Spy(), task()))
    assert [len(x) for x in seen] == [4] * 6
    assert torch.equal(torch.cat(seen[:3]), torch.cat(seen[3:])), "parts see other examples"
    seen.clear()
    choose = MaximalGain(batches=9, batch=50, split="validate")
    run_step(PlanSplit("size <= 1 MiB", choose=choose), State(Spy(), task()))
    assert [len(x) for x in seen] == [12, 12]


items = st.lists(st.tuples(st.integers(1, 30), st.floats(0, 10, width=16)), max_size=9)


def total(choose: Gain, costs: list[int], worth: list[float], room: int, seed: int = 0) -> float:
    order = choose.order(worth, costs, room, torch.Generator().manual_seed(seed))
    assert sorted(order) == list(range(len(costs)))
    chosen = gains.affordable(order, costs, room)
    assert sum(costs[place] for place in chosen) <= room
    return sum(worth[place] for place in chosen)


@given(items=items, room=st.integers(0, 120), seed=st.integers(0, 9))
def test_no_choice_gains_more_than_the_maximal(
    items: list[tuple[int, float]], room: int, seed: int
) -> None:
    costs, worth = [cost for cost, _ in items], [gain for _, gain in items]
    best = total(MaximalGain(), costs, worth, room)
    subsets = itertools.product((0, 1), repeat=len(items))
    brute = max(
        sum(itertools.compress(worth, taken))
        for taken in subsets
        if sum(itertools.compress(costs, taken)) <= room
    )
    slack = 1e-9
    assert math.isclose(best, brute, abs_tol=slack)
    for other in (RandomGain(), MinimalGain()):
        assert total(other, costs, worth, room, seed) <= best + slack
    assert total(MaximalGain(), costs, worth, room + 5) >= best - slack
    assert math.isclose(total(MaximalGain(), costs, worth, sum(costs)), sum(worth), abs_tol=slack)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 50)), min_size=1, max_size=15))
def test_the_knapsack_is_the_integer_programme(items: list[tuple[int, int]]) -> None:
    costs, worth = [cost for cost, _ in items], [float(gain) for _, gain in items]
    room = sum(costs) // 2
    solved = optimize.milp(
        [-gain for gain in worth],
        constraints=optimize.LinearConstraint([costs], ub=room),
        integrality=1,
        bounds=optimize.Bounds(0, 1),
    )
    chosen = knapsack(costs, worth, room)
    assert sum(worth[place] for place in chosen) == pytest.approx(-solved.fun)


def test_costs_of_any_size_can_be_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    costs, worth, room = [100_003, 200_003, 300_007, 50_021], [1.0, 2.5, 3.0, 0.1], 310_000

    def chosen() -> tuple[int, ...]:
        order = MaximalGain().order(worth, costs, room, torch.Generator())
        return gains.affordable(order, costs, room)

    exact = chosen()
    monkeypatch.setattr(gains, "CELLS", 4000)
    assert chosen() == exact == (0, 1)


def test_random_choices_come_from_the_seed() -> None:
    budget = f"size <= {LEAST + COSTS[1]} B"
    plans = [tuple(ternary(planned(budget, seed=seed))) for seed in range(12)]
    assert plans == [tuple(ternary(planned(budget, seed=seed))) for seed in range(12)]
    assert len(set(plans)) > 1


# ------------------------------------------------------------------ encoders


def encoder() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="encoders need transformers")
    config = transformers.BertConfig(
        hidden_size=8,
        num_attention_heads=2,
        intermediate_size=12,
        num_hidden_layers=2,
        vocab_size=20,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config).eval()


SCOPE = Scope("*.encoder.* kind:linear, *.pooler.dense, *.word_embeddings")


def test_parts_of_an_encoder(caplog: pytest.LogCaptureFixture) -> None:
    """Query with key, value with output, both feed-forward projections; table and pooler."""
    model = encoder()
    with caplog.at_level("INFO"):
        run_step(PlanSplit("size <= 1 MiB", choose=RandomGain(), scope=SCOPE), State(model))
    assert "10 of 10 parts" in caplog.text
    for block in (0, 1):
        path = f"bert.encoder.layer.{block}"
        for part in (
            f"{path}: query, key",
            f"{path}: value, output",
            f"{path}.intermediate.dense",
            f"{path}.output.dense",
        ):
            assert part in caplog.text
    found = {name: layer.representation for name, (layer, _) in laid_tensors(model).items()}
    assert len(found) == 14
    assert found["bert.embeddings.word_embeddings.weight"] == Ternary("row")


def binary_bytes(model: nn.Module) -> int:
    """Return what a network takes with the whole scope binary, as the refusal says."""
    with pytest.raises(BudgetError) as refused:
        PlanSplit("size <= 1 B", choose=RandomGain(), scope=SCOPE).check(model, None)
    return int(re.search(r"takes ([\d,]+) bytes", str(refused.value))[1].replace(",", ""))


def test_the_size_of_a_binary_bert_base() -> None:
    """14.96 MiB: codes, scales of matrices, and everything that stays float; no head."""
    transformers = pytest.importorskip("transformers", reason="encoders need transformers")
    with torch.device("meta"):
        model = nn.ModuleDict({"bert": transformers.BertModel(transformers.BertConfig())})
    scales_of_rows = 30522 * SCALE
    assert (binary_bytes(model) - scales_of_rows) / 2**20 == pytest.approx(14.96, abs=0.005)


@pytest.mark.parametrize("seed", range(8))
def test_what_belongs_together_is_chosen_together(seed: int) -> None:
    model = encoder()
    budget = f"size <= {binary_bytes(model) + 250} B"
    step = PlanSplit(budget, choose=RandomGain(), scope=SCOPE)
    run_step(step, State(model, seed=seed))
    chosen = {module_of(name) for name in ternary(model)}
    assert 0 < len(chosen) < 14
    for block in (0, 1):
        own = f"bert.encoder.layer.{block}.attention"
        assert (f"{own}.self.query" in chosen) == (f"{own}.self.key" in chosen)
        assert (f"{own}.self.value" in chosen) == (f"{own}.output.dense" in chosen)


# ------------------------------------------------------------------ the recipe


def test_a_mixed_network_is_trained_and_then_split(tmp_path: Path) -> None:
    recipe = Recipe.parse(
        """
steps:
  - plan_split: {budget: size <= 500 B, choose: {maximal_gain: {batches: 1, by: loss}}}
  - train: {epochs: 2, batch: 20, optimizer: {sgd: {lr: 0.1}}}
  - split
  - train: {epochs: 1, batch: 20, optimizer: {sgd: {lr: 0.05}}}
"""
    )
    result = compress(network(), task(), recipe, device="cpu")
    laid = {name: layer.representation for name, (layer, _) in laid_tensors(result.model).items()}
    assert set(laid.values()) == {Binary()}
    assert 3 < len(laid) < 6
    result.save(tmp_path / "model.safetensors")
    again = laconic.load(tmp_path / "model.safetensors", model=network())
    inputs = torch.ones(2, 8)
    assert torch.equal(again(inputs), result.model.eval()(inputs))


def test_the_function_stays_through_a_plan_and_its_split() -> None:
    model = planned(f"size <= {LEAST + COSTS[1]} B", MaximalGain(batches=1, by="loss"))
    run_step(Train(batch=20, optimizer=SGD(0.1)), State(model, task()))
    inputs = torch.randn(9, 8)
    wanted = model.eval()(inputs)
    run_step(Split(), State(model, task()))
    torch.testing.assert_close(model(inputs), wanted, rtol=0, atol=1e-5)


def test_a_network_that_is_all_ternary_may_be_planned_again() -> None:
    model = network()
    run_step(Quantize(Ternary()), State(model))
    run_step(PlanSplit(f"size <= {LEAST} B", choose=RandomGain()), State(model))
    assert ternary(model) == []


def test_a_recipe_knows_before_it_runs_what_planning_lays() -> None:
    plan = PlanSplit("size <= 1x", choose=RandomGain())
    with pytest.raises(ChainError, match="rounding would undo"):
        Recipe([plan, Reconstruct(solve=LeastSquares())]).check(network(), task())
    Recipe([plan, QuantNoise(retrain=Train())]).check(network(), task())
