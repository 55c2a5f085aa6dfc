"""Verifying artefacts: hashes of weights, the probe, and where nothing can be compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laconic.errors import ArtifactError
from laconic.machine import processor
from laconic.models import digits_cnn
from laconic.ship import inspect, load, save, verify
from laconic.ship.container import read, write
from laconic.ship.probe import conditions
from laconic.tasks import Task
from laconic.weights import Binary, Float, KMeans, Symmetric, Ternary, lay

SHAPE = (1, 8, 8)
MOST = 1000


def task_of(inputs: Any, **options: Any) -> Task:
    labels = torch.arange(len(inputs)) % 10
    return Task((inputs, labels), (inputs, labels), (inputs, labels), **options)


@pytest.fixture
def digits() -> Task:
    return task_of(torch.rand(20, *SHAPE))


def network() -> nn.Module:
    model = digits_cnn().train()
    model(torch.randn(8, *SHAPE))
    lay(model, "conv2.weight", KMeans(3), mask=torch.rand(32, 16, 3, 3) < 0.5)
    lay(model, "fc1.weight", Ternary("row"))
    return model


@pytest.fixture
def file(tmp_path: Path, digits: Task) -> Path:
    save(network(), tmp_path / "a", task=digits, probe=True)
    return tmp_path / "a"


def rewritten(file: Path, edit: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> Path:
    """Change what a file says and sign it again."""
    manifest, tensors = read(file)
    edit(manifest, tensors)
    write(file, manifest, tensors)
    return file


def test_a_sound_file(file):
    found = verify(file, logits=True)
    assert found.size_bytes == file.stat().st_size
    assert found.tensors == 2
    assert found.logits is True
    assert found.note == "logits are identical bit for bit"
    assert verify(str(file)).logits is None
    assert verify(file).note == "not asked for"


def test_the_model_may_be_given(file):
    with torch.device("meta"):
        empty = digits_cnn()
    assert verify(file, logits=True, model=empty).logits is True


def test_a_file_without_a_probe_says_so(tmp_path, digits):
    save(network(), tmp_path / "a", task=digits)
    found = verify(tmp_path / "a", logits=True)
    assert (found.tensors, found.logits, found.note) == (2, None, "the file holds no probe")


def test_a_probe_without_a_task_is_none(tmp_path):
    save(network(), tmp_path / "a", probe=True)
    assert "probe" not in read(tmp_path / "a")[0]


@pytest.fixture
def other_threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    yield before
    torch.set_num_threads(before)


def test_other_threads_are_a_note(tmp_path, digits, other_threads):
    save(network(), tmp_path / "a", task=digits, probe=True)
    assert verify(tmp_path / "a", logits=True).logits is True
    torch.set_num_threads(other_threads)
    found = verify(tmp_path / "a", logits=True)
    assert found.tensors == 2
    assert found.logits is None
    there, here = (
        "1 thread" if n == 1 else f"{n} threads" for n in (other_threads + 1, other_threads)
    )
    assert found.note == (
        f"those of the file come from {there}, not from {here} as here; compare under the same "
        "conditions"
    )


@pytest.mark.parametrize(("key", "value"), [("torch", "1.0"), ("cpu", "abacus"), ("threads", 99)])
def test_another_machine_is_a_note(file, key, value):
    rewritten(file, lambda manifest, _: manifest["probe"].update({key: value}))
    found = verify(file, logits=True)
    assert (found.tensors, found.logits) == (2, None)
    assert str(value) in found.note
    # Nothing is run where nothing can be compared: the model need not even be known.
    rewritten(file, lambda manifest, _: manifest.update(builder={"custom": "a:b"}))
    assert verify(file, logits=True).logits is None


def test_a_network_of_the_users_own_must_be_given(file):
    rewritten(file, lambda manifest, _: manifest.update(builder={"custom": "a:b"}))
    assert verify(file).tensors == 2
    with pytest.raises(ArtifactError, match="pass load"):
        verify(file, logits=True)
    assert verify(file, logits=True, model=digits_cnn()).logits is True


def test_another_weight_is_seen(file):
    rewritten(file, lambda _, tensors: tensors["float32"][:8].mul_(1.5))  # a codebook
    with pytest.raises(ArtifactError, match=r"'conv2.weight' does not decode to the weight"):
        verify(file)


def test_another_plain_number_changes_the_logits(file):
    rewritten(file, lambda _, tensors: tensors["float32"][-700:].add_(1.0))
    assert verify(file).tensors == 2
    with pytest.raises(ArtifactError, match="other logits than the saved one"):
        verify(file, logits=True)


def test_another_network_of_the_same_shapes_is_seen(file):
    model = digits_cnn()
    model.relu1 = nn.Sigmoid()
    with pytest.raises(ArtifactError, match="other logits than the saved one"):
        verify(file, logits=True, model=model)


def test_a_probe_changes_neither_modes_nor_generators(tmp_path, digits):
    model = network()
    model.bn1.eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    save(model, tmp_path / "a", task=digits, probe=True)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert verify(tmp_path / "a", logits=True).logits is True


def test_the_layout_in_memory_is_not_part_of_the_logits(tmp_path, digits):
    # A convolution of channels_last weights adds up in another order.
    model = network().to(memory_format=torch.channels_last)
    assert not model.conv3.weight.is_contiguous()
    save(model, tmp_path / "a", task=digits, probe=True)
    assert verify(tmp_path / "a", logits=True).logits is True
    other = digits_cnn().to(memory_format=torch.channels_last)
    assert verify(tmp_path / "a", logits=True, model=other).logits is True
    assert not model.conv3.weight.is_contiguous()


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens)


NO_PROBE: dict[str, tuple[nn.Module, Callable[[], Task]]] = {
    "numbers below zero": (nn.Flatten(), lambda: task_of(torch.arange(40).reshape(20, 2) - 1)),
    "a call of the user's own": (
        Named(),
        lambda: task_of(torch.rand(20, 4), call=lambda model, batch: model(tokens=batch.inputs)),
    ),
    "outputs that are no tensor": (nn.LSTM(4, 3), lambda: task_of(torch.rand(20, 4))),
    "many inputs": (nn.Flatten(), lambda: task_of(torch.zeros(20, 1 + MOST // 4))),
}


@pytest.mark.parametrize("name", NO_PROBE)
def test_what_random_numbers_cannot_stand_in_for_has_no_probe(name, tmp_path, monkeypatch):
    monkeypatch.setattr("laconic.ship.probe.LARGEST", MOST)
    model, make = NO_PROBE[name]
    save(model, tmp_path / "a", task=make(), probe=True)
    assert "probe" not in read(tmp_path / "a")[0]
    found = verify(tmp_path / "a", logits=True)
    assert (found.logits, found.note) == (None, "the file holds no probe")


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(50, 6), nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        words = self.embedding(input_ids) * attention_mask[..., None]
        return {"logits": self.linear(words.mean(1))}


def test_tokens_and_their_mask(tmp_path):
    ids = torch.arange(100).reshape(20, 5) % 50
    rows = [
        {"input_ids": row, "attention_mask": (row > 3).long(), "labels": row[0] % 3} for row in ids
    ]
    loader = DataLoader(rows, batch_size=5)  # type: ignore[arg-type]
    model = Words()
    lay(model, "embedding.weight", Ternary("row"))
    save(model, tmp_path / "a", task=Task(loader, loader, loader), probe=True)
    found = read(tmp_path / "a")[0]["probe"]
    assert (found["names"], found["below"]) == (["input_ids", "attention_mask"], [20, 2])
    assert verify(tmp_path / "a", logits=True, model=Words()).logits is True
    rewritten(tmp_path / "a", lambda m, _: m["probe"].update(below=[5000, 2]))
    with pytest.raises(ArtifactError, match="cannot run the probe"):
        verify(tmp_path / "a", logits=True, model=Words())


def test_tokens_by_their_place(tmp_path):
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 10))
    save(model, tmp_path / "a", task=task_of(torch.arange(40).reshape(20, 2) % 5), probe=True)
    assert read(tmp_path / "a")[0]["probe"]["below"] == [5]
    assert verify(tmp_path / "a", logits=True, model=copy.deepcopy(model)).logits is True


@pytest.mark.parametrize("field", [{"names": ["a", "b"]}, {"below": [0, 0]}, {"below": [1 << 40]}])
def test_a_probe_that_contradicts_itself(file, field):
    rewritten(file, lambda manifest, _: manifest["probe"].update(field))
    with pytest.raises(ArtifactError, match="cannot run the probe"):
        verify(file, logits=True)


def test_two_inputs(tmp_path):
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.linear(first) + self.linear(second)

    data = TensorDataset(torch.rand(20, 4), torch.rand(20, 4), torch.arange(20) % 3)
    model, loader = Sum(), DataLoader(data, batch_size=5)
    save(model, tmp_path / "a", task=Task(loader, loader, loader), probe=True)
    assert len(read(tmp_path / "a")[0]["probe"]["shapes"]) == 2
    assert verify(tmp_path / "a", logits=True, model=copy.deepcopy(model)).logits is True


def test_labels_and_pixels_travel(tmp_path):
    images = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    pair = (images, torch.arange(20) % 2)
    task = Task.from_arrays(pair, pair, classes=("cat", "dog"), normalize=((0.5,), (0.25,)))
    save(digits_cnn(), tmp_path / "a", task=task)
    inputs = read(tmp_path / "a")[0]["inputs"]
    assert inputs["classes"] == ["cat", "dog"]
    assert inputs["image"]["std"] == [0.25]


def test_conditions_name_the_kernels_too():
    here = conditions()
    assert here["cpu"].startswith(processor())
    assert here["cpu"].endswith(torch.backends.cpu.get_cpu_capability())


# The inventory.


def test_bytes_are_counted_where_they_belong(tmp_path):
    model = nn.ModuleDict({name: nn.Linear(64, 32, bias=False) for name in "abcde"})
    mask = torch.arange(2048).reshape(32, 64) % 2 == 0
    lay(model, "a.weight", Symmetric(8, granularity="row"))
    lay(model, "b.weight", Float(), mask=mask)
    lay(model, "c.weight", Float())
    lay(model, "d.weight", Binary(), mask=mask)
    save(model, tmp_path / "a")
    found = inspect(tmp_path / "a")
    code, index, table = found.layers["a.weight"]
    assert index == 0 and table >= 4 * 32 and 0 < code <= 2048
    assert found.layers["b.weight"][0] == 4 * 1024 and found.layers["b.weight"][1] > 0
    assert found.layers["c.weight"] == (4 * 2048, 0, 0)
    assert found.layers["d.weight"][0] <= 1024 / 8 + 16 and found.layers["d.weight"][2] >= 4
    assert found.dense_bytes == 4 * 2048  # e


def test_a_stream_that_cannot_be_read_is_named(file):
    manifest, tensors = read(file)
    manifest["tensors"]["fc1.weight"]["streams"]["code"][1] = "gaps-rans"
    write(file, manifest, tensors)
    for check in (inspect, verify, load):
        with pytest.raises(ArtifactError, match=r"'fc1\.weight'"):
            check(file)


def test_the_network_that_is_given_is_only_read(file):
    rewritten(file, lambda manifest, _: manifest.update(builder={"custom": "a:b"}))
    given = digits_cnn().train()
    before = copy.deepcopy(given.state_dict())
    assert verify(file, logits=True, model=given).logits is True
    assert given.training
    assert all(torch.equal(before[name], tensor) for name, tensor in given.state_dict().items())


def test_a_network_stays_as_it_is_where_a_file_cannot_be_decoded(file):
    def spoil(manifest, tensors):
        manifest["builder"] = {"custom": "a:b"}
        for entry in manifest["tensors"].values():
            for stream in entry["streams"].values():
                stream[1] = "gap"

    rewritten(file, spoil)
    given = digits_cnn()
    before = copy.deepcopy(given)
    with pytest.raises(ArtifactError):
        load(file, model=given)
    assert str(given) == str(before)
    for name, tensor in before.state_dict().items():
        assert torch.equal(given.state_dict()[name], tensor)


@pytest.mark.parametrize(
    "edit",
    [
        lambda manifest, _: manifest["versions"].update(torch="2\x1b]0;pwned\x07"),
        lambda manifest, _: manifest["versions"].update(torch="2" * 100),
        lambda manifest, _: manifest.update(ties={"a\nb": "conv1.weight"}),
        lambda manifest, _: manifest["probe"].update(shapes=[[1, 1, 1 << 20, 1 << 20]]),
    ],
    ids=["escape", "long", "line", "probe"],
)
def test_texts_and_sizes_that_do_harm_are_refused(file, edit):
    rewritten(file, edit)
    with pytest.raises(ArtifactError):
        verify(file, logits=True)
