"""Prune: exact counts, schedules, nested masks, rankings, what is refused, and repetition."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from laconic.errors import ChainError, LaconicError, ModelError, RecipeError, ScopeError, TaskError
from laconic.recover import L1, L2, Adam, Constant, Train
from laconic.scope import Scope
from laconic.step import State, Step, Value, run_step
from laconic.structure import (
    Criterion,
    Geometric,
    Gradual,
    Hessian,
    Magnitude,
    Prune,
    Random,
    Taylor,
)
from laconic.structure.prune import survivors
from laconic.tasks import Task, digits
from laconic.weights import Ternary, lay
from laconic.weights.laid import laid_tensors, mask_of, weights_of

# methods.md, section 8: AGP from 0 to 0.9 over ten steps.
AGP = (0, 0.2439, 0.4392, 0.5913, 0.7056, 0.7875, 0.8424, 0.8757, 0.8928, 0.8991, 0.9)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))


def task(examples: int = 24) -> Task:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(examples, 6, generator=generator)
    labels = torch.arange(examples) % 3
    return Task((inputs, labels), (inputs, labels), (inputs[:6], labels[:6]))


def counts(model: nn.Module) -> dict[str, int]:
    """Return how many weights are left in every tensor."""
    return {name: int((layer(latent) != 0).sum()) for name, (layer, latent) in found(model).items()}


def found(model: nn.Module) -> dict[str, tuple[nn.Module, Tensor]]:
    return dict(laid_tensors(model))


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: mask.clone() for name in found(model) if (mask := mask_of(model, name)) is not None
    }


def pruned(step: Prune, model: nn.Module | None = None, seed: int = 0) -> nn.Module:
    state = State(network() if model is None else model, task(), seed=seed)
    run_step(step, state)
    return state.model


# ------------------------------------------------------------------ schedules


def test_gradual_is_agp() -> None:
    found = [1 - Gradual().keep(step / 10, 0.1) for step in range(11)]
    assert found == pytest.approx(AGP, abs=5e-5)


def test_gradual_of_power_one_is_linear() -> None:
    assert Gradual(1).keep(0.25, 0.2) == pytest.approx(0.8)


def test_geometric_removes_the_same_share_of_the_survivors_each_time() -> None:
    kept = [Geometric().keep(step / 4, 0.1) for step in range(5)]
    ratios = [after / before for before, after in itertools.pairwise(kept)]
    assert ratios == pytest.approx([0.1**0.25] * 4)


@pytest.mark.parametrize("schedule", [Gradual(), Gradual(1), Geometric(), Gradual(end=0.3)])
@given(goal=st.floats(1e-3, 1), progress=st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_a_schedule_falls_from_all_to_its_goal(
    schedule: Gradual | Geometric, goal: float, progress: list[float]
) -> None:
    kept = [schedule.keep(at, goal) for at in sorted(progress)]
    assert kept == sorted(kept, reverse=True)
    assert all(goal <= share + 1e-12 and share <= 1 for share in kept)
    assert schedule.keep(0, goal) == 1
    assert schedule.keep(schedule.end, goal) == schedule.keep(1, goal) == goal


def test_the_goal_is_exact_though_the_progress_is_rounded() -> None:
    end = 0.1 + 0.2  # a little more than the 0.3 that three of ten moments are
    assert Gradual(end=end).keep(3 / 10, 0.1) == 0.1


# ------------------------------------------------------------------ survivors


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    keep=st.floats(0.01, 1),
    ranking=st.sampled_from(["local", "global"]),
    levels=st.integers(1, 5),
    seed=st.integers(0, 100),
)
def test_counts_are_exact_and_ties_go_to_the_lower_index(
    sizes: list[int], keep: float, ranking: str, levels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {
        str(place): torch.randint(levels, (size,), generator=generator).float()
        for place, size in enumerate(sizes)
    }
    alive = {name: torch.rand(len(s), generator=generator) < 0.8 for name, s in scores.items()}
    kept = survivors(scores, alive, keep, ranking)  # type: ignore[arg-type]
    groups = [list(scores)] if ranking == "global" else [[name] for name in scores]
    for names in groups:
        score, before, after = (torch.cat([of[n] for n in names]) for of in (scores, alive, kept))
        wanted = min(round(len(score) * keep), int(before.sum()))
        order = sorted(before.nonzero()[:, 0].tolist(), key=lambda i: (-float(score[i]), i))
        assert sorted(order[:wanted]) == after.nonzero()[:, 0].tolist()


def test_survivors_keep_the_shape_and_say_when_nothing_is_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scores = {"a": torch.ones(2, 2), "b": torch.full((1, 3), 2.0)}
    alive = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    with caplog.at_level(logging.WARNING):
        kept = survivors(scores, alive, 3 / 7, "global")
    assert kept["a"].shape == (2, 2) and not kept["a"].any()
    assert kept["b"].shape == (1, 3) and kept["b"].all()
    assert caplog.messages == ["prune: nothing is left of 'a'"]


def test_scores_that_are_nan_are_refused_by_name() -> None:
    scores = {"a": torch.tensor([1.0, float("nan")])}
    with pytest.raises(ModelError, match="the scores of 'a' hold NaN"):
        survivors(scores, {"a": torch.tensor([True, True])}, 0.5, "local")


def test_infinite_scores_are_the_best() -> None:
    scores = {"a": torch.tensor([1.0, float("inf"), 2.0])}
    kept = survivors(scores, {"a": torch.tensor([True, True, True])}, 1 / 3, "local")
    assert kept["a"].tolist() == [False, True, False]


# ------------------------------------------------------------------ the step, at once and in rounds


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.31, 0.1, 0.001])
def test_local_ranking_leaves_the_same_share_of_each_tensor(keep: float) -> None:
    assert counts(pruned(Prune("weights", keep=keep))) == (
        {} if keep == 1 else {"0.weight": round(42 * keep), "2.weight": round(21 * keep)}
    )


def test_global_ranking_leaves_the_share_of_all() -> None:
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(100)
    kept = counts(pruned(Prune("weights", keep=0.5, ranking="global"), model))
    assert kept == {"0.weight": round(63 * 0.5) - 21, "2.weight": 21}


def test_the_largest_magnitudes_survive_and_keep_their_value() -> None:
    before = network()[0].weight.detach().clone()
    model = pruned(Prune("weights", keep=0.5))
    after = model[0].weight.detach()
    alive = after != 0
    assert torch.equal(after[alive], before[alive])
    assert before.abs()[alive].min() > before.abs()[~alive].max()


@pytest.mark.parametrize("by", [Magnitude(), Magnitude("std"), Random(), Taylor(), Hessian()])
@pytest.mark.parametrize("ranking", ["local", "global"])
def test_masks_are_nested_over_rounds(by: Criterion, ranking: str) -> None:
    state = State(network(), task())
    before = {
        name: torch.ones_like(w).bool() for name, w in weights_of(state.model, Scope("*")).items()
    }
    for keep in (0.8, 0.6, 0.4, 0.2):
        run_step(Prune("weights", keep=keep, by=by, ranking=ranking), state)  # type: ignore[arg-type]
        now = masks(state.model)
        assert all(bool((before[name] | ~now[name]).all()) for name in now)
        assert sum(int(mask.sum()) for mask in now.values()) == (
            round(63 * keep) if ranking == "global" else round(42 * keep) + round(21 * keep)
        )
        before = now


class Spy(Step):
    """Notes what is left whenever it runs."""

    seen: ClassVar[list[dict[str, int]]] = []

    def apply(self, state: State) -> None:
        self.seen.append(counts(state.model))


# Other tests walk over the registry: it stays laconic's.
Value._registry[Step].pop("spy")


@pytest.fixture
def spy() -> Iterator[Spy]:
    Spy.seen.clear()
    yield Spy()
    Spy.seen.clear()


def test_rounds_follow_the_schedule_and_retrain_after_each(spy: Spy) -> None:
    pruned(Prune("weights", keep=0.1, rounds=4, schedule=Geometric(), retrain=spy))
    shares = [0.1 ** (step / 4) for step in (1, 2, 3, 4)]
    assert [seen["0.weight"] for seen in spy.seen] == [round(42 * share) for share in shares]
    assert [seen["2.weight"] for seen in spy.seen] == [round(21 * share) for share in shares]


def test_a_schedule_that_ends_early_leaves_rounds_of_training(spy: Spy) -> None:
    pruned(Prune("weights", keep=0.5, rounds=4, schedule=Gradual(end=0.5), retrain=spy))
    assert [seen["0.weight"] for seen in spy.seen][1:] == [21, 21, 21]


def test_every_round_trains_with_draws_of_its_own() -> None:
    seeds: list[int] = []

    class Listen(Step):
        def apply(self, state: State) -> None:
            seeds.append(state.seed)

    pruned(Prune("weights", keep=0.5, rounds=3, retrain=Listen()))
    Value._registry[Step].pop("listen")
    assert len(set(seeds)) == 3


@pytest.mark.parametrize("by", [Magnitude(), Random(), Taylor(), Hessian()])
@pytest.mark.parametrize("ranking", ["local", "global"])
def test_a_round_that_is_entered_again_changes_nothing(by: Criterion, ranking: str) -> None:
    """Resuming enters the interrupted round once more, with weights that have moved since."""
    step = Prune("weights", keep=0.3, by=by, rounds=2, ranking=ranking)  # type: ignore[arg-type]
    state = State(network(), task(), seed=4)
    step._prune(state, 0.5)
    before = masks(state.model)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    step._prune(state, 0.5)
    assert all(torch.equal(mask, before[name]) for name, mask in masks(state.model).items())


def test_rounds_go_on_where_they_were_stopped(spy: Spy) -> None:
    step = Prune("weights", keep=0.2, rounds=4, retrain=spy)
    whole = pruned(step)
    seen = list(spy.seen)
    for stopped in range(4):
        spy.seen.clear()
        state = State(network(), task(), saved=[stopped])
        run_step(step, state)
        assert spy.seen == seen[stopped:]
        assert state.saved == [] and state.position == []
        if stopped == 0:
            assert all(
                torch.equal(mask, masks(whole)[name]) for name, mask in masks(state.model).items()
            )


# ------------------------------------------------------------------ while training


@pytest.mark.parametrize("rounds", [None, 1, 3, 7])
@pytest.mark.parametrize("end", [1.0, 0.6, 0.35])
def test_updates_follow_the_schedule_at_its_moments(rounds: int | None, end: float) -> None:
    step = Prune("weights", keep=0.1, rounds=rounds, schedule=Gradual(end=end))
    state, moments = State(network(), task()), rounds or 100
    for update in range(1, 31):
        step.update(state, update / 30, since=(update - 1) / 30)
        reached = (update * moments) // 30 / moments
        keep = step.schedule.keep(reached, 0.1)
        left = counts(state.model).get("0.weight", 42)
        assert left == round(42 * keep)
        assert left == 4 or update / 30 < step.settled
    assert counts(state.model) == {"0.weight": 4, "2.weight": 2}


@pytest.mark.parametrize(
    ("rounds", "end", "settled"),
    [(None, 1.0, 1.0), (None, 0.29, 0.29), (None, 0.755, 0.76), (7, 0.3, 3 / 7), (1, 0.1, 1.0)],
)
def test_it_is_settled_at_the_moment_that_reaches_the_goal(
    rounds: int | None, end: float, settled: float
) -> None:
    step = Prune("weights", keep=0.5, rounds=rounds, schedule=Gradual(end=end))
    assert step.settled == pytest.approx(settled)


def test_inside_training_the_final_count_is_exact() -> None:
    step = Prune("weights", keep=0.25)
    model = pruned_while_training(step, epochs=3)
    assert counts(model) == {"0.weight": round(42 * 0.25), "2.weight": round(21 * 0.25)}


def pruned_while_training(step: Prune, epochs: int) -> nn.Module:
    state = State(network(), task())
    run_step(Train(epochs=epochs, batch=8, during=(step,)), state)
    return state.model


def test_two_prunes_may_share_a_training() -> None:
    first = Prune("weights", scope="0", keep=0.5)
    second = Prune("weights", scope="2", keep=0.25)
    state = State(network(), task())
    run_step(Train(batch=8, during=(first, second)), state)
    assert counts(state.model) == {"0.weight": 21, "2.weight": 5}


# ------------------------------------------------------------------ with representations


def test_a_mask_keeps_the_representation_and_comes_last() -> None:
    """Ternary is not idempotent, and its scale is never 0: a mask before it would revive."""
    model = pruned(Prune("weights", keep=0.5), laid())
    layer, latent = laid_tensors(model)["0.weight"]
    assert layer.representation == Ternary()
    assert int(layer.mask.sum()) == 21  # type: ignore[union-attr]
    weight = model[0].weight.detach()
    assert not bool(weight[~layer.mask].any())  # type: ignore[operator]
    assert torch.equal(weight, layer.representation.decode(layer.encode(latent)))


def laid() -> nn.Module:
    model = network()
    for name in ("0.weight", "2.weight"):
        lay(model, name, Ternary())
    return model


def test_pruning_to_what_is_there_lays_nothing() -> None:
    assert laid_tensors(pruned(Prune("weights", keep=1.0))) == {}


def test_the_weights_of_a_tied_parameter_are_pruned_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    run_step(Prune("weights", keep=0.5), State(model))
    assert int((model[0].weight != 0).sum()) == 8
    assert torch.equal(model[0].weight, model[1].weight)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("keep", [0, -0.1, 1.1, float("nan"), "half"])
def test_a_share_that_is_none_is_refused(keep: object) -> None:
    with pytest.raises(RecipeError, match="keep"):
        Prune("weights", keep=keep)


def test_a_scope_without_weights_is_refused() -> None:
    with pytest.raises(ScopeError, match="'1' selects no weight of two or more dimensions"):
        Prune("weights", scope="1", keep=0.5).check(network(), None)


def test_a_criterion_that_needs_data_is_refused_without_a_task() -> None:
    with pytest.raises(TaskError):
        Prune("weights", keep=0.5, by=Taylor()).check(network(), None)


def test_a_foreign_parametrization_is_refused_before_any_work() -> None:
    model = network()
    parametrizations.weight_norm(model[0])
    with pytest.raises(ModelError, match="not laconic's"):
        Prune("weights", keep=0.5).check(model, None)


QUARTER = Prune("weights", keep=0.25)


@pytest.mark.parametrize(
    "earlier",
    [
        QUARTER,
        Train(during=(QUARTER,)),
        Prune("weights", scope="0", keep=0.5, retrain=Train(during=(QUARTER,))),
    ],
    ids=repr,
)
def test_keeping_more_than_is_left_is_refused(earlier: Step) -> None:
    with pytest.raises(ChainError, match=r"keep 0\.5 after an earlier prune .* keeps 0\.25"):
        Prune("weights", keep=0.5).check(network(), task(), (earlier,))


def test_keeping_more_inside_a_retraining_is_refused() -> None:
    half = Train(during=(Prune("weights", keep=0.5),))
    with pytest.raises(ChainError):
        Prune("weights", keep=0.25, retrain=half).check(network(), task())


def test_another_scope_or_as_much_is_not_refused() -> None:
    Prune("weights", scope="0", keep=0.5).check(
        network(), task(), (Prune("weights", scope="2", keep=0.25),)
    )
    Prune("weights", keep=0.25).check(network(), task(), (QUARTER,))


def test_weights_that_are_not_finite_are_refused() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(LaconicError, match=r"'0\.weight' hold"):
        pruned(Prune("weights", keep=0.5), model)


# ------------------------------------------------------------------ L1 and L2 (Han et al. 2015)


def trained(penalty: L1 | L2 | None) -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    data = digits()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    fit = Train(epochs=12, batch=64, optimizer=Adam(3e-3, decay=Constant()), penalty=penalty)
    state = State(model, data)
    run_step(fit, state)
    return state.model, data


def test_penalties_and_retraining_do_what_han_shows() -> None:
    """Penalties, L1 most, push weights to zero, so pruning hurts less; retraining mends it."""
    small, plain, mended = {}, {}, {}
    for name, penalty in {"none": None, "l1": L1(1e-3), "l2": L2(1e-3)}.items():
        model, data = trained(penalty)
        weights = [weight.flatten() for weight in weights_of(model, Scope("*")).values()]
        small[name] = float((torch.cat(weights).abs() < 1e-2).float().mean())
        again = Train(epochs=2, batch=64, optimizer=Adam(1e-3), penalty=penalty)
        for scores, retrain in ((plain, None), (mended, again)):
            state = State(copy.deepcopy(model), data)
            run_step(Prune("weights", keep=0.3, rounds=2, retrain=retrain), state)
            scores[name] = data.score(state.model)["accuracy"]
            assert sum(counts(state.model).values()) == round(2048 * 0.3) + round(320 * 0.3)
    assert small["l1"] > 1.3 * small["l2"] > 2 * small["none"]
    assert min(plain["l1"], plain["l2"]) > plain["none"]
    assert all(mended[name] > plain[name] + 0.02 for name in mended)
