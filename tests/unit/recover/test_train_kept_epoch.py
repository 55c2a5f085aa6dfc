"""Train: which epoch's network is kept, and when patience ends a training."""

from __future__ import annotations

import copy
import math

import pytest
from torch import nn

from helpers.tensors import same
from helpers.train import constant, scored, task, trained
from laconic.recover import Stop
from laconic.step import During, State, Step, Value
from laconic.structure import Gradual, Prune
from laconic.weights.laid import laid_tensors


def epochs(count: int) -> nn.Module:
    """Return the network after so many epochs at a constant rate."""
    return trained(constant(count, Stop(keep="last")))


@pytest.mark.parametrize(
    ("values", "stop", "kept"),
    [
        ((0.1, 0.5, 0.4, 0.3, 0.6), Stop(), 5),
        ((0.1, 0.5, 0.4, 0.3, 0.2), Stop(), 2),
        ((0.1, 0.5, 0.4, 0.3, 0.6), Stop(patience=2), 2),
        ((0.1, 0.5, 0.4, 0.6, 0.3), Stop(patience=2), 4),
        ((0.1, 0.5, 0.4, 0.3, 0.6), Stop(patience=2, keep="last"), 4),
        ((0.1, 0.5, 0.4, 0.3, 0.2), Stop(keep="last"), 5),
        ((math.nan, 0.1, 0.2, math.nan, 0.1), Stop(), 3),
        ((math.nan, math.nan, 0.3, 0.2, 0.1), Stop(patience=2), 2),
    ],
)
def test_the_kept_epoch(values: tuple[float, ...], stop: Stop, kept: int) -> None:
    assert same(trained(constant(5, stop), data=scored(*values)), epochs(kept))


def test_a_score_that_is_no_number_is_said(caplog: pytest.LogCaptureFixture) -> None:
    trained(constant(2, Stop()), data=scored(math.nan, 0.1))
    assert [record.message for record in caplog.records if "not the best" in record.message] == [
        "train: told is nan, so this epoch is not the best"
    ]


def test_a_tie_goes_to_the_lower_loss_then_to_the_earlier_epoch() -> None:
    data = scored(0.5, 0.5, 0.5, loss=(0.3, 0.2, 0.2))
    assert same(trained(constant(3, Stop()), data=data), epochs(2))


def test_what_still_changes_the_network_is_not_undone() -> None:
    """The best score comes before the last weight is pruned; what is kept has them pruned."""
    step = Prune("weights", keep=0.25, schedule=Gradual(end=0.6))
    train = constant(5, Stop()).model_copy(update={"during": (step,)})
    model = trained(train, data=scored(0.9, 0.9, 0.5, 0.4, 0.3))
    alive = [int(layer.mask.sum()) for layer, _ in laid_tensors(model).values()]
    assert alive == [12, 6]
    last = train.model_copy(update={"stop": Stop(keep="last")})
    progress: dict[int, nn.Module] = {}

    class Copy(During):
        def apply(self, state: State) -> None: ...

        def update(self, state: State, progress_: float, *, since: float) -> None:
            progress[round(progress_ * 15)] = copy.deepcopy(state.model)

    Value._registry[Step].pop("copy")
    Value._registry[During].pop("copy", None)
    trained(last.model_copy(update={"during": (step, Copy())}))
    assert same(model, progress[9].eval())


def test_patience_counts_from_where_the_network_is_settled() -> None:
    step = Prune("weights", keep=0.5)
    train = constant(4, Stop(patience=1)).model_copy(update={"during": (step,)})
    script = iter((0.9, 0.8, 0.7, 0.6))
    trained(train, data=task(metrics={"told": lambda outputs, targets: next(script)}))
    assert list(script) == []
