"""Ghost layers: more features from cheap operations, for Transformers and convolutions."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.errors import ModelError
from laconic.models.layers import describe, layer

__all__ = ["GhostConv2d", "GhostProjection", "neighbour_mean"]

# A file must not make a constructor or a forward loop for long.
MOST_PARTS, MOST_GHOSTS, MOST_TAPS = 128, 64, 64
ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU}
# A word in place of a number: the gain is a parameter.
LEARNED = "learned"


def neighbour_mean(hidden: Tensor, logits: Tensor) -> Tensor:
    """Return, channel by channel, a weighted mean of each token and its neighbours.

    ``O[i, c] = sum_m softmax(W[c])_m X[i - ceil((k + 1) / 2) + m, c]`` for m = 1 ... k, with
    zeros beyond the ends (Huang et al. 2021, GhostBERT: the normalised depthwise convolution).
    A padding token is a neighbour like any other.

    Args:
        hidden: X [batch, tokens, channels].
        logits: W [channels, k].

    Returns:
        O [batch, tokens, channels].

    >>> tokens = torch.tensor([1.0, 2.0, 4.0, 8.0]).reshape(1, 4, 1)
    >>> [round(float(value), 3) for value in neighbour_mean(tokens, torch.zeros(1, 3)).flatten()]
    [1.0, 2.333, 4.667, 4.0]
    """
    channels, taps = logits.shape
    before = taps // 2
    padded = F.pad(hidden.transpose(1, 2), (before, taps - 1 - before))
    kernel = torch.softmax(logits, dim=-1)[:, None, :]
    return F.conv1d(padded, kernel, groups=channels).transpose(1, 2)


class GhostProjection(nn.Module):
    """A projection out of heads or neurons, with ghosts of its features (GhostBERT).

    The input is cut into equal parts, one for each of ``dense``; each part has its feature
    ``X_p = dense_p(x_p)``, and the layer returns

        sum_p (X_p + gain * sum_f act(neighbour_mean(X_p, W_{f,p}))) + bias.

    Huang et al. 2021 describe one part for each head or fold of neurons. One part with one
    ghost is the layout of their m = 12/12, whose 55,296 parameters for BERT-base are printed.
    No code is published: that the feature excludes the bias is an assumption.

    ``logits``, the W of all ghosts end to end, has one dimension on purpose: it is a table of
    softmax inputs, not a matrix that could be pruned, quantised or decayed towards zero.

    Args:
        dense: descriptions of the parts' projections (see models.layers), without bias.
        outputs: channels of every projection.
        ghosts: of each part, F in the paper.
        taps: tokens under a kernel, k.
        gain: factor of the ghosts; "learned": a parameter that starts at 0, so that the layer
            starts as the projection alone.
        activation: of a ghost: "none" or "relu".
        bias: whether a bias is added, once.

    Raises:
        ModelError: a number or a word is out of bounds.

    >>> half = {"Linear": {"in_features": 4, "out_features": 6, "bias": False}}
    >>> ghosted = GhostProjection([half, half], 6)
    >>> ghosted(torch.zeros(2, 5, 8)).shape, ghosted.logits.shape
    (torch.Size([2, 5, 6]), torch.Size([36]))
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        dense: Sequence[Mapping[str, Any]],
        outputs: int,
        *,
        ghosts: int = 1,
        taps: int = 3,
        gain: float | Literal["learned"] = 1.0,
        activation: str = "none",
        bias: bool = True,
    ) -> None:
        super().__init__()
        _within("parts", len(dense), MOST_PARTS)
        _within("ghosts", ghosts, MOST_GHOSTS)
        _within("taps", taps, MOST_TAPS)
        if activation not in ACTIVATIONS:
            raise ModelError(f"a ghost has no activation {activation!r}; give 'none' or 'relu'")
        self.outputs, self.ghosts, self.taps = outputs, ghosts, taps
        self.activation = activation
        self.dense = nn.ModuleList(layer(spec) for spec in dense)
        self.act = ACTIVATIONS[activation]()
        self.logits = nn.Parameter(torch.zeros(len(dense) * ghosts * outputs * taps))
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs)) if bias else None)
        self.fixed_gain = None if gain == LEARNED else float(gain)
        if self.fixed_gain is None:
            self.gain = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        """Give its own parameters the values that a new layer has; its parts have theirs."""
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments, with the projections as they are now."""
        return {
            "dense": [describe(projection) for projection in self.dense],
            "outputs": self.outputs,
            "ghosts": self.ghosts,
            "taps": self.taps,
            "gain": LEARNED if self.fixed_gain is None else self.fixed_gain,
            "activation": self.activation,
            "bias": self.bias is not None,
        }

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, tokens, inputs] to [batch, tokens, outputs]."""
        total = functools.reduce(torch.add, self._features(x))
        return total if self.bias is None else total + self.bias

    def _features(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the feature of each part, and its ghosts."""
        gain = self.gain if self.fixed_gain is None else self.fixed_gain
        logits = self.logits.view(len(self.dense), self.ghosts, self.outputs, self.taps)
        parts = x.chunk(len(self.dense), dim=-1)
        for part, projection, kernels in zip(parts, self.dense, logits, strict=True):
            feature = projection(part)
            yield feature
            yield from (gain * self.act(neighbour_mean(feature, kernel)) for kernel in kernels)


class GhostConv2d(nn.Module):
    """A convolution of which a share is computed and the rest made from it (GhostNet).

    ``Y' = X * f'`` for ceil(outputs / ratio) channels, and ``ratio - 1`` cheap depthwise
    convolutions of each, concatenated (Han et al. 2020, equations 2 and 3). As in the equations
    there is no norm or activation inside; the authors' code has both after either convolution.

    Args:
        primary: description of the first convolution (see models.layers), without bias.
        inputs: channels of the first convolution's output.
        outputs: channels of both together.
        ratio: channels for each that is convolved in full, s in the paper.
        taps: pixels a side of the cheap kernels, d in the paper; odd.
        bias: whether a bias is added.

    Raises:
        ModelError: a number is out of bounds.

    >>> conv = {"Conv2d": {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "padding": 1}}
    >>> ghosted = GhostConv2d(conv, 4, 8)
    >>> ghosted(torch.zeros(1, 3, 5, 5)).shape
    torch.Size([1, 8, 5, 5])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        primary: Mapping[str, Any],
        inputs: int,
        outputs: int,
        *,
        ratio: int = 2,
        taps: int = 3,
        bias: bool = False,
    ) -> None:
        super().__init__()
        _within("ratio", ratio, outputs, least=2)
        _within("taps", taps, MOST_TAPS)
        if inputs != math.ceil(outputs / ratio) or taps % 2 == 0:
            raise ModelError(
                f"{inputs} channels cannot become {outputs} at ratio {ratio} with {taps} taps; "
                f"give {math.ceil(outputs / ratio)} channels and an odd number of taps"
            )
        self.inputs, self.outputs, self.ratio, self.taps = inputs, outputs, ratio, taps
        self.surplus = inputs * ratio > outputs
        self.primary = layer(primary)
        self.cheap = nn.Conv2d(
            inputs, inputs * (ratio - 1), taps, padding=taps // 2, groups=inputs, bias=False
        )
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs)) if bias else None)

    def reset_parameters(self) -> None:
        """Give its own bias the value that a new layer has; its parts have theirs."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments, with the first convolution as it is now."""
        return {
            "primary": describe(self.primary),
            "inputs": self.inputs,
            "outputs": self.outputs,
            "ratio": self.ratio,
            "taps": self.taps,
            "bias": self.bias is not None,
        }

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, channels, height, width] to [batch, outputs, height, width] / stride."""
        whole = self.primary(x)
        y = torch.cat([whole, self.cheap(whole)], dim=1)
        y = y[:, : self.outputs] if self.surplus else y
        return y if self.bias is None else y + self.bias[:, None, None]


def _within(name: str, value: int, most: int, *, least: int = 1) -> None:
    if not least <= value <= most:
        raise ModelError(f"{name} {value} of a ghost layer must be from {least} to {most}")
