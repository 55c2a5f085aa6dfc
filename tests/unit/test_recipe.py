"""Recipe: the YAML round trip, changes of one value, where recipes are found, and the schema."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.recipes import LONG, refused
from laconic.errors import RecipeError
from laconic.recipe import Recipe, families, find_recipe, schema, shipped_recipes
from laconic.recover import AdamW, Milestones, Train
from laconic.step import members
from laconic.structure import Prune
from laconic.weights import Quantize


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


def test_what_a_recipe_says_besides_its_steps_is_read_back() -> None:
    recipe = Recipe(
        (),
        budget="size <= 20 kB, macs <= 0.5x",
        seed=3,
        precision="bfloat16",
        model={"digits_cnn": {}},
        task="digits",
        recall="2 GB",
    )
    assert Recipe.parse(recipe.to_yaml()) == recipe


def test_joined_recipes_take_the_rest_from_the_first() -> None:
    first = Recipe((Train(),), seed=5, model="digits_cnn")
    joined = first + Recipe((Quantize(4),), seed=9)
    assert joined == Recipe((Train(), Quantize(4)), seed=5, model="digits_cnn")
    assert hash(joined) == hash(Recipe((Train(), Quantize(4)), seed=5, model="digits_cnn"))


def test_equal_recipes_hash_alike_in_whatever_order_they_are_written() -> None:
    one = {"hf": "folder", "num_labels": 3}
    recipes = [
        Recipe([Quantize(4)], model=model, task=task, teacher=[model])
        for model, task in ((one, one), (dict(reversed(one.items())), dict(reversed(one.items()))))
    ]
    assert len({*recipes}) == 1
    assert len({*recipes, Recipe([Quantize(4)], seed=1, model=one)}) == 2


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
        ("seed=x", "--set seed=x: seed: input should be a whole number"),
        ("model=3", "--model 3: model: write a name"),
        ("sede=3", "'sede' is not a field"),
        ("steps.3=train", "steps has items 0 to 2, not '3'"),
        ("steps.3.train.epochs=1", "steps has items 0 to 2, not '3'"),
        ("steps.-1=train", "steps has items 0 to 2, not '-1'"),
        ("steps.first.train.epochs=1", "steps has items 0 to 2, not 'first'"),
        ("steps.0.prun.keep=1", "'prun' is not in steps.0; did you mean 'prune'?"),
        ("steps.0.prune.keep.now=1", "steps.0.prune.keep is 0.5, which has no 'now'"),
        ("steps.0.prune.keeps=1", "steps.0 (prune): 'keeps' is not a field; did you mean 'keep'?"),
        ("steps.0.prune.keep=2", "--set steps.0.prune.keep=2: steps.0 (prune): keep: "),
        ("steps.0=prune: {keep: 2}", "--set steps.0=prune: {keep: 2}: steps.0 (prune): keep: "),
        ("quantize.weight=2", "--set quantize.weight=2: 'quantize' is not a field"),
        ("=3", "'' is not a field"),
    ],
)
def test_a_change_that_cannot_be_made_is_refused(change: str, message: str) -> None:
    assert message in refused(LONG, changes=[change])


def test_a_wrong_value_is_found_where_it_was_written() -> None:
    wrong = LONG.replace("keep: 0.5", "keep: 5")
    found = refused(wrong, changes=["seed=x", "seed=y"])
    assert "a.yaml:8: steps.0 (prune): keep: " in found
    assert "--set seed=y: seed: " in found


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
