"""What enters the layers of both networks, computed from the nearest block whose input is kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.errors import ModelError
from laconic.models.capture import blocks_of, padding_mask, refuse_tokens_first
from laconic.recover.parts import Part, check_chain
from laconic.recover.quadratic import Fitted, Moments, is_fitted
from laconic.recover.stream import Flow, Stored
from laconic.step import State
from laconic.tasks import Task
from laconic.tasks.split import tensors_in
from laconic.tasks.task import device_of, evaluation, full_precision, needed

__all__ = ["Inflow", "Pair", "calls_of"]

SUMMED = 64  # examples at once while what enters a layer is summed up


@dataclass(frozen=True)
class Pair:
    """The same layer of both networks, and how often a forward calls it."""

    teacher: Fitted
    student: Fitted
    calls: int


def calls_of(task: Task, model: nn.Module, paths: Iterable[str]) -> Counter[str]:
    """Return how often a forward calls layers, in the order of first calls.

    Args:
        task: knows how the network is called.
        model: the network.
        paths: of modules; those that are no layers, or not there, are passed over.

    Raises:
        FeatureError: padded texts enter one tokens first.

    >>> from laconic.models import digits_cnn
    >>> from laconic.tasks import digits
    >>> list(calls_of(digits(), digits_cnn(), ["relu", "fc1", "conv2"]))
    ['conv2', 'fc1']
    """
    calls: Counter[str] = Counter()
    modules = dict(model.named_modules())
    batch = task.example_batch(2).to(device_of(model))
    mask = padding_mask(batch)
    with ExitStack() as stack:
        for path in paths:
            module = modules.get(path)
            if is_fitted(module):

                def count(_: nn.Module, inputs: Any, named: Any, path: str = path) -> None:
                    refuse_tokens_first(path, next(tensors_in((inputs, named))), mask)
                    calls[path] += 1

                stack.enter_context(module.register_forward_pre_hook(count, with_kwargs=True))
        with evaluation(model):
            task.call(model, batch)
    return calls


class Inflow:
    """Runs both networks up to a layer, for every training example.

    Where the blocks of both form a chain, what enters a block is kept on disk, and a layer is
    reached from there: all layers together cost a few forwards, however deep the networks are.

    Args:
        state: its model, its first teacher and its task.
        folder: that may hold features.
    """

    def __init__(self, state: State, folder: Path) -> None:
        self.state, self.folder = state, folder
        self.task = needed(state.task, "reconstruct needs examples")
        self.networks = state.teacher[0].to(state.device), state.model
        self.blocks = _names_of_blocks(self.networks, self.task)
        self.place = 0
        self.kept: Stored | None = None

    def moments(self, path: str, pair: Pair) -> Moments:
        """Return the moments of what enters a layer as the networks are now.

        Args:
            path: of the layer; not before that of an earlier call in a forward.
            pair: the layer in both.

        Raises:
            ModelError: not all examples enter the layer, or not the same in both networks.
        """
        place = self._block(path)
        if place is not None:
            self._advance(place)
        moments = Moments(pair.teacher, pair.student)
        layers = pair.teacher, pair.student
        with self._still():
            for flow in self._flows() if place is not None else self._batches():
                fed = (flow.teacher, flow.student)
                taught, own = (
                    _entering(layer, pair.calls, self._run(network, each, flow, place))
                    for network, layer, each in zip(self.networks, layers, fed, strict=True)
                )
                _check_routes(path, pair, taught, own, flow.teacher)
                for other, tensor in zip(taught, own, strict=True):
                    moments.add(other, tensor, flow.beside.get("mask"))
        return moments

    def _run(
        self, network: nn.Module, fed: Any, flow: Flow, place: int | None
    ) -> Callable[[], object]:
        """Return what runs a network through the block of a layer, or all of it."""
        if place is None:
            return lambda: self.task.call(network, fed)
        part = Part(place, place + 1)
        return lambda: part.answer(network, self.task, fed, flow.beside)

    def _block(self, path: str) -> int | None:
        """Return in which block a layer is; None: in none that is known, or in several."""
        network = self.networks[1]
        layer = network.get_submodule(path)
        names = [n for n, each in network.named_modules(remove_duplicate=False) if each is layer]
        places = {self._place(name) for name in names}
        return places.pop() if len(places) == 1 else None

    def _place(self, name: str) -> int | None:
        """Return in which block a module of this name is."""
        places = (place for place, own in enumerate(self.blocks) if name.startswith(f"{own}."))
        return next(places, None)

    def _advance(self, place: int) -> None:
        """Keep what enters this block, with the blocks before it as they are now."""
        while self.place < place:
            part = Part(self.place, self.place + 1)
            with self._still():
                flows = (self._passed(part, flow) for flow in self._flows())
                kept = Stored(self.folder / str(part.stop), flows, self.state.device)
            if self.kept is not None:
                self.kept.close()
            self.place, self.kept = part.stop, kept

    def _passed(self, part: Part, flow: Flow) -> Flow:
        taught, own = (
            part.answer(network, self.task, fed, flow.beside)
            for network, fed in zip(self.networks, (flow.teacher, flow.student), strict=True)
        )
        return Flow(taught.outputs[-1], own.outputs[-1], taught.beside)

    def _flows(self) -> Iterator[Flow]:
        return self._batches() if self.kept is None else self.kept.each()

    def _batches(self) -> Iterator[Flow]:
        for batch in self.task.train.any_order(SUMMED, device=self.state.device):
            mask = padding_mask(batch)
            yield Flow(batch, batch, {} if mask is None else {"mask": mask})

    @contextmanager
    def _still(self) -> Iterator[None]:
        """Decode laid weights once for all batches."""
        teacher, student = self.networks
        with full_precision(teacher), full_precision(student):
            yield


def _names_of_blocks(networks: tuple[nn.Module, nn.Module], task: Task) -> list[str]:
    """Return the names of the blocks of both; none where they differ or form no chain."""
    names = []
    for network in networks:
        batch = task.example_batch(2).to(device_of(network))
        try:
            check_chain(network, task, batch)
        except ModelError:
            return []  # layers are then reached from the beginning
        paths = {module: path for path, module in network.named_modules()}
        names.append([paths[block] for block in blocks_of(network)])
    return names[0] if names[0] == names[1] else []


class _EnoughError(Exception):
    """The rest of a forward is not needed."""


def _check_routes(path: str, pair: Pair, taught: list[Tensor], own: list[Tensor], fed: Any) -> None:
    """Refuse a layer that some examples pass by, as experts: whose rows these are is not known."""
    # Of a linear layer all dimensions but the last, as tokens may come before examples.
    linear = isinstance(pair.student, nn.Linear)
    rows = [
        [math.prod(tensor.shape[:-1]) if linear else len(tensor) for tensor in found]
        for found in (taught, own)
    ]
    examples = len(fed) if isinstance(fed, Tensor) else fed.size
    # What is the same in both need not be of examples: a table of positions, say.
    fits = sum(rows[0]) % examples == 0 or all(map(torch.equal, taught, own))
    if rows[0] != rows[1] or not fits:
        raise ModelError(
            f"reconstruct: of {examples} examples, {rows[0]} rows enter '{path}' in the teacher "
            f"and {rows[1]} in the student: which ones depends on the data, so their answers "
            f"cannot be compared; leave it out of the scope with '!{path}'"
        )


def _entering(layer: nn.Module, calls: int, run: Callable[[], object]) -> list[Tensor]:
    """Return what enters a layer, rounded where it rounds, at every call of a forward."""
    found: list[Tensor] = []

    def take(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensor = next(tensors_in((inputs, named)))
        # What follows the first of several calls may change it in place.
        found.append(tensor if calls == 1 else tensor.clone())
        if len(found) == calls:
            raise _EnoughError

    with layer.register_forward_pre_hook(take, with_kwargs=True), suppress(_EnoughError):
        run()
    return found
