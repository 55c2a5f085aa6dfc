"""Checkpoints: the artefact's container with latent floats in place of codes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.errors import ArtifactError, LaconicError, RunError
from laconic.names import below, latent_name
from laconic.ship.container import raw_bytes, read, write
from laconic.step import State
from laconic.structure.surgery import apply_edits_, edits_of
from laconic.weights.laid import bake, laid_tensors, latent_of, lay, tie_, ties_of
from laconic.weights.quantizer import activations_data, attach_data_
from laconic.weights.representation import Representation

__all__ = ["load_checkpoint", "model_hash", "save_checkpoint"]

FIELDS = ("edits", "ties", "activations", "laid", "frozen", "position", "counters", "run")
MODEL, TRAINING = "model/", "training/"
# What arises where a checkpoint is of another network.
MISFIT = (LaconicError, AttributeError, KeyError, RuntimeError, TypeError, ValueError)


def save_checkpoint(
    state: State, training: dict[str, Any], path: Path, *, run: dict[str, Any]
) -> None:
    """Write all a run needs to continue from here; the old checkpoint stays until it is whole.

    Args:
        state: model, position; history goes into ``run``.
        training: what the training loop asked to keep: counters and named tensors.
        path: of the checkpoint.
        run: JSON-able facts of the run (step, history, hashes).
    """
    laid = {
        name: {
            "representation": layer.representation.to_data(),
            "masked": layer.mask is not None,
            "state": list(layer.names),
            "place": place,
        }
        for place, (name, (layer, _)) in enumerate(laid_tensors(state.model).items())
    }
    tensors = {f"{MODEL}{name}": tensor for name, tensor in state.model.state_dict().items()}
    tensors |= {f"{TRAINING}{name}": t for name, t in training.get("tensors", {}).items()}
    counters = training.get("counters")
    edits, ties = edits_of(state.model), ties_of(state.model)
    frozen = [name for name, p in _parameters(state.model) if not p.requires_grad]
    activations = activations_data(state.model)
    parts = (edits, ties, activations, laid, frozen, state.position, counters, run)
    write(path, dict(zip(FIELDS, parts, strict=True)), tensors)


def load_checkpoint(state: State, path: Path) -> dict[str, Any]:
    """Bring a state to where a checkpoint was written and return the facts of the run.

    Args:
        state: holds the plain network as it was before the first step; changed in place.
        path: of the checkpoint.

    Raises:
        RunError: it does not fit the network.
        ArtifactError: it is damaged, or no checkpoint.
    """
    manifest, tensors = read(path)
    if manifest.keys() != set(FIELDS) or not isinstance(manifest["run"], dict):
        raise ArtifactError(f"{path}: no checkpoint of a run; laconic.load reads artefacts")
    model = below(MODEL, tensors)
    edits = manifest["edits"]
    try:
        bake(state.model)
        apply_edits_(state.model, edits, _shapes(edits, model))
        _cast(state.model, model)
        attach_data_(state.model, manifest["activations"])
        tie_(state.model, manifest["ties"])  # those of what rounds among them
        # In the order of before, which is that of the parameters of a module.
        laid = sorted(manifest["laid"].items(), key=lambda item: item[1]["place"])
        for name, kept in laid:
            _lay_again(state.model, name, kept, model)
        state.model.load_state_dict(model)
        for name, parameter in _parameters(state.model):
            parameter.requires_grad_(name not in manifest["frozen"])
        state.saved = [int(index) for index in manifest["position"]]
    except MISFIT as error:
        raise RunError(
            f"{path}: the checkpoint does not fit this network ({error}); resume with the network "
            "that the run began with"
        ) from None
    if manifest["counters"] is not None:
        tensors = below(TRAINING, tensors)
        state.training = {"counters": manifest["counters"], "tensors": tensors}
    run: dict[str, Any] = manifest["run"]
    return run


def _shapes(edits: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    """Return the shapes of what was resized, by the names that it has when nothing is laid."""
    found = {}
    for name in edits.get("shapes", ()):
        laid = latent_name(name)
        found[name] = list(tensors[laid if laid in tensors else name].shape)
    return found


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return model.named_parameters(remove_duplicate=False)


def _cast(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give what edits have put into a network the types that the kept numbers have."""
    for name, tensor in (*_parameters(model), *model.named_buffers()):
        kept = tensors.get(name, tensors.get(latent_name(name), tensor))
        if kept.dtype != tensor.dtype:
            tensor.data = tensor.data.to(kept.dtype)


def _lay_again(
    model: nn.Module, name: str, kept: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    latent = latent_name(name)
    prefix = f"{latent.removesuffix('original')}0."
    with torch.no_grad():  # what was resized holds no numbers yet, and laying reads them
        latent_of(model, name)[1].copy_(tensors[latent])
    lay(
        model,
        name,
        Representation.understood(kept["representation"]),
        mask=tensors[f"{prefix}mask"] if kept["masked"] else None,
        state={key: tensors[prefix + key] for key in kept["state"]},
    )


def model_hash(model: nn.Module) -> str:
    """Return the sha256 of a network's names, shapes and numbers."""
    running = hashlib.sha256()
    tensors = {name: each for name, each in model.state_dict().items() if torch.is_tensor(each)}
    for name, tensor in sorted(tensors.items()):
        running.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        running.update(raw_bytes(torch.atleast_1d(tensor)))
    return running.hexdigest()
