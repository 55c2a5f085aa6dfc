"""Outlines: what later steps of a recipe are checked against, and what that leaves untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import depth, factorize, split
from laconic.errors import LaconicError, ModelError
from laconic.models.factored import TTLinear
from laconic.recipe import Recipe
from laconic.recover import Reset
from laconic.scope import Scope
from laconic.step import State, Step, run_step
from laconic.structure import (
    CP,
    SVD,
    Bottom,
    ChannelGhosts,
    DataSVD,
    DropLayers,
    Factorize,
    Ghost,
    PlanSplit,
    Prune,
    RandomGain,
    ShareLayers,
    Similar,
    Split,
    TensorTrain,
    Top,
    Tucker2,
)
from laconic.structure.factorization import Factorization
from laconic.tasks import Task
from laconic.weights import Quantize, Ternary
from laconic.weights.laid import weights_of

TERNARY = Quantize(Ternary())


def low_rank() -> nn.Module:
    network = factorize.network()
    with torch.no_grad():
        network[5].weight[:, 2:] = 0
    return network


# A network, its data, and steps of which the later ones need what an earlier one makes.
RUNNING: dict[str, tuple[Callable[[], nn.Module], Callable[[], Task], list[Step]]] = {
    "a part": (
        factorize.network,
        factorize.task,
        [Factorize(SVD(4), scope=Scope("5")), Quantize(4, scope=Scope("5.1"))],
    ),
    "a part of a part": (
        factorize.network,
        factorize.task,
        [
            Factorize(SVD(energy=0.5), scope=Scope("5")),
            Factorize(SVD(1), scope=Scope("5.1")),
            Prune("weights", keep=0.5, scope=Scope("5.1.0")),
        ],
    ),
    "all but a part": (
        factorize.network,
        factorize.task,
        [Factorize(SVD(4), scope=Scope("5")), Prune("weights", keep=0.5, scope="5, !5.0")],
    ),
    "a half": (
        split.network,
        split.task,
        [TERNARY, Split(), Prune("weights", keep=0.5, scope=Scope("6.first"))],
    ),
    "a half that data decide on": (
        split.network,
        split.task,
        [
            PlanSplit("size <= 1x", choose=RandomGain()),
            Split(),
            Prune("weights", keep=0.5, scope=Scope("6.first")),
        ],
    ),
    "a ghost": (
        split.network,
        split.task,
        [Ghost(ChannelGhosts(), scope=Scope("0")), Quantize(4, scope=Scope("0.cheap"))],
    ),
    "blocks that are left": (
        depth.net,
        depth.task,
        [DropLayers(Top(2)), Quantize(4, scope=Scope("blocks.1*"))],
    ),
    "blocks that data choose": (
        depth.net,
        depth.task,
        [DropLayers(Similar(2, batch=8)), Quantize(4, scope=Scope("blocks.1*"))],
    ),
    "as many blocks as data choose": (
        depth.net,
        depth.task,
        [DropLayers(Similar(above=0.999, batch=8)), Quantize(4, scope=Scope("blocks.3*"))],
    ),
    "a part that numbers decide on before they are trained": (
        low_rank,
        factorize.task,
        [
            Reset(),
            Factorize(SVD(energy=0.8), scope=Scope("5")),
            Factorize(SVD(2), scope=Scope("5.1")),
        ],
    ),
    "what was ternary in a block of another name": (
        depth.net,
        depth.task,
        [Quantize(Ternary(), scope=Scope("blocks.3*")), DropLayers(Bottom(3)), Split()],
    ),
    "beside blocks of which one is left": (
        depth.net,
        depth.task,
        [ShareLayers(0), DropLayers(Top(3)), Factorize(SVD(1), scope=Scope("last"))],
    ),
    "after what is gone": (
        depth.net,
        depth.task,
        [Quantize(4, scope=Scope("blocks.3*")), DropLayers(Top(2)), Quantize(8)],
    ),
}

# The same, where the network that is given has what is not there any more when it is needed.
REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Task], list[Step], str]] = {
    "a block that went": (
        depth.net,
        depth.task,
        [DropLayers(Top(2)), Quantize(4, scope=Scope("blocks.3*"))],
        "'blocks.3\\*' selects no module",
    ),
    "one of those that data choose": (
        depth.net,
        depth.task,
        [DropLayers(Similar(2, batch=8)), Quantize(4, scope=Scope("blocks.3*"))],
        "'blocks.3\\*' selects no module",
    ),
    "a layer of another kind": (
        factorize.network,
        factorize.task,
        [Factorize(TensorTrain(4)), Quantize(4, scope=Scope("kind:linear"))],
        "'kind:linear' selects no module; the network has no linear",
    ),
    "a part there is none of": (
        factorize.network,
        factorize.task,
        [Factorize(SVD(4), scope=Scope("5")), Quantize(4, scope=Scope("5.2"))],
        "'5.2' selects no module",
    ),
    "a rank that ghosts make too large": (
        split.network,
        split.task,
        [Ghost(ChannelGhosts(), scope=Scope("0")), Factorize(SVD(4), scope=Scope("0.primary"))],
        r"makes 48 weights of 27; at most rank 2",
    ),
    "halves of more than there is": (
        split.network,
        split.task,
        [TERNARY, Split(), Prune("weights", keep=0.5, scope=Scope("6.third"))],
        "'6.third' selects no module",
    ),
}


def run(model: nn.Module, task: Task, steps: list[Step]) -> None:
    state = State(model, task)
    for index, step in enumerate(steps):
        run_step(step, state, key=index)


@pytest.mark.parametrize("name", RUNNING)
def test_what_an_earlier_step_makes_may_be_named(name: str) -> None:
    build, data, steps = RUNNING[name]
    Recipe(steps).check(build(), data())
    model, task = build(), data()
    if name.startswith("as many"):  # how many blocks are left is known only now
        steps = steps[:1]
    run(model, task, steps)
    assert torch.isfinite(task.call(model, task.example_batch(2))).all()


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_earlier_step_takes_away_may_not(name: str) -> None:
    build, data, steps, message = REFUSED[name]
    with pytest.raises(LaconicError, match=rf"steps\.{len(steps) - 1} .*{message}"):
        Recipe(steps).check(build(), data())
    with pytest.raises(LaconicError, match=message):
        run(build(), data(), steps)


def modules(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {path: type(module) for path, module in model.named_modules()}


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("method", "scope"),
    [*((each, "5") for each in factorize.LINEAR), *((each, "0, 2") for each in factorize.CONV)],
    ids=repr,
)
def test_parts_have_the_kinds_and_shapes_of_what_is_split(
    method: Factorization, scope: str
) -> None:
    step, model = Factorize(method, scope=Scope(scope)), factorize.network()
    outline = step.outline(model)
    assert torch.isfinite(outline(factorize.images(2, 4, 9, 9))).all()
    run_step(step, State(model, factorize.task()))
    assert modules(outline) == modules(model)
    if method.foreseen() == method or not method.by_shape:
        assert shapes(outline) == shapes(model)
    else:  # numbers decide a rank
        sizes = [sum(p.numel() for p in each.parameters()) for each in (model, outline)]
        assert sizes[0] <= sizes[1] < sum(p.numel() for p in factorize.network().parameters())


def test_shapes_alone_are_looked_at_where_they_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensor: Tensor, **options: Any) -> Any:
        assert tensor.is_meta, "a singular value decomposition in the first second"
        return svd(tensor, **options)

    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", refuse)
    for method in (SVD(), SVD(energy=0.5), Tucker2(energy=0.5), DataSVD(energy=0.5)):
        steps = [Factorize(method), Prune("weights", keep=0.5)]
        Recipe(steps).check(factorize.network(), factorize.task())


def test_networks_with_parameters_of_other_kinds_have_outlines() -> None:
    with torch.inference_mode():
        inferred = depth.net()
    lazy = depth.net()
    lazy.unused = nn.LazyLinear(3)
    for model in (inferred, lazy):
        Recipe([DropLayers(Top(2)), Quantize(4, scope=Scope("blocks.1*"))]).check(model, None)


def test_weights_that_are_no_numbers_have_an_outline() -> None:
    model = factorize.network()
    model[5].weight.data[0, 0] = torch.nan
    assert isinstance(Factorize(TensorTrain(4), scope=Scope("5")).outline(model)[5], TTLinear)
    with pytest.raises(ModelError, match="'5' holds NaN"):
        run_step(Factorize(TensorTrain(4), scope=Scope("5")), State(model))


@pytest.mark.parametrize(
    ("step", "build", "earlier"),
    [
        (Factorize(SVD(2), scope=Scope("5")), factorize.network, ()),
        (Factorize(CP(sweeps=2), scope=Scope("0")), factorize.network, ()),
        (Split(scope=Scope("6")), split.network, (TERNARY,)),
        (Split(scope=Scope("6")), split.ternary_network, ()),
        (Ghost(ChannelGhosts()), split.network, ()),
        (Ghost(ChannelGhosts()), split.ternary_network, ()),
        (DropLayers(Top(1)), depth.net, ()),
    ],
)
def test_an_outline_changes_nothing_and_shares_what_stays(
    step: Step, build: Callable[[], nn.Module], earlier: tuple[Step, ...]
) -> None:
    model = build()
    still = next(name for name, _ in model.named_parameters() if name.endswith("bias"))
    model.get_parameter(still).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds, moving = modules(model), [p.requires_grad for p in model.parameters()]
    drawn = torch.get_rng_state()
    outline = step.outline(model, earlier)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert modules(model) == kinds and modules(outline) != kinds
    assert [p.requires_grad for p in model.parameters()] == moving
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    held = {p.data_ptr() for p in model.parameters()}
    assert held & {p.data_ptr() for p in outline.parameters()}
    new = sum(p.numel() for p in outline.parameters() if p.data_ptr() not in held)
    assert new < sum(p.numel() for p in model.parameters())


def test_halves_of_an_outline_are_binary_by_then() -> None:
    steps = (TERNARY, Split(scope=Scope("6")))
    outline = steps[1].outline(split.network(), steps[:1])
    ((binary, halves),) = steps[1].represented(outline)
    assert binary.name == "binary" and list(halves) == ["6.first.weight", "6.second.weight"]
    with pytest.raises(LaconicError, match="nothing in '6' is ternary"):
        Split(scope=Scope("6")).check(split.network(), None, (Quantize(4),))
    Recipe([*steps, Split(scope=Scope("6"))]).check(split.network(), None)
    again = Split(scope=Scope("6")).outline(outline, steps)
    assert list(weights_of(again, Scope("6"))) == list(halves)


def test_nothing_is_outlined_that_nothing_is_checked_against(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outlined = []
    monkeypatch.setattr(DropLayers, "outline", lambda *given: outlined.append(1) or given[1])
    Recipe([Quantize(4), DropLayers(Top(1))]).check(depth.net(), None)
    assert outlined == []
    same = DropLayers(Top(1))
    Recipe([same, Quantize(4), same]).check(depth.net(), None)
    assert outlined == [1]
