"""Training examples without targets: what runs on them, and what refuses before any work."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laconic import measure as measuring
from laconic.errors import LaconicError, TaskError
from laconic.recipe import Recipe
from laconic.recover import (
    SGD,
    Adam,
    Gradient,
    Hidden,
    Label,
    Logits,
    Mutual,
    Recalibrate,
    Reconstruct,
    Train,
)
from laconic.run import compress
from laconic.step import State, Step
from laconic.structure import HeadImportance, Hessian, MaximalGain, NeuronImportance, Prune, Taylor
from laconic.tasks import Task
from laconic.weights import MinMax, MixedPrecision, Quantize

COUNT = 21


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure without timing forwards."""
    monkeypatch.setattr(measuring, "measure", functools.partial(measuring.measure, latency=False))


class Chain(nn.Module):
    """A stem with a norm, two blocks and a head: what Hidden and Reconstruct have parts of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.stem(x))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def network() -> Chain:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Chain().eval()


def inputs() -> Tensor:
    return torch.randn(COUNT, 6, generator=torch.Generator().manual_seed(0))


def labelled() -> tuple[Tensor, Tensor]:
    return inputs(), torch.arange(COUNT) % 3


FORMS: dict[str, Callable[[], Any]] = {
    "tensor": inputs,
    "array": lambda: inputs().numpy(),
    "pair with None": lambda: (inputs(), None),
    "named": lambda: {"x": inputs()},
    "loader of tensors": lambda: DataLoader(inputs(), batch_size=8),  # type: ignore[arg-type]
    "loader of tuples": lambda: DataLoader(TensorDataset(inputs()), batch_size=8),
    "loader of mappings": lambda: DataLoader([{"x": row} for row in inputs()], batch_size=8),  # type: ignore[arg-type]
}


def task(form: str = "tensor") -> Task:
    pair = labelled()
    return Task(FORMS[form](), pair, pair)


def quick(objective: Any, **fields: Any) -> Train:
    return Train(objective, batch=8, optimizer=SGD(0.05), **fields)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_inputs_alone_is_read(form: str) -> None:
    data = task(form)
    assert not data.train.labelled and data.test.labelled and data.validate.labelled
    assert [len(part) for part in (data.train, data.validate, data.test)] == [COUNT] * 3
    for batch in (*data.train.batches(8), *data.train.batches(8, seed=1), data.example_batch(2)):
        assert batch.targets is None
    given = torch.cat([_only(batch.inputs) for batch in data.train.batches(8)])
    assert torch.equal(given, inputs())
    assert data.classes == ("0", "1", "2")
    assert json.loads(json.dumps(data.describe())) == data.describe()
    assert data.describe() == Task(labelled(), labelled(), labelled()).describe()


def _only(given: Any) -> Tensor:
    (tensor,) = given.values() if isinstance(given, dict) else given
    return tensor


@pytest.mark.parametrize("form", FORMS)
def test_few_examples_are_drawn_by_their_number(form: str) -> None:
    data = task(form)
    few = data.few(total=5, seed=1)
    assert len(few.train) == len(few.drawn or ()) == 5 and not few.train.labelled
    assert few.drawn == Task(labelled(), labelled(), labelled()).few(total=5, seed=1).drawn
    with pytest.raises(TaskError, match="no targets to choose classes by; give total="):
        data.few(per_class=1)
    with pytest.raises(TaskError, match="train: the examples have no targets; score another split"):
        data.score(network(), "train")
    with pytest.raises(TaskError, match="the batches have no targets"):
        data.train.targets()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "steps",
    [
        [Quantize(3), Reconstruct(parts="block", solve=Gradient(3, batch=8, optimizer=Adam(0.01)))],
        [Quantize(3), Reconstruct(solve=Gradient(3, batch=8, optimizer=Adam(0.01)))],
        [Quantize(3), quick(Logits(2.0))],
        [Quantize(3), quick([Logits(), Hidden()])],
        [Quantize(3, activation=MinMax(8), scope="*, !stem, !head"), Recalibrate(batch=8)],
    ],
    ids=["blocks", "layers", "logits", "hidden", "ranges"],
)
def test_what_needs_no_labels_runs_as_with_them(form: str, steps: list[Step]) -> None:
    found = compress(network(), task(form), steps)
    assert found.history[-1].metrics.keys() == {"accuracy", "loss"}
    if form.startswith("loader"):
        return  # batches and their order are the loader's own
    wanted = compress(network(), Task(labelled(), labelled(), labelled()), steps)
    for name, tensor in wanted.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor), name


LABELS = "and the training examples of task have no targets; give some that have, or"


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Train(), f"label reads targets, {LABELS} an objective that .* such as logits"),
        (Train(0.5 * (Logits() + 2 * Label())), f"label reads targets, {LABELS}"),
        (Train(Mutual()), f"mutual reads targets, {LABELS}"),
        (Prune("weights", keep=0.5, retrain=Train()), f"label reads targets, {LABELS}"),
        (Prune("weights", keep=0.5, by=Taylor()), f"taylor reads targets, {LABELS} a criterion"),
        (Prune("weights", keep=0.5, by=Hessian()), f"hessian reads targets, {LABELS}"),
        (MixedPrecision(2, 4), f"mixed_precision reads targets, {LABELS} quantize"),
    ],
    ids=["label", "sum", "mutual", "retrain", "taylor", "hessian", "mixed"],
)
def test_what_reads_targets_is_refused_before_any_work(step: Step, message: str) -> None:
    data = task()
    data.call = lambda model, batch: pytest.fail("work was done")
    with pytest.raises(TaskError, match=message):
        Recipe((step,)).check(network(), data)
    Recipe((step,)).check(network(), Task(labelled(), labelled(), labelled()))


@pytest.mark.parametrize("criterion", [HeadImportance(), NeuronImportance()], ids=repr)
def test_criteria_of_axes_read_targets_too(criterion: Any) -> None:
    with pytest.raises(TaskError, match=f"{criterion.name} reads targets, {LABELS}"):
        criterion.check(task(), criterion.ranks[0])


def test_gains_are_measured_where_there_are_targets() -> None:
    with pytest.raises(TaskError, match=f"maximal_gain scores examples of train, {LABELS} split"):
        MaximalGain().check(task())
    MaximalGain(split="validate").check(task())


def test_a_last_batch_without_targets_is_left_out_as_well() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
    Recalibrate(batch=8).apply(State(model, task()))
    assert int(model[0].num_batches_tracked) == COUNT // 8


def test_a_run_on_inputs_alone_goes_on_where_it_stopped(tmp_path: Path) -> None:
    steps = [Quantize(3), quick(Logits(), epochs=2)]
    data, count = task(), [0]
    call = data.call

    def press(model: nn.Module, batch: Any) -> Tensor:
        count[0] += model.training
        if count[0] == 4 and model.training:
            signal.raise_signal(signal.SIGINT)
        return call(model, batch)

    data.call = press
    with pytest.raises(KeyboardInterrupt):
        compress(network(), data, steps, out=tmp_path)
    found = compress(network(), task(), steps, out=tmp_path, resume=True)
    wanted = compress(network(), task(), steps)
    for name, tensor in wanted.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": inputs(), "test": labelled()}, "train: .* held out.*; give validate= with"),
        ({"train": labelled(), "test": inputs()}, "test: the examples have no targets, which loss"),
        (
            {"train": inputs(), "test": labelled(), "validate": (inputs(), None)},
            "validate: the examples have no targets",
        ),
    ],
    ids=["validate missing", "test", "validate"],
)
def test_only_training_examples_may_be_without(splits: dict[str, Any], message: str) -> None:
    with pytest.raises(LaconicError, match=message):
        Task.from_arrays(**splits)
