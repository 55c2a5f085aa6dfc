"""Finding axes: what is followed, how kinds are told, what finding leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.axes import CLOSE, FOLLOWED, Network, example, free, mlp, zeroed
from laconic.errors import ModelError
from laconic.structure.axes import Use, find_axes, permute_, slice_
from laconic.structure.surgery import edits_of
from laconic.weights import Ternary, lay
from laconic.weights.laid import laid_tensors

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


# ------------------------------------------------------------------ what is followed


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


# ------------------------------------------------------------------ kinds


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
    ("forward", "parts", "kind"),
    [
        (lambda m, x: m.last((m.first(x) + m.second(x)).relu()), "first second", "neuron"),
        (
            lambda m, x: m.last((m.first(x) + m.second(x) + m.third(x)).relu()),
            "first second third",
            "neuron",
        ),
        (lambda m, x: m.last(m.step(m.first(x)) + m.first(x)), "first step", "hidden"),
        (lambda m, x: m.last(stepped(m, m.first(x) + m.second(x))), "first second step", "hidden"),
    ],
    ids=["two", "three", "stream", "stream of two"],
)
def test_a_sum_is_a_stream_once_one_of_its_terms_was_read(
    forward: Any, parts: str, kind: str
) -> None:
    made = {name: nn.Linear(7 if name == "step" else 5, 7) for name in parts.split()}
    model = Network(forward, **made, last=nn.Linear(7, 2))
    assert kind in {axis.kind for axis in free(find_axes(model, example()))}


def test_what_reads_an_axis_is_marked() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    axes = free(find_axes(model, torch.ones(2, 5).long()))
    assert [[use.name for use in axis.uses if use.consumed] for axis in axes] == [
        ["1.weight"],
        ["3.weight"],
    ]


# ------------------------------------------------------------------ the network and its forward


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
