"""Loss-aware representations: the worked vector, brute force, descent, curvature from training."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.tensors import same
from helpers.train import network, task
from laconic.errors import ChainError, RecipeError
from laconic.recover import SGD, Adam, AdamW, Constant, Optimizer, Stop, Train
from laconic.recover.optimize import curvature_of
from laconic.recover.train import _Loop
from laconic.scope import Scope
from laconic.ship.checkpoint import load_checkpoint, save_checkpoint
from laconic.step import State, run_step
from laconic.weights import Binary, Laid, LossAware, Quantize, Symmetric, Ternary, lay
from laconic.weights.laid import laid_tensors
from laconic.weights.lossaware import exact_ternary, loss_aware_binary, loss_aware_levels

VECTOR = torch.tensor([0.9, -1.1, 0.3, -0.2, 0.05, -0.6, 0.4, 1.5])
CURVATURE = torch.tensor([1.0, 2.0, 1.0, 1.0, 4.0, 1.0, 1.0, 0.5])
# A few float32 roundings of numbers near one.
ROUNDING = 1e-6
SOLVERS = ("approximate", "exact")


def objective(weight: Tensor, curvature: Tensor, decoded: Tensor) -> float:
    """Return half the weighed sum of squared errors."""
    error = decoded.double() - weight.double()
    return float((curvature.double() * error.square()).sum() / 2)


def decoded(representation: LossAware, weight: Tensor, curvature: Tensor) -> Tensor:
    return representation.decode(representation.encode(weight, state={"curvature": curvature}))


@pytest.mark.parametrize("solver", SOLVERS)
def test_lat_vector(solver: str) -> None:
    codes = LossAware(2, solver=solver).encode(VECTOR, state={"curvature": CURVATURE})
    assert (codes.streams["code"].tensor.int() - 1).tolist() == [1, -1, 0, 0, 0, -1, 0, 1]
    assert codes.streams["code"].bits == 2
    assert float(codes.tables["scale"]) == pytest.approx(0.98888889, abs=ROUNDING)
    found = decoded(LossAware(2, solver=solver), VECTOR, CURVATURE)
    assert objective(VECTOR, CURVATURE, found) == pytest.approx(0.30722222, abs=ROUNDING)


def best_by_brute_force(weight: Tensor, curvature: Tensor, levels: list[float]) -> float:
    """Return the least objective over every choice of a level for every weight."""
    b = torch.tensor(list(itertools.product(levels, repeat=len(weight))), dtype=torch.float64)
    w, d = weight.double(), curvature.double()
    scale = (b * d * w).sum(1) / (b.square() * d).sum(1).clamp(min=1e-30)
    return float((d * (scale[:, None] * b - w).square()).sum(1).min() / 2)


@pytest.mark.parametrize("count", range(1, 11))
def test_exact_lat_is_the_best_of_all_ternary_vectors(count: int) -> None:
    for _ in range(3 if count > 8 else 10):
        weight, curvature = torch.randn(count), torch.rand(count) + 1e-3
        best = best_by_brute_force(weight, curvature, [-1.0, 0.0, 1.0])
        exact = objective(weight, curvature, decoded(LossAware(solver="exact"), weight, curvature))
        assert exact == pytest.approx(best, abs=ROUNDING)
        turns = objective(weight, curvature, decoded(LossAware(), weight, curvature))
        assert turns >= best - ROUNDING


@pytest.mark.parametrize("count", [11, 12])
def test_exact_lat_is_the_best_of_all_supports(count: int) -> None:
    """The signs of a best ternary vector are the weights': its support is all there is to find."""
    weight, curvature = torch.randn(count), torch.rand(count) + 1e-3
    best = best_by_brute_force(weight.abs(), curvature, [0.0, 1.0])
    exact = objective(weight, curvature, decoded(LossAware(solver="exact"), weight, curvature))
    assert exact == pytest.approx(best, abs=ROUNDING)


@pytest.mark.parametrize("count", range(1, 11))
def test_lab_is_the_best_of_all_sign_vectors(count: int) -> None:
    weight, curvature = torch.randn(count), torch.rand(count) + 1e-3
    best = best_by_brute_force(weight, curvature, [-1.0, 1.0])
    found = objective(weight, curvature, decoded(LossAware(1), weight, curvature))
    assert found == pytest.approx(best, abs=ROUNDING)


@pytest.mark.parametrize("top", [1, 3, 7, 127])
def test_no_alternation_raises_the_objective(top: int) -> None:
    size, curvature = torch.randn(3, 400).abs() ** 3, torch.rand(3, 400)
    before = torch.full((3,), torch.inf, dtype=torch.float64)
    for alternations in range(1, 11):
        levels, step = loss_aware_levels(size, curvature, top, alternations=alternations)
        error = (levels * step[:, None]).double() - size.double()
        now = (curvature * error.square()).sum(1)
        assert bool((now <= before * (1 + ROUNDING)).all())
        assert set(levels.unique().tolist()) <= set(range(top + 1))
        before = now


@pytest.mark.parametrize("alternations", [1, 2, 10])
@pytest.mark.parametrize("top", [1, 3, 7])
def test_the_step_is_the_best_of_its_levels(top: int, alternations: int) -> None:
    size, curvature = torch.randn(1, 400).abs(), torch.rand(1, 400)
    levels, step = loss_aware_levels(size, curvature, top, alternations=alternations)
    best = (curvature * levels * size).sum() / (curvature * levels.square()).sum()
    assert float(step) == pytest.approx(float(best), rel=ROUNDING)


@pytest.mark.parametrize("top", [1, 3, 7])
def test_alternations_go_on_until_nothing_moves(top: int) -> None:
    size, curvature = torch.randn(20, 30).abs(), torch.rand(20, 30)
    levels, step = loss_aware_levels(size, curvature, top)
    at_rest = (levels == (size / step[:, None]).round().clamp(max=top)).all(1)
    assert float(at_rest.float().mean()) > 0.9  # ten may be too few for some
    _, first = loss_aware_levels(size, curvature, top, alternations=1)
    assert bool((first != step).any())


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_laq_errs_less_than_the_largest_weight_makes_symmetric(bits: int) -> None:
    weight = torch.randn(4, 500)
    codes = LossAware(bits).encode(weight, state=LossAware(bits).fit(weight))
    plain = Symmetric(bits).decode(Symmetric(bits).encode(weight))
    found = objective(weight, torch.ones(4, 500), LossAware(bits).decode(codes))
    assert found <= objective(weight, torch.ones(4, 500), plain)
    assert codes.streams["code"].bits == bits


@pytest.mark.parametrize("granularity", ["tensor", "row", 5])
@pytest.mark.parametrize("constant", [1.0, 1e-8, 30.0])
def test_constant_curvature_is_least_squares(constant: float, granularity: Any) -> None:
    weight, mask = torch.randn(6, 10), torch.rand(6, 10) < 0.7
    state = {"curvature": torch.full((6, 10), constant)}
    pairs = [
        (LossAware(solver="exact"), Ternary(threshold="exact")),
        (LossAware(1), Binary()),
    ]
    for aware, plain in pairs:
        one = aware.model_copy(update={"granularity": granularity})
        other = plain.model_copy(update={"granularity": granularity})
        found, expected = (
            one.encode(weight, mask=mask, state=state),
            other.encode(weight, mask=mask),
        )
        assert torch.equal(found.streams["code"].tensor, expected.streams["code"].tensor)
        assert torch.allclose(one.decode(found), other.decode(expected), rtol=ROUNDING)


def test_groups_are_solved_one_by_one() -> None:
    weight, curvature = torch.randn(5, 40), torch.rand(5, 40)
    for bits, solver in ((1, "approximate"), (2, "approximate"), (2, "exact"), (4, "approximate")):
        whole = decoded(LossAware(bits, granularity="row", solver=solver), weight, curvature)
        for row in range(5):
            own = decoded(LossAware(bits, solver=solver), weight[row], curvature[row])
            assert torch.allclose(whole[row], own, rtol=1e-5)


def test_curvature_decides_what_is_kept() -> None:
    weight = torch.tensor([1.0, 0.9, 0.2, 0.2])
    sharp = torch.tensor([1e-3, 1e-3, 1.0, 1.0])
    assert decoded(LossAware(), weight, torch.ones(4)).count_nonzero() == 2
    assert decoded(LossAware(solver="exact"), weight, sharp)[2:].tolist() == pytest.approx(
        [0.2, 0.2], abs=0.01
    )


def test_the_pure_functions_take_groups_of_nothing() -> None:
    size, curvature = torch.zeros(2, 3), torch.zeros(2, 3)
    assert loss_aware_binary(size, curvature).tolist() == [0, 0]
    assert exact_ternary(size, curvature)[1].tolist() == [0, 0]
    levels, step = loss_aware_levels(size, curvature, 3)
    assert not bool(levels.any()) and bool(step.isfinite().all())


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_only_two_bits_are_solved_exactly(bits: int) -> None:
    with pytest.raises(RecipeError, match=f"solver 'exact' is for 2 bits, not {bits}"):
        LossAware(bits, solver="exact")


# Curvature from training.


def train(optimizer: Optimizer, **fields: Any) -> Train:
    return Train(batch=8, optimizer=optimizer, stop=Stop(keep="last"), **fields)


@pytest.mark.parametrize("beta2", [0.999, 0.9])
def test_curvature_is_the_root_of_the_corrected_second_moment(beta2: float) -> None:
    weight = nn.Parameter(torch.zeros(3))
    other = nn.Parameter(torch.zeros(3))
    groups = [{"params": [other]}, {"params": [weight], "betas": (0.5, beta2)}]
    adam = torch.optim.Adam(groups, lr=0.01)
    assert curvature_of(adam, weight) is None
    moment, slopes = torch.zeros(3), [torch.tensor([1.0, -2.0, 0.0]), torch.tensor([3.0, 0.5, 0.0])]
    for slope in slopes:
        weight.grad = slope.clone()
        adam.step()
        moment = beta2 * moment + (1 - beta2) * slope.square()
    expected = (moment / (1 - beta2**2)).sqrt() + 1e-8
    assert torch.allclose(curvature_of(adam, weight), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("optimizer", [Adam(0.01, decay=Constant()), AdamW(0.01)], ids=repr)
def test_training_brings_the_curvature_up_to_date(optimizer: Optimizer) -> None:
    state = State(network(), task())
    lay(state.model, "0.weight", LossAware())
    lay(state.model, "2.weight", Ternary())
    loop = _Loop(train(optimizer, epochs=2), state)
    layer, latent = laid_tensors(state.model)["0.weight"]
    assert torch.equal(layer.curvature, torch.ones(8, 6))
    before = layer.curvature.clone()
    for batch in loop.batches():
        loop.update(batch)
        slots = loop.descent.optimizer.state[latent]
        corrected = slots["exp_avg_sq"] / (1 - 0.999 ** float(slots["step"]))
        assert torch.allclose(layer.curvature, corrected.sqrt() + 1e-8, rtol=1e-5)
        assert not torch.equal(layer.curvature, before)
        before = layer.curvature.clone()
    shipped = layer.representation.decode(layer.encode(latent))
    assert torch.equal(state.model[0].weight, shipped)
    assert not torch.equal(shipped, Laid(LossAware(), None, LossAware().fit(latent))(latent))


def test_what_does_not_move_keeps_its_curvature() -> None:
    model = network()
    for name in ("0.weight", "2.weight"):
        lay(model, name, LossAware())
    laid_tensors(model)["0.weight"][1].requires_grad_(False)
    run_step(train(AdamW(0.01)), State(model, task()))
    assert torch.equal(laid_tensors(model)["0.weight"][0].curvature, torch.ones(8, 6))
    assert not torch.equal(laid_tensors(model)["2.weight"][0].curvature, torch.ones(3, 8))


def test_a_resumed_training_has_the_curvature_it_had(tmp_path: Any) -> None:
    step = train(AdamW(0.05), epochs=2)
    whole, part = State(network(), task()), State(network(), task())
    for state in (whole, part):
        lay(state.model, "0.weight", LossAware(granularity="row"))
    _Loop(step, whole).run()
    loop = _Loop(step, part)
    batches = loop.batches()
    for batch in itertools.islice(batches, 4):
        loop.update(batch)
    next(batches)  # the loop counts a batch when the next one is asked for
    save_checkpoint(part, loop.payload(), tmp_path / "checkpoint", run={})
    other = State(network(), task())
    load_checkpoint(other, tmp_path / "checkpoint")
    kept = laid_tensors(other.model)["0.weight"][0].curvature
    assert torch.equal(kept, laid_tensors(part.model)["0.weight"][0].curvature)
    _Loop(step, other).run()
    assert same(whole.model, other.model)


def test_sgd_is_refused_at_once() -> None:
    steps = (Quantize(LossAware(), scope=Scope("0")),)
    with pytest.raises(ChainError, match=r"loss_aware\) at '0.weight'.*use adam or adamw"):
        train(SGD(0.1)).check(network(), task(), steps)
    train(SGD(0.1), scope="2").check(network(), task(), steps)
    train(SGD(0.1)).check(network(), task(), (*steps, Quantize(4)))
    train(AdamW()).check(network(), task(), steps)
    laid = network()
    steps[0].apply(State(laid))
    with pytest.raises(ChainError, match="second moment"):
        run_step(train(SGD(0.1)), State(laid, task()))


def test_a_smaller_weight_keeps_its_curvature() -> None:
    weight, curvature = torch.randn(4, 6), torch.rand(4, 6)
    for representation in (LossAware(), LossAware(granularity="row"), LossAware(granularity=2)):
        laid = Laid(representation, None, {"curvature": curvature})
        rows, columns = torch.tensor([2, 0]), torch.tensor([5, 1, 3, 0])
        assert torch.equal(laid.sliced(0, rows, weight).curvature, curvature[rows])
        assert torch.equal(laid.sliced(1, columns, weight).curvature, curvature[:, columns])
