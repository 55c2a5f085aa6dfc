"""Dropping whole blocks, letting them drop out while training, and sharing one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import laconic
from laconic.errors import ModelError, RecipeError, ScopeError, TaskError
from laconic.measure import measure
from laconic.models.families import blocks_path
from laconic.recover import SGD, Train
from laconic.scope import Scope
from laconic.step import State, Step, run_step
from laconic.structure import (
    AllBut,
    Alternate,
    Bottom,
    Depth,
    DropLayers,
    EveryOther,
    LayerDrop,
    Middle,
    ShareLayers,
    Similar,
    Spread,
    Top,
)
from laconic.structure.depth import dropping_out
from laconic.structure.surgery import apply_edits_, edits_of
from laconic.tasks import Task
from laconic.weights import Float, KMeans, Ternary
from laconic.weights.laid import laid_tensors, lay

WIDTH = 6


class Block(nn.Module):
    """A residual block that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.drop(torch.tanh(self.inner(self.norm(x))))


class Net(nn.Module):
    """[batch, 3, 4] -> [batch, 3], through blocks of [batch, 3, 6]."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.first = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x.mean(dim=1))


def net(blocks: int = 4) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Net(blocks).eval()


def inputs(count: int = 5) -> Tensor:
    return torch.randn(count, 3, 4, generator=torch.Generator().manual_seed(0))


def task() -> Task:
    x = inputs(36)
    y = torch.arange(36) % 3
    return Task((x, y), (x[:6], y[:6]), (x[:6], y[:6]))


def after(step: Step, model: nn.Module | None = None, seed: int = 0) -> Any:
    model = net() if model is None else model
    state = State(model, task(), seed=seed)
    step.check(model, state.task)
    run_step(step, state)
    return state.model


# ------------------------------------------------------------------ which blocks


@pytest.mark.parametrize(
    ("by", "dropped"),
    [
        # Sajjad et al. 2020 count from 1.
        (Top(4), {9, 10, 11, 12}),
        (Bottom(4), {1, 2, 3, 4}),
        (Alternate(4, parity="odd"), {5, 7, 9, 11}),
        (Alternate(4, parity="even"), {6, 8, 10, 12}),
        (Alternate(6, parity="odd"), {1, 3, 5, 7, 9, 11}),
        (Alternate(6, parity="even"), {2, 4, 6, 8, 10, 12}),
        (Middle(2), {6, 7}),
        (Middle(4), {5, 6, 7, 8}),
        (Middle(6), {4, 5, 6, 7, 8, 9}),
        (Middle(3), {5, 6, 7}),
        # Fan et al. 2020 count from 0: d mod floor(1 / p) = 0.
        (EveryOther(0.5), {1, 3, 5, 7, 9, 11}),
        (EveryOther(0.34), {1, 3, 5, 7, 9, 11}),
        (EveryOther(1 / 3), {1, 4, 7, 10}),
        (EveryOther(0.2), {1, 6, 11}),
    ],
    ids=repr,
)
def test_what_the_papers_drop_of_twelve(by: Depth, dropped: set[int]) -> None:
    assert by.kept(12) == tuple(place for place in range(12) if place + 1 not in dropped)


@pytest.mark.parametrize(
    ("by", "kept"),
    [
        (Spread(0.75), (0, 1, 2, 4, 5, 6, 8, 9, 10)),
        (Spread(0.5), (0, 2, 4, 6, 8, 10)),
        (Spread(0.25), (0, 4, 8)),
        (Spread(1 / 3), (0, 3, 6, 9)),
        (Spread(1.0), tuple(range(12))),
        (Spread(0.01), (0,)),
        (AllBut((11, 0, 4)), (0, 4, 11)),
    ],
    ids=repr,
)
def test_what_stays_of_twelve(by: Depth, kept: tuple[int, ...]) -> None:
    """Hou et al. 2020: floor(i / m_d) for i < round(12 m_d)."""
    assert by.kept(12) == kept


def test_more_than_half_goes_in_steps() -> None:
    assert EveryOther(0.5).kept(12) == (1, 3, 5, 7, 9, 11)
    assert EveryOther(0.5).kept(6) == (1, 3, 5)


@given(count=st.integers(1, 40), drop=st.integers(1, 40), share=st.floats(0.01, 1))
def test_places_are_sorted_and_of_the_network(count: int, drop: int, share: float) -> None:
    some: list[Depth] = [Top(drop), Bottom(drop), Middle(drop), Spread(share)]
    some.append(EveryOther(share / 2))
    for by in some:
        kept = by.kept(count)
        assert list(kept) == sorted(set(kept)) and set(kept) <= set(range(count))
        assert by.left(count) == len(kept)
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
    after(DropLayers(EveryOther(0.5)), model)
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


def test_steps_in_a_row_are_checked_together() -> None:
    half = DropLayers(EveryOther(0.5))
    half.check(net(6), None)
    half.check(net(6), None, (half,))
    with pytest.raises(ModelError, match=r"Top\(3\) leaves none of 3 blocks"):
        DropLayers(Top(3)).check(net(6), None, (half,))


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
        (lambda: EveryOther(0.6), "share"),
        (lambda: Spread(0.0), "keep"),
        (lambda: AllBut((-1,)), "keep"),
        (lambda: Similar(above=1.5), "above"),
        (lambda: Alternate(2, parity="both"), "parity"),
        (lambda: LayerDrop(1.0, retrain=None), "drop"),
        (lambda: ShareLayers(-1), "source"),
        (lambda: ShareLayers("median"), "source"),
    ],
)
def test_values_out_of_bounds_are_refused(make: Callable[[], object], field: str) -> None:
    with pytest.raises(RecipeError, match=field):
        make()


# ------------------------------------------------------------------ published networks


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers", reason="published encoders need transformers")


SIZES = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
FAMILIES = {
    "Bert": SIZES | {"vocab_size": 20, "num_hidden_layers": 4},
    "Roberta": SIZES | {"vocab_size": 20, "num_hidden_layers": 4},
    "Electra": SIZES | {"vocab_size": 20, "num_hidden_layers": 4, "embedding_size": 8},
    "DistilBert": {"vocab_size": 20, "dim": 8, "n_heads": 2, "hidden_dim": 12, "n_layers": 4},
    "ViT": SIZES | {"num_hidden_layers": 4, "image_size": 8, "patch_size": 4},
}


def published(transformers: ModuleType, family: str, **fields: Any) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**(FAMILIES[family] | fields))
    kind = "Image" if family == "ViT" else "Sequence"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{family}For{kind}Classification")(config).eval()


def feed(family: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if family == "ViT":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    ids = torch.randint(5, 20, (2, 7), generator=generator)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shortened_encoder_is_the_class_with_fewer_layers(
    transformers: ModuleType, family: str
) -> None:
    model = published(transformers, family)
    run_step(DropLayers(AllBut((0, 3))), State(model))
    depth = {"n_layers": 2} if family == "DistilBert" else {"num_hidden_layers": 2}
    small = published(transformers, family, **depth)
    small.load_state_dict(model.state_dict())
    with torch.no_grad():
        found = model(**feed(family), output_hidden_states=True)
        wanted = small(**feed(family), output_hidden_states=True)
    assert torch.equal(found.logits, wanted.logits)
    assert len(found.hidden_states) == len(wanted.hidden_states) == 3
    assert model.config.num_hidden_layers == 2


@pytest.mark.parametrize("step", [DropLayers(AllBut((0, 3))), ShareLayers(2)], ids=repr)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_alone_brings_an_encoder_back(
    transformers: ModuleType, family: str, step: Step, tmp_path: Path
) -> None:
    model = published(transformers, family)
    run_step(step, State(model))
    laconic.save(model, tmp_path / "small.safetensors")
    again = laconic.load(tmp_path / "small.safetensors")
    assert numbers(again) == numbers(model)
    assert again.config.num_hidden_layers == model.config.num_hidden_layers
    with torch.no_grad():
        assert torch.equal(again(**feed(family)).logits, model(**feed(family)).logits)


def test_distilbert_starts_from_every_second_layer(transformers: ModuleType) -> None:
    """Sanh et al. 2019: six layers, each the same as one of the teacher's twelve."""
    teacher = published(transformers, "Bert", num_hidden_layers=12)
    student = copy.deepcopy(teacher)
    run_step(DropLayers(Spread(0.5)), State(student))
    blocks = student.bert.encoder.layer
    assert len(blocks) == 6
    for place, block in enumerate(blocks):
        origin = teacher.bert.encoder.layer[2 * place].state_dict()
        assert all(torch.equal(tensor, origin[name]) for name, tensor in block.state_dict().items())
    assert len(teacher.bert.encoder.layer) == 12 == teacher.config.num_hidden_layers
    torch.testing.assert_close(
        student.bert.embeddings.state_dict(), teacher.bert.embeddings.state_dict(), rtol=0, atol=0
    )


def test_one_block_for_every_layer_is_no_block_to_drop(transformers: ModuleType) -> None:
    config = transformers.AlbertConfig(vocab_size=20, embedding_size=8, **SIZES)
    model = transformers.AlbertModel(config)
    for step in (DropLayers(Top(1)), LayerDrop(0.2, retrain=None), ShareLayers()):
        with pytest.raises(ModelError, match="AlbertModel computes every layer with the same"):
            step.check(model, None)


# ------------------------------------------------------------------ dropping out


def fit(during: float | None, seed: int = 0, epochs: int = 2) -> nn.Module:
    train = Train(epochs=epochs, batch=6, optimizer=SGD(0.1))
    return after(train if during is None else LayerDrop(during, retrain=train), seed=seed)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(first, second) for first, second in pairs)


def test_dropping_out_with_no_chance_is_plain_training() -> None:
    state = State(net(), task())
    state.seed = laconic.step.derive(0, "layer_drop", 0)
    run_step(Train(epochs=2, batch=6, optimizer=SGD(0.1)), state)
    assert same(fit(0.0), state.model)


def test_draws_depend_on_the_seed_alone() -> None:
    first = fit(0.5)
    torch.manual_seed(99)
    assert same(fit(0.5), first)
    assert not same(fit(0.5, seed=1), first)
    assert not same(fit(0.2), first)


def test_blocks_drop_out_independently_while_training() -> None:
    model = net().train()
    model.blocks.apply(lambda module: setattr(module, "p", 0.0))  # dropout off
    x, rounds = inputs(1), 400
    with dropping_out(model.blocks, 0.3):
        for _ in range(rounds):
            model(x)
    calls = [block.calls for block in model.blocks]
    # 400 draws of 0.7: the deviation is 9.2; five of them are allowed.
    assert all(abs(count - 0.7 * rounds) < 46 for count in calls)
    assert len(set(calls)) > 1


def test_a_dropped_block_returns_its_input() -> None:
    model, x = net().train(), inputs()
    with dropping_out(model.blocks, 1 - 1e-12):
        assert torch.equal(model(x), model.last(model.first(x).mean(dim=1)))
        model.eval()
        kept = model(x)
    assert torch.equal(kept, model(x))


def test_nothing_is_left_behind() -> None:
    model = net()
    before = [dict(vars(module)) for module in model.modules()]
    with dropping_out(model.blocks, 0.5):
        assert "forward" in vars(model.blocks[0])
    assert [dict(vars(module)) for module in model.modules()] == before
    with pytest.raises(TypeError), dropping_out(model.blocks, 0.5):
        model()
    assert [dict(vars(module)) for module in model.modules()] == before
    trained = fit(0.5)
    assert all("forward" not in vars(module) for module in trained.modules())
    assert type(trained.blocks[0]) is Block
    assert not trained.blocks[0]._forward_hooks and edits_of(trained) == {}


def test_a_copy_made_meanwhile_is_a_network_of_its_own() -> None:
    model, x = net(), inputs()
    with dropping_out(model.blocks, 0.5):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.blocks[0].inner.weight.zero_()
            other.blocks[0].inner.bias.zero_()
        assert not torch.equal(other(x), model(x))
    assert not torch.equal(other(x), model(x))


class Halt:
    """Keeps what a run needs to go on after some updates, and ends it."""

    def __init__(self, updates: int) -> None:
        self.left = updates
        self.kept: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    def due(self) -> bool:
        self.left -= 1
        return self.left == 0

    def write(self, state: State, training: dict[str, Any]) -> None:
        self.kept = copy.deepcopy((state.model.state_dict(), training))
        raise KeyboardInterrupt


@pytest.mark.parametrize("updates", [1, 4, 9])
def test_a_resumed_training_goes_on_as_if_nothing_had_happened(updates: int) -> None:
    step = LayerDrop(0.5, retrain=Train(epochs=3, batch=6, optimizer=SGD(0.1)))
    whole = after(step)
    halt = Halt(updates)
    stopped = State(net(), task(), keeper=halt)
    with pytest.raises(KeyboardInterrupt):
        run_step(step, stopped)
    assert all("forward" not in vars(module) for module in stopped.model.modules())
    assert halt.kept is not None
    resumed = State(net(), task(), training=halt.kept[1])
    resumed.model.load_state_dict(halt.kept[0])
    run_step(step, resumed)
    assert same(resumed.model, whole)


def test_what_the_training_refuses_is_refused() -> None:
    with pytest.raises(TaskError, match="there is no task"):
        LayerDrop(0.2, retrain=Train()).check(net(), None)


# ------------------------------------------------------------------ sharing


def numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("blocks", [2, 5])
def test_parameters_do_not_depend_on_the_depth(blocks: int) -> None:
    model = after(ShareLayers(), net(blocks))
    outside = numbers(model.first) + numbers(model.last)
    assert numbers(model) == outside + numbers(model.blocks[0])
    assert len(model.blocks) == blocks


@pytest.mark.parametrize("source", [0, 2, "mean"])
def test_all_blocks_compute_what_the_source_does(source: int | str) -> None:
    model = net()
    origin = [block.state_dict() for block in copy.deepcopy(model).blocks]
    after(ShareLayers(source), model)
    for name, tensor in model.blocks[3].state_dict().items():
        stacked = torch.stack([block[name] for block in origin])
        wanted = stacked.mean(dim=0) if source == "mean" else stacked[source]
        assert torch.equal(tensor, wanted)
    x = inputs()
    hidden = model.first(x)
    for _ in range(4):
        hidden = model.blocks[1](hidden)
    assert torch.equal(model(x), model.last(hidden.mean(dim=1)))


def test_training_moves_shared_parameters_together() -> None:
    model = after(ShareLayers("mean"))
    before = model.blocks[0].inner.weight.detach().clone()
    after(Train(batch=6, optimizer=SGD(0.1)), model)
    weights = [block.inner.weight for block in model.blocks]
    assert not torch.equal(weights[0], before)
    assert all(weight is weights[0] for weight in weights)


def test_a_file_holds_shared_parameters_once(tmp_path: Path) -> None:
    model = net(8)
    after(ShareLayers(1), model)
    assert measure(model).dense_bytes == 4 * numbers(model)
    laconic.save(model, tmp_path / "shared.safetensors")
    again = laconic.load(tmp_path / "shared.safetensors", model=net(8))
    assert torch.equal(again(inputs()), model(inputs()))
    assert numbers(again) == numbers(model)


@pytest.mark.parametrize("source", [1, "mean"])
def test_what_is_laid_is_shared_too(source: int | str) -> None:
    model = net()
    mask = torch.arange(36).reshape(6, 6) % 2 == 0
    for place in range(4):
        lay(model, f"blocks.{place}.inner.weight", Ternary(), mask=mask)
    before = model.blocks[1].inner.weight.detach().clone()
    after(ShareLayers(source), model)
    layers = {name: layer for name, (layer, _) in laid_tensors(model).items()}
    assert len(layers) == 4 and len(set(layers.values())) == 1
    found = model.blocks[3].inner.weight.detach()
    assert not bool(found[~mask].any())
    assert len(found.unique()) == 3
    assert source == "mean" or torch.equal(found, before)
    assert all(torch.equal(block.inner.weight, found) for block in model.blocks)


def test_a_mean_keeps_what_any_block_has() -> None:
    model = net(2)
    rows = torch.arange(6)[:, None].expand(6, 6)
    lay(model, "blocks.0.inner.weight", Float(), mask=rows < 2)
    lay(model, "blocks.1.inner.weight", Float(), mask=rows > 3)
    after(ShareLayers("mean"), model)
    (layer,) = {layer for layer, _ in laid_tensors(model).values()}
    assert torch.equal(layer.mask, (rows < 2) | (rows > 3))


def test_what_is_laid_on_other_blocks_alone_is_gone() -> None:
    model = net()
    lay(model, "blocks.2.inner.weight", KMeans(2))
    after(ShareLayers(0), model)
    assert laid_tensors(model) == {}
    assert model.blocks[2].inner.weight is model.blocks[0].inner.weight


def test_blocks_that_differ_cannot_share() -> None:
    model = net()
    model.blocks[2].inner = nn.Linear(WIDTH, WIDTH, bias=False)
    with pytest.raises(ModelError, match=r"block 2 and block 0 differ in 'inner\.bias'"):
        ShareLayers().check(model, None)
    with pytest.raises(ModelError, match="there is no block 4; the 4 blocks are 0 to 3"):
        ShareLayers(4).check(net(), None)
