"""Finding, slicing, permuting and widening axes: what is frozen and why, what follows, errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from laconic.errors import AxisError, ModelError
from laconic.ship import load, save
from laconic.structure.axes import (
    Axis,
    Use,
    find_axes,
    permute_,
    slice_,
    sliced_shapes,
    widen_,
)
from laconic.structure.surgery import edits_of
from laconic.weights import Float, KMeans, Symmetric, Ternary, bake, lay
from laconic.weights.laid import laid_tensors, latent_of, mask_of, swap_

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


# ------------------------------------------------------------------ uses


def test_a_use_says_where_each_element_is() -> None:
    use = Use("w", dim=1, sizes=(2, 3), position=1, offset=4, length=12)
    assert use.places().tolist() == [[4, 7], [5, 8], [6, 9]]
    weight = torch.arange(24.0).reshape(2, 12)
    assert use.rows(weight).tolist() == [[4, 16, 7, 19], [5, 17, 8, 20], [6, 18, 9, 21]]
    spread = use.along(torch.tensor([1.0, 2.0, 3.0]), 0.0)
    assert spread.tolist() == [0, 0, 0, 0, 1, 2, 3, 1, 2, 3, 0, 0]
    assert use.along(torch.tensor([True, False, True]), True).sum() == 10


def test_a_dimension_ends_with_its_use_unless_told() -> None:
    assert Use("w", 0, (4, 3), 0).length == 12


# ------------------------------------------------------------------ finding

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


@pytest.mark.parametrize("name", list(FOLLOWED))
def test_followed(name: str) -> None:
    forward, parts, sizes = FOLLOWED[name]
    model = Network(forward, **copy.deepcopy(parts)).eval()
    axes = free(find_axes(model, example()))
    assert [axis.size for axis in axes] == sizes
    for axis in axes:
        kept = list(range(1, axis.size, 2))
        small = copy.deepcopy(model)
        slice_(small, {axis: kept})
        torch.testing.assert_close(small(example()), zeroed(model, axis, kept)(example()), **CLOSE)
        order = list(reversed(range(axis.size)))
        permuted = copy.deepcopy(model)
        permute_(permuted, axis, order)
        torch.testing.assert_close(permuted(example()), model(example()), **CLOSE)


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


def test_equal_sizes_are_not_mistaken_for_one_axis() -> None:
    # Batch, length and features are all 4.
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    axes = find_axes(model, torch.randn(4, 4, 4))
    assert [len(axis.uses) for axis in free(axes)] == [3, 3]


def test_heads_that_one_attribute_counts_are_one_axis() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_attention_heads, self.attention_head_size, self.all_head_size = 2, 4, 8
            self.query, self.key, self.value = (nn.Linear(5, 8) for _ in range(3))
            self.output = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            shape = (*x.shape[:2], -1, self.attention_head_size)
            q, k, v = (f(x).view(shape).mT.mT.transpose(1, 2) for f in self.inputs())
            context = F.scaled_dot_product_attention(q, k, v, scale=0.5)
            return self.output(context.transpose(1, 2).flatten(2))

        def inputs(self) -> tuple[nn.Module, ...]:
            return self.query, self.key, self.value

    model = Attention().eval()
    x = torch.randn(2, 3, 5)
    axes = free(find_axes(model, x))
    assert [(axis.kind, axis.size, len(axis.uses)) for axis in axes] == [
        ("head", 2, 7),
        ("head_dim", 4, 7),
    ]
    heads, head_dim = axes
    slice_(model, {heads: [1], head_dim: [0, 1, 3]})
    assert (model.num_attention_heads, model.attention_head_size, model.all_head_size) == (1, 3, 3)
    assert edits_of(model)["attributes"][""] == {
        "num_attention_heads": 1,
        "attention_head_size": 3,
        "all_head_size": 3,
    }
    assert model(x).shape == (2, 3, 3)


def test_attention_whose_scale_is_its_size_keeps_its_head_dimension() -> None:
    model = Network(
        lambda m, x: m.o(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x))),
        **FOLLOWED["queries of one head"][1],
    )
    x = torch.randn(2, 4, 5)
    reasons = {use.name: axis.frozen for axis in find_axes(model, x) for use in axis.uses[:2]}
    assert "does not follow" in str(reasons["q.bias"]) and reasons["v.bias"] is None


def test_kinds_are_told_by_what_operations_do() -> None:
    model = nn.Sequential(
        nn.Conv1d(2, 4, 1),
        nn.Conv1d(4, 3, 1),
        nn.Flatten(),
        nn.Linear(12, 5),
        nn.ReLU(),
        nn.Linear(5, 7),
        nn.LayerNorm(7),
        nn.Linear(7, 2),
    )
    axes = free(find_axes(model, torch.randn(3, 2, 4)))
    assert [(axis.kind, axis.size) for axis in axes] == [
        ("channel", 4),
        ("channel", 3),
        ("neuron", 5),
        ("hidden", 7),
    ]


def stepped(model: Any, hidden: Tensor) -> Tensor:
    return hidden + model.step(hidden)


@pytest.mark.parametrize(
    ("forward", "kind"),
    [
        (lambda m, x: m.last((m.first(x) + m.second(x)).relu()), "neuron"),
        (lambda m, x: m.last((m.first(x) + m.second(x) + m.third(x)).relu()), "neuron"),
        (lambda m, x: m.last(m.step(m.first(x)) + m.first(x)), "hidden"),
        (lambda m, x: m.last(stepped(m, m.first(x) + m.second(x))), "hidden"),
    ],
    ids=["two", "three", "stream", "stream of two"],
)
def test_a_sum_is_a_stream_once_one_of_its_terms_was_read(forward: Any, kind: str) -> None:
    made = {name: nn.Linear(5, 7) for name in ("first", "second", "third")}
    model = Network(forward, **made, step=nn.Linear(7, 7), last=nn.Linear(7, 2))
    assert kind in {axis.kind for axis in free(find_axes(model, example()))}


def test_what_reads_an_axis_is_marked() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    axes = free(find_axes(model, torch.ones(2, 5).long()))
    assert [[use.name for use in axis.uses if use.consumed] for axis in axes] == [
        ["1.weight"],
        ["3.weight"],
    ]


def test_finding_leaves_the_network_and_the_random_numbers_alone() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    lay(model, "0.weight", Ternary())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    find_axes(model.train(), example())
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)
    assert model.training and model[2].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model, "laconic") and list(laid_tensors(model)) == ["0.weight"]
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_forward_that_keeps_things_is_run_on_a_fresh_copy() -> None:
    def remember(m: Any, x: Tensor) -> Tensor:
        if not hasattr(m, "seen"):
            m.seen = True
            x = x + 0.0
        return m.b(m.a(x))

    model = Network(remember, a=nn.Linear(5, 8), b=nn.Linear(8, 3))
    assert [axis.size for axis in free(find_axes(model, example()))] == [8]
    assert not hasattr(model, "seen")


def test_a_forward_that_fails_says_how_it_was_called() -> None:
    with pytest.raises(ModelError, match=r"Sequential failed .* \(float32 \[2, 9\]\): Runtime"):
        find_axes(mlp(), torch.ones(2, 9))
    with pytest.raises(ModelError, match=r"Network failed .* \(x=int64 \[2\]\): Attribute"):
        find_axes(Network(lambda m, x: m.missing(x)), x=torch.ones(2).long())


def test_a_forward_that_returns_no_tensor_is_refused() -> None:
    with pytest.raises(ModelError, match="Network returned no tensor that it computed"):
        find_axes(Network(lambda m, x: 1.0), example())


def test_a_network_that_cannot_be_copied_is_refused() -> None:
    model = mlp()
    model.generator = (each for each in ())
    with pytest.raises(ModelError, match="cannot be copied"):
        find_axes(model, example())


# ------------------------------------------------------------------ edits


def test_modules_remember_their_new_sizes() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 1),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 12, 1, groups=6),
        nn.GroupNorm(6, 12),
        nn.Conv2d(12, 4, 1),
    )
    (channels,) = free(find_axes(model, torch.randn(1, 1, 2, 2)))
    slice_(model, {channels: [0, 2, 3, 5]})
    assert (model[0].out_channels, model[1].num_features) == (4, 4)
    assert (model[2].groups, model[2].in_channels, model[2].out_channels) == (4, 4, 8)
    assert (model[3].num_groups, model[3].num_channels, model[4].in_channels) == (4, 8, 8)


def test_a_transposed_convolution_remembers_its_new_sizes() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(1, 6, 2), nn.ConvTranspose2d(6, 4, 2))
    (channels,) = free(find_axes(model, torch.randn(1, 1, 2, 2)))
    assert [(use.name, use.dim, use.consumed) for use in channels.uses] == [
        ("0.weight", 1, False),
        ("0.bias", 0, False),
        ("1.weight", 0, True),
    ]
    slice_(model, {channels: [0, 2, 5]})
    assert (model[0].in_channels, model[0].out_channels) == (1, 3)
    assert (model[1].in_channels, model[1].out_channels) == (3, 4)


def test_an_embedding_a_norm_and_a_recurrent_layer_remember_too() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(9, 4), nn.LayerNorm(4)
            self.layer, self.last = nn.LSTM(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.layer(self.norm(self.table(x)))[0])

    model = Reader().eval()
    (axis,) = free(find_axes(model, torch.ones(5, 2).long()))
    slice_(model, {axis: [3, 0]})
    assert (model.table.embedding_dim, model.norm.normalized_shape) == (2, (2,))
    assert model.layer.input_size == 2 and model.layer.weight_hh_l0.shape == (12, 3)
    assert model(torch.ones(5, 2).long()).shape == (5, 2, 2)


def test_parameters_are_new_and_keep_their_kind() -> None:
    model = mlp().double()
    model[0].weight.requires_grad_(False)
    old = model[0].weight
    slice_(model, {mlp_axis(mlp()): [0, 1]})
    assert model[0].weight is not old and old.shape == (8, 5)
    assert (model[0].weight.requires_grad, model[2].weight.requires_grad) == (False, True)
    assert isinstance(model[0].weight, nn.Parameter) and model[0].weight.dtype == torch.float64


def test_the_order_of_what_is_kept_counts() -> None:
    model, sorted_model = mlp(), mlp()
    sorted_model.load_state_dict(model.state_dict())
    slice_(model, {mlp_axis(model): [5, 1]})
    slice_(sorted_model, {mlp_axis(sorted_model): [1, 5]})
    assert torch.equal(model[0].weight, sorted_model[0].weight.flip(0))


def test_a_tied_parameter_is_sliced_once_for_all_owners() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mix, self.scores = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
            self.scores.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.scores(self.table(x) + self.mix(self.table(x)))

    model = Tied()
    (axis,) = free(find_axes(model, torch.ones(2, 3).long()))
    assert {"table.weight", "scores.weight"} <= {use.name for use in axis.uses}
    assert not any(use.consumed for use in axis.uses if "table" in use.name or "sc" in use.name)
    slice_(model, {axis: [0, 2, 3]})
    assert model.scores.weight is model.table.weight and model.table.weight.shape == (9, 3)
    assert (model.table.embedding_dim, model.scores.in_features) == (3, 3)


def test_a_module_in_two_places_is_sliced_once() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(5, 8), shared, nn.ReLU(), shared, nn.Linear(8, 3))
    axis = mlp_axis(model)
    assert {"1.weight", "3.weight"} <= {use.name for use in axis.uses}
    slice_(model, {axis: [0, 2, 5]})
    assert model[1] is model[3] and model(example()).shape == (6, 3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_part_is_sliced_and_saved(tmp_path: Path) -> None:
    def build() -> nn.Module:
        part = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
        return nn.Sequential(nn.Linear(5, 8), torch.jit.script(part), nn.Linear(4, 3)).eval()

    model = build()
    axes = free(find_axes(model, example()))
    assert [axis.size for axis in axes] == [8, 6, 4]
    slice_(model, {axis: range(axis.size // 2) for axis in axes})
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", model=build())
    assert torch.equal(again(example()), model(example()))


def test_an_edit_returns_the_axes_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    axes = find_axes(model, example())
    first, second = free(axes)
    edit = slice_(model, {first: [0, 1, 2]})
    assert edit.axes == find_axes(model, example())
    assert edit.replaced[second].uses[0].length == 6 and list(edit.replaced) == axes
    edit = slice_(model, {edit.replaced[second]: [1], edit.replaced[first]: [0, 2]})
    assert model(example()).shape == (6, 2) and [a.size for a in edit.axes] == [2, 5, 1, 2]


def test_an_axis_made_by_hand_can_be_sliced() -> None:
    model = mlp()
    uses = (Use("0.weight", 0, (8,), 0), Use("0.bias", 0, (8,), 0), Use("2.weight", 1, (8,), 0))
    edit = slice_(model, {Axis(8, "neuron", uses, None): [1, 2, 3]})
    assert model(example()).shape == (6, 3)
    assert [axis.size for axis in edit.axes] == [3]


def test_shapes_are_predicted_without_slicing() -> None:
    model = mlp()
    shapes = sliced_shapes(model, {mlp_axis(model): [1, 2, 3]})
    assert shapes == {"0.weight": (3, 5), "0.bias": (3,), "2.weight": (3, 3)}
    assert model[0].weight.shape == (8, 5)


def test_slicing_nothing_changes_nothing() -> None:
    model = mlp()
    assert slice_(model, {}).axes == [] and edits_of(model) == {}


def test_copies_share_what_read_them() -> None:
    model = nn.Sequential(
        nn.Conv1d(1, 4, 2), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    ).eval()
    before, x = model(example()[:, None]), example()[:, None]
    (axis,) = (axis for axis in find_axes(model, x) if axis.kind == "channel")
    widen_(model, axis, [0, 1, 2, 3, 3, 0, 3])
    assert model[0].out_channels == 7
    torch.testing.assert_close(model(x), before, **CLOSE)


@pytest.mark.parametrize(
    "read",
    [
        lambda hidden, weight: F.linear(hidden, weight.clone()),
        lambda hidden, weight: F.linear(hidden.double(), weight.double()),
        lambda hidden, weight: torch.einsum("bi,ohi->boh", hidden, weight[:, None]),
    ],
)
def test_copies_of_a_weight_read_as_the_weight_does(read: Callable[[Tensor, Tensor], Any]) -> None:
    parts = {"a": nn.Linear(5, 8), "b": nn.Linear(8, 3)}
    model = Network(lambda m, x: read(m.a(x).relu(), m.b.weight), **parts).eval()
    before = model(example())
    axis = mlp_axis(model)
    assert axis.kind == "neuron" and [use.name for use in axis.uses if use.consumed] == ["b.weight"]
    widen_(model, axis, [*range(8), 1, 1])
    torch.testing.assert_close(model(example()), before, **CLOSE)


@pytest.mark.parametrize(
    "read",
    [
        lambda hidden, weight: F.linear(hidden, 0.5 * weight),
        lambda hidden, weight: hidden @ (weight + weight.square()).mT,
        lambda hidden, weight: F.conv1d(hidden[..., None], 2 * weight[..., None]),
        lambda hidden, weight: hidden @ hidden.mT,
    ],
)
def test_copies_that_nothing_can_be_divided_among_are_refused(
    read: Callable[[Tensor, Tensor], Any],
) -> None:
    parts = {"a": nn.Linear(5, 8), "b": nn.Linear(8, 3, bias=False)}
    model = Network(lambda m, x: read(m.a(x).relu(), m.b.weight), **parts).eval()
    axis = next(axis for axis in find_axes(model, example()) if axis.size == 8)
    with pytest.raises(AxisError, match="would grow with the copies"):
        widen_(model, axis, [*range(8), 1, 1])


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([], "no element is named"),
        ([0, 8], "elements 0 to 7; 8 is none"),
        ([-1], "elements 0 to 7; -1 is none"),
        ([1, 2, 1], "kept twice"),
    ],
)
def test_what_cannot_be_kept(kept: list[int], message: str) -> None:
    model = mlp()
    axis = mlp_axis(model)
    with pytest.raises(AxisError, match=message):
        slice_(model, {axis: kept})
    assert model[0].weight.shape == (8, 5) and edits_of(model) == {}


def test_a_number_with_a_fraction_is_no_element() -> None:
    model = mlp()
    axis = mlp_axis(model)
    with pytest.raises(TypeError):
        slice_(model, {axis: [0.5]})


def test_a_frozen_axis_says_why() -> None:
    model = mlp()
    frozen = next(axis for axis in find_axes(model, example()) if axis.frozen == "an output")
    with pytest.raises(AxisError, match=r"other axis of 3 in '2.weight' and 1 more is frozen: an"):
        slice_(model, {frozen: [0]})
    with pytest.raises(AxisError, match="frozen"):
        permute_(model, frozen, [2, 1, 0])
    with pytest.raises(AxisError, match="frozen"):
        widen_(model, frozen, [0, 1, 2, 2])
    with pytest.raises(AxisError, match="frozen"):
        sliced_shapes(model, {frozen: [0]})


def test_a_stale_axis_is_refused() -> None:
    model = mlp()
    axis = mlp_axis(model)
    slice_(model, {axis: [0, 1, 2]})
    with pytest.raises(AxisError, match=r"stale: '0.weight' is \[3, 5\].*was 8; use Edit.axes"):
        slice_(model, {axis: [0, 1]})


def test_an_axis_is_stale_too_where_another_part_changed() -> None:
    forward, parts, _ = FOLLOWED["joined"]
    model = Network(forward, **copy.deepcopy(parts)).eval()
    first, second = free(find_axes(model, example()))
    slice_(model, {first: [0]})
    with pytest.raises(AxisError, match="stale"):
        slice_(model, {second: [0]})


def test_an_axis_of_another_model_is_refused() -> None:
    with pytest.raises(AxisError, match=r"another model: the model has no tensor '0.weight'"):
        slice_(nn.ReLU(), {mlp_axis(mlp()): [0]})


@pytest.mark.parametrize("order", [[0, 1], [0] * 8, [*range(7)]])
def test_what_is_no_order_is_refused(order: list[int]) -> None:
    model = mlp()
    with pytest.raises(AxisError, match="names every one, once"):
        permute_(model, mlp_axis(model), order)


def test_widening_loses_no_element() -> None:
    model = mlp()
    with pytest.raises(AxisError, match="element 7 has no copy"):
        widen_(model, mlp_axis(model), [*range(7), 0, 0])


# ------------------------------------------------------------------ laid weights


def test_a_mask_is_sliced_with_its_weight() -> None:
    model = mlp()
    mask = torch.rand(8, 5) > 0.5
    lay(model, "0.weight", Float(), mask=mask)
    lay(model, "2.weight", Float(), mask=mask.t()[:3])
    baked = copy.deepcopy(model)
    bake(baked)
    axis = mlp_axis(model)
    slice_(model, {axis: [6, 1, 2]})
    slice_(baked, {axis: [6, 1, 2]})
    assert torch.equal(mask_of(model, "0.weight"), mask[[6, 1, 2]])
    assert torch.equal(model(example()), baked(example()))
    assert edits_of(model) == edits_of(baked)
    model(example()).sum().backward()
    assert latent_of(model, "0.weight")[1].grad.shape == (3, 5)


def test_assignments_to_a_codebook_are_sliced_and_the_codebook_stays() -> None:
    model = mlp()
    lay(model, "2.weight", KMeans(2))
    baked = copy.deepcopy(model)
    bake(baked)
    codebook = latent_of(model, "2.weight")[0].state["codebook"].clone()
    axis = mlp_axis(model)
    slice_(model, {axis: [0, 7, 3]})
    slice_(baked, {axis: [0, 7, 3]})
    laid, _ = latent_of(model, "2.weight")
    assert laid.state["index"].shape == (3, 3) and isinstance(laid.codebook, nn.Parameter)
    assert torch.equal(laid.state["codebook"], codebook)
    assert torch.equal(model(example()), baked(example()))


def test_tables_of_rows_are_sliced_with_the_rows() -> None:
    model = mlp()
    lay(model, "0.weight", Symmetric(4, granularity="row", range="mse"))
    lay(model, "2.weight", Symmetric(4, granularity="row", range="mse"))
    first, last = (latent_of(model, f"{n}.weight")[0].state["scale"].clone() for n in (0, 2))
    slice_(model, {mlp_axis(model): [4, 2]})
    assert torch.equal(latent_of(model, "0.weight")[0].state["scale"], first[[4, 2]])
    assert torch.equal(latent_of(model, "2.weight")[0].state["scale"], last)


def test_tables_of_groups_are_sliced_where_groups_stay_whole() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    lay(model, "0.weight", Symmetric(4, granularity=3, range="mse"))
    scale = latent_of(model, "0.weight")[0].state["scale"].clone()
    (axis,) = free(find_axes(model, torch.ones(1, 6)))
    slice_(model, {axis: [3, 1]})
    assert torch.equal(latent_of(model, "0.weight")[0].state["scale"], scale[[6, 7, 2, 3]])


def test_tables_of_groups_that_break_are_fitted_anew() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    lay(model, "2.weight", Symmetric(4, granularity=2, range="mse"))
    (axis,) = free(find_axes(model, torch.ones(1, 6)))
    slice_(model, {axis: [0, 2]})
    laid, latent = latent_of(model, "2.weight")
    fitted = laid.representation.fit(latent.detach())["scale"]
    assert torch.equal(laid.state["scale"], fitted)


def test_a_granularity_that_no_longer_fits_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    lay(model, "2.weight", Symmetric(4, granularity=4))
    before = model(torch.ones(1, 6))
    (axis,) = free(find_axes(model, torch.ones(1, 6)))
    with pytest.raises(AxisError, match=r"laid on '2.weight' does not fit \[2, 3\].*groups of 4"):
        slice_(model, {axis: [0, 1, 2]})
    assert torch.equal(model(torch.ones(1, 6)), before) and edits_of(model) == {}


def test_a_tied_laid_weight_keeps_one_representation() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.scores = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.scores.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.scores(self.table(x))

    model, tokens = Tied(), torch.ones(2, 3).long()
    lay(model, "table.weight", Ternary())
    (axis,) = free(find_axes(model, tokens))
    slice_(model, {axis: [3, 1]})
    one, other = (latent_of(model, f"{name}.weight") for name in ("table", "scores"))
    assert one[0] is other[0] and one[1] is other[1] and one[1].shape == (9, 2)
    assert torch.equal(model.table.weight, model.scores.weight)


def test_quantised_weights_can_be_sliced_but_not_divided_among_copies() -> None:
    model = mlp()
    lay(model, "0.weight", Ternary())
    axis = mlp_axis(model)
    before = model(example())
    axis = widen_(model, axis, [*range(8), 0]).axes[0]
    assert torch.unique(model[0].weight).numel() == 3 and model(example()).shape == before.shape
    lay(model, "2.weight", Ternary())
    with pytest.raises(AxisError, match=r"'2\.weight' is quantised"):
        widen_(model, axis, [*range(9), 0])
    slice_(model, {axis: [0, 1]})
    assert model[2].weight.shape == (3, 2)


def test_masked_weights_are_divided_among_copies() -> None:
    model = mlp()
    lay(model, "2.weight", Float(), mask=torch.rand(3, 8) > 0.3)
    before = model(example())
    widen_(model, mlp_axis(model), [*range(8), 3, 3])
    torch.testing.assert_close(model(example()), before, **CLOSE)


def test_swapping_needs_something_laid() -> None:
    with pytest.raises(ModelError, match=r"no tensor '5\.weight'"):
        latent_of(mlp(), "5.weight")
    model = mlp()
    lay(model, "0.weight", Float())
    laid, latent = latent_of(model, "0.weight")
    swapped = laid.sliced(0, torch.arange(8), latent)
    swap_(model, "0.weight", swapped)
    assert latent_of(model, "0.weight")[0] is swapped
