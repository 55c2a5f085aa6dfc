"""Value, registry, seeds and run_step: what every step of a recipe stands on."""

import threading
from abc import ABC
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar

import pytest
import torch
from pydantic import Field
from pydantic_core import core_schema
from torch import nn

from laconic.errors import LaconicError, ModelError, RecipeError, RunError
from laconic.step import State, Step, Value, derive, members, run_step, snake


class Shape(Value, ABC):
    """A family that only these tests know."""


class Circle(Shape):
    """One field, positional."""

    positional: ClassVar[tuple[str, ...]] = ("radius",)

    radius: Annotated[float, Field(gt=0)] = 1.0


class RightTriangle(Shape):
    """A required field, and one that holds the family."""

    positional: ClassVar[tuple[str, ...]] = ("base",)

    base: float
    inner: Shape = Circle()
    colour: str = "red"


class Pin(Value):
    """No family: a plain record."""

    size: Annotated[int, Field(ge=1)] = 1


class Board(Value):
    """A record that holds a record."""

    pin: Pin = Pin()


def hidden(step: type[Step]) -> type[Step]:
    """Take a step out of the registry: other tests walk over it."""
    for family in Value._registry.values():
        family.pop(step.name, None)
    return step


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("Prune", "prune"),
        ("FixedPoint", "fixed_point"),
        ("DynamicFixedPoint", "dynamic_fixed_point"),
        ("SGD", "sgd"),
        ("AdamW", "adamw"),
        ("KMeans", "kmeans"),
        ("L1", "l1"),
    ],
)
def test_a_class_is_written_in_snake_case(name: str, written: str) -> None:
    assert snake(name) == written


def test_a_value_is_frozen_hashable_and_equal_by_its_fields() -> None:
    assert Circle(2.0) == Circle(radius=2.0)
    assert hash(Circle(2.0)) == hash(Circle(radius=2.0))
    assert Circle(2.0) != Circle(3.0)
    with pytest.raises(Exception, match="frozen"):
        Circle().radius = 3.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        (Circle(), "Circle()"),
        (Circle(2.0), "Circle(2.0)"),
        (RightTriangle(3.0), "RightTriangle(3.0)"),
        (RightTriangle(3.0, inner=Circle(2.0)), "RightTriangle(3.0, inner=Circle(2.0))"),
        (RightTriangle(3.0, colour="blue"), "RightTriangle(3.0, colour='blue')"),
    ],
)
def test_a_value_prints_as_the_code_that_makes_it(value: Value, printed: str) -> None:
    assert repr(value) == printed
    kinds = {"Circle": Circle, "RightTriangle": RightTriangle}
    assert eval(printed, kinds) == value


def test_members_are_found_by_the_name_a_recipe_uses() -> None:
    assert members(Shape) == {"circle": Circle, "right_triangle": RightTriangle}
    assert "shape" not in members(Shape)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("circle", Circle()),
        ({"circle": {}}, Circle()),
        ({"circle": None}, Circle()),
        ({"circle": {"radius": 2}}, Circle(2.0)),
        ({"circle": 2}, Circle(2.0)),
        ({"circle": "2e-5"}, Circle(2e-5)),
        (
            {"right_triangle": {"base": 1, "inner": {"circle": 3}}},
            RightTriangle(1, inner=Circle(3)),
        ),
        (Circle(4.0), Circle(4.0)),
    ],
)
def test_coerce_reads_what_a_recipe_writes(written: Any, value: Value) -> None:
    assert Shape.coerce(written) == value


@pytest.mark.parametrize("value", [Circle(), Circle(2.0), RightTriangle(1.0, inner=Circle(5.0))])
def test_what_is_written_is_read_again(value: Value) -> None:
    assert Shape.coerce(value.to_data()) == value


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("circel", "no shape is called 'circel'; did you mean 'circle'?"),
        (3, "a shape is written as its name or as one key 'name: fields', got 3"),
        ({"circle": 1, "square": 2}, "one key 'name: fields'"),
        ({"circle": {"radius": 0}}, "greater than 0"),
        ({"circle": {"raduis": 1}}, "'raduis' is not a field; did you mean 'radius'?"),
        ({"right_triangle": {}}, "'base' is required"),
        ({"right_triangle": {"base": 1, "inner": {"circle": {"radius": "x"}}}}, "valid number"),
        ({"right_triangle": {"base": 1, 3: 4}}, "'3' is not a field"),
        ({"right_triangle": {"base": 1, "self": 4}}, "'self' is not a field"),
    ],
)
def test_coerce_says_what_is_wrong_and_what_is_nearest(written: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"(?i)shape") as caught:
        Shape.coerce(written)
    assert message in str(caught.value)


def test_a_wrong_field_is_a_recipe_error_with_its_path() -> None:
    with pytest.raises(RecipeError, match=r"right_triangle: inner\.circle\.radius") as caught:
        RightTriangle(1.0, inner={"circle": {"radius": -1}})
    (problem,) = caught.value.problems
    assert problem.path == ("inner", "circle", "radius")
    assert problem.message.endswith("got -1")


def test_a_record_inside_a_record_keeps_the_path_and_says_its_name_once() -> None:
    with pytest.raises(RecipeError) as caught:
        Board(pin={"size": 0})
    (problem,) = caught.value.problems
    assert problem.path == ("pin", "size")
    assert str(caught.value) == f"board: pin.size: {problem.message}"


def test_too_many_positional_arguments_are_refused_by_name() -> None:
    with pytest.raises(
        RecipeError, match=r"Circle takes at most 1 positional arguments \(radius\), got 2"
    ):
        Circle(1.0, 2.0)


@pytest.mark.parametrize("made", [lambda: Circle(True), lambda: Circle(radius=False)])
def test_truth_is_no_number(made: Callable[[], Value]) -> None:
    with pytest.raises(RecipeError, match=r"circle: radius: input should be a number, got (T|F)"):
        made()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_refused(number: float) -> None:
    with pytest.raises(RecipeError, match="finite"):
        Circle(number)


def test_a_class_is_registered_only_once_its_fields_are_built() -> None:
    """A second thread that looked the class up earlier would find half of it."""
    found: list[bool] = []

    class Probe:
        @classmethod
        def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
            found.append("late" in members(Shape))
            return core_schema.any_schema()

    class Late(Shape):
        probe: Probe = None  # type: ignore[assignment]

    assert found
    assert not any(found)
    assert members(Shape)["late"] is Late


def test_every_family_of_laconic_reads_back_what_its_members_write() -> None:
    from laconic.recipe import families
    from laconic.weights import Quantize

    checked = 0
    for family in families():
        if family.__module__.startswith("laconic."):
            for member in members(family, every=True).values():
                needed = any(field.is_required() for field in member.model_fields.values())
                if not needed and member is not Quantize:  # of three fields it needs one
                    assert family.coerce(member().to_data()) == member()
                    checked += 1
    assert checked > 20


def test_derived_seeds_depend_on_the_seed_and_every_key_alone() -> None:
    assert derive(1, "prune", 0) == derive(1, "prune", 0)
    seeds = {
        derive(1),
        derive(2),
        derive(1, "prune"),
        derive(1, "prune", 0),
        derive(1, "prune", "0"),
    }
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_derived_seeds_never_change() -> None:
    """They decide what every recipe draws: a run must give the same network next year."""
    assert derive(0) == 3582888934675442504
    assert derive(0, "prune", 1) == 7291705150970445765


@pytest.fixture
def untouched_generator() -> Iterator[None]:
    """Fail a test after which torch's global generator stands elsewhere than before."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(torch.random.get_rng_state(), before)


@hidden
class Draw(Step):
    """Adds random numbers, from all generators a step may use, to a weight."""

    def apply(self, state: State) -> None:
        with torch.no_grad():
            own = torch.rand(4, generator=state.generator("own"))
            state.model.weight += own + torch.rand(4)  # type: ignore[operator]


@hidden
class Fail(Step):
    """Fails as it is told."""

    error: str

    def apply(self, state: State) -> None:
        torch.rand(1)
        raise {"own": ModelError("no weights"), "other": KeyError("lost")}[self.error]


def network() -> nn.Module:
    model = nn.utils.skip_init(nn.Linear, 4, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


def drawn(seed: int, key: object = 0) -> torch.Tensor:
    state = State(network(), seed=seed)
    run_step(Draw(), state, key=key)
    weight: torch.Tensor = state.model.weight.detach()
    return weight


@pytest.mark.usefixtures("untouched_generator")
def test_a_steps_draws_depend_on_seed_name_and_key_alone() -> None:
    first = drawn(1)
    assert torch.equal(first, drawn(1))
    assert not torch.equal(first, drawn(2))
    assert not torch.equal(first, drawn(1, key=1))


def test_the_global_generator_does_not_matter_and_is_left_alone() -> None:
    torch.manual_seed(5)
    first, after = drawn(1), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)
    torch.rand(100)
    assert torch.equal(drawn(1), first)


@pytest.mark.usefixtures("untouched_generator")
@pytest.mark.parametrize("error", ["own", "other"])
def test_a_step_that_fails_leaves_seed_and_generator_alone(error: str) -> None:
    state = State(network(), seed=7)
    with pytest.raises(LaconicError):
        run_step(Fail(error=error), state)
    assert state.seed == 7


def test_our_own_error_passes_and_any_other_becomes_a_run_error_with_its_cause() -> None:
    with pytest.raises(ModelError, match="no weights"):
        run_step(Fail(error="own"), State(network()))
    with pytest.raises(RunError, match="fail: KeyError: 'lost'") as caught:
        run_step(Fail(error="other"), State(network()))
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_interrupt_passes() -> None:
    @hidden
    class Interrupted(Step):
        def apply(self, state: State) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_step(Interrupted(), State(network()))


def test_a_state_generator_depends_on_seed_and_keys() -> None:
    state = State(network(), seed=3)
    assert torch.equal(
        torch.rand(3, generator=state.generator("a")), torch.rand(3, generator=state.generator("a"))
    )
    assert state.generator("a").initial_seed() != state.generator("b").initial_seed()
    assert state.generator("a").initial_seed() != State(network()).generator("a").initial_seed()


def test_rounds_count_and_note_where_they_stand() -> None:
    state = State(network())
    seen = [
        (outer, inner, list(state.position))
        for outer in state.rounds(2)
        for inner in state.rounds(2)
    ]
    assert seen == [(o, i, [o, i]) for o in range(2) for i in range(2)]
    assert state.position == []


def test_rounds_go_on_where_a_run_stopped_outermost_first() -> None:
    state = State(network(), saved=[1, 1])
    seen = [(outer, inner) for outer in state.rounds(3) for inner in state.rounds(2)]
    assert seen == [(1, 1), (2, 0), (2, 1)]
    assert state.saved == []


def test_a_step_refuses_a_scope_that_selects_nothing() -> None:
    with pytest.raises(LaconicError, match="'nowhere' selects no module"):
        Draw(scope="nowhere").check(network(), None)


def test_reading_steps_from_many_threads_gives_equal_values() -> None:
    results: list[Value] = []
    threads = [
        threading.Thread(target=lambda: results.append(Shape.coerce({"circle": 2})))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [Circle(2.0)] * 4
