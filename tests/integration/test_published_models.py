"""Published checkpoints reach their published accuracy on the whole CIFAR-10 test set."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from laconic.models import load_model
from laconic.tasks import Task, task_from_dict

DATA = os.environ.get("LACONIC_DATA", "")
needs_data = pytest.mark.skipif(
    not DATA or not (Path(DATA) / "teachers_cifar10").is_dir(),
    reason="LACONIC_DATA does not name a folder with cifar10/ and teachers_cifar10/",
)
# The checkpoints were trained with these channel statistics.
STATISTICS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def convert(*arguments: str) -> int:
    """Run papers/convert.py, which is a script and no package."""
    script = Path(__file__).parents[2] / "papers" / "convert.py"
    spec = importlib.util.spec_from_file_location("convert", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(list(arguments))


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    """CIFAR-10 as papers/convert.py writes it and a recipe reads it."""
    folder = tmp_path_factory.mktemp("cifar")
    assert convert("--data", DATA, "--out", str(folder / "cifar10.npz")) == 0
    return task_from_dict({"npz": "cifar10.npz", **STATISTICS}, base=folder)


def test_convert_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LACONIC_DATA", raising=False)
    for arguments, message in (
        ((), "set LACONIC_DATA, or give --data FOLDER"),
        (("--data", str(tmp_path)), "cifar10_test.npz, classes.txt not found"),
    ):
        with pytest.raises(SystemExit) as caught:
            convert("--out", str(tmp_path / "out.npz"), *arguments)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@needs_data
def test_cifar10_is_whole(task):
    assert task.describe()["examples"] == {"train": 47_500, "validate": 2_500, "test": 10_000}
    assert task.classes[:3] == ("airplane", "automobile", "bird")
    assert task.test.targets().bincount().tolist() == [1000] * 10
    every = torch.cat([task.train.targets(), task.validate.targets()])
    assert every.bincount().tolist() == [5000] * 10
    # Published statistics of the training images, to their four decimals.
    mean = task.train.inputs.sum(dim=(0, 2, 3)) / (50_000 * 32 * 32 * 255)
    assert [round(value, 4) for value in mean.tolist()] == [0.4914, 0.4822, 0.4465]


@needs_data
@pytest.mark.parametrize(
    ("name", "correct"),
    [
        ("resnet20", 9173),
        pytest.param("resnet32", 9263, marks=pytest.mark.slow),
        pytest.param("resnet56", 9339, marks=pytest.mark.slow),
    ],
)
def test_a_published_resnet_reaches_its_accuracy(task, name, correct):
    weights = f"teachers_cifar10/{name}.safetensors"
    model = load_model({name: {"weights": weights}}, base=Path(DATA))
    assert round(task.score(model)["accuracy"] * 10_000) == correct
