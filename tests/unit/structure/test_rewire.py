"""Rewire: axes are sorted by score, and the network computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from helpers.prune_axes import CASES, CLOSE, Separable, found, images, outputs, refused
from laconic.step import State, derive, run_step
from laconic.structure import Criterion, HeadImportance, NeuronImportance, Random, Rewire
from laconic.structure.axes import Use
from laconic.structure.elements import roles
from laconic.weights.laid import latent_of


@pytest.mark.parametrize(
    ("case", "by"),
    [
        ("bert heads", HeadImportance(batches=2, batch=8)),
        ("bert neurons", NeuronImportance(batches=2, batch=8)),
        ("separable channels", Random()),
    ],
)
def test_rewiring_sorts_by_score_and_computes_the_same(case: str, by: Criterion) -> None:
    make, data, kind = CASES[case]
    model, task, step = make(), data(), Rewire(kind, by=by)  # type: ignore[arg-type]
    step.check(model, task)
    seed = derive(0, step.name, 0)
    axes = found(model, task, kind)
    scores = by.axis_scores(State(model, task, seed=seed), axes)
    before = outputs(model, task)
    weight = {axis: roles(model, axis)["produced"][0] for axis in axes}
    norms = {axis: size_of(model, use) for axis, use in weight.items()}
    run_step(step, State(model, task))
    assert torch.allclose(outputs(model, task), before, atol=CLOSE)
    orders = {axis: scores[axis].argsort(descending=True, stable=True) for axis in axes}
    for axis, use in weight.items():
        assert torch.allclose(size_of(model, use), norms[axis][orders[axis]])
    assert any(order.tolist() != sorted(order.tolist()) for order in orders.values())


def size_of(model: nn.Module, use: Use) -> Tensor:
    return use.rows(latent_of(model, use.name)[1].detach()).abs().sum(1)


def test_rewiring_of_what_is_not_there_is_refused() -> None:
    assert "the network has no heads" in refused(Rewire("heads"), Separable(), images())
