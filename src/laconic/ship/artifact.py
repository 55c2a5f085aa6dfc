"""The artefact: one file that holds a compressed network, and its way back."""

from __future__ import annotations

import copy
import math
import platform
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.errors import ArtifactError, ModelError
from laconic.ship import coding
from laconic.ship.container import digest, read, write
from laconic.ship.manifest import CODES, DTYPES, Manifest, TensorEntry, parse_manifest
from laconic.weights.laid import Laid, laid_tensors
from laconic.weights.representation import POSITION, Codes, Representation, Stream

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["Inventory", "Verification", "inspect", "load", "save", "verify"]

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save(
    model: nn.Module,
    path: str | Path,
    *,
    task: Task | None = None,
    recipe: Any = None,
    probe: bool = False,
) -> int:
    """Write a network as one small file and return its size in bytes.

    Laid weights are stored as codes, everything else as plain numbers. The network may have
    been laid and trained by the user's own loop.

    Args:
        model: the network, laid or plain; unchanged.
        path: the file to write; it appears whole or not at all.
        task: its label names and image normalisation travel in the file.
        recipe: JSON-able data to keep with it.
        probe: store the hash of the logits of seeded random inputs, for ``verify``;
            needs a task to know the inputs.

    Raises:
        ArtifactError: a weight cannot be stored exactly.

    >>> import tempfile
    >>> from laconic.models import digits_cnn
    >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> save(digits_cnn(), file) == file.stat().st_size
    True
    """
    laid, ties = _laid_once(model)
    dense, dense_ties = _dense(model, set(laid) | set(ties))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        coded = (
            dict(zip(laid, pool.map(_encode, *zip(*laid.values(), strict=True)), strict=True))
            if laid
            else {}
        )
    blobs: dict[str, list[Tensor]] = {}
    entries = {}
    for name in sorted(coded):
        entries[name], streams, tables = coded[name]
        blobs.setdefault(CODES, []).extend(streams)
        blobs.setdefault(entries[name]["dtype"], []).extend(tables)
    listing: dict[str, dict[str, list[int]]] = {}
    for name in sorted(dense):
        dtype = DTYPE_NAMES[dense[name].dtype]
        listing.setdefault(dtype, {})[name] = list(dense[name].shape)
        blobs.setdefault(dtype, []).append(dense[name].flatten())
    manifest: dict[str, Any] = {
        "builder": _builder(model),
        "tensors": entries,
        "dense": listing,
        "versions": {"laconic": _version(), "torch": torch.__version__},
    }
    optional = {
        "ties": ties | dense_ties,
        "inputs": {} if task is None else _inputs(task),
        "recipe": recipe,
        "probe": _probe(model, task) if probe and task is not None else None,
    }
    manifest |= {key: value for key, value in optional.items() if value}
    joined = {
        name: torch.cat(parts) for name, parts in blobs.items() if sum(p.numel() for p in parts)
    }
    return write(Path(path), manifest, joined)


def _inputs(task: Task) -> dict[str, Any]:
    described = {"classes": list(task.classes), "image": task.image}
    return {key: value for key, value in described.items() if value}


def _laid_once(model: nn.Module) -> tuple[dict[str, tuple[str, Laid, Tensor]], dict[str, str]]:
    first: dict[int, str] = {}
    laid, ties = {}, {}
    for name, (layer, latent) in laid_tensors(model).items():
        if id(latent) in first:
            ties[name] = first[id(latent)]
        else:
            first[id(latent)] = name
            laid[name] = (name, layer, latent)
    return laid, ties


def _dense(model: nn.Module, represented: set[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    hidden = {
        ".".join([*name.split(".")[:-1], "parametrizations", name.split(".")[-1]]) + "."
        for name in represented
    }
    first: dict[int, str] = {}
    dense, ties = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if any(name.startswith(prefix) for prefix in hidden):
            continue
        if tensor.dtype not in DTYPE_NAMES:
            raise ArtifactError(
                f"'{name}' is {tensor.dtype}; an artefact holds {', '.join(DTYPES)}"
            )
        if id(tensor) in first:
            ties[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            dense[name] = tensor.detach().cpu()
    return dense, ties


def _encode(
    name: str, laid: Laid, latent: Tensor
) -> tuple[dict[str, Any], list[Tensor], list[Tensor]]:
    codes = laid.encode(latent)
    decoded = laid.representation.decode(codes)
    if not bool(torch.isfinite(decoded).all()):
        raise ArtifactError(f"'{name}' decodes to NaN or infinity; train it again before saving")
    streams, data = {}, []
    for key in sorted(codes.streams):
        stream = codes.streams[key]
        coded = coding.encode(stream.tensor.cpu().flatten().numpy(), stream.bits)
        streams[key] = [stream.bits, coded.coder, stream.tensor.numel(), coded.data.size]
        data.append(torch.from_numpy(coded.data))
    tables = {key: codes.tables[key].detach().cpu() for key in sorted(codes.tables)}
    entry = {
        "representation": laid.representation.to_data(),
        "shape": list(codes.shape),
        "dtype": DTYPE_NAMES[codes.dtype],
        "streams": streams,
        "tables": {key: list(table.shape) for key, table in tables.items()},
        "sha256": digest(decoded),
    }
    return entry, data, [table.flatten() for table in tables.values()]


def load(path: str | Path, *, model: nn.Module | None = None) -> nn.Module:
    """Return the network of an artefact, in evaluation mode, its weights plain float.

    Nothing of the file is executed: modules come from an allow-list of builders.

    Args:
        path: the file.
        model: the plain network to fill, for a file whose builder is the user's own; it may
            live on the meta device.

    Raises:
        ArtifactError: the file is damaged, hostile, or does not fit the model.

    >>> import tempfile
    >>> from laconic.models import digits_cnn
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save(digits_cnn(), Path(folder) / "model.safetensors")
    ...     load(Path(folder) / "model.safetensors").training
    False
    """
    path = Path(path)
    manifest, blobs = _open(path)
    target = _skeleton(path, manifest) if model is None else model
    _check_fit(path, manifest, target)
    _fill(target, manifest, _numbers(path, manifest, blobs))
    return target.eval()


def _open(path: Path) -> tuple[Manifest, dict[str, Tensor]]:
    data, blobs = read(path)
    return parse_manifest(data, blobs, str(path)), blobs


def _skeleton(path: Path, manifest: Manifest) -> nn.Module:
    from laconic.models.load import build

    if "custom" in manifest.builder:
        raise ArtifactError(
            f"{path}: made from {manifest.builder['custom']!r}, which is not laconic's to import; "
            "build it yourself and pass load(path, model=...)"
        )
    try:
        with torch.device("meta"):
            model = build(manifest.builder)
    except ModelError as error:
        raise ArtifactError(f"{path}: {error}") from None
    stored = set(model.state_dict())
    if all(name in stored for name, _ in model.named_buffers()):
        return model
    # Buffers that are not in the state dict have to be computed, so build for real.
    return build(manifest.builder)


def _check_fit(path: Path, manifest: Manifest, model: nn.Module) -> None:
    if laid_tensors(model):
        raise ArtifactError(f"{path}: pass a plain model, not one with laid weights")
    promised = {name: entry.shape for name, entry in manifest.tensors.items()}
    for shapes in manifest.dense.values():
        promised |= shapes
    promised |= {name: promised.get(first, ()) for name, first in manifest.ties.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(wanted.keys() | promised.keys()):
        if wanted.get(name) != promised.get(name):
            raise ArtifactError(
                f"{path}: '{name}' is {promised.get(name, 'missing')} in the file and "
                f"{wanted.get(name, 'unknown')} in the model"
            )


def _numbers(path: Path, manifest: Manifest, blobs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return every tensor of the file, decoded."""
    pieces = list(_pieces(manifest, blobs))
    jobs = [(path, name, entry, streams, tables) for name, entry, streams, tables in pieces]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        numbers = dict(pool.map(lambda job: _decode(*job), jobs))
    cursor = {
        name: sum(
            t.numel()
            for _, entry, _, tables in pieces
            if entry.dtype == name
            for t in tables.values()
        )
        for name in blobs
    }
    for dtype in sorted(manifest.dense):
        for name, shape in sorted(manifest.dense[dtype].items()):
            start = cursor.get(dtype, 0)
            cursor[dtype] = start + math.prod(shape)
            blob = blobs.get(dtype, torch.zeros(0, dtype=DTYPES[dtype]))
            numbers[name] = blob[start : cursor[dtype]].reshape(shape).clone()
    return numbers


def _pieces(
    manifest: Manifest, blobs: Mapping[str, Tensor]
) -> Iterator[tuple[str, TensorEntry, dict[str, Tensor], dict[str, Tensor]]]:
    cursor = dict.fromkeys(blobs, 0)

    def take(blob: str, size: int) -> Tensor:
        if not size:
            return torch.zeros(0, dtype=DTYPES.get(blob, torch.uint8))
        start = cursor[blob]
        cursor[blob] = start + size
        return blobs[blob][start : start + size]

    for name, entry in sorted(manifest.tensors.items()):
        streams = {key: take(CODES, entry.streams[key][3]) for key in sorted(entry.streams)}
        tables = {
            key: take(entry.dtype, math.prod(entry.tables[key])).reshape(entry.tables[key]).clone()
            for key in sorted(entry.tables)
        }
        yield name, entry, streams, tables


def _decode(
    path: Path, name: str, entry: TensorEntry, data: Mapping[str, Tensor], tables: dict[str, Tensor]
) -> tuple[str, Tensor]:
    where = f"{path}: '{name}'"
    try:
        representation = Representation.coerce(entry.representation)
    except (ValidationError, ValueError, TypeError) as error:
        raise ArtifactError(f"{where}: unknown representation ({str(error)[:200]})") from None
    streams = {}
    for key, (bits, coder, count, _) in entry.streams.items():
        symbols = torch.from_numpy(coding.decode(data[key].numpy(), coder, bits=bits, count=count))
        streams[key] = Stream(symbols, bits)
    position = streams.get(POSITION)
    if position is not None:
        streams[POSITION] = Stream(position.tensor.reshape(entry.shape), 1)
        survivors = int(position.tensor.sum())
    shape = torch.Size(entry.shape)
    for key, stream in streams.items():
        if position is None:
            streams[key] = Stream(stream.tensor.reshape(shape), stream.bits)
        elif key != POSITION and stream.tensor.numel() != survivors:
            raise ArtifactError(
                f"{where}: {stream.tensor.numel()} {key} codes for {survivors} survivors"
            )
    codes = Codes(streams, tables, shape, DTYPES[entry.dtype])
    try:
        decoded = representation.decode(codes)
    except (IndexError, KeyError, RuntimeError, ValueError, TypeError) as error:
        raise ArtifactError(f"{where}: codes and tables do not fit ({error})") from None
    if decoded.shape != shape or decoded.dtype != codes.dtype:
        raise ArtifactError(f"{where}: decodes to {decoded.dtype} {tuple(decoded.shape)}")
    return name, decoded


def _fill(model: nn.Module, manifest: Manifest, numbers: Mapping[str, Tensor]) -> None:
    placed: dict[str, Any] = {}
    for name, first in [*((n, n) for n in numbers), *manifest.ties.items()]:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        parameter = module._parameters.get(attribute)
        if parameter is not None:
            if first not in placed:
                placed[first] = nn.Parameter(numbers[first], parameter.requires_grad)
            setattr(module, attribute, placed[first])
        else:
            setattr(module, attribute, numbers[first])


@dataclass(frozen=True)
class Verification:
    """What was checked of an artefact.

    Attributes:
        size_bytes: of the file.
        tensors: how many decoded weights had the stored sha256.
        logits: True: identical bit for bit; None: not compared.
        note: why logits were not compared.

    >>> Verification(size_bytes=9_000, tensors=5, logits=True).logits
    True
    """

    size_bytes: int
    tensors: int
    logits: bool | None = None
    note: str = ""


def verify(
    path: str | Path, *, logits: bool = False, model: nn.Module | None = None
) -> Verification:
    """Check an artefact: checksum, hash of every decoded weight and, if asked, logits.

    Args:
        path: the file.
        logits: also run the stored probe; compared when threads, torch and CPU agree.
        model: the plain network, for a file whose builder is the user's own.

    Raises:
        ArtifactError: something does not match.

    >>> import tempfile
    >>> from laconic.models import digits_cnn
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = save(digits_cnn(), Path(folder) / "model.safetensors")
    ...     verify(Path(folder) / "model.safetensors").size_bytes == size
    True
    """
    path = Path(path)
    manifest, blobs = _open(path)
    numbers = _numbers(path, manifest, blobs)
    for name, entry in manifest.tensors.items():
        if digest(numbers[name]) != entry.sha256:
            raise ArtifactError(f"{path}: '{name}' does not decode to the weight that was saved")
    same, note = _compare_logits(path, manifest, model) if logits else (None, "not asked for")
    return Verification(path.stat().st_size, len(manifest.tensors), same, note)


def _compare_logits(
    path: Path, manifest: Manifest, model: nn.Module | None
) -> tuple[bool | None, str]:
    probe = manifest.probe
    if probe is None:
        return None, "the file holds no probe"
    here = {"threads": torch.get_num_threads(), "torch": torch.__version__, "cpu": _cpu()}
    there = {key: getattr(probe, key) for key in here}
    if here != there:
        return None, f"logits were stored with {there}, this is {here}"
    found = _logits_hash(load(path, model=model), probe.shapes, probe.seed)
    if found != probe.logits:
        raise ArtifactError(f"{path}: the reloaded network gives other logits than the saved one")
    return True, "logits are identical bit for bit"


def _probe(model: nn.Module, task: Task) -> dict[str, Any]:
    shapes = tuple(tuple(tensor.shape) for tensor in task.example(4))
    return {
        "seed": 0,
        "shapes": shapes,
        "logits": _logits_hash(_on_cpu(model), shapes, 0),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": _cpu(),
    }


def _on_cpu(model: nn.Module) -> nn.Module:
    """Return the network where ``verify`` will run it: a GPU gives other logits."""
    first = next(model.parameters(), None)
    return model if first is None or first.is_cpu else copy.deepcopy(model).cpu()


def _logits_hash(model: nn.Module, shapes: tuple[tuple[int, ...], ...], seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    training = model.training
    model.eval()
    with torch.no_grad(), parametrize.cached():
        outputs = model(*(tensor.to(device) for tensor in inputs))
    model.train(training)
    return digest(outputs)


@dataclass(frozen=True)
class Inventory:
    """Where the bytes of an artefact are.

    Attributes:
        size_bytes: of the file; the sum of the rest.
        code_bytes: entropy-coded or packed codes.
        index_bytes: positions of surviving weights.
        table_bytes: codebooks, scales and the coders' own tables.
        dense_bytes: numbers stored as they are.
        header_bytes: manifest and tensor listing.
        layers: name -> the first three for each represented weight.

    >>> found = Inventory(100, 40, 20, 10, 20, 10, layers={"fc.weight": (40, 20, 10)})
    >>> found.index_bytes / found.size_bytes
    0.2
    """

    size_bytes: int
    code_bytes: int
    index_bytes: int
    table_bytes: int
    dense_bytes: int
    header_bytes: int
    layers: dict[str, tuple[int, int, int]]


def inspect(path: str | Path) -> Inventory:
    """Return where the bytes of an artefact are.

    Raises:
        ArtifactError: the file is damaged.

    >>> import tempfile
    >>> from laconic.models import digits_cnn
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save(digits_cnn(), Path(folder) / "model.safetensors")
    ...     inspect(Path(folder) / "model.safetensors").code_bytes
    0
    """
    path = Path(path)
    manifest, blobs = _open(path)
    layers = {}
    for name, entry, streams, tables in _pieces(manifest, blobs):
        code = index = overhead = 0
        for key, data in streams.items():
            bits, coder, count, size = entry.streams[key]
            own = coding.overhead(data.numpy(), coder, bits=bits, count=count)
            overhead += own
            if key == POSITION:
                index += size - own
            else:
                code += size - own
        table = sum(t.numel() * t.element_size() for t in tables.values())
        values = POSITION in entry.streams and len(entry.streams) == 1
        layers[name] = (
            (code + table, index, overhead) if values else (code, index, overhead + table)
        )
    stored = sum(blob.numel() * blob.element_size() for blob in blobs.values())
    code_bytes, index_bytes, table_bytes = (
        sum(row[i] for row in layers.values()) for i in range(3)
    )
    size = path.stat().st_size
    return Inventory(
        size_bytes=size,
        code_bytes=code_bytes,
        index_bytes=index_bytes,
        table_bytes=table_bytes,
        dense_bytes=stored - code_bytes - index_bytes - table_bytes,
        header_bytes=size - stored,
        layers=layers,
    )


def _builder(model: nn.Module) -> dict[str, Any]:
    described = getattr(model, "laconic", None)
    if described is not None:
        return dict(described["builder"])
    kind = type(model)
    return {"custom": f"{kind.__module__}:{kind.__qualname__}"}


def _version() -> str:
    from laconic import __version__

    return __version__


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
