"""Teachers of a whole run: which one teaches, resuming with it or a peer, what the log says."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from helpers.teacher import HIDDEN, network, short, task, teacher
from helpers.tensors import same
from laconic import compress, rundir
from laconic.errors import RunError
from laconic.recipe import Recipe
from laconic.recover import Hidden, Label, Logits, Mutual, Objective, Stop
from laconic.recover.lesson import Teachers
from laconic.ship.checkpoint import model_hash
from laconic.step import State, Step, Value
from laconic.structure import Prune
from laconic.weights import Ternary, lay
from laconic.weights.laid import laid_tensors


def recipe(objective: Objective | None = None, **fields: Any) -> Recipe:
    train = short(objective or 0.5 * Label() + 0.5 * Logits(4.0))
    return Recipe([Prune("weights", keep=0.5), train], precision="float32", **fields)


def test_the_original_teaches_unless_another_is_given() -> None:
    plain = compress(network(), task(), recipe())
    itself = compress(network(), task(), recipe(), teacher=network())
    other = compress(network(), task(), recipe(), teacher=network(seed=5))
    assert same(plain.model, itself.model) and not same(plain.model, other.model)
    pair = (network(seed=5), teacher())
    second = compress(network(), task(), recipe(Logits() + Hidden(teacher=1)), teacher=pair)
    assert same(pair[0], network(seed=5)) and same(pair[1], teacher())
    assert pair[0].training and all(p.requires_grad for p in pair[1].parameters())
    assert set(second.model.state_dict()) == set(plain.model.state_dict())


def test_a_copy_is_made_when_it_is_asked_for_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    take = Teachers.__getitem__
    monkeypatch.setattr(
        Teachers, "__getitem__", lambda self, index: asked.append(index) or take(self, index)
    )
    compress(network(), task(), recipe(Label()))
    assert asked == []
    compress(network(), task(), recipe())
    assert set(asked) == {0}
    original = network()
    lay(original, "first.weight", Ternary())
    teachers = Teachers((original,), "cpu")
    assert len(teachers) == 1 and teachers[0] is teachers[0] is teachers[-1]
    assert laid_tensors(teachers[0]) == {} and laid_tensors(original)
    assert not teachers[0].training and not any(p.requires_grad for p in teachers[0].parameters())
    assert list(teachers) == [teachers[0]]


def test_a_teacher_that_the_recipe_names_is_not_forgotten() -> None:
    named = recipe(HIDDEN).model_copy(update={"teacher": ("resnet20",)})
    with pytest.raises(RunError, match="names a teacher, which only the command line loads"):
        compress(network(), task(), named)
    assert compress(network(), task(), named, teacher=teacher()).history


def test_an_index_without_a_teacher_is_refused_before_any_work() -> None:
    class Boom(Step):
        def apply(self, state: State) -> None:
            raise AssertionError

    Value._registry[Step].pop("boom")
    retrain = Prune("weights", keep=0.5, retrain=short(Label() + Logits(teacher=1)))
    with pytest.raises(RunError, match=r"steps.1 \(prune\): an objective learns from teacher 1"):
        compress(network(), task(), [Boom(), retrain])


class Stopped(BaseException):
    """What a test kills a run with, once it has written."""


def stopped(
    out: Path, patch: pytest.MonkeyPatch, made: Recipe | None = None, **options: Any
) -> None:
    write = rundir.Keeper.write

    def write_and_die(self: Any, state: Any, training: dict[str, Any]) -> None:
        write(self, state, training)
        if training:
            raise Stopped

    patch.setattr(rundir.Keeper, "write", write_and_die)
    steps = made or recipe(HIDDEN)
    with pytest.raises(Stopped):
        compress(network(), task(), steps, out=out, checkpoint_seconds=0, **options)
    patch.undo()


def test_a_run_goes_on_with_its_teacher_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compress(network(), task(), recipe(HIDDEN), teacher=teacher(), out=tmp_path / "whole")
    facts = json.loads((tmp_path / "whole" / rundir.RUN).read_text())
    assert facts["teacher"] == [model_hash(teacher())]
    out = tmp_path / "run"
    stopped(out, monkeypatch, teacher=teacher())
    for other in (None, teacher(seed=9), (teacher(), teacher())):
        with pytest.raises(RunError, match="was run with another teacher; resume with that one"):
            compress(network(), task(), recipe(HIDDEN), teacher=other, out=out, resume=True)
    resumed = compress(network(), task(), recipe(HIDDEN), teacher=teacher(), out=out, resume=True)
    assert same(resumed.model, whole.model)
    files = [(folder / rundir.ARTIFACT).read_bytes() for folder in (out, tmp_path / "whole")]
    assert files[0] == files[1]


def test_a_run_goes_on_with_its_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = recipe(Label() + Mutual())
    compress(network(), task(), both, teacher=teacher(), out=tmp_path / "whole")
    stopped(tmp_path / "cut", monkeypatch, made=both, teacher=teacher())
    compress(network(), task(), both, teacher=teacher(), out=tmp_path / "cut", resume=True)
    whole, cut = (tmp_path / name / rundir.ARTIFACT for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


def test_epochs_are_told_to_those_who_debug(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="laconic"):
        prune = Prune("weights", keep=0.5)
        compress(network(), task(), [prune, short(Label(), stop=Stop())])
    lines = {
        level: [r for r in caplog.records if r.levelname == level] for level in ("INFO", "DEBUG")
    }
    assert [r.getMessage().partition(":")[0] for r in lines["INFO"]] == [
        "original",
        "prune",
        "train",
    ]
    assert sum("epoch" in r.getMessage() for r in lines["DEBUG"]) == 2
