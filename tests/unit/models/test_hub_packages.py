"""Networks that timm and torchvision build by name, and packages that are not there."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from laconic.errors import MissingExtra, ModelError
from laconic.models import build, load_model
from laconic.ship import load, save


def pretend(
    monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module] = nn.Linear
) -> list[tuple[Any, ...]]:
    """Stand in for both packages; return what they are asked for."""
    asked: list[tuple[Any, ...]] = []

    def make(name: str, **arguments: Any) -> nn.Module:
        asked.append((name, arguments))
        return kind(2, arguments.get("num_classes", 10))

    names = {"list_models": lambda: ["resnet18", "resnet34"]}
    timm = SimpleNamespace(**names, create_model=make)
    vision = SimpleNamespace(models=SimpleNamespace(**names, get_model=make))
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "torchvision", vision)
    return asked


@pytest.mark.parametrize(
    ("name", "none"), [("timm", {"pretrained": False}), ("torchvision", {"weights": None})]
)
def test_a_package_of_networks_is_asked_by_name(name, none, monkeypatch, tmp_path):
    asked = pretend(monkeypatch)
    model = load_model({name: "resnet18", "num_classes": 3})
    assert asked == [("resnet18", {"num_classes": 3, **none})]
    assert model.laconic["builder"] == {name: "resnet18", "arguments": {"num_classes": 3}}
    save(model, tmp_path / "a")
    assert torch.equal(load(tmp_path / "a").weight, model.weight)
    with pytest.raises(ModelError, match="no network 'resnet19'; did you mean 'resnet18'"):
        load_model({name: "resnet19"})
    with pytest.raises(ModelError, match="'pretrained' is not an option"):
        load_model({name: "resnet18", "pretrained": True})
    save_file({"weight": torch.ones(3, 2), "bias": torch.ones(3)}, tmp_path / "w")
    model = load_model({name: "resnet18", "num_classes": 3, "weights": "w"}, base=tmp_path)
    assert model.weight.sum() == 6


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_what_a_package_cannot_build_is_told(name, monkeypatch, tmp_path, caplog):
    class Stubborn(nn.Linear):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            if self.weight.is_meta:
                raise RuntimeError("Tensor on device meta is not on the expected device")

    pretend(monkeypatch, Stubborn)
    model = load_model({name: "resnet18"})
    with torch.device("meta"), pytest.raises(ModelError, match=f"{name} cannot build 'resnet18'"):
        build(model.laconic["builder"])
    save(model, tmp_path / "a")
    assert "load it with load(path, model=...)" in caplog.text
    again = load(tmp_path / "a", model=load_model({name: "resnet18"}))
    assert torch.equal(again.weight, model.weight)


def test_buffers_that_a_package_fills_are_filled(monkeypatch, tmp_path):
    class Filled(nn.Linear):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.register_buffer("places", torch.empty(3), persistent=False)
            self.places.copy_(torch.arange(3.0))

    pretend(monkeypatch, Filled)
    save(load_model({"timm": "resnet18"}), tmp_path / "a")
    assert load(tmp_path / "a").places.tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_a_package_that_is_not_there_is_named(name, monkeypatch, tmp_path):
    pretend(monkeypatch)
    save(load_model({name: "resnet18"}), tmp_path / "a")
    monkeypatch.setitem(sys.modules, name, None)
    for work in (lambda: load_model({name: "resnet18"}), lambda: load(tmp_path / "a")):
        with pytest.raises(MissingExtra, match=rf"'{name}' is not installed.*install '\.\[zoo\]'"):
            work()


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_a_real_package_makes_a_network_that_is_rebuilt(name, tmp_path):
    pytest.importorskip(name, reason=f"{name} is not installed")
    model = load_model({name: "resnet18", "num_classes": 3}).eval()
    save(model, tmp_path / "a")
    images = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    assert torch.equal(load(tmp_path / "a")(images), model(images))
