"""Laws of axes, for networks of random operations."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.axis_families import TOLERANCE, masked_layer_norm, noise, some, zero_
from laconic.structure.axes import find_axes, permute_, slice_


class Tangle(nn.Module):
    """Random operations on vectors, each on some of the results before it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.draw, self.parts, self.plan = random.Random(seed), nn.ModuleList(), []
        self.sizes = [6]
        while len(self.plan) < 9:
            self.add(*(self.draw.choice(range(len(self.sizes))[-4:]) for _ in range(2)))
        self.scores = nn.Linear(sum(self.sizes[-3:]), 3)

    def add(self, one: int, other: int) -> None:
        size, width = self.sizes[one], self.sizes[other]
        modules = {
            "linear": lambda: nn.Linear(size, self.draw.choice([4, 6, 8, 12])),
            "norm": lambda: nn.LayerNorm(size),
            "batch norm": lambda: nn.BatchNorm1d(size),
            "groups": lambda: Grouped(size, groups=2 if size % 2 == 0 else size),
        }
        sizes = {
            "join": size + width,
            "add": size if size == width else 0,
            "gate": size // 2 if size % 2 == 0 else 0,
            "shuffle": size if size % 2 == 0 else 0,
            "pad": size + 2,
            "attend": size if size == width else 0,
            "largest": size // 4 if size % 4 == 0 else 0,
            "outer": size * width if size * width < 80 else 0,
        }
        kind = self.draw.choice([*modules, *sizes, "linear", "linear"])
        if kind in modules:
            self.parts.append(modules[kind]())
            features = getattr(self.parts[-1], "out_features", size)
            self.sizes.append(features)
            self.plan.append(("module", one, len(self.parts) - 1))
        elif sizes[kind]:
            self.sizes.append(sizes[kind])
            self.plan.append((kind, one, other))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for kind, one, other in self.plan:
            y = values[one]
            if kind == "module":
                values.append(torch.tanh(self.parts[other](y)))
            else:
                values.append(TANGLED[kind](y, values[other]))
        return self.scores(torch.cat(values[-3:], 1))


class Grouped(nn.Conv1d):
    def __init__(self, size: int, *, groups: int) -> None:
        super().__init__(size, size, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, None])[:, :, 0]


TANGLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "join": lambda x, y: torch.cat([x, y], 1),
    "add": lambda x, y: x + y,
    "gate": lambda x, y: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid(),
    "shuffle": lambda x, y: x.view(len(x), 2, -1).transpose(1, 2).reshape(len(x), -1),
    "pad": lambda x, y: F.pad(x, (1, 1)),
    "attend": lambda x, y: (x @ y.T).softmax(-1) @ y,
    "largest": lambda x, y: x.unflatten(1, (-1, 4)).amax(2),
    "outer": lambda x, y: (x[:, :, None] * y[:, None]).flatten(1),
}


@pytest.mark.parametrize("seed", range(25))
def test_the_laws_hold_for_random_networks(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed)
    model, x = Tangle(seed).double().eval(), noise(5, 6)()
    for parameter in model.parameters():
        parameter.data.normal_(0.1, 0.4)
    axes = [axis for axis in find_axes(model, x) if axis.frozen is None]
    before = model(x)
    for group in [*([axis] for axis in axes), axes]:
        kept = {axis: some(axis, seed) for axis in group}
        small, zeroed, permuted = (copy.deepcopy(model) for _ in range(3))
        slice_(small, kept)
        zero_(zeroed, kept)
        with monkeypatch.context() as patched:
            patched.setattr(F, "layer_norm", masked_layer_norm)
            expected = zeroed(x)
        torch.testing.assert_close(small(x), expected, rtol=TOLERANCE, atol=TOLERANCE)
        for axis in group:
            permute_(permuted, axis, torch.randperm(axis.size).tolist())
        torch.testing.assert_close(permuted(x), before, rtol=TOLERANCE, atol=TOLERANCE)
