"""Laws of every registered step as a value: YAML, equality, hash, printing, frozen."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

import pytest

from helpers.step_values import STEPS, built, varied
from laconic.budget import Budget
from laconic.recipe import Recipe
from laconic.scope import Scope
from laconic.step import Value

VARIED = {name: list(dict.fromkeys(varied(built(kind)))) for name, kind in STEPS.items()}


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
