"""The probe: logits of seeded random inputs, to compare a network before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from laconic.errors import ArtifactError
from laconic.machine import processor
from laconic.ship.container import digest
from laconic.ship.manifest import Probe
from laconic.tasks.split import Batch
from laconic.tasks.task import call_model, evaluation
from laconic.weights.laid import as_stored, copied, is_stored

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["compare", "conditions", "take"]

EXAMPLES = 4
# Inputs of more numbers would take more memory than the file that asks for them.
LARGEST = 1 << 24
# What networks raise at inputs that they do not take.
UNFIT = (IndexError, RuntimeError, TypeError, ValueError)


def conditions() -> dict[str, Any]:
    """Return what logits depend on besides the network and its inputs."""
    kernels = torch.backends.cpu.get_cpu_capability()
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": f"{processor()}, {kernels}",
    }


def take(model: nn.Module, task: Task) -> dict[str, Any] | None:
    """Return the hash of a network's logits and how to compute them again.

    Args:
        model: unchanged.
        task: tells what the inputs are. Floats have normal random numbers for them, whole numbers,
            such as tokens, random ones up to the largest of some examples. There is no probe of a
            network that the task calls in a way of its own, or that does not answer these.
    """
    asked = _asked(task)
    if asked is None:
        return None
    try:
        found = _logits(_as_loaded(model), _drawn(**asked))
    except UNFIT:
        return None
    return None if found is None else {**asked, "logits": found, **conditions()}


def compare(probe: Probe, model: nn.Module, where: str) -> None:
    """Run a probe on a reloaded network.

    Args:
        probe: what the file says.
        model: as loaded.
        where: the file, for messages.

    Raises:
        ArtifactError: the logits are not those that were stored.
    """
    if sum(math.prod(shape) for shape in probe.shapes) > LARGEST:
        raise ArtifactError(f"{where}: the probe asks for inputs of absurd sizes")
    asked = probe.model_dump(include={"seed", "shapes", "names", "below"})
    try:
        found = _logits(_as_loaded(model), _drawn(**asked))
    except UNFIT as error:
        raise ArtifactError(f"{where}: the network cannot run the probe ({error})") from error
    if found != probe.logits:
        raise ArtifactError(f"{where}: the reloaded network gives other logits than the saved one")


def _asked(task: Task) -> dict[str, Any] | None:
    """Return what inputs random numbers are to stand in for."""
    inputs = task.example_batch(EXAMPLES).inputs
    names = tuple(inputs) if isinstance(inputs, Mapping) else ()
    given = tuple(inputs.values()) if names else inputs
    given = given if isinstance(given, tuple | list) else (given,)
    if task.call is not call_model or not all(map(_replaceable, given)):
        return None
    below = tuple(int(x.max()) + 1 if x.dtype == torch.int64 else 0 for x in given)
    asked: dict[str, Any] = {"seed": 0, "shapes": tuple(tuple(x.shape) for x in given)}
    asked |= ({"names": names} if names else {}) | ({"below": below} if any(below) else {})
    return asked if sum(math.prod(shape) for shape in asked["shapes"]) <= LARGEST else None


def _replaceable(given: Any) -> bool:
    """Return whether random numbers can stand in for an input."""
    if not isinstance(given, Tensor) or not given.numel():
        return False
    return given.dtype == torch.float32 or (given.dtype == torch.int64 and int(given.min()) >= 0)


def _drawn(
    seed: int, shapes: Sequence[Sequence[int]], names: Sequence[str] = (), below: Sequence[int] = ()
) -> Batch:
    """Return inputs that a probe asks for.

    Raises:
        ValueError: it does not say as many names, or bounds, as shapes.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = [
        torch.randint(high, tuple(shape), generator=generator, device="cpu")
        if high
        else torch.randn(tuple(shape), generator=generator, device="cpu")
        for shape, high in zip(shapes, below or [0] * len(shapes), strict=True)
    ]
    return Batch(dict(zip(names, drawn, strict=True)) if names else tuple(drawn))


def _as_loaded(model: nn.Module) -> nn.Module:
    """Return the network as it will be loaded: in other places or layouts it adds up otherwise."""
    tensors = [*model.parameters(), *model.buffers()]
    if all(tensor.is_cpu and is_stored(tensor) for tensor in tensors):
        return model
    return as_stored(copied(model).cpu())


def _logits(model: nn.Module, batch: Batch) -> str | None:
    with evaluation(model):
        outputs = call_model(model, batch)
    return digest(outputs) if isinstance(outputs, Tensor) else None
