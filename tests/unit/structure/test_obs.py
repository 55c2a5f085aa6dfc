"""Optimal Brain Surgeon: its formulas on small quadratics, its inputs, as a criterion."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.tensors import drawn64
from laconic.errors import ChainError, ModelError, ScopeError, TaskError
from laconic.recover import Adam, Train
from laconic.scope import Scope
from laconic.step import State, run_step
from laconic.structure import OBS, Magnitude, Prune
from laconic.structure import obs as surgeon
from laconic.structure.columns import columns
from laconic.structure.obs import compensated, inverse_diagonal
from laconic.tasks import Task, digits
from laconic.weights import Quantize, Ternary, lay
from laconic.weights.laid import laid_tensors, mask_of, weights_of

EXACT = 1e-9  # float64, well conditioned


def least_squares_hessian(inputs: Tensor) -> Tensor:
    """Return ``2 E[x x^T]``, the Hessian of ``E ||W x - W_0 x||^2`` for each row of W."""
    return 2 * inputs.T @ inputs / len(inputs)


def quadratic(width: int) -> Tensor:
    """Return a Hessian of inputs that are correlated."""
    return least_squares_hessian(drawn64(3 * width, width) @ drawn64(width, width, seed=1))


def masks(rows: int, width: int) -> Tensor:
    """Return masks with every number of survivors, none and all of them too."""
    order = drawn64(rows, width, seed=2).argsort(dim=1)
    return order < torch.linspace(0, width, rows).round()[:, None]


def test_survivors_solve_the_least_squares_of_what_is_left() -> None:
    inputs, weight, mask = drawn64(40, 8), drawn64(9, 8, seed=3), masks(9, 8)
    fitted = compensated(weight, least_squares_hessian(inputs), mask, tolerance=1e-12)
    for row, wanted, survives in zip(fitted, weight, mask, strict=True):
        assert not bool(row[~survives].any())
        if survives.any():
            best = torch.linalg.lstsq(inputs[:, survives], inputs @ wanted).solution
            assert torch.allclose(row[survives], best, atol=EXACT)
    assert torch.equal(fitted[-1], weight[-1])


@pytest.mark.parametrize("at_once", [1, 200, 2**24])
def test_the_inverse_is_that_of_each_rows_survivors(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surgeon, "_AT_ONCE", at_once)
    hessian, mask = quadratic(7), masks(8, 7)
    found = inverse_diagonal(hessian, mask)
    for row, survives in zip(found, mask, strict=True):
        part = torch.linalg.inv(hessian[survives][:, survives]).diagonal()
        assert torch.allclose(row[survives], part, rtol=1e-6)
        assert bool((row[~survives] == 1).all())
    whole = torch.ones(2, 7, dtype=torch.bool)
    assert torch.allclose(
        inverse_diagonal(hessian, whole)[1], torch.linalg.inv(hessian).diagonal(), rtol=1e-6
    )


def test_a_coarser_tolerance_costs_little_and_never_more_than_no_change() -> None:
    hessian, weight, mask = quadratic(30), drawn64(6, 30, seed=3), drawn64(6, 30, seed=7) > 0

    def cost(rows: Tensor) -> Tensor:
        return ((rows - weight) @ hessian * (rows - weight)).sum(1)

    errors = [cost(compensated(weight, hessian, mask, tolerance=t)) for t in (1e-12, 1e-3, 1.0)]
    assert bool((errors[0] <= errors[1] + EXACT).all())
    assert bool((errors[1] <= errors[2]).all())
    assert torch.allclose(errors[1], errors[0], rtol=1e-4)
    assert torch.allclose(errors[2], cost(torch.where(mask, weight, 0.0)))


def test_a_hessian_without_an_inverse_is_refused() -> None:
    flat = torch.zeros(3, 3, dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    for function in (
        lambda: compensated(drawn64(1, 3), flat, mask),
        lambda: inverse_diagonal(flat, mask),
    ):
        with pytest.raises(ModelError, match="raise damping"):
            function()


# ------------------------------------------------------------------ what a layer multiplies


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4, bias=False),
        nn.Conv2d(6, 4, 3, padding=1, bias=False),
        nn.Conv2d(6, 4, (3, 2), stride=2, padding="valid", dilation=2, bias=False),
        nn.Conv2d(6, 4, 3, padding="same", padding_mode="reflect", bias=False),
        nn.Conv2d(6, 4, 3, groups=2, bias=False),
        nn.Conv2d(6, 6, 3, groups=6, bias=False),
        nn.Conv1d(6, 4, 3, padding=1, groups=2, bias=False),
    ],
    ids=str,
)
def test_columns_times_the_weight_are_the_output(layer: nn.Module) -> None:
    shape = {nn.Linear: (5, 3, 6), nn.Conv1d: (5, 6, 9), nn.Conv2d: (5, 6, 9, 8)}[type(layer)]
    inputs = drawn64(*shape).float()
    found = columns(layer, inputs)
    rows = layer.weight.detach().reshape(len(found), -1, found.shape[-1])
    product = torch.cat([x @ w.T for x, w in zip(found, rows, strict=True)], dim=1)
    wanted = layer(inputs).detach()
    wanted = wanted if isinstance(layer, nn.Linear) else wanted.movedim(1, -1)
    assert torch.allclose(product, wanted.reshape(product.shape), atol=1e-5)


# ------------------------------------------------------------------ in a prune step


def regression(width: int = 6) -> Task:
    inputs = drawn64(64, 2) @ drawn64(2, width, seed=4) + 0.3 * drawn64(64, width, seed=6)
    inputs = inputs.float()
    return Task(
        (inputs, drawn64(64, 3, seed=5).float()),
        (inputs, drawn64(64, 3, seed=5).float()),
        (inputs, drawn64(64, 3, seed=5).float()),
        loss=lambda outputs, batch: F.mse_loss(outputs, batch.targets),
        metrics={"loss": lambda outputs, targets: 0.0},
    )


def linear(width: int = 6) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(width, 3)


ALL = OBS(batches=1, batch=64, damping=1e-9)


def error(model: nn.Module, task: Task) -> float:
    """Return how far the outputs are from those of the network as it was."""
    with torch.no_grad():
        return float((model(task.train.inputs) - linear()(task.train.inputs)).square().mean())


def test_the_first_weight_to_go_is_the_one_that_costs_least_when_made_up_for() -> None:
    task = regression()
    costs = {}
    for row, place in itertools.product(range(3), range(6)):
        mask = torch.ones(3, 6, dtype=torch.bool)
        mask[row, place] = False
        hessian = least_squares_hessian(task.train.inputs.double())
        model = linear()
        with torch.no_grad():
            model.weight.copy_(compensated(model.weight.double(), hessian, mask))
        costs[row, place] = error(model, task)
    model = linear()
    run_step(Prune("weights", keep=17 / 18, by=ALL), State(model, task))
    (gone,) = (~mask_of(model, "weight")).nonzero().tolist()  # type: ignore[operator]
    assert tuple(gone) == min(costs, key=lambda place: costs[place])
    assert error(model, task) == pytest.approx(min(costs.values()), rel=1e-3)


@pytest.mark.parametrize("rounds", [1, 3])
def test_made_up_for_pruning_costs_less_than_the_same_without(rounds: int) -> None:
    task = regression()
    errors = {}
    for by in (ALL, Magnitude()):
        model = linear()
        run_step(Prune("weights", keep=0.5, by=by, rounds=rounds), State(model, task))
        assert int((model.weight != 0).sum()) == 9
        errors[by.name] = error(model, task)
        if by is ALL:
            mask = mask_of(model, "weight")
            hessian = least_squares_hessian(task.train.inputs.double())
            # In rounds, what was made up for is made up for again: the optimum of the same mask.
            best = compensated(linear().weight.detach().double(), hessian, mask)
            assert torch.allclose(model.weight.detach().double(), best, atol=1e-4)
    assert errors["obs"] < 0.5 * errors["magnitude"]


def test_scores_are_of_survivors_and_leave_the_network_alone() -> None:
    model, task = nn.Sequential(linear()), regression()
    run_step(Prune("weights", keep=0.5, by=ALL), State(model, task))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    weights = weights_of(model, Scope("*"))
    scores = ALL.scores(State(model, task), weights)["0.weight"]
    mask = mask_of(model, "0.weight")
    assert bool((scores[mask] > 0).all()) and not bool(scores[~mask].any())  # type: ignore[operator]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and not model[0]._forward_pre_hooks


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convolution = nn.Conv2d(1, 6, 3, stride=2)
    linears = (nn.Linear(54, 40), nn.ReLU(), nn.Linear(40, 10))
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), *linears)


def test_every_layer_of_a_network_is_pruned_by_its_own_inputs() -> None:
    data, step = digits(), OBS(batches=2, batch=128)
    start = network()
    run_step(Train(epochs=3, batch=64, optimizer=Adam(1e-2)), State(start, data))
    scores = {}
    for by in (step, Magnitude()):
        state = State(network(), data)
        state.model.load_state_dict(start.state_dict())
        run_step(Prune("weights", keep=0.15, by=by), state)
        scores[by.name] = data.score(state.model)["accuracy"]
    assert scores["obs"] > scores["magnitude"] + 0.02


def test_a_pruned_weight_stays_pruned_and_the_parameter_the_same_object() -> None:
    model, task = linear(), regression()
    parameter = model.weight
    step = Prune("weights", keep=0.5, by=ALL, rounds=2)
    state = State(model, task)
    for update in range(1, 5):
        step.update(state, update / 4, since=(update - 1) / 4)
    assert laid_tensors(model)["weight"][1] is parameter
    assert int((model.weight != 0).sum()) == 9


def test_padding_does_not_count() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner = nn.Embedding(9, 6), nn.Linear(6, 4)

        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            real = attention_mask[..., None]
            outputs: Tensor = (self.inner(self.table(ids)) * real).sum(1)
            return outputs

    found = []
    for width in (5, 40):
        torch.manual_seed(0)
        model, lengths = Reader(), torch.arange(20) % 5 + 1
        ids = F.pad(torch.randint(1, 9, (20, 5)), (0, width - 5))
        mask = torch.arange(width) < lengths[:, None]
        pair = {"ids": ids.where(mask, 0), "attention_mask": mask.long()}, torch.arange(20) % 4
        run_step(
            Prune("weights", keep=0.5, by=OBS(), scope="inner"), State(model, Task(pair, pair))
        )
        found.append(model.inner.weight.detach())
    torch.testing.assert_close(found[0], found[1])


def test_a_layer_may_be_called_by_keyword() -> None:
    class Named(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
            return super().forward(input)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Named(6, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self.inner(input=inputs)
            return outputs

    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    pair = inputs, torch.arange(40) % 4
    state = State(Outer(), Task(pair, pair, pair))
    run_step(Prune("weights", keep=0.5, by=OBS()), state)
    assert int(mask_of(state.model, "inner.weight").sum()) == 12  # type: ignore[union-attr]


# ------------------------------------------------------------------ what is refused


def test_without_a_task_there_are_no_inputs() -> None:
    with pytest.raises(TaskError, match="obs needs"):
        Prune("weights", keep=0.5, by=OBS()).check(linear(), None)


def test_layers_without_such_inputs_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(4, 6), nn.Linear(6, 3))
    with pytest.raises(ScopeError, match=r"'0\.weight' is of a Embedding; narrow the scope"):
        Prune("weights", keep=0.5, by=OBS()).check(model, regression())
    Prune("weights", scope="kind:linear", keep=0.5, by=OBS()).check(model, regression())


def test_codes_cannot_make_up_for_anything() -> None:
    model = linear()
    with pytest.raises(ChainError, match=r"obs after quantize \(symmetric\) at 'weight'"):
        Prune("weights", keep=0.5, by=OBS()).check(model, regression(), (Quantize(8),))
    Prune("weights", keep=0.5, by=OBS()).check(model, regression(), (Quantize("float"),))
    lay(model, "weight", Ternary())
    with pytest.raises(ChainError, match=r"obs after quantize \(ternary\) at 'weight'"):
        Prune("weights", keep=0.5, by=OBS()).check(model, regression())
    with pytest.raises(ChainError):
        run_step(Prune("weights", keep=0.5, by=OBS()), State(model, regression()))


def test_a_weight_used_twice_answers_for_the_inputs_of_both() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1))
    model[1].weight = model[0].weight
    seen: list[Tensor] = []
    for layer in model[:2]:
        layer.register_forward_hook(lambda m, inputs, o: seen.append(inputs[0].detach()))
    data = regression()
    state = State(model, data)
    weights = {"0.weight": model[0].weight.detach().clone()}
    found = OBS(batches=1, batch=len(data.train), damping=1e-9)._hessians(state, weights)[
        "0.weight"
    ]
    with torch.no_grad():
        model(next(data.train.plain().batches(len(data.train))).inputs[0])
    both = torch.cat(seen[-2:]).double()
    torch.testing.assert_close(
        found[0].double(), 2 * both.T @ both / len(both), rtol=1e-4, atol=1e-5
    )


def test_a_layer_that_is_never_called_is_refused() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = linear(), linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(ModelError, match=r"'idle\.weight' is of a layer that is never called"):
        run_step(Prune("weights", keep=0.5, by=OBS()), State(Idle(), regression()))
