"""Splits and tasks: the law of batches, scores, few examples, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from laconic.errors import TaskError
from laconic.run import compress
from laconic.structure import Prune
from laconic.tasks import Arrays, Batch, Loader, Normalize, PadCropFlip, Task, task_from_dict
from laconic.tasks.metrics import accuracy, top5_accuracy
from laconic.tasks.split import as_batch, map_tensors, to_float
from laconic.tasks.task import evaluation, hold_out


@pytest.fixture(autouse=True)
def _own_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Noisy(Dataset):
    """A data set that draws from torch's global generator, as transforms do."""

    def __len__(self):
        return 23

    def __getitem__(self, position):
        return torch.rand(2) + position, position % 3


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(2), 0)] * 5)


def images(count=23, side=8):
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=generator)
    return pixels.to(torch.uint8)


def split(kind):
    if kind == "arrays":
        return Arrays(images(), torch.arange(23), augment=PadCropFlip(2), normalize=((0.5,), (1,)))
    generator = torch.Generator() if kind == "loader with its own generator" else None
    workers = 1 if kind == "loader with a worker" else 0
    loader = DataLoader(Noisy(), 5, shuffle=True, generator=generator, num_workers=workers)
    return Loader(loader)


def assert_same(one, other):
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert torch.equal(left.targets, right.targets)
        assert torch.equal(left.inputs[0], right.inputs[0])


KINDS = ["arrays", "loader", "loader with its own generator", "loader with a worker"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_a_pure_function_of_seed_epoch_and_index(kind):
    data = split(kind)
    whole = list(data.batches(5, seed=7, epoch=2))
    assert len(whole) == data.batch_count(5) == 5
    for start in (0, 3, 5):
        torch.rand(start)  # what the loop draws in between must not matter
        rest = []
        for batch in split(kind).batches(5, seed=7, epoch=2, start=start):
            torch.rand(1)
            rest.append(batch)
        assert_same(rest, whole[start:])


@pytest.mark.parametrize("kind", KINDS[:2])
def test_seed_and_epoch_change_the_batches(kind):
    data = split(kind)
    orders = [
        torch.cat([batch.targets for batch in data.batches(5, seed=seed, epoch=epoch)]).tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])


@pytest.mark.parametrize("kind", KINDS)
def test_batches_leave_the_global_generator_as_found(kind):
    before = torch.get_rng_state()
    list(split(kind).batches(5, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(0, 2**62), st.integers(0, 40), st.integers(0, 9))
def test_resuming_anywhere_continues_the_epoch(size, seed, start, epoch):
    data = split("arrays")
    whole = list(data.batches(size, seed=seed, epoch=epoch))
    assert_same(list(data.batches(size, seed=seed, epoch=epoch, start=start)), whole[start:])
    assert sorted(torch.cat([batch.targets for batch in whole]).tolist()) == list(range(23))


def test_without_a_seed_examples_come_in_order_and_unaugmented():
    data = split("arrays")
    batches = list(data.batches(10))
    assert torch.cat([batch.targets for batch in batches]).tolist() == list(range(23))
    expected = images().float() / 255 - 0.5
    assert torch.equal(torch.cat([batch.inputs[0] for batch in batches]), expected)


def test_augmentation_changes_training_batches_only_where_it_is_set():
    data = Arrays(images(), torch.arange(23), augment=PadCropFlip(2))
    (augmented,) = data.batches(23, seed=0)
    (plain,) = data.plain().batches(23, seed=0)
    assert torch.equal(augmented.targets, plain.targets)
    assert not torch.equal(augmented.inputs[0], plain.inputs[0])
    order = augmented.targets
    assert torch.equal(plain.inputs[0], images()[order].float() / 255)


def test_to_float_follows_its_formula():
    pixels = images(4)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    result = to_float(pixels, Normalize((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    expected = (pixels.float() / 255 - mean[:, None, None]) / std[:, None, None]
    assert torch.equal(result, expected)
    values = torch.rand(4, 3)
    assert torch.equal(to_float(values, Normalize((0.5,), (2.0,))), (values - 0.5) / 2)
    tokens = torch.arange(6).reshape(2, 3)
    assert to_float(tokens) is tokens


def test_subsets_share_memory_and_compose():
    data = split("arrays")
    inner = data.subset(range(10, 20)).subset([1, 3])
    assert inner.targets().tolist() == [11, 13]
    assert inner.inputs.data_ptr() == data.inputs.data_ptr()
    assert inner.normalize == data.normalize
    with pytest.raises(TaskError, match="no example"):
        data.subset([])


def test_a_loader_reads_pairs_mappings_and_tensors():
    assert as_batch((1, 2, torch.ones(1))).inputs == (1, 2)
    named = as_batch({"x": torch.zeros(2), "label": torch.ones(2)})
    assert list(named.inputs) == ["x"] and named.targets.sum() == 2
    assert as_batch(torch.ones(1)).targets is None
    assert as_batch([torch.ones(1)]).inputs == (torch.ones(1),)
    batch = Batch((), torch.ones(1))
    assert as_batch(batch) is batch
    with pytest.raises(TaskError, match="yields str, not"):
        as_batch("text")


def test_a_loader_counts_chooses_and_lists_its_examples():
    loader = Loader(DataLoader(Noisy(), 5, shuffle=True, drop_last=True))
    assert (len(loader), loader.batch_count(99)) == (20, 4)
    assert loader.targets().tolist() == [position % 3 for position in range(23)]
    assert sorted(loader.subset([1, 2, 5]).targets().tolist()) == [1, 2, 2]


def test_a_stream_has_no_length_and_needs_validate():
    stream = DataLoader(Stream(), 2)
    with pytest.raises(TaskError, match="Stream has no length"):
        len(Loader(stream))
    with pytest.raises(TaskError, match="Stream has no length"):
        Task(stream, stream)
    task = Task(stream, stream, stream)
    assert task.score(nn.Linear(2, 2), "validate").keys() == {"accuracy", "loss"}


def test_map_tensors_keeps_structure():
    nested = {"a": [torch.ones(2), ("b", torch.zeros(3))]}
    result = map_tensors(lambda tensor: tensor.numel(), nested)
    assert result == {"a": [2, ("b", 3)]}


def pair(count=40, classes=4):
    generator = torch.Generator().manual_seed(5)
    return torch.rand(count, 6, generator=generator), torch.arange(count) % classes


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


def test_evaluation_restores_modes_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())

    def fail():
        with evaluation(model):
            assert not model.training and not torch.is_grad_enabled()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [module.training for module in model.modules()] == [True, True, False]


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


@pytest.mark.parametrize("given", [[torch.zeros(8, 2)], (torch.zeros(8, 2),) * 3])
def test_from_arrays_wants_pairs(given):
    with pytest.raises(TaskError, match=r"train: \w+ is not a pair.*\(inputs, targets\)"):
        Task.from_arrays(given, torch.arange(8))


class Sums(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(6, 4)

    def forward(self, x, scale):
        return self.line(x) * scale[:, None]


def test_arrays_may_be_named():
    inputs, labels = pair(40)
    named = {"x": inputs, "scale": np.arange(40, dtype=np.uint8)}
    task = Task.from_arrays((named, labels), (named, labels))
    again = Task.from_arrays({**named, "labels": labels}, {**named, "label": labels.numpy()})
    network = Sums()
    outputs = network(inputs, torch.arange(40)).detach()
    assert task.score(network) == again.score(network)
    assert task.score(network)["accuracy"] == accuracy(outputs, labels)
    (batch,) = task.test.batches(40, seed=1)
    assert torch.equal(batch.inputs["x"], inputs[batch.index])
    assert torch.equal(batch.inputs["scale"], batch.index.to(torch.uint8))  # fed as they are
    assert torch.equal(batch.targets, labels[batch.index])
    assert len(task.few(total=3).train) == 3 and len(task.train.subset([1, 2])) == 2


@pytest.mark.parametrize(
    ("named", "options", "message"),
    [
        (
            {"x": torch.zeros(4, 2), "y": torch.zeros(3)},
            {},
            "train: inputs are of {'x': 4, 'y': 3}",
        ),
        ({}, {}, "train: inputs are of no examples"),
        ({"x": ["a"] * 4}, {}, "train: inputs 'x' are <U1, not numbers"),
        ({"x": torch.full((4,), float("nan"))}, {}, "train: inputs 'x' hold 4 NaN"),
        ({"x": torch.zeros(5, 2)}, {}, "train: there are 5 inputs and 4 targets"),
        ({"x": torch.zeros(4, 2)}, {"normalize": ((0.5,), (1,))}, r"named \(x\).*a single tensor"),
        ({"x": torch.zeros(4, 2)}, {"augment": PadCropFlip()}, r"named \(x\), and augment= and"),
    ],
)
def test_named_arrays_that_cannot_be_used_are_refused(named, options, message):
    with pytest.raises(TaskError, match=message):
        Task.from_arrays((named, [0, 1, 0, 1]), (named, [0, 1, 0, 1]), **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([pair(8)], r"train: list is no DataLoader; wrap a data set in one, DataLoader\(data, "),
        (TensorDataset(*pair(8)), "train: TensorDataset is no DataLoader"),
        (pair(8), r"train: tuple is no DataLoader.* or give arrays to Task.from_arrays"),
        (DataLoader([]), "train: the DataLoader yields no batch"),
    ],
)
def test_from_loaders_says_what_it_takes(given, message):
    with pytest.raises(TaskError, match=message):
        Task.from_loaders(given, DataLoader(TensorDataset(*pair(8))))


def test_a_list_of_whole_batches_is_wrapped_as_told():
    batches = DataLoader([pair(8), pair(4)], batch_size=None)
    task = Task.from_loaders(batches, batches, batches)
    assert [batch.size for batch in task.train.batches(99)] == [8, 4]


def test_from_loaders_takes_a_reader():
    rows = DataLoader([{"words": torch.ones(6), "kind": 1}] * 8, 4)
    task = Task.from_loaders(
        rows, rows, rows, read=lambda item: Batch((item["words"],), item["kind"])
    )
    assert task.score(nn.Linear(6, 2))["accuracy"] in (0.0, 1.0)


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


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ((torch.zeros(0, 2), []), pair(), r"train: inputs of shape \(0, 2\) hold no example"),
        ((torch.zeros(3, 2), [0, 1]), pair(), "train: there are 3 inputs and 2 targets"),
        (pair(), (torch.full((4, 6), float("nan")), [0] * 4), "test: inputs hold 24 NaN or inf"),
        ((torch.zeros(3, 2), [0, -1, 0]), pair(), r"train: label -1 \(example 1\) is out of range"),
        (pair(), (torch.zeros(3, 6), [0, 4, 0]), r"test: label 4 \(example 1\).*are 0 to 3"),
        ((torch.zeros(3, 2), [0.0, 1.0, 0.0]), pair(), "train: labels are torch.float32, not int"),
        ((["a", "b"], [0, 1]), pair(), "train: inputs are <U1, not numbers"),
        ("data", pair(), "train: str is not data; give a DataLoader"),
        ((torch.zeros(1, 2), [0]), (torch.zeros(1, 2), [0]), "train: 1 example cannot be divided"),
        (DataLoader([]), pair(), "train: the DataLoader yields no batch"),
        (DataLoader([torch.zeros(2)]), pair(), "train: the examples have no targets.* validate="),
        (pair(), torch.zeros(8, 6), "test: the examples have no targets.*only training examples"),
        (pair(), DataLoader(torch.zeros(8, 6)), "test: the examples have no targets"),
        (pair()[0], (pair()[0],) * 3, "test: tuple is not a pair; give every split as"),
    ],
)
def test_a_task_refuses_data_that_cannot_be_used(train, test, message):
    with pytest.raises(TaskError, match=message):
        Task(train, test)


def test_an_infinite_value_is_located():
    inputs = torch.zeros(5, 2)
    inputs[3, 1] = float("inf")
    with pytest.raises(TaskError, match="hold 1 NaN or infinite values, first in example 3"):
        Arrays(inputs, torch.zeros(5))
    with pytest.raises(TaskError, match="inputs of the DataLoader's batch 0, counted from 0, hold"):
        Loader(DataLoader(TensorDataset(inputs, torch.zeros(5)), 5))


@pytest.mark.parametrize("place", ["inputs", "targets"])
def test_a_loader_says_which_of_its_batches_is_broken(place):
    found = {"inputs": torch.zeros(10, 2), "targets": torch.zeros(10)}
    found[place][7] = float("nan")
    loader = Loader(DataLoader(TensorDataset(*found.values()), 4))
    with pytest.raises(TaskError, match=f"{place} of the DataLoader's batch 1, .* in example 3;"):
        list(loader.batches(4))


@pytest.mark.parametrize(
    ("normalize", "message"),
    [
        (((0.5, 0.5), (1.0, 1.0)), "2 values for inputs of shape"),
        (((0.5,), (0.0,)), "std above zero"),
        (((0.5,), (1.0, 1.0)), "mean has 1 values and std 2"),
        (((float("nan"),), (1.0,)), "must be finite"),
    ],
)
def test_normalize_is_checked(normalize, message):
    with pytest.raises(TaskError, match=message):
        Arrays(images(), torch.arange(23), normalize=normalize)


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


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"digit": {}}, "no kind of task is called 'digit'; did you mean 'digits'"),
        ({}, "no kind of task is called ''"),
        ({"digits": {"pad": 1}}, "digits: 'pad' is not an option; it takes no option"),
        ({"npz": {"path": "x.npz", "augmnt": "flip"}}, "'augmnt' is not.*did you mean 'augment'"),
        ({"npz": {}}, "npz: 'path' is missing"),
        ({"npz": 3}, "npz: 'path' must be a path, got 3"),
        ({"npz": "none.npz"}, "none.npz: no such file"),
    ],
)
def test_a_task_line_that_is_wrong_is_refused(spec, message):
    with pytest.raises(TaskError, match=message):
        task_from_dict(spec, base=Path())


def test_a_task_line_starts_at_its_recipe(tmp_path):
    labels = np.arange(20) % 2
    grey = np.zeros((20, 4, 4), np.uint8)
    np.savez(
        tmp_path / "d.npz",
        train_images=grey,
        train_labels=labels,
        test_images=grey,
        test_labels=labels,
    )
    one = task_from_dict({"npz": "d.npz", "mean": [0.5], "std": [1]}, base=tmp_path)
    other = task_from_dict({"npz": {"path": "d.npz", "mean": [0.5], "std": [1]}}, base=tmp_path)
    assert one.describe() == other.describe() and one.name == "d"
    assert task_from_dict("digits", base=tmp_path).describe()["examples"]["test"] == 360


def test_a_recipe_draws_few_examples() -> None:
    task = task_from_dict({"digits": None, "few": {"per_class": 3, "seed": 1}})
    assert task.train.targets().bincount().tolist() == [3] * 10
    again = task_from_dict({"digits": None}).few(per_class=3, seed=1)
    assert task.describe()["drawn"] == list(again.drawn or ())
    assert len(task_from_dict({"digits": None, "few": {"total": 7}}).train) == 7


@pytest.mark.parametrize(
    ("few", "text"),
    [
        (5, "per_class: 5"),
        (None, "per_class: 5"),
        ({"per_clas": 5}, "did you mean 'per_class'"),
        ({"total": 2.5}, "whole number"),
        ({"per_class": 10_000}, "10000 examples of class 0"),
        ({}, "either"),
    ],
)
def test_few_examples_that_cannot_be_drawn(few: object, text: str) -> None:
    with pytest.raises(TaskError, match=text):
        task_from_dict({"digits": None, "few": few})


def test_few_refuses_a_class_without_examples():
    inputs, labels = torch.rand(8, 2), torch.tensor([0, 2] * 4)
    task = Task((inputs, labels), (inputs, labels), (inputs, labels))
    with pytest.raises(
        TaskError, match="class 1 of train were asked for; there are 0: give total="
    ):
        task.few(per_class=1)
