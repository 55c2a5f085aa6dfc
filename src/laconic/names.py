"""Names of tensors: what torch calls a laid weight, and what everyone else does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

__all__ = [
    "MANIFEST",
    "QUANTIZERS",
    "below",
    "joined",
    "latent_name",
    "module_of",
    "of_laid",
    "plain_name",
]

Held = TypeVar("Held")

# Where torch keeps what stands on a weight, below the module that owns it.
PARAMETRIZED = "parametrizations"
# Where a module keeps what rounds the numbers that flow into it.
QUANTIZERS = "quantizers"
ORIGINAL = "original"
# Where a safetensors file that is an artefact says so.
MANIFEST = "laconic"


def joined(path: str, name: str) -> str:
    """Return the dotted name of something in a module; the root has the empty path.

    >>> joined("layer.0", "weight"), joined("", "weight")
    ('layer.0.weight', 'weight')
    """
    return f"{path}.{name}" if path else name


def below(prefix: str, named: Mapping[str, Held]) -> dict[str, Held]:
    """Return what has a name that begins so, by the rest of its name.

    >>> below("model/", {"model/fc.weight": 1, "epoch": 2})
    {'fc.weight': 1}
    """
    return {n.removeprefix(prefix): each for n, each in named.items() if n.startswith(prefix)}


def latent_name(plain: str) -> str:
    """Return what the state dict calls the numbers below a laid weight.

    >>> latent_name("fc.weight")
    'fc.parametrizations.weight.original'
    """
    path, _, attribute = plain.rpartition(".")
    return joined(path, f"{PARAMETRIZED}.{attribute}.{ORIGINAL}")


def of_laid(name: str) -> bool:
    """Return whether a name of torch leads into what stands on a weight.

    >>> of_laid("fc.parametrizations.weight.0.mask"), of_laid("fc.weight")
    (True, False)
    """
    return PARAMETRIZED in name.split(".")


def plain_name(name: str) -> str:
    """Return a tensor's name, the same whether it is laid or not.

    >>> plain_name("fc.parametrizations.weight.original"), plain_name("fc.bias")
    ('fc.weight', 'fc.bias')
    >>> plain_name("fc.parametrizations.weight.0.mask")
    'fc.weight.0.mask'
    """
    if not of_laid(name):
        return name
    parts = name.split(".")
    parts.remove(PARAMETRIZED)
    return ".".join(parts).removesuffix(f".{ORIGINAL}")


def module_of(name: str) -> str:
    """Return the path of the module that owns a tensor, laid or not.

    >>> module_of("layer.fc.parametrizations.weight.original"), module_of("layer.fc.weight")
    ('layer.fc', 'layer.fc')
    """
    if not of_laid(name):
        return name.rpartition(".")[0]
    parts = name.split(".")
    return ".".join(parts[: parts.index(PARAMETRIZED)])
