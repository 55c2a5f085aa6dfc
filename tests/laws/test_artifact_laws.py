"""Laws of the artefact: what is loaded is what was saved, bit for bit."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import laconic
from helpers import artifacts
from helpers.artifacts import (
    COLUMNS,
    EVERY,
    ROWS,
    Fan,
    Shared,
    convolutional,
    hashes,
    normal,
    outputs,
    same,
)
from laconic.models import digits_cnn
from laconic.ship import Inventory, coding, inspect, load, save, verify
from laconic.ship.container import read
from laconic.step import members
from laconic.weights import KMeans, Representation, Symmetric, Ternary, bake, lay

# In a new process.

# How a stream is coded: by choice of the smallest, or by this coder wherever it applies.
CHOICES = ("smallest", *coding.CODERS)


def fan() -> Fan:
    """Return every representation, without a mask and with a sparser and a denser one."""
    model = Fan(3 * len(EVERY))
    for index, layer in enumerate(model.layers):
        mask = normal(ROWS, COLUMNS, seed=index) > 1.2 if index % 3 == 1 else None
        mask = normal(ROWS, COLUMNS, seed=index) < 1.2 if index % 3 == 2 else mask
        lay(model, f"layers.{index}.weight", EVERY[index // 3], mask=mask)
        assert layer.weight.isfinite().all()
    return model.eval()


def forced(choice: str) -> Callable[..., coding.Coded]:
    """Return an encode that takes one coder wherever it codes streams of this width."""

    def encode(symbols: Any, bits: int, *, coders: Any = None) -> coding.Coded:
        fitting = choice if bits == 1 else choice.removeprefix("gaps-")
        return original(symbols, bits, coders=coders or [fitting])

    original = coding.encode
    return encode


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Save with every coder, load all in a new process, and return what both sides have."""
    folder = tmp_path_factory.mktemp("artefacts")
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        wide, built_one = fan(), convolutional()
        expected = dict.fromkeys(CHOICES, hashes(wide, normal(5, COLUMNS)))
        expected["built"] = hashes(built_one, normal(2, 3, 8, 8))
        save(built_one, folder / "built.safetensors")
        for choice in CHOICES:
            if choice != "smallest":
                patch.setattr("laconic.ship.artifact.coding.encode", forced(choice))
            save(wide, folder / f"{choice}.safetensors")
            patch.undo()
    command = [sys.executable, "-P", artifacts.__file__, str(folder)]
    other = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert other.returncode == 0, other.stderr
    return {"folder": folder, "expected": expected, "found": json.loads(other.stdout)}


@pytest.mark.parametrize("name", ["built", *CHOICES])
def test_a_new_process_finds_the_very_same_network(name, saved):
    expected, found = saved["expected"][name], saved["found"][name]
    assert found.keys() == expected.keys()
    assert [key for key in found if found[key] != expected[key]] == []


@pytest.mark.parametrize("name", ["built", *CHOICES])
def test_the_stored_hashes_are_those_of_the_weights(name, saved):
    path = saved["folder"] / f"{name}.safetensors"
    manifest, _ = read(path)
    for weight, entry in manifest["tensors"].items():
        assert entry["sha256"] == saved["expected"][name][weight]
    assert verify(path).tensors == len(manifest["tensors"])


@pytest.mark.parametrize("choice", coding.CODERS)
def test_a_coder_is_there_wherever_it_applies(choice, saved):
    manifest, _ = read(saved["folder"] / f"{choice}.safetensors")
    found = {
        (key == "position", stream[0], stream[1])
        for entry in manifest["tensors"].values()
        for key, stream in entry["streams"].items()
    }
    assert (True, 1, choice) in found
    plain = choice.removeprefix("gaps-")
    assert {bits for is_position, bits, _ in found if not is_position} == set(range(1, 9))
    assert {coder for is_position, bits, coder in found if bits > 1} == {plain}


def test_every_registered_representation_is_in_the_file(saved):
    manifest, _ = read(saved["folder"] / "smallest.safetensors")
    written = [entry["representation"] for entry in manifest["tensors"].values()]
    names = {each if isinstance(each, str) else next(iter(each)) for each in written}
    assert names == set(members(Representation, every=True))


# Networks of every kind.


def ternary_digits() -> nn.Module:
    model = digits_cnn()
    for name in ("conv2.weight", "conv3.weight", "fc1.weight"):
        lay(model, name, Ternary())
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutional": (convolutional, (2, 3, 8, 8)),
    "plain": (digits_cnn, (2, 1, 8, 8)),
    "ternary": (ternary_digits, (2, 1, 8, 8)),
    "linear": (lambda: nn.Linear(3, 2), (2, 3)),
    "no parameters": (lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), (2, 3)),
    "no module": (nn.Identity, (2, 3)),
    "no elements": (lambda: empty_linear(), (2, 3)),
    "shared": (Shared, (2, 6)),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 2)), (2, 3)),
    "recurrent": (lambda: nn.LSTM(3, 4, batch_first=True), (2, 5, 3)),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8)),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def empty_linear() -> nn.Module:
    model = nn.Linear(3, 1)
    model.weight = nn.Parameter(torch.zeros(0, 3))
    model.bias = nn.Parameter(torch.zeros(0))
    return model


@each_network
def test_load_gives_the_same_outputs_bit_for_bit(name, tmp_path):
    make, shape = NETWORKS[name]
    model, fresh = make(), make()
    bake(fresh)
    save(model, tmp_path / "a")
    loaded = load(tmp_path / "a", model=fresh)
    assert loaded is fresh
    assert not loaded.training
    assert same(outputs(loaded, normal(*shape)), outputs(model, normal(*shape)))
    if "laconic" in vars(model):
        assert same(outputs(load(tmp_path / "a"), normal(*shape)), outputs(model, normal(*shape)))


@each_network
def test_sizes_add_up_to_the_file(name, tmp_path):
    model = NETWORKS[name][0]()
    size = save(model, tmp_path / "a")
    found = inspect(tmp_path / "a")
    assert size == found.size_bytes == (tmp_path / "a").stat().st_size
    assert size == sum(parts(found))
    for place, total in enumerate((found.code_bytes, found.index_bytes, found.table_bytes)):
        assert total == sum(layer[place] for layer in found.layers.values())
    _, blobs = read(tmp_path / "a")
    assert size - found.header_bytes == sum(blob.nbytes for blob in blobs.values())


def parts(found: Inventory) -> tuple[int, ...]:
    coded = (found.code_bytes, found.index_bytes, found.table_bytes)
    return (*coded, found.dense_bytes, found.header_bytes)


@each_network
def test_the_same_network_is_the_same_bytes(name, tmp_path):
    model = NETWORKS[name][0]()
    save(model, tmp_path / "a")
    save(copy.deepcopy(model), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@each_network
def test_saving_changes_nothing(name, tmp_path):
    model = NETWORKS[name][0]().train()
    for module in list(model.modules())[1::2]:
        module.eval()
    before = [(tensor, tensor.clone()) for tensor in model.state_dict(keep_vars=True).values()]
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    save(model, tmp_path / "a")
    assert [module.training for module in model.modules()] == modes
    after = model.state_dict(keep_vars=True).values()
    assert all(
        now is old and same(now, kept) for now, (old, kept) in zip(after, before, strict=True)
    )
    assert torch.equal(torch.get_rng_state(), generator)


def test_loading_draws_no_random_number(tmp_path):
    save(convolutional(), tmp_path / "a")
    generator = torch.get_rng_state()
    load(tmp_path / "a")
    verify(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), generator)


def test_what_is_loaded_can_be_saved_laid_and_loaded_again(tmp_path):
    model = ternary_digits()
    save(model, tmp_path / "a")
    loaded = load(tmp_path / "a")
    save(loaded, tmp_path / "b")
    lay(loaded, "fc1.weight", KMeans(2))
    again = load(tmp_path / "b")
    assert same(outputs(again, normal(2, 1, 8, 8)), outputs(model, normal(2, 1, 8, 8)))
    assert again.fc1.weight.is_leaf and again.fc1.weight.requires_grad


def test_the_users_own_loop(tmp_path):
    model, inputs, labels = digits_cnn(), normal(32, 1, 8, 8), torch.arange(32) % 10
    lay(model, "conv2.weight", KMeans(3), mask=torch.rand(32, 16, 3, 3) < 0.4)
    lay(model, "fc1.weight", Ternary())
    lay(model, "fc2.weight", Symmetric(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model.train()(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    laconic.save(model, tmp_path / "a")
    loaded = laconic.load(tmp_path / "a", model=digits_cnn())
    assert same(outputs(loaded, inputs), outputs(model, inputs))
    assert loaded.fc1.weight.unique().numel() == 3
    assert loaded.conv2.weight.unique().numel() <= 9


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_sums_of_the_encoder_are_those_of_the_forward(tmp_path):
    # With two threads a sum over so many weights is added up in another order than with one.
    model = nn.Linear(600, 500)
    with torch.no_grad():
        model.weight.copy_(normal(500, 600) * torch.logspace(-3, 3, 600))
    lay(model, "weight", Ternary())
    save(model, tmp_path / "a")
    assert torch.get_num_threads() == 2
    loaded = load(tmp_path / "a", model=nn.Linear(600, 500))
    assert same(loaded.weight.detach(), model.weight.detach())
    assert torch.get_num_threads() == 2


# Number types and layouts.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_other_floats_come_back_as_they_were(dtype, masked, tmp_path):
    linears = nn.ModuleList()
    for representation in EVERY:
        linears.append(nn.Linear(COLUMNS, ROWS, dtype=dtype))
        mask = normal(ROWS, COLUMNS) > 0 if masked else None
        lay(linears, f"{len(linears) - 1}.weight", representation, mask=mask)
    save(linears, tmp_path / "a")
    fresh = nn.ModuleList(nn.Linear(COLUMNS, ROWS) for _ in EVERY)
    loaded = load(tmp_path / "a", model=fresh)
    for old, new in zip(linears, loaded, strict=True):
        assert same(new.weight.detach(), old.weight.detach())
        assert same(new.bias.detach(), old.bias.detach())


def test_buffers_of_every_type_come_back(tmp_path):
    class Buffers(nn.Module):
        def __init__(self, fill: int) -> None:
            super().__init__()
            for dtype in TYPES:
                name = f"of_{str(dtype).removeprefix('torch.')}"
                self.register_buffer(name, torch.full((2, 3), fill, dtype=dtype))
            self.register_buffer("scalar", torch.tensor(fill))
            self.register_buffer("infinite", torch.full((2,), float("-inf")))
            self.register_buffer("absent", None)

    save(Buffers(1), tmp_path / "a")
    loaded = load(tmp_path / "a", model=Buffers(0))
    for name, tensor in Buffers(1).state_dict().items():
        assert same(loaded.state_dict()[name], tensor)


TYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


@pytest.mark.parametrize("representation", [None, *EVERY[::5]], ids=str)
def test_the_layout_in_memory_does_not_matter(representation, tmp_path):
    def network() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(32, 8))

    model = network()
    strided = copy.deepcopy(model).to(memory_format=torch.channels_last)
    strided[2].weight = nn.Parameter(strided[2].weight.detach().t().contiguous().t())
    assert not strided[0].weight.is_contiguous() and not strided[2].weight.is_contiguous()
    mask = normal(8, 4, 3, 3) > 0
    for one in (model, strided) if representation is not None else ():
        torch.manual_seed(0)
        lay(one, "0.weight", representation, mask=mask)
        lay(one, "2.weight", representation)
    save(model, tmp_path / "a")
    save(strided, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = load(tmp_path / "b", model=network())
    assert all(tensor.is_contiguous() for tensor in loaded.state_dict().values())
    assert same(outputs(loaded, normal(2, 4, 4, 4)), outputs(model, normal(2, 4, 4, 4)))


def test_a_view_of_something_larger_is_stored_alone(tmp_path):
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(torch.arange(60.0).reshape(6, 10)[2:4, 1:4])
    save(model, tmp_path / "a")
    loaded = load(tmp_path / "a", model=nn.Linear(3, 2))
    assert same(loaded.weight.detach(), model.weight.detach())
    assert loaded.weight.untyped_storage().nbytes() == 24
