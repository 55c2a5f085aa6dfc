"""Pruning axes in rounds, while training, and softly."""

from __future__ import annotations

import pytest
import torch

from helpers.prune_axes import CLOSE, Separable, found, images, outputs, pruned, sizes
from laconic.recover import Adam, Constant, Train
from laconic.step import State, Step, run_step
from laconic.structure import Geometric, Prune, Random, Soft, prune
from laconic.structure.elements import alive
from laconic.weights.laid import bake, laid_tensors, mask_of

# ------------------------------------------------------------------ rounds


class Look(Step):
    """Notes how many channels two layers have and use whenever it runs; stops where told."""

    def apply(self, state: State) -> None:
        layers = (state.model.first, state.model.last)
        used = [int((layer.weight.flatten(1) != 0).any(1).sum()) for layer in layers]
        SEEN.append([*zip((layer.out_channels for layer in layers), used, strict=True)])
        state.training = {}
        if len(SEEN) == STOP[0]:
            raise KeyboardInterrupt


Step._registry[Step].pop("look")  # other tests walk over the registry: it stays laconic's
SEEN: list[list[tuple[int, int]]] = []
STOP = [0]


@pytest.fixture
def look() -> Look:
    SEEN.clear()
    STOP[0] = 0
    return Look()


def test_rounds_mask_and_the_last_one_slices_before_it_retrains(look: Look) -> None:
    step = Prune("channels", keep=0.25, rounds=3, schedule=Geometric(), retrain=look)
    pruned("separable channels", step)
    shares = [0.25 ** (index / 3) for index in (1, 2, 3)]
    assert SEEN[:2] == [[(6, round(6 * s)), (4, round(4 * s))] for s in shares[:2]]
    assert SEEN[2] == [(2, 2), (1, 1)]


@pytest.mark.parametrize("stopped", [1, 2, 3])
def test_a_round_goes_on_where_its_training_was_stopped(look: Look, stopped: int) -> None:
    step = Prune("channels", keep=0.25, rounds=3, by=Random(), retrain=look)
    whole, _ = pruned("separable channels", step)
    seen = list(SEEN)
    SEEN.clear()
    STOP[0] = stopped
    state = State(Separable(), images())
    with pytest.raises(KeyboardInterrupt):
        run_step(step, state)
    # What a checkpoint says that was written inside that training.
    state = State(state.model, state.task, saved=[stopped - 1], training={"counters": {}})
    SEEN.clear()
    STOP[0] = 0
    run_step(step, state)
    assert seen[stopped - 1 :] == SEEN
    wanted = dict(whole.named_parameters())
    assert all(torch.equal(tensor, wanted[n]) for n, tensor in state.model.named_parameters())


# ------------------------------------------------------------------ while training


def test_gradual_pruning_masks_and_a_second_step_slices() -> None:
    state = State(Separable(), images())
    axes = found(state.model, state.task, "channels")
    step = Prune("channels", keep=0.5, rounds=4)
    left = []

    class Spy(Step):
        def apply(self, state: State) -> None:
            for update in range(1, 9):
                step.update(state, update / 8, since=(update - 1) / 8)
                left.append(int(alive(state.model, axes[0]).sum()))

    Step._registry[Step].pop("spy")
    run_step(Spy(), state)
    shares = [step.schedule.keep(index / 4, 0.5) for index in range(5)]
    assert left == [round(6 * shares[update // 2]) for update in range(1, 9)]
    assert sizes(state.model, axes) == [6, 4]
    run_step(Train(batch=8, during=(step,)), state)
    before = outputs(state.model, state.task)
    run_step(Prune("channels", keep=1), state)
    assert sizes(state.model, axes) == [3, 2]
    assert torch.allclose(outputs(state.model, state.task), before, atol=CLOSE)


@pytest.mark.parametrize("axes", ["weights", "channels"])
def test_an_update_without_anything_to_do_looks_at_no_weight(
    axes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("weights_of", "alive", "axes_of"):
        real = getattr(prune, name)
        monkeypatch.setattr(
            prune, name, lambda *args, real=real, name=name: (calls.append(name), real(*args))[1]
        )
    state, step = State(Separable(), images()), Prune(axes, keep=0.5, rounds=3)  # type: ignore[arg-type]
    for update in range(1, 31):
        step.update(state, update / 30, since=(update - 1) / 30)
    assert calls.count("weights_of") == (3 if axes == "weights" else 0)
    assert calls.count("axes_of") == (1 if axes == "channels" else 0)
    assert calls.count("alive") == (3 * 2 if axes == "channels" else 0)


def test_a_step_serves_one_training_after_another() -> None:
    state, step = State(Separable(), images()), Prune("weights", keep=0.5, rounds=2)
    for update in range(1, 11):
        step.update(state, update / 10, since=(update - 1) / 10)
    bake(state.model)
    again = Prune("weights", keep=0.5, rounds=2)
    for update in range(1, 11):
        again.update(state, update / 10, since=(update - 1) / 10)
    assert int((state.model.inner.weight != 0).sum()) == 18
    assert int(mask_of(state.model, "inner.weight").sum()) == 18  # type: ignore[union-attr]


# ------------------------------------------------------------------ soft filter pruning


@pytest.mark.parametrize("axes", ["weights", "channels"])
def test_soft_pruning_zeroes_at_its_moments_and_masks_at_the_end(axes: str) -> None:
    state = State(Separable(), images())
    step = Prune(axes, keep=0.5, schedule=Soft(), rounds=3)  # type: ignore[arg-type]
    kernel = state.model.first.weight
    zeros = []
    for update in range(1, 10):
        with torch.no_grad():
            kernel.copy_(torch.rand(kernel.shape))  # training moves what was zeroed, too
        step.update(state, update / 9, since=(update - 1) / 9)
        zeros.append(int((state.model.first.weight.flatten(1) == 0).sum()))
    half = kernel.numel() // 2
    assert zeros == [0, 0, half, 0, 0, half, 0, 0, half]
    assert "first.weight" in laid_tensors(state.model)
    assert int(mask_of(state.model, "first.weight").sum()) == half  # type: ignore[union-attr]


def test_what_was_softly_pruned_learns_again_and_may_come_back() -> None:
    state = State(Separable(), images())
    step = Prune("channels", scope="first, each", keep=0.5, schedule=Soft(), rounds=4)
    step.update(state, 0.2, since=0.0)
    step.update(state, 0.25, since=0.2)
    zeroed = (state.model.first.weight.flatten(1) == 0).all(1)
    assert int(zeroed.sum()) == 3
    run_step(Train(batch=8, optimizer=Adam(0.01, decay=Constant())), state)
    assert bool((state.model.first.weight.flatten(1)[zeroed] != 0).any(1).all())
    with torch.no_grad():
        state.model.first.weight[zeroed] = 9.0
    step.update(state, 0.5, since=0.25)
    assert bool((state.model.first.weight[zeroed] == 9.0).all())
