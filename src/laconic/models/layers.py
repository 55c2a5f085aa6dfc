"""Layers as data: a module described in JSON, and built again from an allow-list."""

from __future__ import annotations

import importlib
import inspect
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import nn
from torch.nn.utils import parametrize

from laconic.errors import ModelError, nearest

__all__ = ["MISFIT", "OWN", "describe", "layer", "shown"]

# laconic's own layers: name in a file -> where the class is. Its constructor takes JSON, bounds
# what it loops over, and keeps its arguments in the plain attribute ``arguments``.
OWN: dict[str, str] = {
    "BlockDiagonalLinear": "laconic.models.factored:BlockDiagonalLinear",
    "BlockTermLinear": "laconic.models.factored:BlockTermLinear",
    "GhostConv2d": "laconic.models.ghosts:GhostConv2d",
    "GhostProjection": "laconic.models.ghosts:GhostProjection",
    "Halves": "laconic.models.halves:Halves",
    "Reorder": "laconic.models.factored:Reorder",
    "TTLinear": "laconic.models.factored:TTLinear",
    "UnpackedAttention": "laconic.models.attention:UnpackedAttention",
}

# A hostile file may ask for no more: sizes, levels of containers and of arguments, layers of one
# description, children of a container, letters of a word.
LARGEST = 1 << 24
DEEPEST, DEEPEST_ARGUMENT = 4, 12
MOST_LAYERS, LONGEST, LONGEST_WORD = 1024, 256, 64
SHOWN = 80
# What a constructor raises where its arguments do not fit each other.
MISFIT = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError),
    *(TypeError, ValueError),
)

Check = Callable[[Any], bool]


def _whole(low: int) -> Check:
    # An exact type: a JSON true is not a number here.
    return lambda value: type(value) is int and low <= value <= LARGEST


def _sizes(low: int) -> Check:
    one = _whole(low)
    return lambda value: (
        one(value)
        or (isinstance(value, list | tuple) and 1 <= len(value) <= 4 and all(map(one, value)))
    )


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= LARGEST


def _flag(value: Any) -> bool:
    return type(value) is bool


def _dimension(value: Any) -> bool:
    return type(value) is int and -8 <= value <= 8


def _word(*words: str) -> Check:
    return lambda value: isinstance(value, str) and value in words


def _or(*checks: Check) -> Check:
    return lambda value: any(check(value) for check in checks)


def _none(value: Any) -> bool:
    return value is None


SIZE, SIZES = _whole(1), _sizes(1)
CHANNELS: dict[str, Check] = {"in_channels": SIZE, "out_channels": SIZE}
WINDOW: dict[str, Check] = {"kernel_size": SIZES, "stride": SIZES, "padding": _sizes(0)}
CONVOLUTION: dict[str, Check] = {
    **CHANNELS,
    **WINDOW,
    "padding": _or(_sizes(0), _word("same", "valid")),
    "dilation": SIZES,
    "groups": SIZE,
    "bias": _flag,
    "padding_mode": _word("zeros", "reflect", "replicate", "circular"),
}
NORM: dict[str, Check] = {
    "num_features": SIZE,
    "eps": _number,
    "momentum": _or(_none, _number),
    "affine": _flag,
    "track_running_stats": _flag,
    "bias": _flag,
}
MAXIMUM: dict[str, Check] = {
    **WINDOW,
    "dilation": SIZES,
    "return_indices": _flag,
    "ceil_mode": _flag,
}
MEAN: dict[str, Check] = {**WINDOW, "ceil_mode": _flag, "count_include_pad": _flag}
INPLACE: dict[str, Check] = {"inplace": _flag}
CHANCE: dict[str, Check] = {"p": lambda value: _number(value) and 0 <= value <= 1, **INPLACE}

# Layers of torch.nn -> the arguments of the constructor that are kept; each is an attribute too.
# They are all but FIRST, which say how its first numbers are made.
LAYERS: dict[str, dict[str, Check]] = {
    "AdaptiveAvgPool1d": {"output_size": SIZES},
    "AdaptiveAvgPool2d": {"output_size": SIZES},
    "AvgPool1d": MEAN,
    "AvgPool2d": {**MEAN, "divisor_override": _or(_none, SIZE)},
    "BatchNorm1d": NORM,
    "BatchNorm2d": NORM,
    "Conv1d": CONVOLUTION,
    "Conv2d": CONVOLUTION,
    "Dropout": CHANCE,
    "Dropout2d": CHANCE,
    "ELU": {"alpha": _number, **INPLACE},
    "Embedding": {
        "num_embeddings": SIZE,
        "embedding_dim": SIZE,
        "padding_idx": _or(_none, _whole(0)),
        "max_norm": _or(_none, _number),
        "norm_type": _number,
        "scale_grad_by_freq": _flag,
        "sparse": _flag,
    },
    "Flatten": {"start_dim": _dimension, "end_dim": _dimension},
    "GELU": {"approximate": _word("none", "tanh")},
    "GroupNorm": {
        "num_groups": SIZE,
        "num_channels": SIZE,
        "eps": _number,
        "affine": _flag,
        "bias": _flag,
    },
    "Hardsigmoid": INPLACE,
    "Hardswish": INPLACE,
    "Identity": {},
    "LayerNorm": {
        "normalized_shape": SIZES,
        "eps": _number,
        "elementwise_affine": _flag,
        "bias": _flag,
    },
    "LeakyReLU": {"negative_slope": _number, **INPLACE},
    "Linear": {"in_features": SIZE, "out_features": SIZE, "bias": _flag},
    "MaxPool1d": MAXIMUM,
    "MaxPool2d": MAXIMUM,
    "PReLU": {"num_parameters": SIZE},
    "ReLU": INPLACE,
    "ReLU6": INPLACE,
    "SiLU": INPLACE,
    "Sigmoid": {},
    "Softmax": {"dim": _dimension},
    "Tanh": {},
}
FIRST = {"args", "kwargs", "device", "dtype", "init", "_weight", "_freeze"}
CONTAINERS: dict[str, type[nn.Module]] = {"ModuleList": nn.ModuleList, "Sequential": nn.Sequential}
# What a container is called must not hide what it has.
TAKEN = frozenset(dir(nn.Sequential()))


def describe(module: nn.Module) -> dict[str, Any]:
    """Return a module of allow-listed layers as JSON-able data; ``layer`` builds it again.

    Numbers of weights are no part of it, and neither is the mode; arguments at their defaults
    are left out.

    Args:
        module: a layer of torch.nn or laconic's own, or a Sequential or ModuleList of such.

    Raises:
        ModelError: a layer of another kind, or one that cannot be built from its arguments.

    >>> describe(nn.Sequential(nn.Linear(4, 2, bias=False), nn.ReLU()))
    {'Sequential': {'children': [{'Linear': {'in_features': 4, 'out_features': 2, 'bias': False}}, \
{'ReLU': {}}]}}
    """
    spec = _describe(module)
    _check(spec)
    return spec


def layer(spec: Mapping[str, Any]) -> nn.Module:
    """Return a new module from its description, in training mode.

    Nothing but the constructors of the allow-list runs; no argument may be absurd.

    Args:
        spec: what ``describe`` returned.

    Raises:
        ModelError: an unknown layer, an unknown, missing or absurd argument, or too many layers.

    >>> layer({"Linear": {"in_features": 4, "out_features": 2}})
    Linear(in_features=4, out_features=2, bias=True)
    """
    _check(spec)
    return _build(spec)


def _describe(module: nn.Module) -> dict[str, Any]:
    kind = parametrize.type_before_parametrizations(module)
    name = kind.__name__
    if kind is CONTAINERS.get(name):
        # Not named_children: a child that stands there twice is listed twice.
        children = {key: cast("nn.Module", child) for key, child in module._modules.items()}
        data: dict[str, Any] = {"children": [_describe(child) for child in children.values()]}
        if list(children) != [str(place) for place in range(len(children))]:
            data["names"] = list(children)
        return {name: data}
    own = {where: key for key, where in OWN.items()}.get(f"{kind.__module__}:{kind.__qualname__}")
    if own is not None:
        return {own: _plain(module.arguments)}
    if name not in LAYERS or kind is not getattr(nn, name):
        raise ModelError(
            f"{kind.__module__}.{kind.__qualname__} cannot be described in a file, which holds no "
            f"code; use layers of torch.nn ({', '.join(LAYERS)}) in a Sequential or a ModuleList"
        )
    return {name: _arguments(module, kind, name)}


def _arguments(module: nn.Module, kind: type[nn.Module], name: str) -> dict[str, Any]:
    found = {}
    for key, parameter in inspect.signature(kind).parameters.items():
        if key in FIRST or (key == "bias" and module.weight is None):  # an affine=False says it
            continue
        value = getattr(module, key, parameter.default)
        value = value is not None if key == "bias" else _plain(value)
        if value == _plain(parameter.default):
            continue
        if key not in LAYERS[name]:  # of a torch newer than this list
            raise ModelError(f"{name}: a file cannot keep {key}={shown(value)}")
        found[key] = value
    return found


def _plain(value: Any) -> Any:
    """Return JSON data with lists for tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _check(spec: Any) -> None:
    """Refuse a description before anything of it is built."""
    level, count = [spec], 0
    for _ in range(DEEPEST):
        count += len(level)
        if count > MOST_LAYERS:
            raise ModelError(f"a description has more than {MOST_LAYERS} layers")
        level = [child for item in level for child in _children(item)]
    if level:
        raise ModelError(f"a description nests containers deeper than {DEEPEST} levels")


def _children(spec: Any) -> Sequence[Any]:
    """Return the descriptions in a container after checking its own or a layer's arguments."""
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise ModelError(f"{shown(spec)} describes no layer; it is one name with its arguments")
    ((name, arguments),) = spec.items()
    known = [*LAYERS, *CONTAINERS, *OWN]
    if not isinstance(name, str) or name not in known:
        raise ModelError(f"no layer is called {shown(name)}{nearest(str(name)[:SHOWN], known)}")
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise ModelError(f"{name}: arguments must be a mapping, got {shown(arguments)}")
    if name in CONTAINERS:
        return _container(name, arguments)
    if name in OWN:
        _check_data(name, arguments, DEEPEST_ARGUMENT)
    else:
        _check_arguments(name, arguments)
    return []


def _container(name: str, arguments: Mapping[str, Any]) -> Sequence[Any]:
    children = arguments.get("children")
    names = arguments.get("names")
    if not isinstance(children, list) or not arguments.keys() <= {"children", "names"}:
        raise ModelError(f"{name}: a list 'children' is needed, got {shown(arguments)}")
    fitting = names is None or (
        isinstance(names, list)
        and len(names) == len(children) == len({str(key) for key in names})
        and all(isinstance(key, str) and key.isidentifier() for key in names)
        and all(len(key) <= LONGEST_WORD and key not in TAKEN for key in names)
    )
    if len(children) > LONGEST or not fitting or (names and name == "ModuleList"):
        raise ModelError(f"{name}: {len(children)} children cannot be called {shown(names)}")
    return children


def _check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    rules = LAYERS[name]
    for key, value in arguments.items():
        if key not in rules:
            raise ModelError(f"{name}: {shown(key)} is not an argument{nearest(key, rules)}")
        if not rules[key](value):
            raise ModelError(f"{name}: {key} {shown(value)} is out of bounds or of another type")


def _check_data(name: str, value: Any, levels: int) -> None:
    """Refuse what is no small JSON data."""
    if isinstance(value, Mapping | list):
        items = [*value, *value.values()] if isinstance(value, Mapping) else value
        if not levels or len(items) > 2 * LONGEST:
            raise ModelError(f"{name}: the arguments are too long or nest too deep")
        for item in items:
            _check_data(name, item, levels - 1)
    elif isinstance(value, str):
        if len(value) > LONGEST_WORD:
            raise ModelError(f"{name}: the argument {shown(value)} is too long")
    elif not (value is None or _flag(value) or _number(value)):
        raise ModelError(f"{name}: the argument {shown(value)} is out of bounds or no JSON")


def _build(spec: Mapping[str, Any]) -> nn.Module:
    ((name, arguments),) = spec.items()
    if name in CONTAINERS:
        made = [_build(child) for child in arguments["children"]]
        container = CONTAINERS[name]()
        for key, child in zip(
            arguments.get("names") or map(str, range(len(made))), made, strict=True
        ):
            container.add_module(key, child)
        return container
    kind: type[nn.Module] = _own(name) if name in OWN else getattr(nn, name)
    values = arguments if name in OWN else {key: _tuple(item) for key, item in arguments.items()}
    try:
        return kind(**values)
    except MISFIT as error:
        raise ModelError(
            f"{name} cannot be built from {shown(dict(arguments))} ({error})"
        ) from None


def _own(name: str) -> type[nn.Module]:
    module, _, kind = OWN[name].partition(":")
    found: type[nn.Module] = getattr(importlib.import_module(module), kind)
    return found


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def shown(value: Any) -> str:
    """Return a value as a message shows it: short, whatever it is."""
    # Not repr: what nests without end would end this process.
    return reprlib.repr(value)[:SHOWN]
