"""The skeleton of an artefact: the empty network that its numbers fit, built and edited again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from laconic.errors import ArtifactError, LaconicError, ModelError
from laconic.models.layers import describe
from laconic.models.load import build
from laconic.names import of_laid
from laconic.ship.manifest import DTYPES, Manifest
from laconic.structure.surgery import apply_edits_, edits_of
from laconic.tasks.task import device_of
from laconic.weights.laid import copied, laid_tensors
from laconic.weights.quantizer import activations_data, attach_data_

__all__ = ["named_tensors", "rebuilds", "skeleton"]

SHOWN = 200
FIT = "pass load(path, model=...) the plain network as it was when it was saved"


def skeleton(path: Path, manifest: Manifest, model: nn.Module | None) -> nn.Module:
    """Return the network of a file with its edits done, ready to be filled.

    Args:
        path: of the file, for messages.
        manifest: of the file.
        model: the plain network to edit, for a file whose builder is the user's own; untouched
            unless the file fits it.

    Raises:
        ArtifactError: nothing may be built, or what is built does not fit the file.
    """
    if model is None:
        network = _built(path, manifest, torch.device("meta"))
        _check_fit(path, manifest, network)
        if _computed(network, manifest):
            # Only now, when the file is as large as the network that it asks for.
            whole = "hf" not in manifest.builder
            network = _built(path, manifest, torch.device("cpu") if whole else _Hollow())
    else:
        if laid_tensors(model):
            raise ArtifactError(f"{path}: pass a plain model, not one with laid weights")
        if activations_data(model) not in ({}, manifest.activations):
            raise ArtifactError(f"{path}: the model rounds its activations otherwise; {FIT}")
        if manifest.edits or manifest.activations or edits_of(model):
            tried = _edited(path, manifest, _hollow(model), torch.device("meta"))
            _check_fit(path, manifest, tried)
        else:
            _check_fit(path, manifest, model)
        network = _edited(path, manifest, model, device_of(model))
    _check_buffers(path, network, manifest)
    return network


def rebuilds(manifest: Manifest, model: nn.Module) -> bool:
    """Return whether builder and edits of a manifest make the network, which its numbers fit."""
    if "custom" in manifest.builder:
        return False
    try:
        network = _built(Path(), manifest, torch.device("meta"))
        _check_fit(Path(), manifest, network)
        # Of layers alone a network may be changed by hand, and another built all the same.
        return "layers" not in manifest.builder or _does(network) == _does(model)
    except LaconicError:
        return False


def _does(model: nn.Module) -> list[Any]:
    """Return what a network of described layers is, and how much its hooks add to that."""
    added = [
        (path, len(each._forward_hooks), len(each._forward_pre_hooks), "forward" in vars(each))
        for path, each in model.named_modules(remove_duplicate=False)
        if not of_laid(path)
    ]
    return [describe(model), added]


def named_tensors(model: nn.Module) -> set[str]:
    """Return every name of a parameter or buffer."""
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    return {name for name, _ in itertools.chain(parameters, buffers)}


class _Hollow(TorchFunctionMode):
    """Makes empty tensors on the meta device: parameters, not what a network computes.

    Hugging Face keeps position ids in buffers that no file holds, and drawing the numbers of a
    large network takes longer than reading them. Other packages fill empty buffers.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty and given.get("device") is None:
            given["device"] = torch.device("meta")
        return func(*args, **given)


def _built(path: Path, manifest: Manifest, where: torch.device | _Hollow) -> nn.Module:
    if "custom" in manifest.builder:
        raise ArtifactError(
            f"{path}: made from {str(manifest.builder['custom'])[:SHOWN]!r}, code that a file may "
            "not run; build the network yourself and pass load(path, model=...), on the command "
            "line --model package.module:function; a recipe goes on from it by model: "
            f"{{package.module:function: {{weights: {path}}}}}"
        )
    try:
        with torch.random.fork_rng(devices=[]), where:
            network = build(manifest.builder)
    except ModelError as error:
        raise ArtifactError(f"{path}: {error}") from None
    return _edited(path, manifest, network, where)


def _edited(
    path: Path, manifest: Manifest, network: nn.Module, where: torch.device | _Hollow
) -> nn.Module:
    edits = {} if manifest.edits is None else manifest.edits.to_data()
    shapes = {name: shape for name, (_, shape) in manifest.shapes().items()}
    try:
        with torch.random.fork_rng(devices=[]), where:
            apply_edits_(network, edits, shapes)
            attach_data_(network, manifest.activations)
    except ModelError as error:
        raise ArtifactError(f"{path}: the edits do not fit the network: {error}") from None
    return network


def _hollow(model: nn.Module) -> nn.Module:
    """Return a copy on the meta device, which costs nothing and can be edited on trial."""
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if not is_lazy(tensor):
            empty = tensor.detach().to("meta")
            learned = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if learned else empty
    return copied(model, memo)


def _check_fit(path: Path, manifest: Manifest, model: nn.Module) -> None:
    stored, wanted, named = manifest.shapes(), model.state_dict(), named_tensors(model)
    for name in sorted(wanted.keys() | stored.keys()):
        dtype, shape = stored.get(name, ("", ()))
        if name not in stored or name not in wanted:
            where = "model" if name in stored else "file"
            raise ArtifactError(f"{path}: {name!r} is not in the {where}; {FIT}")
        if name not in named or is_lazy(wanted[name]):
            raise ArtifactError(f"{path}: {name!r} cannot be filled in the model; {FIT}")
        if shape != wanted[name].shape:
            raise ArtifactError(
                f"{path}: {name!r} is {shape} in the file and {tuple(wanted[name].shape)} in the "
                f"model; {FIT}"
            )
        # Any floating-point number may stand in for another: a network may have been halved.
        kinds = (DTYPES[dtype], wanted[name].dtype)
        if len(set(kinds)) > 1 and not all(kind.is_floating_point for kind in kinds):
            raise ArtifactError(
                f"{path}: {name!r} is {kinds[0]} in the file and {kinds[1]} in the model; {FIT}"
            )


def _computed(model: nn.Module, manifest: Manifest) -> list[str]:
    """Return the buffers that no file holds because the network computes them itself."""
    stored = manifest.shapes()
    names = (name for name, _ in model.named_buffers(remove_duplicate=False))
    return [name for name in names if name not in stored]


def _check_buffers(path: Path, model: nn.Module, manifest: Manifest) -> None:
    for name in _computed(model, manifest):
        if model.get_buffer(name).is_meta:
            raise ArtifactError(
                f"{path}: the buffer {name!r} is not in the file and has no numbers in the model; "
                "build the model with its buffers on the CPU"
            )
