"""Descent: parameters on their way down a loss, one update at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.errors import ChainError, ModelError, RunError
from laconic.names import module_of, plain_name
from laconic.recover.optimize import Optimizer, curvature_of
from laconic.step import State, Step
from laconic.weights.laid import Laid, laid_tensors, shifts_of
from laconic.weights.lookup import looked_up
from laconic.weights.quantize import planned
from laconic.weights.quantizer import Quantizer

__all__ = ["Descent", "autocast", "check_curvature", "check_numbers", "parameters_of"]


class Descent:
    """An optimiser at work, and all that follows its every update.

    Args:
        optimizer: how the parameters move.
        model: the network; what is laid on its weights follows.
        scope: the names of those of its modules where it does.
        networks: the parameters that move; the gradient of each list is clipped by itself.
        name: of the step, for messages.

    >>> from laconic.recover import SGD
    >>> layer = nn.Linear(1, 1, bias=False)
    >>> nn.init.ones_(layer.weight).shape
    torch.Size([1, 1])
    >>> descent = Descent(SGD(0.1), layer, [""], networks=[[layer.weight]], name="train")
    >>> descent.update(lambda: layer.weight.square().sum(), 0.0, "here")
    1.0
    >>> round(layer.weight.item(), 6)
    0.8
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        scope: Collection[str],
        *,
        networks: Sequence[Sequence[nn.Parameter]],
        name: str,
    ) -> None:
        self.value, self.model, self.scope, self.name = optimizer, model, scope, name
        self.networks = networks
        self.parameters = [*itertools.chain.from_iterable(networks)]
        check_numbers(name, self.parameters)
        self.optimizer = optimizer.build(self.parameters, _learned(model), shifts_of(model))

    def update(self, loss: Callable[[], Tensor], done: float, where: str) -> float:
        """Take one step down a loss and return what it was.

        Args:
            loss: computes it, a scalar.
            done: share of all updates that are taken.
            where: this one is, for a message.

        Raises:
            RunError: the loss is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.value.decay.factor(done)
        # Cached, a laid weight is decoded once for forward and penalty; it is stale afterwards.
        with parametrize.cached(), looked_up(self.model):
            found = loss()
        value = found.item()
        if done == 0 and not math.isfinite(value):
            raise RunError(
                f"{self.name}: the loss is {value} {where}, before anything was learned; look for "
                "numbers that are not finite in the network's weights and in the data"
            )
        self.refuse(value, where)
        self.optimizer.zero_grad()
        found.backward(inputs=self.parameters)
        for parameter in self.parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()  # few optimisers take it as it is
        if self.value.clip is not None:
            for parameters in self.networks:
                nn.utils.clip_grad_norm_(parameters, self.value.clip)
        self.optimizer.step()
        for laid, latent in self.laid().items():
            asked = "curvature" in laid.representation.needs
            laid.update(curvature_of(self.optimizer, latent) if asked else None)
        with torch.no_grad():
            for name, module in self.model.named_modules():
                if isinstance(module, Quantizer) and name in self.scope:
                    module.activation.update(module.state)
        return value

    def laid(self) -> dict[Laid, Tensor]:
        """Return what is laid on the weights of the scope, once where they are tied, and these."""
        return {
            layer: latent
            for name, (layer, latent) in laid_tensors(self.model).items()
            if name.rpartition(".")[0] in self.scope
        }

    def refuse(self, loss: float, where: str) -> None:
        """Stop at a loss that is not finite."""
        if not math.isfinite(loss):
            raise RunError(
                f"{self.name}: the loss is {loss} {where}; lower the learning rate "
                f"({self.value.lr:g}) or clip the gradient"
            )

    def finish(self) -> None:
        """Leave no gradient behind."""
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """Return what the optimiser remembers, by ``index/key``."""
        return {
            f"{index}/{key}": torch.as_tensor(value)
            for index, slots in self.optimizer.state_dict()["state"].items()
            for key, value in slots.items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Remember again what ``tensors`` returned.

        Raises:
            RunError: it is not of these parameters.
        """
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            index, _, key = name.partition("/")
            slots.setdefault(int(index), {})[key] = tensor
        self._refuse_misfit(slots)
        current = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": slots, "param_groups": current["param_groups"]})

    def _refuse_misfit(self, slots: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Stop where a checkpoint's moments are not of these parameters: torch does not look."""
        moved: list[Any] = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, kept in slots.items():
            shapes = {tensor.shape for key, tensor in kept.items() if key != "step"}
            if index >= len(moved) or not shapes <= {moved[index].shape}:
                raise RunError(
                    f"{self.name}: the moments in the checkpoint are not those of these "
                    "parameters; resume with the network that the run began with"
                )


def parameters_of(model: nn.Module, selected: Collection[str]) -> list[nn.Parameter]:
    """Return the parameters of modules, in an order that laying a weight does not change.

    One that several modules share belongs to each of them.

    Args:
        model: the network.
        selected: names of its modules.

    >>> [tuple(p.shape) for p in parameters_of(nn.Sequential(nn.Linear(2, 3)), ["0"])]
    [(3,), (3, 2)]
    """
    found: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if module_of(name) in selected:
            plain = plain_name(name)
            found[parameter] = min(plain, found.get(parameter, plain))
    return sorted(found, key=lambda parameter: found[parameter])


def check_numbers(step: str, parameters: Iterable[nn.Parameter]) -> None:
    """Refuse to move parameters in float16, where small updates and Adam's epsilon are zero.

    Raises:
        ModelError: a parameter is float16.

    >>> check_numbers("train", nn.Linear(1, 1).parameters())
    """
    if any(parameter.dtype == torch.float16 for parameter in parameters):
        raise ModelError(
            f"{step}: the weights are float16, in which an optimiser's small numbers become zero; "
            "call model.float(), and let precision: auto compute in fewer bits where that is faster"
        )


def _learned(model: nn.Module) -> set[nn.Parameter]:
    """Return what representations of weights and activations learn."""
    holders = (module for module in model.modules() if isinstance(module, Laid | Quantizer))
    return {parameter for module in holders for parameter in module.parameters()}


def check_curvature(
    step: Step, optimizer: Optimizer, model: nn.Module, earlier: tuple[Step, ...] = ()
) -> None:
    """Refuse an optimiser without a second moment where a representation needs one.

    Raises:
        ChainError: a weight of the step's scope is, or will be, stored so.
    """
    if optimizer.second_moment:
        return
    for name, representation in planned(model, step.scope, earlier):
        if "curvature" in representation.needs:
            raise ChainError(
                f"{step.name} with {optimizer.name} after quantize ({representation.name}) at "
                f"'{name}': that needs Adam's second moment of the weight; use adam or adamw"
            )


def autocast(state: State) -> torch.autocast:
    """Return what forwards in training run under."""
    low = state.precision == "bfloat16"
    return torch.autocast(state.device.split(":")[0], torch.bfloat16, enabled=low)
