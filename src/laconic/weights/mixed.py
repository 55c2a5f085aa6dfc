"""The mixed precision step: more bits for the blocks that the loss curves most in."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from laconic.errors import ModelError, ScopeError
from laconic.models.families import blocks_path
from laconic.step import Count, State, Step
from laconic.tasks.task import labelled, needed
from laconic.weights.laid import lay_each, weights_of
from laconic.weights.representation import Representation, check_groups
from laconic.weights.slopes import drawn, eigenvalues, losses, probe
from laconic.weights.uniform import Symmetric

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["MixedPrecision", "blocks_of", "most_sensitive", "sensitivity"]

logger = logging.getLogger(__name__)


def sensitivity(eigenvalues: Sequence[float]) -> float:
    """Return ``|mean(lambda)| + std(lambda)``, the deviation that of all of them.

    How much a block's loss curves, and how much that differs over the data (Shen et al. 2020,
    Q-BERT, Hessian-based mixed precision).

    Args:
        eigenvalues: the largest of the block's Hessian, one per batch; not empty.

    >>> sensitivity([-3.0, -1.0])
    3.0
    """
    return abs(statistics.fmean(eigenvalues)) + statistics.pstdev(eigenvalues)


def most_sensitive(sensitivities: Mapping[str, float], share: float) -> list[str]:
    """Return the names of the most sensitive blocks: a share of them, never none, never all.

    Args:
        sensitivities: by name of the block, at least two; of equals the first goes first.
        share: of the blocks, between 0 and 1.

    >>> most_sensitive({"a": 1.0, "b": 3.0, "c": 2.0}, 0.7)
    ['b', 'c']
    """
    count = min(max(round(share * len(sensitivities)), 1), len(sensitivities) - 1)
    return sorted(sensitivities, key=lambda name: -sensitivities[name])[:count]


def blocks_of(model: nn.Module, tensors: Iterable[str]) -> dict[str, list[str]]:
    """Return tensors by block: a layer of a list of layers, else the module they are in.

    Args:
        model: with or without a list of layers (a ModuleList).
        tensors: dotted names.

    >>> layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))])
    >>> network = nn.ModuleDict({"layers": layers, "head": nn.Linear(2, 1)})
    >>> blocks_of(network, ["layers.1.0.weight", "head.weight"])
    {'layers.1': ['layers.1.0.weight'], 'head': ['head.weight']}
    """
    layers = _layers(model)
    found: dict[str, list[str]] = {}
    for name in tensors:
        module = name.rpartition(".")[0]
        within = [layer for layer in layers if name.startswith(f"{layer}.")]
        found.setdefault(within[0] if within else module, []).append(name)
    return found


def _layers(model: nn.Module) -> list[str]:
    try:
        path = blocks_path(model)
    except ModelError:  # there is no list
        return []
    return [f"{path}.{place}" for place, _ in model.get_submodule(path).named_children()]


class MixedPrecision(Step):
    """Give the most sensitive blocks one representation and the others another.

    A block is a layer of a Transformer, and any other module on its own. It is as sensitive as
    ``|mean(lambda)| + std(lambda)`` is large, lambda the eigenvalue of largest magnitude of the
    Hessian of the task's loss with respect to the block's weights, for several batches of
    training examples (Shen et al. 2020, Q-BERT). Matrices and kernels are quantised; what the
    scope leaves out, such as embeddings, stays as it is. The curvature is that of the network
    as it is now, at the quantised weights if it has them.

    Attributes:
        low: of the less sensitive blocks.
        high: of the ``share`` most sensitive blocks.
        share: of the blocks; at least one gets each representation.
        batches: at most so many eigenvalues per block.
        batch: examples per batch.
        iterations: of the power iteration, at most; fewer where it stands still.

    >>> MixedPrecision(3, 8, scope="bert.encoder.*")
    MixedPrecision(Symmetric(3), Symmetric(), scope=Scope('bert.encoder.*'))
    """

    positional: ClassVar[tuple[str, ...]] = ("low", "high")

    low: Representation = Symmetric(bits=2)
    high: Representation = Symmetric(bits=4)
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    batches: Count = 8
    batch: Count = 32
    iterations: Count = 30

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse to run without a task or its targets, and a scope with fewer than two blocks."""
        needed(task, f"{self.name} needs batches")
        labelled(task, f"{self.name} reads targets", "quantize without looking at the loss")
        self._blocks(model)
        check_groups(self.represented(model))

    def represented(self, model: nn.Module) -> list[tuple[Representation, Mapping[str, Tensor]]]:
        """Return both representations, either of which a weight may get."""
        weights = weights_of(model, self.scope)
        return [(each, weights) for each in (self.low, self.high)]

    @property
    def repeats(self) -> int:
        """Return the iterations for each block, over all batches."""
        return self.batches * self.iterations

    def abridged(self, repeats: int = 1) -> tuple[Step, ...]:
        """Return the same with so many iterations, on one batch."""
        few = {"batches": 1, "iterations": min(repeats, self.repeats)}
        return (self.model_copy(update=few),)

    def apply(self, state: State) -> None:
        """Measure every block, then lay one of the representations on its weights."""
        weights, blocks = weights_of(state.model, self.scope), self._blocks(state.model)
        found = self.sensitivities(state, blocks)
        high = most_sensitive(found, self.share)
        for block, value in found.items():
            kind = "high" if block in high else "low"
            logger.info("%s: %s: sensitivity %.3g, %s", self.name, block, value, kind)
        for representation, chosen in ((self.high, True), (self.low, False)):
            names = [n for block in blocks if (block in high) == chosen for n in blocks[block]]
            lay_each(state.model, {name: weights[name] for name in names}, representation)

    def sensitivities(self, state: State, blocks: Mapping[str, Sequence[str]]) -> dict[str, float]:
        """Return the sensitivity of every block; the network stays as it is.

        Args:
            state: the model and the task.
            blocks: names of the weights of each.

        Raises:
            TaskError: there is no task.
            ModelError: the loss has no finite second derivative.
        """
        task = needed(state.task, f"{self.name} needs batches")
        network, tensors = probe(state.model, [n for names in blocks.values() for n in names])
        found = eigenvalues(
            losses(network, task, drawn(state, task, self.batches, self.batch, self.name)),
            {block: [tensors[name] for name in names] for block, names in blocks.items()},
            seed=state.seed,
            iterations=self.iterations,
        )
        return {block: sensitivity(values) for block, values in found.items()}

    def _blocks(self, model: nn.Module) -> dict[str, list[str]]:
        weights = weights_of(model, self.scope)
        if not weights:
            raise ScopeError(f"'{self.scope}' selects no weight of two or more dimensions")
        blocks = blocks_of(model, weights)
        if len(blocks) < 2:
            raise ScopeError(
                f"'{self.scope}' selects one block, '{next(iter(blocks))}', and there is nothing "
                "to mix; widen the scope, or quantize it"
            )
        return blocks
