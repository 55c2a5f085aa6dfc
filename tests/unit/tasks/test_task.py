"""Tasks: what is held out, scores, few examples, and what does not fit a network."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.task import pair
from laconic.errors import TaskError
from laconic.run import compress
from laconic.structure import Prune
from laconic.tasks import Arrays, Task
from laconic.tasks.metrics import accuracy, top5_accuracy
from laconic.tasks.task import evaluation, hold_out


def test_validate_is_a_fixed_twentieth_of_train():
    data = Arrays(*pair(200), augment=lambda inputs, generator: inputs * 0)
    task = Task(data, pair(8))
    again = Task(data, pair(8))
    assert (len(task.train), len(task.validate), len(task.test)) == (190, 10, 8)
    assert task.validate.index.tolist() == again.validate.index.tolist()
    every = sorted(task.train.index.tolist() + task.validate.index.tolist())
    assert every == list(range(200))
    assert hold_out(data, seed=1)[1].index.tolist() != task.validate.index.tolist()
    (held,) = task.validate.batches(10, seed=0)
    assert held.inputs[0].abs().sum() > 0  # the augmentation is left to training
    (trained,) = task.train.batches(190, seed=0)
    assert trained.inputs[0].abs().sum() == 0


# -- scores ---------------------------------------------------------------------------------------


def test_score_equals_the_formula_and_restores_every_mode():
    task = Task(pair(), pair(30))
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.9), nn.Linear(6, 4))
    model[0].eval()
    scores = task.score(model, batch=7)
    assert [module.training for module in model] == [False, True, True] and model.training
    inputs, labels = pair(30)
    outputs = model.eval()(inputs).detach()
    assert scores["accuracy"] == accuracy(outputs, labels)
    expected = float(nn.functional.cross_entropy(outputs, labels))
    assert scores["loss"] == pytest.approx(expected, rel=1e-6)  # float32 sums in another order
    assert task.score(model, batch=7) == scores
    assert list(scores) == ["accuracy", "loss"] and task.main_metric == "accuracy"


def test_score_compares_in_float32_even_under_autocast():
    seen = []

    def spy(outputs, targets):
        seen.append(outputs.dtype)
        return 0.0

    task = Task(pair(), pair(8), metrics={"spy": spy})
    model = nn.Linear(6, 4)
    plain = task.score(model)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert task.score(model)["loss"] == plain
    model.to(torch.bfloat16)
    task.call = lambda network, batch: network(batch.inputs[0].bfloat16())
    task.score(model)
    assert seen == [torch.float32] * 3


def test_targets_may_be_values_with_another_loss():
    values = (torch.rand(20, 6), np.linspace(0, 5, 20))
    task = Task(
        values,
        values,
        loss=lambda outputs, batch: (outputs[:, 0] - batch.targets).square().mean(),
        metrics={"closeness": lambda outputs, targets: -float((outputs[:, 0] - targets).std())},
    )
    assert task.main_metric == "closeness" and task.classes == ()
    assert task.score(nn.Linear(6, 1))["loss"] > 0


def test_score_refuses_what_is_no_tensor_and_unknown_splits():
    task = Task(pair(), pair(8))
    task.call = lambda network, batch: (network(*batch.inputs),)
    with pytest.raises(TaskError, match="returns tuple, not a tensor"):
        task.score(nn.Linear(6, 4))
    with pytest.raises(TaskError, match="no split 'tests'; did you mean 'test'"):
        task.score(nn.Linear(6, 4), "tests")


@pytest.mark.parametrize(
    ("options", "network", "message"),
    [
        (
            {},
            nn.Linear(5, 4),
            r"cannot be called with inputs \[8, 6\] torch.float32 \(RuntimeError: .*call=",
        ),
        ({}, nn.Linear(6, 3), "Linear has 3 outputs and task has 4 classes"),
        (
            {"loss": lambda outputs, targets: nn.functional.cross_entropy(outputs, targets)},
            nn.Linear(6, 4),
            r"the loss of outputs \[8, 4\] failed \(TypeError: .* with the outputs and the Batch",
        ),
        (
            {"loss": lambda outputs, batch: outputs.sum(1)},
            nn.Linear(6, 4),
            "the loss of outputs .* one number",
        ),
        ({"metrics": {"mine": lambda o: 1.0}}, nn.Linear(6, 4), "metric 'mine' failed .TypeError"),
    ],
    ids=["inputs", "classes", "loss", "no mean", "metric"],
)
def test_score_says_what_does_not_fit(options, network, message):
    with pytest.raises(TaskError, match=message):
        Task(pair(), pair(8), **options).score(network)


class Converts(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs.to(self.weight.dtype))


@pytest.mark.parametrize(
    ("kind", "given", "remedy"),
    [
        (torch.bfloat16, torch.float32, r"call model.float\(\)"),
        (torch.half, torch.float32, r"call model.float\(\)"),
        (torch.float64, torch.float32, r"call model.float\(\)"),
        (torch.float32, torch.float64, "make them float32"),
    ],
)
def test_other_numbers_than_the_weights_are_named(kind, given, remedy):
    words = [str(each).removeprefix("torch.") for each in (kind, given)]
    message = "the network's weights are {} and the inputs {}: ".format(*words) + remedy
    inputs, labels = pair(8)
    loader = DataLoader(TensorDataset(inputs.to(given), labels), 4)
    task = Task(loader, loader, loader)
    network = nn.Linear(6, 4).to(kind)
    with pytest.raises(TaskError, match=f"cannot be called .*; {message}, or give call="):
        task.check(network)
    with pytest.raises(TaskError, match=message):
        task.score(network)
    steps = [Prune("neurons", keep=0.5)]  # whose check runs the network in words of its own
    with pytest.raises(TaskError, match=message):
        compress(nn.Sequential(network, nn.Linear(4, 4).to(kind)), task, steps)
    task.check(Converts(6, 4).to(kind))
    task.check(nn.Linear(6, 4).to(given))
    task.call = lambda model, batch: model(batch.inputs[0].to(kind))
    task.check(network)


def test_more_outputs_than_classes_are_said_once(caplog):
    task = Task(pair(), pair(8))
    for _ in range(2):
        task.score(nn.Linear(6, 7))
        task.few(total=4).score(nn.Linear(6, 7))
    task.score(nn.Linear(6, 4))
    (line,) = caplog.messages
    assert line.startswith("Linear has 7 outputs and task has 4 classes, so some outputs are never")
    assert line.endswith("give classes= with every label")


@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(), nn.MSELoss, nn.functional.cross_entropy, "cross_entropy"],
    ids=["module", "class", "function", "word"],
)
def test_a_loss_of_torch_is_told_what_a_task_calls(loss):
    with pytest.raises(TaskError, match="function of the outputs and the Batch, such as loss=lam"):
        Task(pair(), pair(8), loss=loss)


def test_empty_metrics_are_refused():
    with pytest.raises(TaskError, match=r"metrics are \{\}; give name -> function"):
        Task(pair(), pair(), metrics={})


def test_accuracies():
    outputs = torch.eye(10)[[0, 1, 2, 3]]
    assert accuracy(outputs, torch.tensor([0, 1, 2, 9])) == 0.75
    ranked = torch.arange(10.0, 0, -1).repeat(10, 1)
    assert top5_accuracy(ranked, torch.arange(10)) == 0.5
    with pytest.raises(TaskError, match=r"got \[4, 10\] and \[3\]"):
        accuracy(outputs, torch.arange(3))


def test_evaluation_restores_modes_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())

    def fail():
        with evaluation(model):
            assert not model.training and not torch.is_grad_enabled()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [module.training for module in model.modules()] == [True, True, False]


# -- examples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda data: data, lambda data: DataLoader(TensorDataset(*data))])
def test_few_draws_once_per_seed_and_nests(make):
    task = Task(make(pair(80)), make(pair(8)), make(pair(8)))
    few = task.few(per_class=3, seed=1)
    assert few.train.targets().bincount().tolist() == [3, 3, 3, 3]
    assert few.drawn == task.few(per_class=3, seed=1).drawn != task.few(per_class=3, seed=2).drawn
    assert set(task.few(per_class=2, seed=1).drawn) < set(few.drawn)
    assert len(task.few(total=10).train) == 10
    assert set(task.few(total=5).drawn) < set(task.few(total=10).drawn)
    assert len(task.train) == 80 and len(few.validate) == len(few.test) == 8
    assert few.describe()["drawn"] == list(few.drawn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either per_class= or total="),
        ({"per_class": 1, "total": 1}, "either per_class= or total="),
        ({"per_class": 11}, "of class 0 of train were asked for; there are 10: ask for 1 to 10"),
        ({"total": 41}, "41 examples of train were asked for; there are 40"),
        ({"total": 0}, "0 examples of train"),
    ],
)
def test_few_refuses(options, message):
    with pytest.raises(TaskError, match=message):
        Task(pair(), pair(8), pair(8)).few(**options)


def test_few_refuses_a_class_without_examples():
    inputs, labels = torch.rand(8, 2), torch.tensor([0, 2] * 4)
    task = Task((inputs, labels), (inputs, labels), (inputs, labels))
    with pytest.raises(
        TaskError, match="class 1 of train were asked for; there are 0: give total="
    ):
        task.few(per_class=1)


def test_examples_are_the_first_of_train():
    task = Task(pair(), pair(8), pair(8))
    (inputs,) = task.example(3)
    assert torch.equal(inputs, pair()[0][:3])
    named = [{"x": torch.arange(4.0), "labels": torch.arange(4)}]
    loader = DataLoader(named, batch_size=None)
    task = Task(loader, loader, loader)
    assert task.example_batch(2).inputs["x"].tolist() == [0, 1]
    with pytest.raises(TaskError, match=r"inputs are named \(x\)"):
        task.example()


def test_describe_is_json():
    task = Task.from_arrays(pair(), pair(8), normalize=((0.5,), (2.0,)), classes="abcd", name="n")
    data = task.describe()
    assert json.loads(json.dumps(data)) == data
    assert data["classes"] == ["a", "b", "c", "d"] and data["image"] == {
        "mean": [0.5],
        "std": [2.0],
    }
    assert data["examples"] == {"train": 38, "validate": 2, "test": 8}
    assert Task(pair(), pair(8)).classes == ("0", "1", "2", "3")
