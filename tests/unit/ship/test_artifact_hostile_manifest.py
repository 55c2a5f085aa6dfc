"""Manifests, codes and tables that lie, their checksum right: always ArtifactError."""

from __future__ import annotations

import copy
import functools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.hostile import (
    ABSURD,
    Manifest,
    edited,
    empty,
    entry,
    load_small,
    opened,
    places,
    probe,
    refuse_decoding,
    replaced,
    signed,
    sound,
    survive,
)
from laconic.errors import ArtifactError
from laconic.models import digits_cnn
from laconic.ship import container, load, save, verify

pytestmark = pytest.mark.usefixtures("folder")


def test_any_value_anywhere_in_the_manifest_is_survived():
    manifest, tensors = opened()
    generator = random.Random(1)
    every = list(places(manifest))
    start = time.process_time()
    for place in every * 2:
        altered = copy.deepcopy(manifest)
        replaced(altered, place, generator.choice(ABSURD))
        survive(signed(altered, tensors))
    assert time.process_time() - start < 60


def test_any_bytes_of_codes_and_tables_are_survived():
    manifest, tensors = opened()
    generator = random.Random(2)
    found = 0
    for _ in range(400):
        name = generator.choice(["codes", "codes", "float32"])
        data = bytearray(container.raw_bytes(tensors[name]))
        for _ in range(generator.choice([1, 1, 2, 10])):
            data[generator.randrange(len(data))] = generator.choice([0, 1, 127, 128, 255])
        now = torch.frombuffer(data, dtype=tensors[name].dtype)
        path = signed(manifest, tensors | {name: now})
        survive(path)
        if name == "codes" and not torch.equal(now, tensors[name]):
            found += 1
            check_weights(path)
    assert found > 200


def check_weights(path: Path) -> None:
    """Demand that verify passes nothing but the weights that were saved."""
    try:
        verify(path)
    except ArtifactError:
        return
    loaded = load_small(path).state_dict()  # bits that fill up a byte say nothing
    assert all(torch.equal(loaded[name], tensor) for name, tensor in sound().items())


EDITS: dict[str, tuple[Callable[[Manifest], object], str]] = {
    "no builder": (lambda m: m.pop("builder"), "no network"),
    "no tensors": (lambda m: m.pop("tensors"), "tensors"),
    "an unknown field": (lambda m: m.update(code="import os"), "code"),
    "an unknown field inside": (lambda m: entry(m).update(code=1), "code"),
    "a shape of truth values": (lambda m: entry(m).update(shape=[True, 10]), "shape"),
    "a shape of floats": (lambda m: entry(m).update(shape=[12.0, 10]), "shape"),
    "a shape of texts": (lambda m: entry(m).update(shape=["12", "10"]), "shape"),
    "a negative shape": (lambda m: entry(m).update(shape=[-12, -10]), "shape"),
    "an endless shape": (lambda m: entry(m).update(shape=[2**40, 2**8]), "cannot"),
    "a huge shape": (lambda m: entry(m).update(shape=[2**70]), "shape"),
    "more dimensions": (lambda m: entry(m).update(shape=[1] * 99), "shape"),
    "no bits": (lambda m: set_stream(m, 0, 0), "streams"),
    "nine bits": (lambda m: set_stream(m, 0, 9), "streams"),
    "fewer bits": (lambda m: set_stream(m, 0, 1), "damaged"),
    "true bits": (lambda m: set_stream(m, 0, True), "streams"),
    "a coder that is none": (lambda m: set_stream(m, 1, "zip"), "'zip' is no coder"),
    "a coder of another": (lambda m: set_stream(m, 1, "gaps-rans"), "gaps code one bit"),
    "more symbols": (lambda m: set_stream(m, 2, 121), "cannot have 121"),
    "fewer symbols": (lambda m: set_stream(m, 2, 119), "cannot have 119"),
    "endless symbols": (lambda m: set_stream(m, 2, 2**40), "cannot have"),
    "more bytes": (lambda m: set_stream(m, 3, 999), "promises numbers"),
    "endless bytes": (lambda m: set_stream(m, 3, 2**40), "promises numbers"),
    "negative bytes": (lambda m: set_stream(m, 3, -1), "streams"),
    "a stream of another name": (lambda m: rename(m, "code", "index"), "code"),
    "an unknown representation": (lambda m: entry(m).update(representation="os:system"), "no repr"),
    "a class": (lambda m: entry(m).update(representation="torch.nn.Linear"), "no representation"),
    "a step": (lambda m: entry(m).update(representation="prune"), "no representation"),
    "a name of Python": (lambda m: entry(m).update(representation="__class__"), "no represent"),
    "no representation": (lambda m: entry(m).update(representation=None), "a representation is"),
    "two representations": (
        lambda m: entry(m).update(representation={"ternary": {}, "binary": {}}),
        "a representation is",
    ),
    "a field that is none": (
        lambda m: entry(m).update(representation={"ternary": {"granularity": -1}}),
        "granularity",
    ),
    "an unknown field of it": (
        lambda m: entry(m).update(representation={"ternary": {"__init__": 1}}),
        "not a field",
    ),
    "groups that do not divide": (
        lambda m: entry(m).update(representation={"ternary": {"granularity": 7}}),
        "do not divide",
    ),
    "endless groups": (
        lambda m: entry(m).update(representation={"ternary": {"granularity": 2**70}}),
        "do not divide",
    ),
    "another table": (lambda m: entry(m).update(representation="ternary"), "table 'scale'"),
    "a smaller codebook": (
        lambda m: entry(m, "first.weight").update(representation={"kmeans": {"bits": 2}}),
        "table 'codebook'",
    ),
    "a table of another shape": (
        lambda m: entry(m).update(tables={"scale": [1, 12]}),
        "table 'scale'",
    ),
    "a table of another name": (lambda m: entry(m).update(tables={"step": [12]}), "table 'scale'"),
    "another dtype": (lambda m: entry(m).update(dtype="float64"), "promises numbers"),
    "an integer dtype": (lambda m: entry(m).update(dtype="int64"), "dtype"),
    "no hash": (lambda m: entry(m).update(sha256=""), "sha256"),
    "a tie to nowhere": (lambda m: m["ties"].update({"decoder.weight": "no"}), "not stored"),
    "a tie of a number to nowhere": (
        lambda m: move_to_ties(m, "norm.num_batches_tracked", "nowhere"),
        "not stored",
    ),
    "a tie to itself": (lambda m: m["ties"].update({"decoder.weight": "decoder.weight"}), "stored"),
    "ties in a circle": (
        lambda m: m.update(ties={"decoder.weight": "a", "a": "decoder.weight"}),
        "not stored",
    ),
    "a tie of what is stored": (
        lambda m: m["ties"].update({"norm.weight": "norm.bias"}),
        "is there 2 times",
    ),
    "a name that comes twice": (
        lambda m: m["dense"]["int64"].update({"norm.weight": []}),
        "is there 2 times",
    ),
    "a dtype that is none": (lambda m: m["dense"].update(pickle={}), "'pickle' is no dtype"),
    "codes as a dtype": (lambda m: m["dense"].update(codes={"a": [3]}), "'codes' is no dtype"),
    "a name without end": (lambda m: m["dense"]["float32"].update({"a" * 9999: [0]}), "dense"),
    "a surrogate": (lambda m: m["dense"]["float32"].update({"\ud800": [0]}), "dense"),
    "a negative dense shape": (lambda m: m["dense"]["float32"].update(x=[-1, -4]), "dense"),
    "an endless dense shape": (
        lambda m: m["dense"]["float32"].update(x=[2**48] * 9),
        "promises numbers",
    ),
    "a seed without end": (lambda m: m.update(probe=probe(seed=2**64)), "seed"),
    "a negative seed": (lambda m: m.update(probe=probe(seed=-1)), "seed"),
    "a probe without logits": (lambda m: m.update(probe=probe(logits="")), "logits"),
    "versions that are none": (lambda m: m.update(versions={"laconic": 1}), "versions"),
}


def set_stream(manifest: Manifest, place: int, value: Any) -> None:
    entry(manifest)["streams"]["code"][place] = value


def rename(manifest: Manifest, old: str, new: str) -> None:
    streams = entry(manifest)["streams"]
    streams[new] = streams.pop(old)


def move_to_ties(manifest: Manifest, name: str, first: str) -> None:
    del manifest["dense"]["int64"][name]
    manifest["ties"][name] = first


@pytest.mark.parametrize("name", EDITS)
def test_a_manifest_that_lies(name):
    edit, words = EDITS[name]
    path = edited(edit)
    with pytest.raises(ArtifactError, match=words):
        load_small(path)
    with pytest.raises(ArtifactError):
        load(path)
    with pytest.raises(ArtifactError):
        verify(path, model=copy.deepcopy(empty()))
    survive(path)


def test_survivors_and_positions_must_agree():
    for name in ("first.weight", "second.bias"):
        manifest, tensors = opened()
        own = entry(manifest, name)
        count = own["streams"]["position"][2]
        survivors = own["streams"].get("index", [0, 0, own["tables"].get("values", [0])[0]])[2]
        assert 1 < survivors < count
        for wrong in (survivors - 1, survivors + 1, 1, 0):
            altered = copy.deepcopy(manifest)
            if name == "first.weight":
                entry(altered, name)["streams"]["index"][2] = wrong
                words = "survivors|damaged|do not fill"
            else:
                entry(altered, name)["tables"]["values"] = [wrong]
                words = "survivors"
                blob = tensors["float32"]
                start = 8  # the codebook of first.weight; the two ends of first.bias
                start = sum_of_tables_before(manifest, name)
                new = torch.cat([blob[:start], torch.ones(wrong), blob[start + survivors :]])
                refuse_decoding(signed(altered, tensors | {"float32": new}), words)
                continue
            refuse_decoding(signed(altered, tensors), words)


def sum_of_tables_before(manifest: Manifest, name: str) -> int:
    total = 0
    for other in sorted(manifest["tensors"]):
        if other == name:
            return total
        for shape in manifest["tensors"][other]["tables"].values():
            total += functools.reduce(lambda a, b: a * b, shape, 1)
    raise KeyError(name)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf, 1e38])
@pytest.mark.parametrize("name", ["first.weight", "second.weight", "first.bias", "table.weight"])
def test_tables_that_are_no_numbers(name, number):
    manifest, tensors = opened()
    tensors["float32"] = tensors["float32"].clone()
    start = sum_of_tables_before(manifest, name)
    size = sum(shape[0] for shape in entry(manifest, name)["tables"].values())
    tensors["float32"][start : start + size] = number
    if name == "first.bias" and number == 1e38:
        tensors["float32"][start + 1] = -3e38  # both ends are numbers, their difference is none
    if number == 1e38 and name != "first.bias":
        load_small(signed(manifest, tensors))
        return
    refuse_decoding(signed(manifest, tensors), "NaN or infinity")


def test_a_parameter_that_is_no_float(tmp_path):
    path = edited(lambda m: m["dense"]["int64"].update({"x": []}) or swap_dtype(m))
    with pytest.raises(ArtifactError):
        load_small(path)
    save(digits_cnn(), tmp_path / "a")
    manifest, tensors = container.read(tmp_path / "a")
    shape = manifest["dense"]["float32"].pop("fc2.bias")
    manifest["dense"]["int64"]["fc2.bias"] = shape
    start = sum_of_dense_before(manifest, "fc2.bias")
    tensors["float32"] = torch.cat([tensors["float32"][:start], tensors["float32"][start + 10 :]])
    tensors["int64"] = torch.cat([tensors["int64"], torch.ones(10, dtype=torch.int64)])
    with pytest.raises(ArtifactError, match=r"'fc2.bias' is torch.int64 in the file"):
        load(signed(manifest, tensors))


def swap_dtype(manifest: Manifest) -> None:
    manifest["dense"]["int64"].pop("x")
    manifest["dense"]["int32"] = manifest["dense"].pop("int64")


def sum_of_dense_before(manifest: Manifest, name: str) -> int:
    shapes = manifest["dense"]["float32"]
    before = [shapes[other] for other in sorted(shapes) if other < name]
    return sum(functools.reduce(lambda a, b: a * b, shape, 1) for shape in before)
