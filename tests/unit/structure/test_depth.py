"""Dropping whole blocks: which ones go, what is left, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import laconic
from helpers.depth import after, inputs, net, task
from laconic.errors import ModelError, RecipeError, ScopeError, TaskError
from laconic.models.families import blocks_path
from laconic.recipe import Recipe
from laconic.recover import Train
from laconic.scope import Scope
from laconic.step import State, Step, run_step
from laconic.structure import (
    AllBut,
    Alternate,
    Bottom,
    Depth,
    DropLayers,
    EveryNth,
    LayerDrop,
    Middle,
    ShareLayers,
    Similar,
    Spread,
    Top,
)
from laconic.structure.surgery import apply_edits_, edits_of
from laconic.tasks import Task
from laconic.weights import Ternary
from laconic.weights.laid import lay

# ------------------------------------------------------------------ which blocks


@given(count=st.integers(1, 40), drop=st.integers(1, 40), share=st.floats(0.01, 1))
def test_places_are_sorted_and_of_the_network(count: int, drop: int, share: float) -> None:
    some: list[Depth] = [Top(drop), Bottom(drop), Middle(drop), Spread(share)]
    some.append(EveryNth(1 + drop))
    for by in some:
        kept = by.kept(count)
        assert list(kept) == sorted(set(kept)) and set(kept) <= set(range(count))
        assert by.foreseen(count) == kept
    for by in some[:3]:
        assert len(by.kept(count)) == max(0, count - drop)
    assert len(Spread(share).kept(count)) == max(1, round(count * share))


@pytest.mark.parametrize(
    ("by", "kept"),
    [
        (Similar(2), (1, 3, 4)),
        (Similar(1), (1, 2, 3, 4)),
        (Similar(above=0.75), (1, 4)),
        (Similar(1, above=0.75), (1, 2, 3, 4)),
        (Similar(4, above=0.95), (0, 1, 2, 3, 4)),
        (Similar(), (1,)),
        (Similar(9), (1,)),
    ],
    ids=repr,
)
def test_the_most_similar_go_first(by: Similar, kept: tuple[int, ...]) -> None:
    assert by.kept(5, [0.9, -0.2, 0.9, 0.8, 0.7]) == kept


# ------------------------------------------------------------------ dropping


def test_dropping_nothing_changes_nothing() -> None:
    model, x = net(), inputs()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    wanted = model(x)
    for by in (Spread(1.0), AllBut((0, 1, 2, 3)), Similar(above=1.0)):
        after(DropLayers(by), model)
    assert torch.equal(model(x), wanted)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert edits_of(model) == {}


def test_the_blocks_that_stay_are_the_same_and_run_in_order() -> None:
    model = net()
    first, last = model.blocks[0], model.blocks[3]
    x = inputs()
    wanted = model.last(last(first(model.first(x))).mean(dim=1))
    after(DropLayers(Middle(2)), model)
    assert list(model.blocks) == [first, last]
    assert sorted({name.split(".")[1] for name in model.state_dict() if "blocks" in name}) == [
        "0",
        "1",
    ]
    assert torch.equal(model(x), wanted)


def test_edits_repeat_it_on_a_network_as_it_was_built() -> None:
    model = net(6)
    after(DropLayers(Top(2)), model)
    after(DropLayers(EveryNth(2)), model)
    assert edits_of(model) == {"lists": {"blocks": [1, 3]}}
    again = net(6)
    apply_edits_(again, edits_of(model), {})
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(inputs()), model(inputs()))


def test_the_file_brings_the_same_network_back(tmp_path: Path) -> None:
    model = net(6)
    after(DropLayers(Spread(0.5)), model)
    laconic.save(model, tmp_path / "small.safetensors")
    again = laconic.load(tmp_path / "small.safetensors", model=net(6))
    assert len(again.blocks) == 3
    assert torch.equal(again(inputs()), model(inputs()))


def test_similarity_is_measured_on_training_data() -> None:
    """A block that adds little is like its input; one that turns the sign is not."""
    model = net()
    with torch.no_grad():
        model.blocks[2].inner.weight.zero_()
        model.blocks[2].inner.bias.fill_(1e-4)
        model.blocks[0].inner.weight.mul_(5)
    by = Similar(1, batches=2, batch=8, tokens="all")
    found = by.similarity(State(model, task()), "blocks")
    assert found[2] == max(found) and found[2] == pytest.approx(1, abs=1e-6)
    assert all(abs(value) <= 1 + 1e-6 for value in found)  # a rounded cosine may be above 1
    x = next(iter(task().train.batches(8, seed=0))).inputs
    with torch.no_grad():
        before = model.first(x[0] if isinstance(x, tuple) else x)
        cosine = nn.functional.cosine_similarity(before, model.blocks[0](before), dim=-1)
    one = Similar(1, batches=1, batch=8, tokens="all").similarity(State(model, task()), "blocks")
    assert one[0] == pytest.approx(float(cosine.mean()), abs=1e-6)
    first = Similar(1, batches=1, batch=8).similarity(State(model, task()), "blocks")
    assert first[0] == pytest.approx(float(cosine[:, 0].mean()), abs=1e-6)
    kept = [*model.blocks[:2], model.blocks[3]]
    assert list(after(DropLayers(by), model).blocks) == kept


class Residual(nn.Module):
    """Adds so many times a convolution of its input [batch, 4, height, width]."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = nn.Conv2d(4, 4, 3, padding=1), factor

    def forward(self, maps: Tensor) -> Tensor:
        change = torch.cat([torch.zeros_like(maps[:, :1]), self.inner(maps)[:, 1:]], dim=1)
        return maps + self.factor * change


class Residuals(nn.Module):
    """Three residual blocks; none changes the first channel, and the second hardly any."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual(5), Residual(0.01), Residual(3)])

    def forward(self, maps: Tensor) -> Tensor:
        for block in self.blocks:
            maps = block(maps)
        return maps.mean((2, 3))


def test_maps_are_similar_where_the_channels_of_their_places_are() -> None:
    torch.manual_seed(0)
    model, maps = Residuals(), torch.randn(16, 4, 5, 6)
    pair = (maps, torch.zeros(16, dtype=torch.long))
    data = Task.from_arrays(pair, pair, pair)
    by = Similar(1, batches=1, batch=16)
    found = by.similarity(State(model, data), "blocks")
    with torch.no_grad():
        cosine = nn.functional.cosine_similarity(maps, model.blocks[0](maps), dim=1)
    assert found[0] == pytest.approx(float(cosine.mean()), abs=1e-6)
    assert by.kept(3, similarity=found) == (0, 2)


def test_steps_in_a_row_are_checked_together() -> None:
    half = DropLayers(EveryNth(2))
    Recipe([half, half]).check(net(6), None)
    for first in (half, DropLayers(Similar(3))):
        with pytest.raises(ModelError, match=r"Top\(3\) leaves none of 3 blocks"):
            Recipe([first, DropLayers(Top(3))]).check(net(6), task())


@pytest.mark.parametrize("by", [Top(4), Bottom(9), Middle(5), AllBut(())], ids=repr)
def test_one_block_must_stay(by: Depth) -> None:
    with pytest.raises(ModelError, match="leaves none of 4 blocks; drop fewer"):
        DropLayers(by).check(net(), task())
    with pytest.raises(ModelError, match="leaves none of 4 blocks; drop fewer"):
        run_step(DropLayers(by), State(net(), task()))


@pytest.mark.parametrize(
    ("by", "message"),
    [
        (AllBut((0, 7)), "there is no block 7; the 4 blocks are 0 to 3"),
        (Alternate(3), "4 blocks have 2 of odd number, 3 cannot go"),
    ],
)
def test_what_is_not_there_cannot_go(by: Depth, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        DropLayers(by).check(net(), task())


def test_a_choice_by_data_is_abridged_to_one_batch() -> None:
    step = DropLayers(Similar(1, batch=8))
    assert step.abridged() == (DropLayers(Similar(1, batches=1, batch=8)),)
    assert DropLayers(Top(1)).abridged() == (DropLayers(Top(1)),)


def test_similar_needs_data() -> None:
    with pytest.raises(TaskError, match="similar compares blocks on data, and there is no task"):
        DropLayers(Similar(1)).check(net(), None)


def test_blocks_that_change_the_width_cannot_be_compared() -> None:
    class Wider(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear = nn.Linear(width, width + 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    model = net()
    model.blocks = nn.ModuleList([Wider(6), Wider(7)])
    model.last = nn.Linear(8, 3)
    with pytest.raises(ModelError, match=r"turns \[8, 3, 6\] into \[8, 3, 7\]"):
        run_step(DropLayers(Similar(1, batch=8)), State(model, task()))


def test_a_network_without_blocks_is_refused() -> None:
    for step in (DropLayers(Top(1)), LayerDrop(0.1, retrain=Train()), ShareLayers()):
        with pytest.raises(ModelError, match="no list of blocks"):
            step.check(nn.Sequential(nn.Linear(4, 3)), task())


def test_blocks_are_of_one_type_whatever_is_laid_on_them() -> None:
    model = nn.Sequential(nn.ModuleList(nn.Linear(4, 4) for _ in range(3)))
    for index in range(3):
        lay(model, f"0.{index}.weight", Ternary())
        assert blocks_path(model) == "0"


def test_blocks_outside_the_scope_are_left_alone() -> None:
    for step in (DropLayers(Top(1)), LayerDrop(0.1, retrain=Train()), ShareLayers()):
        step.model_copy(update={"scope": Scope("blocks*")}).check(net(), task())
        with pytest.raises(ScopeError, match="the blocks 'blocks' are not in the scope 'first'"):
            step.model_copy(update={"scope": Scope("first")}).check(net(), task())


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Top(0), "drop"),
        (lambda: EveryNth(1), "every"),
        (lambda: Spread(0.0), "keep"),
        (lambda: AllBut((-1,)), "keep"),
        (lambda: Similar(above=1.5), "above"),
        (lambda: Alternate(2, parity="both"), "parity"),
        (lambda: LayerDrop(1.0, retrain=Train()), "chance"),
        (lambda: LayerDrop(0.2, retrain=None), "retrain"),
        (lambda: ShareLayers(-1), "source"),
        (lambda: ShareLayers("median"), "source"),
    ],
)
def test_values_out_of_bounds_are_refused(make: Callable[[], object], field: str) -> None:
    with pytest.raises(RecipeError, match=field):
        make()


class Beside(nn.Module):
    """Modules side by side: experts on one input, or columns each with its own table."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        made = [nn.Embedding(4, 4) if kind == "columns" else nn.Linear(4, 4) for _ in range(3)]
        self.parts, self.last = nn.ModuleList(made), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "columns":
            return self.last(sum(part(x[:, k].long()) for k, part in enumerate(self.parts)))
        if self.kind == "one":
            return self.last(self.parts[0](x))
        return self.last(sum(part(x) for part in self.parts))


@pytest.mark.parametrize("step", [DropLayers(Top(1)), LayerDrop(retrain=Train()), ShareLayers()])
@pytest.mark.parametrize("kind", ["experts", "columns"])
def test_modules_side_by_side_are_no_layers(step: Step, kind: str) -> None:
    with pytest.raises(ModelError, match=r"'parts' are no layers one after the other"):
        step.check(Beside(kind), columns())


def columns() -> Task:
    pair = (torch.rand(8, 4), torch.arange(8) % 2)
    return Task.from_arrays(pair, pair, pair)


def test_data_that_do_not_fit_are_told_before_any_work() -> None:
    pair = (torch.rand(8, 5), torch.arange(8) % 2)
    with pytest.raises(TaskError, match=r"cannot be called .*give data that fit it"):
        DropLayers(Top(1)).check(Chained("between"), Task.from_arrays(pair, pair, pair))


class Chained(nn.Module):
    """Layers whose features are pooled in between, changed in place, or come second."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.parts, self.last = nn.ModuleList(Inner(kind) for _ in range(3)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x, context = x + 0, torch.ones(len(x), 1)
        for part in self.parts:
            x = part(context, x)
            x = x[1] if isinstance(x, tuple) else x * 1 if self.kind == "between" else x
        return self.last(x)


class Inner(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(4, 4)

    def forward(self, context: Tensor, x: Tensor) -> Any:
        if self.kind == "in place":
            return x.add_(self.layer(x))
        made = self.layer(x) * context
        return (context, made) if self.kind == "second" else made


@pytest.mark.parametrize("step", [DropLayers(Top(1)), LayerDrop(retrain=Train()), ShareLayers()])
@pytest.mark.parametrize("kind", ["in place", "second", "between"])
def test_layers_that_pass_features_in_their_own_way_are_layers(step: Step, kind: str) -> None:
    step.check(Chained(kind), columns())
