"""Parts: consecutive blocks of a network, run by themselves on what would enter them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from laconic.errors import ModelError, RecipeError
from laconic.models.capture import blocks_of, capture, padding_mask
from laconic.tasks.task import evaluation

if TYPE_CHECKING:
    from laconic.tasks import Batch, Task

__all__ = ["Answer", "Part", "check_chain", "even_parts", "modules_of", "own_blocks"]

FEATURE = "hidden_states"  # the name under which networks of Hugging Face hand on their feature


@dataclass(frozen=True)
class Answer:
    """What a part made of what entered it.

    Attributes:
        outputs: of its blocks in order, in the dtype they have; of the first part, what enters
            the first block stands before them.
        beside: what blocks are called with besides the feature: ``args``, ``named`` and, where
            tokens are padded, ``mask``.
    """

    outputs: list[Tensor]
    beside: Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """The blocks from ``start`` to before ``stop``; the first part has all before them too.

    Attributes:
        start: the first block, counted from 0.
        stop: the one after the last.

    >>> Part(0, 2).label, Part(2, 3).label
    ('blocks 1-2', 'block 3')
    """

    start: int
    stop: int

    @property
    def label(self) -> str:
        """Return which blocks these are, counted from 1."""
        if self.stop == self.start + 1:
            return f"block {self.stop}"
        return f"blocks {self.start + 1}-{self.stop}"

    def answer(self, network: nn.Module, task: Task, fed: Any, beside: Mapping[str, Any]) -> Answer:
        """Return what this part of a network makes of what enters it.

        Args:
            network: in the mode it is in.
            task: knows how the network is called.
            fed: the feature [batch, ...]; of the first part, a batch of the task.
            beside: of the part before; the first part finds it.

        Raises:
            FeatureError: a feature was changed in place after it was taken.

        >>> from laconic.models import resnet
        >>> from laconic.tasks import Batch, Task
        >>> images = torch.zeros(4, 3, 32, 32)
        >>> task = Task((images, torch.arange(4)), (images, torch.arange(4)))
        >>> first = Part(0, 1).answer(resnet(8).eval(), task, Batch((images,)), {})
        >>> [tuple(each.shape) for each in first.outputs]
        [(4, 16, 32, 32), (4, 16, 32, 32)]
        """
        first = self.start + 1 if self.start else 0
        names = [f"hidden.{place}" for place in range(first, self.stop + 1)]
        with capture(network, names) as features:
            blocks = blocks_of(network)[self.start : self.stop]
            if self.start:
                _run(blocks, fed, beside)
            else:
                beside = _begin(network, task, fed, blocks)
        return Answer([features[name] for name in names], beside)


def own_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network that each have their own weights.

    Raises:
        ModelError: there are none, or they are shared.

    >>> from laconic.models import resnet
    >>> len(own_blocks(resnet(8)))
    3
    """
    blocks, kind = blocks_of(network), type(network).__name__
    if not blocks:
        raise ModelError(
            f"reconstruct: {kind} has no list of blocks, so it has no parts but its layers; "
            "write parts: layer"
        )
    if len(set(blocks)) < len(blocks):
        raise ModelError(
            f"reconstruct: the layers of {kind} share one block, so its parts would move the same "
            "weights; train it as a whole with hidden, or write parts: layer"
        )
    return blocks


def even_parts(blocks: int, count: int) -> list[Part]:
    """Return so many parts of consecutive blocks, the larger ones first.

    Args:
        blocks: of the network.
        count: of parts.

    Raises:
        RecipeError: there are fewer blocks.

    >>> [part.label for part in even_parts(5, 3)]
    ['blocks 1-2', 'blocks 3-4', 'block 5']
    """
    if count > blocks:
        raise RecipeError(
            f"reconstruct: {count} parts were asked for, and the network has {blocks} blocks; "
            f"ask for at most {blocks}, or for 'layer'"
        )
    size, more = divmod(blocks, count)
    cuts = [place * size + min(place, more) for place in range(count + 1)]
    return [Part(*pair) for pair in itertools.pairwise(cuts)]


class _ReachedError(Exception):
    """The last block of the first part has returned."""


def _begin(network: nn.Module, task: Task, batch: Batch, blocks: list[nn.Module]) -> dict[str, Any]:
    """Run a network up to these blocks' end; return what else they were called with."""
    beside: dict[str, Any] = {}

    def note(block: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        beside.update(_beside(args, named))

    watched = blocks[0].register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    with watched, _stopped(blocks[-1]):
        task.call(network, batch)
    mask = padding_mask(batch)
    return beside if mask is None else beside | {"mask": mask}


@contextmanager
def _stopped(block: nn.Module) -> Iterator[None]:
    """End a with block when a block has returned."""

    def stop(*_: Any) -> None:
        raise _ReachedError

    with suppress(_ReachedError), block.register_forward_hook(stop):
        yield


def _run(blocks: list[nn.Module], feature: Tensor, beside: Mapping[str, Any]) -> None:
    for block in blocks:
        output = block(feature, *beside["args"], **beside["named"])
        feature = output if isinstance(output, Tensor) else output[0]


def _beside(args: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a block is called with but for its feature."""
    rest = {name: value for name, value in named.items() if args or name != FEATURE}
    return {"args": [*args[1:]], "named": rest}


# ------------------------------------------------------------------ do the blocks form a chain


@dataclass
class _Call:
    """A call of a block: what entered, what came beside it, what left."""

    place: int
    feature: Any
    beside: dict[str, Any]
    output: Any = None


@dataclass
class _Record:
    """The calls of all blocks in one forward."""

    calls: list[_Call] = field(default_factory=list)

    @contextmanager
    def watching(self, blocks: list[nn.Module]) -> Iterator[None]:
        """Note every call inside a with block."""
        with ExitStack() as hooks:
            for place, block in enumerate(blocks):
                entered, left = self._hooks(place)
                before = block.register_forward_pre_hook(entered, with_kwargs=True, prepend=True)
                hooks.enter_context(before)
                hooks.enter_context(block.register_forward_hook(left))
            yield

    def _hooks(self, place: int) -> tuple[Any, Any]:
        def entered(block: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            feature = args[0] if args else named.get(FEATURE)
            kept = feature.clone() if isinstance(feature, Tensor) else None
            self.calls.append(_Call(place, kept, _beside(args, named)))

        def left(block: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            self.calls[-1].output = first.clone() if isinstance(first, Tensor) else None

        return entered, left


def check_chain(network: nn.Module, task: Task, batch: Batch) -> None:
    """Refuse a network whose blocks cannot be run one after the other by themselves.

    Args:
        network: of any kind.
        task: knows how it is called.
        batch: an example, on its device.

    Raises:
        ModelError: it has no blocks, they are shared, they are not called in turn, what enters
            one is not what left the one before, or they are called with something else besides.

    >>> from laconic.models import resnet
    >>> from laconic.tasks import Batch, Task
    >>> images = torch.zeros(4, 3, 32, 32)
    >>> task = Task((images, torch.arange(4)), (images, torch.arange(4)))
    >>> check_chain(resnet(8), task, Batch((images,)))
    """
    blocks, record = own_blocks(network), _Record()
    with evaluation(network), torch.enable_grad(), record.watching(blocks):
        task.call(network, batch)
    if [call.place for call in record.calls] != [*range(len(blocks))]:
        raise ModelError(
            f"reconstruct: {type(network).__name__} does not call its {len(blocks)} blocks once "
            "each, in order, so they form no chain of parts; write parts: layer"
        )
    _check_features(record.calls)
    _check_beside(record.calls)


def _check_features(calls: list[_Call]) -> None:
    """Refuse blocks between which something else happens."""
    for call in calls:
        if call.feature is None or call.output is None:
            raise ModelError(
                f"reconstruct: block {call.place + 1} neither takes its feature first (or as "
                f"'{FEATURE}') nor returns it first, so it cannot run by itself; write parts: layer"
            )
    for before, call in itertools.pairwise(calls):
        if not _equal(before.output, call.feature):
            raise ModelError(
                f"reconstruct: between block {call.place} and block {call.place + 1} something "
                f"happens to the feature ({_shape(before.output)} leaves, {_shape(call.feature)} "
                "enters), so they form no chain of parts; write parts: layer"
            )


def _check_beside(calls: list[_Call]) -> None:
    """Refuse what besides the feature is learned, or is not the same for all blocks."""
    first = _leaves(calls[0].beside)
    for call in calls:
        found = _leaves(call.beside)
        if any(isinstance(value, Tensor) and value.requires_grad for value in found.values()):
            raise ModelError(
                f"reconstruct: block {call.place + 1} is called with a second tensor that is "
                "learned, which would not be learned in parts; write parts: layer"
            )
        other = found.keys() ^ first.keys()
        other |= {name for name in found.keys() & first if not _equal(found[name], first[name])}
        if other:
            raise ModelError(
                f"reconstruct: block {call.place + 1} is called with other {min(other)} than "
                "block 1, so what the blocks need besides the feature cannot travel with it; "
                "write parts: layer"
            )


def _leaves(structure: Any, name: str = "") -> dict[str, Any]:
    """Return the single values of nested lists and mappings by their path."""
    if isinstance(structure, Mapping):
        items = [*structure.items()]
    elif isinstance(structure, (tuple, list)):
        items = [*enumerate(structure)]
    else:
        return {name: structure}
    below = (_leaves(each, f"{name}.{key}" if name else str(key)) for key, each in items)
    return {path: leaf for found in below for path, leaf in found.items()}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
    return one is other or (type(one) is type(other) and one == other)


def _shape(tensor: Tensor) -> str:
    return " x ".join(str(size) for size in tensor.shape)


# ------------------------------------------------------------------ which modules a part holds


def modules_of(part: Part, network: nn.Module, task: Task, batch: Batch) -> set[str]:
    """Return the names of the modules that a part of a network runs through.

    Args:
        part: of the network.
        network: whose blocks form a chain.
        task: knows how it is called.
        batch: an example, on its device.

    >>> from laconic.models import resnet
    >>> from laconic.tasks import Batch, Task
    >>> images = torch.zeros(4, 3, 32, 32)
    >>> task = Task((images, torch.arange(4)), (images, torch.arange(4)))
    >>> sorted(modules_of(Part(0, 1), resnet(8), task, Batch((images,))))[:3]
    ['', 'bn1', 'conv1']
    """
    names = {module: name for name, module in network.named_modules()}
    blocks = blocks_of(network)[part.start : part.stop]
    if part.start:
        return {names[module] for block in blocks for module in block.modules()}
    begun: set[nn.Module] = set()
    ended = {*blocks}
    with ExitStack() as hooks:
        for module in names:
            enter = module.register_forward_pre_hook(lambda each, _: begun.add(each))
            leave = module.register_forward_hook(lambda each, *_: ended.add(each))
            hooks.enter_context(enter)
            hooks.enter_context(leave)
        with evaluation(network):
            part.answer(network, task, batch, {})
    # Of what was cut off in its middle, only what it owns itself.
    return {names[each] for each in begun} | {
        names[inner] for each in ended for inner in each.modules()
    }
