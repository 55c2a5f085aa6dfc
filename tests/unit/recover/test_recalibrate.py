"""Recalibrate: the statistics it leaves, and everything it leaves alone."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from laconic.errors import ModelError, TaskError
from laconic.models.rounding import quantizers_of
from laconic.recover.recalibrate import Recalibrate
from laconic.scope import Scope
from laconic.step import State, Step, members, run_step
from laconic.tasks.split import Arrays
from laconic.tasks.task import Task
from laconic.weights import MovingAverage
from laconic.weights.codebook import KMeans
from laconic.weights.laid import bake, lay
from laconic.weights.quantizer import attach_

EXAMPLES, BATCH = 70, 16  # four full batches and a rest of six


def make_task(augment: object = None, examples: int = EXAMPLES) -> Task:
    generator = torch.Generator().manual_seed(0)
    inputs = 3 + 2 * torch.randn(examples, 4, generator=generator)
    labels = torch.arange(examples) % 2
    data = Arrays(inputs, labels, augment=augment)  # type: ignore[arg-type]
    return Task(data, (inputs, labels), (inputs, labels))


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 2)
    )


def expected(model: nn.Sequential, task: Task, batches: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return mean [6] and variance [6] before the norm, averaged over full batches."""
    means, variances = [], []
    for batch in list(task.train.batches(BATCH, seed=seed))[:batches]:
        if len(batch.targets) == BATCH:
            before = model[0](batch.inputs[0]).detach().double()
            means.append(before.mean(0))
            variances.append(before.var(0, correction=1))
    return torch.stack(means).mean(0), torch.stack(variances).mean(0)


def assert_statistics(norm: nn.Module, mean: Tensor, variance: Tensor) -> None:
    assert torch.allclose(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    assert torch.allclose(norm.running_var.double(), variance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batches", [1, 3, 50])
def test_statistics_are_the_average_over_the_batches(batches: int) -> None:
    model, task = make_model(), make_task()
    model[1].running_mean.fill_(1000.0)  # what was there before is forgotten
    model[1].num_batches_tracked.fill_(100)
    Recalibrate(batches, batch=BATCH).apply(State(model, task, seed=5))
    assert_statistics(model[1], *expected(model, task, batches, seed=5))
    assert int(model[1].num_batches_tracked) == min(batches, 4)


def test_laid_weights_count_as_the_network_uses_them() -> None:
    model, task = make_model(), make_task()
    mask = torch.arange(24).reshape(6, 4) % 3 != 0
    lay(model, "0.weight", KMeans(1), mask=mask)
    with torch.no_grad():
        model[0].parametrizations.weight.original.fill_(100.0)  # the latent is not what runs
    plain = copy.deepcopy(model)
    bake(plain)
    Recalibrate(batch=BATCH).apply(State(model, task, seed=1))
    assert_statistics(model[1], *expected(plain, task, 50, seed=1))
    assert float(model[1].running_mean.abs().max()) < 50.0


def test_modes_momentum_gradients_and_weights_are_restored() -> None:
    model, task = make_model(), make_task()
    model.train()
    model[3].eval()
    model[1].momentum = 0.25
    model[0].weight.grad = torch.ones(6, 4)
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.named_parameters()}
    Recalibrate(batch=BATCH).apply(State(model, task))
    assert [module.training for module in model.modules()] == modes
    assert model[1].momentum == 0.25
    assert torch.equal(model[0].weight.grad, torch.ones(6, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_modes_and_momentum_are_restored_when_a_forward_fails() -> None:
    model, task = make_model(), make_task()
    model.train()

    def broken(network: nn.Module, batch: object) -> Tensor:
        raise ValueError("no forward today")

    task.call = broken
    with pytest.raises(ValueError, match="no forward today"):
        Recalibrate(batch=BATCH).apply(State(model, task))
    assert model.training
    assert model[1].training
    assert model[1].momentum == 0.1


def test_dropout_is_off_before_a_second_norm() -> None:
    torch.manual_seed(0)
    model, task = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4)), make_task()
    Recalibrate(batch=70).apply(State(model, task))
    everything = task.train.inputs.double()
    assert_statistics(model[1], everything.mean(0), everything.var(0))


def test_batches_are_those_of_training() -> None:
    task = make_task(augment=lambda inputs, generator: inputs + 1000.0)
    model = nn.Sequential(nn.BatchNorm1d(4))
    Recalibrate(batch=BATCH).apply(State(model, task))
    assert float(model[0].running_mean.min()) > 900.0


def test_seed_decides_the_batches() -> None:
    def statistics(seed: int) -> Tensor:
        model = make_model()
        run_step(Recalibrate(2, batch=BATCH), State(model, make_task(), seed=seed))
        return model[1].running_mean.clone()

    assert torch.equal(statistics(0), statistics(0))
    assert not torch.equal(statistics(0), statistics(1))


def test_a_rest_of_one_example_is_left_out() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4))  # a batch of one would raise in training mode
    Recalibrate(batch=BATCH).apply(State(model, make_task(examples=33)))
    assert int(model[0].num_batches_tracked) == 2


def test_a_smaller_rest_moves_no_range_either() -> None:
    """It would count as much as a full batch."""
    found = []
    for batches in (EXAMPLES // BATCH, EXAMPLES // BATCH + 1):
        model = make_model()
        attach_(model, {"0": {"input": MovingAverage(8)}})
        Recalibrate(batches, batch=BATCH).apply(State(model, make_task(), seed=5))
        found.append(quantizers_of(model)["0"]["input"].state_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_fewer_examples_than_a_batch_are_one_batch() -> None:
    model, task = nn.Sequential(nn.BatchNorm1d(4)), make_task(examples=10)
    Recalibrate().apply(State(model, task))
    everything = task.train.inputs.double()
    assert_statistics(model[0], everything.mean(0), everything.var(0))


def test_scope_chooses_the_norms() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    Recalibrate(batch=BATCH, scope=Scope("1")).apply(State(model, make_task()))
    assert torch.equal(model[0].running_mean, torch.zeros(4))
    assert not torch.equal(model[1].running_mean, torch.zeros(4))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 2)),
        nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)),
    ],
)
def test_without_running_statistics_only_a_log_line(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.INFO, logger="laconic"):
        Recalibrate().apply(State(model, make_task()))
    assert "no BatchNorm" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_not_finite_is_refused() -> None:
    model, task = make_model(), make_task()
    model[0].weight.data[0, 0] = float("inf")
    with pytest.raises(ModelError, match="'1' was fed values that are not finite"):
        Recalibrate(batch=BATCH).apply(State(model, task))


def test_a_batch_of_one_example_is_refused() -> None:
    with pytest.raises(TaskError, match=r"one example, which BatchNorm cannot.*at least 2"):
        Recalibrate(batch=1).apply(State(make_model(), make_task()))


def test_check_needs_a_task() -> None:
    with pytest.raises(TaskError, match="recalibrate needs batches"):
        Recalibrate().check(make_model(), None)
    Recalibrate().check(make_model(), make_task())


def test_recipe_form() -> None:
    assert Step.coerce({"recalibrate": 20}) == Recalibrate(batches=20)
    assert Step.coerce(Recalibrate(20, batch=64).to_data()) == Recalibrate(20, batch=64)
    assert members(Step)["recalibrate"] is Recalibrate
