"""Laws of every registered objective: zero at the teacher, linear weights, true gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from torch import Tensor, nn

from helpers.step_values import ours
from laconic.models.capture import Features
from laconic.recipe import Recipe
from laconic.recover import (
    AttentionTransfer,
    Chosen,
    Hidden,
    Hint,
    Label,
    LayerMap,
    Logits,
    Objective,
    Patience,
    Sum,
    Taught,
    Train,
)
from laconic.step import Value
from laconic.tasks import Batch, Task

BATCH, TOKENS, WIDTH, HEADS, CLASSES = 3, 5, 6, 2, 4
LAYERS = {"student": 2, "teacher": 4}
ZERO = 1e-12  # of float64 values around one

# What the defaults do not show, or what a required field needs.
EXAMPLES: dict[str, list[Objective]] = {
    "attention_transfer": [
        AttentionTransfer(("output:a", "output:b"), weight=1000.0),
        AttentionTransfer(("output:a",), of=("output:c",), power=3),
    ],
    "hidden": [Hidden(embeddings=False), Hidden(Chosen((0, 3)), teacher=1)],
    "hint": [Hint("output:a"), Hint("hidden.1", of="hidden.2", loss="l1")],
    "logits": [
        Logits(4.0, weight=0.3, teacher=1),
        Logits(2.0, loss="cross_entropy", reduction="elements"),
    ],
    "sum": [Label(weight=0.5) + Logits(4.0, weight=0.5) + Hidden(), Sum((Label(),), weight=2.0)],
}


def variants(kind: type[Value]) -> Iterator[Any]:
    """Yield an objective as its defaults are, with each choice of a word, and the examples."""
    required = any(info.is_required() for info in kind.model_fields.values())
    examples = EXAMPLES.get(kind.name, [])
    assert examples or not required, f"{kind.name} needs an entry in EXAMPLES"
    plain = examples[0] if required else kind()
    yield from dict.fromkeys([plain, *examples])
    for name, info in kind.model_fields.items():
        words = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
        for word in words:
            if word != getattr(plain, name):
                yield plain.model_copy(update={name: word})


OBJECTIVES = [item for kind in ours(Objective).values() for item in variants(kind)]
TAUGHT = [item for item in OBJECTIVES if isinstance(item, Taught)]
each = pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
each_taught = pytest.mark.parametrize("objective", TAUGHT, ids=repr)


def shape(name: str) -> tuple[int, ...]:
    kind = name.partition(".")[0].partition(":")[0]
    return {
        "logits": (BATCH, CLASSES),
        "hidden": (BATCH, TOKENS, WIDTH),
        "attention": (BATCH, HEADS, TOKENS, TOKENS),
        "query": (BATCH, HEADS, TOKENS, WIDTH // HEADS),
        "key": (BATCH, HEADS, TOKENS, WIDTH // HEADS),
        "value": (BATCH, HEADS, TOKENS, WIDTH // HEADS),
        "output": (BATCH, WIDTH, 3, 4),
        "input": (BATCH, WIDTH, 3, 4),
    }[kind]


def drawn(names: set[str], layers: int, *, seed: int) -> Features:
    """Return features of these names in float64."""
    generator = torch.Generator().manual_seed(seed)
    draws = {
        name: torch.randn(shape(name), generator=generator, dtype=torch.float64)
        for name in sorted(names | {"logits"})
    }
    return Features(draws, layers=layers)


def pair(objective: Objective) -> tuple[Features, list[Features]]:
    """Return features of the student and of its teachers, all that the objective reads."""
    wants = objective.wants(LAYERS["student"], [LAYERS["teacher"]] * 2)
    student = drawn(wants.student, LAYERS["student"], seed=0)
    teachers = [
        drawn(wants.teachers.get(index, set()), LAYERS["teacher"], seed=index + 1)
        for index in range(2)
    ]
    return student, teachers


def twins(objective: Taught) -> tuple[Features, Features]:
    """Return features of a student that is its teacher: paired ones are equal."""
    layers = LAYERS["teacher"]
    pairs = objective.pairs(layers, layers) if not has_chosen(objective) else ()
    student = drawn({name for names in pairs for name in names}, layers, seed=0)
    return student, copy.deepcopy(student)


def has_chosen(objective: Taught) -> bool:
    return any(isinstance(value, Chosen) for _, value in objective)


def data() -> tuple[Batch, Task]:
    targets = torch.arange(BATCH) % CLASSES
    inputs = torch.zeros(BATCH, 1)
    return Batch((inputs,), targets), Task((inputs, targets), (inputs, targets), (inputs, targets))


def value(objective: Objective, student: Features, teachers: list[Features]) -> Tensor:
    batch, task = data()
    learned = objective.build(student, teachers, torch.Generator().manual_seed(0))
    learned = None if learned is None else learned.double()
    return objective(student, teachers, batch, task=task, learned=learned, progress=1.0)


SAME_NAMES = [o for o in TAUGHT if not has_chosen(o) and getattr(o, "of", None) in (None, ())]


@pytest.mark.parametrize("objective", SAME_NAMES, ids=repr)
def test_it_is_zero_with_zero_gradient_where_student_is_teacher(objective: Taught) -> None:
    student, teacher = twins(objective)
    for tensor in student.values():
        tensor.requires_grad_(True)
    found = value(objective, student, [teacher, teacher])
    expected = 0.0
    if getattr(objective, "loss", "") == "cross_entropy":
        temperature = objective.temperature
        entropy = torch.distributions.Categorical(logits=teacher["logits"] / temperature).entropy()
        size = CLASSES if objective.reduction == "elements" else 1
        expected = objective.weight * float(entropy.mean()) / size
    if objective.peers:  # their own labels
        batch, task = data()
        expected = objective.weight * float(task.loss(teacher["logits"], batch))
    assert float(found.detach()) == pytest.approx(expected, abs=ZERO * objective.weight)
    found.backward()
    for name, tensor in student.items():
        if tensor.grad is not None:
            largest = float(tensor.grad.abs().max())
            assert largest == pytest.approx(0, abs=ZERO * objective.weight), name


@each
def test_the_weight_scales_linearly(objective: Objective) -> None:
    student, teachers = pair(objective)
    once = value(objective, student, teachers)
    assert float(once) > 0
    for scaled in (3 * objective, objective * 3):
        assert type(scaled) is type(objective)
        assert float(value(scaled, student, teachers)) == pytest.approx(3 * float(once))
    total = value(objective + Label(weight=2.0), student, teachers)
    label = value(Label(weight=2.0), student, teachers)
    assert float(total) == pytest.approx(float(once) + float(label))


# A network that learns with its student stands still for the student's gradient.
FIXED = [item for item in OBJECTIVES if not item.peers]


@pytest.mark.parametrize("objective", FIXED, ids=repr)
def test_the_gradient_is_that_of_finite_differences(objective: Objective) -> None:
    student, teachers = pair(objective)
    names = sorted(student)

    def function(*tensors: Tensor) -> Tensor:
        own = Features(dict(zip(names, tensors, strict=True)), layers=student.layers)
        return value(1 / objective.weight * objective, own, teachers)

    tensors = [student[name].requires_grad_(True) for name in names]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@each
def test_it_survives_yaml_and_prints_as_the_code_that_makes_it(objective: Objective) -> None:
    recipe = Recipe([Train(objective)])
    (read,) = Recipe.parse(recipe.to_yaml()).steps
    assert read == recipe.steps[0] and hash(read) == hash(recipe.steps[0])
    known = {kind.__name__: kind for kind in (*ours(Objective).values(), *ours(LayerMap).values())}
    assert eval(repr(objective), dict(known)) == objective


@each
def test_a_batch_twice_is_worth_the_same(objective: Objective) -> None:
    """A mean over the batch, whatever is summed inside."""
    student, teachers = pair(objective)
    batch, task = data()
    double = [Features({n: torch.cat([t, t]) for n, t in f.items()}) for f in (student, *teachers)]
    for features, single in zip(double, (student, *teachers), strict=True):
        features.layers = single.layers
    targets = torch.cat([batch.targets, batch.targets])
    twice = objective(double[0], double[1:], Batch((), targets), task=task)
    once = objective(student, teachers, batch, task=task)
    assert float(twice) == pytest.approx(float(once))


@each_taught
def test_padding_does_not_count(objective: Taught) -> None:
    """What stands at padded tokens changes nothing, and neither does more padding."""
    student, teachers = pair(objective)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    mask[0, 3:] = mask[2, 4:] = False
    student["mask"] = mask
    for features in teachers:
        features["mask"] = mask
    before = value(objective, student, teachers)
    for features in (student, *teachers):
        for name in [n for n in features if n.startswith(("hidden", "attention", "value"))]:
            features[name] = disturbed(name, features[name], mask)
    assert float(value(objective, student, teachers)) == pytest.approx(float(before))


def disturbed(name: str, tensor: Tensor, mask: Tensor) -> Tensor:
    """Return a feature with other numbers wherever a padded token is concerned."""
    real = mask[:, :, None]
    if name.startswith("attention"):
        real = (mask[:, :, None] & mask[:, None, :])[:, None]
    elif name.startswith("value"):
        real = mask[:, None, :, None]
    return torch.where(real, tensor, 100.0)


@each
def test_what_is_learned_is_drawn_from_the_generator_alone(objective: Objective) -> None:
    student, teachers = pair(objective)
    wide = [
        Features({n: torch.cat([t, t], dim=channels(n)) for n, t in f.items()}, layers=f.layers)
        for f in teachers
    ]
    before = torch.random.get_rng_state()
    built = [objective.build(student, wide, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), before)
    if built[0] is None:
        return
    states: list[dict[str, Tensor]] = [b.state_dict() for b in built if isinstance(b, nn.Module)]
    assert states[0] and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any(torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert objective.build(student, teachers, torch.Generator()) is None


def channels(name: str) -> int:
    return 1 if name.startswith(("output", "input")) else -1


@each
def test_it_names_the_teachers_that_it_reads(objective: Objective) -> None:
    wants = objective.wants(LAYERS["student"], [LAYERS["teacher"]] * 2)
    assert set(wants.teachers) == objective.teachers
    parts = objective.terms if isinstance(objective, Sum) else (objective,)
    assert objective.teachers == {i for part in parts for i in part.teachers}


def test_the_laws_see_every_objective() -> None:
    assert {item.name for item in OBJECTIVES} == set(ours(Objective))
    assert {item.name for item in TAUGHT} == set(ours(Taught))
    assert Patience() in TAUGHT
