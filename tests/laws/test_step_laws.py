"""Laws of any step after any other; run as a script, this file writes docs/chaining.md."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from laconic.errors import ChainError, ModelError
from laconic.recipe import Recipe
from laconic.recover import Gradient, Recalibrate, Reconstruct, Train
from laconic.scope import Scope
from laconic.ship import load, save
from laconic.step import State, Step, run_step
from laconic.structure import (
    SVD,
    ChannelGhosts,
    DropLayers,
    Factorize,
    Ghost,
    LayerDrop,
    PlanSplit,
    Prune,
    RandomGain,
    Rewire,
    Taylor,
    Top,
)
from laconic.weights import Activation, Quantize, QuantNoise, Representation

if __name__ == "__main__":  # pytest finds tests/helpers by itself
    sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.step_values import STEPS, built, ours
from helpers.steps import ATTENDING, BEFORE, TEACHERS, examples, tiny_network, tiny_task

PAGE = Path(__file__).parents[2] / "docs" / "chaining.md"


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

A row is the first step, a column the one after it; *yes* means that it runs. A reason begins with
the step that is refused, the first of the two or the second; where it is said of several
representations, *(...)* stands for each.
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
    found = {_alike(refused(first, then)) for first in firsts for then in thens}
    reasons += sorted(found - {"", *reasons})
    numbers = ", ".join(str(reasons.index(reason) + 1) for reason in sorted(found - {""}))
    if not numbers:
        return "yes"
    return f"some refused ({numbers})" if "" in found else f"refused ({numbers})"


def _alike(reason: str) -> str:
    """Return a reason without the place in the recipe, and which representation it names."""
    placeless = re.sub(r"^steps\.\d+ \((\w+)\)", r"\1", reason)
    return re.sub(r"quantize \(\w+\)", "quantize (...)", placeless)


def test_the_table_in_the_docs_is_true() -> None:
    stale = "docs/chaining.md is stale: run python tests/laws/test_step_laws.py"
    assert PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page(), stale


def test_every_registered_step_is_tested() -> None:
    assert {step.name for step in KINDS.values()} == set(STEPS)
    assert {step.name for step, _ in examples()} == set(STEPS)


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # a pair of its own says what is quantised twice
    PAGE.write_text(page(), encoding="utf-8")
