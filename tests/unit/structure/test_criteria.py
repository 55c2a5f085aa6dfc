"""Criteria of single weights: scores of known networks; scoring leaves the network alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.criteria import classification, linear, mean_square, network, regression
from laconic.errors import ModelError, RecipeError, TaskError
from laconic.scope import Scope
from laconic.step import State, members
from laconic.structure.criteria import Criterion, Hessian, Magnitude, Random, Taylor, standardized
from laconic.tasks.split import Batch
from laconic.tasks.task import Task
from laconic.weights.codebook import KMeans
from laconic.weights.laid import bake, lay, weights_of
from laconic.weights.representation import Float

DATA = [Taylor(), Taylor(per="sample"), Hessian(), Hessian(estimator="hutchinson")]
EVERY = [Magnitude(), Magnitude("std"), Random(), *DATA]


def scored(criterion: Criterion, state: State) -> dict[str, Tensor]:
    return criterion.scores(state, weights_of(state.model, Scope("*")))


# ------------------------------------------------------------------ every criterion


@pytest.mark.parametrize("criterion", EVERY, ids=repr)
def test_one_finite_score_per_weight_the_same_each_time(criterion: Criterion) -> None:
    state = State(network(), classification(), seed=3)
    first, second = scored(criterion, state), scored(criterion, state)
    assert {name: score.shape for name, score in first.items()} == {
        "0.weight": (4, 1, 3, 3),
        "5.weight": (3, 64),
    }
    for name, score in first.items():
        assert torch.equal(score, second[name])
        assert bool(torch.isfinite(score).all())
        assert float(score.std()) > 0
        assert not score.requires_grad


@pytest.mark.parametrize("criterion", EVERY, ids=repr)
def test_scoring_leaves_the_network_as_it_was(criterion: Criterion) -> None:
    model, task = network(), classification()
    lay(model, "5.weight", KMeans(3), mask=torch.arange(192).reshape(3, 64) % 2 == 0)
    model.train()
    model[2].eval()
    model[0].weight.grad = torch.full((4, 1, 3, 3), 7.0)
    model[0].bias.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    weight = model[5].weight.detach().clone()
    torch.manual_seed(9)
    scored(criterion, State(model, task))
    drawn = torch.rand(1)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: value.requires_grad for name, value in model.named_parameters()} == flags
    assert torch.equal(model[0].weight.grad, torch.full((4, 1, 3, 3), 7.0))
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["0.weight"]
    assert torch.equal(model[5].weight, weight)
    torch.manual_seed(9)
    assert torch.equal(drawn, torch.rand(1))


def test_recipe_forms() -> None:
    adapter = TypeAdapter(Criterion)
    assert adapter.validate_python("magnitude") == Magnitude()
    assert adapter.validate_python({"magnitude": "std"}) == Magnitude(normalize="std")
    for criterion in EVERY:
        assert adapter.validate_python(criterion.to_data()) == criterion
        assert hash(criterion) == hash(adapter.validate_python(criterion.to_data()))
    assert {"magnitude", "taylor", "hessian", "random"} <= set(members(Criterion))
    with pytest.raises(RecipeError, match="batches"):
        Taylor(batches=0)
    with pytest.raises(RecipeError, match="estimator"):
        Hessian(estimator="exact")  # type: ignore[arg-type]


# ------------------------------------------------------------------ without data


def test_magnitude() -> None:
    model = linear(2)
    model.weight.data = torch.tensor([[3.0, -4.0], [0.0, 0.5]])
    assert scored(Magnitude(), State(model))["weight"].tolist() == [[3.0, 4.0], [0.0, 0.5]]


def test_standardized_magnitude_looks_at_survivors_alone() -> None:
    model = nn.Sequential(linear())
    mask = torch.tensor([[True, True, False], [True, True, False]])
    lay(model, "0.weight", Float(), mask=mask)
    score = scored(Magnitude("std"), State(model))["0.weight"]
    kept = model[0].weight.detach()[mask]
    assert torch.allclose(score[mask], kept.abs() / kept.std(correction=0))
    assert score[~mask].tolist() == [0.0, 0.0]


def test_layers_without_spread_or_survivors_have_finite_scores() -> None:
    equal = standardized(torch.full((4,), 1e6))
    assert bool(torch.isfinite(equal).all())
    assert float(equal.min()) > 1e30
    assert standardized(torch.zeros(3), torch.zeros(3, dtype=torch.bool)).tolist() == [0, 0, 0]
    assert standardized(torch.tensor([0.0, 5.0]), torch.tensor([False, True]))[0] == 0


def test_random_depends_on_seed_and_name_alone() -> None:
    model = network()
    weights = weights_of(model, Scope("*"))
    twins = Random().scores(State(model), {"5.weight": torch.zeros(9), "0.weight": torch.zeros(9)})
    assert not torch.equal(*twins.values())
    every = Random().scores(State(model, seed=1), weights)
    alone = Random().scores(State(model, seed=1), {"5.weight": weights["5.weight"]})
    other = Random().scores(State(model, seed=2), weights)
    assert torch.equal(every["5.weight"], alone["5.weight"])
    assert not torch.equal(every["5.weight"], other["5.weight"])
    assert 0 <= float(every["5.weight"].min()) < 0.1 < 0.9 < float(every["5.weight"].max()) <= 1


@pytest.mark.parametrize("criterion", [Magnitude(), Random()])
def test_what_looks_at_weights_needs_no_task(criterion: Criterion) -> None:
    criterion.check(None)
    assert scored(criterion, State(linear()))["weight"].shape == (2, 3)


# ------------------------------------------------------------------ by gradients and curvature


def batch_gradients(model: nn.Module, task: Task, seed: int, size: int) -> list[Tensor]:
    """Return dl/dW [2, width] of each batch, from the formula (W x - y) x^T."""
    weight = model.weight.detach()
    found = []
    for batch in task.train.batches(size, seed=seed):
        x = batch.inputs[0]
        found.append((x @ weight.T - batch.targets).T @ x / len(x))
    return found


def test_taylor_averages_the_absolute_value_over_batches_or_samples() -> None:
    model, task = linear(), regression()
    state = State(model, task, seed=4)
    for criterion, size in ((Taylor(batch=8), 8), (Taylor(batch=8, per="sample"), 1)):
        slopes = batch_gradients(model, task, 4, size)
        wanted = torch.stack([(g * model.weight.detach()).abs() for g in slopes]).mean(0)
        assert torch.allclose(scored(criterion, state)["weight"], wanted, rtol=1e-5)
    one = scored(Taylor(batches=1, batch=8), state)["weight"]
    first = batch_gradients(model, task, 4, 8)[0]
    assert torch.allclose(one, (first * model.weight.detach()).abs(), rtol=1e-5)


def test_hessian_by_fisher_is_half_the_mean_squared_gradient_times_the_square() -> None:
    model, task = linear(), regression()
    found = scored(Hessian(batch=8), State(model, task, seed=4))["weight"]
    fisher = torch.stack([g**2 for g in batch_gradients(model, task, 4, 1)]).mean(0)
    assert torch.allclose(found, 0.5 * fisher * model.weight.detach() ** 2, rtol=1e-5)


def test_hessian_by_hutchinson_is_exact_where_features_do_not_overlap() -> None:
    inputs = torch.eye(3).repeat(4, 1) * torch.tensor([1.0, 2.0, 3.0])
    pair = (inputs, torch.zeros(12, 2))
    task = Task(pair, pair, pair, loss=mean_square, metrics={"loss": lambda o, t: 0.0})
    model = linear()
    found = scored(Hessian(batch=12, estimator="hutchinson"), State(model, task))["weight"]
    diagonal = (inputs**2).mean(0).expand(2, 3)
    assert torch.allclose(found, 0.5 * diagonal * model.weight.detach() ** 2, rtol=1e-5)


def test_more_vectors_bring_hutchinson_closer_to_the_true_diagonal() -> None:
    model, task = linear(), regression()
    second_moment = (task.train.inputs**2).mean(0).expand(2, 3)
    exact = 0.5 * second_moment * model.weight.detach() ** 2
    errors = []
    for vectors in (1, 64):
        criterion = Hessian(batch=24, estimator="hutchinson", vectors=vectors)
        errors.append(float((scored(criterion, State(model, task))["weight"] - exact).abs().max()))
    assert errors[1] < errors[0] / 3


class Tied(nn.Module):
    """Two linears that share one weight, as a decoder shares an embedding's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("representation", [None, Float(), KMeans(1)])
@pytest.mark.parametrize("criterion", DATA, ids=repr)
def test_laid_and_tied_weights_score_like_the_plain_network(
    representation: object, criterion: Criterion
) -> None:
    model, task = Tied(), regression(width=2)
    if representation is not None:
        mask = torch.tensor([[True, True], [True, False]])
        lay(model, "first.weight", representation, mask=mask)
    plain = Tied()
    plain.first.weight.data = model.first.weight.detach().clone()
    assert plain.second.weight is plain.first.weight
    wanted = scored(criterion, State(plain, task))["first.weight"]
    found = scored(criterion, State(model, task))["first.weight"]
    assert torch.equal(found, wanted)
    assert float(found.abs().max()) > 0


def test_gradient_of_a_tied_weight_sums_over_its_uses() -> None:
    model, task = Tied(), regression(width=2)
    lay(model, "first.weight", KMeans(2))
    found = scored(Taylor(batches=1, batch=24), State(model, task))["first.weight"]
    bake(model)
    batch = next(task.train.batches(24, seed=0))
    mean_square(model(batch.inputs[0]), batch).backward()
    assert torch.equal(found, (model.first.weight.grad * model.first.weight).abs().detach())


def test_pruned_weights_score_zero() -> None:
    model = nn.Sequential(linear())
    mask = torch.tensor([[True, True, False], [True, False, True]])
    lay(model, "0.weight", Float(), mask=mask)
    for criterion in (Magnitude(), Magnitude("std"), *DATA):
        score = scored(criterion, State(model, regression()))["0.weight"]
        assert score[~mask].tolist() == [0.0, 0.0]
        assert float(score[mask].abs().min()) > 0


def test_frozen_and_unused_weights_are_scored_too() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = linear(), linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Half().requires_grad_(False)
    with torch.no_grad():
        found = scored(Taylor(), State(model, regression()))
    assert float(found["used.weight"].min()) > 0
    assert torch.equal(found["unused.weight"], torch.zeros(2, 3))


def test_batches_are_not_augmented() -> None:
    plain = scored(Taylor(), State(linear(), regression()))["weight"]
    task = regression(augment=lambda inputs, generator: inputs + 1000.0)
    assert torch.equal(scored(Taylor(), State(linear(), task))["weight"], plain)


def test_samples_are_single_examples_whatever_the_loader_yields() -> None:
    task = regression()
    data = TensorDataset(task.train.inputs, task.train.labels)
    loader = DataLoader(data, batch_size=6)
    loaded = Task(loader, loader, loader, loss=mean_square, metrics={"loss": lambda o, t: 0.0})
    for criterion in (Taylor(per="sample"), Hessian()):
        found = scored(criterion, State(linear(), loaded))["weight"]
        wanted = scored(criterion, State(linear(), task))["weight"]
        assert torch.allclose(found, wanted, rtol=1e-5)


def test_named_inputs_without_targets_are_split_too() -> None:
    task = regression()
    state = State(linear(), task)
    wanted = scored(Taylor(per="sample"), state)["weight"]

    def loss(outputs: Tensor, batch: Batch) -> Tensor:
        return 0.5 * (outputs - batch.inputs["y"]).square().sum(-1).mean()

    pairs = [{"x": x, "y": y} for x, y in zip(task.train.inputs, task.train.labels, strict=True)]
    loader = DataLoader(pairs, batch_size=8)  # type: ignore[arg-type]
    state.task = Task(
        loader,
        task.test,
        task.test,
        call=lambda model, batch: model(batch.inputs["x"]),
        loss=loss,
        metrics={"loss": lambda o, t: 0.0},
    )
    assert torch.allclose(scored(Taylor(per="sample"), state)["weight"], wanted, rtol=1e-5)


@pytest.mark.parametrize("criterion", DATA, ids=repr)
def test_what_looks_at_data_needs_a_task(criterion: Criterion) -> None:
    with pytest.raises(TaskError, match=f"{criterion.name} needs batches"):
        criterion.check(None)
    with pytest.raises(TaskError, match=f"{criterion.name} needs batches"):
        scored(criterion, State(linear()))
    criterion.check(regression())


@pytest.mark.parametrize("criterion", DATA, ids=repr)
def test_a_loss_that_is_not_finite_is_refused(criterion: Criterion) -> None:
    task = regression()
    task.loss = lambda outputs, batch: mean_square(outputs, batch) * math.inf
    with pytest.raises(ModelError, match="'weight' is not finite"):
        scored(criterion, State(linear(), task))


def test_a_parametrization_of_others_is_refused() -> None:
    model = nn.utils.parametrizations.weight_norm(linear())
    with pytest.raises(ModelError, match="not laconic's"):
        Taylor().scores(State(model, regression()), {"weight": model.weight})


def test_attention_layers_can_be_scored_by_curvature() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.query, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            q = self.query(x)[:, None]
            return self.out(F.scaled_dot_product_attention(q, q, q)[:, 0])

    found = scored(Hessian(batches=2, estimator="hutchinson"), State(Attention(), regression()))
    assert float(found["out.weight"].abs().max()) > 0
