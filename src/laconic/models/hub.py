"""Networks of Hugging Face, timm and torchvision: from a folder or a name, and into a folder."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from laconic.errors import ModelError, few, nearest
from laconic.models.configs import (
    CLASSES,
    Class,
    as_data,
    check_config,
    class_name,
    class_of,
    config_of,
    described,
    field_names,
    known_fields,
    misfit,
    package,
    quiet,
    reason_of,
)
from laconic.models.families import SHAPE_ATTRIBUTES, Family, blocks_path, family_of
from laconic.models.layers import MISFIT, shown
from laconic.models.notes import noted
from laconic.models.rounding import quantizers_of

__all__ = ["build_hub", "from_hub", "hf", "hf_builder", "save_pretrained"]

logger = logging.getLogger(__name__)

ARGUMENTS = {"timm": ("in_chans", "num_classes"), "torchvision": ("num_classes",)}
ARGUMENT_BOUNDS = {"in_chans": (1, 1024), "num_classes": (1, 100_000)}

# Where these differ, a network computes something else.
COMPARED = SHAPE_ATTRIBUTES | {"scaling"}
MOST_SHOWN, LONGEST_WORD = 3, 80


def hf(
    path: str | Path,
    *,
    task: str | None = None,
    num_labels: int | None = None,
    attention: str | None = None,
) -> nn.Module:
    """Return a network from a Hugging Face folder, in evaluation mode and float32.

    Only ``config.json`` and safetensors files are read: no pickle, no code, no download. A head
    that the folder does not hold is drawn at random.

    Args:
        path: of the folder.
        task: "sequence-classification", "token-classification", "question-answering",
            "multiple-choice", "masked-lm", "image-classification" or "base"; None is
            classification.
        num_labels: how many classes; None: as many as the folder says. With another number than
            the folder's, the head is drawn anew.
        attention: "sdpa", the default, is fast; "eager" allows second derivatives.

    Raises:
        ModelError: no such folder, a family laconic does not know, or weights that do not fit.
        MissingExtra: transformers is not installed.

    >>> hf("nowhere")
    Traceback (most recent call last):
        ...
    laconic.errors.ModelError: nowhere/config.json: cannot be read; name a Hugging Face folder
    """
    folder = Path(path)
    data = _read_json(folder / "config.json")
    kind = class_of(class_name(folder, data, task))
    if attention is not None:
        data = {**data, "attn_implementation": attention}
    if num_labels is not None:
        data = {**data, "num_labels": num_labels, "id2label": None}
    config = config_of(kind, known_fields(kind, data))
    if not [*folder.glob("*.safetensors")]:
        raise ModelError(
            f"{folder} holds no safetensors file, and pickles are never read; save the network "
            "with transformers 4.35 or later"
        )
    model = _pretrained(kind, folder, config, another_head=num_labels is not None)
    return noted(model, hf_builder(model))


def hf_builder(model: nn.Module) -> dict[str, Any]:
    """Return how a Hugging Face network is built again: class and configuration.

    Nothing needs to be done with it: an artefact and the first edit note it by themselves.

    Args:
        model: of a class that laconic knows, its modules as the configuration says.

    Raises:
        ModelError: a class laconic does not know, or a configuration with absurd values.

    >>> hf_builder(nn.Linear(2, 2))
    Traceback (most recent call last):
        ...
    laconic.errors.ModelError: Linear is no class of transformers that a file may name
    """
    kind = parametrize.type_before_parametrizations(model)
    if kind.__name__ not in CLASSES or not kind.__module__.startswith("transformers.models."):
        raise ModelError(f"{kind.__name__} is no class of transformers that a file may name")
    config: Any = model.config
    data = as_data(config)
    check_config(data)
    return {"hf": described(kind, data)}


def from_hub(hub: str, name: Any, options: Mapping[str, Any], base: Path) -> nn.Module:
    """Return the network that a ``model:`` line names: ``{hf: folder}``, ``{timm: name}``, ...

    Args:
        hub: one of ``HUBS``.
        name: the folder, or what the package calls the network.
        options: the arguments.
        base: folder of the recipe; a relative path starts there.

    Raises:
        ModelError: an unknown name or option.
        MissingExtra: the package is not installed.
    """
    if not isinstance(name, str | Path):
        raise ModelError(f"model: {hub}: a name is needed, got {name!r}; write {{{hub}: name}}")
    if hub != "hf":
        return build_hub({hub: str(name), "arguments": dict(options)})
    known = [key for key in inspect.signature(hf).parameters if key != "path"]
    for key in options:
        if key not in known:
            raise ModelError(
                f"model: hf: '{key}' is not an option{nearest(str(key), [*known, 'weights'])}"
            )
    return hf(base / name, **options)


def build_hub(builder: Mapping[str, Any]) -> nn.Module:
    """Return a new network from the builder noted in an artefact.

    Args:
        builder: ``{"hf": {"class": name, "config": {...}, "defaults": {...}}}``,
            ``{"timm": name, "arguments": {...}}``, or the same with ``torchvision``.

    Raises:
        ModelError: an unknown name, or arguments that are unknown or out of bounds.
        MissingExtra: the package is not installed.
    """
    if set(builder) == {"hf"}:
        return _build_hf(builder["hf"])
    hub = next((key for key in ARGUMENTS if set(builder) == {key, "arguments"}), "")
    name, arguments = builder.get(hub), builder.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise ModelError(f"the builder {shown(dict(builder))} is none; the file is damaged")
    for key, value in arguments.items():
        if key not in ARGUMENTS[hub]:
            word = str(key)[:LONGEST_WORD]
            raise ModelError(f"{hub}: '{word}' is not an option{nearest(word, ARGUMENTS[hub])}")
        low, high = ARGUMENT_BOUNDS[key]
        if type(value) is not int or not low <= value <= high:
            raise ModelError(f"{hub}: {key} {shown(value)} is out of bounds: {low} to {high}")
    try:
        made = (_timm if hub == "timm" else _torchvision)(name, arguments)
    except MISFIT as error:
        raise ModelError(f"{hub} cannot build {shown(name)}: {reason_of(error)}") from error
    return noted(made, {hub: name, "arguments": dict(arguments)})


def _timm(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    timm = package("timm", "zoo")
    _check_name("timm", name, timm.list_models())
    made: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    return made


def _torchvision(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    models = package("torchvision", "zoo").models
    _check_name("torchvision", name, models.list_models())
    made: nn.Module = models.get_model(name, weights=None, **arguments)
    return made


def _check_name(hub: str, name: str, known: list[str]) -> None:
    if name not in known:
        word = name[:LONGEST_WORD]
        raise ModelError(f"{hub} has no network '{word}'{nearest(word, known)}")


def _build_hf(data: Any) -> nn.Module:
    if not isinstance(data, Mapping) or set(data) != {"class", "config", "defaults"}:
        raise ModelError("the builder 'hf' needs 'class', 'config' and 'defaults'")
    name, fields, defaults = data["class"], data["config"], data["defaults"]
    if not isinstance(name, str) or name not in CLASSES:
        raise ModelError(f"no class {shown(name)} may be built{nearest(str(name)[:64], CLASSES)}")
    if not isinstance(fields, Mapping) or not isinstance(defaults, Mapping):
        raise ModelError(f"{name}: the configuration must be a mapping, got {shown(fields)}")
    kind = class_of(name)
    names = field_names(kind)
    if not fields.keys() <= names:
        raise ModelError(
            f"{name} has no {shown(sorted(fields.keys() - names))} in the transformers that is "
            "installed; install the version that the file names"
        )
    # What a later version of the class has no more was at its default here.
    config = config_of(
        kind, {key: defaults[key] for key in defaults if key in names} | dict(fields)
    )
    with misfit(name):
        made = kind(config)
    return noted(made, {"hf": described(kind, as_data(config))})


def _pretrained(kind: Class, folder: Path, config: Any, *, another_head: bool) -> nn.Module:
    from safetensors import SafetensorError

    try:
        with quiet():
            model, found = kind.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                ignore_mismatched_sizes=another_head,
                output_loading_info=True,
            )
    except (*MISFIT, OSError, SafetensorError) as error:
        raise ModelError(
            f"{folder} does not hold a {kind.__name__} ({reason_of(error)}); give the task and "
            "num_labels that it was saved with"
        ) from error
    drawn = sorted({*found["missing_keys"], *(item[0] for item in found["mismatched_keys"])})
    wrong = [name for name in drawn if _is_base(kind, name)]
    if wrong:
        raise ModelError(f"{folder}: no weights of a {kind.__name__} for {few(wrong, MOST_SHOWN)}")
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{folder}: '{name}' holds NaN or infinite values; use another one")
    unused = sorted(found["unexpected_keys"])
    shown = (few(names, MOST_SHOWN) or "nothing" for names in (drawn, unused))
    logger.info("%s: drawn at random: %s; unused: %s", folder, *shown)
    result: nn.Module = model
    return result


def _is_base(kind: Class, name: str) -> bool:
    """Return whether a tensor belongs to the encoder, not to a head."""
    first, *rest = name.split(".")
    whole = kind.__name__.endswith("Model")
    return (whole or first == kind.base_model_prefix) and "pooler" not in (first, *rest)


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Write a baked network as an ordinary Hugging Face folder.

    It is read by ``transformers`` alone, so it can hold only what the class can express by its
    configuration: the same number of heads, neurons and hidden dimensions in every layer. The
    tokenizer's files are not part of it.

    Args:
        model: of a class that laconic knows; plain, its weights not laid.
        folder: to write; files of the same names are replaced.

    Raises:
        ModelError: the class cannot express the network, or the folder cannot be written.

    >>> save_pretrained(nn.Linear(2, 2), "folder")
    Traceback (most recent call last):
        ...
    laconic.errors.ModelError: Linear is no class of transformers that a file may name
    """
    builder = hf_builder(model)["hf"]
    name, config = builder["class"], builder["defaults"] | builder["config"]
    laid = [path for path, module in model.named_modules() if parametrize.is_parametrized(module)]
    if laid:
        raise ModelError(f"'{laid[0]}' is laid; bake the network first (Result.baked)")
    rounding = next(iter(quantizers_of(model)), None)
    if rounding is not None:
        raise _inexpressible(name, f"'{rounding}' rounds what flows into it")
    made = _expressed(model, name, config)
    made.load_state_dict(model.state_dict(), assign=True)
    made.tie_weights()
    if Path(folder).is_file():
        raise ModelError(f"{folder} cannot be written, it is a file; choose another folder")
    try:
        with quiet():
            made.save_pretrained(Path(folder))
    except OSError as error:
        raise ModelError(f"{folder} cannot be written ({error}); choose another folder") from error


def _expressed(model: nn.Module, name: str, config: dict[str, Any]) -> Any:
    """Return the class built on meta from the configuration that fits a network's shapes."""
    made = _empty(name, config)
    family = family_of(model)
    if family is not None:
        before, now = _sizes(made, family), _sizes(model, family)
        # No length at all: something else stands there, which is told below.
        changed = {
            kind: sizes for kind, sizes in now.items() if sizes != before[kind] and all(sizes)
        }
        if changed:
            made = _empty(name, config | _fields(name, family, now, changed))
    problems = _differences(model, made)
    if problems:
        raise _inexpressible(name, few(problems, MOST_SHOWN))
    return made


def _empty(name: str, config: dict[str, Any]) -> Any:
    kind = class_of(name)
    with torch.device("meta"), misfit(name), torch.random.fork_rng(devices=[]):
        return kind(config_of(kind, config))


def _inexpressible(name: str, reason: str) -> ModelError:
    return ModelError(
        f"{name} cannot express this network: {reason}; laconic.save keeps it as it is"
    )


def _sizes(model: nn.Module, family: Family) -> dict[str, list[int]]:
    """Return how long each kind of axis is, layer by layer."""
    blocks = list(model.get_submodule(blocks_path(model)).children())
    attention = [block.get_submodule(family.attention) for block in blocks]
    counted = {kind: attribute for attribute, kind in family.attributes.items()}
    return {
        "layer": [len(blocks)],
        "hidden": [_length(block, family.query, 1) for block in blocks],
        "neuron": [_length(block, family.inner, 0) for block in blocks],
        "head": [getattr(module, counted["head"]) for module in attention],
        "head_dim": [getattr(module, counted["head_dim"]) for module in attention],
    }


def _length(block: nn.Module, path: str, dimension: int) -> int:
    weight = getattr(block.get_submodule(path), "weight", None)
    return int(weight.shape[dimension]) if isinstance(weight, torch.Tensor) else 0


def _fields(
    name: str, family: Family, sizes: dict[str, list[int]], changed: dict[str, list[int]]
) -> dict[str, Any]:
    """Return the fields of a configuration that make axes as long as a network's are."""
    for kind, found in changed.items():
        if len(set(found)) > 1:
            listed = ", ".join(map(str, found))
            raise _inexpressible(name, f"{kind} differs between layers: {listed}")
    heads, size, hidden = (sizes[kind][0] for kind in ("head", "head_dim", "hidden"))
    free = "head_dim" in family.attributes
    if heads * size != hidden and not free:
        raise _inexpressible(
            name,
            f"{heads} heads of {size} are {heads * size} numbers, but its configuration makes "
            f"heads of hidden size / heads = {hidden} / {heads}",
        )
    fields = {field: changed[kind][0] for field, kind in family.config.items() if kind in changed}
    return fields | ({"head_dim": size} if free else {})


def _differences(model: nn.Module, made: nn.Module) -> list[str]:
    """Return in what a network is not as its class makes it."""
    own, other = model.state_dict(), made.state_dict()
    found = [f"no '{name}'" for name in other if name not in own]
    found += [f"'{name}' is another" for name in own if name not in other]
    found += [
        f"'{name}' is {list(own[name].shape)}, not {list(other[name].shape)}"
        for name in own
        if name in other and own[name].shape != other[name].shape
    ]
    modules = dict(model.named_modules())
    for path, module in made.named_modules():
        theirs = modules.get(path)
        if theirs is None or type(theirs) is not type(module):
            found.append(f"'{path}' is {type(theirs).__name__}, not {type(module).__name__}")
            continue
        found += [
            f"'{path}' has {key} {vars(theirs).get(key)}, not {value}"
            for key, value in vars(module).items()
            if key in COMPARED and vars(theirs).get(key) != value
        ]
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read; name a Hugging Face folder") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path}: is no configuration; name a Hugging Face folder")
    return data
