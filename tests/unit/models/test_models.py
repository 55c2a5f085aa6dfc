"""The networks of the papers, the ``model:`` line of a recipe, and builders in a file."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from helpers.tensors import same
from laconic import models
from laconic.errors import ArtifactError, ModelError
from laconic.models import build, load_model
from laconic.models.load import anchored_model, builder_of, custom
from laconic.models.notes import built
from laconic.models.vision import PadShortcut
from laconic.ship import load, save
from laconic.step import State, run_step
from laconic.structure import Prune
from laconic.tasks import digits
from laconic.weights import Ternary, lay

SHAPES = {"lenet_300_100": (1, 28, 28), "lenet_5": (1, 28, 28), "digits_cnn": (1, 8, 8)}
PARAMETERS = {
    "digits_cnn": 40_506,
    "lenet_300_100": 266_610,
    "lenet_5": 431_080,
    "resnet": 269_722,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet56": 853_018,
    "vgg": 14_724_042,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_builder_makes_a_plain_model_that_can_be_built_again(name):
    model = getattr(models, name)()
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert all(module.training for module in model.modules())
    builder = model.laconic["builder"]
    assert json.loads(json.dumps(model.laconic)) == model.laconic
    with torch.device("meta"):
        again = build(builder)
    shapes = [(key, value.shape) for key, value in model.state_dict().items()]
    assert [(key, value.shape) for key, value in again.state_dict().items()] == shapes
    assert again.laconic == model.laconic
    inputs = torch.rand(2, *SHAPES.get(name, (3, 32, 32)))
    outputs = model.eval()(inputs)
    assert outputs.shape == (2, 10) and bool(torch.isfinite(outputs).all())
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize(("depth", "count"), [(110, 1_727_962), (44, 658_586)])
def test_deeper_resnets_have_the_published_sizes(depth, count):
    with torch.device("meta"):
        model = models.resnet(depth)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(
    ("depth", "count", "convolutions"),
    [("small", 288_746, 6), (11, 9_228_362, 8), (13, 9_413_066, 10), (19, 20_035_018, 16)],
)
def test_vgg_depths(depth, count, convolutions):
    with torch.device("meta"):
        model = models.vgg(depth, classes=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(nn.Conv2d) == convolutions and kinds.count(nn.Linear) == 1
    assert {key.split(".")[0] for key in model.state_dict()} == {"features", "classifier"}


def test_lenet_5_follows_caffe():
    model = models.lenet_5()
    assert [type(module) for module in model] == [
        *(nn.Conv2d, nn.MaxPool2d) * 2,
        *(nn.Flatten, nn.Linear, nn.ReLU, nn.Linear),
    ]
    assert model.conv2.weight.shape == (50, 20, 5, 5) and model.fc1.weight.shape == (500, 800)


def test_the_shortcut_takes_every_second_pixel_between_zeros():
    image = torch.rand(2, 4, 6, 6)
    result = PadShortcut(2)(image)
    assert result.shape == (2, 8, 3, 3)
    assert torch.equal(result[:, 2:6], image[:, :, ::2, ::2])
    assert result[:, :2].abs().sum() == result[:, 6:].abs().sum() == 0


def test_weights_start_with_the_deviation_of_he():
    model = models.vgg("small")
    weight = model.features[17].weight
    assert weight.shape == (128, 128, 3, 3)
    expected = (2 / (128 * 9)) ** 0.5
    # The deviation of 147,456 normal draws is known to 0.2 %; 1 % is five times that.
    assert float(weight.detach().std()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.resnet(21), "depth 21 is not 6n"),
        (lambda: models.resnet(2), "depth 2 is not 6n"),
        (lambda: models.resnet(20, 0), "classes 0 must be at least 1"),
        (lambda: models.vgg(14), "depth 14 is unknown; choose one of"),
    ],
)
def test_models_refuse_impossible_sizes(make, message):
    with pytest.raises(ModelError, match=message):
        make()


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        ({"custom": "package:function"}, "'package:function', code that a file may not run"),
        ({"laconic": "resnet"}, r"has the keys \['laconic'\]"),
        ({}, r"has the keys \[\]"),
        ({"laconic": "resnet", "arguments": [20]}, "damaged or of another version"),
        ({"laconic": "resnet", "arguments": {}, "timm": "a"}, "is none; the file is damaged"),
        ({"laconic": "resnet21", "arguments": {}}, "'resnet21'; did you mean 'resnet"),
        ({"laconic": "load_model", "arguments": {}}, "no model is called 'load_model'"),
        ({"laconic": "build", "arguments": {"builder": {}}}, "no model is called 'build'"),
        ({"laconic": ["resnet"], "arguments": {}}, "no model is called"),
        ({"laconic": "os.system", "arguments": {}}, "no model is called 'os.system'"),
        ({"laconic": "resnet", "arguments": {"deep": 20}}, "'deep' is not an option; did you"),
        ({"laconic": "resnet", "arguments": {"depth": 1208}}, "depth 1208 is out of bounds"),
        ({"laconic": "resnet", "arguments": {"depth": -4}}, "depth -4 is out of bounds"),
        ({"laconic": "vgg", "arguments": {"classes": 10**9}}, "classes 1000000000 is out of"),
        ({"laconic": "resnet", "arguments": {"depth": 20.0}}, "depth '20.0' is a float; give int"),
        ({"laconic": "resnet", "arguments": {"depth": True}}, "depth 'True' is a bool"),
        ({"laconic": "resnet", "arguments": {"depth": "small"}}, "depth 'small' is a str"),
        ({"laconic": "resnet", "arguments": {"classes": None}}, "classes 'None' is a NoneType"),
        ({"laconic": "vgg", "arguments": {"depth": "x" * 10**6}}, "depth x* is out of bounds"),
    ],
)
def test_a_hostile_builder_is_refused(builder, message):
    with pytest.raises(ModelError, match=message) as caught:
        build(builder)
    assert len(str(caught.value)) < 400


def test_every_builder_argument_is_bounded():
    for name in models.BUILDERS:
        for key in inspect.signature(getattr(models, name)).parameters:
            with pytest.raises(ModelError, match="out of bounds"):
                build({"laconic": name, "arguments": {key: 10**12}})


def test_a_recipe_names_a_model(tmp_path):
    assert load_model("lenet_5", base=tmp_path).laconic["builder"]["laconic"] == "lenet_5"
    assert load_model({"digits_cnn": None}, base=tmp_path).conv1.out_channels == 16
    model = load_model({"resnet": {"depth": 8, "classes": 3}}, base=tmp_path)
    assert model.linear.out_features == 3


def test_weights_are_found_beside_the_recipe(tmp_path):
    source = models.digits_cnn()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = load_model({"digits_cnn": {"weights": "w.safetensors"}}, base=tmp_path)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def changed(state, key, value):
    return {name: value if name == key else tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {k: v for k, v in state.items() if k != "fc2.bias"}, "missing: fc2.bias"),
        (lambda state: state | {"extra": torch.zeros(1)}, "unexpected: extra"),
        (
            lambda state: changed(state, "fc2.bias", torch.zeros(9)),
            r"of another shape: fc2.bias \[9\], not \[10\]",
        ),
        (
            lambda state: changed(state, "fc2.bias", torch.full((10,), float("nan"))),
            "'fc2.bias' holds NaN",
        ),
        (lambda state: {"a": torch.zeros(1)}, "missing: .* and 17 more; unexpected: a"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
    save_file(change(models.digits_cnn().state_dict()), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=message):
        load_model({"digits_cnn": {"weights": "w.safetensors"}}, base=tmp_path)


def test_weights_that_cannot_be_read_are_refused(tmp_path):
    spec = {"digits_cnn": {"weights": "w.safetensors"}}
    with pytest.raises(ModelError, match=r"w\.safetensors: cannot be read"):
        load_model(spec, base=tmp_path)
    save_file(models.digits_cnn().state_dict(), tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    for wrong in (b"", content[:100], content[:-1]):
        (tmp_path / "w.safetensors").write_bytes(wrong)
        with pytest.raises(ModelError, match=r"w\.safetensors: cannot be read"):
            load_model(spec, base=tmp_path)


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(
        "from torch import nn\n"
        "from laconic.models import lenet_5\n"
        "def small(width=4):\n    return nn.Linear(width, 2)\n"
        "def ours():\n    return lenet_5()\n"
        "def nothing():\n    return None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("own_models", None)


def test_a_function_of_the_user_makes_the_model(package, tmp_path):
    model = load_model({"own_models:small": {"width": 7}}, base=tmp_path)
    assert model.in_features == 7
    assert model.laconic == {"builder": {"custom": "own_models:small"}}
    model = load_model("own_models:ours", base=tmp_path)
    with pytest.raises(ModelError, match="give it as model="):
        build(model.laconic["builder"])


def test_weights_may_be_those_of_a_compressed_network(package, tmp_path):
    model, path = models.digits_cnn(), tmp_path / "w.safetensors"
    run_step(Prune("channels", keep=0.5, scope="conv1"), State(model, digits()))
    lay(model, "fc2.weight", Ternary())
    save(model, path)
    found = load_model({"digits_cnn": {"weights": "w.safetensors"}}, base=tmp_path)
    assert same(found, load(path)) and found.conv1.out_channels == 8
    save(found, tmp_path / "again.safetensors")
    assert same(load(tmp_path / "again.safetensors"), found)
    line = {"laconic:load": {"path": "w.safetensors"}}
    assert same(load_model(line, base=tmp_path), found)
    assert anchored_model(line, tmp_path) == {"laconic:load": {"path": str(path)}}

    model = load_model({"own_models:small": {"width": 7}})
    lay(model, "weight", Ternary())
    save(model, path)
    with pytest.raises(ArtifactError, match=r"model: \{package.module:function: \{weights: "):
        load_model({"laconic:load": {"path": path.name}}, base=tmp_path)
    found = load_model({"own_models:small": {"width": 7, "weights": str(path)}})
    assert same(found, load(path, model=nn.Linear(7, 2)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lenet5", "no model is called 'lenet5'; did you mean 'lenet_5'"),
        ("a/model.safetensors", r'; a compressed network is {"laconic:load": {path: a/model'),
        ({"lenet_5": {}, "vgg": {}}, "one name with its options is needed"),
        ({}, "one name with its options is needed"),
        ({"resnet20": 3}, "resnet20: options must be a mapping, got 3"),
        ({"resnet20": {"weight": "x"}}, "'weight' is not an option; did you mean 'weights'"),
        ({"resnet20": {"weights": 3}}, "'weights' must be a path, got 3"),
        ("no_such_package:f", "'no_such_package' of .* cannot be imported"),
        (":f", "'' of ':f' cannot be imported"),
        ("own_models:large", "of 'own_models:large' has no 'large'; choose one of: lenet_5,"),
        ("own_models:smal", "has no 'smal'; did you mean 'small'"),
        ("own_models.small", "'own_models.small'; .* with a colon: 'own_models:small'"),
        ({"own_models:small": {"height": 1}}, "unexpected keyword argument 'height'"),
        ("own_models:nothing", "returned NoneType, not an nn.Module"),
    ],
)
def test_a_model_line_that_is_wrong_is_refused(package, spec, message):
    with pytest.raises(ModelError, match=message):
        load_model(spec, base=Path())


def test_built_leaves_the_module_alone():
    model = nn.Linear(2, 2)
    assert built(model, "lenet_5") is model
    assert list(model.state_dict()) == ["weight", "bias"]


def test_the_builder_is_what_is_noted_or_the_users_own():
    model = models.digits_cnn()
    assert builder_of(model) == {"laconic": "digits_cnn", "arguments": {}}
    builder_of(model)["laconic"] = "other"
    assert model.laconic["builder"]["laconic"] == "digits_cnn"
    assert custom(model) == {"custom": "torch.nn.modules.container:Sequential"}
    model = nn.Linear(2, 2)
    assert builder_of(model) == custom(model) == {"custom": "torch.nn.modules.linear:Linear"}
    lay(model, "weight", Ternary())
    assert builder_of(model) == {"custom": "torch.nn.modules.linear:Linear"}
