"""Reconstruction layer by layer: what is removed, what moves, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

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
from laconic.models import resnet
from laconic.recipe import Recipe
from laconic.recover import (
    Adam,
    Cross,
    Feed,
    Gradient,
    Greedy,
    Lasso,
    LeastSquares,
    Mixed,
    Parallel,
    Pointwise,
    Proximal,
    ProximalChannels,
    ProximalWeights,
    Reconstruct,
    SoftCross,
    Solve,
    Student,
    Teacher,
    Train,
)
from laconic.recover.inflow import Inflow
from laconic.recover.layers import fitted_layers
from laconic.recover.quadratic import Fitted
from laconic.recover.stream import Stored
from laconic.run import compress
from laconic.scope import Scope
from laconic.step import State, run_step
from laconic.structure import Prune
from laconic.tasks import Task
from laconic.weights import Quantize, Ternary
from laconic.weights.laid import laid_tensors, narrow

CLOSED: tuple[Solve, ...] = (LeastSquares(), Pointwise(), Greedy(0.5), Lasso(0.5))
FAST = Adam(lr=0.01)


class Net(nn.Sequential):
    """Three convolutions with BatchNorm and a linear layer: [batch, 2, 6, 6] -> [batch, 3]."""

    def __init__(self) -> None:
        super().__init__()
        for index, (first, second) in enumerate(((2, 8), (8, 8), (8, 6))):
            self.add_module(f"conv{index}", nn.Conv2d(first, second, 3, padding=1))
            self.add_module(f"norm{index}", nn.BatchNorm2d(second))
            self.add_module(f"relu{index}", nn.ReLU())
        self.add_module("pool", nn.AdaptiveAvgPool2d(1))
        self.add_module("flat", nn.Flatten())
        self.add_module("last", nn.Linear(6, 3))


@pytest.fixture
def net() -> nn.Module:
    network = Net()
    network(torch.randn(64, 2, 6, 6))  # statistics
    return network.eval()


@pytest.fixture
def task() -> Task:
    targets = torch.arange(24) % 3
    data = torch.randn(24, 2, 6, 6), targets
    return Task(data, (torch.randn(6, 2, 6, 6), targets[:6]), data)


def layer(model: nn.Module, path: str) -> Fitted:
    """Return a layer, typed."""
    return cast("Fitted", model.get_submodule(path))


def state_of(model: nn.Module, task: Task, **fields: Any) -> State:
    teacher = copy.deepcopy(model).requires_grad_(False)
    return State(copy.deepcopy(model), task, (teacher,), **fields)


def difference(first: nn.Module, second: nn.Module, task: Task) -> float:
    """Return the mean squared difference of the answers on the training examples."""
    (inputs,) = task.example(24)
    with torch.no_grad():
        return float((first(inputs) - second(inputs)).square().mean())


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
    for path in ("conv0", "conv1", "conv2", "last"):
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


def narrower() -> nn.Module:
    """Return a teacher whose second convolution reads fewer channels."""
    teacher = Net()
    teacher.conv0, teacher.norm0 = nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5)
    teacher.conv1 = nn.Conv2d(5, 8, 3, padding=1)
    return teacher.eval()


def test_layers_without_the_teachers_answers_stay(net: nn.Module, task: Task) -> None:
    state = State(copy.deepcopy(net), task, (narrower(),))
    run_step(Reconstruct(solve=LeastSquares()), state)
    assert list(state.curves) == ["conv1", "conv2", "last"]


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
        "scattered": (sparse, Reconstruct(solve=Pointwise()), RecipeError, "single weights"),
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


def bert() -> nn.Module:
    """Return a BERT of two layers with a head, of random weights."""
    transformers = pytest.importorskip("transformers", reason="encoders need transformers")
    config = transformers.BertConfig(
        hidden_size=8,
        num_attention_heads=2,
        intermediate_size=16,
        num_hidden_layers=2,
        vocab_size=20,
        num_labels=3,
        initializer_range=0.5,
    )
    network: nn.Module = transformers.BertForSequenceClassification(config).eval()
    return network


def texts() -> Task:
    """Return a task whose texts are padded."""
    tokens = torch.randint(1, 20, (24, 6))
    mask = (torch.arange(6) < torch.randint(2, 7, (24, 1))).long()
    items = [
        {"input_ids": ids, "attention_mask": kept, "labels": torch.tensor(index % 3)}
        for index, (ids, kept) in enumerate(zip(tokens, mask, strict=True))
    ]
    split = DataLoader(cast("Any", items), batch_size=8)
    return Task(split, split, split)


def images() -> Task:
    targets = torch.arange(12) % 3
    data = torch.randn(12, 3, 8, 8), targets
    return Task(data, data, data)


@pytest.mark.parametrize("kind", ["convolutions", "encoder"])
def test_a_layer_is_reached_from_the_block_before(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, data = (resnet(8).eval(), images()) if kind == "convolutions" else (bert(), texts())
    step = Reconstruct(
        feed=Cross(0.5), solve=Gradient(5, optimizer=FAST, penalty=ProximalWeights(0.5))
    )
    stored: list[Path] = []
    write = Stored.__init__

    def note(self: Stored, folder: Path, *rest: Any) -> None:
        stored.append(folder)
        write(self, folder, *rest)

    monkeypatch.setattr(Stored, "__init__", note)
    near = state_of(network, data)
    run_step(step, near)
    assert len(stored) == (2 if kind == "convolutions" else 1)
    assert not any(folder.exists() for folder in stored)
    monkeypatch.setattr("laconic.recover.inflow._names_of_blocks", lambda *_: [])
    far = state_of(network, data)
    run_step(step, far)
    assert near.curves.keys() == far.curves.keys()
    for path, losses in far.curves.items():
        assert near.curves[path] == pytest.approx(losses, rel=1e-3, abs=1e-7), path


class Adds(nn.Module):
    """A block: a layer of its own, then one that it may share, around which the input goes."""

    def __init__(self, last: nn.Linear) -> None:
        super().__init__()
        self.own, self.last = nn.Linear(4, 4), last

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", inputs + self.last(self.own(inputs).relu()))


class Chain(nn.Module):
    """Two blocks and a head: [batch, 4] -> [batch, 3]."""

    def __init__(self, *lasts: nn.Linear) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Adds(last) for last in lasts)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            inputs = block(inputs)
        return cast("torch.Tensor", self.head(inputs))


def vectors() -> Task:
    data = torch.randn(24, 4), torch.arange(24) % 3
    return Task(data, data, data)


def test_a_layer_of_several_blocks_learns_from_all_of_them(tmp_path: Path) -> None:
    shared = nn.Linear(4, 4)
    state = state_of(Chain(shared, shared), vectors())
    pair = fitted_layers(state, Scope("*"), Student())["layers.0.last"]
    assert pair.calls == 2
    assert Inflow(state, tmp_path).moments("layers.0.last", pair).rows == 2 * 24


def test_a_layer_that_the_teacher_calls_less_often_stays() -> None:
    shared = nn.Linear(4, 4)
    state = State(Chain(shared, shared), vectors(), (Chain(nn.Linear(4, 4), nn.Linear(4, 4)),))
    run_step(Reconstruct(solve=LeastSquares()), state)
    assert list(state.curves) == ["layers.0.own", "layers.1.own", "head"]


def test_layers_that_share_a_weight_stay() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    state = state_of(Chain(first, second), vectors())
    penalty = ProximalWeights(0.5)
    run_step(Reconstruct(solve=Gradient(3, penalty=penalty)), state)
    assert list(state.curves) == ["layers.0.own", "layers.1.own", "head"]
    assert torch.equal(layer(state.model, "layers.1.last").weight, first.weight)


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
