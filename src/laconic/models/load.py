"""Where a network comes from: a recipe's ``model:`` line, or the builder in an artefact."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from laconic.errors import ModelError, nearest

__all__ = ["build", "built", "load_model", "load_weights_"]

Model = TypeVar("Model", bound=nn.Module)

# A hostile file must not cause a huge allocation: inclusive bounds of every integer argument.
BOUNDS = {"depth": (1, 1202), "classes": (1, 100_000)}
LONGEST_WORD = 40
SHOWN = 5


def built(model: Model, name: str, **arguments: Any) -> Model:
    """Note on a model which laconic function builds it again; return the model.

    Args:
        model: its root gets one plain attribute, ``laconic``.
        name: of the function in laconic.models.
        **arguments: of the function; JSON values.

    >>> built(nn.Identity(), "lenet_5").laconic
    {'builder': {'laconic': 'lenet_5', 'arguments': {}}}
    """
    return _noted(model, {"laconic": name, "arguments": arguments})


def build(builder: Mapping[str, Any]) -> nn.Module:
    """Return a new, untrained model from the builder noted in an artefact.

    Only functions that laconic.models lists are called, with arguments that fit their signature
    and stay within bounds.

    Args:
        builder: ``{"laconic": name, "arguments": {...}}``.

    Raises:
        ModelError: another kind of builder, an unknown function, or arguments out of bounds.

    >>> len(build({"laconic": "resnet", "arguments": {"depth": 8, "classes": 3}}).layer1)
    1
    """
    if "custom" in builder:
        raise ModelError(
            f"the model was built by {str(builder['custom'])[:100]!r}, code that a file may not "
            "run; build it yourself and give it as model="
        )
    if set(builder) != {"laconic", "arguments"} or not isinstance(builder["arguments"], Mapping):
        raise ModelError(
            f"the builder has the keys {sorted(map(str, builder))[:SHOWN]}, not 'laconic' and "
            "'arguments'; the file is damaged or of another version"
        )
    return _call(_builder(builder["laconic"]), builder["laconic"], builder["arguments"])


def load_model(spec: Mapping[str, Any] | str, *, base: Path = Path()) -> nn.Module:
    """Return the model that the ``model:`` line of a recipe describes.

    ``lenet_5``, ``{resnet20: {weights: file.safetensors}}`` or
    ``{"package.module:function": {...}}``, whose function returns the model. The option
    ``weights`` names a safetensors file with a state dict; the others are arguments.

    Args:
        spec: the name of a model, and its options.
        base: folder of the recipe; a relative path starts there.

    Raises:
        ModelError: an unknown model or option, a module that cannot be imported, or weights that
            are missing, do not fit or are not finite.

    >>> load_model({"resnet": {"depth": 8}}, base=Path()).laconic["builder"]["arguments"]
    {'depth': 8, 'classes': 10}
    """
    given = {spec: None} if isinstance(spec, str) else dict(spec)
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
    custom = ":" in str(name)
    model = _custom(name, arguments) if custom else _call(_builder(name), name, arguments)
    if weights is not None:
        if not isinstance(weights, str | Path):
            raise ModelError(f"model: {name}: 'weights' must be a path, got {weights!r}")
        load_weights_(model, base / weights)
    return model


def load_weights_(model: nn.Module, path: Path) -> None:
    """Copy a state dict from a safetensors file into a model.

    Args:
        model: every one of its tensors must be in the file, with the same shape.
        path: the safetensors file.

    Raises:
        ModelError: the file cannot be read; names or shapes differ; a value is not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"weights {path}: cannot be read ({error}); give a safetensors file with a state dict"
        ) from error
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
    problems = [f"{kind}: {_shown(names)}" for kind, names in lists.items() if names]
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


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _noted(model: Model, builder: dict[str, Any]) -> Model:
    # nn.Module types its attributes as tensors or modules; this one is plain data.
    object.__setattr__(model, "laconic", {"builder": builder})
    return model


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
        if type(value) not in (known[key], *typing.get_args(known[key])):
            raise ModelError(
                f"{name}: {key} {str(value)[:LONGEST_WORD]!r} is a {type(value).__name__}; "
                f"give {typing.get_args(known[key]) or known[key].__name__}"
            )
        low, high = BOUNDS[key] if isinstance(value, int) else (0, LONGEST_WORD)
        size = value if isinstance(value, int) else len(value)
        if not low <= size <= high:
            shown = str(value)[:LONGEST_WORD]
            raise ModelError(f"{name}: {key} {shown} is out of bounds; choose {low} to {high}")
    return function(**arguments)


def _custom(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
        inspect.signature(function).bind(**arguments)
    except (ImportError, ValueError) as error:
        raise ModelError(
            f"model: '{module_name}' of {name!r} cannot be imported ({error}); install it or put "
            "its folder on PYTHONPATH"
        ) from error
    except (AttributeError, TypeError) as error:
        raise ModelError(
            f"model: {name!r} cannot be called with {dict(arguments)} ({error}); name a function "
            "that returns an nn.Module, and its arguments"
        ) from error
    model = function(**arguments)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model: {name!r} returned {type(model).__name__}, not an nn.Module")
    return _noted(model, {"custom": name})
