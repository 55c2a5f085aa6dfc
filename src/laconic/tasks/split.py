"""Sets of examples that yield batches as a pure function of seed, epoch and index."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from laconic.errors import TaskError
from laconic.own import explained
from laconic.step import generator_of

__all__ = [
    "Arrays",
    "Batch",
    "Normalize",
    "Split",
    "as_arrays",
    "as_batch",
    "as_tensor",
    "map_tensors",
    "refuse_infinite",
    "required",
    "tensors_in",
    "to_float",
]

Augment = Callable[[Tensor, torch.Generator], Tensor]
TARGET_KEYS = ("labels", "label", "targets", "target")


@dataclass(frozen=True)
class Batch:
    """Some examples: what the model is called with, and what it should answer.

    Attributes:
        inputs: a tuple for ``model(*inputs)``, a mapping for ``model(**inputs)``, or anything
            else for ``model(inputs)``; tensors are [batch, ...].
        targets: labels or values [batch, ...]; None where the examples have none.
        index: which examples these are [batch], the same number for the same example in every
            epoch; None: they were augmented, or it is not known.

    >>> Batch((torch.zeros(4, 2),), torch.zeros(4)).first(3).size
    3
    """

    inputs: Any
    targets: Tensor | None = None
    index: Tensor | None = None

    @property
    def size(self) -> int:
        """Return how many examples there are, from the first tensor."""
        return len(next(tensors_in((self.inputs, self.targets))))

    def to(self, device: str | torch.device) -> Batch:
        """Return the batch with every tensor on a device."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def first(self, count: int) -> Batch:
        """Return the batch with at most its first ``count`` examples."""
        index = None if self.index is None else self.index[:count]
        return dataclasses.replace(self._mapped(lambda tensor: tensor[:count]), index=index)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Batch:
        targets = None if self.targets is None else function(self.targets)
        return Batch(map_tensors(function, self.inputs), targets, self.index)


def map_tensors(function: Callable[[Tensor], Tensor], structure: Any) -> Any:
    """Return nested tuples, lists and mappings with a function applied to every tensor.

    >>> map_tensors(lambda tensor: tensor + 1, {"x": (torch.tensor(1), "kept")})
    {'x': (tensor(2), 'kept')}
    """
    if isinstance(structure, Tensor):
        return function(structure)
    if isinstance(structure, Mapping):
        return {key: map_tensors(function, value) for key, value in structure.items()}
    if isinstance(structure, (tuple, list)):
        mapped = [map_tensors(function, value) for value in structure]
        return tuple(mapped) if isinstance(structure, tuple) else mapped
    return structure


def tensors_in(structure: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and mappings, in order.

    >>> list(tensors_in({"x": (torch.tensor(1), "kept")}))
    [tensor(1)]
    """
    if isinstance(structure, Tensor):
        yield structure
    elif isinstance(structure, Mapping):
        yield from tensors_in(list(structure.values()))
    elif isinstance(structure, (tuple, list)):
        for value in structure:
            yield from tensors_in(value)


def as_batch(item: Any) -> Batch:
    """Return a Batch from what a DataLoader yields.

    A pair or longer tuple holds the inputs and, last, the targets; a mapping holds the targets
    under ``labels``, ``label``, ``targets`` or ``target``. A tensor, a tuple of one and a mapping
    without these names are inputs alone: the targets are None.

    Raises:
        TaskError: any other kind of item.

    >>> as_batch({"x": torch.zeros(2), "labels": torch.ones(2)}).targets
    tensor([1., 1.])
    """
    if isinstance(item, Batch):
        return item
    if isinstance(item, Tensor):
        return Batch((item,))
    if isinstance(item, Mapping):
        found = next((key for key in TARGET_KEYS if key in item), None)
        inputs = {key: value for key, value in item.items() if key != found}
        return Batch(inputs, None if found is None else item[found])
    if isinstance(item, (tuple, list)) and item:
        return Batch(tuple(item[:-1]), item[-1]) if len(item) > 1 else Batch(tuple(item))
    raise TaskError(
        f"the DataLoader yields {type(item).__name__}, not (inputs, targets), a mapping or a "
        "tensor; give Loader(loader, read=function from an item to a Batch)"
    )


@dataclass(frozen=True)
class Normalize:
    """Mean and standard deviation of each channel, in units of the 0..1 range.

    Raises:
        TaskError: lengths differ, a value is not finite or a deviation is not positive.

    >>> Normalize((0.5,), (0.25,)).std
    (0.25,)
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = np.atleast_1d(np.asarray(getattr(self, name), dtype=np.float64))
            object.__setattr__(self, name, tuple(values.tolist()))
        if len(self.mean) != len(self.std):
            raise TaskError(
                f"mean has {len(self.mean)} values and std {len(self.std)}; give one per channel"
            )
        if not np.isfinite(self.mean + self.std).all() or min(self.std, default=0) <= 0:
            raise TaskError(
                f"mean {self.mean} and std {self.std} must be finite, and std above zero"
            )


def to_float(inputs: Tensor, normalize: Normalize | None = None) -> Tensor:
    """Return what a network is fed: (inputs / 255 - mean) / std.

    Args:
        inputs: images, uint8 [batch, channels, ...] (divided by 255), floats (taken as they are)
            or other integers, such as token ids (returned unchanged).
        normalize: mean and standard deviation per channel, in 0..1 units.

    >>> to_float(torch.tensor([[255]], dtype=torch.uint8), Normalize((0.5,), (0.25,)))
    tensor([[2.]])
    """
    scaled = inputs.float().div_(255) if inputs.dtype == torch.uint8 else inputs
    if normalize is None:
        return scaled
    shape = (-1, *(1 for _ in inputs.shape[2:]))
    mean = torch.tensor(normalize.mean, device=inputs.device).reshape(shape)
    std = torch.tensor(normalize.std, device=inputs.device).reshape(shape)
    return scaled.sub(mean).div_(std)


class Split(ABC):
    """A set of examples that yields batches.

    The law: with a seed, the batch at (seed, epoch, index) is a pure function of the three,
    whatever was drawn before, so ``start=k`` continues where an interrupted loop stopped.
    Without a seed the examples come in their order, unshuffled and unaugmented.

    Attributes:
        normalize: how inputs were normalised, where that is known.
        in_memory: the targets of all examples can be had at once, for checks.
        labelled: the examples have targets; if not, those of every batch are None.

    >>> isinstance(Arrays(torch.zeros(2, 1), torch.zeros(2)), Split)
    True
    """

    normalize: Normalize | None = None
    in_memory: bool = False
    labelled: bool = True

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples."""

    @abstractmethod
    def batches(
        self,
        size: int,
        *,
        seed: int | None = None,
        epoch: int = 0,
        start: int = 0,
        device: str | torch.device = "cpu",
    ) -> Iterator[Batch]:
        """Yield the batches of one epoch.

        Args:
            size: examples per batch; the last batch may be smaller.
            seed: shuffle and augment by this seed; None: neither.
            epoch: each epoch has another order and other augmentations.
            start: index of the first batch to yield.
            device: where the batches shall live.
        """

    @abstractmethod
    def subset(self, index: Sequence[int]) -> Split:
        """Return the examples at these positions."""

    @abstractmethod
    def targets(self) -> Tensor:
        """Return the targets of all examples, in order [examples, ...].

        Raises:
            TaskError: they have none.
        """

    def batch_count(self, size: int) -> int:
        """Return how many batches one epoch has."""
        return math.ceil(len(self) / size)

    def any_order(self, size: int, *, device: str | torch.device = "cpu") -> Iterator[Batch]:
        """Yield every example once, not augmented, in the order that costs least.

        Args:
            size: examples per batch; the last batch may be smaller.
            device: where the batches shall live.
        """
        return self.plain().batches(size, device=device)

    def example(self, count: int = 1) -> Batch:
        """Return the first ``count`` examples, not augmented, for which costs are stated."""
        return next(self.plain().batches(count)).first(count)

    @property
    def choosable(self) -> int:
        """Return how many examples ``subset`` chooses from: all, also if an epoch drops some."""
        return len(self)

    def plain(self) -> Split:
        """Return the same examples, never augmented, the last incomplete batch included."""
        return self

    def check(self, model: nn.Module) -> None:  # noqa: B027 - most examples fit any network
        """Refuse a network that these examples cannot be fed to, as far as it says."""


class Arrays(Split):
    """Examples in memory; images stay uint8 and are converted per batch.

    Args:
        inputs: tensor or array [examples, ...]; of uint8, images [examples, channels, height,
            width]; or a mapping of such, for a network with named inputs, fed as they are.
        targets: labels (integers) or values (floats) [examples, ...]; None: there are none.
        augment: changes the inputs of a batch, drawing from the generator it is given.
        normalize: Normalize, or (mean, std) of each channel in 0..1 units.

    Raises:
        TaskError: no example, other lengths, NaN or infinite values, not numbers, or uint8 that
            may be no images.

    >>> data = Arrays(np.zeros((10, 1, 8, 8), np.uint8), np.arange(10))
    >>> [len(batch.targets) for batch in data.batches(4, seed=0)]
    [4, 4, 2]
    """

    in_memory = True

    def __init__(
        self,
        inputs: Any,
        targets: Any = None,
        *,
        augment: Augment | None = None,
        normalize: Normalize | tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        self.inputs: Tensor | dict[str, Tensor] = _fed(inputs)
        self.labels = None if targets is None else _answers(targets)
        self.labelled = self.labels is not None
        count = len(next(tensors_in(self.inputs)))
        if self.labels is not None and count != len(self.labels):
            raise TaskError(
                f"there are {count} inputs and {len(self.labels)} targets; "
                "each example needs one of both"
            )
        if normalize is not None and not isinstance(normalize, Normalize):
            normalize = Normalize(*(tuple(values) for values in normalize))
        if isinstance(self.inputs, Tensor):
            _check_channels(self.inputs, normalize)
        elif augment is not None or normalize is not None:
            raise TaskError(
                f"inputs are named ({', '.join(self.inputs)}), and augment= and normalize= are of "
                "a single tensor; change the arrays beforehand, or use a DataLoader"
            )
        self.normalize, self.augment = normalize, augment
        self.index = torch.arange(count)

    def __len__(self) -> int:
        return len(self.index)

    def batches(
        self,
        size: int,
        *,
        seed: int | None = None,
        epoch: int = 0,
        start: int = 0,
        device: str | torch.device = "cpu",
    ) -> Iterator[Batch]:
        """Yield the batches of one epoch; see Split."""
        order = self.index
        if seed is not None:
            order = order[torch.randperm(len(order), generator=generator_of(seed, "order", epoch))]
        for number in range(start, self.batch_count(size)):
            chosen = order[number * size : (number + 1) * size]
            batch = self._chosen(chosen, device)
            inputs, index = batch.inputs, batch.index
            if seed is not None and self.augment is not None:
                with explained("augment= failed", "it is called with (inputs, generator)"):
                    inputs = self.augment(inputs, generator_of(seed, "augment", epoch, number))
                index = None
            if isinstance(inputs, Tensor):
                inputs = (to_float(inputs, self.normalize),)
            yield Batch(inputs, batch.targets, index)

    def _chosen(self, index: Tensor, device: str | torch.device) -> Batch:
        """Return examples as they are stored."""

        def taken(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, index.to(tensor.device)).to(device)

        targets = None if self.labels is None else taken(self.labels)
        return Batch(map_tensors(taken, self.inputs), targets, index)

    def subset(self, index: Sequence[int]) -> Arrays:
        """Return the examples at these positions; the arrays are shared, not copied."""
        chosen = torch.as_tensor(index, dtype=torch.long)
        if not len(chosen):
            raise TaskError("a subset of no example was asked for; choose at least one")
        return self._replaced(index=self.index[chosen])

    def plain(self) -> Arrays:
        """Return the same examples, never augmented."""
        return self._replaced(augment=None)

    def targets(self) -> Tensor:
        """Return the targets of all examples, in order; see Split."""
        labels = required(self.labels)
        return labels[self.index.to(labels.device)]

    def _replaced(self, **fields: Any) -> Arrays:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__ | fields)
        return other


def as_arrays(value: Any, **options: Any) -> Arrays:
    """Return Arrays from a pair (inputs, targets), or from inputs alone.

    Args:
        value: a pair; a tensor or an array, which are inputs alone; or a mapping of such, which
            holds the targets, if there are any, where a DataLoader's batch does (see as_batch).
        **options: what Arrays takes besides.

    Raises:
        TaskError: another kind of value, or data that cannot be used.

    >>> as_arrays(np.zeros((3, 2))).labelled, as_arrays({"x": [1.0], "label": [1]}).labelled
    (False, True)
    """
    if isinstance(value, Tensor | np.ndarray):
        return Arrays(value, **options)
    if isinstance(value, Mapping):
        whole = as_batch(value)
        return Arrays(whole.inputs, whole.targets, **options)
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TaskError(
            f"{type(value).__name__} is not a pair; give every split as (inputs, targets)"
        )
    return Arrays(*value, **options)


def required(targets: Tensor | None) -> Tensor:
    """Return targets that there must be.

    Raises:
        TaskError: there are none.

    >>> required(torch.tensor([1]))
    tensor([1])
    """
    if targets is None:
        raise TaskError(
            "the batches have no targets, which loss and metrics need; yield (inputs, targets)"
        )
    return targets


def as_tensor(value: Any, name: str) -> Tensor:
    """Return a tensor of finite numbers; floats become float32.

    Raises:
        TaskError: not numbers, no example, NaN or infinite values.

    >>> as_tensor([1.0, 2.0], "inputs").dtype
    torch.float32
    """
    if not isinstance(value, Tensor):
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise TaskError(f"{name} are {array.dtype}, not numbers; convert them to numbers")
        # torch has no arithmetic for wide unsigned integers, and none for foreign byte orders.
        wide = array.dtype.kind == "u" and array.itemsize > 1
        native = np.dtype(np.int64) if wide else array.dtype.newbyteorder("=")
        # torch warns about, and may write through to, an array that numpy made read-only.
        value = torch.from_numpy(np.require(array, native, requirements=["C", "W"]))
    tensor: Tensor = value.detach()
    if tensor.is_floating_point():
        tensor = tensor.float()
    if not tensor.ndim or not len(tensor):
        raise TaskError(f"{name} of shape {tuple(tensor.shape)} hold no example; give at least one")
    return refuse_infinite(tensor, name)


def _fed(inputs: Any) -> Tensor | dict[str, Tensor]:
    """Return inputs in memory, one tensor or several by their names, all of one length."""
    if not isinstance(inputs, Mapping):
        return as_tensor(inputs, "inputs")
    named = {str(name): as_tensor(value, f"inputs '{name}'") for name, value in inputs.items()}
    lengths = {name: len(tensor) for name, tensor in named.items()}
    if len(set(lengths.values())) != 1:
        raise TaskError(
            f"inputs are of {lengths or 'no'} examples; give one or more arrays of one length"
        )
    return named


def _answers(targets: Any) -> Tensor:
    labels = as_tensor(targets, "targets")
    small = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool)
    return labels.long() if labels.dtype in small else labels


def refuse_infinite(tensor: Tensor, name: str) -> Tensor:
    """Return a tensor whose numbers are all finite.

    Args:
        tensor: its first dimension is that of the examples.
        name: for the message.

    Raises:
        TaskError: some are not; which example is the first.

    >>> refuse_infinite(torch.ones(2), "inputs")
    tensor([1., 1.])
    """
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        bad = ~torch.isfinite(tensor)
        rows = bad.reshape(len(bad), -1) if bad.dim() else bad.reshape(1, 1)
        where = int(rows.any(dim=1).nonzero()[0])
        raise TaskError(
            f"{name} hold {int(bad.sum())} NaN or infinite values, first in example {where}; "
            "remove or repair these examples"
        )
    return tensor


def _check_channels(inputs: Tensor, normalize: Normalize | None) -> None:
    if normalize is None:
        if inputs.dtype == torch.uint8 and inputs.ndim < 4:
            raise TaskError(
                f"inputs are uint8 of shape {tuple(inputs.shape)}, which may be anything: of "
                "images, [examples, channels, height, width] or given with normalize=, they are "
                "divided by 255; give features as floats and token ids as int64"
            )
        return
    channels = inputs.shape[1] if inputs.ndim > 1 else 0
    if len(normalize.mean) not in (1, channels):
        raise TaskError(
            f"normalize has {len(normalize.mean)} values for inputs of shape "
            f"{tuple(inputs.shape)}; give one for each of the {channels} channels (dimension 1)"
        )
    if not (inputs.is_floating_point() or inputs.dtype == torch.uint8):
        raise TaskError(f"inputs are {inputs.dtype}; normalize needs uint8 or float inputs")
