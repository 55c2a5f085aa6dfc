"""Columns: what the rows of a layer's weight are multiplied with, patches of a convolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["columns", "groups_of", "unfolded"]


def columns(layer: nn.Module, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return what each row of a layer's weight is multiplied with, [groups, examples, width].

    Args:
        layer: a linear layer or a convolution of one or two dimensions.
        inputs: of its forward; the examples are in the order of these and of positions.
        mask: bool [batch, tokens], True where nothing is padding: of a linear layer's tokens, the
            others are left out.

    >>> import torch
    >>> columns(nn.Conv1d(1, 1, 2), torch.tensor([[[1.0, 2.0, 3.0]]]))
    tensor([[[1., 2.],
             [2., 3.]]])
    """
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        if mask is not None and mask.shape == inputs.shape[:-1]:
            inputs = inputs[mask]
        return inputs.reshape(1, -1, inputs.shape[-1])
    split = unfolded(layer, inputs).unflatten(1, (layer.groups, -1))
    return split.permute(1, 0, 3, 2).flatten(1, 2)


def unfolded(layer: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> Tensor:
    """Return the patches that a kernel sees [batch, channels * kernel, positions].

    Args:
        layer: a convolution of one or two dimensions.
        inputs: of its forward; one example may come without a dimension of its own.

    >>> import torch
    >>> unfolded(nn.Conv2d(2, 4, 3), torch.zeros(1, 2, 5, 5)).shape
    torch.Size([1, 18, 9])
    """
    if inputs.dim() < layer.weight.dim():
        inputs = inputs[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    sizes = [layer.kernel_size, layer.dilation, layer.stride]
    if isinstance(layer, nn.Conv1d):
        padded, sizes = padded.unsqueeze(2), [(1, *size) for size in sizes]
    kernel, dilation, stride = sizes
    return F.unfold(padded, kernel, dilation=dilation, stride=stride)


def groups_of(layer: nn.Module) -> int:
    """Return in how many groups a layer's channels are apart; 1 for any but a convolution.

    >>> groups_of(nn.Conv2d(4, 4, 3, groups=2)), groups_of(nn.Linear(2, 2))
    (2, 1)
    """
    return layer.groups if isinstance(layer, nn.Conv1d | nn.Conv2d) else 1
