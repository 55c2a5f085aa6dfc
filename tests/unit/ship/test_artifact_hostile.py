"""Files that are damaged or whose header was forged: always ArtifactError, at once."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from helpers.hostile import (
    forged,
    load_small,
    opened,
    refuse,
    signed,
    small,
    small_file,
    written,
)
from laconic.errors import ArtifactError
from laconic.ship import container, load, verify

pytestmark = pytest.mark.usefixtures("folder")


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
