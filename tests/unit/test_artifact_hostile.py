"""Files that are damaged or were made to harm: always ArtifactError, at once, in little memory."""

from __future__ import annotations

import copy
import functools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from laconic.errors import ArtifactError
from laconic.models import digits_cnn
from laconic.models.load import BOUNDS
from laconic.ship import container, inspect, load, save, verify
from laconic.ship.manifest import WEIGHTS_PER_BYTE
from laconic.step import members
from laconic.structure.surgery import keep_, replace_, resize_, set_attributes_
from laconic.weights import (
    Affine,
    Binary,
    Float,
    Gobo,
    KMeans,
    Logarithmic,
    Product,
    Representation,
    Ternary,
    bake,
    lay,
)

# What a small file may make this process allocate on top of itself.
MOST_MEMORY = 64e6
MOST_SECONDS = 5.0

Manifest = dict[str, Any]
Tensors = dict[str, Tensor]


class Small(nn.Module):
    """A few weights of several kinds, two of them the same, and blocks that are edited."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 10), nn.Linear(10, 12)
        self.norm = nn.BatchNorm1d(12)
        self.table, self.decoder = nn.Embedding(9, 8), nn.Linear(8, 9)
        self.decoder.weight = self.table.weight
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.norm(self.second(self.first(inputs)))


def small() -> Small:
    model = Small()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.copy_(torch.rand(tensor.shape, generator=generator).mul(8).sub(3))
    keep_(model, "blocks", [0, 2])
    replace_(model, "blocks.1", nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU()))
    resize_(model, "blocks.0.weight", model.blocks[0].weight[:, :1])
    set_attributes_(model, "blocks.0", {"in_features": 1})
    lay(model, "first.weight", KMeans(3), mask=model.first.weight > 1.5)
    lay(model, "second.weight", Ternary("row"))
    lay(model, "first.bias", Affine(4))
    lay(model, "second.bias", Float(), mask=model.second.bias > 0)
    lay(model, "table.weight", Logarithmic(4))
    return model


@functools.cache
def small_file() -> bytes:
    """Return the bytes of an artefact of 3 kB."""
    path = Path(os.fspath(FOLDER[0])) / "small.safetensors"
    save(small(), path, recipe={"note": [1, 2.5, "ü", None, True]})
    return path.read_bytes()


FOLDER: list[Path] = []


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    FOLDER.append(tmp_path_factory.mktemp("hostile"))
    yield FOLDER[0]
    FOLDER.clear()
    small_file.cache_clear()
    sound.cache_clear()


@functools.cache
def empty() -> Small:
    with torch.device("meta"):
        return Small()


def written(data: bytes) -> Path:
    path = FOLDER[0] / "hostile.safetensors"
    path.write_bytes(data)
    return path


def opened() -> tuple[Manifest, Tensors]:
    manifest, tensors = container.read(written(small_file()))
    return copy.deepcopy(manifest), tensors


def forged(text: str, tensors: Tensors) -> Path:
    """Write a file around any text, its own header in order."""
    listing = {name: (container.NAMES[t.dtype], list(t.shape)) for name, t in tensors.items()}
    header = container._header(text, listing)
    body = b"".join(bytes(container.raw_bytes(tensors[n])) for n in container._order(listing))
    return written(len(header).to_bytes(8, "little") + header + body)


def signed(manifest: Manifest, tensors: Tensors) -> Path:
    """Write a file whose checksum is right, whatever it says."""
    body = {"checksum": container._checksum(manifest, tensors), "format": 1, "manifest": manifest}
    return forged(container._json(body), tensors)


def refuse(path: Path, words: str = ".") -> None:
    """Demand that every way to read a file refuses it."""
    for read in (load, load_small, verify, inspect, verify_small):
        with pytest.raises(ArtifactError, match=words) as caught:
            read(path)
        message = str(caught.value)
        assert str(path) in message
        assert len(message) < 1500


def load_small(path: Path) -> nn.Module:
    return load(path, model=copy.deepcopy(empty()))


def verify_small(path: Path) -> Any:
    return verify(path, logits=True, model=copy.deepcopy(empty()))


def survive(path: Path) -> None:
    """Read a file in every way: it is right, or ArtifactError."""
    for read in (load, load_small, verify, inspect, verify_small):
        try:
            read(path)
        except ArtifactError:
            continue


def peak_growth(work: Callable[[], object]) -> float:
    """Return by how many bytes memory rises while something runs."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        pytest.skip("this system does not tell the peak of a process's memory")
    before = _memory("VmRSS")
    work()
    return _memory("VmHWM") - before


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def test_the_small_file_is_small_and_sound():
    assert 2000 < len(small_file()) < 4000
    path = written(small_file())
    assert verify(path).tensors == 5
    loaded, saved = load_small(path), small()
    assert torch.equal(loaded.second.weight, saved.second.weight)
    with pytest.raises(ArtifactError, match=r"pass load\(path, model=\.\.\.\)"):
        load(path)


# Damage: no byte may be missing, added or changed.


def test_every_truncation_is_refused():
    data = small_file()
    path = written(data)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError):
            container.read(path)
    for length in (0, 1, 7, 8, 9, 8 + int.from_bytes(data[:8], "little"), len(data) - 1):
        refuse(written(data[:length]))


def test_every_changed_byte_is_refused():
    data, generator = small_file(), random.Random(0)
    path = written(data)
    for place in range(len(data)):
        damaged = bytearray(data)
        # Every second time one bit: the case of a letter, a space for a zero.
        one_bit = 1 << generator.randrange(8)
        damaged[place] ^= one_bit if place % 2 else generator.randrange(1, 256)
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError):
            container.read(path)


def test_every_bit_of_the_header_counts():
    data = small_file()
    path = written(data)
    for place in range(8, 8 + int.from_bytes(data[:8], "little")):
        damaged = bytearray(data)
        damaged[place] ^= 0x20
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError):
            container.read(path)


@settings(max_examples=300)
@given(st.data())
def test_cuts_insertions_and_exchanges_are_refused(data):
    whole = small_file()
    start = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.integers(0, 40))
    new = data.draw(st.binary(max_size=40))
    damaged = whole[:start] + new + whole[start + length :]
    if damaged != whole:
        with pytest.raises(ArtifactError):
            load_small(written(damaged))


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_noise_is_refused(data):
    with pytest.raises(ArtifactError):
        load(written(data))
    with pytest.raises(ArtifactError):
        load(written(len(data).to_bytes(8, "little") + data))


# The container.


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def with_header(header: bytes | str, body: bytes | None = None) -> Path:
    raw = header.encode() if isinstance(header, str) else header
    _, own = header_of(small_file())
    return written(len(raw).to_bytes(8, "little") + raw + (own if body is None else body))


def changed_header(edit: Callable[[dict[str, Any]], object]) -> Path:
    header, _ = header_of(small_file())
    edit(header)
    text = json.dumps(header, separators=(",", ":"))
    return with_header(text + " " * (-len(text) % 8))


@pytest.mark.parametrize("length", [0, 1, 7, 10**6, 2**31, 2**62, 2**63, 2**64 - 1])
def test_a_header_of_absurd_length(length):
    refuse(written(length.to_bytes(8, "little") + small_file()[8:]))


@pytest.mark.parametrize(
    "header",
    [
        *("", " ", "[]", "null", "1", '"a"', "{}", "{", "[" * 100_000, '{"a":' * 10_000),
        *(b"\xff\xfe{}", b"\x80", "{}".encode("utf-16"), '{"__metadata__":1}'),
        *('{"__metadata__":{}}', '{"__metadata__":{"laconic":1}}', '{"__metadata__":null}'),
        *('{"__metadata__":{"laconic":"{}"}}', '{"__metadata__":{"laconic":"[]"}}'),
        '{"__metadata__":{"laconic":"' + "[" * 50_000 + '"}}',
    ],
    ids=lambda header: repr(header)[:30],
)
def test_a_header_that_is_no_header(header):
    refuse(with_header(header))
    refuse(with_header(header, b""))


def first_tensor(header: dict[str, Any]) -> dict[str, Any]:
    return header["codes"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda h: first_tensor(h).update(dtype="F8_E4M3"),
        lambda h: first_tensor(h).update(dtype="U9"),
        lambda h: first_tensor(h).update(dtype=8),
        lambda h: first_tensor(h).update(dtype=["U8"]),
        lambda h: first_tensor(h).update(dtype="BOOL"),
        lambda h: first_tensor(h).update(shape=[-1]),
        lambda h: first_tensor(h).update(shape=[2**62, 4]),
        lambda h: first_tensor(h).update(shape=[0, 2**62, 4]),
        lambda h: first_tensor(h).update(shape=[True]),
        lambda h: first_tensor(h).update(shape=[1.0]),
        lambda h: first_tensor(h).update(shape="12"),
        lambda h: first_tensor(h).update(shape=[1] * 1000),
        lambda h: first_tensor(h).update(data_offsets=[0, 0]),
        lambda h: first_tensor(h).update(data_offsets=[-8, 8]),
        lambda h: first_tensor(h).update(data_offsets=[2**63, 2**64]),
        lambda h: first_tensor(h).update(data_offsets=None),
        lambda h: first_tensor(h).update(more=1),
        lambda h: first_tensor(h).pop("shape"),
        lambda h: h.update(codes=None),
        lambda h: h.update(codes=[]),
        lambda h: h.update({"codes\ud800": h.pop("codes")}),
        lambda h: h.update(more={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
        lambda h: h["__metadata__"].update(format="pt"),
        lambda h: h.pop("codes"),
    ],
)
def test_a_header_that_lies(edit):
    refuse(changed_header(edit))


def test_keys_that_come_twice():
    header, _ = header_of(small_file())
    text = json.dumps(header, separators=(",", ":"))
    codes = json.dumps(header["codes"], separators=(",", ":"))
    refuse(with_header(text[:-1] + f',"codes":{codes}}}'))
    inner = header["__metadata__"]["laconic"]
    _, tensors = opened()
    refuse(forged(inner[:-1] + ',"format":1}', tensors))
    refuse(forged('{"checksum":"",' + inner[1:], tensors))


def test_other_words_for_the_same():
    header, _ = header_of(small_file())
    _, tensors = opened()
    inner = header["__metadata__"]["laconic"]
    refuse(forged(inner.replace(",", ", ", 1), tensors), "not as laconic writes it")
    refuse(forged(inner.replace("2.5", "2.50"), tensors), "not as laconic writes it")
    refuse(forged(inner.replace("\\u00fc", "\\u00FC"), tensors), "not as laconic writes it")
    refuse(with_header(json.dumps(header)))


@pytest.mark.parametrize(
    "number", ["999", "0", "2", "true", "1.0", '"1"', "null", "[1]", "1" * 4000]
)
def test_another_format(number):
    header, _ = header_of(small_file())
    _, tensors = opened()
    inner = header["__metadata__"]["laconic"].replace('"format":1', f'"format":{number}')
    refuse(forged(inner, tensors), "is not readable by this laconic, which reads 1")


@pytest.mark.parametrize(
    "text", ["1e999", "-1e999", "NaN", "Infinity", "1" * 5000, "1e" + "9" * 99]
)
def test_numbers_that_are_none(text):
    header, _ = header_of(small_file())
    _, tensors = opened()
    refuse(forged(header["__metadata__"]["laconic"].replace("2.5", text), tensors))


@pytest.mark.parametrize("levels", [101, 400, 10_000, 200_000])
def test_a_manifest_that_nests_without_end(levels):
    header, _ = header_of(small_file())
    _, tensors = opened()
    inner = header["__metadata__"]["laconic"]
    for open_, close in ("[]", ('{"a":', "}")):
        nested = open_ * levels + "1" + close * levels
        refuse(forged(inner.replace("2.5", nested), tensors))


@pytest.mark.parametrize("missing", ["checksum", "format", "manifest"])
def test_a_body_without_a_part(missing):
    header, _ = header_of(small_file())
    _, tensors = opened()
    body = json.loads(header["__metadata__"]["laconic"])
    del body[missing]
    refuse(forged(container._json(body), tensors))


@pytest.mark.parametrize("checksum", ["", "0" * 64, None, 1, [], {"a": 1}])
def test_a_checksum_that_is_none(checksum):
    manifest, tensors = opened()
    body = {"checksum": checksum, "format": 1, "manifest": manifest}
    refuse(forged(container._json(body), tensors), "the checksum does not match")


def test_a_truth_value_that_is_neither():
    manifest, tensors = opened()
    path = signed(manifest, tensors | {"bool": torch.tensor([0, 2, 1], dtype=torch.uint8)})
    data = path.read_bytes().replace(b'"dtype":"U8","shape":[3]', b'"dtype":"BOOL","shape":[3]')
    with pytest.raises(ArtifactError):
        container.read(written(data))


def test_what_is_no_file_of_laconic(tmp_path):
    save_file({"codes": torch.zeros(3)}, tmp_path / "other")
    refuse(tmp_path / "other", "not written by laconic")
    container.write(tmp_path / "checkpoint", {"laid": {}}, {"a": torch.zeros(3)})
    refuse(tmp_path / "checkpoint", "a checkpoint is no artefact")
    (tmp_path / "empty").touch()
    refuse(tmp_path / "empty", "0 bytes")
    (tmp_path / "text").write_text("hello, world; this is no artefact\n" * 9)
    refuse(tmp_path / "text")


def test_what_is_no_file_at_all(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "loop", "folder", "pipe", "absent", "absent/a", "a" * 300):
        refuse(tmp_path / name)
    for path in ("", ".", "/dev/null", "/dev/zero", "a\0b"):
        with pytest.raises(ArtifactError):
            load(path)
    (tmp_path / "good").write_bytes(small_file())
    (tmp_path / "to-good").symlink_to(tmp_path / "good")
    assert verify(tmp_path / "to-good").tensors == 5


# The manifest, its checksum right.

DELETED = object()
ABSURD: list[Any] = [
    DELETED,
    *(None, True, False, -1, 0, 1, 2, 9, 255, 2**31, 2**40, 2**62, 2**64, 10**400, -(2**70)),
    *(
        0.0,
        1.0,
        1.5,
        1e300,
        "",
        "a",
        "1",
        "position",
        "../../etc/passwd",
        "__class__",
        "x" * 10_000,
    ),
    *("first.weight", "norm.weight", "norm.num_batches_tracked", "nowhere", "\x00", "ü\ud800"),
    *("float32", "int64", "codes", "rans", "huffman", "gaps-rans", "packed", "ternary", "kmeans"),
    *([], {}, [[]], [1], [2**40], [0, 2**60, 2**60], [1] * 70, {"a": 1}, {"": {}}, {"float": None}),
    *({"kmeans": {"bits": 9}}, {"symmetric": {"granularity": 2**70}}, [8, "packed", 5, 5]),
    *({"symmetric": 8}, {"affine": {"granularity": 7}}, {"kmeans": 8}, [1, "rans", 2**40, 3]),
]


def places(data: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value inside, the innermost too."""
    keys = data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for key in keys:
        yield (*place, key)
        yield from places(data[key], (*place, key))


def replaced(data: Any, place: tuple[Any, ...], value: Any) -> None:
    for key in place[:-1]:
        data = data[key]
    if value is DELETED:
        del data[place[-1]]
    else:
        data[place[-1]] = value


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


@functools.cache
def sound() -> dict[str, Tensor]:
    path = FOLDER[0] / "sound.safetensors"
    path.write_bytes(small_file())
    return load_small(path).state_dict()


def edited(edit: Callable[[Manifest], object]) -> Path:
    manifest, tensors = opened()
    edit(manifest)
    return signed(manifest, tensors)


def entry(manifest: Manifest, name: str = "second.weight") -> dict[str, Any]:
    return manifest["tensors"][name]


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


def probe(**fields: Any) -> dict[str, Any]:
    from laconic.ship.probe import conditions

    own = {"seed": 0, "shapes": [[2, 12]], "logits": "0" * 64}
    return own | conditions() | fields


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


# Streams of another shape than the weight's, and tables whose length codes decide.


def blocky(*, masked: bool) -> nn.Sequential:
    """Return two layers: blocks that share codewords, and a codebook with outliers."""
    model = nn.Sequential(nn.Linear(22, 6), nn.Linear(6, 4))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for name, representation in (
            ("0.weight", Product(2, block=8)),
            ("1.weight", Gobo(2, threshold=0.0)),
        ):
            mask = model.get_parameter(name) > 0.3 if masked else None
            lay(model, name, representation, mask=mask)
    return model


def blocky_file(edit: Callable[[Manifest], object], *, masked: bool = False) -> Path:
    path = FOLDER[0] / "blocky.safetensors"
    save(blocky(masked=masked), path)
    manifest, tensors = container.read(path)
    manifest = copy.deepcopy(manifest)
    edit(manifest["tensors"])
    return signed(manifest, tensors)


def load_blocky(path: Path) -> nn.Module:
    return load(path, model=nn.Sequential(nn.Linear(22, 6), nn.Linear(6, 4)))


def of_blocks(**fields: int) -> Callable[[Manifest], object]:
    written = {"product": {"bits": 2, **fields}}
    return lambda tensors: tensors["0.weight"].update(representation=written)


def of_stream(name: str, stream: str, place: int, value: int) -> Callable[[Manifest], object]:
    return lambda tensors: tensors[name]["streams"][stream].__setitem__(place, value)


BLOCKS: dict[str, tuple[Callable[[Manifest], object], str]] = {
    "fewer blocks": (of_stream("0.weight", "index", 2, 17), "cannot have 17 'index' symbols"),
    "more blocks": (of_stream("0.weight", "index", 2, 19), "cannot have 19 'index' symbols"),
    "an index for every weight": (of_stream("0.weight", "index", 2, 132), "cannot have 132"),
    "an index for more": (of_stream("0.weight", "index", 2, 133), "cannot have 133"),
    "blocks of another length": (of_blocks(block=4), "cannot have 18 'index' symbols"),
    "longer codewords": (of_blocks(block=9), "table 'codebook'"),
    "blocks without end": (of_blocks(block=2**40), "block"),
    "another shape": (
        lambda tensors: tensors["0.weight"].update(shape=[1, 144]),
        "in the file and",
    ),
    "more codewords": (
        lambda tensors: tensors["0.weight"].update(representation={"product": {"bits": 3}}),
        "table 'codebook'",
    ),
    "no block": (lambda tensors: tensors["0.weight"]["streams"].pop("index"), "."),
    "fewer outliers": (
        lambda tensors: tensors["1.weight"]["tables"].update(outliers=[0]),
        "promises numbers|table 'outliers'",
    ),
    "outliers in rows": (
        lambda tensors: tensors["1.weight"]["tables"].update(
            outliers=[1, *tensors["1.weight"]["tables"]["outliers"]]
        ),
        "table 'outliers'",
    ),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_that_lie(name, masked):
    edit, words = BLOCKS[name]
    path = blocky_file(edit, masked=masked)
    with pytest.raises(ArtifactError, match=words):
        load_blocky(path)
    with pytest.raises(ArtifactError):
        verify(path)
    survive(path)


@pytest.mark.parametrize("masked", [False, True])
def test_an_honest_file_of_blocks_is_read(masked):
    path = blocky_file(lambda tensors: None, masked=masked)
    loaded, saved = load_blocky(path), blocky(masked=masked)
    for place in range(2):
        assert torch.equal(loaded[place].weight, saved[place].weight)


@pytest.mark.parametrize("masked", [False, True])
def test_any_value_anywhere_in_a_manifest_of_blocks_is_survived(masked):
    manifest, _ = container.read(blocky_file(lambda tensors: None, masked=masked))
    generator = random.Random(4)
    for place in list(places(manifest["tensors"])) * 3:
        value = generator.choice(ABSURD)
        survive(blocky_file(lambda t, at=place, new=value: replaced(t, at, new), masked=masked))


def test_blocks_do_not_decode_to_more_than_was_promised():
    """A row of one weight would be padded to a block of 64: 2^20 rows, 256 MiB."""
    rows = 1 << 20
    model = nn.Linear(1, rows, bias=False)
    nn.init.constant_(model.weight, 0.5)
    lay(model, "weight", Product(1, block=64))
    path = FOLDER[0] / "rows.safetensors"
    save(model, path)
    plain = nn.Linear(1, rows, bias=False)
    assert peak_growth(lambda: load(path, model=plain)) < MOST_MEMORY


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


def refuse_decoding(path: Path, words: str) -> None:
    for read in (load_small, verify):
        with pytest.raises(ArtifactError, match=words):
            read(path)


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


# How much memory a file may ask for.


def plain_linear(rows: int, columns: int) -> nn.Module:
    return nn.Linear(columns, rows, bias=False, device="meta")


@pytest.mark.parametrize("name", members(Representation, every=True))
def test_tables_cannot_blow_up_a_weight(name, tmp_path):
    representation = members(Representation)[name]()
    model = nn.Linear(1000, 500, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.5)
    mask = torch.arange(500_000).reshape(500, 1000) < 400_000
    lay(model, "weight", representation, mask=mask)
    save(model, tmp_path / "a")
    manifest, tensors = container.read(tmp_path / "a")
    own = manifest["tensors"]["weight"]
    for table, shape in own["tables"].items():
        for wrong in (
            [shape[0] * 300],
            [shape[0], 300],
            [300, *shape],
            [1] if shape != [1] else [],
        ):
            if wrong == shape:
                continue  # 300 times nothing
            altered = copy.deepcopy(manifest)
            altered["tensors"]["weight"]["tables"][table] = wrong
            if own["streams"].keys() == {"position"} and wrong != [1]:
                continue  # then the file is as large as what it asks for
            others = sum(s[0] for key, s in own["tables"].items() if key != table)
            numbers = functools.reduce(lambda a, b: a * b, wrong, 1) + others
            path = signed(altered, tensors | {"float32": torch.ones(numbers)})
            check_blow_up(path)


def check_blow_up(path: Path) -> None:
    def work() -> None:
        with pytest.raises(ArtifactError, match=r"table|survivors"):
            load(path, model=plain_linear(500, 1000))

    assert peak_growth(work) < MOST_MEMORY


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_small_file_cannot_ask_for_much_memory(dtype):
    manifest, tensors = opened()
    for name in list(manifest["tensors"]):
        del manifest["tensors"][name]
    manifest["ties"] = {}
    manifest["dense"] = {}
    manifest["edits"] = {}
    stored = 3000
    count = (stored + 128) * WEIGHTS_PER_BYTE
    own = {
        "representation": "binary",
        "shape": [count],
        "dtype": dtype,
        "streams": {"code": [1, "huffman", count, 1]},
        "tables": {"scale": [1], "unused": [(stored - 1) // (4 if dtype == "float32" else 8) - 1]},
        "sha256": "0" * 64,
    }
    manifest["tensors"]["weight"] = own
    numbers = 1 + own["tables"]["unused"][0]
    tensors = {
        "codes": torch.tensor([2], dtype=torch.uint8),
        dtype: torch.ones(numbers, dtype=getattr(torch, dtype)),
    }
    stored = sum(tensor.nbytes for tensor in tensors.values())
    own["shape"] = [(stored + 128) * WEIGHTS_PER_BYTE]
    own["streams"]["code"][2] = own["shape"][0]
    path = signed(manifest, tensors)
    start = time.process_time()

    def work() -> None:
        with pytest.raises(ArtifactError, match="does not decode to the weight that was saved"):
            verify(path)

    assert peak_growth(work) < MOST_MEMORY
    assert time.process_time() - start < MOST_SECONDS
    own["shape"][0] += 1
    own["streams"]["code"][2] += 1
    refuse_decoding(signed(manifest, tensors), "bytes cannot hold")


def test_many_streams_are_counted_too():
    manifest, tensors = opened()
    count = 400_000
    own = entry(manifest)
    own["shape"] = [count]
    own["streams"] = {f"s{i}": [1, "huffman", count, 1] for i in range(99)}
    used = sum(
        stream[3]
        for name, other in manifest["tensors"].items()
        for stream in other["streams"].values()
        if name != "second.weight"
    )
    tensors["codes"] = torch.full((used + 99,), 2, dtype=torch.uint8)
    refuse_decoding(signed(manifest, tensors), "bytes cannot hold")


def test_a_probe_that_asks_for_much(tmp_path):
    class Passing(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs

    container.write(
        tmp_path / "a",
        {
            "builder": {"custom": "a:b"},
            "tensors": {},
            "dense": {},
            "probe": probe(shapes=[[2**40, 2**8]]),
        },
        {},
    )

    def work() -> None:
        with pytest.raises(ArtifactError, match="absurd"):
            verify(tmp_path / "a", logits=True, model=Passing())

    assert peak_growth(work) < MOST_MEMORY


@pytest.mark.parametrize("shapes", [[], [[3, 12], [3, 12]], [[3, 11]], [[0, 12]], [[]]])
def test_a_probe_that_does_not_fit_the_network(shapes):
    path = edited(lambda manifest: manifest.update(probe=probe(shapes=shapes)))
    with pytest.raises(ArtifactError, match=r"cannot run the probe|other logits"):
        verify_small(path)


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


def test_binary_is_what_it_seems():
    # The blow-up tests rely on streams of one byte.
    model = nn.Linear(1000, 1000, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    lay(model, "weight", Binary())
    path = FOLDER[0] / "binary"
    assert save(model, path) > 1000 * 1000 / WEIGHTS_PER_BYTE
