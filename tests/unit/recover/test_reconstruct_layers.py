"""Reconstruction layer by layer: what layers learn, what is removed, what moves and stays."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from helpers.reconstruct_layers import FAST, difference, examples, layer, narrower, normed, state_of
from laconic.progress import reporting
from laconic.recover import (
    Adam,
    Constant,
    Cross,
    Feed,
    Gradient,
    Greedy,
    Lasso,
    LeastSquares,
    Mixed,
    Pointwise,
    Proximal,
    ProximalChannels,
    ProximalWeights,
    Reconstruct,
    SoftCross,
    Solve,
    Student,
    Teacher,
)
from laconic.recover.solve import _Removal
from laconic.run import compress
from laconic.scope import Scope
from laconic.step import State, run_step
from laconic.structure import Prune
from laconic.tasks import Task
from laconic.weights import LossAware, Quantize, Ternary
from laconic.weights.laid import laid_tensors, narrow

PATHS = ("conv0", "conv1", "conv2", "last")


@pytest.fixture
def net() -> nn.Module:
    return normed()


@pytest.fixture
def task() -> Task:
    return examples()


@pytest.mark.parametrize("kind", ["binary", "ternary", 3, 4])
def test_by_default_no_rounded_layer_ends_above_where_it_began(
    net: nn.Module, task: Task, kind: Any
) -> None:
    state = state_of(net, task)
    run_step(Quantize(kind), state)
    before = difference(state.model, net, task)
    run_step(Reconstruct(), state)
    assert all(curve[-1] <= curve[0] * (1 + 1e-5) for curve in state.curves.values())
    assert difference(state.model, net, task) < before


def test_a_layer_that_descends_nowhere_stays_as_it_was(net: nn.Module, task: Task) -> None:
    state = state_of(net, task)
    run_step(Quantize(LossAware(2)), state)
    numbers = {name: each.clone() for name, each in state.model.state_dict().items()}
    wild = Gradient(3, optimizer=Adam(10.0, decay=Constant()))
    run_step(Reconstruct(solve=wild, scope=Scope("conv0")), state)
    found = state.model.state_dict()
    assert all(torch.equal(each, found[name]) for name, each in numbers.items())


def test_a_curve_ends_with_the_loss_of_the_layer_that_stays(net: nn.Module, task: Task) -> None:
    state = state_of(net, task)
    run_step(Quantize(3), state)
    run_step(Reconstruct(feed=Mixed(), solve=Gradient(20)), state)
    ends = {path: curve[-1] for path, curve in state.curves.items()}
    state.curves = {}
    run_step(Reconstruct(feed=Student(), solve=LeastSquares(), scope=Scope("conv0")), state)
    assert ends["conv0"] == pytest.approx(state.curves["conv0"][0], rel=1e-6)


@pytest.mark.parametrize(
    "feed", [Student(), Teacher(), Mixed(), Cross(0.5), SoftCross(0.9, 0.9)], ids=str
)
def test_the_teachers_own_layers_do_not_move(net: nn.Module, task: Task, feed: Feed) -> None:
    state = state_of(net, task)
    run_step(Reconstruct(feed=feed, solve=Gradient(3, optimizer=FAST)), state)
    assert all(loss == pytest.approx(0, abs=1e-9) for loss in state.curves["conv0"])
    # Adam moves by signs: what is left of a gradient of 0 is rounding.
    assert difference(state.model, net, task) < 1e-2


@pytest.mark.parametrize("solve", [Gradient(60, optimizer=FAST), LeastSquares()], ids=str)
def test_layers_learn_the_teachers_answers(net: nn.Module, task: Task, solve: Solve) -> None:
    state = state_of(net, task)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = difference(state.model, net, task)
    run_step(Reconstruct(solve=solve), state)
    assert difference(state.model, net, task) < 0.5 * before
    for path in PATHS:
        assert state.curves[path][-1] <= state.curves[path][0]


@pytest.mark.parametrize("mode", ["topk", "soft"])
def test_channels_are_removed_and_cut_out(net: nn.Module, task: Task, mode: Any) -> None:
    state = state_of(net, task)
    penalty = ProximalChannels(0.5, mode=mode)
    run_step(Reconstruct(solve=Gradient(60, optimizer=FAST, penalty=penalty)), state)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.model.named_parameters()}
    assert shapes["conv0.weight"] == (4, 2, 3, 3)
    assert shapes["conv1.weight"] == (4, 4, 3, 3)
    assert shapes["conv2.weight"] == (3, 4, 3, 3)
    assert shapes["last.weight"] == (3, 3)


@pytest.mark.parametrize("solve", [Greedy(0.5), Lasso(0.5)], ids=str)
def test_chosen_channels_are_better_than_the_smallest(
    net: nn.Module, task: Task, solve: Solve
) -> None:
    scope = Scope("conv1, conv2")
    state = state_of(net, task)
    run_step(Reconstruct(solve=solve, scope=scope), state)
    plain = compress(net, task, [Prune("channels", keep=0.5, scope=Scope("conv0, conv1"))]).model
    assert layer(state.model, "conv1").weight.shape == (4, 4, 3, 3)
    assert difference(state.model, net, task) < difference(plain, net, task)


@pytest.mark.parametrize("mode", ["topk", "soft"])
def test_single_weights_are_removed(net: nn.Module, task: Task, mode: Any) -> None:
    state = state_of(net, task)
    solve = Gradient(60, optimizer=FAST, penalty=ProximalWeights(0.1, mode=mode))
    run_step(Reconstruct(solve=solve, scope=Scope("kind:conv, !conv0")), state)
    for path, total in (("conv1", 576), ("conv2", 432)):
        assert int((layer(state.model, path).weight != 0).sum()) <= round(0.1 * total)
    assert int((layer(state.model, "conv0").weight == 0).sum()) == 0


@pytest.mark.parametrize("kind", [ProximalWeights, ProximalChannels])
@pytest.mark.parametrize("rate", [1e-3, 1e-2])
def test_a_growing_threshold_meets_the_goal_by_itself(
    net: nn.Module, task: Task, kind: Any, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Removal, "keep", lambda self, count: None)
    state, penalty = state_of(net, task), kind(0.25, mode="soft")
    solve = Gradient(60, optimizer=Adam(lr=rate), penalty=penalty)
    run_step(Reconstruct(solve=solve, scope=Scope("kind:conv, !conv0")), state)
    for path in ("conv1", "conv2"):
        before, after = (penalty.sizes(layer(each, path).weight) for each in (net, state.model))
        assert int((after > 0).sum()) == penalty.goal(len(before))


@pytest.mark.parametrize("penalty", [ProximalWeights(0.2), ProximalChannels(0.5)], ids=str)
def test_less_is_lost_than_without_reconstruction(
    net: nn.Module, task: Task, penalty: Proximal
) -> None:
    state = state_of(net, task)
    run_step(Reconstruct(solve=Gradient(200, optimizer=FAST, penalty=penalty)), state)
    axes = "weights" if isinstance(penalty, ProximalWeights) else "channels"
    plain = compress(net, task, [Prune(axes, keep=penalty.keep)]).model
    assert difference(state.model, net, task) < difference(plain, net, task)


def test_fed_the_teachers_layers_do_not_depend_on_order(net: nn.Module, task: Task) -> None:
    solve = Gradient(20, optimizer=FAST, penalty=ProximalWeights(0.5))
    together = state_of(net, task)
    run_step(Reconstruct(feed=Teacher(), solve=solve), together)
    apart = state_of(net, task)
    for path in ("last", "conv2", "conv0", "conv1"):
        run_step(Reconstruct(feed=Teacher(), solve=solve, scope=Scope(path)), apart)
    for name, tensor in together.model.state_dict().items():
        assert torch.equal(tensor, apart.model.state_dict()[name]), name


def test_an_absorbed_pointwise_convolution_is_the_explicit_one(net: nn.Module, task: Task) -> None:
    """FSKD: the layer times Q answers as the layer followed by a 1x1 convolution with Q."""
    smaller = compress(net, task, [Prune("channels", keep=0.5, scope=Scope("conv0, conv1"))]).model
    state = State(copy.deepcopy(smaller), task, (net,))
    run_step(Reconstruct(solve=Pointwise(), scope=Scope("conv2")), state)
    (inputs,) = task.example(24)
    entering = nn.Sequential(*list(smaller.children())[:6])(inputs)
    before, after = layer(smaller, "conv2"), layer(state.model, "conv2")
    target = nn.Sequential(*list(net.children())[:7])(inputs)
    rows = before(entering).movedim(1, -1).flatten(0, 2)
    solution = torch.linalg.lstsq(rows, target.movedim(1, -1).flatten(0, 2)).solution
    explicit = nn.functional.conv2d(before(entering), solution.T[:, :, None, None])
    assert torch.allclose(after(entering), explicit, atol=1e-4)


def test_what_stays_out_of_scope_stays(net: nn.Module, task: Task) -> None:
    state = state_of(net, task)
    solve = Gradient(5, optimizer=FAST, penalty=ProximalWeights(0.5))
    run_step(Reconstruct(solve=solve, scope=Scope("conv1")), state)
    for name, tensor in net.state_dict().items():
        same = torch.equal(tensor, state.model.state_dict().get(name, tensor))
        assert same == (name != "conv1.bias"), name


def test_quantised_layers_learn_through_their_rounding(net: nn.Module, task: Task) -> None:
    rounded = compress(net, task, [Quantize("ternary", activation=8)])
    steps = [Quantize("ternary", activation=8), Reconstruct(solve=Gradient(80, optimizer=FAST))]
    fitted = compress(net, task, steps)
    assert difference(fitted.model, net, task) < difference(rounded.model, net, task)
    assert laid_tensors(fitted.model)["conv1.weight"][0].representation == Ternary()


def test_a_network_of_doubles_descends_in_doubles(net: nn.Module, task: Task) -> None:
    task.call = lambda model, batch: model(batch.inputs[0].double())
    state = state_of(net.double(), task)
    Prune("weights", keep=0.5).apply(state)
    Reconstruct(solve=Gradient(20, optimizer=FAST)).apply(state)
    assert all(losses[-1] < losses[0] for losses in state.curves.values())
    assert all(p.dtype == torch.float64 for p in state.model.parameters())


def test_a_run_that_is_resumed_ends_the_same(
    net: nn.Module, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [Reconstruct(solve=Gradient(10, optimizer=FAST, penalty=ProximalChannels(0.5)))]
    whole = compress(net, task, steps)
    fit, calls = Gradient.fit, []

    def dies(self: Gradient, part: Any) -> None:
        calls.append(part.path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        fit(self, part)

    with monkeypatch.context() as patched:
        patched.setattr(Gradient, "fit", dies)
        with pytest.raises(KeyboardInterrupt):
            compress(net, task, steps, out=tmp_path / "run", checkpoint_seconds=0)
    resumed = compress(net, task, steps, out=tmp_path / "run", resume=True)
    assert calls == ["conv1", "conv2"]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert resumed.history[-1].curves == whole.history[-1].curves


def test_a_bar_counts_the_layers(net: nn.Module, task: Task) -> None:
    reporter = Mock()
    with reporting(reporter):
        run_step(Reconstruct(solve=Gradient(3)), state_of(net, task))
    shown = [call.args for call in reporter.start.call_args_list]
    assert [args for args in shown if args[0].startswith("reconstruct")] == [
        ("reconstruct: layers", 4),
        *((f"reconstruct {path} ({n} of 4)", 3) for n, path in enumerate(PATHS, start=1)),
    ]


def test_layers_without_the_teachers_answers_stay(net: nn.Module, task: Task) -> None:
    state = State(copy.deepcopy(net), task, (narrower(),))
    run_step(Reconstruct(solve=LeastSquares()), state)
    assert list(state.curves) == ["conv1", "conv2", "last"]


@pytest.mark.parametrize("mode", ["topk", "soft"])
@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_of_equal_elements_as_many_are_left(mode: Any, weight: float) -> None:
    network = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 3, bias=False))
    for each in network.parameters():
        nn.init.constant_(each, weight)
    still = Task((torch.zeros(24, 4), torch.arange(24) % 3), (torch.zeros(3, 4), torch.arange(3)))
    state = state_of(network, still)
    run_step(Reconstruct(solve=Gradient(6, penalty=ProximalWeights(0.5, mode=mode))), state)
    masks = [laid.mask for laid, _ in laid_tensors(state.model).values()]
    assert [int(mask.sum()) for mask in masks if mask is not None] == [16, 12]


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_forcing_ends_though_no_update_is_at_its_end(
    net: nn.Module, task: Task, steps: int
) -> None:
    last = []
    for feed in (Mixed(end=0.5), Student()):
        state = state_of(net, task)
        nn.init.constant_(layer(state.model, "conv0").weight, 0.1)
        solve = Gradient(steps, optimizer=Adam(lr=1e-12))
        run_step(Reconstruct(feed=feed, solve=solve, scope=Scope("conv2")), state)
        last.append(state.curves["conv2"][-1])
    assert last[0] == pytest.approx(last[1])


def test_one_channel_stays_where_nothing_reads_any(net: nn.Module, task: Task) -> None:
    state = state_of(net, task)
    for path in ("conv1", "conv2"):
        weight = layer(state.model, path).weight
        narrow(state.model, f"{path}.weight", torch.zeros_like(weight, dtype=torch.bool))
    run_step(Reconstruct(solve=Greedy(0.5)), state)
    assert layer(state.model, "conv0").weight.shape[0] == 1


def test_a_layer_with_a_forward_of_its_own_stays(net: nn.Module, task: Task) -> None:
    class Standardised(nn.Conv2d):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self._conv_forward(inputs, self.weight - self.weight.mean(), self.bias)

    state = state_of(net, task)
    state.model.conv1 = Standardised(8, 8, 3, padding=1)
    run_step(Reconstruct(solve=LeastSquares()), state)
    assert "conv1" not in state.curves
    assert "conv2" in state.curves
