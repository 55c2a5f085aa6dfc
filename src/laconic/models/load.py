"""Where a network comes from: a recipe's ``model:`` line, or the builder in an artefact."""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.errors import ModelError, few, nearest
from laconic.models.layers import describe, layer
from laconic.models.notes import noted, noted_on
from laconic.models.rounding import round_input
from laconic.names import MANIFEST
from laconic.own import anchored_own, call_own, colon_hint, is_own, plain_own

__all__ = [
    "anchored_model",
    "artifact_of",
    "build",
    "builder_of",
    "custom",
    "layers_builder",
    "load_model",
]

# A hostile file must not cause a huge allocation: inclusive bounds of every number.
BOUNDS: dict[str, tuple[float, float]] = {
    "classes": (1, 100_000),
    "depth": (1, 1202),
    "growth": (1, 64),
    "image": (1, 1024),
    "width": (0.01, 4.0),
}
LONGEST_WORD = 40
# Where networks come from that are not ours, and how a recipe names them.
HUBS = {
    "hf": "a folder of Hugging Face: {hf: folder, num_labels: 2}",
    "timm": "a network of timm by its name: {timm: resnet18, num_classes: 10}",
    "torchvision": "one of torchvision: {torchvision: resnet18, num_classes: 10}",
}
# What goes on from a compressed network; its argument ``path`` names the file.
LOAD = "laconic:load"
SHOWN = 5
UNREADABLE = "cannot be read ({}); give a safetensors file with a state dict"


def build(builder: Mapping[str, Any]) -> nn.Module:
    """Return a new, untrained model from the builder noted in an artefact.

    Only functions that laconic.models lists are called, or classes of transformers, timm and
    torchvision on an allow-list, with arguments that stay within bounds.

    Args:
        builder: ``{"laconic": name, "arguments": {...}}``, ``{"layers": description}``, or as
            ``hub.build_hub`` takes it.

    Raises:
        ModelError: another kind of builder, an unknown name, or arguments out of bounds.
        MissingExtra: the package that it names is not installed.

    >>> len(build({"laconic": "resnet", "arguments": {"depth": 8, "classes": 3}}).layer1)
    1
    """
    if "custom" in builder:
        raise ModelError(
            f"the model was built by {str(builder['custom'])[:100]!r}, code that a file may not "
            "run; build it yourself and give it as model="
        )
    if not builder.keys().isdisjoint(HUBS):
        from laconic.models.hub import build_hub

        return build_hub(builder)
    if set(builder) == {"layers"}:
        return noted(layer(builder["layers"]), dict(builder))
    if set(builder) != {"laconic", "arguments"} or not isinstance(builder["arguments"], Mapping):
        raise ModelError(
            f"the builder has the keys {sorted(map(str, builder))[:SHOWN]}, not 'laconic' and "
            "'arguments'; the file is damaged or of another version"
        )
    return _call(_builder(builder["laconic"]), builder["laconic"], builder["arguments"])


def builder_of(model: nn.Module) -> dict[str, Any]:
    """Return how a network is built again: as noted on it, or else as its user's own.

    >>> builder_of(nn.ReLU())
    {'custom': 'torch.nn.modules.activation:ReLU'}
    """
    if note := noted_on(model):
        return dict(note["builder"])
    if parametrize.type_before_parametrizations(model).__module__.startswith("transformers."):
        from laconic.models.hub import hf_builder

        # Of a class that no file may name, or with a configuration of absurd sizes.
        with contextlib.suppress(ModelError):
            return hf_builder(model)
    return custom(model)


def layers_builder(model: nn.Module) -> dict[str, Any] | None:
    """Return the builder of a plain Sequential of torch's layers: all there is to it.

    None for another network, for one on which it is noted already how it is built, and where
    hooks or a forward of its own do what a description does not say.

    >>> layers_builder(nn.Sequential(nn.ReLU()))
    {'layers': {'Sequential': {'children': [{'ReLU': {}}]}}}
    >>> layers_builder(nn.ReLU()) is None
    True
    """
    if parametrize.type_before_parametrizations(model) is not nn.Sequential or noted_on(model):
        return None
    for module in model.modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        # What rounds an input is described apart.
        if any(hook is not round_input for hook in hooks) or "forward" in vars(module):
            return None
    try:
        return {"layers": describe(model)}
    except ModelError:
        return None


def custom(model: nn.Module) -> dict[str, Any]:
    """Return the builder of a network that only its user can build.

    >>> custom(nn.ReLU())
    {'custom': 'torch.nn.modules.activation:ReLU'}
    """
    kind = parametrize.type_before_parametrizations(model)
    return {"custom": f"{kind.__module__}:{kind.__qualname__}"}


def load_model(spec: Mapping[str, Any] | str, *, base: Path = Path()) -> nn.Module:
    """Return the model that the ``model:`` line of a recipe describes.

    ``lenet_5``, ``{resnet20: {weights: file.safetensors}}``, ``{hf: folder, task: base}``,
    ``{timm: resnet18, num_classes: 10}``, ``{torchvision: resnet18}`` or
    ``{"package.module:function": {...}}``, whose function returns the model. The option
    ``weights`` names a safetensors file, with a state dict or a network that was compressed; the
    others are arguments.

    Args:
        spec: the name of a model, and its options.
        base: folder of the recipe; a relative path starts there, and a function's module is
            looked for there first.

    Raises:
        ModelError: an unknown model or option, a module that cannot be imported, or weights that
            are missing, do not fit or are not finite.
        MissingExtra: the package that it names is not installed.

    >>> load_model({"resnet": {"depth": 8}}, base=Path()).laconic["builder"]["arguments"]
    {'depth': 8, 'classes': 10}
    """
    given = {spec: None} if isinstance(spec, str) else dict(spec)
    hub = next((key for key in HUBS if key in given), None)
    if hub is not None:
        from laconic.models.hub import from_hub

        name, weights = given.pop(hub), given.pop("weights", None)
        return _weighted(from_hub(hub, name, given, base), hub, base, weights)
    if len(given) != 1:
        raise ModelError(
            f"model: one name with its options is needed, got {list(given)}; write "
            "{resnet20: {weights: file.safetensors}}"
        )
    ((name, options),) = given.items()
    if options is not None and not isinstance(options, Mapping):
        raise ModelError(
            f"model: {name}: options must be a mapping, got {options!r}; write "
            f"{{{name}: {{weights: file.safetensors}}}}"
        )
    arguments = dict(options or {})
    weights = arguments.pop("weights", None)
    if is_own(name):
        arguments = _moved(str(name), arguments, base)
        return _weighted(_custom(str(name), arguments, base), str(name), base, weights)
    if hint := _file_hint(name) or colon_hint(name):
        raise ModelError(f"no model is called '{name}'{hint}")
    model = _call(_builder(name), name, arguments)
    return _weighted(model, str(name), base, weights)


def anchored_model(spec: dict[str, Any] | str, base: Path) -> dict[str, Any] | str:
    """Return a ``model:`` line that says the same wherever it stands.

    Its paths are absolute, and a function's module comes with its folder.

    Args:
        spec: as for ``load_model``, which takes it.
        base: folder where its relative paths start.

    >>> anchored_model({"resnet20": {"weights": "a.safetensors"}}, Path("/nets"))
    {'resnet20': {'weights': '/nets/a.safetensors'}}
    """
    if isinstance(spec, str):
        return anchored_own(spec, base) if is_own(spec) else spec
    paths = {"weights", "hf"}
    return {
        anchored_own(key, base) if is_own(key) else key: _anchored(value, base)
        if key in paths
        else _moved(key, value, base)
        for key, value in spec.items()
    }


def _moved(name: str, options: Any, base: Path) -> Any:
    """Return the options of a network with the path among them absolute."""
    option = "path" if name == LOAD else "weights"
    if not isinstance(options, Mapping) or option not in options:
        return options
    return {**options, option: _anchored(options[option], base)}


def _anchored(path: Any, base: Path) -> str | None:
    return None if path is None else str((base / str(path)).absolute())


def _file_hint(name: str) -> str:
    if not name.endswith(".safetensors"):
        return ""
    return (
        f'; a compressed network is {{"laconic:load": {{path: {name}}}}}, a state dict '
        f"{{resnet20: {{weights: {name}}}}}"
    )


def artifact_of(line: Any, base: Path) -> Path | None:
    """Return the compressed network that a recipe's ``model:`` line goes on from, if it does.

    Args:
        line: as for ``load_model``.
        base: folder where its relative paths start.

    >>> artifact_of({"laconic:load": {"path": "model.safetensors"}}, Path("runs"))
    PosixPath('runs/model.safetensors')
    """
    given = line if isinstance(line, Mapping) else {}
    loaded = given.get(LOAD)
    if isinstance(loaded, Mapping) and "path" in loaded:
        return base / str(loaded["path"])
    options = given if "weights" in given else next(iter(given.values()), None)
    weights = options.get("weights") if isinstance(options, Mapping) else None
    if isinstance(weights, str) and _is_compressed(base / weights):
        return base / weights
    return None


def _weighted(model: nn.Module, name: str, base: Path, weights: Any) -> nn.Module:
    if weights is None:
        return model
    if not isinstance(weights, str | Path):
        raise ModelError(f"model: {name}: 'weights' must be a path, got {weights!r}")
    if _is_compressed(base / weights):
        return _custom(LOAD, {"path": base / weights, "model": model}, base)
    _load_weights_(model, base / weights)
    return model


def _is_compressed(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return MANIFEST in (file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ModelError(f"weights {path}: {UNREADABLE.format(error)}") from error


def _load_weights_(model: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"weights {path}: {UNREADABLE.format(error)}") from error
    _check_state(path, state, model.state_dict())
    model.load_state_dict(state)


def _check_state(path: Path, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    lists = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "of another shape": [
            f"{name} {list(state[name].shape)}, not {list(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    problems = [f"{kind}: {few(names, SHOWN)}" for kind, names in lists.items() if names]
    if problems:
        raise ModelError(
            f"weights {path} do not fit the model; {'; '.join(problems)}: use the model they were "
            "trained for, or rename them"
        )
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"weights {path}: '{name}' holds NaN or infinite values; the training diverged or "
                "the file is damaged: use another checkpoint"
            )


def _builder(name: Any) -> Callable[..., nn.Module]:
    from laconic import models

    if name not in models.BUILDERS:
        word = str(name)[:LONGEST_WORD]
        raise ModelError(f"no model is called '{word}'{nearest(word, models.BUILDERS)}")
    function: Callable[..., nn.Module] = getattr(models, name)
    return function


def _call(function: Callable[..., nn.Module], name: str, arguments: Mapping[str, Any]) -> nn.Module:
    known = typing.get_type_hints(function)
    known.pop("return")
    for key, value in arguments.items():
        word = str(key)[:LONGEST_WORD]
        if key not in known:
            raise ModelError(
                f"{name}: '{word}' is not an option{nearest(word, [*known, 'weights'])}"
            )
        # An exact type: a JSON true is not a number here.
        kinds = {known[key], *typing.get_args(known[key])}
        if type(value) not in kinds | ({int} if float in kinds else set()):
            raise ModelError(
                f"{name}: {key} {str(value)[:LONGEST_WORD]!r} is a {type(value).__name__}; "
                f"give {typing.get_args(known[key]) or known[key].__name__}"
            )
        number = isinstance(value, int | float)
        low, high = BOUNDS[key] if number else (0, LONGEST_WORD)
        size = value if number else len(value)
        if not low <= size <= high:
            shown = str(value)[:LONGEST_WORD]
            raise ModelError(f"{name}: {key} {shown} is out of bounds; choose {low} to {high}")
    return function(**arguments)


def _custom(name: str, arguments: Mapping[str, Any], base: Path) -> nn.Module:
    model = call_own("model", name, arguments, base=base, refusal=ModelError)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model: {name!r} returned {type(model).__name__}, not an nn.Module")
    # laconic:load notes how the network of a file is built again, and what was edited of it.
    plain = plain_own(name)
    ours = plain.partition(":")[0].partition(".")[0] == "laconic"
    return model if ours else noted(model, {"custom": plain})
