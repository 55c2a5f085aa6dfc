"""The data a task is made of: arrays, loaders and lines of a recipe, taken or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.task import pair
from laconic import compress
from laconic.errors import TaskError
from laconic.recover import Label, Logits, Train
from laconic.tasks import Arrays, Batch, Loader, PadCropFlip, Task, task_from_dict
from laconic.tasks.metrics import accuracy
from laconic.weights import Quantize

# -- arrays ---------------------------------------------------------------------------------------


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


# -- loaders --------------------------------------------------------------------------------------


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


# -- either ---------------------------------------------------------------------------------------


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


# -- lines of a recipe ----------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("shaped", "remedy"),
    [
        (lambda labels: labels[:, None], r"give labels\[\.\.\., 0\]"),
        (lambda labels: nn.functional.one_hot(labels, 3), r"give labels\.argmax\(1\)"),
        (lambda labels: labels[:, None].expand(-1, 2), "give loss= and metrics="),
    ],
    ids=["a column", "one hot", "several"],
)
def test_labels_of_another_shape_are_told_what_to_be(
    shaped: Callable[[Tensor], Tensor], remedy: str
) -> None:
    data = torch.rand(12, 5), shaped(torch.arange(12) % 3)
    task = Task.from_arrays(data, data, classes=("a", "b", "c"))
    with pytest.raises(TaskError, match=rf"have shape .* need \[12\], a class for each: {remedy}"):
        task.score(nn.Linear(5, 3))


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 4)])
def test_bytes_that_may_be_no_images_are_refused(shape):
    found = torch.zeros(shape, dtype=torch.uint8)
    with pytest.raises(TaskError, match="features as floats and token ids as int64"):
        Task.from_arrays((found, torch.zeros(6)), (found, torch.zeros(6)))
    Arrays(found, normalize=((0.5,), (0.5,)))  # of images, then


def test_an_augmentation_that_fails_says_how_it_is_called():
    data = Arrays(torch.zeros(4, 2), torch.zeros(4), augment=lambda inputs: inputs)
    with pytest.raises(TaskError, match=r"augment= failed .*called with \(inputs, generator\)"):
        next(data.batches(2, seed=0))


def padded(targets_of: Callable[[Tensor], Tensor]) -> Task:
    """Return a task of texts in batches of two, each padded to its own length."""
    ids = [torch.randint(1, 9, (2, length)) for length in (4, 5, 4)]
    loader = DataLoader([(each, targets_of(each)) for each in ids], batch_size=None)

    def loss(outputs: Tensor, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, -2), batch.targets.flatten())

    return Task.from_loaders(loader, loader, loader, loss=loss)


def test_batches_of_different_lengths_are_scored_token_by_token():
    torch.manual_seed(0)
    task, model = padded(lambda ids: ids), nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    batches = [*task.test.batches(2)]
    with torch.no_grad():
        right = [(model(*batch.inputs).argmax(-1) == batch.targets).flatten() for batch in batches]
    assert task.score(model)["accuracy"] == float(torch.cat(right).double().mean())
    steps = [Quantize(4), Train(Logits() + Label(), epochs=1)]
    assert compress(model, task, steps).history[-1].metrics.keys() == {"accuracy", "loss"}


def test_outputs_of_different_shapes_are_told_how_to_be_scored():
    task = padded(lambda ids: ids[..., None])
    with pytest.raises(TaskError, match=r"such as .*targets for every token"):
        task.score(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)))
