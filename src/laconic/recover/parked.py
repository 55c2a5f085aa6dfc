"""Weights that nothing needs for a while wait in memory-mapped files."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from laconic.errors import RunError

__all__ = ["parked"]


@contextmanager
def parked(networks: Mapping[nn.Module, Collection[str]], folder: Path) -> Iterator[None]:
    """Keep what networks hold outside of some modules in files, inside a with block.

    It can be read there all the same, on the host, as slowly as the disk is; what is written to
    it in the meantime is kept. In the end all is where it was.

    Args:
        networks: each with the names of the modules whose weights stay where they are.
        folder: that may hold the files.

    Raises:
        RunError: the disk does not take them.

    >>> import tempfile
    >>> network = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    >>> with tempfile.TemporaryDirectory() as place, parked({network: {"0"}}, Path(place)):
    ...     sorted(path.name for path in Path(place).iterdir())
    ['0.safetensors', '1.safetensors']
    """
    away: list[tuple[Tensor, torch.device]] = []
    try:
        for network, names in networks.items():
            for tensor in _elsewhere(network, names):
                path = folder / f"{len(away)}.safetensors"
                _write(tensor, path)
                away.append((tensor, tensor.device))
                tensor.data = load_file(path)["tensor"]
        yield
    finally:
        for tensor, device in away:
            tensor.data = tensor.data.clone().to(device)


def _elsewhere(network: nn.Module, names: Collection[str]) -> list[Tensor]:
    """Return the parameters and buffers that other modules hold, and none of these."""
    found: dict[int, Tensor] = {}
    kept: set[int] = set()
    for name, module in network.named_modules(remove_duplicate=False):
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if name in names:
                kept.add(id(tensor))
            else:
                found[id(tensor)] = tensor
    return [tensor for key, tensor in found.items() if key not in kept]


def _write(tensor: Tensor, path: Path) -> None:
    try:
        save_file({"tensor": tensor.detach().cpu().contiguous()}, path)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"reconstruct: the weights of the other parts cannot be kept in {path.parent} "
            f"({error}); make room, or give a run directory on a larger disk (TMPDIR names the "
            "place where there is none)"
        ) from error
