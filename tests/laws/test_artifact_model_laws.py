"""Laws of the artefact: which network a file fills, and what it shares, computes or refuses."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from helpers.artifacts import Shared, convolutional, laid_linear, normal, outputs, same
from laconic import compress, models
from laconic.errors import ArtifactError
from laconic.models.notes import built
from laconic.ship import load, save, verify
from laconic.ship.container import read
from laconic.structure import Prune
from laconic.structure.axes import find_axes, slice_
from laconic.tasks import Task
from laconic.weights import Binary, KMeans, MinMax, Quantize, Ternary, attach_, lay

# Shared parameters.


class Tied(nn.Module):
    """An embedding whose table is also the decoder, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.decoder = nn.Linear(8, 20)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.embedding(tokens))


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


def plain() -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(stem, nn.Flatten(), nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [Quantize("ternary", activation=8)],
        [Prune("channels", keep=0.5), Prune("neurons", keep=0.5), Quantize(4)],
    ],
    ids=str,
)
def test_a_sequential_of_torchs_layers_needs_nothing(steps, tmp_path):
    pair = (normal(12, 1, 6, 6), torch.arange(12) % 3)
    result = compress(plain().eval(), Task.from_arrays(pair, pair, pair), steps)
    result.save(tmp_path / "a")
    again = load(tmp_path / "a")
    assert same(outputs(again, pair[0]), outputs(result.model, pair[0]))
    assert same(outputs(load(tmp_path / "a", model=plain()), pair[0]), outputs(again, pair[0]))
    # What was loaded can be saved as it is, and compressed on.
    save(again, tmp_path / "b")
    more = compress(again, None, [Quantize("binary", scope="4")])
    more.save(tmp_path / "c")
    for name, network in (("b", again), ("c", more.model)):
        assert same(outputs(load(tmp_path / name), pair[0]), outputs(network, pair[0]))


def test_a_sequential_that_rounds_its_inputs_needs_nothing(tmp_path):
    model, inputs = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), normal(9, 4)
    attach_(model, {"0": {"input": MinMax(8)}, "2": {"input": MinMax(4)}})
    save(model, tmp_path / "a")
    assert same(outputs(load(tmp_path / "a"), inputs), outputs(model, inputs))


def test_layers_of_a_sequential_that_stand_twice_are_tied(tmp_path):
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    lay(model, "0.weight", Ternary())
    save(model, tmp_path / "a")
    again = load(tmp_path / "a")
    assert again[0].weight is again[2].weight
    assert same(outputs(again, normal(2, 4)), outputs(model, normal(2, 4)))


def double(module, inputs, output):
    return 2 * output


@pytest.mark.parametrize("kind", ["hook", "forward", "own", "parametrized", "edited"])
def test_a_sequential_that_does_more_than_its_layers_needs_the_network(kind, tmp_path):
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    if kind == "hook":
        model[0].register_forward_hook(double)
    elif kind == "forward":
        model[1].forward = torch.tanh
    elif kind == "own":
        model[2] = Own(4, 4)
    elif kind == "parametrized":
        nn.utils.parametrizations.weight_norm(model[2])
    else:
        axes = find_axes(model, normal(2, 4))
        slice_(model, {next(axis for axis in axes if axis.frozen is None): [0, 1]})
    save(model, tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"pass load\(path, model=\.\.\.\)"):
        load(tmp_path / "a")


def replaced(model):
    model[1] = nn.Tanh()


def appended(model):
    model.append(nn.Softmax(1))


def hooked(model):
    model[1].register_forward_hook(double)


@pytest.mark.parametrize("change", [replaced, appended, hooked])
@pytest.mark.parametrize("kind", ["compressed", "pruned", "loaded"])
def test_what_is_changed_by_hand_is_not_forgotten(kind, change, tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    pair = (normal(12, 4), torch.arange(12) % 3)
    steps = [Prune("neurons", keep=0.5)] if kind == "pruned" else [Quantize("kmeans")]
    network = compress(model, Task.from_arrays(pair, pair, pair), steps).model
    if kind == "loaded":
        save(network, tmp_path / "a")
        network = load(tmp_path / "a")
    change(network)
    save(network, tmp_path / "b")
    try:
        again = load(tmp_path / "b")
    except ArtifactError:
        return  # its user has to build it
    assert same(outputs(again, pair[0]), outputs(network, pair[0]))


class Positions(nn.Module):
    """A buffer that is computed, not stored, as Hugging Face's position ids."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("offsets", torch.arange(4.0) + torch.rand(()) * 0, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs) + self.offsets


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
