"""Laws of the artefact: a file holds what was saved, nothing more, and refuses the rest by name."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from helpers.artifacts import convolutional, laid_linear, same
from laconic.errors import ArtifactError
from laconic.ship import load, save
from laconic.ship.container import read
from laconic.weights import Symmetric, Ternary, lay


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
