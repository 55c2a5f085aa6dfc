"""Reconstruction layer by layer: scopes, orders, networks and numbers that are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from helpers.reconstruct_layers import examples, layer, narrower, normed, state_of
from laconic.errors import (
    AxisError,
    ChainError,
    LaconicError,
    ModelError,
    RecipeError,
    RunError,
    ScopeError,
    TaskError,
)
from laconic.recipe import Recipe
from laconic.recover import (
    Adam,
    Cross,
    Gradient,
    Greedy,
    Lasso,
    LeastSquares,
    Parallel,
    Pointwise,
    Reconstruct,
    Solve,
    Train,
)
from laconic.recover.lesson import Teachers
from laconic.scope import Scope
from laconic.step import State, run_step
from laconic.structure import Prune
from laconic.tasks import Task
from laconic.weights import Quantize

CLOSED: tuple[Solve, ...] = (LeastSquares(), Pointwise(), Greedy(0.5), Lasso(0.5))


@pytest.fixture
def net() -> nn.Module:
    return normed()


@pytest.fixture
def task() -> Task:
    return examples()


def refusals() -> dict[
    str, tuple[Callable[[nn.Module, Task], State], Reconstruct, type[LaconicError], str]
]:
    def same(net: nn.Module, task: Task) -> State:
        return state_of(net, task)

    def small(net: nn.Module, task: Task) -> State:
        return State(copy.deepcopy(net), task, (narrower(),))

    def ternary(net: nn.Module, task: Task) -> State:
        state = state_of(net, task)
        run_step(Quantize("ternary"), state)
        return state

    def sparse(net: nn.Module, task: Task) -> State:
        state = state_of(net, task)
        run_step(Prune("weights", keep=0.5), state)
        return state

    quick = Gradient(2)
    return {
        "nothing to fit": (same, Reconstruct(scope=Scope("norm*")), ScopeError, "no linear layer"),
        "mixed widths": (small, Reconstruct(feed=Cross(0.5)), ModelError, "5, which"),
        "no channels": (
            same,
            Reconstruct(solve=Greedy(0.5), scope=Scope("conv0")),
            AxisError,
            "conv1",
        ),
        "closed form": (
            ternary,
            Reconstruct(solve=LeastSquares()),
            ChainError,
            "rounding would undo",
        ),
        "scattered": (sparse, Reconstruct(solve=Pointwise()), RecipeError, "not whole inputs"),
        "no teacher": (
            lambda net, task: State(copy.deepcopy(net), task),
            Reconstruct(solve=quick),
            ModelError,
            "needs a teacher",
        ),
        "no task": (
            lambda net, task: State(copy.deepcopy(net), None, (net,)),
            Reconstruct(solve=quick),
            TaskError,
            "needs examples",
        ),
    }


def attempt(step: Reconstruct, state: State) -> None:
    step.check(state.model, state.task)
    run_step(step, state)


@pytest.mark.parametrize("case", refusals())
def test_what_cannot_be_fitted_is_refused(net: nn.Module, task: Task, case: str) -> None:
    build, step, error, text = refusals()[case]
    state = build(net, task)
    with pytest.raises(error, match=text):
        attempt(step, state)


def test_channels_that_cannot_go_are_refused_before_the_steps_before(
    net: nn.Module, task: Task
) -> None:
    chosen = Reconstruct(solve=Lasso(0.5), scope=Scope("conv0"))
    with pytest.raises(AxisError, match="that do: conv1"):
        Recipe([Train(), chosen]).check(net, task)


def test_layers_do_not_learn_in_parallel(net: nn.Module, task: Task) -> None:
    with pytest.raises(RecipeError, match="block"):
        Reconstruct(order=Parallel()).check(net, task)


def test_loss_is_not_finite(net: nn.Module, task: Task) -> None:
    state = state_of(net, task)
    nn.init.normal_(layer(state.model, "conv0").weight)
    with pytest.raises(LaconicError, match="learning rate"):
        run_step(Reconstruct(solve=Gradient(50, optimizer=Adam(lr=1e30))), state)


def test_a_frozen_network_is_refused(net: nn.Module, task: Task) -> None:
    with pytest.raises(ModelError, match="its weight is frozen"):
        run_step(Reconstruct(), state_of(net.requires_grad_(False), task))


@pytest.mark.parametrize("solve", [*CLOSED, Gradient(2)], ids=str)
def test_what_is_not_finite_is_refused(net: nn.Module, task: Task, solve: Solve) -> None:
    state = state_of(net, task)
    with torch.no_grad():
        state.model.get_submodule("norm0").weight[0] = torch.nan
    with pytest.raises(RunError, match="'conv1' in the student holds NaN"):
        run_step(Reconstruct(solve=solve), state)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_numbers_is_left_out() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.none, self.full = nn.Linear(0, 2), nn.Linear(6, 2)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = self.none(inputs[:, :0]) + self.full(inputs)
            return answer

    torch.manual_seed(0)
    data = (torch.rand(8, 6), torch.arange(8) % 2)
    state = State(Empty(), Task(data, data))
    state.teacher = Teachers((Empty(),), state.device)
    run_step(Reconstruct(solve=Gradient(5)), state)
    assert list(state.curves) == ["full"]


class Routed(nn.Module):
    """Sends each example to one of two experts, by what a gate says of it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.last = nn.Linear(6, 2), nn.Linear(4, 3)
        self.experts = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(6, 4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        second, made = self.gate(x).argmax(1).bool(), x.new_zeros(len(x), 4)
        made[~second] = self.experts["a"](x[~second])
        made[second] = self.experts["b"](x[second])
        return self.last(made)


def test_a_layer_that_some_examples_pass_by_is_refused() -> None:
    torch.manual_seed(0)
    pair = (torch.randn(30, 6), torch.arange(30) % 3)
    data, teacher = Task.from_arrays(pair, pair, pair), Routed()
    student = copy.deepcopy(teacher)
    Quantize(2).apply(State(student))
    state = State(student, data, teacher=Teachers((teacher,), "cpu"))
    with pytest.raises(ModelError, match=r"rows enter 'experts\.a'.*'!experts\.a'"):
        run_step(Reconstruct(), state)
    run_step(Reconstruct(scope="last"), state)
