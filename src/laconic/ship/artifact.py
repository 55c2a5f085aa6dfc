"""The artefact: one file that holds a compressed network, and its way back."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from laconic.errors import ArtifactError, ModelError
from laconic.models.load import builder_of, custom, layers_builder
from laconic.names import joined, latent_name
from laconic.ship import coding
from laconic.ship import probe as probing
from laconic.ship.container import digest, write
from laconic.ship.content import Content, decode_piece, in_parallel, read_content
from laconic.ship.manifest import CODES, DTYPES, Manifest, parse_manifest, too_good
from laconic.ship.skeleton import named_tensors, rebuilds, skeleton
from laconic.structure.surgery import edits_of
from laconic.weights.laid import Laid
from laconic.weights.quantizer import activations_data
from laconic.weights.representation import Codes, Representation, Stream, masked

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["load", "save"]

logger = logging.getLogger(__name__)

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Owned = TypeVar("Owned", bound=tuple[Any, ...])


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
    been laid and trained by the user's own loop. Another memory format than torch's own, such as
    channels_last, is not kept; ``compress`` leaves it before anything is measured.

    Args:
        model: the network, laid or plain; unchanged.
        path: the file to write; it appears whole or not at all.
        task: its label names, image normalisation and tokenizer travel in the file.
        recipe: JSON-able data to keep with it.
        probe: store the hash of the logits of seeded random inputs, for ``verify``;
            needs a task to know the inputs.

    Raises:
        ArtifactError: a weight cannot be stored exactly, or the file cannot be written.
        ModelError: it is no network.

    >>> import tempfile
    >>> from laconic.models import digits_cnn
    >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> save(digits_cnn(), file) == file.stat().st_size
    True
    """
    _check_network(model, "save", "a result of compress has a save(path) of its own")
    laid, ties = _untied(_represented(model))
    dense, dense_ties = _untied(_plain(model))
    # In this thread: sums are added up as they are in a forward.
    codes = {name: _codes(name, *laid[name]) for name in sorted(laid)}
    weights = in_parallel(
        lambda name: _encode(name, laid[name][1].representation, codes[name]), list(codes)
    )
    builder = layers_builder(model) or builder_of(model)
    manifest: dict[str, Any] = {
        "builder": builder,
        "tensors": {weight.name: weight.entry for weight in weights},
        "dense": {},
        "versions": _versions(builder),
    }
    for name, (tensor,) in sorted(dense.items()):
        listing = manifest["dense"].setdefault(DTYPE_NAMES[tensor.dtype], {})
        listing[name] = list(tensor.shape)
    tokenizer = None if task is None else _tokenizer(task)
    optional = {
        "edits": edits_of(model),
        "activations": activations_data(model),
        "ties": ties | dense_ties,
        "inputs": {} if task is None else _inputs(task),
        "tokenizer": None if tokenizer is None else tokenizer[0],
        "recipe": recipe,
        "probe": probing.take(model, task) if probe and task is not None else None,
    }
    manifest |= {key: value for key, value in optional.items() if value}
    blobs = _blobs(weights, dense, () if tokenizer is None else tokenizer[1:])
    # What could not be loaded again is not written.
    if not rebuilds(parse_manifest(manifest, blobs, str(path)), model):
        manifest["builder"] = _custom(model, path, builder)
    try:
        if Path(path).is_dir():
            raise ArtifactError(f"{path} is a folder; name a file in it")
        return write(Path(path), manifest, blobs)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be written ({error}); choose another path") from error


@dataclass(frozen=True, eq=False)
class _Encoded:
    """One laid weight, coded: its entry in the manifest and the numbers this refers to."""

    name: str
    entry: dict[str, Any]
    streams: list[Tensor]
    tables: list[Tensor]


def _represented(model: nn.Module) -> dict[str, tuple[Tensor, Laid]]:
    """Return latent weight and representation of every laid tensor, under all its names."""
    found = {}
    # A module that stands in two places has two names for each of its tensors.
    for path, module in model.named_modules(remove_duplicate=False):
        if not parametrize.is_parametrized(module):
            continue
        listed = cast("dict[str, parametrize.ParametrizationList]", module.parametrizations)
        for attribute, layers in listed.items():
            name = joined(path, attribute)
            kinds = [isinstance(layer, Laid) for layer in layers]
            if any(kinds) and len(kinds) > 1:
                raise ArtifactError(
                    f"'{name}' carries another parametrization besides laconic's, which would be "
                    "lost; remove it first"
                )
            if any(kinds):
                found[name] = (layers.original, cast("Laid", layers[0]))
    return found


def _plain(model: nn.Module) -> dict[str, tuple[Tensor]]:
    """Return everything else of the state dict."""
    hidden = tuple(latent_name(name).removesuffix("original") for name in _represented(model))
    named = named_tensors(model)
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.startswith(hidden):
            continue
        if name not in named:
            raise ArtifactError(
                f"'{name}' of the state dict is no parameter or buffer, and an artefact holds no "
                "other; make it a buffer, or remove the get_extra_state that returns it"
            )
        if (
            tensor.dtype not in DTYPE_NAMES
            or tensor.layout != torch.strided
            or (tensor.is_meta or is_lazy(tensor))
        ):
            raise ArtifactError(
                f"'{name}' is {tensor.dtype}, {tensor.layout} on {tensor.device}; an artefact "
                f"holds numbers of {', '.join(DTYPES)}"
            )
        found[name] = (tensor,)
    return found


def _untied(named: Mapping[str, Owned]) -> tuple[dict[str, Owned], dict[str, str]]:
    """Return what to store, each once, and name -> first name of what is the same object."""
    first: dict[tuple[int, ...], str] = {}
    kept, ties = {}, {}
    for name, owned in named.items():
        key = tuple(id(part) for part in owned)
        if key in first:
            ties[name] = first[key]
        else:
            first[key] = name
            kept[name] = owned
    return kept, ties


def _codes(name: str, latent: Tensor, laid: Laid) -> Codes:
    # Asked of the latent weight: three values of NaN would be three zeros.
    if not bool(torch.isfinite(masked(latent.detach(), laid.mask)).all()):
        raise ArtifactError(f"'{name}' holds NaN or infinity; train it again before saving")
    return laid.encode(latent)


def _encode(name: str, representation: Representation, codes: Codes) -> _Encoded:
    codes = _on_cpu(codes)
    decoded = representation.decode(codes)
    if codes.dtype not in DTYPE_NAMES or not bool(torch.isfinite(decoded).all()):
        raise ArtifactError(
            f"'{name}' decodes to NaN or infinity, or to {codes.dtype}; choose another "
            "representation or scale the weight"
        )
    tables = {key: codes.tables[key] for key in sorted(codes.tables)}
    streams, listing = [], {}
    for key in sorted(codes.streams):
        bits, symbols = codes.streams[key].bits, codes.streams[key].tensor.flatten().numpy()
        layout = representation.stream_shape(key, codes.shape)
        coded = _code(symbols, bits, weights=codes.shape.numel() // max(layout.numel(), 1))
        listing[key] = [bits, coded.coder, symbols.size, coded.data.size]
        streams.append(torch.from_numpy(coded.data))
    entry = {
        "representation": representation.to_data(),
        "shape": list(codes.shape),
        "dtype": DTYPE_NAMES[codes.dtype],
        "streams": listing,
        "tables": {key: list(table.shape) for key, table in tables.items()},
        "sha256": digest(decoded),
    }
    return _Encoded(name, entry, streams, [table.flatten() for table in tables.values()])


def _on_cpu(codes: Codes) -> Codes:
    """Return codes where they are written and, one day, decoded."""
    streams = {key: Stream(s.tensor.cpu(), s.bits) for key, s in codes.streams.items()}
    tables = {key: table.detach().cpu() for key, table in codes.tables.items()}
    return Codes(streams, tables, codes.shape, codes.dtype)


def _code(symbols: np.ndarray, bits: int, *, weights: int = 1) -> coding.Coded:
    """Return the smallest code whose size still tells how many weights a file may claim.

    Args:
        symbols: uint8 [count].
        bits: of each.
        weights: that each stands for.
    """
    for coders in (None, ["huffman", "packed"]):
        coded = coding.encode(symbols, bits, coders=coders)
        if not too_good(symbols.size * weights, coded.data.size):
            return coded
    return coding.encode(symbols, bits, coders=["packed"])


def _blobs(
    weights: Sequence[_Encoded], dense: Mapping[str, tuple[Tensor]], more: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return all numbers of one kind end to end: represented weights first, by name."""
    parts: dict[str, list[Tensor]] = {}
    for weight in weights:
        parts.setdefault(CODES, []).extend(weight.streams)
        parts.setdefault(weight.entry["dtype"], []).extend(weight.tables)
    parts.setdefault(CODES, []).extend(more)
    for _, (tensor,) in sorted(dense.items()):
        parts.setdefault(DTYPE_NAMES[tensor.dtype], []).append(tensor.detach().cpu().flatten())
    return {
        name: torch.cat(numbers)
        for name, numbers in parts.items()
        if any(part.numel() for part in numbers)
    }


def _custom(model: nn.Module, path: str | Path, builder: dict[str, Any]) -> dict[str, Any]:
    """Return the builder of a network that was changed by hand: only its user can build it."""
    if "custom" in builder:
        return builder
    if "layers" in builder:  # a weight is made of others, by weight_norm say
        return custom(model)
    logger.warning(
        "%s: the network is not as its builder and recorded edits make it; load it with "
        "load(path, model=...), or change its modules through laconic.structure.surgery",
        path,
    )
    return custom(model)


def _versions(builder: Mapping[str, Any]) -> dict[str, str]:
    from importlib.metadata import version

    from laconic import __version__

    used = {"transformers": version("transformers")} if "hf" in builder else {}
    return {"laconic": __version__, "torch": torch.__version__} | used


def _tokenizer(task: Task) -> tuple[list[Any], Tensor] | None:
    """Return the entry of the task's tokenizer in the manifest, and its coded bytes."""
    if task.tokenizer is None:
        return None
    symbols = np.frombuffer(task.tokenizer, dtype=np.uint8)
    coded = _code(symbols, 8)
    return [8, coded.coder, symbols.size, coded.data.size], torch.from_numpy(coded.data)


def _inputs(task: Task) -> dict[str, Any]:
    described = {"classes": list(task.classes), "image": task.image}
    return {key: value for key, value in described.items() if value}


@torch.inference_mode(False)  # what is loaded may be trained later
def load(path: str | Path, *, model: nn.Module | None = None) -> nn.Module:
    """Return the network of an artefact, in evaluation mode, with plain weights.

    Nothing of the file is executed: modules come from an allow-list of builders and layers. It
    is on the CPU, or where ``model`` is.

    Args:
        path: the file.
        model: the plain network to fill, for a file whose builder is the user's own, as it was
            before anything was cut off; it may live on the meta device, but for buffers that
            are not in its state dict.

    Raises:
        ArtifactError: the file is damaged, hostile, or does not fit the model.
        ModelError: ``model`` is no network.

    >>> import tempfile
    >>> from laconic.models import digits_cnn
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save(digits_cnn(), Path(folder) / "model.safetensors")
    ...     load(Path(folder) / "model.safetensors").training
    False
    """
    if model is not None:
        _check_network(model, "load(model=)", "laconic.models.load_model loads what a recipe names")
    path = Path(path)
    content = read_content(path)
    numbers = _numbers(content)  # first: a model that is given stays as it is if this fails
    network = skeleton(path, content.manifest, model)
    _fill(network, content.manifest, numbers)
    return network.eval()


def _check_network(given: object, function: str, advice: str) -> None:
    if not isinstance(given, nn.Module):
        raise ModelError(
            f"{function} takes a network (nn.Module), got {type(given).__name__}; {advice}"
        )


def _numbers(content: Content) -> dict[str, Tensor]:
    """Return every tensor of the file, decoded."""
    pieces = list(content.pieces())
    weights = in_parallel(lambda piece: decode_piece(content.path, piece), pieces)
    decoded = {piece.name: weight for piece, weight in zip(pieces, weights, strict=True)}
    return decoded | dict(content.dense())


def _fill(model: nn.Module, manifest: Manifest, numbers: Mapping[str, Tensor]) -> None:
    placed: dict[tuple[str, bool], Tensor] = {}
    for name, first in [*((name, name) for name in numbers), *manifest.ties.items()]:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        old = getattr(module, attribute)
        learned = isinstance(old, nn.Parameter)
        if (first, learned) not in placed:
            new = numbers[first] if old.is_meta else numbers[first].to(old.device)
            placed[first, learned] = nn.Parameter(new, old.requires_grad) if learned else new
        setattr(module, attribute, placed[first, learned])
