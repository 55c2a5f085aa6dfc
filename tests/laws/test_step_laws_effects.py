"""Laws of what every registered step does: seeds, scope, gradients, the caller's own things."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from helpers.steps import ATTENDING, BEFORE, TEACHERS, each_step, tiny_network, tiny_task
from laconic import measure as measuring
from laconic.budget import Budget
from laconic.names import QUANTIZERS, of_laid
from laconic.run import compress
from laconic.scope import Scope
from laconic.step import State, Step, run_step
from laconic.structure.surgery import edits_of
from laconic.weights import Quantize
from laconic.weights.laid import laid_tensors, weights_of

# Modules that the step changes, where it is not the last layer.
PLACES = {
    "drop_layers": "blocks",
    "fold": "conv, norm",
    "ghost": "conv",
    "layer_drop": "blocks",
    "mixed_precision": "blocks",
    "recalibrate": "norm",
    "reconstruct": "blocks",
    "rectify": "blocks",
    "set_dropout": "drop",
    "share_layers": "blocks",
    "unpack": "attention",
}

# Weights that came as codes are decoded before these.
LAYING = ("quantize", "split")


def bytes_of(model: nn.Module) -> dict[str, bytes]:
    return {
        name: tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }


def after(step: Step, seed: int = 0, *, train_mode: bool = False) -> nn.Module:
    """Return the tiny network after a step."""
    state = State(tiny_network(step).train(train_mode), tiny_task(), TEACHERS, seed=seed)
    step.check(state.model, state.task)
    run_step(step, state)
    assert state.position == [] and state.saved == [] and state.training == {}
    return state.model


@each_step
def test_the_same_seed_gives_the_same_bytes(step: Step, draws: bool) -> None:
    torch.manual_seed(1)
    first = bytes_of(after(step))
    torch.manual_seed(2)
    torch.rand(5)
    assert bytes_of(after(step, train_mode=True)) == first, "the caller's generator or mode matters"
    assert (bytes_of(after(step, seed=1)) != first) == draws


@each_step
def test_a_step_changes_the_network_and_may_be_repeated(step: Step, draws: bool) -> None:
    state = State(tiny_network(step), tiny_task(), TEACHERS)
    before = bytes_of(state.model), edits_of(state.model)
    run_step(step, state)
    assert (bytes_of(state.model), edits_of(state.model)) != before
    run_step(step, state, key=1)
    assert all(bool(tensor.isfinite().all()) for tensor in state.model.state_dict().values())


def tree(model: nn.Module) -> list[str]:
    """Return the paths of all modules but of what is laid on weights or rounds inputs."""
    paths = (path for path, _ in model.named_modules())
    return [path for path in paths if not of_laid(path) and QUANTIZERS not in path.split(".")]


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in weights_of(model, Scope("*")).items()}


@each_step
def test_an_outline_has_the_modules_of_what_comes_out(step: Step, draws: bool) -> None:
    model, earlier = tiny_network(attends=step.name in ATTENDING), BEFORE.get(step.name, ())
    before, kinds = bytes_of(model), [type(module) for module in model.modules()]
    outline, found = step.outline(model, earlier), after(step)
    assert bytes_of(model) == before
    assert [type(module) for module in model.modules()] == kinds
    assert tree(outline) == tree(found)
    if outline is not model:
        assert shapes(outline) == shapes(found)


@each_step
def test_an_abridged_step_leaves_a_network_of_the_same_shape(step: Step, draws: bool) -> None:
    state = State(tiny_network(step), tiny_task(), TEACHERS)
    parts = step.abridged()
    assert all(part.repeats == 1 for part in parts)
    for part in parts:
        run_step(part, state)
    found = after(step)
    assert (tree(state.model), shapes(state.model)) == (tree(found), shapes(found))
    assert laid_tensors(state.model).keys() == laid_tensors(found).keys()
    assert [*step.abridged(step.repeats + 7)] == [*step.abridged(step.repeats)]


def narrowed(step: Step, scope: Scope) -> Step:
    """Return the step, and every step inside it, with another scope."""
    changed: dict[str, Any] = {"scope": scope}
    for name, value in dict(step).items():
        if isinstance(value, Step):
            changed[name] = narrowed(value, scope)
        elif isinstance(value, tuple):
            changed[name] = tuple(narrowed(item, scope) for item in value)
        elif isinstance(value, Budget):  # what is outside takes more than it may allow
            changed[name] = Budget("size <= 1x")
    return step.model_copy(update=changed)


@each_step
def test_what_is_outside_the_scope_stays(step: Step, draws: bool) -> None:
    if getattr(step, "axes", "weights") != "weights":
        pytest.skip("an axis goes through tensors outside the scope, and they change with it")
    inside = PLACES.get(step.name, "last").split(", ")
    network = tiny_network(step)
    model = after(narrowed(step, Scope(", ".join(f"{place}*" for place in inside))))
    before, found = bytes_of(network), bytes_of(model)
    for name, content in before.items():
        if not name.startswith(tuple(f"{place}." for place in inside)):
            assert found[name] == content, name
    assert found != before or edits_of(model) != edits_of(network)


@each_step
def test_gradients_and_what_may_move_are_left_as_found(step: Step, draws: bool) -> None:
    model = after(step)
    frozen = {name for name, tensor in model.named_parameters() if not tensor.requires_grad}
    # Its halves, once it is split.
    assert frozen in ({"middle.bias"}, {"middle.first.bias", "middle.second.bias"})
    assert all(tensor.grad is None for tensor in model.parameters())


def generators() -> tuple[Any, ...]:
    """Return where every generator stands that a library should leave alone."""
    legacy = np.random.get_state()[1]  # noqa: NPY002  what other people's code draws from
    return torch.random.get_rng_state().tolist(), random.getstate(), legacy.tolist()


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure without timing forwards."""
    quick = functools.partial(measuring.measure, latency=False)
    monkeypatch.setattr(measuring, "measure", quick)


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("laid", [False, True], ids=["plain", "laid"])
@each_step
def test_the_callers_model_and_generators_are_untouched(
    step: Step, draws: bool, laid: bool
) -> None:
    model = tiny_network(attends=step.name in ATTENDING)
    if laid:
        run_step(Quantize(4, scope=Scope("conv, blocks*")), State(model))
    model.train()
    model.norm.eval()  # type: ignore[union-attr]
    before = bytes_of(model)
    modes = [module.training for module in model.modules()]
    moving = [parameter.requires_grad for parameter in model.parameters()]
    kinds = [type(module) for module in model.modules()]
    identities = [id(parameter) for parameter in model.parameters()]
    outputs = model.eval()(torch.ones(1, 1, 6, 6))
    model.train()
    model.norm.eval()  # type: ignore[union-attr]
    standing = generators()
    floats = (Quantize("float"),) if laid and step.name in LAYING else ()
    steps = [*floats, *BEFORE.get(step.name, ()), step]
    result = compress(model, tiny_task(), steps, device="cpu")
    assert generators() == standing
    assert bytes_of(model) == before
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == moving
    assert [type(module) for module in model.modules()] == kinds
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model.eval()(torch.ones(1, 1, 6, 6)), outputs)
    theirs = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in result.model.state_dict().values()}
