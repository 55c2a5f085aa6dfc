"""Analyses of a loss: its curvature by part, its surface, its path, and what bits do to it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from laconic.curvature import largest_eigenvalue
from laconic.errors import ModelError, ScopeError, TaskError
from laconic.models.families import blocks_path, family_of
from laconic.progress import progress
from laconic.scope import Scope
from laconic.tasks.split import Batch
from laconic.tasks.task import evaluation
from laconic.weights.laid import bake, copied, laid_tensors, latent_of, lay_each, weights_of
from laconic.weights.mixed import blocks_of
from laconic.weights.representation import Representation
from laconic.weights.slopes import eigenvalues as eigenvalues_of
from laconic.weights.slopes import losses, probe

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = [
    "Analysis",
    "BitSensitivity",
    "Eigenvalues",
    "LossSurface",
    "Trajectory",
    "bit_sensitivity",
    "eigenvalues",
    "loss_surface",
    "parts_of",
    "trajectory",
]

Networks = Mapping[str, nn.Module]
Grid = tuple[tuple[float, ...], ...]
Axes = tuple[tuple[float, ...], tuple[float, ...]]
Snapshot = Tensor | Mapping[str, Tensor]

# What the parts of a Transformer's layer are called -> the fields of its family.
PARTS: dict[str, tuple[str, ...]] = {
    "MHA-QK": ("query", "key"),
    "MHA-V": ("value",),
    "MHA-O": ("output",),
    "FFN-mid": ("inner",),
    "FFN-out": ("outer",),
}
# Of the largest deviation: below it, a second direction is rounding alone.
FLAT = 1e-6


class Analysis(ABC):  # noqa: B024  what they share is that they are plain numbers
    """What an analysis found: a frozen record of plain numbers."""

    def to_data(self) -> dict[str, Any]:
        """Return the record as JSON-able data; what is no finite number as its name."""
        data: dict[str, Any] = _plain(dataclasses.asdict(self))  # type: ignore[call-overload]
        return data


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Eigenvalues(Analysis):
    """The largest eigenvalue of the Hessian of every part of some networks.

    Attributes:
        values: network -> part -> one eigenvalue per batch; the first network is what others
            are compared with.

    >>> found = Eigenvalues({"float": {"fc": (1.0, 3.0)}, "binary": {"fc": (8.0,)}})
    >>> found.mean("float", "fc"), found.deviation("float", "fc"), found.ratio("binary", "fc")
    (2.0, 1.0, 4.0)
    """

    values: Mapping[str, Mapping[str, tuple[float, ...]]]

    def mean(self, network: str, part: str) -> float:
        """Return the mean over the batches."""
        return statistics.fmean(self.values[network][part])

    def deviation(self, network: str, part: str) -> float:
        """Return the standard deviation over the batches, that of all of them."""
        return statistics.pstdev(self.values[network][part])

    def ratio(self, network: str, part: str) -> float:
        """Return the mean relative to that of the first network; NaN where that is zero."""
        first = next(iter(self.values))
        reference = self.mean(first, part)
        return self.mean(network, part) / reference if reference else math.nan

    def pooled(self) -> Eigenvalues:
        """Return the same with the layers of a Transformer taken together.

        >>> Eigenvalues({"float": {"0 MHA-V": (1.0,), "1 MHA-V": (2.0,)}}).pooled().values
        {'float': {'MHA-V': (1.0, 2.0)}}
        """
        found: dict[str, dict[str, tuple[float, ...]]] = {}
        for network, parts in self.values.items():
            kinds = found.setdefault(network, {})
            for part, values in parts.items():
                kind = part.rpartition(" ")[2]
                kinds[kind] = (*kinds.get(kind, ()), *values)
        return Eigenvalues(found)


def parts_of(model: nn.Module, scope: Scope | str = "*") -> dict[str, list[str]]:
    """Return the weights of every part: of a Transformer's layers, else of every module.

    Args:
        model: laid or plain.
        scope: which modules count.

    >>> parts_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)))
    {'0': ['0.weight'], '2': ['2.weight']}
    """
    family = family_of(model)
    names = list(weights_of(model, Scope(str(scope))))
    found: dict[str, list[str]] = {}
    if family is None:
        for name in names:
            found.setdefault(name.rpartition(".")[0], []).append(name)
        return found
    path = blocks_path(model)
    for place, _ in model.get_submodule(path).named_children():
        for part, fields in PARTS.items():
            within = tuple(f"{path}.{place}.{getattr(family, field)}." for field in fields)
            found[f"{place} {part}"] = [name for name in names if name.startswith(within)]
    return {part: names for part, names in found.items() if names}


def eigenvalues(
    networks: Networks,
    task: Task,
    batches: Sequence[Batch],
    *,
    scope: Scope | str = "*",
    iterations: int = 100,
    seed: int = 0,
) -> Eigenvalues:
    """Return the largest eigenvalue of the Hessian of every part, for every batch.

    The loss is that of the task, in evaluation mode, at the weights a network uses: of a laid
    one, at the quantised weights, as its straight-through gradients are (Bai et al. 2021,
    BinaryBERT, figure 3). The parts of a Transformer are query and key, value, and output of
    the attention, and both matrices of the feed-forward part, of every layer.

    Args:
        networks: by name, the uncompressed one first; unchanged.
        task: gives the call and the loss.
        batches: with targets, on the device of the networks.
        scope: which modules count.
        iterations: of the power iteration, at most.
        seed: of its first vectors.

    Raises:
        TaskError: there is no batch.
        ModelError: an eigenvalue is not finite, or the networks have different parts.

    >>> from laconic.models import digits_cnn
    >>> batch = Batch((torch.zeros(2, 1, 8, 8),), torch.tensor([0, 1]))
    >>> pair = (batch.inputs[0], batch.targets)
    >>> from laconic.tasks import Task
    >>> task, networks = Task(pair, pair, pair), {"float": digits_cnn()}
    >>> list(eigenvalues(networks, task, [batch], scope="fc*", iterations=2).values["float"])
    ['fc1', 'fc2']
    """
    _some(batches)
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    for name, network in networks.items():
        parts = parts_of(network, scope)
        other = set(parts).symmetric_difference(next(iter(found.values()), parts))
        if other:
            raise ModelError(
                f"'{name}' and the first network differ in '{min(other)}'; narrow scope"
            )
        plain, tensors = probe(network, itertools.chain.from_iterable(parts.values()))
        values = eigenvalues_of(
            losses(plain, task, progress(iter(batches), f"eigenvalues: {name}", len(batches))),
            {part: [tensors[each] for each in names] for part, names in parts.items()},
            seed=seed,
            iterations=iterations,
            find=largest_eigenvalue,
        )
        found[name] = {part: tuple(each) for part, each in values.items()}
    return Eigenvalues(found)


@dataclass(frozen=True)
class LossSurface(Analysis):
    """The loss of some networks where two weights are moved by a constant.

    Attributes:
        tensors: names of the two weights.
        steps: what a weight is moved by, in units of its own mean size.
        losses: network -> loss [steps of the first, steps of the second].

    >>> surface = LossSurface(("a", "b"), (0.0, 1.0), {"float": ((1.0, 2.0), (3.0, 5.0))})
    >>> surface.height("float")
    4.0
    """

    tensors: tuple[str, str]
    steps: tuple[float, ...]
    losses: Mapping[str, Grid]

    def height(self, network: str) -> float:
        """Return the difference of the highest and the lowest loss; nan where a loss is none."""
        values = list(itertools.chain.from_iterable(self.losses[network]))
        return math.nan if any(map(math.isnan, values)) else max(values) - min(values)


def loss_surface(
    networks: Networks,
    task: Task,
    batches: Sequence[Batch],
    *,
    tensors: tuple[str, str],
    reach: float = 1.0,
    points: int = 11,
) -> LossSurface:
    """Return the loss at ``w + x mean|w|`` for each of two weights w, on a grid of x.

    Latent weights are moved and then quantised (Bai et al. 2021, BinaryBERT, figure 2, with the
    value projections of the first two layers). A codebook that is trained hides what moves, and
    behind a LayerNorm of even gains a constant does nothing: its outputs add up to zero.

    Args:
        networks: by name; unchanged.
        task: gives the call and the loss.
        batches: with targets, on the device of the networks; their losses are averaged.
        tensors: names of two weights.
        reach: the largest x.
        points: of the grid on a side; odd, so that x = 0 is one of them.

    Raises:
        TaskError: there is no batch.
        ModelError: there is no such weight, they are the same, or the points are not odd.

    >>> from laconic.tasks import Task
    >>> pair = (torch.ones(2, 2), torch.tensor([0, 1]))
    >>> network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> names = ("0.weight", "1.weight")
    >>> task, batch = Task(pair, pair, pair), Batch(*pair)
    >>> loss_surface({"float": network}, task, [batch], tensors=names, points=3).steps
    (-1.0, 0.0, 1.0)
    """
    _some(batches)
    steps = _around_zero(reach, points)
    found = {}
    for name, network in networks.items():
        moved = copied(network)
        latents = [latent_of(moved, tensor)[1] for tensor in tensors]
        if latents[0] is latents[1]:
            raise ModelError(f"'{tensors[0]}' and '{tensors[1]}' are the same weight; name two")
        for still in laid_tensors(moved):  # one that does not move: decoding takes time
            if all(latent_of(moved, still)[1] is not latent for latent in latents):
                bake(moved, still)
        one, other = (torch.full_like(w, float(w.detach().abs().mean())) for w in latents)
        first, second = [one, torch.zeros_like(other)], [torch.zeros_like(one), other]
        plane = _Plane(moved, latents, first, second)
        found[name] = plane.losses(task, batches, (steps, steps), f"loss surface: {name}")
    return LossSurface(tensors, steps, found)


@dataclass(frozen=True)
class Trajectory(Analysis):
    """The path of training in the plane it moved most in, and the loss around its end.

    Attributes:
        path: (first, second) coordinate of every snapshot; the last one is the origin.
        explained: share of the snapshots' variance along each direction, 0 to 1.
        axes: coordinates of the grid along each direction.
        losses: [coordinates of the first direction, of the second].

    >>> Trajectory(((2.0, 0.0), (0.0, 0.0)), (0.9, 0.1), ((0.0,), (0.0,)), ((1.5,),)).path[-1]
    (0.0, 0.0)
    """

    path: tuple[tuple[float, float], ...]
    explained: tuple[float, float]
    axes: Axes
    losses: Grid


def trajectory(
    network: nn.Module,
    snapshots: Sequence[Snapshot],
    task: Task,
    batches: Sequence[Batch],
    *,
    reach: float = 1.25,
    points: int = 11,
) -> Trajectory:
    """Return how training moved in two directions, and the loss around where it ended.

    The directions are the first principal components of ``w_t - w_final`` (Li et al. 2018,
    Visualizing the Loss Landscape of Neural Nets, section 7). Of a laid network the latent
    weights move. Everything else is as in the last snapshot, where that has it.

    Args:
        network: its structure; its numbers are not looked at where snapshots are state dicts.
        snapshots: at least three, in order: state dicts, or all parameters as one vector
            [numbers] in the order of ``network.parameters()``.
        task: gives the call and the loss.
        batches: with targets, on the device of the network; their losses are averaged.
        reach: of the grid to each side, in units of the furthest snapshot.
        points: of the grid on a side; odd, so that the last snapshot is one of them.

    Raises:
        TaskError: there is no batch.
        ModelError: too few snapshots, all on one line, or of another network.

    >>> from laconic.tasks import Task
    >>> pair = (torch.ones(2, 1), torch.tensor([0, 1]))
    >>> network, path = nn.Linear(1, 2, bias=False), torch.tensor([[2.0, 0.0], [1, 1], [0, 0]])
    >>> found = trajectory(network, list(path), Task(pair, pair, pair), [Batch(*pair)])
    >>> [round(share, 2) for share in found.explained], found.path[-1]
    ([0.75, 0.25], (0.0, 0.0))
    """
    _some(batches)
    moved = copied(network)
    vectors = [_flat(each, moved) for each in snapshots]
    directions, explained, path = _principal(vectors)
    if isinstance(snapshots[-1], Mapping):
        moved.load_state_dict(snapshots[-1], strict=False)  # what is no parameter, too
    parameters = list(moved.parameters())
    # A copy: the parameters become views of it, and they will move.
    nn.utils.vector_to_parameters(vectors[-1].clone(), parameters)
    sizes = [parameter.numel() for parameter in parameters]
    pieces = [
        [piece.view_as(w) for piece, w in zip(direction.split(sizes), parameters, strict=True)]
        for direction in directions
    ]
    furthest = [max(abs(at[direction]) for at in path) for direction in (0, 1)]
    axes = _around_zero(reach * furthest[0], points), _around_zero(reach * furthest[1], points)
    plane = _Plane(moved, parameters, *pieces)
    return Trajectory(path, explained, axes, plane.losses(task, batches, axes, "trajectory"))


def _flat(snapshot: Snapshot, network: nn.Module) -> Tensor:
    """Return a snapshot as one vector [numbers], on the device of the network."""
    parameters = dict(network.named_parameters())
    if isinstance(snapshot, Mapping):
        missing = [name for name in parameters if name not in snapshot]
        if missing:
            raise ModelError(f"a snapshot has no '{missing[0]}'; give state dicts of the network")
        snapshot = torch.cat([snapshot[name].detach().flatten() for name in parameters])
    size = sum(parameter.numel() for parameter in parameters.values())
    if snapshot.shape != (size,):
        raise ModelError(
            f"a snapshot is {tuple(snapshot.shape)}, the network has {size} parameters; give all "
            "of them, as one vector or as a state dict"
        )
    if not bool(snapshot.isfinite().all()):
        raise ModelError("a snapshot holds NaN or infinity; leave it out")
    return snapshot.detach().to(next(iter(parameters.values())))


Path = tuple[tuple[float, float], ...]


def _principal(points: Sequence[Tensor]) -> tuple[list[Tensor], tuple[float, float], Path]:
    """Return two directions [numbers], the variance they explain, and the coordinates.

    By the eigenvectors of the inner products of the snapshots [count, count]: they are few, and
    each is as long as the network is large.
    """
    if len(points) < 3:
        raise ModelError(f"{len(points)} snapshots span no plane; give at least three")
    away = torch.stack([point - points[-1] for point in points])
    centred = away - away.mean(0)
    variances, vectors = torch.linalg.eigh((centred @ centred.T).double())
    if not float(variances[-2]) > FLAT * float(variances[-1]) > 0:
        raise ModelError("the snapshots lie on a line, and there is no second direction to show")
    directions = []
    for place in (-1, -2):
        direction = centred.T @ vectors[:, place].to(centred)
        direction /= direction.norm()
        # Of the two signs the one in which training comes from the right and from above.
        directions.append(direction * (-1 if float(direction @ away[0]) < 0 else 1))
    shares = (variances[[-1, -2]] / variances.clamp(min=0).sum()).tolist()
    path = tuple((float(each @ directions[0]), float(each @ directions[1])) for each in away)
    return directions, (shares[0], shares[1]), path


@dataclass(frozen=True)
class BitSensitivity(Analysis):
    """What a network scores where a single block of it is quantised.

    Attributes:
        baseline: metric -> score of the network as it is.
        scores: block -> name of the representation -> metric -> score.

    >>> found = BitSensitivity({"loss": 1.0}, {"fc": {"2 bit": {"loss": 1.5}}})
    >>> found.change("fc", "2 bit", "loss")
    0.5
    """

    baseline: Mapping[str, float]
    scores: Mapping[str, Mapping[str, Mapping[str, float]]]

    def change(self, block: str, representation: str, metric: str) -> float:
        """Return what quantising a block adds to a score."""
        return self.scores[block][representation][metric] - self.baseline[metric]


def bit_sensitivity(
    network: nn.Module,
    task: Task,
    representations: Mapping[str, Representation | int],
    *,
    scope: Scope | str = "*",
    split: str = "validate",
) -> BitSensitivity:
    """Return every score with one block after the other quantised, the rest as it is.

    A block is a layer of a list of layers; any other module stands alone.

    Args:
        network: unchanged.
        task: scores it.
        representations: by name, what blocks are quantised to; a number of bits is symmetric.
        scope: which modules count.
        split: "train", "validate" or "test".

    Raises:
        ScopeError: the scope selects no weight of two dimensions or more.

    >>> from laconic.tasks import Task
    >>> pair = (torch.ones(2, 2), torch.tensor([0, 1]))
    >>> task, network = Task(pair, pair, pair), nn.Sequential(nn.Linear(2, 2))
    >>> list(bit_sensitivity(network, task, {"8 bit": 8}).scores)
    ['0']
    """
    chosen = Scope(str(scope))
    weights = weights_of(network, chosen)
    blocks = blocks_of(network, weights)
    if not blocks:
        raise ScopeError(f"'{chosen}' selects no weight of two or more dimensions")
    scores: dict[str, dict[str, Mapping[str, float]]] = {block: {} for block in blocks}
    pairs = list(itertools.product(blocks, representations))
    for block, kind in progress(iter(pairs), "bit sensitivity", len(pairs)):
        quantised = copied(network)
        representation = Representation.understood(representations[kind])
        lay_each(quantised, {name: weights[name] for name in blocks[block]}, representation)
        scores[block][kind] = task.score(quantised, split)
    return BitSensitivity(task.score(network, split), scores)


@dataclass(frozen=True)
class _Plane:
    """Weights of a network, and the two directions in which they are moved."""

    network: nn.Module
    weights: Sequence[Tensor]
    first: Sequence[Tensor]
    second: Sequence[Tensor]

    def losses(self, task: Task, batches: Sequence[Batch], axes: Axes, label: str) -> Grid:
        """Return the loss around where the weights stand now [places along first, second]."""
        start = [weight.detach().clone() for weight in self.weights]
        rows = progress(iter(axes[0]), label, len(axes[0]))
        return tuple(tuple(self._loss(task, batches, start, (x, y)) for y in axes[1]) for x in rows)

    def _loss(
        self,
        task: Task,
        batches: Sequence[Batch],
        start: Sequence[Tensor],
        place: tuple[float, float],
    ) -> float:
        with torch.no_grad():
            for weight, begin, one, other in zip(
                self.weights, start, self.first, self.second, strict=True
            ):
                weight.copy_(begin + place[0] * one + place[1] * other)
        with evaluation(self.network):
            values = [float(task.loss(task.call(self.network, one), one)) for one in batches]
        return statistics.fmean(values)


def _around_zero(reach: float, points: int) -> tuple[float, ...]:
    """Return equally spaced numbers from -reach to reach, 0 among them."""
    if points < 3 or points % 2 == 0:
        raise ModelError(f"a grid of {points} points has no middle; give an odd number, 3 or more")
    half = points // 2
    return tuple(round(reach * place / half, 12) for place in range(-half, half + 1))


def _some(batches: Sequence[Batch]) -> None:
    if not batches:
        raise TaskError("there is no batch to compute a loss of; give at least one")
