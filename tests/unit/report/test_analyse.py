"""Analyses of a loss: right on losses whose shape is known, and nothing of a network changes."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laconic.errors import ModelError, ScopeError, TaskError
from laconic.report.analyse import (
    Eigenvalues,
    LossSurface,
    bit_sensitivity,
    eigenvalues,
    loss_surface,
    parts_of,
    trajectory,
)
from laconic.tasks import Task
from laconic.tasks.split import Batch
from laconic.weights import Binary, Ternary, lay
from laconic.weights.laid import laid_tensors

# Power iteration stops when the eigenvalue changes by less.
CLOSE = 1e-3


class Bowl(nn.Module):
    """``0.5 (w - 1)^T A (w - 1) + sum v^2``, times the mean of the inputs."""

    def __init__(self, spectrum: Tensor) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        turn = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator))[0]
        self.register_buffer("matrix", turn @ torch.diag(spectrum) @ turn.T)
        self.quadratic, self.round = nn.Linear(1, len(spectrum), bias=False), nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        away = self.quadratic.weight.flatten() - 1
        height = 0.5 * away @ self.matrix @ away + self.round.weight.square().sum()
        return height * inputs


def bowl_task() -> Task:
    pair = torch.ones(4, 1), torch.zeros(4)
    return Task(
        pair,
        pair,
        pair,
        loss=lambda outputs, batch: outputs.mean(),
        metrics={"low": lambda outputs, targets: -float(outputs.mean())},
    )


def ones(scale: float = 1.0) -> Batch:
    return Batch((torch.full((2, 1), scale),), torch.zeros(2))


@pytest.fixture
def classify() -> tuple[nn.Module, Task, list[Batch]]:
    """Return a small network, a task and two batches."""
    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(24, 6, generator=generator), torch.arange(24) % 3
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    batches = [Batch((pair[0][part],), pair[1][part]) for part in (slice(12), slice(12, 24))]
    return network, Task(pair, pair, pair), batches


def loss_of(network: nn.Module, task: Task, batches: list[Batch]) -> float:
    network.eval()
    with torch.no_grad():
        values = [float(task.loss(task.call(network, batch), batch)) for batch in batches]
    return sum(values) / len(values)


# ------------------------------------------------------------------ curvature by part


@pytest.mark.parametrize(
    ("spectrum", "largest"), [([5.0, 1.0, -2.0], 5.0), ([-7.0, 3.0, 1.0], 3.0)]
)
def test_eigenvalues_of_a_quadratic_with_known_spectrum(
    spectrum: list[float], largest: float
) -> None:
    networks = {"one": Bowl(torch.tensor(spectrum)), "two": Bowl(2 * torch.tensor(spectrum))}
    found = eigenvalues(networks, bowl_task(), [ones(), ones(3.0)], iterations=1000)
    assert found.values["one"]["quadratic"] == pytest.approx((largest, 3 * largest), rel=CLOSE)
    assert found.mean("one", "quadratic") == pytest.approx(2 * largest, rel=CLOSE)
    assert found.deviation("one", "quadratic") == pytest.approx(largest, rel=CLOSE)
    assert found.ratio("two", "quadratic") == pytest.approx(2.0, rel=2 * CLOSE)
    assert found.values["two"]["round"] == pytest.approx((2.0, 6.0), rel=CLOSE)


def test_laid_weights_count_at_their_quantised_value() -> None:
    """The Hessian of w^4 is 12 w^2: that of the decoded weight, not of the latent one."""
    network = nn.Sequential(nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0], [3.0]]))  # type: ignore[operator, union-attr]
    pair = torch.ones(4, 1), torch.zeros(4)
    options: dict[str, Any] = {"metrics": {"none": lambda outputs, targets: 0.0}}
    task = Task(pair, pair, pair, loss=lambda out, batch: out.pow(4).sum(1).mean(), **options)
    lay(network, "0.weight", Binary())
    found = eigenvalues({"binary": network}, task, [ones()]).values["binary"]["0"]
    assert found == pytest.approx((12 * 2.0**2,), rel=CLOSE)


def test_parts_of_a_transformer_and_their_pool() -> None:
    transformers: ModuleType = pytest.importorskip("transformers")
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**shape, intermediate_size=12, vocab_size=20, num_labels=2)
    network = transformers.BertForSequenceClassification(config)
    parts = parts_of(network)
    assert list(parts) == [
        f"{layer} {part}"
        for layer, part in itertools.product(
            range(2), ("MHA-QK", "MHA-V", "MHA-O", "FFN-mid", "FFN-out")
        )
    ]
    assert len(parts["1 MHA-QK"]) == 2
    assert parts["0 FFN-out"] == ["bert.encoder.layer.0.output.dense.weight"]
    tokens = torch.randint(20, (6, 5), generator=torch.Generator().manual_seed(0))
    pair = tokens, torch.arange(6) % 2
    found = eigenvalues({"float": network}, Task(pair, pair, pair), [Batch(*pair)], iterations=3)
    pooled = found.pooled().values["float"]
    assert len(pooled) == 5
    assert all(len(values) == 2 and all(map(math.isfinite, values)) for values in pooled.values())
    with pytest.raises(ScopeError, match="selects no module"):
        parts_of(network, "nothing")


def test_networks_of_different_parts_are_refused(
    classify: tuple[nn.Module, Task, list[Batch]],
) -> None:
    network, task, batches = classify
    networks = {"float": network, "other": nn.Sequential(nn.Linear(6, 3))}
    with pytest.raises(ModelError, match="'other' and the first network differ in '3'"):
        eigenvalues(networks, task, batches, iterations=1)


def test_a_ratio_to_nothing_is_no_number() -> None:
    found = Eigenvalues({"float": {"fc": (0.0,)}, "binary": {"fc": (1.0,)}})
    assert math.isnan(found.ratio("binary", "fc"))


# ------------------------------------------------------------------ surfaces


def test_surface_of_a_quadratic() -> None:
    """Two weights [1, 1] of size 2 and 4: the loss is (2 + 2x)^2 + (4 + 4y)^2."""
    network = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)})
    with torch.no_grad():
        network["a"].weight.fill_(2.0)  # type: ignore[operator, union-attr]
        network["b"].weight.fill_(-4.0)  # type: ignore[operator, union-attr]

    def call(model: nn.Module, batch: Batch) -> Tensor:
        return (model["a"].weight ** 2 + model["b"].weight ** 2) * batch.inputs[0]  # type: ignore[index]

    pair = torch.ones(4, 1), torch.zeros(4)
    task = Task(
        pair, pair, pair, call=call, loss=lambda out, batch: out.mean(),
        metrics={"none": lambda outputs, targets: 0.0},
    )  # fmt: skip
    found = loss_surface({"float": network}, task, [ones()], tensors=("a.weight", "b.weight"))
    assert found.steps == pytest.approx([-1 + 0.2 * place for place in range(11)])
    for (i, x), (j, y) in itertools.product(enumerate(found.steps), repeat=2):
        wanted = (2 + 2 * x) ** 2 + (-4 + 4 * y) ** 2
        assert found.losses["float"][i][j] == pytest.approx(wanted, rel=1e-5, abs=1e-9)
    assert found.height("float") == pytest.approx(16 + 64)


def test_surfaces_hold_the_loss_of_the_network_as_it_is(
    classify: tuple[nn.Module, Task, list[Batch]],
) -> None:
    network, task, batches = classify
    laid = copy.deepcopy(network)
    lay(laid, "0.weight", Ternary())
    lay(laid, "3.weight", Ternary())
    networks = {"float": network, "ternary": laid}
    before = {name: bytes_of(each) for name, each in networks.items()}
    tensors = ("0.weight", "3.weight")
    found = loss_surface(networks, task, batches, tensors=tensors, points=3)
    assert {name: bytes_of(each) for name, each in networks.items()} == before
    for name, each in networks.items():
        assert found.losses[name][1][1] == loss_of(each, task, batches)
    assert found == loss_surface(networks, task, batches, tensors=tensors, points=3)


def test_a_tied_weight_is_moved_behind_its_codes() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False))
    network.append(nn.Linear(6, 3))
    network[2].weight = network[0].weight
    lay(network, "0.weight", Ternary())
    lay(network, "3.weight", Ternary())
    data = torch.randn(16, 6), torch.randint(0, 3, (16,))
    task, batch = Task(data, data, data), Batch(*data)
    tensors = ("0.weight", "3.weight")
    found = loss_surface({"net": network}, task, [batch], tensors=tensors, points=3)
    for place, step in enumerate(found.steps):
        moved = copy.deepcopy(network)
        latent = laid_tensors(moved)["0.weight"][1]
        with torch.no_grad():
            latent += step * latent.abs().mean()
        assert found.losses["net"][place][1] == pytest.approx(loss_of(moved, task, [batch]))


def test_a_height_with_a_loss_that_is_none_is_none() -> None:
    for grid in (((math.nan, 1.0), (2.0, 3.0)), ((1.0, math.nan), (2.0, 3.0))):
        surface = LossSurface(("a", "b"), (0.0, 1.0), {"net": grid})
        assert math.isnan(surface.height("net"))


def bytes_of(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensors": ("0.weight", "0.weight")}, "are the same weight; name two"),
        ({"tensors": ("0.weight", "5.weight")}, "has no tensor '5.weight'"),
        ({"tensors": ("0.weight", "3.weight"), "points": 4}, "4 points has no middle"),
    ],
)
def test_surfaces_that_cannot_be(
    classify: tuple[nn.Module, Task, list[Batch]], options: Mapping[str, Any], words: str
) -> None:
    network, task, batches = classify
    with pytest.raises(ModelError, match=words):
        loss_surface({"float": network}, task, batches, **options)
    with pytest.raises(TaskError, match="no batch"):
        loss_surface({"float": network}, task, [], tensors=("0.weight", "3.weight"))


# ------------------------------------------------------------------ trajectories


@pytest.mark.parametrize("form", ["states", "vectors"])
def test_the_path_ends_at_the_origin_and_the_grid_holds_its_loss(
    classify: tuple[nn.Module, Task, list[Batch]], form: str
) -> None:
    network, task, batches = classify
    lay(network, "0.weight", Binary())
    states: list[Any] = []
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(6):
        states.append({name: each.clone() for name, each in network.state_dict().items()})
        task.loss(task.call(network, batches[0]), batches[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    final = loss_of(network, task, batches)
    states.append(network.state_dict())
    vector = nn.utils.parameters_to_vector
    if form == "vectors":
        names = [name for name, _ in network.named_parameters()]
        states = [vector([state[name] for name in names]).detach() for state in states]
    kept = [each.clone() for each in states] if form == "vectors" else []
    before = bytes_of(network)
    found = trajectory(network, states, task, batches, points=5)
    assert bytes_of(network) == before
    assert all(torch.equal(one, other) for one, other in zip(states, kept, strict=False))
    assert found.path[-1] == (0.0, 0.0)
    assert found.path[0][0] > 0
    assert found.losses[2][2] == final
    assert found.axes[0][2] == found.axes[1][2] == 0.0
    assert 0 < found.explained[1] <= found.explained[0] < sum(found.explained) <= 1 + 1e-9
    assert found == trajectory(network, states, task, batches, points=5)


def test_directions_are_the_principal_ones() -> None:
    """Points in a plane of known axes, in a space of four: coordinates and shares are exact."""
    network = nn.Linear(4, 1, bias=False)
    along, across = torch.tensor([0.6, 0.8, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    places = [(3.0, 1.0), (3.0, -1.0), (-3.0, 1.0), (-3.0, -1.0), (0.0, 0.0)]
    snapshots = [2.0 + x * along + y * across for x, y in places]
    pair = torch.ones(3, 4), torch.zeros(3)
    options: dict[str, Any] = {"metrics": {"none": lambda outputs, targets: 0.0}}
    task = Task(pair, pair, pair, loss=lambda out, batch: out.mean(), **options)
    found = trajectory(network, snapshots, task, [Batch((pair[0],), pair[1])], reach=1.0, points=3)
    assert found.explained == pytest.approx((0.9, 0.1))
    for (x, y), place in zip(found.path, places, strict=True):
        assert (x, y) == pytest.approx(place, abs=1e-5)
    # The loss is the sum of the weights: 8 + 1.4 x + 1 y.
    assert found.losses[2][0] == pytest.approx(8 + 1.4 * 3 - 1, rel=1e-5)


@pytest.mark.parametrize(
    ("snapshots", "words"),
    [
        ([torch.zeros(2)] * 2, "2 snapshots span no plane"),
        ([torch.full((2,), float(each)) for each in range(4)], "lie on a line"),
        ([torch.zeros(2)] * 3, "lie on a line"),
        ([torch.zeros(3)] * 3, r"a snapshot is \(3,\), the network has 2 parameters"),
        ([{"other": torch.zeros(2)}] * 3, "a snapshot has no 'weight'"),
        ([torch.full((2,), math.nan)] * 3, "NaN or infinity"),
    ],
)
def test_paths_that_cannot_be(snapshots: list[Any], words: str) -> None:
    network = nn.Linear(2, 1, bias=False)
    with pytest.raises(ModelError, match=words):
        trajectory(network, snapshots, bowl_task(), [ones()])


# ------------------------------------------------------------------ bits


def test_bit_sensitivity_of_one_block_after_the_other(
    classify: tuple[nn.Module, Task, list[Batch]],
) -> None:
    network, task, _ = classify
    before = bytes_of(network)
    found = bit_sensitivity(network, task, {"binary": Binary(), "8 bit": 8}, scope="kind:linear")
    assert bytes_of(network) == before
    assert found.baseline == task.score(network, "validate")
    assert list(found.scores) == ["0", "3"]
    lay(network, "3.weight", Binary())
    assert found.scores["3"]["binary"] == task.score(network, "validate")
    for block in ("0", "3"):
        changes = [abs(found.change(block, kind, "loss")) for kind in ("8 bit", "binary")]
        assert changes[0] < changes[1]
    with pytest.raises(ScopeError, match="no weight of two"):
        bit_sensitivity(network, task, {"binary": Binary()}, scope="kind:norm")


# ------------------------------------------------------------------ all of them


def test_records_are_json(classify: tuple[nn.Module, Task, list[Batch]]) -> None:
    network, task, batches = classify
    records = [
        eigenvalues({"float": network}, task, batches, scope="3", iterations=2),
        bit_sensitivity(network, task, {"2 bit": 2}, scope="3"),
        LossSurface(("a", "b"), (0.0,), {"float": ((math.inf,),)}),
    ]
    texts = [json.dumps(record.to_data(), allow_nan=False) for record in records]
    assert json.loads(texts[2])["losses"] == {"float": [["inf"]]}


def test_modes_gradients_and_generators_are_left_alone(
    classify: tuple[nn.Module, Task, list[Batch]],
) -> None:
    network, task, batches = classify
    network.train()
    weight = network.get_parameter("3.weight")
    weight.grad = torch.ones_like(weight)
    standing = torch.random.get_rng_state()
    networks = {"float": network}
    eigenvalues(networks, task, batches, iterations=2)
    loss_surface(networks, task, batches, tensors=("0.weight", "3.weight"), points=3)
    bit_sensitivity(network, task, {"2 bit": 2})
    assert network.training
    assert bool((weight.grad == 1).all())
    assert torch.equal(torch.random.get_rng_state(), standing)
