"""Networks for image compression papers: shapes, strides, builders and a forward of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laconic
from laconic import models
from laconic.errors import ModelError
from laconic.models import build, load_model
from laconic.models.mobile import InvertedResidual, _divisible
from laconic.models.vision import DenseLayer, PreBottleneck

# Tiny variants for images of 16 pixels a side.
PIXELS = 16
TINY: dict[str, dict[str, Any]] = {
    "densenet": {"depth": 10, "growth": 4, "classes": 3},
    "mobilenet_v1": {"width": 0.125, "classes": 3, "image": 16},
    "mobilenet_v1_full": {"width": 0.125, "classes": 3, "image": 16},
    "mobilenet_v2": {"width": 0.1, "classes": 3, "image": 16},
    "preresnet": {"depth": 11, "classes": 3},
}


def images() -> Tensor:
    return torch.rand(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))


def numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_variant_runs_and_is_built_again(name: str) -> None:
    model = getattr(models, name)(**TINY[name])
    assert model.laconic == {"builder": {"laconic": name, "arguments": TINY[name]}}
    again = build(json.loads(json.dumps(model.laconic["builder"])))
    again.load_state_dict(model.state_dict())
    scores = model.eval()(images())
    assert scores.shape == (2, 3) and bool(torch.isfinite(scores).all())
    assert not torch.equal(scores[0], scores[1])
    assert torch.equal(again.eval()(images()), scores)
    model.train()(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", TINY)
def test_a_file_brings_it_back(name: str, tmp_path: Path) -> None:
    model = getattr(models, name)(**TINY[name]).eval()
    laconic.save(model, tmp_path / "model.safetensors")
    again = laconic.load(tmp_path / "model.safetensors")
    assert torch.equal(again(images()), model(images()))


@pytest.mark.parametrize("name", TINY)
def test_a_recipe_names_it(name: str) -> None:
    model = load_model({name: TINY[name]})
    assert model.eval()(images()).shape == (2, 3)


def test_a_whole_width_may_be_written_without_a_point() -> None:
    model = load_model({"mobilenet_v1": {"width": 1, "classes": 2}})
    assert model.linear.weight.shape == (2, 1024)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": "wide"}, "width 'wide' is a str; give float"),
        ({"width": True}, "width 'True' is a bool"),
        ({"width": 40.0}, r"width 40\.0 is out of bounds"),
        ({"width": float("nan")}, "width nan is out of bounds"),
        ({"width": 0.0}, r"width 0\.0 is out of bounds"),
        ({"image": 10**6}, "image 1000000 is out of bounds"),
        ({"image": 32.0}, r"image '32\.0' is a float; give int"),
    ],
)
def test_a_hostile_builder_is_refused(arguments: dict[str, Any], message: str) -> None:
    for name in ("mobilenet_v1", "mobilenet_v1_full", "mobilenet_v2"):
        with pytest.raises(ModelError, match=message):
            build({"laconic": name, "arguments": arguments})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.preresnet(44), r"depth 44 is not 9n \+ 2"),
        (lambda: models.preresnet(2), r"depth 2 is not 9n \+ 2"),
        (lambda: models.preresnet(11, 0), "classes 0 must be at least 1"),
        (lambda: models.densenet(41), r"depth 41 is not 6n \+ 4"),
        (lambda: models.densenet(4), r"depth 4 is not 6n \+ 4"),
        (lambda: models.densenet(10, 0), "growth 0 must be at least 1"),
        (lambda: models.mobilenet_v1(0.0), r"width 0\.0 must be above 0"),
        (lambda: models.mobilenet_v2(float("nan")), "width nan must be above 0"),
        (lambda: models.mobilenet_v2(classes=0), "classes 0 must be at least 1"),
        (lambda: models.mobilenet_v1_full(image=0), "image 0 must be at least 1 pixel"),
    ],
)
def test_impossible_sizes_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make()


# ------------------------------------------------------------------ layers


@pytest.mark.parametrize(("pixels", "sides"), [(32, (32, 4)), (224, (112, 7))])
@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v1_full", "mobilenet_v2"])
def test_small_images_are_halved_less(name: str, pixels: int, sides: tuple[int, int]) -> None:
    with torch.device("meta"):
        model = getattr(models, name)(0.25, 10, pixels)
        stem = model.stem(torch.zeros(1, 3, pixels, pixels))
        body = model.body(stem)
    assert (stem.shape[-1], body.shape[-1]) == sides


def test_the_last_depthwise_layer_keeps_its_pixels() -> None:
    model = models.mobilenet_v1(0.25, 10, 224)
    strides = [block.depthwise.stride[0] for block in model.body]
    assert strides == [1, 2, 1, 2, 1, 2, *[1] * 5, 2, 1]


def test_a_depthwise_convolution_is_a_full_one_with_a_diagonal_of_blocks() -> None:
    """Howard et al. 2017: cost 1 / N + 1 / D_K^2 of the full convolution's."""
    block = models.mobilenet_v1(0.25).body[1]
    depthwise = block.depthwise
    full = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    with torch.no_grad():
        full.weight.zero_()
        full.weight[range(16), range(16)] = depthwise.weight[:, 0]
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(depthwise(x), full(x), rtol=1e-5, atol=1e-6)
    outputs = block.pointwise.out_channels
    separable = depthwise.weight.numel() + block.pointwise.weight.numel()
    assert separable / (9 * 16 * outputs) == pytest.approx(1 / outputs + 1 / 9)


def test_an_inverted_residual_adds_its_input_where_shapes_allow() -> None:
    x = torch.rand(1, 8, 4, 4)
    for outputs, stride, residual in ((8, 1, True), (8, 2, False), (16, 1, False)):
        block = InvertedResidual(8, outputs, expansion=6, stride=stride).eval()
        with torch.no_grad():
            block.layers[-1].bn.weight.zero_()
        found = block(x)
        assert found.shape == (1, outputs, 4 // stride, 4 // stride)
        assert torch.equal(found, x if residual else torch.zeros_like(found))
    assert len(InvertedResidual(8, 8, expansion=1, stride=1).layers) == 2


@pytest.mark.parametrize(
    ("channels", "rounded"), [(24, 24), (18, 24), (3.2, 8), (20, 24), (11, 16)]
)
def test_channels_are_multiples_of_eight(channels: float, rounded: int) -> None:
    assert _divisible(channels) == rounded


def test_a_dense_layer_puts_its_growth_beside_its_input() -> None:
    x = torch.rand(1, 6, 4, 4)
    layer = DenseLayer(6, 3).eval()
    found = layer(x)
    assert found.shape == (1, 9, 4, 4) and torch.equal(found[:, :6], x)
    assert layer.conv1.out_channels == 12


def test_densenet_halves_channels_between_its_stages() -> None:
    with torch.device("meta"):
        model = models.densenet(100)
    assert [len(getattr(model, f"dense{stage}")) for stage in (1, 2, 3)] == [16, 16, 16]
    first, second = model.transition1.conv, model.transition2.conv
    assert (first.in_channels, first.out_channels) == (216, 108)
    assert (second.in_channels, second.out_channels) == (300, 150)
    assert model.linear.in_features == 342


def test_a_pre_activation_block_passes_its_input_on() -> None:
    x = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    block = PreBottleneck(16, 4, 1).eval()
    with torch.no_grad():
        block.conv3.weight.zero_()
    assert torch.equal(block(x), x)
    assert PreBottleneck(16, 8, 2).eval()(x).shape == (1, 32, 2, 2)


def test_preresnet_has_as_many_layers_as_its_depth_says() -> None:
    with torch.device("meta"):
        model = models.preresnet(110)
    main = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    weights = [name for name in main if "shortcut" not in name]
    assert len(weights) + 1 == 110
    assert numbers(model) == 1_146_842
