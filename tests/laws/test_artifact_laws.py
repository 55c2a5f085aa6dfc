"""Laws of the artefact: what is loaded is what was saved, bit for bit, and nothing more is written.

Run as a script, this file is the other process: it loads every artefact of a folder and prints the
hashes of what it finds.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import laconic
from laconic import models
from laconic.errors import ArtifactError, RecipeError
from laconic.models import digits_cnn, resnet
from laconic.models.notes import built
from laconic.ship import Inventory, coding, inspect, load, save, verify
from laconic.ship.container import digest, read
from laconic.step import members
from laconic.weights import Binary, Float, KMeans, Representation, Symmetric, Ternary, bake, lay

ROWS, COLUMNS = 8, 12
# How a stream is coded: by choice of the smallest, or by this coder wherever it applies.
CHOICES = ("smallest", *coding.CODERS)


class Fan(nn.Module):
    """Linear layers side by side, so that one file holds every representation there is."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(COLUMNS, ROWS) for _ in range(count))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([layer(inputs) for layer in self.layers])


class Tied(nn.Module):
    """An embedding whose table is also the decoder, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.decoder = nn.Linear(8, 20)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.embedding(tokens))


class Shared(nn.Module):
    """One block in three places, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.blocks = nn.ModuleList([block, nn.ReLU(), block])
        self.last = block

    def forward(self, inputs: Tensor) -> Tensor:
        for block in [*self.blocks, self.last]:
            inputs = block(inputs)
        return inputs


class Positions(nn.Module):
    """A buffer that is computed, not stored, as Hugging Face's position ids."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("offsets", torch.arange(4.0) + torch.rand(()) * 0, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs) + self.offsets


def every_representation() -> list[Representation]:
    """Return the default of each registered one, each width and each granularity."""
    found: dict[Representation, None] = {}
    for member in members(Representation, every=True).values():
        found[member()] = None
        for fields in [*({"bits": bits} for bits in range(1, 9)), *GRANULARITIES]:
            if fields.keys() <= member.model_fields.keys():
                try:
                    found[member(**fields)] = None
                except RecipeError:
                    continue  # not every width exists
    return list(found)


GRANULARITIES = ({"granularity": "row"}, {"granularity": 4})
EVERY = every_representation()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and digest(left) == digest(right)


def fan() -> Fan:
    """Return every representation, without a mask and with a sparser and a denser one."""
    model = Fan(3 * len(EVERY))
    for index, layer in enumerate(model.layers):
        mask = normal(ROWS, COLUMNS, seed=index) > 1.2 if index % 3 == 1 else None
        mask = normal(ROWS, COLUMNS, seed=index) < 1.2 if index % 3 == 2 else mask
        lay(model, f"layers.{index}.weight", EVERY[index // 3], mask=mask)
        assert layer.weight.isfinite().all()
    return model.eval()


def convolutional() -> nn.Module:
    """Return a network with a builder, its norms away from their start, several ways laid."""
    model = resnet(8, 3)
    model.train()(normal(16, 3, 8, 8))
    lay(model, "conv1.weight", KMeans(4))
    lay(model, "layer1.0.conv1.weight", Ternary("row"), mask=torch.rand(16, 16, 3, 3) < 0.3)
    lay(model, "layer2.0.conv1.weight", Float(), mask=torch.rand(32, 16, 3, 3) < 0.1)
    lay(model, "layer3.0.conv2.weight", Symmetric(4, granularity="row"))
    lay(model, "linear.bias", Symmetric(8))
    return model.eval()


def forced(choice: str) -> Callable[..., coding.Coded]:
    """Return an encode that takes one coder wherever it codes streams of this width."""

    def encode(symbols: Any, bits: int, *, coders: Any = None) -> coding.Coded:
        fitting = choice if bits == 1 else choice.removeprefix("gaps-")
        return original(symbols, bits, coders=coders or [fitting])

    original = coding.encode
    return encode


def hashes(model: nn.Module, inputs: Tensor) -> dict[str, str]:
    """Return the sha256 of every tensor as the network uses it, and of its logits."""
    plain = copy.deepcopy(model)
    bake(plain)
    found = {name: digest(tensor) for name, tensor in plain.state_dict().items()}
    with torch.no_grad():
        return found | {"logits": digest(model(inputs))}


def read_folder(folder: Path) -> dict[str, dict[str, str]]:
    """Return the hashes of every artefact of a folder: what the other process prints."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.stem == "built":
            found[path.stem] = hashes(load(path), normal(2, 3, 8, 8))
        else:
            with torch.device("meta"):
                empty = Fan(3 * len(EVERY))
            found[path.stem] = hashes(load(path, model=empty), normal(5, COLUMNS))
    return found


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
    command = [sys.executable, __file__, str(folder)]
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


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found = model.eval()(inputs)
    return found[0] if isinstance(found, tuple) else found


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


# Shared parameters.


@pytest.mark.parametrize("representation", [None, Ternary(), KMeans(3)], ids=str)
def test_a_tied_weight_is_stored_once_and_tied_again(representation, tmp_path):
    model, tokens = Tied(), torch.arange(20)
    if representation is not None:
        lay(model, "embedding.weight", representation)
    save(model, tmp_path / "a")
    manifest, blobs = read(tmp_path / "a")
    assert manifest["ties"] == {"decoder.weight": "embedding.weight"}
    floats = 20 + {None: 160, Ternary(): 1, KMeans(3): 8}[representation]
    assert blobs["float32"].numel() == floats
    loaded = load(tmp_path / "a", model=untied())
    assert loaded.decoder.weight is loaded.embedding.weight
    assert same(outputs(loaded, tokens), outputs(model, tokens))
    assert len(list(loaded.parameters())) == 2


def untied() -> nn.Module:
    model = Tied()
    model.decoder.weight = nn.Parameter(torch.zeros(20, 8))
    return model


def test_what_the_file_does_not_tie_is_untied(tmp_path):
    model = untied()
    save(model, tmp_path / "a")
    loaded = load(tmp_path / "a", model=Tied())
    assert same(outputs(loaded, torch.arange(20)), outputs(model, torch.arange(20)))


def test_a_laid_module_in_several_places_is_stored_once(tmp_path):
    model = Shared()
    model.train()(normal(9, 6))
    lay(model, "last.0.weight", Binary("row"), mask=normal(6, 6) > 0)
    save(model, tmp_path / "a")
    manifest, _ = read(tmp_path / "a")
    assert len(manifest["tensors"]) == 1
    assert manifest["ties"]["last.0.weight"] == "blocks.0.0.weight"
    loaded = load(tmp_path / "a", model=Shared())
    assert loaded.last[0].weight is loaded.blocks[0][0].weight
    assert loaded.last[1].running_mean is loaded.blocks[0][1].running_mean
    assert same(outputs(loaded, normal(2, 6)), outputs(model, normal(2, 6)))


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


# Where the network comes from.


def test_a_network_of_the_users_needs_the_network(tmp_path):
    save(Tied(), tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"Tied'.* pass load\(path, model=\.\.\.\)"):
        load(tmp_path / "a")
    assert verify(tmp_path / "a").tensors == 0


def test_a_laid_root_is_named_by_its_own_class(tmp_path):
    model = nn.Linear(3, 2)
    lay(model, "weight", Ternary())
    save(model, tmp_path / "a")
    assert read(tmp_path / "a")[0]["builder"] == {"custom": "torch.nn.modules.linear:Linear"}


def test_buffers_that_are_not_stored_are_computed_again(tmp_path, monkeypatch):
    def positions() -> nn.Module:
        return built(Positions(), "positions")

    monkeypatch.setattr(models, "BUILDERS", (*models.BUILDERS, "positions"))
    monkeypatch.setattr(models, "positions", positions, raising=False)
    positions.__annotations__["return"] = nn.Module
    model = positions()
    save(model, tmp_path / "a")
    assert "offsets" not in json.dumps(read(tmp_path / "a")[0])
    generator = torch.get_rng_state()
    loaded = load(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), generator)
    assert same(outputs(loaded, normal(2, 4)), outputs(model, normal(2, 4)))


def test_a_network_on_meta_needs_numbers_in_what_is_not_stored(tmp_path):
    model = Positions()
    save(model, tmp_path / "a")
    with torch.device("meta"):
        empty = Positions()
    with pytest.raises(ArtifactError, match="'offsets' is not in the file"):
        load(tmp_path / "a", model=empty)
    empty.offsets = torch.arange(4.0)
    loaded = load(tmp_path / "a", model=empty)
    assert same(outputs(loaded, normal(2, 4)), outputs(model, normal(2, 4)))


def test_what_does_not_fit_the_model_is_said(tmp_path):
    save(nn.Linear(3, 2), tmp_path / "a")
    for wrong, words in (
        (nn.Linear(3, 4), r"'bias' is \(2,\) in the file and \(4,\) in the model"),
        (nn.Linear(3, 2, bias=False), "'bias' is not in the model"),
        (nn.Sequential(nn.Linear(3, 2)), "'0.bias' is not in the file"),
        (nn.LazyLinear(2), "'bias' cannot be filled"),
        (laid_linear(), "not one with laid weights"),
    ):
        with pytest.raises(ArtifactError, match=words):
            load(tmp_path / "a", model=wrong)


def laid_linear() -> nn.Module:
    model = nn.Linear(3, 2)
    lay(model, "weight", Ternary())
    return model


def test_settings_of_the_process_do_not_matter(tmp_path):
    model = convolutional()
    save(model, tmp_path / "a")
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        save(model, tmp_path / "b")
        with torch.inference_mode():
            loaded = load(tmp_path / "a")
        verify(tmp_path / "a")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert same(outputs(loaded, normal(2, 3, 8, 8)), outputs(model, normal(2, 3, 8, 8)))


# What is written.


def test_the_file_is_what_safetensors_itself_would_write(tmp_path):
    save(convolutional(), tmp_path / "a")
    with safe_open(tmp_path / "a", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    assert list(metadata) == ["laconic"]
    assert serialise(tensors, metadata) == (tmp_path / "a").read_bytes()


def test_an_almost_empty_network_is_saved_all_the_same(tmp_path):
    # Fewer bytes than a file may promise weights for: it is written a little larger instead.
    model = nn.Linear(3000, 3000, bias=False)
    mask = torch.zeros(3000, 3000, dtype=torch.bool)
    mask[7, 9] = True
    lay(model, "weight", Ternary(), mask=mask)
    size = save(model, tmp_path / "a")
    assert size < 3000 * 3000 / 7
    loaded = load(tmp_path / "a", model=nn.Linear(3000, 3000, bias=False))
    assert same(loaded.weight.detach(), model.weight.detach())


def test_a_recipe_travels_as_json_has_it(tmp_path):
    recipe = {"steps": [{"prune": {10: "a", 9: "b"}}, 0.1, "ü\ud800"], "none": None}
    save(nn.Linear(3, 2), tmp_path / "a", recipe=recipe)
    found = read(tmp_path / "a")[0]["recipe"]
    assert found == json.loads(json.dumps(recipe))
    assert load(tmp_path / "a", model=nn.Linear(3, 2)) is not None


def deep(levels: int) -> Any:
    return functools.reduce(lambda inner, _: [inner], range(levels), None)


@pytest.mark.parametrize(
    "recipe", [{1, 2}, float("nan"), {"a": float("inf")}, deep(200), deep(100_000), b"x"], ids=type
)
def test_a_recipe_that_json_has_not_is_refused(recipe, tmp_path):
    with pytest.raises(ArtifactError, match="manifest"):
        save(nn.Linear(3, 2), tmp_path / "a", recipe=recipe)
    assert list(tmp_path.iterdir()) == []


class Extra(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"a": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


def doubled() -> nn.Module:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = laid_linear()
    nn.utils.parametrize.register_parametrization(model, "weight", Double())
    return model


def diverged() -> nn.Module:
    model = laid_linear()
    with torch.no_grad():
        model.parametrizations.weight.original[0, 0] = torch.nan
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "complex": (lambda: nn.Linear(3, 2, dtype=torch.complex64), "'weight' is torch.complex64"),
    "meta": (lambda: nn.Linear(3, 2, device="meta"), "'weight' is torch.float32, .* on meta"),
    "lazy": (lambda: nn.LazyLinear(2), "'weight' is torch.float32"),
    "extra state": (lambda: Extra(3, 2), "'_extra_state' of the state dict"),
    "parametrized twice": (doubled, "'weight' carries another parametrization"),
    "diverged": (diverged, "'weight' holds NaN"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_file_cannot_hold_is_refused_by_name(name, tmp_path):
    make, words = REFUSED[name]
    with pytest.raises(ArtifactError, match=words):
        save(make(), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (
        tmp_path,
        tmp_path / "file" / "a",
        Path(),
        tmp_path / "a\0b",
        tmp_path / ("a" * 999),
    ):
        with pytest.raises(ArtifactError, match=r"a folder|cannot be written"):
            save(nn.Linear(3, 2), path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    save(nn.Linear(3, 2), tmp_path / "a")
    before = (tmp_path / "a").read_bytes()

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("laconic.ship.container.os.fsync", full)
    with pytest.raises(ArtifactError, match="No space left"):
        save(nn.Linear(3, 3), tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == before


if __name__ == "__main__":
    sys.stdout.write(json.dumps(read_folder(Path(sys.argv[1]))))


def test_a_weight_of_nearly_zeros_is_not_stored_number_by_number(tmp_path):
    model = nn.Sequential(nn.Linear(512, 384, bias=False))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[0, :40] = 1.0
    lay(model, "0.weight", Symmetric(4))
    save(model, tmp_path / "model")
    packed = 512 * 384 // 2
    assert (tmp_path / "model").stat().st_size < packed / 10
    again = load(tmp_path / "model", model=nn.Sequential(nn.Linear(512, 384, bias=False)))
    assert torch.equal(again[0].weight, model[0].weight)
