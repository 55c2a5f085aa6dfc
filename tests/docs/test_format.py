"""A second reader of the file format, written from docs/format.md alone."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import laconic
from laconic.ship import coding
from laconic.weights import (
    Affine,
    Binary,
    FixedPoint,
    Float,
    Gobo,
    Groups,
    KMeans,
    LearnedStep,
    Logarithmic,
    LossAware,
    Product,
    Symmetric,
    Ternary,
)

NUMPY = {"float32": "<f4", "uint8": "u1", "int64": "<i8"}
SAFETENSORS = {"F32": "float32", "U8": "uint8", "I64": "int64"}
TOTAL = 1 << 24


def number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def packed(data: bytes, bits: int, count: int) -> list[int]:
    whole = number(data)
    return [whole >> i * bits & (1 << bits) - 1 for i in range(count)]


def stream(data: bytes, coder: str, bits: int, count: int) -> list[int]:
    if not count:
        assert not data
        return []
    if coder == "packed":
        return packed(data, bits, count)
    if coder.startswith("gaps-"):
        k, gaps = data[0], number(data[1:9])
        return marks(stream(data[9:], coder.removeprefix("gaps-"), k, gaps), k, count)
    size = (2**bits + 7) // 8
    values = [i for i, bit in enumerate(packed(data[:size], 1, 2**bits)) if bit]
    if len(values) == 1:
        assert len(data) == size
        return values * count
    group = data[size]
    read = {"huffman": huffman, "rans": rans}[coder]
    blocks = read(data[size + 1 :], len(values), group, math.ceil(count / group))
    symbols = [values[b // len(values) ** p % len(values)] for b in blocks for p in range(group)]
    return symbols[:count]


def marks(gaps: list[int], k: int, count: int) -> list[int]:
    found, place = [0] * count, -1
    for gap in gaps:
        place += gap or 2**k - 1
        if gap:
            found[place] = 1
    return found


def huffman(data: bytes, values: int, group: int, count: int) -> list[int]:
    n = values**group
    table = math.ceil(n * 4 / 8)
    lengths = packed(data[:table], 4, n)
    lanes = number(data[table : table + 4])
    sizes = packed(data[table + 4 : table + 4 + 2 * lanes], 16, lanes)
    bits = "".join(f"{byte:08b}" for byte in data[table + 4 + 2 * lanes :])
    codes: dict[str, int] = {}
    code, length = -1, 0
    for own, block in sorted((own, block) for block, own in enumerate(lengths) if own):
        code, length = (code + 1) << own - length, own
        codes[f"{code:0{own}b}"] = block
    blocks = [0] * count
    start = 0
    for lane, size in enumerate(sizes):
        decoded = list(letters(bits[start : start + size], codes))
        blocks[lane::lanes] = decoded
        start += size
    return blocks


def letters(bits: str, codes: dict[str, int]) -> Iterator[int]:
    word = ""
    for bit in bits:
        word += bit
        if word in codes:
            yield codes[word]
            word = ""
    assert not word


def share(total: int, weights: list[int]) -> list[int]:
    parts = [weight * total // sum(weights) for weight in weights]
    parts[weights.index(max(weights))] += total - sum(parts)
    return parts


def weight(code: int, m: int) -> int:
    return code if code < 2**m else (2**m + code % 2**m) * 2 ** (code // 2**m - 1)


def frequencies(codes: list[int], kind: int, group: int, n: int) -> list[int]:
    weights = [weight(code, (11, 3)[kind]) for code in codes]
    if kind == 0:
        each = share(TOTAL, weights)
        weights = each
        for _ in range(group - 1):
            weights = [a * b // TOTAL for a in weights for b in each]
    return [part + 1 for part in share(TOTAL - n, weights)]


def rans(data: bytes, values: int, group: int, count: int) -> list[int]:
    n, kind = values**group, data[0]
    end = 1 + (2 * values, n)[kind]
    chances = frequencies(packed(data[1:end], (16, 8)[kind], (values, n)[kind]), kind, group, n)
    starts = [sum(chances[:block]) for block in range(n)]
    body = data[end:] + bytes(-len(data[end:]) % 4)
    words = packed(body, 32, len(body) // 4)
    state, blocks = 0, []
    while state < 2**32 and words:
        state = state * 2**32 + words.pop()
    for _ in range(count):
        q = state % TOTAL
        block = next(b for b in reversed(range(n)) if starts[b] <= q)
        state = chances[block] * (state // TOTAL) + q - starts[block]
        while state < 2**32 and words:
            state = state * 2**32 + words.pop()
        blocks.append(block)
    assert state == 0
    assert not words
    return blocks


def drawn(kind: str, bits: int) -> np.ndarray:
    generator = np.random.default_rng(bits)
    top = 2**bits - 1
    shapes = {
        "even": generator.integers(0, top + 1, 700),
        "skewed": np.minimum(generator.geometric(0.6, 701) - 1, top),
        "rare": (generator.random(900) < 0.02) * top,
        "single": np.full(40, top),
        "none": np.zeros(0),
    }
    return shapes[kind].astype(np.uint8)


@pytest.mark.parametrize("kind", ["even", "skewed", "rare", "single", "none"])
@pytest.mark.parametrize(
    ("coder", "bits"),
    [
        (coder, bits)
        for coder in coding.CODERS
        for bits in ([1] if coder.startswith("gaps-") else [1, 2, 3, 5, 8])
    ],
)
def test_every_coder_is_as_the_page_says(coder, bits, kind):
    symbols = drawn(kind, bits)
    coded = coding.encode(symbols, bits, coders=[coder])
    assert stream(coded.data.tobytes(), coded.coder, bits, len(symbols)) == symbols.tolist()


def safetensors(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    content = path.read_bytes()
    start = 8 + number(content[:8])
    header = json.loads(content[8:start])
    body = json.loads(header.pop("__metadata__")["laconic"])
    tensors = {}
    for name, entry in header.items():
        first, last = (start + offset for offset in entry["data_offsets"])
        dtype = SAFETENSORS[entry["dtype"]]
        tensors[name] = np.frombuffer(content[first:last], NUMPY[dtype])
    return body, tensors


def compact(data: object) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()


def checksum(manifest: dict, tensors: dict[str, np.ndarray]) -> str:
    total = hashlib.sha256(compact(manifest))
    names = {dtype: name for name, dtype in NUMPY.items()}
    for name in sorted(tensors):
        dtype = names[tensors[name].dtype.str.replace("|", "")]
        total.update(compact([name, f"torch.{dtype}", list(tensors[name].shape)]))
        total.update(tensors[name].tobytes())
    return total.hexdigest()


def decoded(written: object, streams: dict, tables: dict, shape: list[int]) -> np.ndarray:
    name, fields = (written, {}) if isinstance(written, str) else next(iter(written.items()))
    streams = dict(streams)
    position = streams.pop("position", None)
    if name == "product":
        return product(fields, streams, tables, shape, position)
    mask = np.ones(math.prod(shape), bool) if position is None else np.array(position, bool)
    dense = np.zeros((max(1, len(streams)), mask.size), np.int64)
    for row, symbols in enumerate(streams.values()):
        dense[row, mask] = symbols
    code = dense[0]
    if name == "loss_aware":
        name = "binary" if fields.get("bits", 2) == 1 else "symmetric"
        fields = {"bits": 2, **fields}
    if name == "learned_step":
        name, fields = "symmetric", {"bits": 4, "levels": "full", **fields}
    granularity = fields.get("granularity", "tensor")
    if isinstance(granularity, dict):
        groups = granularity["groups"]
    else:
        groups = {"tensor": 1, "row": shape[0]}.get(granularity) or mask.size // granularity
    own = {key: np.repeat(table, mask.size // groups) for key, table in tables.items()
           if table.size == groups}  # fmt: skip
    if name == "float":
        result = np.zeros(mask.size, np.float32)
        result[mask] = tables["values"]
    elif name == "symmetric":
        bits = fields.get("bits", 8)
        low = -(2 ** (bits - 1)) + (fields.get("levels", "narrow") == "narrow")
        result = (code + low).astype(np.float32) * own["scale"]
    elif name == "affine":
        top = 2 ** fields.get("bits", 8) - 1
        step = (own["high"] - own["low"]) * np.float32(1 / top)
        inner = code.astype(np.float32) * step + own["low"]
        result = np.where(code == top, own["high"], inner)
    elif name in ("fixed_point", "dynamic_fixed_point"):
        result = (code - 2 ** (fields.get("bits", 8) - 1)).astype(np.float32) * tables["step"]
    elif name == "logarithmic":
        count = 2 ** (fields.get("bits", 4) - 1) - 1
        powers = [2.0**-n for n in range(count)]
        ladder = np.array([-p for p in powers] + [0.0] + powers[::-1], np.float32)
        result = ladder[code] * tables["scale"]
    elif name == "gobo":
        result = tables["codebook"][code]
        result[dense[1] == 1] = tables["outliers"]
    elif name == "kmeans":
        result = tables["codebook"][code]
    else:
        signs = {"binary": 2 * code - 1, "ternary": code - 1}[name]
        result = signs.astype(np.float32) * own["scale"]
    return np.where(mask, result, np.float32(0)).reshape(shape)


def product(
    fields: dict, streams: dict, tables: dict, shape: list[int], position: list[int] | None
) -> np.ndarray:
    rows, length = (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))
    width = min(fields.get("block", 8), length)
    codebook = tables["codebook"].reshape(2 ** fields.get("bits", 8), width)
    each = math.ceil(length / width)
    found = np.zeros((rows, each * width), np.float32)
    for place, code in enumerate(streams["index"]):
        row, block = divmod(place, each)
        found[row, block * width : (block + 1) * width] = codebook[code]
    result = found[:, :length].reshape(shape)
    mask = True if position is None else np.array(position, bool).reshape(shape)
    return np.where(mask, result, np.float32(0))


def pieces(manifest: dict, tensors: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor of the state dict by name."""
    place = dict.fromkeys(tensors, 0)

    def take(blob: str, size: int) -> np.ndarray:
        place[blob] += size
        return tensors[blob][place[blob] - size : place[blob]]

    for name, entry in sorted(manifest["tensors"].items()):
        streams = {}
        for key, (bits, coder, count, size) in sorted(entry["streams"].items()):
            streams[key] = stream(take("codes", size).tobytes(), coder, bits, count)
        tables = {
            key: take(entry["dtype"], math.prod(shape))
            for key, shape in sorted(entry["tables"].items())
        }
        number_of = decoded(entry["representation"], streams, tables, entry["shape"])
        assert hashlib.sha256(number_of.tobytes()).hexdigest() == entry["sha256"], name
        yield name, number_of
    for dtype in manifest["dense"]:
        for name, shape in sorted(manifest["dense"][dtype].items()):
            yield name, take(dtype, math.prod(shape)).reshape(shape)
    assert all(place[name] == tensors[name].size for name in tensors)


REPRESENTATIONS = [
    Symmetric(4, granularity="row"), Symmetric(3, levels="full"), Affine(2), Affine(8, 4),
    FixedPoint(5), Logarithmic(4), KMeans(3), Binary("row"), Ternary(8),
    LossAware(1), LossAware(granularity="row"), LossAware(4), Affine(3, Groups(6)),
    LearnedStep(3, granularity="row"), LearnedStep(), Gobo(2, threshold=0.0),
    Product(3, block=5), Product(2, block=20),
]  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("representation", REPRESENTATIONS, ids=repr)
def test_a_file_holds_what_the_page_says(representation, masked, tmp_path, tiny_cnn):
    mask = torch.rand(3, 16) < 0.4 if masked else None
    plain = copy.deepcopy(tiny_cnn)
    laconic.lay(tiny_cnn, "5.weight", representation, mask=mask)
    if masked:
        laconic.lay(tiny_cnn, "0.weight", Float(), mask=torch.rand(4, 1, 3, 3) < 0.5)
    path = tmp_path / "model.safetensors"
    laconic.save(tiny_cnn, path)
    body, tensors = safetensors(path)
    assert body["format"] == 1
    assert body["checksum"] == checksum(body["manifest"], tensors)
    again = laconic.load(path, model=plain).state_dict()
    found = dict(pieces(body["manifest"], tensors))
    assert found.keys() == again.keys()
    for name, tensor in again.items():
        assert found[name].tobytes() == tensor.numpy().tobytes(), name
