"""Steps on whole blocks: drop some, let some drop out while training, or share one."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from laconic.errors import ChainError, ModelError, ScopeError
from laconic.models.capture import observe
from laconic.models.families import blocks_path, family_of
from laconic.names import of_laid
from laconic.own import explained
from laconic.scope import Scope
from laconic.step import Count, Share, State, Step, Value, run_step
from laconic.structure.outlines import outlined
from laconic.structure.schedules import EPSILON
from laconic.structure.surgery import keep_
from laconic.tasks.split import tensors_in
from laconic.tasks.task import device_of, evaluation, needed
from laconic.weights.laid import bake, laid_tensors, lay, owner
from laconic.weights.slopes import drawn

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = [
    "AllBut",
    "Alternate",
    "Bottom",
    "Depth",
    "DropLayers",
    "EveryNth",
    "LayerDrop",
    "Middle",
    "ShareLayers",
    "Similar",
    "Spread",
    "Top",
    "refuse_shared",
]

logger = logging.getLogger(__name__)

COMPARED = "similar compares blocks on data"

Place = Annotated[int, Field(ge=0)]


class Depth(Value, ABC):
    """Which blocks of a network stay.

    Places are counted from 0; the first block is the lowest.
    """

    @abstractmethod
    def kept(self, count: int, similarity: Sequence[float] = ()) -> tuple[int, ...]:
        """Return the places that stay, ascending.

        Args:
            count: blocks there are.
            similarity: of each block's output and input, where the choice needs it.
        """

    def foreseen(self, count: int) -> tuple[int, ...]:
        """Return the places that stay, as far as that is known before any data are seen."""
        return self.kept(count)

    def abridged(self) -> Depth:
        """Return a choice of as many blocks that looks at as few data as can be."""
        return self

    def check(self, task: Task | None) -> None:
        """Refuse to choose without the data that the choice needs."""

    def similarity(self, state: State, path: str) -> Sequence[float]:
        """Return how much each block's output is like its input, where the choice needs it."""
        return ()


class Top(Depth):
    """Drop the last blocks, which fine-tuning misses least (Sajjad et al. 2020).

    Attributes:
        drop: how many.

    >>> Top(2).kept(6)
    (0, 1, 2, 3)
    """

    positional: ClassVar[tuple[str, ...]] = ("drop",)

    drop: Count

    def kept(self, count: int, similarity: Sequence[float] = ()) -> tuple[int, ...]:
        """Return 0 ... count - drop - 1."""
        return tuple(range(count - self.drop))


class Bottom(Depth):
    """Drop the first blocks (Sajjad et al. 2020).

    Attributes:
        drop: how many.

    >>> Bottom(2).kept(6)
    (2, 3, 4, 5)
    """

    positional: ClassVar[tuple[str, ...]] = ("drop",)

    drop: Count

    def kept(self, count: int, similarity: Sequence[float] = ()) -> tuple[int, ...]:
        """Return drop ... count - 1."""
        return tuple(range(self.drop, count))


class Middle(Depth):
    """Drop the blocks in the middle, symmetrically (Sajjad et al. 2020).

    Of an uneven rest, the larger half is above.

    Attributes:
        drop: how many.

    >>> Middle(2).kept(6)
    (0, 1, 4, 5)
    """

    positional: ClassVar[tuple[str, ...]] = ("drop",)

    drop: Count

    def kept(self, count: int, similarity: Sequence[float] = ()) -> tuple[int, ...]:
        """Return all but ``drop`` places from floor((count - drop) / 2) on."""
        first = (count - self.drop) // 2
        return _without(count, range(first, first + self.drop))


class Alternate(Depth):
    """Drop every second block, from the top down (Sajjad et al. 2020).

    Which sets the paper drops where they are not half of all is not certain; for 12 blocks
    these are {5, 7, 9, 11} (odd) and {6, 8, 10, 12} (even) of 1 to 12.

    Attributes:
        drop: how many.
        parity: of the dropped blocks, counted from 1 as the paper does.

    >>> Alternate(2, parity="even").kept(6)
    (0, 1, 2, 4)
    """

    positional: ClassVar[tuple[str, ...]] = ("drop",)

    drop: Count
    parity: Literal["odd", "even"] = "odd"

    def kept(self, count: int, similarity: Sequence[float] = ()) -> tuple[int, ...]:
        """Return all but the last ``drop`` places of the parity."""
        places = range(0 if self.parity == "odd" else 1, count, 2)
        if self.drop > len(places):
            raise ModelError(
                f"alternate: {count} blocks have {len(places)} of {self.parity} number, "
                f"{self.drop} cannot go; drop fewer"
            )
        return _without(count, places[-self.drop :])


class EveryNth(Depth):
    """Drop every n-th block, as LayerDrop does for inference.

    Fan et al. 2020, section 3.2: block d, counted from 0, goes where ``d mod n = 0``. The paper's n
    is ``floor(1 / p)`` of a share p of the blocks. More than half goes in several steps: 12 blocks
    become 6 and then 3 with ``EveryNth(2)`` twice.

    Attributes:
        every: n, from 2.

    >>> EveryNth(2).kept(6)
    (1, 3, 5)
    """

    positional: ClassVar[tuple[str, ...]] = ("every",)

    every: Annotated[int, Field(ge=2)] = 2

    def kept(self, count: int, similarity: Sequence[float] = ()) -> tuple[int, ...]:
        """Return the places that are no multiple of n."""
        return _without(count, range(0, count, self.every))


class Spread(Depth):
    """Keep a share of the blocks, spread evenly (Hou et al. 2020, DynaBERT).

    The i-th kept block is ``floor(i / keep)``, for i below ``round(count keep)``. Half is every
    second block from the first: the start of DistilBERT (Sanh et al. 2019).

    Attributes:
        keep: share that stays; at least one block does.

    >>> Spread(0.75).kept(12)
    (0, 1, 2, 4, 5, 6, 8, 9, 10)
    """

    positional: ClassVar[tuple[str, ...]] = ("keep",)

    keep: Share

    def kept(self, count: int, similarity: Sequence[float] = ()) -> tuple[int, ...]:
        """Return floor(i / keep) for i = 0 ... round(count keep) - 1."""
        number = max(1, round(count * self.keep))
        return tuple(math.floor(index / self.keep + EPSILON) for index in range(number))


class AllBut(Depth):
    """Keep these blocks, drop all others.

    Attributes:
        keep: their places, counted from 0; they stay in the order of the network.

    >>> AllBut((0, 2, 5)).kept(6)
    (0, 2, 5)
    """

    positional: ClassVar[tuple[str, ...]] = ("keep",)

    keep: tuple[Place, ...]

    def kept(self, count: int, similarity: Sequence[float] = ()) -> tuple[int, ...]:
        """Return the places, ascending."""
        if max(self.keep, default=0) >= count:
            raise ModelError(
                f"all_but: there is no block {max(self.keep)}; the {count} blocks are 0 to "
                f"{count - 1}"
            )
        return tuple(sorted(set(self.keep)))


class Similar(Depth):
    """Drop the blocks that change their input least.

    The "contribution" strategy of Sajjad et al. 2020: a block is judged by the cosine of its
    output and its input, averaged over training data. The most similar go first: at most
    ``drop`` of them, none that is not above ``above``. One block always stays.

    Attributes:
        drop: how many at most; None: all that are above the threshold.
        above: the cosine from which on a block may go; -1: any.
        tokens: whose vectors are compared: the first one's ([CLS]), or those of all tokens that
            the batch does not mask. Of maps [batch, channels, ...] it is all places, always.
        batches: of training data.
        batch: examples in each.

    >>> Similar(2).kept(4, similarity=[0.5, 0.9, 0.7, 0.9])
    (0, 2)
    """

    positional: ClassVar[tuple[str, ...]] = ("drop",)

    drop: Count | None = None
    above: Annotated[float, Field(ge=-1, le=1)] = -1.0
    tokens: Literal["first", "all"] = "first"
    batches: Count = 8
    batch: Count = 32

    def kept(self, count: int, similarity: Sequence[float] = ()) -> tuple[int, ...]:
        """Return all but the most similar; ties go to the lower place."""
        order = sorted(range(count), key=lambda place: -similarity[place])
        going = [place for place in order if similarity[place] > self.above]
        return _without(count, going[: min(count - 1, self.drop or count)])

    def foreseen(self, count: int) -> tuple[int, ...]:
        """Return the first of as many as stay, or all where a threshold may hold them.

        Which ones stay is not known; once they are renumbered, their places are these.
        """
        return tuple(range(count if self.above > -1 else max(1, count - (self.drop or count))))

    def abridged(self) -> Similar:
        """Return the same on one batch."""
        return self.model_copy(update={"batches": 1})

    def check(self, task: Task | None) -> None:
        """Refuse to compare without data."""
        needed(task, COMPARED)

    def similarity(self, state: State, path: str) -> Sequence[float]:
        """Return the mean cosine of output and input of every block, over training data."""
        task, count = needed(state.task, COMPARED), len(_blocks(state.model, path))
        pairs = [(f"input:{path}.{place}", f"output:{path}.{place}") for place in range(count)]
        names = [name for pair in pairs for name in pair]
        vectors, sums = torch.zeros(count), torch.zeros(count, dtype=torch.float64)
        with evaluation(state.model):
            for batch in drawn(state, task, self.batches, self.batch, self.name):
                found = observe(task, state.model, batch, names)
                compared = [self._cosines(found[a], found[b], found.get("mask")) for a, b in pairs]
                vectors += torch.tensor([cosines.numel() for cosines in compared])
                sums += torch.stack([cosines.double().sum().cpu() for cosines in compared])
        return [float(value) for value in sums / vectors]

    def _cosines(self, before: Tensor, after: Tensor, mask: Tensor | None) -> Tensor:
        """Return the cosines of all vectors that count [vectors]."""
        if before.shape != after.shape:
            raise ModelError(
                f"similar: a block turns {list(before.shape)} into {list(after.shape)}, so they "
                "cannot be compared; choose another way to drop blocks"
            )
        if before.dim() > 3:  # maps: the channels of a place are its vector
            return F.cosine_similarity(before, after, dim=1).flatten()
        cosines = F.cosine_similarity(before, after, dim=-1)
        if cosines.dim() < 2:
            return cosines
        if self.tokens == "first":
            return cosines[:, 0]
        return cosines.flatten() if mask is None else cosines[mask]


def _without(count: int, dropped: Sequence[int]) -> tuple[int, ...]:
    return tuple(place for place in range(count) if place not in dropped)


class DropLayers(Step):
    """Drop whole blocks of a network, for good.

    Poor Man's BERT (Sajjad et al. 2020) drops them from the pre-trained network and fine-tunes
    afterwards; LayerDrop (Fan et al. 2020) from one that was trained for it; DistilBERT (Sanh
    et al. 2019) starts from every second one and distils. Blocks are the list that the network's
    family names, or the longest list of modules of one type.

    Attributes:
        by: which blocks go.

    >>> DropLayers(Top(4))
    DropLayers(Top(4))
    """

    positional: ClassVar[tuple[str, ...]] = ("by",)

    by: Depth

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse a network without blocks of its own, and to drop more than there are.

        Raises:
            ModelError: there is no list of blocks, they are no chain, one block is used for
                every layer, or the choice does not fit the number of blocks.
            TaskError: the choice needs data.
        """
        super().check(model, task, earlier)
        count = len(_chained(model, _own_blocks(model, self.scope), task))
        self.by.check(task)
        _refuse_none(self.by, count, len(self.by.foreseen(count)))

    def outline(self, model: nn.Module, earlier: tuple[Step, ...] = ()) -> nn.Module:
        """Return a copy with as many blocks as stay.

        Where data choose, which blocks these are is not known: the first ones stand for them, and
        all of them stay where data decide how many go.
        """
        with outlined(model) as outline:
            path = _own_blocks(outline, self.scope)
            keep_(outline, path, self.by.foreseen(len(_blocks(outline, path))))
        return outline

    def abridged(self, repeats: int = 1) -> tuple[Step, ...]:
        """Return the same, its choice made on few data."""
        return (self.model_copy(update={"by": self.by.abridged()}),)

    def apply(self, state: State) -> None:
        """Keep the chosen blocks, renumbered from zero."""
        model, path = state.model, _own_blocks(state.model, self.scope)
        count = len(_blocks(model, path))
        kept = self.by.kept(count, self.by.similarity(state, path))
        _refuse_none(self.by, count, len(kept))
        if len(kept) < count:
            keep_(model, path, kept)
        shown = ", ".join(str(place) for place in kept)
        logger.info("drop_layers: %d of %d blocks stay in '%s': %s", len(kept), count, path, shown)


class LayerDrop(Step):
    """Let blocks drop out while the network trains (Fan et al. 2020).

    In every forward of the training each block is left out, independently, with probability
    ``chance``: its output is its input, not rescaled. Evaluation uses all blocks, and nothing of
    this is left when the training ends. It prepares for ``DropLayers(EveryNth(...))``; for a
    target of r of N blocks the paper recommends ``chance = 1 - r / N``.

    Draws come from the generator that dropout draws from. Training seeds it for every update, so
    a resumed run goes on with the same draws.

    Attributes:
        chance: of each block to be left out; the paper's default is 0.2.
        retrain: the training.

    >>> from laconic.recover import Train
    >>> LayerDrop(0.1, retrain=Train(epochs=3)).chance
    0.1
    """

    positional: ClassVar[tuple[str, ...]] = ("chance",)

    chance: Annotated[float, Field(ge=0, lt=1)] = 0.2
    retrain: Step

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse a network without blocks, and what the training refuses.

        Raises:
            ModelError: there is no list of blocks, they are no chain, or one block is used for
                every layer.
        """
        super().check(model, task, earlier)
        _chained(model, _own_blocks(model, self.scope), task)
        self.retrain.check(model, task, (*earlier, self))

    def abridged(self, repeats: int = 1) -> tuple[Step, ...]:
        """Return what the training does besides."""
        return self.retrain.abridged()

    def apply(self, state: State) -> None:
        """Train with blocks that drop out."""
        blocks = _blocks(state.model, _own_blocks(state.model, self.scope))
        with dropping_out(blocks, self.chance):
            run_step(self.retrain, state)


@contextmanager
def dropping_out(blocks: Iterable[nn.Module], chance: float) -> Iterator[None]:
    """Leave each block out of a training forward with a probability, inside a with block.

    Args:
        blocks: modules whose first input and only output have one shape.
        chance: of a block to be left out; 0 draws nothing.

    >>> blocks = [nn.Linear(2, 2)]
    >>> with dropping_out(blocks, 1 - 1e-9):
    ...     blocks[0](torch.ones(1, 2))
    tensor([[1., 1.]])
    """
    changed = [block for block in dict.fromkeys(blocks) if chance]
    before = [vars(block).get("forward") for block in changed]
    try:
        for block in changed:
            # In the instance, so that neither its class nor its state dict changes.
            vars(block)["forward"] = functools.partial(_sometimes, block.forward, block, chance)
        yield
    finally:
        for block, forward in zip(changed, before, strict=True):
            del vars(block)["forward"]
            if forward is not None:
                vars(block)["forward"] = forward


def _sometimes(
    forward: Callable[..., Any], block: nn.Module, chance: float, hidden: Any, *args: Any, **kw: Any
) -> Any:
    if block.training and float(torch.rand(())) < chance:
        return hidden
    return forward(hidden, *args, **kw)


class ShareLayers(Step):
    """Let all blocks share the parameters of one.

    As in ALBERT (Lan et al. 2020) and Universal Transformers. The parameters are tied: training
    moves them together, and a file holds them once. The network stays as deep as it is. What is
    laid on the shared block's weights (masks, representations) is shared too; tables are fitted
    again where parameters are averaged. Buffers, such as BatchNorm statistics, are not shared.

    Attributes:
        source: the place of the block whose parameters all take, from 0; "mean": the average
            of all blocks.

    >>> ShareLayers("mean")
    ShareLayers('mean')
    """

    positional: ClassVar[tuple[str, ...]] = ("source",)

    source: Place | Literal["mean"] = 0

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse blocks that differ, and a block that is not there.

        Raises:
            ModelError: there is no list of blocks, they are no chain, their parameters have
                other names or shapes, or the network has no such block.
        """
        super().check(model, task, earlier)
        self._check(_chained(model, _own_blocks(model, self.scope), task))

    def apply(self, state: State) -> None:
        """Tie the parameters of all blocks."""
        path = _own_blocks(state.model, self.scope)
        self._check(_blocks(state.model, path))
        model, blocks = state.model, _blocks(state.model, path)
        for name in _parameters(blocks[0]):
            _share_(model, [f"{path}.{place}.{name}" for place in range(len(blocks))], self.source)
        logger.info("share_layers: %d blocks of '%s' share one's parameters", len(blocks), path)

    def _check(self, blocks: nn.ModuleList) -> None:
        if isinstance(self.source, int) and self.source >= len(blocks):
            raise ModelError(
                f"share_layers: there is no block {self.source}; the {len(blocks)} blocks are 0 "
                f"to {len(blocks) - 1}"
            )
        shapes = [{name: p.shape for name, p in _parameters(block).items()} for block in blocks]
        for place, found in enumerate(shapes):
            differing = sorted(dict(found.items() ^ shapes[0].items()))
            if differing:
                raise ModelError(
                    f"share_layers: block {place} and block 0 differ in '{differing[0]}', so they "
                    "cannot share parameters; share before blocks are pruned each on its own"
                )


def refuse_shared(
    model: nn.Module, paths: Iterable[str], earlier: Iterable[Step], step: str
) -> None:
    """Refuse layers that an earlier step ties to each other."""
    if not any(isinstance(each, ShareLayers) for each in earlier):
        return
    try:
        blocks = blocks_path(model)
    except ModelError:  # the one block that is left shares with none
        return
    shared = [path for path in paths if path.startswith(f"{blocks}.")]
    if shared:
        raise ChainError(
            f"{step}: '{shared[0]}' shares its weight with other blocks once share_layers has "
            f"run; put {step} before it, or leave the blocks out of the scope"
        )


def _share_(model: nn.Module, names: Sequence[str], source: int | Literal["mean"]) -> None:
    """Tie one parameter of all blocks, with what is laid on it."""
    laid, first = laid_tensors(model), names[0 if source == "mean" else source]
    found = [laid.get(name) for name in names]
    values = [getattr(*owner(model, name)).detach().clone() for name in names]
    kept = laid.get(first)
    if source == "mean":
        value = torch.stack(values).mean(dim=0)
    else:
        value = values[source] if kept is None else kept[1].detach().clone()
    for name in names:
        bake(model, name)
    shared = getattr(*owner(model, first))
    with torch.no_grad():
        shared.copy_(value)
    for name in names:
        module, attribute = owner(model, name)
        module.register_parameter(attribute, shared)
    if kept is None:
        return
    layer, masks = kept[0], [None if item is None else item[0].mask for item in found]
    if source == "mean":
        alive = [mask for mask in masks if mask is not None]
        mask = torch.stack(alive).any(dim=0) if len(alive) == len(masks) else None
        lay(model, first, layer.representation, mask=mask)
    else:
        lay(model, first, layer.representation, mask=layer.mask, state=layer.state)


def _own_blocks(model: nn.Module, scope: Scope) -> str:
    """Return the path of the blocks of a network that has one for every layer."""
    path, family = blocks_path(model), family_of(model)
    if family is not None and family.shared:
        raise ModelError(
            f"{type(model).__name__} computes every layer with the same block, so none can be "
            "dropped or shared; set num_hidden_layers in its configuration instead"
        )
    if path not in scope.select(model):
        raise ScopeError(f"the blocks '{path}' are not in the scope '{scope}'; widen it")
    return path


def _blocks(model: nn.Module, path: str) -> nn.ModuleList:
    blocks = model.get_submodule(path)
    if not isinstance(blocks, nn.ModuleList):
        raise ModelError(f"'{path}' is a {type(blocks).__name__}, not the ModuleList of the blocks")
    return blocks


def _chained(model: nn.Module, path: str, task: Task | None) -> nn.ModuleList:
    """Return the blocks of a list; refuse modules that stand side by side.

    Without a task, and of modules that are not called, it is taken for granted.

    Raises:
        ModelError: the modules of the list are no layers: all read the same, or ids.
    """
    blocks = _blocks(model, path)
    if task is None:
        return blocks
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def note(name: str, *call: Any) -> None:
        _, given, named, made = call
        seen[name] = [*tensors_in((given, named))], [*tensors_in(made)]

    with ExitStack() as hooks, evaluation(model):
        for name, block in blocks.named_children():
            hook = functools.partial(note, name)
            hooks.enter_context(block.register_forward_hook(hook, with_kwargs=True))
        with explained(f"{task.name}: the network cannot be called", "give data that fit it"):
            task.call(model, task.example_batch(2).to(device_of(model)))
    for (first, (given, made)), (second, (read, _)) in itertools.pairwise(seen.items()):
        new = [tensor for tensor in read if not any(tensor is each for each in given)]
        passed = any(tensor is each for tensor in read for each in made)
        if not passed and not any(tensor.is_floating_point() for tensor in new):
            raise ModelError(
                f"the modules of '{path}' are no layers one after the other: '{path}.{second}' "
                f"reads nothing that '{path}.{first}' makes; leave them out of the scope"
            )
    return blocks


def _parameters(block: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a block by their plain names, laid or not."""
    plain = {name: parameter for name, parameter in block.named_parameters() if not of_laid(name)}
    latent = {name: tensor for name, (_, tensor) in laid_tensors(block).items()}
    return dict(sorted((plain | latent).items()))


def _refuse_none(by: Depth, count: int, left: int) -> None:
    if left < 1:
        raise ModelError(f"drop_layers: {by!r} leaves none of {count} blocks; drop fewer")
