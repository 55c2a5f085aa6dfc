"""The quantisation noise step: training in which random blocks alone are quantised."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from laconic.errors import ChainError
from laconic.step import Count, State, Step, UpToOne, run_step
from laconic.weights.laid import Laid, bake, laid_tensors, latent_of, lay, weights_of
from laconic.weights.quantize import planned
from laconic.weights.representation import Float, Representation, rows_of

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["QuantNoise", "noisy", "random_blocks"]


class QuantNoise(Step):
    """Train while a random share of the blocks is quantised, the rest is not.

    In every update of the training each block of each quantised weight is, with probability
    ``chance``, what it will be in the file, with a straight-through gradient, and else the
    number that is trained, with a gradient of its own (Fan et al. 2021, Training with
    Quantization Noise for Extreme Model Compression). Evaluation, and what is
    shipped, is quantised as a whole; nothing of this is left when the training ends.

    With ``proxy="zero"`` blocks are zero instead, as the paper does for product quantisation,
    whose clusters are found after the training; weights that are not quantised yet take part.
    A representation whose assignments are fixed when it is laid (``KMeans``, ``Gobo``,
    ``Product``) is laid after such a training, not before it.

    A weight that several layers share is drawn for each of them.
    Draws come from the generator that dropout draws from. Training seeds it for every update,
    so a resumed run goes on with the same draws.

    Attributes:
        scope: modules whose matrices and kernels get noise.
        chance: of each block to be chosen; the paper takes 0.05 to 0.2.
        block: consecutive weights of a row that are chosen together.
        proxy: what a chosen block is: its quantised "value" or "zero".
        retrain: the training.

    >>> from laconic.recover import Train
    >>> QuantNoise(0.2, retrain=Train(epochs=3)).block
    8
    """

    positional: ClassVar[tuple[str, ...]] = ("chance",)

    chance: UpToOne = 0.1
    block: Count = 8
    proxy: Literal["value", "zero"] = "value"
    retrain: Step

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse what noise cannot prepare for, and what the training refuses.

        Raises:
            ChainError: nothing in the scope is quantised, or its codes are fixed already.
        """
        super().check(model, task, earlier)
        self._check_codes(planned(model, self.scope, earlier))
        self.retrain.check(model, task, (*earlier, self))

    def abridged(self, repeats: int = 1) -> tuple[Step, ...]:
        """Return what the training does besides."""
        return self.retrain.abridged()

    def apply(self, state: State) -> None:
        """Train with noise."""
        self._check_codes(planned(state.model, self.scope, ()))
        names = list(weights_of(state.model, self.scope))
        plain = [name for name in names if latent_of(state.model, name)[0] is None]
        if self.proxy == "zero":
            for name in plain:
                lay(state.model, name, Float())
        laid = laid_tensors(state.model)
        with noisy([laid[name][0] for name in names if name in laid], self):
            run_step(self.retrain, state)
        if self.proxy == "zero":
            for name in names:
                _bake_plain(state.model, name)

    def _check_codes(self, found: Sequence[tuple[str, Representation]]) -> None:
        for name, representation in found:
            if representation.fixed:
                raise ChainError(
                    f"quant_noise after quantize ({representation.name}) at '{name}': the codes "
                    "are fixed and do not follow the weights; quantize after the training"
                )
        plain = all(isinstance(each, Float) for _, each in found)
        if self.proxy == "value" and plain:
            raise ChainError(
                f"quant_noise: nothing in '{self.scope}' is quantised; put quantize before it, or "
                "choose proxy 'zero'"
            )

    def mixed(self, weight: Tensor, decoded: Tensor, surrogate: Tensor) -> tuple[Tensor, Tensor]:
        """Return value and surrogate of a weight of which random blocks are quantised.

        Args:
            weight: latent [any shape].
            decoded: its quantised value.
            surrogate: what has the gradient of that.
        """
        chosen = random_blocks(weight.shape, self.chance, self.block).to(weight.device)
        if self.proxy == "zero":
            return weight.detach().masked_fill(chosen, 0.0), weight
        return torch.where(chosen, decoded, weight.detach()), torch.where(chosen, surrogate, weight)


@contextmanager
def noisy(layers: Iterable[Laid], noise: QuantNoise) -> Iterator[None]:
    """Quantise random blocks alone in training forwards, inside a with block.

    Args:
        layers: what is laid on the weights.
        noise: which blocks.

    >>> from laconic.recover import Train
    >>> layer = Laid(Float())
    >>> with noisy([layer], QuantNoise(1.0, proxy="zero", retrain=Train())):
    ...     layer(torch.ones(3))
    tensor([0., 0., 0.])
    """
    changed = dict.fromkeys(layers)
    try:
        for layer in changed:
            layer.quant_noise = noise
        yield
    finally:
        for layer in changed:
            layer.quant_noise = None


def random_blocks(shape: torch.Size, chance: float, block: int) -> Tensor:
    """Return which weights are in chosen blocks, bool [shape], drawn with torch's generator.

    Args:
        shape: of the weight.
        chance: of each block to be chosen.
        block: consecutive weights of a row (an index of the first dimension).

    >>> random_blocks(torch.Size([1, 3]), 1.0, 2).tolist()
    [[True, True, True]]
    """
    rows, length = rows_of(shape)
    # On the CPU, so that every device draws the same.
    chosen = torch.rand(rows, math.ceil(length / block)) < chance
    return chosen.repeat_interleave(block, dim=1)[:, :length].reshape(shape)


def _bake_plain(model: nn.Module, name: str) -> None:
    """Make a weight plain again on which nothing but its own numbers is laid."""
    layer, _ = latent_of(model, name)
    if layer is not None and isinstance(layer.representation, Float) and layer.mask is None:
        bake(model, name)
