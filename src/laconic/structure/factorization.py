"""Factorization: the family of values that say what one layer is split into."""

from __future__ import annotations

import bisect
import math
import traceback
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self, TypeVar, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.errors import ModelError
from laconic.names import module_of
from laconic.step import Count, Share, State, Value
from laconic.structure.columns import groups_of
from laconic.structure.decompose import energy_rank
from laconic.tasks.task import evaluation
from laconic.weights.laid import latent_of, owners_of

__all__ = [
    "Factorization",
    "Geometry",
    "Ranked",
    "Source",
    "Spectral",
    "break_even",
    "chain",
    "check_runs",
    "convolution",
    "geometry_of",
    "latent",
    "linear",
    "refuse_needed",
    "refuse_root",
    "refuse_several",
    "shape_of",
]

Portion = Annotated[float, Field(gt=0, lt=1)]
Pair = tuple[int, int]
Layer = TypeVar("Layer", bound=nn.Module)
Method = TypeVar("Method", bound=Value)

# What is kept of a layer's weights where nothing decides the rank.
HALF = 0.5
LARGEST = 0.999  # share of the weights that parts of any use have at most


def latent(module: nn.Module) -> nn.Parameter:
    """Return the parameter behind a layer's weight, laid or plain.

    >>> latent(nn.Linear(3, 2)).shape
    torch.Size([2, 3])
    """
    return cast("nn.Parameter", latent_of(module, "weight")[1])


def refuse_root(path: str, step: str) -> None:
    """Refuse to replace the network itself.

    Raises:
        ModelError: the path is empty.
    """
    if not path:
        raise ModelError(
            f"{step}: the network is a single layer, which nothing holds; put it in a Sequential"
        )


def refuse_needed(model: nn.Module, path: str, step: str) -> None:
    """Refuse to replace the network itself, or a layer whose parent reads its weight.

    Torch's attention does so, and its encoder layer while it has such an attention.

    Raises:
        ModelError: it is one of the two.
    """
    refuse_root(path, step)
    parent = path.rpartition(".")[0]
    holder = model.get_submodule(parent)
    attention = holder.self_attn if isinstance(holder, nn.TransformerEncoderLayer) else holder
    if isinstance(attention, nn.MultiheadAttention):
        raise ModelError(
            f"{step}: '{parent}' is a {type(holder).__name__}, which computes with the weight of "
            f"'{path}' itself; put the step 'unpack' before, or leave it out of the scope with "
            f"'!{path}'"
        )


def refuse_tied(model: nn.Module, path: str, step: str) -> None:
    """Refuse to take a layer apart whose weight is another layer's too.

    Raises:
        ModelError: it is tied.
    """
    weight = latent(model.get_submodule(path))
    others = [name for name in map(module_of, owners_of(model, weight)) if name != path]
    if others:
        raise ModelError(
            f"{step}: the weight of '{path}' is also that of '{others[0]}', which its parts "
            f"could not be; untie them, or leave it out of the scope with '!{path}'"
        )


def check_runs(state: State, step: str) -> None:
    """Refuse a network that asks layers that were taken apart for what their parts do not have.

    Raises:
        ModelError: its forward reads such an attribute; without a task it is not run.
    """
    if state.task is None:
        return
    batch = state.task.example_batch().to(state.device)
    try:
        with evaluation(state.model):
            state.task.call(state.model, batch)
    except AttributeError as error:
        lines = traceback.extract_tb(error.__traceback__)
        asking = next(line for line in reversed(lines) if line.name != "__getattr__")
        raise ModelError(
            f"{step}: the network runs no more: {error}, which '{asking.line}' asks of a layer "
            "that was split; leave that one out of the scope"
        ) from error


def bias_of(module: nn.Module) -> nn.Parameter | None:
    """Return a layer's bias: the same parameter, or its numbers where it is laid."""
    plain = dict(module.named_parameters(recurse=False)).get("bias")
    laid = getattr(module, "bias", None)
    if plain is not None or laid is None:
        return plain
    return nn.Parameter(cast("Tensor", laid).detach().clone())


def shape_of(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of the weight of one group of channels.

    >>> shape_of(nn.Conv2d(4, 6, 3, groups=2))
    (3, 2, 3, 3)
    """
    rows, *rest = latent(module).shape
    return (rows // groups_of(module), *rest)


@dataclass(frozen=True, eq=False)
class Source:
    """A layer about to be split, and what a factorization may look at.

    Attributes:
        module: the layer.
        weight: as the network computes it, float64 on the CPU: [out, in], a kernel
            [out, in / groups, height, width] or a table [rows, width].
        generator: of what is drawn.
        moments: X X^T of the inputs [groups, n, n], where the factorization needs them.

    >>> layer = nn.Conv2d(4, 8, 3, groups=2)
    >>> [tuple(part.shape) for part in Source(layer, layer.weight, torch.Generator()).parts]
    [(4, 2, 3, 3), (4, 2, 3, 3)]
    """

    module: nn.Module
    weight: Tensor
    generator: torch.Generator
    moments: Tensor | None = None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Return the weight of every group of channels."""
        return self.weight.chunk(groups_of(self.module))

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one group's weight."""
        return shape_of(self.module)

    @property
    def biased(self) -> bool:
        """Return whether the layer has a bias."""
        return getattr(self.module, "bias", None) is not None

    def placed(self, layer: Layer) -> Layer:
        """Return a layer in the type and place of the old weight, to be moved as that one is."""
        old = latent(self.module)
        return layer.to(device=old.device, dtype=old.dtype).requires_grad_(old.requires_grad)

    def parameter(self, numbers: Tensor) -> nn.Parameter:
        """Return numbers as a parameter in the type and place of the old weight."""
        old = latent(self.module)
        # A 1 x 1 kernel with other strides is contiguous too, and convolved in another order.
        new = numbers.to(device=old.device, dtype=old.dtype)
        return nn.Parameter(new.clone(memory_format=torch.contiguous_format), old.requires_grad)

    def bias(self) -> nn.Parameter | None:
        """Return the bias: the same parameter, which may be tied to another layer's."""
        return bias_of(self.module)


class Factorization(Value, ABC):
    """How one layer becomes several smaller ones: a frozen value.

    A convolution with groups is split group by group, with the same rank in each.

    Attributes:
        kinds: the layers it splits; not subclasses of them, whose forwards are their own.
        extent: the fewest elements of a kernel that it splits.
        fitting: what it splits, in words.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]]
    extent: ClassVar[int] = 1
    fitting: ClassVar[str]

    @property
    def samples(self) -> tuple[int, int] | None:
        """Return batches and their size if it needs moments of a layer's inputs, else None."""
        return None

    @property
    def by_shape(self) -> bool:
        """Return whether ``foreseen`` splits without looking at numbers, as on "meta"."""
        return True

    def foreseen(self) -> Factorization:
        """Return what makes the same parts with less work.

        Where numbers decide a rank it is the largest that saves weights.
        """
        return self

    def fits(self, module: nn.Module) -> bool:
        """Return whether this is a layer that it splits."""
        if parametrize.type_before_parametrizations(module) not in self.kinds:
            return False
        return not isinstance(module, nn.Conv2d) or math.prod(module.kernel_size) >= self.extent

    def check(self, module: nn.Module) -> None:
        """Refuse a fitting layer that has something its parts cannot have.

        Raises:
            ModelError: what that is.
        """
        if isinstance(module, nn.Conv2d):
            geometry_of(module)

    @abstractmethod
    def count(self, shape: Sequence[int], rank: int) -> int:
        """Return how many weights replace one group's weight of this shape at a rank."""

    @abstractmethod
    def planned(self, shape: Sequence[int]) -> int | None:
        """Return how many weights will replace it; None: that depends on the numbers."""

    @abstractmethod
    def split(self, source: Source) -> nn.Module:
        """Return what replaces a layer; its bias stands in the last part."""


def break_even(method: Factorization, shape: Sequence[int]) -> int:
    """Return the largest rank that makes a weight of this shape smaller; 0: none does.

    >>> from laconic.structure import SVD
    >>> break_even(SVD(), (768, 3072))
    614
    """
    before = math.prod(shape)
    # Of the ranks 1, 2, ... those below the break-even come first.
    return bisect.bisect_left(range(1, before + 1), before, key=lambda r: method.count(shape, r))


def refuse_several(value: Value, *names: str) -> None:
    """Refuse a value that has more than one of some optional fields.

    Raises:
        ValueError: it names them, for pydantic to locate.

    >>> from laconic.structure import SVD
    >>> refuse_several(SVD(rank=3), "rank", "energy")
    """
    given = [name for name in names if getattr(value, name, None) not in (None, ())]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} each decide the rank; give one of them")


def at_most(method: Method) -> Method:
    """Return a method whose rank energy decides at the largest rank that saves weights.

    >>> from laconic.structure import SVD
    >>> at_most(SVD(energy=0.9)), at_most(SVD(4))
    (SVD(ratio=0.999), SVD(4))
    """
    if dict(method)["energy"] is None:
        return method
    return method.model_copy(update={"energy": None, "ratio": LARGEST})


class Ranked(Factorization, ABC):
    """A factorization of one rank whose weights grow in proportion to it.

    Attributes:
        rank: fixed, or
        ratio: the largest that leaves at most this share of a layer's weights (but 1 at least);
            0.5 where nothing is given.
    """

    positional: ClassVar[tuple[str, ...]] = ("rank",)

    rank: Count | None = None
    ratio: Portion | None = None

    @model_validator(mode="after")
    def _one_decides(self) -> Self:
        refuse_several(self, "rank", "ratio", "energy")
        return self

    def planned(self, shape: Sequence[int]) -> int | None:
        """Return the weights at the rank that the shape decides."""
        return self.count(shape, self.chosen(shape))

    def chosen(self, shape: Sequence[int]) -> int:
        """Return the rank, or ``floor(ratio * weights / weights at rank 1)``."""
        if self.rank is not None:
            return self.rank
        ratio = HALF if self.ratio is None else self.ratio
        return max(1, math.floor(ratio * math.prod(shape) / self.count(shape, 1)))


class Spectral(Ranked, ABC):
    """A ranked factorization that can also be told how much energy to keep.

    Attributes:
        energy: the least rank whose squared singular values make up this share.
    """

    energy: Share | None = None

    def planned(self, shape: Sequence[int]) -> int | None:
        """Return the weights at the rank that the shape decides, if it does."""
        return super().planned(shape) if self.energy is None else None

    def foreseen(self) -> Spectral:
        """Return the same at the largest rank that saves weights, if energy decides."""
        return at_most(self)

    def rank_for(self, source: Source) -> int:
        """Return the rank of a layer, the same in every group."""
        if self.energy is None:
            return self.chosen(source.shape)
        return energy_rank(self.spectrum(source), self.energy)

    @abstractmethod
    def spectrum(self, source: Source) -> Tensor:
        """Return squared singular values, descending, summed over groups [count]."""


# ------------------------------------------------------------------ building the parts


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over an image: (vertical, horizontal) numbers of pixels.

    Attributes:
        stride: from one output to the next.
        padding: on each side.
        dilation: between the kernel's elements.

    >>> Geometry((2, 2), (1, 1)).vertical
    Geometry(stride=(2, 1), padding=(1, 0), dilation=(1, 1))
    """

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    @property
    def vertical(self) -> Geometry:
        """Return what is left to a k x 1 kernel."""
        return Geometry((self.stride[0], 1), (self.padding[0], 0), (self.dilation[0], 1))

    @property
    def horizontal(self) -> Geometry:
        """Return what is left to a 1 x k kernel."""
        return Geometry((1, self.stride[1]), (0, self.padding[1]), (1, self.dilation[1]))


def geometry_of(conv: nn.Conv2d) -> Geometry:
    """Return how a convolution moves, "same" and "valid" padding in numbers.

    Raises:
        ModelError: "same" padding of an even kernel, which differs from side to side.

    >>> geometry_of(nn.Conv2d(1, 1, 5, padding="same", dilation=2)).padding
    (4, 4)
    """
    dilation, stride = cast("Pair", conv.dilation), cast("Pair", conv.stride)
    if not isinstance(conv.padding, str):
        return Geometry(stride, cast("Pair", conv.padding), dilation)
    if conv.padding == "valid":
        return Geometry(stride, (0, 0), dilation)
    height, width = (d * (k - 1) for d, k in zip(dilation, conv.kernel_size, strict=True))
    if height % 2 or width % 2:
        raise ModelError(
            f"padding 'same' of a kernel {tuple(conv.kernel_size)} is not the same on both sides; "
            "leave the layer out of the scope"
        )
    return Geometry(stride, (height // 2, width // 2), dilation)


def linear(source: Source, weight: Tensor) -> nn.Linear:
    """Return a linear layer without bias in place of part of a layer.

    Args:
        source: the layer.
        weight: [out, in].

    >>> layer = nn.Linear(4, 4).double()
    >>> linear(Source(layer, layer.weight, torch.Generator()), torch.ones(2, 4)).weight.dtype
    torch.float64
    """
    rows, columns = weight.shape
    made = nn.Linear(columns, rows, bias=False, device="meta")
    made.weight = source.parameter(weight)
    return made


def convolution(
    source: Source,
    kernels: Sequence[Tensor],
    geometry: Geometry = Geometry(),
    *,
    groups: int = 1,
) -> nn.Conv2d:
    """Return a convolution without bias in place of part of one.

    Args:
        source: the convolution.
        kernels: of every group of the source [outputs, inputs / groups, height, width].
        geometry: how it moves.
        groups: within each group of the source.

    >>> layer = nn.Conv2d(4, 4, 3, groups=2)
    >>> pointwise = [torch.ones(3, 2, 1, 1), torch.ones(3, 2, 1, 1)]
    >>> convolution(Source(layer, layer.weight, torch.Generator()), pointwise)
    Conv2d(4, 6, kernel_size=(1, 1), stride=(1, 1), groups=2, bias=False)
    """
    weight, groups = torch.cat(tuple(kernels)), groups * len(kernels)
    rows, columns, height, width = weight.shape
    made = nn.Conv2d(
        columns * groups,
        rows,
        (height, width),
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        groups,
        bias=False,
        padding_mode=cast("nn.Conv2d", source.module).padding_mode,
        device="meta",
    )
    made.weight = source.parameter(weight)
    return made


def chain(source: Source, *layers: nn.Module) -> nn.Sequential:
    """Return the layers one after the other, with the source's bias in the last of them.

    >>> layer = nn.Linear(4, 4)
    >>> source = Source(layer, layer.weight, torch.Generator())
    >>> parts = chain(source, linear(source, torch.ones(2, 4)), linear(source, torch.ones(4, 2)))
    >>> parts[0].bias is None, parts[1].bias is layer.bias
    (True, True)
    """
    layers[-1].register_parameter("bias", source.bias())
    return nn.Sequential(*layers)
