"""What pruning of axes refuses before any work, and with which words."""

from __future__ import annotations

import pytest
from torch import nn

from helpers.prune_axes import Separable, images, plain, refused, residual
from laconic.errors import RecipeError
from laconic.structure import (
    FPGM,
    OBS,
    BatchNormScale,
    Criterion,
    HeadImportance,
    NeuronImportance,
    Prune,
    Ranking,
)


def test_a_kind_of_axis_that_is_not_there_is_refused() -> None:
    assert refused(Prune("heads", keep=0.5), Separable(), images()) == (
        "AxisError: the network has no heads; prunable here: channels, neurons"
    )


def test_axes_that_are_all_frozen_are_refused_with_the_reasons() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2))
    task = images()
    task.call = lambda model, batch: model(batch.inputs[0]).mean(2)
    found = refused(Prune("channels", keep=0.5), model, task)
    assert found.startswith("AxisError: channels cannot be pruned in '*': ")
    assert "the channel axis of 4 in '0.weight' and 1 more is frozen (an output)" in found


def test_a_scope_that_computes_no_axis_alone_is_refused() -> None:
    found = refused(Prune("channels", scope="first", keep=0.5), Separable(), images())
    assert found == (
        "AxisError: no channels are computed by modules of 'first' alone; widen it: the channel "
        "axis of 6 in 'first.weight' and 6 more is computed by 'each' too"
    )
    found = refused(Prune("channels", scope="inner", keep=0.5), Separable(), images())
    assert found == (
        "AxisError: no channels are computed by modules of 'inner'; those of this network are "
        "computed by 'each', 'first', 'last'"
    )


def test_a_share_that_rounds_to_none_is_refused_before_any_work() -> None:
    step = Prune("neurons", keep=0.05)
    with pytest.raises(
        RecipeError, match=r"keep 0\.05 of the neuron axis of 9 .* more than 0\.0555"
    ):
        step.check(Separable(), images())
    Prune("neurons", keep=0.05, ranking="global").check(Separable(), images())


def test_axes_are_not_found_without_a_task() -> None:
    found = refused(Prune("channels", keep=0.5), Separable(), None)
    assert found == "TaskError: the axes of a network are found on a batch of data; give task="


def test_a_forward_that_fails_is_refused() -> None:
    found = refused(Prune("channels", keep=0.5), residual(), images(channels=1))
    assert found.startswith("ModelError: ResNet fails on 2 examples of task (RuntimeError: ")


def test_a_task_that_calls_parts_of_the_network_is_refused() -> None:
    task = images()
    task.call = lambda model, batch: model.outer(model.inner(batch.inputs[0].mean((2, 3))[:, :1]))
    task.call = lambda model, batch: model.first(batch.inputs[0]).mean((2, 3))[:, :3]
    found = refused(Prune("channels", keep=0.5), Separable(), task)
    assert found.startswith("TaskError: task: call= does not call the model but parts of it")


@pytest.mark.parametrize(
    ("axes", "by", "message"),
    [
        ("weights", HeadImportance(), "head_importance ranks heads, not weights"),
        ("channels", HeadImportance(), "head_importance ranks heads, not channels"),
        ("heads", NeuronImportance(), "neuron_importance ranks neurons, not heads"),
        ("channels", OBS(), "obs ranks weights, not channels"),
        ("heads", BatchNormScale(), "batch_norm_scale ranks channels, not heads"),
        ("weights", FPGM(), "fpgm ranks channels, neurons, not weights"),
    ],
)
def test_a_criterion_that_cannot_rank_these_is_refused(
    axes: str, by: Criterion, message: str
) -> None:
    with pytest.raises(RecipeError, match=f"{message}; choose one of: .*taylor"):
        Prune(axes, keep=0.5, by=by).check(Separable(), images())  # type: ignore[arg-type]


def test_channels_without_a_norm_are_refused_by_its_scale() -> None:
    step = Prune("channels", keep=0.5, by=BatchNormScale(), ranking="global")
    found = refused(step, Separable(), images())
    assert "has no BatchNorm, so no scale to rank by" in found and "'first.weight'" in found
    step.check(plain(), images())


def test_multiples_of_single_weights_are_refused() -> None:
    with pytest.raises(RecipeError, match="multiples are of channels"):
        Prune("weights", keep=0.5, ranking=Ranking(multiple_of=4)).check(Separable(), None)
