"""A second reader and writer of the file format, made from docs/format.md alone."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import laconic
from laconic import weights as w
from laconic.ship import coding
from laconic.step import members

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
# As they lie in a file: dtype -> its name in the header, how numpy reads it.
DTYPES = {
    "int64": ("I64", "<i8"), "float64": ("F64", "<f8"), "float32": ("F32", "<f4"),
    "int32": ("I32", "<i4"), "bfloat16": ("BF16", "<u2"), "float16": ("F16", "<f2"),
    "int16": ("I16", "<i2"), "int8": ("I8", "i1"), "uint8": ("U8", "u1"), "bool": ("BOOL", "u1"),
}  # fmt: skip
TOTAL = 1 << 24
Arrays = dict[str, np.ndarray]


def defaults(section: str) -> dict[str, dict[str, Any]]:
    """Return name -> field -> default, from the table of a section of the page."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    head, _, *rows = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    found = {}
    for row in rows:
        fields = re.findall(r"`(\w+): (\w+)`", row[head.index(" defaults ")])
        fields = {key: int(value) if value.isdigit() else value for key, value in fields}
        found |= dict.fromkeys(re.findall(r"`(\w+)`", row[1]), fields)
    return found


REPRESENTED, ROUNDED = defaults("Representations"), defaults("Activations")


def ours(family: type) -> dict[str, type]:
    kinds = members(family, every=True).items()
    return {name: kind for name, kind in kinds if kind.__module__.startswith("laconic.")}


def test_the_page_lists_every_method_with_the_defaults_that_a_reader_needs():
    kinds = ours(w.Representation) | ours(w.Activation)
    page = REPRESENTED | ROUNDED
    assert page.keys() == kinds.keys()
    for name, fields in page.items():
        assert {key: kinds[name].model_fields[key].default for key in fields} == fields


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
        assert 2 <= k <= 8 and gaps <= count
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
    assert max(lengths) <= 12 and sum(2.0**-own for own in lengths if own) == 1
    lanes = number(data[table : table + 4])
    assert 1 <= lanes <= count <= 5461 * lanes
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
        blocks[lane::lanes] = letters(bits[start : start + size], codes)
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
    assert code < 2**m * (31 - m)
    return code if code < 2**m else (2**m + code % 2**m) * 2 ** (code // 2**m - 1)


def frequencies(codes: list[int], kind: int, group: int, n: int) -> list[int]:
    weights = [weight(code, (11, 3)[kind]) for code in codes]
    assert 0 < max(weights) < 2**30
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
    assert data[-1]
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


def rans_written(symbols: list[int], bits: int, codes: list[int]) -> bytes:
    """Return a stream in which every symbol occurs, alone in its block."""
    chances = frequencies(codes, 1, 1, len(codes))
    state, words = 0, []
    for symbol in reversed(symbols):
        own = chances[symbol]
        if state >= own * 2**40:
            words.append(state % 2**32)
            state //= 2**32
        state = state // own * 2**24 + sum(chances[:symbol]) + state % own
    words += [state % 2**32] + [state // 2**32] * (state >= 2**32)
    body = b"".join(word.to_bytes(4, "little") for word in words).rstrip(b"\0")
    return bytes([255] * (2**bits // 8) + [1, 1] + codes) + body


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


WIDTHS = {coder: [1] if "gaps" in coder else [1, 2, 3, 5, 8] for coder in coding.CODERS}
CODED = [(coder, bits) for coder, widths in WIDTHS.items() for bits in widths]


@pytest.mark.parametrize("kind", ["even", "skewed", "rare", "single", "none"])
@pytest.mark.parametrize(("coder", "bits"), CODED)
def test_every_coder_is_as_the_page_says(coder, bits, kind):
    symbols = drawn(kind, bits)
    coded = coding.encode(symbols, bits, coders=[coder])
    assert stream(coded.data.tobytes(), coded.coder, bits, len(symbols)) == symbols.tolist()


def compact(data: object, **options: bool) -> str:
    return json.dumps(data, separators=(",", ":"), **options)


def checksum(manifest: str, tensors: dict[str, bytes]) -> str:
    total = hashlib.sha256(manifest.encode())
    for name, data in sorted(tensors.items()):
        dtype, count = stored(name, data)
        total.update(compact([name, f"torch.{dtype}", [count]]).encode() + data)
    return total.hexdigest()


def stored(name: str, data: bytes) -> tuple[str, int]:
    """Return dtype and count of what a tensor holds."""
    dtype = "uint8" if name == "codes" else name
    return dtype, len(data) // np.dtype(DTYPES[dtype][1]).itemsize


def written(manifest: dict, tensors: dict[str, bytes]) -> bytes:
    """Return a file."""
    text = compact(manifest, sort_keys=True)
    total = checksum(text, tensors)
    text = f'{{"checksum":"{total}","format":1,"manifest":{text}}}'
    header: dict[str, Any] = {"__metadata__": {"laconic": text}}
    start, body = 0, b""
    order = list(DTYPES)
    for name in sorted(tensors, key=lambda name: (order.index(stored(name, b"")[0]), name)):
        dtype, count = stored(name, tensors[name])
        end = start + len(tensors[name])
        kind = DTYPES[dtype][0]
        header[name] = {"dtype": kind, "shape": [count], "data_offsets": [start, end]}
        start, body = end, body + tensors[name]
    head = compact(header).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + body


def read(path: Path) -> tuple[dict, dict[str, bytes]]:
    """Return manifest and tensors of a file that is as the page says, byte for byte."""
    content = path.read_bytes()
    start = 8 + number(content[:8])
    header = json.loads(content[8:start])
    text = header.pop("__metadata__")["laconic"]
    spans = {name: [start + end for end in each["data_offsets"]] for name, each in header.items()}
    tensors = {name: content[first:last] for name, (first, last) in spans.items()}
    manifest = text[text.index('"manifest":') + len('"manifest":') : text.rindex("}")]
    assert json.loads(text)["checksum"] == checksum(manifest, tensors)
    assert written(json.loads(manifest), tensors) == content
    return json.loads(manifest), tensors


def wide(data: bytes, dtype: str) -> np.ndarray:
    """Return numbers in float32, or float64 where they are."""
    numbers = np.frombuffer(data, DTYPES[dtype][1])
    if dtype == "bfloat16":
        return (numbers.astype("<u4") << 16).view("<f4")
    return numbers.astype("<f8" if dtype == "float64" else "<f4")


def narrow(numbers: np.ndarray, dtype: str) -> bytes:
    """Return the bytes of numbers, rounded to a dtype, ties to even."""
    if dtype == "bfloat16":
        whole = numbers.astype("<f4").view("<u4").astype("<u8")
        return (whole + 0x7FFF + (whole >> 16 & 1) >> 16).astype("<u2").tobytes()
    return numbers.astype(DTYPES[dtype][1]).tobytes()


def named(data: object, default: dict[str, dict]) -> tuple[str, dict[str, Any]]:
    name, fields = (data, {}) if isinstance(data, str) else next(iter(data.items()))
    return name, default[name] | fields


def decoded(entry: dict, streams: dict[str, list[int]], tables: Arrays) -> bytes:
    name, fields = named(entry["representation"], REPRESENTED)
    dtype, shape, size = entry["dtype"], entry["shape"], math.prod(entry["shape"])
    bits = fields.get("bits", 1)
    for key in {"code", "index"} & entry["streams"].keys():
        assert entry["streams"][key][0] == fields.get("bits", {"ternary": 2}.get(name, 1))
    mask = np.array(streams.pop("position", [1] * size), bool)
    spread = {key: np.zeros(size, np.int64) for key in streams}
    if name == "learned_step":
        name, fields = "symmetric", fields | {"levels": "full"}
    elif name == "loss_aware":
        name, fields = "binary" if bits == 1 else "symmetric", fields | {"levels": "narrow"}
    elif name == "product":
        row = math.prod(shape[1:] if len(shape) > 1 else shape)
        width = min(fields["block"], row)
        if width > 1:
            codebook = tables["codebook"].reshape(-1, width)
            padded = codebook[streams["index"]].reshape(size // row, -1)
            return narrow(np.where(mask, padded[:, :row].ravel(), 0), dtype)
    if "granularity" in fields:
        group = fields["granularity"]
        if isinstance(group, str):
            group = {"groups": {"tensor": 1, "row": shape[0]}[group]}
        group = size // group["groups"] if isinstance(group, dict) else group
        tables = {key: np.repeat(each, group) for key, each in tables.items()}
    for key, symbols in streams.items():
        spread[key][mask] = symbols
    result = np.zeros(size, next(iter(tables.values())).dtype)
    if name == "float":
        result[mask] = tables["values"]
    else:
        result = values(name, fields, spread, tables, lambda x: wide(narrow(x, dtype), dtype))
    return narrow(np.where(mask, result, 0) + 0.0, dtype)


def values(name: str, fields: dict, streams: Arrays, tables: Arrays, fit: Callable) -> np.ndarray:
    """Return what codes stand for; every operation is followed by `fit`."""
    kind, half = next(iter(tables.values())).dtype, 2 ** (fields.get("bits", 1) - 1)
    code = streams.get("code", streams.get("index"))
    if name == "symmetric":
        low = 1 - half if fields["levels"] == "narrow" else -half
        return fit((code + low).astype(kind) * tables["scale"])
    if name == "affine":
        top, low, high = 2 * half - 1, tables["low"], tables["high"]
        step = fit(fit(high - low) * kind.type(1 / top))
        return np.where(code == top, high, fit(fit(code.astype(kind) * step) + low))
    if name in ("fixed_point", "dynamic_fixed_point"):
        return fit((code - half).astype(kind) * tables["step"])
    if name == "logarithmic":
        powers = [2.0**-n for n in range(half - 1)]
        ladder = fit(np.array([-p for p in powers] + [0.0] + powers[::-1], kind))
        return fit(ladder[code] * tables["scale"])
    if name in ("kmeans", "product", "gobo"):
        result = tables["codebook"][code]
        result[streams.get("outlier", 0 * code) == 1] = tables.get("outliers", ())
        return result
    signs = {"binary": 2 * code - 1, "ternary": code - 1}[name]
    return fit(signs.astype(kind) * tables["scale"])


def pieces(manifest: dict, tensors: dict[str, bytes]) -> Iterator[tuple[str, str, bytes]]:
    """Yield name, dtype and bytes of every tensor of the state dict."""
    place = dict.fromkeys(tensors, 0)

    def take(blob: str, count: int) -> bytes:
        size = count * np.dtype(DTYPES.get(blob, DTYPES["uint8"])[1]).itemsize
        place[blob] = place.get(blob, 0) + size
        return tensors.get(blob, b"")[place[blob] - size : place[blob]]

    for name, entry in sorted(manifest["tensors"].items()):
        streams, tables, dtype = {}, {}, entry["dtype"]
        for key, (bits, coder, count, size) in sorted(entry["streams"].items()):
            streams[key] = stream(take("codes", size), coder, bits, count)
        for key, shape in sorted(entry["tables"].items()):
            tables[key] = wide(take(dtype, math.prod(shape)), dtype)
        data = decoded(entry, streams, tables)
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], name
        yield name, dtype, data
    for dtype in manifest["dense"]:
        for name, shape in sorted(manifest["dense"][dtype].items()):
            yield name, dtype, take(dtype, math.prod(shape))
    assert place == {name: len(data) for name, data in tensors.items()}


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


REPRESENTATIONS = [
    *(kind() for kind in ours(w.Representation).values()),
    w.Symmetric(4, granularity="row", rounding="equal"), w.Symmetric(3, levels="full"),
    w.Symmetric(5, range="mse"), w.Affine(2), w.Affine(8, 4), w.Affine(3, w.Groups(6)),
    w.FixedPoint(5), w.KMeans(3), w.Binary("row"), w.Ternary(8), w.Logarithmic(6),
    w.LossAware(1), w.LossAware(granularity="row"), w.LossAware(4), w.Gobo(2, threshold=0.0),
    w.LearnedStep(3, granularity="row"),
    w.Product(3, block=5), w.Product(2, block=20), w.Product(2, block=1),
]  # fmt: skip
VARIANTS = [("float32", False), ("float64", False), ("float16", False), ("bfloat16", False)]
VARIANTS += [("float32", True), ("bfloat16", True)]


@pytest.mark.parametrize(("dtype", "masked"), VARIANTS)
@pytest.mark.parametrize("representation", REPRESENTATIONS, ids=repr)
def test_a_file_holds_what_the_page_says(representation, dtype, masked, tmp_path, tiny_cnn):
    plain = copy.deepcopy(tiny_cnn)
    tiny_cnn.to(getattr(torch, dtype))
    mask = torch.rand(3, 16) < 0.4 if masked else None
    laconic.lay(tiny_cnn, "5.weight", representation, mask=mask)
    tiny_cnn[0].weight.data[0, 0, 0] = torch.tensor([0.0, -0.0, 999.0])
    kept = torch.rand(4, 1, 3, 3) < 0.5 if masked else None
    laconic.lay(tiny_cnn, "0.weight", w.Float() if masked else w.Logarithmic(8), mask=kept)
    path = tmp_path / "model.safetensors"
    laconic.save(tiny_cnn, path)
    again = laconic.load(path, model=plain).state_dict()
    found = {name: data for name, _, data in pieces(*read(path))}
    assert found == {name: raw(tensor) for name, tensor in again.items()}


def rounded(data: Any, numbers: Arrays, x: np.ndarray) -> np.ndarray:
    """Return numbers in float32 or float64 on the grid of an activation."""
    name, fields = named(data, ROUNDED)
    symmetric, half = fields["levels"] == "symmetric", 2 ** (fields["bits"] - 1)
    top = half - 1 if symmetric else 2 * half - 1
    low, high = x.min(), x.max()
    if name == "learned_clip":
        low, high = np.maximum(low, numbers["low"]), np.minimum(high, numbers["high"])
    elif name not in ("min_max", "learned_spacing"):
        low, high = numbers["low"], numbers["high"]
        assert numbers["seen"] > 0
    least = np.finfo(numbers.get("scale", high).dtype).tiny
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    if name == "learned_spacing":
        scale = max(numbers["scale"], least)
        first = -half if symmetric else max(np.rint(low / scale), -top)
        last = top if symmetric else first + top
    else:
        scale = max(-low, high) / top if symmetric else (high - low) / top
        x, scale = (x * 0, np.ones_like(scale)) if scale < least else (x, scale)
        first = -top if symmetric else np.rint(low / scale)
        last = top if symmetric else first + top
        if symmetric and name == "learned_clip":
            first, last = np.rint(low / scale), np.rint(high / scale)
    return np.clip(np.rint(x * (1 / scale)), first, last) * scale


@pytest.mark.filterwarnings("ignore:overflow")  # by the smallest spacing
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("levels", [{}, {"levels": "symmetric", "bits": 3}], ids=repr)
@pytest.mark.parametrize("factor", [0.3, -1.0])  # of what is learned: it may cross zero
@pytest.mark.parametrize("kind", ours(w.Activation).values())
def test_activations_round_as_the_page_says(kind, factor, levels, dtype, tmp_path):
    model = nn.Sequential(nn.Linear(6, 2)).to(getattr(torch, dtype))
    plain = copy.deepcopy(model)
    w.attach_(model, {"0": {"input": kind(**levels)}})
    model(torch.randn(50, 6).to(model[0].weight))  # in training: it is seen
    for place, learned in enumerate(model[0].quantizers.parameters()):
        learned.data.mul_(factor * (1 + place))
    path = tmp_path / "model.safetensors"
    laconic.save(model, path)
    network, file = laconic.load(path, model=plain), read(path)
    start = "0.quantizers.input."
    numbers = {name.removeprefix(start): wide(data, own)[0] for name, own, data in pieces(*file)}
    given: list[Tensor] = []
    network[0].register_forward_hook(lambda module, inputs, output: given.extend(inputs))
    x = torch.randn(3000, 6)
    for each in (3 * x, x.relu(), -x.relu() - 1, 0 * x, 1e-41 * x):
        each = each.to(network[0].weight)
        network(each)
        expected = rounded(file[0]["activations"]["0"]["input"], numbers, wide(raw(each), dtype))
        assert narrow(expected.ravel() + 0.0, dtype) == raw(given.pop() + 0.0)


def test_a_file_written_after_the_page_is_read(tmp_path):
    symbols = [*range(8), *(i * i % 7 for i in range(88))]
    code = rans_written(symbols, 3, [1, 2, 3, 40, 5, 6, 7, 100])
    position = bytes([2]) + (96).to_bytes(8, "little") + bytes([0b10101010] * 24)
    scale = [(1 + i) / 64 for i in range(32)]
    rows = zip(*[iter(symbols)] * 3, scale, strict=True)
    weight = [part for *row, own in rows for code in row for part in (0.0, (code - 4) * own + 0.0)]
    data = np.array(weight, "<f4").tobytes()
    linear = {"Linear": {"in_features": 6, "out_features": 32}}
    entry = {
        "representation": {"learned_step": {"bits": 3, "granularity": "row"}},
        "shape": [32, 6], "dtype": "float32", "tables": {"scale": [32]},
        "streams": {"code": [3, "rans", 96, len(code)], "position": [1, "gaps-packed", 192, 33]},
        "sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    manifest = {
        "builder": {"layers": {"Sequential": {"children": [linear]}}},
        "tensors": {"0.weight": entry},
        "dense": {"float32": {"0.bias": [32]}},
    }
    numbers = np.array([*scale, *range(32)], "<f4").tobytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(written(manifest, {"codes": code + position, "float32": numbers}))
    network = laconic.load(path)
    assert raw(network[0].weight) == data
    assert network[0].bias.tolist() == list(range(32))
