"""Layers as data: every kind survives the round trip, and nothing else is built."""

from __future__ import annotations

import importlib
import inspect
import json
import reprlib
from collections import OrderedDict

import pytest
import torch
from torch import nn

from laconic.errors import ModelError
from laconic.models import layers
from laconic.models.layers import describe, layer
from laconic.weights import Ternary, lay

# One of each, away from its defaults where it has any.
EXAMPLES = [
    nn.AdaptiveAvgPool1d(3),
    nn.AdaptiveAvgPool2d((2, 3)),
    nn.AvgPool1d(3, 2, 1, ceil_mode=True),
    nn.AvgPool2d((3, 2), 2, 1, count_include_pad=False, divisor_override=3),
    nn.BatchNorm1d(5, eps=1e-3, momentum=None, track_running_stats=False),
    nn.BatchNorm2d(5, momentum=0.2, affine=False),
    nn.Conv1d(4, 6, 3, 2, 1, groups=2, bias=False, padding_mode="circular"),
    nn.Conv2d(4, 6, (3, 1), (2, 1), (1, 0), 2, padding_mode="reflect"),
    nn.Conv2d(4, 4, 3, padding="same", groups=4),
    nn.Dropout(0.3),
    nn.Dropout2d(0.0, inplace=True),
    nn.ELU(0.5),
    nn.Embedding(7, 3, padding_idx=0),
    nn.Embedding(7, 3, max_norm=0.5, norm_type=1.0, scale_grad_by_freq=True, sparse=True),
    nn.Flatten(0, -2),
    nn.GELU("tanh"),
    nn.GroupNorm(2, 6, eps=1e-3),
    nn.Hardsigmoid(),
    nn.Hardswish(inplace=True),
    nn.Identity(),
    nn.LayerNorm((3, 4), bias=False),
    nn.LayerNorm(3, elementwise_affine=False),
    nn.LeakyReLU(0.1),
    nn.Linear(3, 4, bias=False),
    nn.MaxPool1d(3, dilation=2, return_indices=True),
    nn.MaxPool2d((2, 3), (1, 2), ceil_mode=True),
    nn.PReLU(3),
    nn.ReLU(),
    nn.ReLU6(inplace=True),
    nn.SiLU(),
    nn.Sigmoid(),
    nn.Softmax(-1),
    nn.Tanh(),
    nn.Sequential(),
    nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 3), act=nn.ReLU())),
    nn.ModuleList([nn.Linear(2, 3), nn.Sequential(nn.Sequential(nn.Linear(3, 2)))]),
]


def shapes(module: nn.Module) -> dict[str, tuple[torch.Size, bool]]:
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {key: (value.shape, isinstance(value, nn.Parameter)) for key, value in named.items()}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_every_layer_survives_the_round_trip(example):
    spec = describe(example)
    again = layer(json.loads(json.dumps(spec)))
    assert repr(again) == repr(example)
    assert shapes(again) == shapes(example)
    assert describe(again) == spec
    assert again.training
    plain = {key: value for key, value in vars(example).items() if not key.startswith("_")}
    assert {key: vars(again)[key] for key in plain} == plain


@pytest.mark.parametrize(
    "example", [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)], ids=lambda e: repr(e)
)
def test_a_norm_without_a_bias_is_built_without_it(example: nn.Module) -> None:
    name, options = type(example).__name__, describe(example)[type(example).__name__]
    if "bias" not in inspect.signature(type(example)).parameters:
        pytest.skip("norms of this torch have no such argument")
    without = layer({name: {**options, "bias": False}})
    assert without.bias is None and without.weight is not None
    assert describe(without)[name]["bias"] is False


def test_an_argument_that_a_file_cannot_keep_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(layers.LAYERS["Softmax"], "dim")
    with pytest.raises(ModelError, match="Softmax: a file cannot keep dim=-1"):
        describe(nn.Softmax(-1))


def test_every_kind_of_torch_has_an_example():
    kinds = {type(example).__name__ for example in EXAMPLES}
    assert kinds == set(layers.LAYERS) | set(layers.CONTAINERS)


@pytest.mark.parametrize("name", layers.LAYERS)
def test_arguments_are_those_of_the_constructor(name):
    parameters = inspect.signature(getattr(nn, name)).parameters
    assert layers.LAYERS[name].keys() - {"bias"} == parameters.keys() - layers.FIRST - {"bias"}
    assert layers.LAYERS[name].keys() >= parameters.keys() - layers.FIRST
    needed = {key for key, p in parameters.items() if p.default is p.empty}
    assert needed - {"args", "kwargs"} <= layers.LAYERS[name].keys()


@pytest.mark.parametrize("name", layers.OWN)
def test_own_layers_keep_json_arguments(name):
    module, _, kind = layers.OWN[name].partition(":")
    own = getattr(importlib.import_module(module), kind)
    assert kind == name and issubclass(own, nn.Module)
    with pytest.raises(ModelError, match=f"{name} cannot be built|{name}|must be"):
        layer({name: {"nonsense": 1}})


def test_own_layers_survive_the_round_trip():
    own = layer({"BlockDiagonalLinear": {"in_features": 4, "out_features": 6, "blocks": 2}})
    spec = describe(nn.Sequential(own, nn.ReLU()))
    again = layer(json.loads(json.dumps(spec)))
    assert describe(again) == spec and shapes(again[0]) == shapes(own)


def test_a_layer_is_built_on_any_device():
    with torch.device("meta"):
        assert layer({"Linear": {"in_features": 2, "out_features": 1 << 20}}).weight.is_meta


def test_a_laid_layer_is_described_as_plain():
    model = nn.Sequential(nn.Linear(3, 4))
    lay(model, "0.weight", Ternary())
    lay(model, "0.bias", Ternary())
    assert describe(model) == describe(nn.Sequential(nn.Linear(3, 4)))


def test_a_shared_child_is_described_twice():
    child = nn.ReLU()
    assert len(layer(describe(nn.Sequential(child, nn.Tanh(), child)))) == 3


class Own(nn.Linear):
    """Looks like a layer of torch."""


Own.__name__ = "Linear"


@pytest.mark.parametrize(
    "module",
    [
        nn.LSTM(2, 2),
        nn.MultiheadAttention(4, 1),
        Own(2, 2),
        nn.Sequential(nn.Linear(2, 2), nn.ModuleDict()),
        nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2),
    ],
    ids=lambda module: type(module).__qualname__,
)
def test_other_modules_cannot_be_described(module):
    with pytest.raises(ModelError, match=r"cannot be described in a file.*use layers of torch"):
        describe(module)


def nested(levels: int) -> dict:
    spec: dict = {"ReLU": {}}
    for _ in range(levels):
        spec = {"Sequential": {"children": [spec]}}
    return spec


LINEAR = {"in_features": 2, "out_features": 2}
WRONG = [
    (None, "describes no layer"),
    ([], "describes no layer"),
    ({}, "describes no layer"),
    ({"ReLU": {}, "Tanh": {}}, "describes no layer"),
    ("ReLU", "describes no layer"),
    ({"Linaer": {}}, "no layer is called 'Linaer'; did you mean 'Linear'"),
    ({"os.system": {}}, "no layer is called"),
    ({"Module": {}}, "no layer is called"),
    ({"__class__": {}}, "no layer is called"),
    ({1: {}}, "no layer is called 1"),
    ({"x" * 10**6: {}}, "no layer is called"),
    ({"ReLU": None}, "ReLU: arguments must be a mapping"),
    ({"ReLU": {1: 2}}, "arguments must be a mapping"),
    ({"ReLU": {"inplac": True}}, "'inplac' is not an argument; did you mean 'inplace'"),
    ({"Linear": {**LINEAR, "device": "cuda"}}, "'device' is not an argument"),
    ({"Linear": {**LINEAR, "dtype": "float16"}}, "'dtype' is not an argument"),
    ({"Linear": {"in_features": 2}}, "Linear cannot be built from"),
    ({"Linear": {**LINEAR, "in_features": 0}}, "in_features 0 is out of bounds"),
    ({"Linear": {**LINEAR, "in_features": 1 << 40}}, "in_features 1099511627776 is out"),
    ({"Linear": {**LINEAR, "in_features": 10**400}}, "in_features 1000.* is out of bounds"),
    ({"Linear": {**LINEAR, "in_features": True}}, "in_features True is out of bounds"),
    ({"Linear": {**LINEAR, "in_features": 2.0}}, "in_features 2.0 is out of bounds"),
    ({"Linear": {**LINEAR, "in_features": "2"}}, "in_features '2' is out of bounds"),
    ({"Linear": {**LINEAR, "in_features": [2]}}, r"in_features \[2\] is out of bounds"),
    ({"Linear": {**LINEAR, "bias": 1}}, "bias 1 is out of bounds"),
    ({"LayerNorm": {"normalized_shape": []}}, r"normalized_shape \[\] is out of bounds"),
    ({"LayerNorm": {"normalized_shape": [1] * 9}}, "is out of bounds"),
    ({"LayerNorm": {"normalized_shape": 2, "eps": float("nan")}}, "eps nan is out of bounds"),
    ({"GELU": {"approximate": "x" * 10**6}}, "approximate 'xx.* is out of bounds"),
    ({"Dropout": {"p": 1.5}}, "p 1.5 is out of bounds"),
    (
        {"Conv2d": {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "groups": 2}},
        "Conv2d cannot be built from .*divisible",
    ),
    (
        {"Conv2d": {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "padding": "full"}},
        "padding 'full' is out of bounds",
    ),
    ({"Sequential": {}}, "a list 'children' is needed"),
    ({"Sequential": {"children": {}}}, "a list 'children' is needed"),
    ({"Sequential": {"children": [], "more": 1}}, "a list 'children' is needed"),
    ({"Sequential": {"children": [None]}}, "None describes no layer"),
    ({"Sequential": {"children": [{"ReLU": {}}], "names": []}}, "1 children cannot be called"),
    ({"Sequential": {"children": [{"ReLU": {}}], "names": ["a.b"]}}, "cannot be called"),
    ({"Sequential": {"children": [{"ReLU": {}}], "names": ["__init__"]}}, "cannot be called"),
    ({"Sequential": {"children": [{"ReLU": {}}], "names": ["forward"]}}, "cannot be"),
    ({"Sequential": {"children": [{"ReLU": {}}] * 2, "names": ["a", "a"]}}, "cannot be called"),
    ({"ModuleList": {"children": [{"ReLU": {}}], "names": ["a"]}}, "cannot be called"),
    ({"Sequential": {"children": [{"ReLU": {}}] * 257}}, "257 children cannot be called"),
    (nested(layers.DEEPEST), "nests containers deeper than 4 levels"),
    (nested(5000), "nests containers deeper"),
    (
        {"Sequential": {"children": [{"Sequential": {"children": [{"ReLU": {}}] * 200}}] * 200}},
        "more than 1024 layers",
    ),
    ({"TTLinear": {"rows": [[[[[[[[[[[[[[1]]]]]]]]]]]]]]}}, "too long or nest too deep"),
    ({"TTLinear": {"rows": [1] * 1000}}, "too long or nest too deep"),
    ({"TTLinear": {"rows": [1 << 40]}}, "is out of bounds or no JSON"),
    ({"TTLinear": {"rows": "x" * 1000}}, "is too long"),
    ({"TTLinear": {"rows": b"bytes"}}, "is out of bounds or no JSON"),
    ({"TTLinear": {"rows": "abc", "columns": [1, 1, 1], "ranks": [1, 1]}}, "cannot be built"),
]


@pytest.mark.parametrize(("spec", "message"), WRONG, ids=lambda value: reprlib.repr(value)[:50])
def test_a_hostile_description_is_refused(spec, message):
    with torch.device("meta"), pytest.raises(ModelError, match=message) as caught:
        layer(spec)
    assert len(str(caught.value)) < 1000
