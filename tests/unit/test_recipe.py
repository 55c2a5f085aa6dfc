"""Recipe: the YAML round trip, and errors that say file, line, step and the right name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from laconic.errors import BudgetError, ChainError, LaconicError, RecipeError, ScopeError, TaskError
from laconic.models import digits_cnn
from laconic.recipe import Recipe, families, find_recipe, schema, shipped_recipes
from laconic.recover import SGD, AdamW, Milestones, Stop, Train
from laconic.run import compress
from laconic.step import Step, members
from laconic.structure import Geometric, Prune, Taylor
from laconic.tasks import Task
from laconic.weights import KMeans, Quantize

# What steps that cannot be made from nothing are made from here.
REQUIRED: dict[str, dict[str, Any]] = {
    "prune": {"axes": "weights", "keep": 0.5},
    "quantize": {"weight": "float"},
}

LONG = """\
# a comment
model: digits_cnn
task: digits

steps:
  - prune:
      axes: weights
      keep: 0.5
      retrain:
        train:
          epochs: 2
          optimizer:
            adamw:
              lr: 1e-3
              decay: {milestones: {at: [0.5, 0.9]}}
  - quantize: {weight: 4}
  - train
"""


@pytest.fixture(scope="module")
def task() -> Task:
    images, labels = torch.zeros(40, 1, 8, 8), torch.arange(40) % 10
    return Task((images, labels), (images, labels))


def refused(text: str, **options: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text, where="a.yaml", **options)
    return str(caught.value)


def edited(old: str, new: str) -> str:
    assert old in LONG
    return LONG.replace(old, new)


def registered_steps() -> Iterator[Step]:
    for name, kind in members(Step, every=True).items():
        fields = REQUIRED.get(name, {})
        if kind.__module__.startswith("laconic.") and all(
            key in fields for key, field in kind.model_fields.items() if field.is_required()
        ):
            yield kind(**fields)


def test_every_registered_step_reads_back_what_it_writes() -> None:
    steps = tuple(registered_steps())
    assert {step.name for step in steps} >= {"prune", "quantize", "recalibrate", "train"}
    recipe = Recipe(steps)
    assert Recipe.parse(recipe.to_yaml()) == recipe


def test_every_member_of_every_family_survives_inside_a_recipe() -> None:
    """A family's members are written inside the fields of steps: read those back too."""
    recipe = Recipe(
        (
            Prune(
                "weights", keep=0.25, by=Taylor(), schedule=Geometric(), rounds=3, scope="kind:conv"
            ),
            Quantize(KMeans(3, start="density"), scope="fc1, fc2"),
            Train(
                epochs=2,
                optimizer=SGD(0.1, decay=Milestones((0.5,), by=0.2), clip=1.0),
                stop=Stop(patience=2),
                during=(Prune("weights", keep=0.1),),
            ),
        ),
        budget="size <= 20 kB, macs <= 0.5x",
        seed=3,
        precision="auto",
        model={"digits_cnn": {}},
        task="digits",
    )
    assert Recipe.parse(recipe.to_yaml()) == recipe


def test_yaml_is_a_plain_reading_of_the_constructors() -> None:
    assert Recipe.parse(LONG) == Recipe(
        (
            Prune(
                "weights",
                keep=0.5,
                retrain=Train(epochs=2, optimizer=AdamW(1e-3, decay=Milestones((0.5, 0.9)))),
            ),
            Quantize(4),
            Train(),
        ),
        model="digits_cnn",
        task="digits",
    )


def test_json_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text('{"steps": [{"prune": {"axes": "weights", "keep": 0.5}}]}', encoding="utf-8")
    assert Recipe.read(path).steps == (Prune("weights", keep=0.5),)


def test_the_first_positional_field_may_stand_alone() -> None:
    assert Recipe.parse("steps: [quantize: 8]").steps == (Quantize(8),)


def test_a_recipe_may_have_no_steps() -> None:
    assert Recipe.parse("steps: []").steps == ()


def test_joined_recipes_take_the_rest_from_the_first() -> None:
    first = Recipe((Train(),), seed=5, model="digits_cnn")
    joined = first + Recipe((Quantize(4),), seed=9)
    assert joined == Recipe((Train(), Quantize(4)), seed=5, model="digits_cnn")
    assert hash(joined) == hash(Recipe((Train(), Quantize(4)), seed=5, model="digits_cnn"))


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
        ("steps: &a [*a]", "a.yaml:1: steps.0: a step is written as its name"),
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
    assert "is not a field" in refused(f"a0: &a0 [1]\n{doubling}\nsteps: []").splitlines()[0]


@pytest.mark.parametrize("content", [b"\xff\xfe steps", b"\x80"])
def test_a_file_that_is_no_text_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.read(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe file '.*none\.yaml'; shipped ones: "):
        Recipe.read(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("seed=7", {"seed": 7}),
        ("seed = 7", {"seed": 7}),
        ("model=lenet_5", {"model": "lenet_5"}),
        (
            "model.digits_cnn.weights=w.safetensors",
            {"model": {"digits_cnn": {"weights": "w.safetensors"}}},
        ),
        ("task={mnist: data}", {"task": {"mnist": "data"}}),
        ("task.augment=flip", {"task": {"digits": {}, "augment": "flip"}}),
        ("budget=size <= 9 kB, macs <= 0.5x", {"budget": "size <= 9 kB, macs <= 0.5x"}),
        ("steps=[]", {"steps": []}),
        ("steps.2=quantize: 8", {"steps.2.quantize.weight": "symmetric"}),
        ("steps.0.prune.keep=0.25", {"steps.0.prune.keep": 0.25}),
        ("steps.0.prune.rounds=4", {"steps.0.prune.rounds": 4}),
        ("steps.2.train.epochs=3", {"steps.2.train.epochs": 3}),
        ("steps.2.train.optimizer.sgd.lr=0.5", {"steps.2.train.optimizer.sgd.lr": 0.5}),
        (
            "steps.0.prune.retrain.train.optimizer.adamw.decay.milestones.at.1=0.8",
            {"steps.0.prune.retrain.train.optimizer.adamw.decay.milestones.at": [0.5, 0.8]},
        ),
    ],
)
def test_set_changes_one_value(change: str, expected: dict[str, Any]) -> None:
    ((path, value),) = expected.items()
    found: Any = yaml.safe_load(Recipe.parse(LONG, changes=[change]).to_yaml())
    found.setdefault("steps", [])
    for part in path.split("."):
        found = found[int(part) if part.isdigit() else part]
    assert found == value


def test_several_changes_follow_one_another() -> None:
    recipe = Recipe.parse(LONG, changes=["seed=1", "steps.2=quantize: 8", "seed=2"])
    assert recipe.seed == 2
    assert recipe.steps[2] == Quantize(8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed", "--set seed: write path=value"),
        ("seed={", "--set seed={: the value is not YAML"),
        ("seed=x", "seed: input should be a valid integer"),
        ("sede=3", "'sede' is not a field"),
        ("steps.3=train", "steps has items 0 to 2, not '3'"),
        ("steps.3.train.epochs=1", "steps has items 0 to 2, not '3'"),
        ("steps.-1=train", "steps has items 0 to 2, not '-1'"),
        ("steps.first.train.epochs=1", "steps has items 0 to 2, not 'first'"),
        ("steps.0.prun.keep=1", "'prun' is not in steps.0; did you mean 'prune'?"),
        ("steps.0.prune.keep.now=1", "steps.0.prune.keep is 0.5, which has no 'now'"),
        ("steps.0.prune.keeps=1", "steps.0 (prune): 'keeps' is not a field; did you mean 'keep'?"),
        ("steps.0.prune.keep=2", "a.yaml:8: steps.0 (prune): keep: "),
        ("=3", "'' is not a field"),
    ],
)
def test_a_change_that_cannot_be_made_is_refused(change: str, message: str) -> None:
    assert message in refused(LONG, changes=[change])


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


def test_a_budget_that_cannot_be_read_says_where() -> None:
    with pytest.raises(LaconicError, match="'size <= 3'"):
        Recipe((), budget="size <= 3")
    assert not issubclass(BudgetError, RecipeError)


def test_every_shipped_recipe_is_read_and_starts_with_what_it_is() -> None:
    found = shipped_recipes()
    assert "deep-compression" in found
    for name, path in found.items():
        assert Recipe.read(path).steps, name
        assert path.read_text(encoding="utf-8").startswith("# "), name
        assert find_recipe(name) == path


def test_a_recipe_is_found_by_path_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep-compression"
    path.write_text("steps: []", encoding="utf-8")
    assert find_recipe(str(path)) == path
    monkeypatch.chdir(tmp_path)
    assert find_recipe("deep-compression") == Path("deep-compression")


def test_a_recipe_that_is_nowhere_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"'deep-compresion'; did you mean 'deep-compression'\?"):
        find_recipe("deep-compresion")
    with pytest.raises(RecipeError, match=r"shipped ones: .*deep-compression"):
        find_recipe("zzz")


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"].removeprefix("#/$defs/")
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_the_schema_names_every_member_and_refers_to_nothing_missing() -> None:
    found = schema()
    assert set(references(found)) <= set(found["$defs"])
    for family in families():
        if family.__module__.startswith("laconic.") and family.__name__ in found["$defs"]:
            (names, *_) = found["$defs"][family.__name__]["anyOf"]
            assert set(members(family)) <= set(names["enum"])
    assert found["properties"]["steps"]["items"] == {"$ref": "#/$defs/Step"}


def test_the_schema_takes_every_form_that_a_recipe_has() -> None:
    """Name and fields, name and first field, one teacher: as editors check what pages show."""
    found = schema()
    forms = {name: form for each in found["$defs"]["Representation"]["anyOf"][1:-1]
             for name, form in each["properties"].items()}  # fmt: skip
    fields, first = forms["kmeans"]["anyOf"]
    assert fields["properties"]["bits"] == first
    assert first["maximum"] == 8
    assert forms["float"]["type"] == "object"  # without fields
    assert ">>>" not in fields["description"]
    assert {"type": ["object", "string"]} in found["properties"]["teacher"]["anyOf"]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("resnet20", ("resnet20",)),
        ("{hf: folder}", ({"hf": "folder"},)),
        ("[lenet_5, {hf: folder}]", ("lenet_5", {"hf": "folder"})),
    ],
)
def test_teachers_are_one_or_several(written: str, read: tuple[object, ...]) -> None:
    recipe = Recipe.parse(f"teacher: {written}\nsteps: [recalibrate]")
    assert recipe.teacher == read and Recipe.parse(recipe.to_yaml()) == recipe


def test_a_teacher_that_is_no_name_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"recipe:1: teacher"):
        Recipe.parse("teacher: 3\nsteps: [recalibrate]")
