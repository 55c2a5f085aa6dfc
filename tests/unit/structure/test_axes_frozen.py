"""Axes that are frozen, and why: operations, sizes in code, what only training runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from helpers.axes import Buffer, Network, example, free, parameter
from laconic.scope import Scope
from laconic.structure.axes import find_axes
from laconic.structure.elements import axes_of
from laconic.tasks import Task


def between(
    middle: Callable[[Tensor], Tensor], width: int = 8, **parts: Any
) -> Callable[[], nn.Module]:
    """Return a network with something between two linear layers."""

    def build() -> nn.Module:
        ends = {"a": nn.Linear(5, 8), "b": nn.Linear(width, 3)}
        return Network(lambda m, x: m.b(middle(m.a(x))), **ends, **parts)

    return build


# Name -> network, part of the reason why the 8 features of its first layer are frozen.
FROZEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "softmax": (between(lambda x: x.softmax(-1)), "softmax over it"),
    "largest": (between(lambda x: x - x.amax(-1, keepdim=True)), "amax over it"),
    "mean": (between(lambda x: x - x.mean(-1, keepdim=True)), "mean over it"),
    "sum": (between(lambda x: x / x.exp().sum(-1, keepdim=True)), "sum over it"),
    "everything": (between(lambda x: x / x.abs().max()), "max over it"),
    "sorted": (between(lambda x: x.topk(4)[0], 4), "no rule for topk"),
    "vector norm": (between(lambda x: F.normalize(x)), "no rule for linalg_vector_norm"),
    "constant": (between(lambda x: x * torch.arange(8)), "a constant meets it"),
    "made tensor": (between(lambda x: x.new_zeros(6, 8) + x), "a constant meets it"),
    "by index": (between(lambda x: x[:, [1, 0, 3]], 3), "picked by index"),
    "one element": (between(lambda x: x * x[:, :1]), "cut into parts that differ"),
    "told apart": (between(lambda x: x * x[:, 0, None]), "told apart"),
    "every second": (between(lambda x: x[:, ::2], 4), "every few elements"),
    "turned": (between(lambda x: x.flip(1)), "another order"),
    "rolled": (between(lambda x: x.roll(1, 1)), "another order"),
    "cropped": (between(lambda x: F.pad(x, (-1, 0)), 7), "cropped"),
    "repeated": (between(lambda x: x.repeat(1, 2), 16), "repeated"),
    "joined, then woven": (
        between(lambda x: torch.cat([x, x], 1).unflatten(1, (4, 4)).mT.flatten(1), 16),
        "a view that its factors do not fit",
    ),
    "seen as integers": (between(lambda x: x.view(torch.int32) * 1.0), "another kind"),
    "numbers taken out": (between(lambda x: x * x[0, 0].item()), "told apart"),
    "features as pixels": (
        between(lambda x: F.max_pool1d(x[:, None], 2)[:, 0], 4),
        "pixels, not features",
    ),
    "a size written down": (between(lambda x: x.reshape(6, 8) * 2), "does not follow it"),
    "a size computed with": (between(lambda x: x / x.shape[1] ** 0.5), "div.Tensor"),
    "a size asked for": (between(lambda x: x * 2 if x.shape[1] == 8 else x), "does not follow it"),
    "a least size": (between(lambda x: x * 2 if x.shape[1] < 8 else x), "[] becomes aten.mul"),
    "a size filled in": (between(lambda x: x / torch.full((1,), x.shape[1])), "full.default [8]"),
    "a size in a list": (
        between(lambda x: x / torch.tensor([1.0, x.shape[1]])[1:]),
        "lift_fresh.default [1.0, 8.0]",
    ),
    "numbers read elsewhere": (
        between(lambda x: x / torch.from_numpy(x.detach().numpy().mean(1, keepdims=True))),
        "lift_fresh",
    ),
    "features as instances": (
        between(lambda x: F.instance_norm(x[None])[0]),
        "a batch norm averages over it",
    ),
    "padded to a size": (between(lambda x: F.pad(x, (0, 12 - x.shape[1])), 12), "not follow it"),
    "norm without a weight": (
        lambda: nn.Sequential(
            nn.Linear(5, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 3)
        ),
        "does not follow it",
    ),
    "another parametrization": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 8)), nn.Linear(8, 3)),
        "no rule for _weight_norm",
    ),
    "transposed convolution in groups": (
        lambda: nn.Sequential(
            nn.Linear(5, 8), nn.Unflatten(1, (8, 1)), nn.ConvTranspose1d(8, 2, 1, groups=2)
        ),
        "no rule for transposed convolution in groups",
    ),
    "group of a norm": (
        lambda: nn.Sequential(
            nn.Linear(5, 8),
            nn.Unflatten(1, (8, 1)),
            nn.GroupNorm(2, 8),
            nn.Flatten(),
            nn.Linear(8, 3),
        ),
        "a group of a GroupNorm",
    ),
}


@pytest.mark.parametrize("name", list(FROZEN))
def test_frozen(name: str) -> None:
    build, why = FROZEN[name]
    axes = find_axes(build().eval(), example())
    first = [axis for axis in axes if axis.uses[0].dim == 0]
    assert any(why in str(axis.frozen) for axis in first), [axis.frozen for axis in first]
    wide = [axis for axis in axes if axis.size == 8]
    assert all(axis.frozen is not None for axis in wide)


def test_inputs_outputs_rows_and_what_is_not_used_are_frozen() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
    model[1].register_parameter("spare", parameter(7))
    reasons = {axis.size: axis.frozen for axis in find_axes(model, torch.ones(2, 5).long())}
    assert reasons == {
        9: "its rows are looked up",
        4: None,
        3: "an output",
        7: "the forward does not use it",
    }
    assert find_axes(nn.Linear(4, 3), torch.ones(2, 4))[1].frozen == "an input"


def test_joined_parts_that_are_woven_into_a_product_are_frozen() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        scores = m.d(y[:, None].expand(-1, 3, -1).flatten(1))
        return scores + m.e(y + torch.cat([m.b(x), m.c(x)], 1))

    ends = {"d": nn.Linear(24, 2), "e": nn.Linear(8, 2), "a": nn.Linear(5, 8)}
    model = Network(forward, **ends, b=nn.Linear(5, 5), c=nn.Linear(5, 3))
    reasons = {use.name: axis.frozen for axis in find_axes(model, example()) for use in axis.uses}
    assert "woven" in str(reasons["b.bias"]) and "woven" in str(reasons["c.bias"])


def test_axes_that_only_code_ties_are_frozen() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if m.a(x).shape != m.c(x).shape:
            raise ValueError("unequal")
        return m.b(m.a(x).relu()) + m.d(m.c(x).relu())

    sizes = {"a": (5, 8), "b": (8, 3), "c": (5, 8), "d": (8, 3)}
    model = Network(forward, **{name: nn.Linear(*size) for name, size in sizes.items()})
    reasons = [axis.frozen for axis in find_axes(model, example()) if axis.size == 8]
    assert reasons == ["the forward does not follow it: ValueError: unequal"] * 2


def test_axes_that_only_a_size_ties_are_frozen() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(y) + m.d(m.c(x)) + m.f(m.e(x)) + m.g(x[:, :1].expand(-1, y.shape[1]))

    sizes = {"a": (5, 8), "b": (8, 3), "c": (5, 7), "d": (7, 3), "e": (5, 6), "f": (6, 3)}
    parts = {name: nn.Linear(*size) for name, size in {**sizes, "g": (8, 3)}.items()}
    axes = find_axes(Network(forward, **parts), example())
    assert [axis.size for axis in free(axes)] == [7, 6]


def test_what_no_output_needs_must_run_all_the_same() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = m.c(x)
        hidden.unflatten(1, (2, -1))  # where the number is even
        return m.b(m.a(x)) + m.d(hidden)

    sizes = {"a": (5, 8), "b": (8, 3), "c": (5, 8), "d": (8, 3)}
    model = Network(forward, **{name: nn.Linear(*size) for name, size in sizes.items()})
    assert [axis.uses[0].name for axis in free(find_axes(model, example()))] == ["a.weight"]


def test_what_other_data_may_run_freezes_what_it_might_read() -> None:
    """One of two branches, which read the same hidden units and leave as many."""

    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = m.first(x).relu()
        branch = m.one(hidden) if float(x[0, 0]) < 9 else m.other(hidden)
        return m.last(branch.relu()) + m.apart(m.free(x).relu())

    sizes = {"first": (5, 8), "one": (8, 6), "other": (8, 6), "last": (6, 3)}
    sizes |= {"free": (5, 4), "apart": (4, 3)}
    model = Network(forward, **{name: nn.Linear(*size) for name, size in sizes.items()}).eval()
    axes = find_axes(model, example())
    assert [axis.size for axis in free(axes)] == [4]
    reasons = {axis.uses[0].name: str(axis.frozen) for axis in axes if axis.uses[0].dim == 0}
    for made in ("first.weight", "one.weight"):
        assert "the examples do not run 'other." in reasons[made]


def test_a_bias_that_the_code_leaves_out_freezes_nothing() -> None:
    parts = {"a": nn.Linear(5, 8), "b": nn.Linear(8, 3), "c": nn.Linear(8, 8)}
    model = Network(lambda m, x: m.b(F.linear(m.a(x), m.c.weight).relu()), **parts)
    assert [axis.size for axis in free(find_axes(model, example()))] == [8, 8]


def test_what_a_called_module_leaves_aside_freezes_nothing() -> None:
    """As the token that stands for masked patches in training from scratch."""

    class Table(nn.Linear):
        def __init__(self) -> None:
            super().__init__(5, 8)
            self.mask_token = nn.Parameter(torch.zeros(1, 8))

    model = Network(lambda m, x: m.b(m.a(x).relu()), a=Table(), b=nn.Linear(8, 3))
    assert [axis.size for axis in free(find_axes(model, example()))] == [8]


def test_experts_are_found_on_as_many_examples_as_run_them() -> None:
    """Each example goes to one of four; two examples do not reach them all."""
    torch.manual_seed(0)
    model, inputs = Experts(), torch.randn(80, 10)
    pair = (inputs, torch.arange(80) % 3)
    found = axes_of(model, Task.from_arrays(pair, pair, pair), "neurons", Scope("*"))
    assert [axis.uses[0].name for axis in found] == [f"experts.{k}.0.weight" for k in range(4)]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.last = nn.Linear(10, 4), nn.Linear(10, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 10)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(1)
        for place, expert in enumerate(self.experts):
            if bool((chosen == place).any()):
                x = x + expert(x) * (chosen == place)[:, None]
        return self.last(x)


def test_what_only_training_runs_freezes() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        hidden, other, third = m.a(x), m.c(x), m.e(x)
        scores = m.b(hidden) + m.d(other) + m.f(third) + m.h(m.g(x))
        return (scores, m.auxiliary(hidden), other, third + m.steps) if m.training else scores

    sizes = {"a": (5, 8), "b": (8, 3), "c": (5, 7), "d": (7, 3), "e": (5, 6), "f": (6, 3)}
    sizes |= {"g": (5, 4), "h": (4, 3), "auxiliary": (8, 2)}
    model = Network(forward, **{name: nn.Linear(*size) for name, size in sizes.items()})
    model.register_buffer("steps", torch.ones(6))
    axes = find_axes(model.eval(), example())
    assert [axis.size for axis in free(axes)] == [4]
    reasons = {axis.size: str(axis.frozen) for axis in axes if axis.uses[0].dim == 0}
    assert "mat1 and mat2" in reasons[8] and reasons[7] == "an output in training mode"


def test_a_network_that_cannot_train_on_the_example_is_evaluated_only() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if m.training:
            raise ValueError("labels are missing")
        return m.b(m.a(x))

    model = Network(forward, a=nn.Linear(5, 8), b=nn.Linear(8, 3))
    assert [axis.size for axis in free(find_axes(model, example()))] == [8]


def test_training_for_the_axes_writes_to_no_parameter() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if m.training:
            m.a.weight.clamp_(-0.01, 0.01)
        return m.b(m.a(x))

    model = Network(forward, a=nn.Linear(5, 8), b=nn.Linear(8, 3))
    before = model.a.weight.detach().clone()
    find_axes(model, example())
    assert torch.equal(model.a.weight, before)


def test_a_vector_that_is_not_saved_freezes() -> None:
    buffer = Buffer(torch.randn(8), saved=False)
    ends = {"a": nn.Linear(5, 8), "b": nn.Linear(8, 3)}
    model = Network(lambda m, x: m.b(m.a(x) * m.c.values), c=buffer, **ends)
    assert "the buffer c.values" in [axis.frozen for axis in find_axes(model, example())]


def averaging(self: Any, x: Tensor) -> Tensor:
    hidden = self.first(x)
    hidden.mean(1)
    return self.last(hidden)


def averaging_in_place(self: Any, x: Tensor) -> Tensor:
    hidden = self.first(x)
    hidden[:, :].sub_(hidden.mean(1, keepdim=True))
    return self.last(hidden)


def averaging_for_a_branch(self: Any, x: Tensor) -> Tensor:
    hidden = self.first(x)
    return self.last(hidden if hidden.mean(1).sum() < 1e9 else -hidden)


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (averaging, None),
        (averaging_in_place, "mean over it"),
        (averaging_for_a_branch, "mean over it"),
    ],
)
def test_what_nothing_reads_binds_nothing(forward: Any, why: str | None) -> None:
    network = Network(forward, first=nn.Linear(5, 4), last=nn.Linear(4, 2))
    axis = next(axis for axis in find_axes(network, example()) if axis.size == 4)
    assert axis.frozen == why


@pytest.mark.parametrize("odd", [0, 1])
def test_a_forward_that_runs_otherwise_every_time_frees_nothing(odd: int) -> None:
    runs: list[int] = []  # of all copies

    def forward(m: Any, x: Tensor) -> Tensor:
        runs.append(0)
        hidden = m.first(x)
        if len(runs) % 2 == odd:
            hidden = hidden - hidden.mean(1, keepdim=True)
        return m.last(hidden)

    network = Network(forward, first=nn.Linear(5, 4), last=nn.Linear(4, 2))
    axis = next(axis for axis in find_axes(network, example()) if axis.size == 4)
    assert axis.frozen is not None
