"""What is inside: the members of every family, and the content of an artefact."""

from __future__ import annotations

import inspect
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laconic.errors import ArtifactError, LaconicError, RecipeError, nearest
from laconic.ledger import FLOAT_BITS
from laconic.names import module_of

if TYPE_CHECKING:
    from torch import nn

    from laconic.report.analyse import Analysis
    from laconic.ship.manifest import Manifest, TensorEntry
    from laconic.step import Value
    from laconic.tasks import Task

__all__ = [
    "activation_rows",
    "bytes_by_part",
    "catalogue",
    "file_analyses",
    "file_costs",
    "file_manifest",
    "represented",
    "tensor_rows",
    "widths",
]

# Examples of a batch that derivatives are taken on, and widths of codes that blocks are tried in.
BATCH = 32
WIDTHS = (2, 4, 8)
WEIGHTS, EMBEDDINGS = "weights", "embeddings"
PLURALS = {"criterion": "criteria", "during": "during", "ghosts": "ghosts"}
CODERS = {
    "packed": "each in its own number of bits",
    "huffman": "frequent ones in fewer bits",
    "rans": "frequent ones in fewer bits, down to fractions of a bit",
}


def catalogue(kind: str | None = None) -> dict[str, dict[str, str]]:
    """Return kind -> name -> one line, for one kind, for one name or for all of them.

    Args:
        kind: "steps", "representations", ..., "models", "tasks", "recipes", "coders"; or the
            name of a member of one.

    Raises:
        LaconicError: there is no such kind or name; the nearest is given.

    >>> catalogue("steps")["steps"]["prune"]
    'Remove by score: single weights, or whole channels, heads, neurons.'
    """
    kinds = _kinds()
    if kind is None:
        return {name: listed() for name, listed in kinds.items()}
    if kind in kinds:
        return {kind: kinds[kind]()}
    everything = {name: listed() for name, listed in kinds.items()}
    found = {name: {kind: each[kind]} for name, each in everything.items() if kind in each}
    if not found:
        known = {*kinds, *itertools.chain.from_iterable(everything.values())}
        raise LaconicError(
            f"there is nothing called '{kind}'{nearest(kind, known, otherwise=kinds)}"
        )
    return found


def _kinds() -> dict[str, Callable[[], dict[str, str]]]:
    from laconic import models, tasks
    from laconic.models.load import HUBS
    from laconic.recipe import families, schema
    from laconic.step import members, snake

    def registered(family: type) -> Callable[[], dict[str, str]]:
        return lambda: {name: _summary(member) for name, member in members(family).items()}

    def functions(module: Any, names: Iterable[str]) -> Callable[[], dict[str, str]]:
        return lambda: {name: _summary(getattr(module, name)) for name in names}

    # Those that a recipe may name: others are parts of one of them.
    named = schema()["$defs"]
    listed = [family for family in families() if family.__name__ in named]
    found = {_plural(snake(family.__name__)): registered(family) for family in listed}
    return {
        "steps": found.pop("steps"),
        **dict(sorted(found.items())),
        "models": lambda: functions(models, models.BUILDERS)() | HUBS,
        "tasks": functions(tasks, tasks.KINDS),
        "recipes": _recipes,
        "coders": _coders,
    }


def _plural(word: str) -> str:
    return PLURALS.get(word, f"{word[:-1]}ies" if word.endswith("ty") else f"{word}s")


def _summary(member: Any) -> str:
    return (inspect.getdoc(member) or "").partition("\n")[0].replace("`", "")


def _recipes() -> dict[str, str]:
    from laconic.recipe import shipped_recipes

    texts = {name: path.read_text(encoding="utf-8") for name, path in shipped_recipes().items()}
    return {name: text.partition("\n")[0].lstrip("# ") for name, text in texts.items()}


def _coders() -> dict[str, str]:
    from laconic.ship import coding

    found = {}
    for name in coding.CODERS:
        words = CODERS.get(name.removeprefix("gaps-"), "")
        what = "distances between ones" if name.startswith("gaps-") else "codes"
        found[name] = f"{what}, {words}"
    return found


def file_manifest(path: Path) -> Manifest:
    """Return the manifest of an artefact.

    Raises:
        ArtifactError: the file is damaged, or not laconic's.
    """
    from laconic.ship.container import read
    from laconic.ship.manifest import parse_manifest

    data, blobs = read(path)
    return parse_manifest(data, blobs, str(path))


def bytes_by_part(path: Path) -> dict[str, int]:
    """Return where the bytes of an artefact are: part -> bytes; they add up to the file.

    Raises:
        ArtifactError: the file is damaged, or not laconic's.
    """
    from laconic.ship import inspect as inventory

    found = inventory(path)
    return {
        "codes": found.code_bytes,
        "index": found.index_bytes,
        "tables": found.table_bytes,
        "dense": found.dense_bytes,
        "header": found.header_bytes,
    }


def tensor_rows(path: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Return one row per represented weight: what stands for it, and its bytes.

    Args:
        path: of the artefact.
        manifest: of the same file.
    """
    from laconic.ship import inspect as inventory
    from laconic.weights.representation import Representation

    layers = inventory(path).layers
    return [
        {
            "name": name,
            "shape": list(entry.shape),
            "representation": repr(_read(Representation, entry.representation)),
            "coders": _streams(entry),
            **dict(zip(("code_bytes", "index_bytes", "table_bytes"), layers[name], strict=True)),
        }
        for name, entry in manifest.tensors.items()
    ]


def _streams(entry: TensorEntry) -> dict[str, str]:
    return {
        name: f"{coder} {bits} bit" for name, (bits, coder, _, _) in sorted(entry.streams.items())
    }


def _read(family: type[Value], data: Any) -> Any:
    """Return the member of a family that a file names.

    Raises:
        ArtifactError: there is no such member.
    """
    try:
        return family.understood(data)
    except RecipeError as error:
        raise ArtifactError(f"the file names what laconic does not know: {error}") from None


def activation_rows(manifest: Manifest) -> list[dict[str, Any]]:
    """Return one row per module and way in which numbers that come to it are rounded.

    Args:
        manifest: of an artefact.
    """
    from laconic.weights.activations import Activation

    found: dict[tuple[str, Activation], list[str]] = {}
    for path, places in manifest.activations.items():
        for place, written in places.items():
            found.setdefault((path, _read(Activation, written)), []).append(place)
    return [
        {"name": path, "places": places, "activation": repr(activation), "bits": activation.bits}
        for (path, activation), places in found.items()
    ]


def widths(manifest: Manifest) -> dict[str, list[float]]:
    """Return the widths of codes of weights, embeddings and activations: W-E-A.

    Each ascending, of what is represented or rounded; [32] where nothing is. Embeddings are left
    out of a network that has none.

    Args:
        manifest: of an artefact.
    """
    found: dict[str, set[float]] = {kind: set() for kind in represented(manifest)}
    for name, entry in manifest.tensors.items():
        found[_kind(name, entry.shape)].add(_width(entry))
    found["activations"] = {float(row["bits"]) for row in activation_rows(manifest)}
    return {kind: sorted(each) or [float(FLOAT_BITS)] for kind, each in found.items()}


def represented(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """Return of how many weights and embeddings there are codes, and how many there are.

    Args:
        manifest: of an artefact.
    """
    coded = Counter(_kind(name, entry.shape) for name, entry in manifest.tensors.items())
    every = coded + Counter(
        _kind(name, shape)
        for dtype, shapes in manifest.dense.items()
        for name, shape in shapes.items()
        if "float" in dtype and len(shape) > 1
    )
    kinds = (WEIGHTS, EMBEDDINGS) if EMBEDDINGS in every else (WEIGHTS,)
    return {kind: (coded[kind], every[kind]) for kind in kinds}


def _kind(name: str, shape: Sequence[int]) -> str:
    """Return whether a tensor is of weights or of embeddings; a file says names, not kinds.

    An embedding is a table of rows whose module is called so, or took the place of one that is.
    """
    module = [part for part in module_of(name).split(".") if not part.isdigit()]
    table = len(shape) == 2 and re.search("embeddings?$", module[-1] if module else "")
    return EMBEDDINGS if table else WEIGHTS


def _width(entry: TensorEntry) -> float:
    """Return the bits of one weight's code; the widest where it has several."""
    from torch import Size

    from laconic.weights.representation import POSITION, Representation

    shape, representation = Size(entry.shape), _read(Representation, entry.representation)
    bits = (
        bits * representation.stream_shape(name, shape).numel() / max(shape.numel(), 1)
        for name, (bits, *_) in entry.streams.items()
        if name != POSITION
    )
    return max(bits, default=float(FLOAT_BITS))


def file_costs(path: Path, *, model: nn.Module | None, task: Task | None) -> dict[str, Any]:
    """Return what the network of an artefact costs and, with a task, scores.

    Args:
        path: of the artefact.
        model: the plain network, for a file whose builder is the user's own.
        task: gives the examples for metrics, multiply-accumulates and latency.

    Raises:
        ArtifactError: the file is damaged, or does not fit the model.
    """
    from laconic import costs
    from laconic.measure import forward_costs
    from laconic.ship import load

    network, manifest = load(path, model=model), file_manifest(path)
    parameters = list(network.parameters())
    plain = costs.float_bytes(network)
    parts = bytes_by_part(path)
    size = sum(parts.values())
    found: dict[str, Any] = {
        "widths": widths(manifest),
        "represented": represented(manifest),
        "size_bytes": size,
        **{f"{part}_bytes": amount for part, amount in parts.items()},
        "float_bytes": plain,
        "ratio": plain / size,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "nonzero": sum(int(parameter.count_nonzero()) for parameter in parameters),
    }
    if task is not None:
        metrics, forward = task.score(network), forward_costs(network, task)
        found["macs"] = forward.pop("counts")[costs.TOTAL]
        found |= forward | {"metrics": metrics}
    return found


def file_analyses(
    paths: Sequence[Path], *, model: nn.Module | None, task: Task, batches: int
) -> dict[str, Analysis]:
    """Return how the losses of artefacts' networks curve, and what bits do to the first's blocks.

    Args:
        paths: of the artefacts.
        model: the plain network, for files whose builder is the user's own.
        task: gives the loss, the scores and the examples.
        batches: of training examples.

    Raises:
        ArtifactError: a file is damaged, or does not fit the model.
        ModelError: the networks have other parts.
    """
    from laconic.cli.samples import glance
    from laconic.report import bit_sensitivity, eigenvalues
    from laconic.ship import load
    from laconic.weights.laid import copied

    stems = [path.stem for path in paths]
    names = stems if len({*stems}) == len(stems) else [str(path) for path in paths]
    networks = {}
    for name, path in zip(names, paths, strict=True):  # load fills the model it is given
        networks[name] = load(path, model=None if model is None else copied(model))
    for network in networks.values():
        glance(task).score(network)  # what does not fit the data is refused here
    drawn = list(itertools.islice(task.train.plain().batches(BATCH, seed=0), batches))
    curves = eigenvalues(networks, task, drawn)
    widths = {f"{bits} bit": bits for bits in WIDTHS}
    return {"eigenvalues": curves, "bits": bit_sensitivity(networks[names[0]], task, widths)}
