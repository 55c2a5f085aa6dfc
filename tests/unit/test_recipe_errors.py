"""Recipe: errors that say file, line, step and the right name, before any step runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.recipes import LONG, refused
from laconic.errors import BudgetError, ChainError, LaconicError, RecipeError, ScopeError, TaskError
from laconic.models import digits_cnn
from laconic.recipe import Recipe
from laconic.recover import Train
from laconic.run import compress
from laconic.structure import Prune
from laconic.tasks import Task
from laconic.weights import Quantize


def edited(old: str, new: str) -> str:
    assert old in LONG
    return LONG.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new", "start", "end"),
    [
        ("- train\n", "- trian\n", "a.yaml:17: steps.2: ", "'trian'; did you mean 'train'?"),
        ("- prune:", "- prun:", "a.yaml:6: steps.0: ", "'prun'; did you mean 'prune'?"),
        (
            "keep:",
            "keeps:",
            "a.yaml:8: steps.0 (prune): ",
            "'keeps' is not a field; did you mean 'keep'?",
        ),
        ("keep: 0.5", "keep: 1.5", "a.yaml:8: steps.0 (prune): keep: ", "got 1.5"),
        ("keep: 0.5", "keep: 0", "a.yaml:8: steps.0 (prune): keep: ", "got 0"),
        ("keep: 0.5", "keep: half", "a.yaml:8: steps.0 (prune): keep: ", "got 'half'"),
        ("keep: 0.5", "keep: .nan", "a.yaml:8: steps.0 (prune): keep: ", "got nan"),
        ("weights\n", "weight\n", "a.yaml:7: steps.0 (prune): axes: ", "got 'weight'"),
        ("epochs: 2", "epochs: 0", "a.yaml:11: steps.0 (prune): retrain.train.epochs: ", "got 0"),
        (
            "epochs: 2",
            "epoch: 2",
            "a.yaml:11: steps.0 (prune): retrain.train: ",
            "did you mean 'epochs'?",
        ),
        (
            "lr: 1e-3",
            "lr: fast",
            "a.yaml:14: steps.0 (prune): retrain.train.optimizer.adamw.lr: ",
            "got 'fast'",
        ),
        (
            "lr: 1e-3",
            "lrr: 1e-3",
            "a.yaml:14: steps.0 (prune): retrain.train.optimizer.adamw: ",
            "'lrr' is not a field; did you mean 'lr'?",
        ),
        (
            "adamw:",
            "adamww:",
            "a.yaml:12: steps.0 (prune): retrain.train.optimizer: ",
            "no optimizer is called 'adamww'; did you mean 'adamw'?",
        ),
        (
            "at: [0.5, 0.9]",
            "at: [0.5, 9]",
            "a.yaml:15: steps.0 (prune): retrain.train.optimizer.adamw.decay.milestones.at.1: ",
            "got 9",
        ),
        (
            "weight: 4",
            "weight: 9",
            "a.yaml:16: steps.1 (quantize): weight.symmetric.bits: ",
            "got 9",
        ),
        ("model: digits_cnn", "model: 3", "a.yaml:2: model: ", "got 3"),
        (
            "task: digits",
            "tasks: digits",
            "a.yaml:3: ",
            "'tasks' is not a field; did you mean 'task'?",
        ),
        ("task: digits", "budget: sise <= 1 kB", "a.yaml:3: budget: ", "did you mean 'size'?"),
        ("task: digits", "precision: float16", "a.yaml:3: precision: ", "got 'float16'"),
        (
            "- train\n",
            "- train: {stop: {patience: 0}}\n",
            "a.yaml:17: steps.2 (train): stop.patience: ",
            "got 0",
        ),
        (
            "- train\n",
            "- train: {scope: 'kind:cnv'}\n",
            "a.yaml:17: steps.2 (train): scope: ",
            "did you mean 'conv'?",
        ),
        ("- train\n", "- 3\n", "a.yaml:17: steps.2: ", "got 3"),
        (
            "- train\n",
            "- reconstruct: {parts: layers}\n",
            "a.yaml:17: steps.2 (reconstruct): parts: ",
            "input should be 'layer' or 'block', or a whole number, got 'layers'",
        ),
        (
            "- train\n",
            "- train: {objective: {label: 0}}\n",
            "a.yaml:17: steps.2 (train): objective.label: ",
            "a value stands there without the name of its field; fields are: weight",
        ),
        (
            "- train\n",
            "- train: {adamw: 1e-3}\n",
            "a.yaml:17: steps.2 (train): ",
            "'adamw' is not a field; write 'optimizer: adamw', or 'optimizer: {adamw: ...}'",
        ),
        (
            "weight: 4",
            "weight: {ternary: {granularity: rows}}",
            "a.yaml:16: steps.1 (quantize): weight.ternary.granularity: ",
            "input should be 'tensor' or 'row', or a whole number, or a mapping, got 'rows'",
        ),
        (
            "weight: 4",
            "weight: {ternary: {granularity: {groups: 0}}}",
            "a.yaml:16: steps.1 (quantize): weight.ternary.granularity.groups: ",
            "greater than or equal to 1, got 0",
        ),
        (
            "- train\n",
            "- train: {7: 1}\n",
            "a.yaml:17: steps.2 (train): '7' is not a field; ",
            "scope, stop",
        ),
    ],
)
def test_an_error_says_file_line_step_and_the_right_name(
    old: str, new: str, start: str, end: str
) -> None:
    message = refused(edited(old, new))
    assert message.startswith(start), message
    assert message.endswith(end), message
    assert "\n" not in message


def test_every_wrong_field_is_reported_each_on_its_line() -> None:
    lines = refused(edited("keep: 0.5", "keep: 2\n      rounds: 0")).splitlines()
    assert [line.split(": ")[0] for line in lines] == ["a.yaml:8", "a.yaml:9"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.yaml: a recipe is a mapping with a 'steps:' list"),
        ("- prune", "a.yaml: a recipe is a mapping with a 'steps:' list"),
        ("just words", "a.yaml: a recipe is a mapping with a 'steps:' list"),
        ("seed: 3", "a.yaml:1: 'steps' is required"),
        ("steps:", "a.yaml:1: steps: input should be a list, got None"),
        ("steps: 3", "a.yaml:1: steps: input should be a list, got 3"),
        ("steps: {train: }", "a.yaml:1: steps: input should be a list, got {'train': None}"),
        (
            "seed: 1\nsteps:\n\t- train",
            "a.yaml:3: found character '\\t' that cannot start any token",
        ),
        ("steps: [train", "a.yaml:1: "),
        ("seed: 1\nsteps: []\nseed: 2", "a.yaml:3: 'seed' is written twice; keep one"),
        (
            "steps:\n- train:\n    epochs: 1\n    epochs: 2",
            "a.yaml:4: 'epochs' is written twice; keep one",
        ),
        ("steps: []\n---\nsteps: []", "a.yaml:2: "),
        (
            "steps: !!python/object/apply:os.getcwd []",
            "a.yaml:1: could not determine a constructor",
        ),
        ("steps: [{train: {}, quantize: 4}]", "a.yaml:1: steps.0: a step is written as its name"),
        ("steps: [[train]]", "a.yaml:1: steps.0: a step is written as its name"),
        ("steps: [null]", "a.yaml:1: steps.0: a step is written as its name"),
        ("steps: &a [*a]", "a.yaml: there are more than 100,000 values in it"),
        ("seed: 2020-13-01", "a.yaml: not YAML (month must be in 1..12)"),
        ("seed: !!timestamp foo", "a.yaml: not YAML ("),
        (f"seed: {'9' * 5000}", "a.yaml: not YAML ("),
        ("1: 2\nsteps: []", "a.yaml:1: '1' is not a field"),
        ("self: 2\nsteps: []", "a.yaml:1: 'self' is not a field"),
    ],
)
def test_what_is_no_recipe_is_refused_on_its_line(text: str, message: str) -> None:
    assert refused(text).startswith(message)


def test_nesting_without_end_is_refused() -> None:
    assert refused("[" * 1000).startswith("a.yaml")


def test_aliases_cannot_make_a_small_file_large() -> None:
    doubling = "\n".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))
    assert "more than 100,000 values" in refused(f"a0: &a0 [1]\n{doubling}\nsteps: []")


@pytest.mark.parametrize("content", [b"\xff\xfe steps", b"\x80"])
def test_a_file_that_is_no_text_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.read(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe file '.*none\.yaml'; shipped ones: "):
        Recipe.read(tmp_path / "none.yaml")


def test_a_budget_that_cannot_be_read_says_where() -> None:
    with pytest.raises(LaconicError, match="'size <= 3'"):
        Recipe((), budget="size <= 3")
    assert not issubclass(BudgetError, RecipeError)


# What does not fit the network or the task is refused before any step.


@pytest.fixture(scope="module")
def task() -> Task:
    images, labels = torch.zeros(40, 1, 8, 8), torch.arange(40) % 10
    return Task((images, labels), (images, labels))


def scope_of_step(scope: str, index: int) -> Recipe:
    steps = [Prune("weights", keep=0.5), Quantize(4)]
    steps.insert(index, Train(scope=scope))
    return Recipe(tuple(steps))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_scope_that_selects_nothing_is_refused_before_any_step(index: int, task: Task) -> None:
    model = digits_cnn()
    with pytest.raises(ScopeError) as caught:
        compress(model, task, scope_of_step("conv9", index))
    assert str(caught.value).startswith(
        f"steps.{index} (train): 'conv9' selects no module; nearest: "
    )
    assert "conv" in str(caught.value).partition("nearest: ")[2]


def test_steps_in_an_impossible_order_are_refused_before_any_step(task: Task) -> None:
    recipe = Recipe((Prune("weights", keep=0.1), Train(), Prune("weights", keep=0.5)))
    with pytest.raises(ChainError, match=r"^steps\.2 \(prune\): keep 0\.5 after an earlier prune"):
        recipe.check(digits_cnn(), task)


def test_what_does_not_fit_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "seed: 1\nsteps:\n  - prune: {axes: weights, keep: 0.5}\n\n"
        "  - quantize: {weight: 4, scope: conv9}\n"
    )
    recipe = Recipe.read(path)
    for each in (recipe, recipe.model_copy(update={"seed": 2})):
        with pytest.raises(ScopeError) as caught:
            each.check(digits_cnn(), None)
        assert str(caught.value).startswith(f"{path}:5: steps.1 (quantize): 'conv9' selects no")
    assert (
        recipe == Recipe(recipe.steps, seed=1)
        and recipe.to_yaml() == Recipe.parse(recipe.to_yaml()).to_yaml()
    )


def test_training_without_data_is_refused_before_any_step() -> None:
    with pytest.raises(TaskError, match=r"^steps\.0 \(prune\): train needs data"):
        Recipe((Prune("weights", keep=0.5, retrain=Train()),)).check(digits_cnn(), None)


def test_a_recipe_that_fits_is_not_refused(task: Task) -> None:
    Recipe.parse(LONG).check(digits_cnn(), task)
