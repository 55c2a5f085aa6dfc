"""What a file may ask to be edited and built: nothing harmful, large or unknown."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers.hostile import (
    FOLDER,
    MOST_MEMORY,
    MOST_SECONDS,
    Manifest,
    Small,
    edited,
    entry,
    load_small,
    peak_growth,
    small,
    small_file,
    written,
)
from laconic.errors import ArtifactError
from laconic.models.load import BOUNDS
from laconic.ship import load, save
from laconic.structure.surgery import keep_
from laconic.weights import bake

pytestmark = pytest.mark.usefixtures("folder")


# Edits of a network.


def linear(inputs: Any, outputs: Any, **more: Any) -> dict[str, Any]:
    return {"Linear": {"in_features": inputs, "out_features": outputs, **more}}


def nested(levels: int) -> dict[str, Any]:
    spec: dict[str, Any] = {"ReLU": {}}
    for _ in range(levels):
        spec = {"Sequential": {"children": [spec]}}
    return spec


def edits_with(**parts: Any) -> Callable[[Manifest], object]:
    return lambda manifest: manifest["edits"].update(parts)


FIRST = 1 << 24
LIES: dict[str, tuple[Callable[[Manifest], object], str]] = {
    "no edits": (lambda m: m.pop("edits"), "is not in the|in the file and"),
    "none": (lambda m: m.update(edits=None), "is not in the|in the file and"),
    "a list": (lambda m: m.update(edits=[]), "edits"),
    "an unknown part": (edits_with(code={}), "edits.code"),
    "a list that is none": (edits_with(lists={"first": [0]}), "only children of a ModuleList"),
    "a list nowhere": (edits_with(lists={"nowhere": [0]}), "no module 'nowhere'"),
    "a list below what is gone": (
        edits_with(lists={"blocks": [0, 2], "blocks.2": [0]}),
        "no module 'blocks.2'",
    ),
    "a path through Python": (edits_with(lists={"__class__": [0]}), "no module '__class__'"),
    "a path through a property": (edits_with(lists={"_modules": [0]}), "no module '_modules'"),
    "nothing kept": (edits_with(lists={"blocks": []}), "edits.lists.blocks"),
    "too much kept": (edits_with(lists={"blocks": [0, 3]}), "cannot be kept"),
    "one kept twice": (edits_with(lists={"blocks": [0, 0]}), "cannot be kept"),
    "kept without end": (edits_with(lists={"blocks": list(range(5000))}), "edits.lists.blocks"),
    "a place that is huge": (edits_with(lists={"blocks": [2**70]}), "edits.lists.blocks"),
    "a place that is true": (edits_with(lists={"blocks": [False, True]}), "edits.lists.blocks"),
    "a place that is negative": (edits_with(lists={"blocks": [-1]}), "edits.lists.blocks"),
    "the root replaced": (edits_with(modules={"": {"ReLU": {}}}), "is the root or within"),
    "a layer nowhere": (edits_with(modules={"a.b": {"ReLU": {}}}), "no module 'a.b'"),
    "a layer in a layer": (
        edits_with(modules={"blocks": {"ModuleList": {"children": []}}, "blocks.1": {"ReLU": {}}}),
        "is the root or within",
    ),
    "a layer that is none": (edits_with(modules={"first": {"os.system": {}}}), "no layer is"),
    "a layer of torch": (edits_with(modules={"first": {"LSTM": {}}}), "no layer is called 'LSTM'"),
    "a layer of Python": (edits_with(modules={"first": {"__init__": {}}}), "no layer is called"),
    "two layers": (edits_with(modules={"first": {"ReLU": {}, "GELU": {}}}), "describes no layer"),
    "no layer": (edits_with(modules={"first": {}}), "describes no layer"),
    "a layer that is a text": (edits_with(modules={"first": "ReLU"}), "edits.modules.first"),
    "a huge layer": (edits_with(modules={"first": linear(12, FIRST)}), "in the model"),
    "a larger layer": (edits_with(modules={"first": linear(12, 1 << 60)}), "out of bounds"),
    "a layer on a device": (edits_with(modules={"first": linear(12, 10, device="cuda")}), "device"),
    "layers without end": (edits_with(modules={"first": nested(15)}), "nests containers deeper"),
    "many layers": (
        edits_with(modules={"first": {"Sequential": {"children": [linear(2, 2)] * 3000}}}),
        "3000 children",
    ),
    "more layers than any network has": (
        edits_with(modules={f"first{i}": linear(2, 2) for i in range(30_000)}),
        "edits.modules",
    ),
    "a long text": (edits_with(modules={"first": {"x" * (1 << 22): {}}}), "edits are longer than"),
    "an attribute of a module": (
        edits_with(attributes={"first": {"training": 1}}),
        "no attribute 'training'",
    ),
    "a method": (edits_with(attributes={"first": {"forward": 1}}), "no attribute 'forward'"),
    "a tensor": (edits_with(attributes={"first": {"weight": 1}}), "no attribute 'weight'"),
    "a class": (edits_with(attributes={"first": {"__class__": 1}}), "no attribute '__class__'"),
    "an attribute of another": (
        edits_with(attributes={"first": {"num_features": 1}}),
        "no attribute 'num_features'",
    ),
    "an attribute nowhere": (edits_with(attributes={"x": {"in_features": 1}}), "no module 'x'"),
    "an attribute of zero": (edits_with(attributes={"first": {"in_features": 0}}), "in_features"),
    "a huge attribute": (edits_with(attributes={"first": {"in_features": 2**40}}), "in_features"),
    "a true attribute": (edits_with(attributes={"first": {"in_features": True}}), "in_features"),
    "an attribute of text": (edits_with(attributes={"first": {"in_features": "1"}}), "in_feature"),
    "a float attribute": (edits_with(attributes={"first": {"in_features": 1.0}}), "in_features"),
    "a listed attribute": (
        edits_with(attributes={"first": {"in_features": [12]}}),
        r"cannot become \[12\]",
    ),
    "a nested attribute": (edits_with(attributes={"first": {"in_features": [[1]]}}), "in_feature"),
    "a shape of nothing": (edits_with(shapes=["nowhere"]), "'nowhere' is resized, but there is no"),
    "a shape of a module": (edits_with(shapes=["first"]), "'first' is resized, but there is no"),
    "a shape of no text": (edits_with(shapes=[3]), "edits.shapes"),
    "a shape in a mapping": (edits_with(shapes={"first.weight": [1]}), "edits.shapes"),
    "one shape less": (edits_with(shapes=[]), "in the file and"),
    "more dimensions": (
        lambda m: m["dense"]["float32"].update({"blocks.0.weight": [2, 1, 1]}),
        r"'blocks.0.weight' \[2, 2\] cannot be resized to \[2, 1, 1\]",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_edits_that_lie(name):
    edit, words = LIES[name]
    path = edited(edit)
    start = time.process_time()

    def work() -> None:
        with pytest.raises(ArtifactError, match=words) as caught:
            load_small(path)
        assert str(path) in str(caught.value) and len(str(caught.value)) < 1500

    assert peak_growth(work) < MOST_MEMORY
    assert time.process_time() - start < MOST_SECONDS


def test_a_network_of_the_user_is_untouched_by_edits_that_lie():
    model = Small()
    before = copy.deepcopy(model)
    for name in ("an attribute of a module", "a huge layer", "one shape less", "too much kept"):
        with pytest.raises(ArtifactError):
            load(edited(LIES[name][0]), model=model)
        assert repr(model) == repr(before)
        assert all(map(torch.equal, model.state_dict().values(), before.state_dict().values()))


def test_a_network_that_is_edited_alike_is_filled():
    saved = small()
    model = load(written(small_file()), model=small_edited())
    assert torch.equal(model.blocks[0].weight, saved.blocks[0].weight)
    keep_(model, "blocks", [0])  # the file has more
    with pytest.raises(ArtifactError, match="edited otherwise already"):
        load(written(small_file()), model=model)
    save(Small(), FOLDER[0] / "plain")
    with pytest.raises(ArtifactError, match="edited otherwise already"):
        load(FOLDER[0] / "plain", model=model)


def small_edited() -> Small:
    model = small()
    bake(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    return model


# What a file may ask to be built.

BUILDERS: list[Any] = [
    *({}, {"laconic": "resnet"}, {"arguments": {}}, {"custom": None}, {"custom": "os:system"}),
    *({"custom": ["a"] * 99}, {"custom": "x" * 100_000}, {"torch": "nn.Linear", "arguments": {}}),
    *(
        {"laconic": name, "arguments": {}}
        for name in (
            *("os:system", "os.system", "torch.nn.Linear", "__class__", "__import__", "build"),
            *("load_model", "built", "BUILDERS", "attach", "vision", "", None, 1, ["resnet"]),
            *({"resnet": 1}, "resnet\0", "x" * 100_000, "\ud800"),
        )
    ),
    *(
        {"laconic": "resnet", "arguments": arguments}
        for arguments in (
            *(None, 1, [], "depth", {"depth": 10**9}, {"classes": 10**12}, {"depth": -8}),
            *({"depth": True}, {"depth": 8.0}, {"depth": "8"}, {"depth": [8]}, {"depth": None}),
            *({"depth": 9}, {"classes": 0}, {"self": 1}, {"__init__": 1}, {"": 1}, {"dep": 8}),
            *({"depth": 10**400}, {"depth": 8, "weights": "/etc/passwd"}, {"depth": {"a": 1}}),
        )
    ),
    *({"laconic": "vgg", "arguments": {"depth": depth}} for depth in (12, "large", "x" * 9999, "")),
    {"laconic": "lenet_5", "arguments": {"classes": 10}},
    {"laconic": "resnet", "arguments": {}, "more": 1},
]


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: repr(builder)[:60])
def test_a_builder_that_is_none(builder):
    path = edited(lambda manifest: manifest.update(builder=builder))
    with pytest.raises(ArtifactError) as caught:
        load(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "builder",
    [
        {"laconic": "resnet", "arguments": {"depth": BOUNDS["depth"][1]}},
        {"laconic": "vgg", "arguments": {"depth": 19, "classes": BOUNDS["classes"][1]}},
    ],
    ids=str,
)
def test_the_largest_network_to_be_asked_for_takes_neither_time_nor_memory(builder):
    path = edited(lambda manifest: manifest.update(builder=builder, edits={}))
    start = time.process_time()

    def work() -> None:
        with pytest.raises(ArtifactError, match="is not in the"):
            load(path)

    assert peak_growth(work) < MOST_MEMORY
    assert time.process_time() - start < MOST_SECONDS


def test_nothing_of_this_can_be_imported():
    before = set(sys.modules)
    for name in ("antigravity", "this", "os:system", "tests.conftest"):
        for builder in ({"custom": name}, {"laconic": name, "arguments": {}}):
            with pytest.raises(ArtifactError):
                load(edited(lambda manifest, b=builder: manifest.update(builder=b)))
        path = edited(lambda manifest, n=name: entry(manifest).update(representation=n))
        with pytest.raises(ArtifactError):
            load_small(path)
    assert not {"antigravity", "this"} & (set(sys.modules) - before)
