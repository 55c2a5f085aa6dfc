"""Networks whose axes are found: any forward over modules, and operations that are followed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.structure.axes import Axis, find_axes

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Network(nn.Module):
    """Modules, and a forward that uses them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.written = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self, x)


class Buffer(nn.Module):
    def __init__(self, values: Tensor, *, saved: bool = True) -> None:
        super().__init__()
        self.register_buffer("values", values, persistent=saved)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def example() -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(2))


def free(axes: list[Axis]) -> list[Axis]:
    return [axis for axis in axes if axis.frozen is None]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def mlp_axis(model: nn.Module) -> Axis:
    (axis,) = free(find_axes(model, example()))
    return axis


def zeroed(model: nn.Module, axis: Axis, kept: list[int]) -> nn.Module:
    """Return a copy with every parameter of the other elements at zero."""
    model = copy.deepcopy(model)
    gone = [element for element in range(axis.size) if element not in kept]
    tensors = dict(model.state_dict(keep_vars=True))
    with torch.no_grad():
        for use in axis.uses:
            tensors[use.name].index_fill_(use.dim, use.places()[gone].flatten(), 0.0)
    return model


# Name -> forward, its modules, sizes of the axes that are free.
FOLLOWED: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, nn.Module], list[int]]] = {
    "linear layers": (
        lambda m, x: m.b(m.a(x).relu()),
        {"a": nn.Linear(5, 8), "b": nn.Linear(8, 3)},
        [8],
    ),
    "added in place": (
        lambda m, x: m.c(m.b(m.a(x)).add_(m.a(x)).relu_()),
        {"a": nn.Linear(5, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 3)},
        [8],
    ),
    "joined": (
        lambda m, x: m.c(torch.cat([m.a(x), x, m.b(x)], 1)),
        {"a": nn.Linear(5, 8), "b": nn.Linear(5, 6), "c": nn.Linear(19, 3)},
        [8, 6],
    ),
    "joined twice": (
        lambda m, x: m.c(torch.cat([m.a(x), torch.cat([m.b(x), m.a(x)], 1)], 1)),
        {"a": nn.Linear(5, 8), "b": nn.Linear(5, 6), "c": nn.Linear(22, 3)},
        [8, 6],
    ),
    "joined, then pooled flat": (
        lambda m, x: m.c(torch.cat([m.a(x[:, None]), m.b(x[:, None])], 1).flatten(1)),
        {"a": nn.Conv1d(1, 4, 2), "b": nn.Conv1d(1, 3, 2), "c": nn.Linear(28, 3)},
        [4, 3],
    ),
    "joined, then one kernel for each": (
        lambda m, x: m.d(m.c(torch.cat([m.a(x[:, None]), m.b(x[:, None])], 1))).mean(2),
        {
            "a": nn.Conv1d(1, 4, 2),
            "b": nn.Conv1d(1, 3, 2),
            "c": nn.Conv1d(7, 7, 2, groups=7),
            "d": nn.Conv1d(7, 3, 1),
        },
        [4, 3],
    ),
    "halves of one layer": (
        lambda m, x: m.b(m.a(x).chunk(2, 1)[0] * m.a(x).chunk(2, 1)[1].sigmoid()),
        {"a": nn.Linear(5, 16), "b": nn.Linear(8, 3)},
        [8],
    ),
    "a gated linear unit": (
        lambda m, x: m.b(F.glu(m.a(x), 1)),
        {"a": nn.Linear(5, 16), "b": nn.Linear(8, 3)},
        [8],
    ),
    "results that are put somewhere": (
        lambda m, x: m.c(torch.mm(m.a(x).detach(), m.b.weight.detach(), out=torch.empty(0))),
        {"a": nn.Linear(5, 8), "b": nn.Linear(6, 8), "c": nn.Linear(6, 3)},
        [8, 6],
    ),
    "padded with zeros": (
        lambda m, x: m.b(F.pad(m.a(x), (2, 1))),
        {"a": nn.Linear(5, 8), "b": nn.Linear(11, 3)},
        [8],
    ),
    "the largest of each four": (
        lambda m, x: m.b(m.a(x).unflatten(1, (-1, 4)).amax(2)),
        {"a": nn.Linear(5, 16), "b": nn.Linear(4, 3)},
        [4],
    ),
    "a square matrix, again and again": (
        lambda m, x: m.c(m.b(m.b(m.a(x)).tanh()).tanh()),
        {"a": nn.Linear(5, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 3)},
        [8],
    ),
    "a matrix there and back": (
        lambda m, x: m.b(F.linear(F.linear(x, m.a.weight).relu(), m.a.weight.t())),
        {"a": nn.Linear(5, 8, bias=False), "b": nn.Linear(5, 3)},
        [8],
    ),
    "experts in one tensor": (
        lambda m, x: m.b(torch.einsum("bi,eoi->beo", m.a(x), m.e.weight).flatten(1)),
        {"a": nn.Linear(5, 8), "e": nn.Conv1d(6, 4, 8), "b": nn.Linear(24, 3)},
        [8, 4, 6],
    ),
    "groups, a multiplier for each": (
        lambda m, x: m.c(m.b(m.a(x[:, None]))).mean(2),
        {"a": nn.Conv1d(1, 4, 2), "b": nn.Conv1d(4, 12, 2, groups=4), "c": nn.Conv1d(12, 3, 1)},
        [4, 3],
    ),
    "transposed convolutions": (
        lambda m, x: m.c(m.b(m.a(x[:, None]).relu())).mean(2),
        {
            "a": nn.ConvTranspose1d(1, 4, 2),
            "b": nn.ConvTranspose1d(4, 6, 2, stride=2, bias=False),
            "c": nn.Conv1d(6, 3, 1),
        },
        [4, 6],
    ),
    "one scale for each": (
        lambda m, x: m.b(m.p(m.a(x))),
        {"a": nn.Linear(5, 8), "p": nn.PReLU(8), "b": nn.Linear(8, 3)},
        [8],
    ),
    "a saved vector": (
        lambda m, x: m.b(m.a(x) * m.c.values),
        {"a": nn.Linear(5, 8), "c": Buffer(torch.randn(8)), "b": nn.Linear(8, 3)},
        [8],
    ),
    "stretched and resampled": (
        lambda m, x: m.b(F.interpolate(m.a(x[:, :, None]).expand(-1, -1, 4), size=2)).mean(2),
        {"a": nn.Conv1d(5, 8, 1), "b": nn.Conv1d(8, 3, 1)},
        [8],
    ),
    "an unbatched product with a bias": (
        lambda m, x: torch.baddbmm(m.c.bias, m.a(x)[None], m.b(x)[None].transpose(1, 2))[0, :, :3],
        {"a": nn.Linear(5, 8), "b": nn.Linear(5, 8), "c": nn.Linear(1, 6)},
        [8],
    ),
    "a single number": (
        lambda m, x: m.b(m.a(x)) * m.c(x).sum().sum(0).softmax(0).cumsum(0),
        {"a": nn.Linear(5, 8), "b": nn.Linear(8, 3), "c": nn.Linear(5, 1)},
        [8],
    ),
    "queries of one head": (
        lambda m, x: m.o((m.q(x) @ m.k(x).T).softmax(-1) @ m.v(x)),
        {"q": nn.Linear(5, 8), "k": nn.Linear(5, 8), "v": nn.Linear(5, 6), "o": nn.Linear(6, 3)},
        [8, 6],
    ),
}
