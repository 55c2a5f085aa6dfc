"""Estimation error: every layer's output against the teacher's, on numbers worked out by hand."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from laconic.errors import LaconicError, ModelError, ScopeError, TaskError
from laconic.report import EstimationError, estimation_error
from laconic.tasks import Task
from laconic.weights import Binary, lay

EXAMPLES = 37  # some batches and a rest


class Net(nn.Sequential):
    """A convolution, BatchNorm, an activation in place and a linear layer."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.add_module("conv", nn.Conv2d(2, width, 3))
        self.add_module("norm", nn.BatchNorm2d(width))
        self.add_module("relu", nn.ReLU(inplace=True))
        self.add_module("flat", nn.Flatten())
        self.add_module("fc", nn.Linear(width * 4, 3))


@pytest.fixture
def net() -> Any:
    return Net().eval()


@pytest.fixture
def task() -> Task:
    targets = torch.arange(EXAMPLES) % 3
    train, test = (torch.randn(EXAMPLES, 2, 4, 4) for _ in range(2))
    return Task((train, targets), (test, targets), (train, targets))


def moved(net: Any, name: str, by: float) -> Any:
    """Return a copy with a parameter moved by a constant."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.get_parameter(name).add_(by)
    return other


def test_equal_networks_have_none(net: Any, task: Task) -> None:
    found = estimation_error(net, {"same": copy.deepcopy(net)}, task)
    assert found.errors == {"same": {"conv": 0.0, "fc": 0.0}}


def test_a_bias_that_is_moved_by_a_constant_gives_its_square(net: Any, task: Task) -> None:
    found = estimation_error(net, {"moved": moved(net, "fc.bias", 0.5)}, task)
    assert found.errors["moved"] == {"conv": 0.0, "fc": pytest.approx(0.25, rel=1e-6)}


def test_outputs_are_those_before_batchnorm_each_network_fed_by_its_own(
    net: Any, task: Task
) -> None:
    student = moved(net, "conv.weight", 0.1)
    found = estimation_error(net, {"moved": student}, task).errors["moved"]
    inputs = task.test.example(EXAMPLES).inputs[0]
    with torch.no_grad():
        conv = (student.conv(inputs) - net.conv(inputs)).square().mean()
        last = (student(inputs) - net(inputs)).square().mean()
    assert found == {"conv": pytest.approx(float(conv)), "fc": pytest.approx(float(last))}
    other = estimation_error(net, {"moved": student}, task, split="train").errors["moved"]
    assert other["conv"] != found["conv"]


def test_ratios_are_of_the_layers_of_both() -> None:
    found = EstimationError(
        {
            "prior": {"a": 4.0, "b": 0.0, "c": 0.0, "d": 1.0},
            "cd": {"a": 1.0, "b": 0.0, "c": 2.0, "e": 1.0},
        }
    )
    assert found.ratios("cd", to="prior") == {"a": 0.25, "b": 1.0, "c": math.inf}
    assert found.ratios("prior", to="prior") == {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}
    assert json.loads(json.dumps(found.to_data(), allow_nan=False))["errors"]["cd"]["a"] == 1.0
    with pytest.raises(ModelError, match="no student 'pior'; did you mean 'prior'"):
        found.ratios("cd", to="pior")


def test_layers_of_another_width_or_place_are_left_out(net: Any, task: Task) -> None:
    narrow, gone = Net(3), copy.deepcopy(net)
    gone.conv = nn.Sequential(nn.Conv2d(2, 4, 3))  # what stands in its place answers for it
    gone.fc = nn.Sequential()
    students = {"narrow": narrow, "gone": gone}
    found = estimation_error(net, students, task)
    assert {name: list(errors) for name, errors in found.errors.items()} == {
        "narrow": ["fc"],
        "gone": ["conv"],
    }
    assert found.ratios("gone", to="narrow") == {}


class Twice(nn.Module):
    """One layer that is called twice, or two layers."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = self.first if shared else nn.Linear(2, 2)
        self.last = nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.second(self.first(inputs)))
        return outputs


def test_all_calls_of_a_layer_count_if_they_are_as_many() -> None:
    pair = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 1])
    task, shared, apart = Task(pair, pair, pair), Twice(shared=True), Twice(shared=False)
    with torch.no_grad():
        shared.first.weight.copy_(torch.eye(2))
    student = moved(shared, "first.bias", 1.0)  # its two outputs are off by 1 and by 2
    found = estimation_error(shared, {"moved": student, "apart": apart}, task, scope="first, last")
    assert found.errors["moved"]["first"] == pytest.approx((1 + 4) / 2)
    assert list(found.errors["apart"]) == ["last"]


class Tagger(nn.Module):
    """A linear layer over tokens, and one over texts."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.text = nn.Linear(1, 2), nn.Linear(2, 2)

    def forward(self, inputs: Tensor, attention_mask: Tensor) -> Tensor:
        known = self.tokens(inputs) * attention_mask[..., None]
        outputs: Tensor = self.text(known.sum(dim=1))
        return outputs


def test_padding_does_not_count() -> None:
    texts = [
        {"inputs": torch.tensor(text), "attention_mask": torch.tensor(mask), "labels": label}
        for text, mask, label in (([[1.0], [100.0]], [1, 0], 0), ([[2.0], [3.0]], [1, 1], 1))
    ]
    split = DataLoader(texts, batch_size=2)  # type: ignore[arg-type, var-annotated]
    task, net = Task(split, split, split), Tagger()
    student = moved(net, "tokens.weight", 1.0)  # outputs are off by what enters
    found = estimation_error(net, {"moved": student}, task, scope="tokens").errors["moved"]
    assert found == {"tokens": pytest.approx((1 + 4 + 9) / 3)}


def test_a_laid_weight_counts_as_it_is_used_and_nothing_changes(net: Any, task: Task) -> None:
    student = copy.deepcopy(net)
    lay(student, "fc.weight", Binary())
    plain = copy.deepcopy(net)
    with torch.no_grad():
        plain.fc.weight.copy_(student.fc.weight)
    before = copy.deepcopy(net.state_dict())
    net.train()
    found = estimation_error(net, {"laid": student, "plain": plain}, task)
    assert found.errors["laid"] == found.errors["plain"]
    assert found.errors["laid"]["fc"] > 0
    assert net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert not net.conv._forward_hooks


@pytest.mark.parametrize(
    ("students", "options", "error", "match"),
    [
        ({}, {}, ModelError, "no student"),
        ({"other": nn.Flatten()}, {}, ModelError, "no layer of 'other'"),
        ({"other": Net(5)}, {"scope": "conv"}, ModelError, "no layer of 'other'"),
        ({"same": Net()}, {"scope": "norm"}, ScopeError, "no linear layer or convolution"),
        ({"same": Net()}, {"scope": "none"}, ScopeError, "none"),
        ({"same": Net()}, {"split": "tset"}, TaskError, "test"),
    ],
)
def test_what_is_refused(
    net: Any,
    task: Task,
    students: dict[str, nn.Module],
    options: dict[str, Any],
    error: type[LaconicError],
    match: str,
) -> None:
    with pytest.raises(error, match=match):
        estimation_error(net, students, task, **options)
