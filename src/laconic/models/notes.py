"""Notes on a network: how it is built again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

__all__ = ["built", "noted", "noted_on"]

Model = TypeVar("Model", bound=nn.Module)


def built(model: Model, name: str, **arguments: Any) -> Model:
    """Note on a model which laconic function builds it again; return the model.

    Args:
        model: its root gets one plain attribute, ``laconic``.
        name: of the function in laconic.models.
        **arguments: of the function; JSON values.

    >>> built(nn.Identity(), "lenet_5").laconic
    {'builder': {'laconic': 'lenet_5', 'arguments': {}}}
    """
    return noted(model, {"laconic": name, "arguments": arguments})


def noted(model: Model, builder: dict[str, Any]) -> Model:
    """Note on a model how it is built again, and that nothing was edited; return the model."""
    # nn.Module types its attributes as tensors or modules; this one is plain data.
    object.__setattr__(model, "laconic", {"builder": builder})
    return model


def noted_on(model: nn.Module) -> Mapping[str, Any]:
    """Return what is noted on a model: ``builder`` and, if there are any, ``edits``; or nothing.

    >>> noted_on(nn.Identity()), noted_on(built(nn.Identity(), "lenet_5"))["builder"]["laconic"]
    ({}, 'lenet_5')
    """
    note = getattr(model, "laconic", None)
    return note if isinstance(note, Mapping) else {}
