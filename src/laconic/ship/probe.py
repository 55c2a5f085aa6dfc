"""The probe: logits of seeded random inputs, to compare a network before and after."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from laconic.errors import ArtifactError
from laconic.machine import processor
from laconic.ship.container import digest
from laconic.ship.manifest import Probe
from laconic.tasks.task import call_model, evaluation
from laconic.weights.laid import copied

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["compare", "conditions", "take"]

EXAMPLES = 4
# Inputs of more numbers would take more memory than the file that asks for them.
LARGEST = 1 << 24

Shapes = tuple[tuple[int, ...], ...]


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
        task: tells the shapes of the inputs. Tokens and named inputs have no probe, because
            random numbers do not stand in for them.
    """
    shapes = _shapes(task)
    if shapes is None:
        return None
    found = _logits(_as_loaded(model), shapes, 0)
    return None if found is None else {"seed": 0, "shapes": shapes, "logits": found, **conditions()}


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
    try:
        found = _logits(_as_loaded(model), probe.shapes, probe.seed)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(f"{where}: the network cannot run the probe ({error})") from error
    if found != probe.logits:
        raise ArtifactError(f"{where}: the reloaded network gives other logits than the saved one")


def _shapes(task: Task) -> Shapes | None:
    """Return the shapes of inputs that random numbers can stand in for."""
    inputs = task.example_batch(EXAMPLES).inputs
    given = inputs if isinstance(inputs, tuple | list) else (inputs,)
    if task.call is not call_model or not all(
        isinstance(tensor, Tensor) and tensor.dtype == torch.float32 for tensor in given
    ):
        return None
    shapes = tuple(tuple(tensor.shape) for tensor in given)
    return shapes if sum(math.prod(shape) for shape in shapes) <= LARGEST else None


def _as_loaded(model: nn.Module) -> nn.Module:
    """Return the network as it will be loaded: in other places or layouts it adds up otherwise."""
    tensors = [*model.parameters(), *model.buffers()]
    if all(tensor.is_cpu and tensor.stride() == _stride(tensor) for tensor in tensors):
        return model
    moved = copied(model).cpu()
    for tensor in [*moved.parameters(), *moved.buffers()]:
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return moved


def _stride(tensor: Tensor) -> tuple[int, ...]:
    # Not is_contiguous: convolutions read the layout off the strides of dimensions of size 1 too.
    return torch.empty(tensor.shape, device="meta").stride()


def _logits(model: nn.Module, shapes: Shapes, seed: int) -> str | None:
    generator = torch.Generator("cpu").manual_seed(seed)
    inputs = [torch.randn(shape, generator=generator, device="cpu") for shape in shapes]
    with evaluation(model):
        outputs = model(*inputs)
    return digest(outputs) if isinstance(outputs, Tensor) else None
