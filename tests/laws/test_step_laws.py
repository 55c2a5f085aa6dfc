"""Laws of every registered step; run as a script, this file writes docs/chaining.md."""

from __future__ import annotations

import copy
import functools
import itertools
import random
import re
from abc import ABC
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from annotated_types import Ge, Gt, Le, Lt, MinLen
from torch import Tensor, nn

from laconic import measure as measuring
from laconic.budget import Budget
from laconic.errors import ChainError, ModelError
from laconic.recipe import Recipe
from laconic.recover import (
    SGD,
    Cross,
    Gradient,
    Mixed,
    Parallel,
    ProximalWeights,
    Recalibrate,
    Reconstruct,
    Reset,
    Train,
)
from laconic.run import compress
from laconic.scope import Scope
from laconic.ship import load, save
from laconic.step import State, Step, Value, members, run_step
from laconic.structure import (
    SVD,
    ChannelGhosts,
    DataSVD,
    DropLayers,
    Factorize,
    Ghost,
    LayerDrop,
    MaximalGain,
    PlanSplit,
    Prune,
    Random,
    RandomGain,
    Rewire,
    ShareLayers,
    Split,
    Taylor,
    TensorTrain,
    Top,
)
from laconic.tasks import Task
from laconic.weights import (
    Activation,
    MixedPrecision,
    Percentile,
    Quantize,
    QuantNoise,
    Representation,
    Symmetric,
    Ternary,
)

PAGE = Path(__file__).parents[2] / "docs" / "chaining.md"


def ours(family: type[Value]) -> dict[str, Any]:
    """Return the members of a family but for those that other tests define."""
    found = members(family, every=True)
    return {name: kind for name, kind in found.items() if kind.__module__.startswith("laconic.")}


STEPS = ours(Step)

FEW = Gradient(3, batch=8)

# What a step's defaults do not show: for each, whether it draws random numbers.
EXAMPLES: dict[str, dict[Step, bool]] = {
    "drop_layers": {DropLayers(Top(1)): False},
    "factorize": {
        Factorize(SVD(), scope=Scope("last*")): False,
        Factorize(TensorTrain(1), scope=Scope("last*")): False,
        Factorize(DataSVD(1, batches=1, batch=8), scope=Scope("last*")): True,
    },
    "ghost": {Ghost(ChannelGhosts()): False},
    "layer_drop": {LayerDrop(0.5, retrain=Train(batch=8)): True},
    "mixed_precision": {MixedPrecision(batches=2, batch=8): False},
    "plan_split": {
        PlanSplit("size <= 0.2x", choose=RandomGain()): False,
        PlanSplit("size <= 1x", choose=MaximalGain(batches=1, batch=8)): False,
    },
    "prune": {
        Prune("weights", keep=0.5): False,
        Prune("weights", keep=0.3, ranking="global", by=Taylor(batches=1, batch=8)): True,
        Prune("weights", keep=0.5, by=Random()): True,
        Prune("weights", keep=0.4, rounds=2, retrain=Train(batch=8)): True,
        Prune("channels", keep=0.5): False,
        Prune("neurons", keep=0.5, by=Taylor(batches=1, batch=8), ranking="global"): True,
    },
    "quant_noise": {QuantNoise(0.5, proxy="zero", retrain=Train(batch=8)): True},
    "quantize": {
        Quantize(4): False,
        Quantize(Symmetric(4, rounding="stochastic")): True,
        Quantize(4, activation=8): False,
        Quantize(activation=Percentile(4)): True,
    },
    "recalibrate": {Recalibrate(2, batch=8): True},
    "reconstruct": {
        Reconstruct(solve=Gradient(3)): False,
        Reconstruct(solve=Gradient(6, penalty=ProximalWeights(0.5)), feed=Cross(0.5)): False,
        Reconstruct(parts="block", solve=FEW): True,
        Reconstruct(parts=2, feed=Mixed(), order=Parallel(2), solve=FEW): True,
    },
    "reset": {Reset(): True},
    "rewire": {Rewire("channels"): False},
    "share_layers": {ShareLayers("mean"): False},
    "split": {Split(): False},
    "train": {
        Train(batch=8, optimizer=SGD(0.1)): True,
        Train(batch=8, during=(Prune("weights", keep=0.5),)): True,
    },
}

# Modules that the step changes, where it is not the last layer.
PLACES = {
    "drop_layers": "blocks",
    "fold": "conv, norm",
    "ghost": "conv",
    "layer_drop": "blocks",
    "mixed_precision": "blocks",
    "recalibrate": "norm",
    "reconstruct": "blocks",
    "share_layers": "blocks",
    "unpack": "attention",
}

# Steps that want an attention of torch's, which others cannot round the inputs of.
ATTENDING = ("unpack",)

# What must have run before a step.
BEFORE: dict[str, tuple[Step, ...]] = {"split": (Quantize(Ternary()),)}


def examples() -> Iterator[tuple[Step, bool]]:
    """Yield every step worth testing, and whether it draws; a new one needs no entry."""
    for name, kind in STEPS.items():
        yield from EXAMPLES.get(name, {built(kind): False}).items()


# ------------------------------------------------------------------ values of every field


def built(kind: type[Value]) -> Any:
    """Return a value with its required fields filled."""
    if kind is Quantize:  # of three fields it wants one
        return Quantize(8, activation=8)
    required = {name: info for name, info in kind.model_fields.items() if info.is_required()}
    return kind(**{n: next(choices(i.annotation, i.metadata)) for n, i in required.items()})


def choices(annotation: Any, metadata: list[Any], depth: int = 2) -> Iterator[Any]:
    """Yield values worth trying of a field, from its type and bounds alone."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        bounds = [bound for item in more for bound in getattr(item, "metadata", [item])]
        yield from choices(inner, bounds, depth)
    elif get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_origin(annotation) is tuple:
        least = max((item.min_length for item in metadata if isinstance(item, MinLen)), default=0)
        some = list(itertools.islice(choices(get_args(annotation)[0], [], depth), 2))
        yield from (tuple(some[:count]) for count in range(least, len(some) + 1))
    elif get_args(annotation):
        for part in get_args(annotation):
            yield from choices(part, metadata, depth)
    elif annotation is type(None):
        yield None
    else:
        yield from plain_choices(annotation, metadata, depth)


def plain_choices(kind: type, metadata: list[Any], depth: int) -> Iterator[Any]:
    """Yield values of a class that is no union, literal or list."""
    if kind is Scope:
        yield Scope("kind:linear, !last")
    elif kind is Budget:
        yield from (Budget("size <= 0.5x"), Budget("size <= 1 KiB"))
    elif kind is bool:
        yield from (False, True)
    elif kind is int:
        yield from (value for value in (0, 1, 7) if within(value, metadata))
    elif kind is float:
        yield from (value for value in (0.25, 1.0, 3e-5, 2.5) if within(value, metadata))
    elif kind is str:
        patterns = [item.pattern for item in metadata if getattr(item, "pattern", None)]
        yield from (word for text in patterns for word in re.findall(r"\w+", text))
    elif ABC in kind.__bases__:
        if depth:
            for member in ours(kind).values():
                yield built(member)
                yield from varied(built(member), depth - 1)
    else:
        yield from varied(built(kind), depth - 1)


def within(value: float, metadata: list[Any]) -> bool:
    """Return whether a number is inside a field's bounds."""
    allowed: dict[type, Callable[[Any], bool]] = {
        Ge: lambda bound: value >= bound.ge,
        Gt: lambda bound: value > bound.gt,
        Le: lambda bound: value <= bound.le,
        Lt: lambda bound: value < bound.lt,
    }
    return all(allowed[type(item)](item) for item in metadata if type(item) in allowed)


def varied(value: Value, depth: int = 2) -> Iterator[Any]:
    """Yield the value with each of its fields changed on its own."""
    for name, info in type(value).model_fields.items():
        for choice in choices(info.annotation, info.metadata, depth):
            if choice != getattr(value, name):
                yield value.model_copy(update={name: choice})


VARIED = {name: list(dict.fromkeys(varied(built(kind)))) for name, kind in STEPS.items()}
each_step = pytest.mark.parametrize(
    ("step", "draws"), [pytest.param(*item, id=repr(item[0])) for item in examples()]
)


@pytest.mark.parametrize("name", STEPS)
def test_every_field_is_varied(name: str) -> None:
    """A field whose type the functions above do not know would escape the laws below."""
    start = built(STEPS[name])
    for field, info in STEPS[name].model_fields.items():
        changed = any(getattr(step, field) != getattr(start, field) for step in VARIED[name])
        single = get_origin(info.annotation) is Literal and len(get_args(info.annotation)) == 1
        assert changed or single, field


@pytest.mark.parametrize("name", STEPS)
def test_every_field_survives_yaml(name: str) -> None:
    for step in [built(STEPS[name]), *VARIED[name]]:
        text = Recipe([step]).to_yaml()
        (read,) = Recipe.parse(text).steps
        assert read == step, text
        assert type(read) is type(step)
        assert hash(read) == hash(step)


@pytest.mark.parametrize("name", STEPS)
def test_equal_fields_are_equal_and_hash_alike(name: str) -> None:
    steps = [built(STEPS[name]), *VARIED[name]]
    for step in steps:
        twin = type(step)(**dict(step))
        assert twin == step and twin is not step
        assert hash(twin) == hash(step)
    assert len(set(steps)) == len(steps), "steps that differ in one field are taken for equal"


@pytest.mark.parametrize("name", STEPS)
def test_a_step_prints_as_the_code_that_makes_it(name: str) -> None:
    from laconic.recipe import families

    known: dict[str, Any] = {"Budget": Budget, "Scope": Scope}
    queue = [*families()]
    while queue:
        kind = queue.pop()
        queue += kind.__subclasses__()
        known[kind.__name__] = kind
    known |= {kind.__name__: kind for kind in Value.__subclasses__()}
    for step in [built(STEPS[name]), *VARIED[name]]:
        assert eval(repr(step), known) == step


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_frozen(name: str) -> None:
    step = built(STEPS[name])
    with pytest.raises(Exception, match="frozen"):
        step.scope = Scope("0")


# ------------------------------------------------------------------ what a step does


class Block(nn.Module):
    """Something to drop or share: it adds to what enters it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 8), nn.Linear(8, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.outer(self.inner(hidden).relu())


class Tiny(nn.Module):
    """A BatchNorm, dropout, a scalar, a list of blocks and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: nn.Module | None = None
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm, self.relu = nn.BatchNorm2d(4), nn.PReLU()
        self.pool, self.drop = nn.AdaptiveAvgPool2d(2), nn.Dropout(0.1)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.middle, self.last = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.drop(self.pool(self.relu(self.norm(self.conv(images)))).flatten(1))
        for block in self.blocks:
            hidden = block(hidden)
        scores = self.last(self.middle(hidden))
        if self.attention is None:
            return scores
        words = images.flatten(1).unflatten(1, (9, 4))
        return scores + self.attention(words, words, words)[0].mean((1, 2))[:, None]


def tiny_network(step: Step | None = None, *, attends: bool = False) -> Tiny:
    """Return a network in which a step, of whatever kind, finds something to do."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Tiny()
        if attends or (step is not None and step.name in ATTENDING):
            network.attention = nn.MultiheadAttention(4, 2, batch_first=True)
    network.middle.bias.requires_grad_(False)
    for before in BEFORE.get(step.name, ()) if step is not None else ():
        run_step(before, State(network))
    return network.eval()


def another_network() -> nn.Module:
    """Return what there is to learn from: other numbers, so that it makes a difference."""
    network = tiny_network()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.25)
    return network.requires_grad_(False)


TEACHERS = (another_network(),)


@functools.cache
def tiny_task() -> Task:
    generator = torch.Generator().manual_seed(0)
    # More than a batch of 32: of all examples in one, no order would show in a range.
    labels = torch.arange(36) % 3
    images = torch.randn(36, 1, 6, 6, generator=generator) + labels[:, None, None, None]
    return Task((images, labels), (images[:9], labels[:9]), (images[:6], labels[:6]))


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
    before = bytes_of(state.model)
    run_step(step, state)
    assert bytes_of(state.model) != before
    run_step(step, state, key=1)
    assert all(bool(tensor.isfinite().all()) for tensor in state.model.state_dict().values())


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
    before = bytes_of(tiny_network(step))
    found = bytes_of(after(narrowed(step, Scope(", ".join(f"{place}*" for place in inside)))))
    for name, content in before.items():
        if not name.startswith(tuple(f"{place}." for place in inside)):
            assert found[name] == content, name
    assert found != before


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
    result = compress(model, tiny_task(), [*BEFORE.get(step.name, ()), step], device="cpu")
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


# ------------------------------------------------------------------ any step after any other


def kinds() -> dict[str, Step]:
    """Return what is chained with what: every kind of step, every representation."""
    known: dict[str, Step] = {
        "prune to a half": Prune("weights", keep=0.5),
        "prune to a quarter": Prune("weights", keep=0.25, by=Taylor(batches=1), ranking="global"),
        "prune in rounds": Prune("weights", keep=0.25, rounds=2, retrain=Train(batch=8)),
        "prune while training": Train(batch=8, during=(Prune("weights", keep=0.25),)),
        "train": Train(batch=8),
        "recalibrate": Recalibrate(2, batch=8),
        "reconstruct": Reconstruct(solve=Gradient(3)),
        "prune channels": Prune("channels", keep=0.5),
        "prune neurons": Prune("neurons", keep=0.5),
        "drop_layers": DropLayers(Top(1)),
        "factorize": Factorize(SVD(), scope=Scope("kind:linear")),
        "layer_drop": LayerDrop(0.5, retrain=Train(batch=8)),
        "quant_noise": QuantNoise(0.5, proxy="zero", retrain=Train(batch=8)),
        "ghost": Ghost(ChannelGhosts()),
        "rewire": Rewire("channels"),
        "plan_split": PlanSplit("size <= 0.4x", choose=RandomGain()),
    }
    names = {step.name for step in known.values()} | {"quantize"}
    known |= {name: built(kind) for name, kind in STEPS.items() if name not in names}
    for name, kind in ours(Representation).items():
        known[f"quantize: {name}"] = Quantize(built(kind))
    for name, kind in ours(Activation).items():
        known[f"round: {name}"] = Quantize(activation=kind(bits=4))
    return known


KINDS = kinds()
# Of representations and activations, every one is chained with these and with all else.
REPRESENTATIVES = {"quantize: symmetric", "round: min_max"}
PAIRS = [
    (first, then)
    for first, then in itertools.product(KINDS, repeat=2)
    if not (":" in first and ":" in then) or first == then or REPRESENTATIVES & {first, then}
]


def attending(first: str, then: str) -> bool:
    return any(KINDS[name].name in ATTENDING for name in (first, then))


def refused(first: str, then: str) -> str:
    """Return why a recipe of the two is refused before any work; empty: it is not."""
    before = BEFORE.get(KINDS[first].name, ())
    network = tiny_network(attends=attending(first, then))
    try:
        Recipe([*before, KINDS[first], KINDS[then]]).check(network, tiny_task())
    except ChainError as error:
        return str(error)
    except ModelError as error:
        if "put the step 'unpack' before" in str(error):
            return str(error)
        raise
    return ""


def zeros(model: nn.Module) -> dict[str, Tensor]:
    """Return which weights are zero, of the layers that still are the original's."""
    layers = {name: getattr(model, name) for name in ("conv", "middle", "last")}
    return {
        name: layer.weight == 0
        for name, layer in layers.items()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    }


@functools.cache
def run_first(first: str, *, attends: bool) -> State:
    state = State(tiny_network(KINDS[first], attends=attends), tiny_task(), TEACHERS, seed=3)
    run_step(KINDS[first], state)
    return state


@pytest.mark.parametrize(("first", "then"), PAIRS, ids=[f"{a} + {b}" for a, b in PAIRS])
def test_any_step_runs_after_any_other_or_is_refused_at_once(
    first: str, then: str, tmp_path: Path
) -> None:
    if refused(first, then):
        return
    attends = attending(first, then)
    model = copy.deepcopy(run_first(first, attends=attends).model)
    state = State(model, tiny_task(), TEACHERS, seed=3)
    before = zeros(state.model)
    run_step(KINDS[then], state, key=1)
    if first.startswith("prune"):
        for name, gone in zeros(state.model).items():
            if name not in before or gone.shape != before[name].shape:
                continue
            if then == "rewire":  # it moves them about
                assert int(gone.sum()) == int(before[name].sum())
            else:
                assert not bool((before[name] & ~gone).any()), "a pruned weight came back"
    inputs = torch.linspace(-1, 1, 72).reshape(2, 1, 6, 6)
    with torch.no_grad():
        outputs = state.model.eval()(inputs)
        save(state.model, tmp_path / "model.safetensors")
        network = tiny_network(attends=attends)
        loaded = load(tmp_path / "model.safetensors", model=network)
        assert bool(outputs.isfinite().all())
        assert torch.equal(loaded.eval()(inputs), outputs), "the file is not what was trained"


INTRODUCTION = """# Chaining

<!-- Written by `python tests/laws/test_step_laws.py`, and checked by the same file as a test. -->

Any step may follow any other. The few orders that cannot work are refused before anything is
trained, with the reason. The table is a test: every pair is run on a small network, what was pruned
must stay pruned, and the file that is saved must compute the same as the network, bit for bit.
A first `split` stands for `quantize: ternary` and the split.

A row is the first step, a column the one after it; *yes* means that it runs.
"""


def page() -> str:
    """Return docs/chaining.md; every representation is one row, where they all fare alike."""
    groups: dict[str, list[str]] = {}
    for name in KINDS:
        groups.setdefault(name.partition(":")[0], []).append(name)
    reasons: list[str] = []
    lines = [["first, then", *groups], ["---"] * (len(groups) + 1)]
    for first, firsts in groups.items():
        lines.append([first, *(cell(firsts, thens, reasons) for thens in groups.values())])
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    notes = "\n".join(f"{number}. `{reason}`" for number, reason in enumerate(reasons, 1))
    steps = "\n".join(f"- {name}: `{step!r}`" for name, step in KINDS.items())
    parts = [INTRODUCTION, table, "Refused:", notes, "The steps:", steps]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def cell(firsts: list[str], thens: list[str], reasons: list[str]) -> str:
    """Return one cell of the table; a new reason joins the list."""
    found = {refused(first, then) for first in firsts for then in thens}
    reasons += sorted(found - {"", *reasons})
    numbers = ", ".join(str(reasons.index(reason) + 1) for reason in sorted(found - {""}))
    if not numbers:
        return "yes"
    return f"some refused ({numbers})" if "" in found else f"refused ({numbers})"


def test_the_table_in_the_docs_is_true() -> None:
    stale = "docs/chaining.md is stale: run python tests/laws/test_step_laws.py"
    assert PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page(), stale


def test_every_registered_step_is_tested() -> None:
    assert {step.name for step in KINDS.values()} == set(STEPS)
    assert {step.name for step, _ in examples()} == set(STEPS)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
