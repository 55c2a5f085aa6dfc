"""The command compress: what it makes, where paths start, and what it asks for or refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.cli import answer, finished_run, laconic, refused
from laconic import rundir
from laconic.models import digits_cnn, load_model
from laconic.recipe import Recipe
from laconic.ship.checkpoint import model_hash


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe, its data, and the run the recipe made."""
    return finished_run(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def artefact(folder: Path) -> Path:
    return folder / "run" / rundir.ARTIFACT


def test_compress_keeps_everything_in_its_folder_and_says_where(folder: Path) -> None:
    kept = {path.name for path in (folder / "run").iterdir()}
    assert {"model.safetensors", "report.html", "history.json", "recipe.yaml", "run.json"} <= kept
    said = (folder / "said.txt").read_text(encoding="utf-8")
    size = (folder / "run" / rundir.ARTIFACT).stat().st_size
    for word in ("original", "prune", "quantize", "train", "model.safetensors", "report.html"):
        assert word in said
    assert f"{size / 1000:.2f}"[:3] in said


def test_compress_gives_the_same_bytes_again(folder: Path, tmp_path: Path, artefact: Path) -> None:
    """The network is drawn by the recipe's seed, so even an untrained one comes out the same."""
    torch.manual_seed(99)
    found = answer(
        "compress", folder / "recipe.yaml", "--out", tmp_path / "again", "--device", "cpu"
    )
    assert Path(found["artefact"]).read_bytes() == artefact.read_bytes()
    assert found["size_bytes"] == artefact.stat().st_size
    assert [row["step"] for row in found["ledger"]] == ["original", "prune", "quantize", "train"]
    assert found["exceeded"] == {}


def test_the_recipe_of_a_run_can_be_run_again(
    folder: Path, tmp_path: Path, artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths of a recipe start at its folder, and what is kept stands in another one."""
    kept = folder / "run" / "recipe.yaml"
    monkeypatch.chdir(tmp_path)
    assert laconic("compress", kept, "--out", "again", "--device", "cpu").exit_code == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == artefact.read_bytes()


def test_the_folder_is_runs_and_the_recipes_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert laconic("compress", folder / "recipe.yaml", "--set", "steps=[]", "-h").exit_code == 0
    assert laconic("compress", folder / "recipe.yaml", "--set", "steps=[]").exit_code == 0
    assert (tmp_path / "runs" / "recipe" / "model.safetensors").is_file()


def test_paths_start_at_the_recipe_and_those_of_options_where_the_user_stands(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(digits_cnn().state_dict(), tmp_path / "weights.safetensors")
    words = ("compress", folder / "recipe.yaml", "--check")
    weights = "{digits_cnn: {weights: weights.safetensors}}"
    assert laconic(*words, "--model", weights).exit_code == 0
    assert laconic(*words, "--set", f"model={weights}").exit_code == 0
    assert "cannot be read" in refused(
        *words, "--set", "model.digits_cnn.weights=weights.safetensors"
    )
    assert "digits.npz" in refused(*words, "--task", "{npz: digits.npz}")


def test_a_budget_that_is_exceeded_is_exit_code_one(folder: Path, tmp_path: Path) -> None:
    words = (
        "compress",
        folder / "recipe.yaml",
        "--set",
        "steps=[]",
        "--set",
        "budget=size <= 1 kB",
    )
    said = refused(*words, "--out", tmp_path / "run", code=1)
    assert said.splitlines()[-1].startswith("the budget 'size <= 1 kB' is exceeded by 163.")
    assert said.endswith(" KiB) in size")
    assert (tmp_path / "run" / "model.safetensors").is_file()
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Budget: exceeded by 163." in report
    said = refused(*words, "--check", code=1)
    assert said.startswith("the budget 'size <= 1 kB' will be exceeded by 163.")
    met = laconic(*words[:-1], "budget=size <= 1 MB", "--check")
    assert "the budget 'size <= 1 MB' will be met" in met.stdout


LESSON = """\
model: digits_cnn
teacher: [digits_cnn, {digits_cnn: {weights: other.safetensors}}]
task: {npz: digits.npz}
steps:
  - train: {objective: {logits: {teacher: 1}}, epochs: 1, batch: 20}
"""


def test_teachers_come_from_the_recipe_or_the_command_line(folder: Path) -> None:
    recipe, other = folder / "lesson.yaml", folder / "other.safetensors"
    recipe.write_text(LESSON, encoding="utf-8")
    save_file(digits_cnn().state_dict(), other)
    answer("compress", recipe, "--out", folder / "taught")
    facts = json.loads((folder / "taught" / rundir.RUN).read_text(encoding="utf-8"))
    weighed = load_model({"digits_cnn": {"weights": str(other)}})
    assert len(facts["teacher"]) == 2 and facts["teacher"][1] == model_hash(weighed)
    assert answer("compress", recipe, "--check")["seconds"] > 0
    assert "there are 1" in refused("compress", recipe, "--teacher", "digits_cnn", "--check")


def test_a_shipped_recipe_asks_for_what_it_is_run_on() -> None:
    said = refused("compress", "q8bert", "--check")
    assert said == (
        "the recipe 'q8bert' leaves open what it is run on; give, with paths of your own, "
        "--model '{hf: path/to/fine-tuned-encoder}' --task '{glue: path/to/SST-2, max_length: "
        "128}'; --task may be left out where no step needs data"
    )
    said = refused("compress", "q8bert", "--check", "--model", "digits_cnn")
    assert said.endswith("own, --task '{glue: path/to/SST-2, max_length: 128}'")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny encoder of Hugging Face."""
    transformers = pytest.importorskip("transformers", reason="encoders need transformers")
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
    config = transformers.BertConfig(**sizes, num_hidden_layers=1, vocab_size=20)
    path = tmp_path_factory.mktemp("encoder")
    transformers.BertForSequenceClassification(config).save_pretrained(path)
    return path


def test_a_recipe_whose_steps_need_no_data_runs_without(encoder: Path, tmp_path: Path) -> None:
    words = ("compress", "gobo", "--model", f"{{hf: {encoder}}}", "--device", "cpu")
    found = laconic(*words, "--check")
    assert found.exit_code == 0
    assert found.stdout.splitlines()[:2] == ["no task: nothing is scored", "gobo fits: quantize"]
    found = laconic(*words, "--out", tmp_path / "run")
    assert found.exit_code == 0
    assert "no task: nothing is scored" in found.stdout
    kept = Recipe.read(tmp_path / "run" / rundir.RECIPE)
    assert kept.task is None and kept.steps == Recipe.read("gobo").steps


def test_a_recipe_whose_steps_need_data_asks_for_them(encoder: Path) -> None:
    said = refused("compress", "q8bert", "--check", "--model", f"{{hf: {encoder}}}")
    assert said == (
        "the recipe 'q8bert' leaves open what it is run on; give, with paths of your own, "
        "--task '{glue: path/to/SST-2, max_length: 128}'"
    )


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    assert refused("compress", "deep-compresion").endswith("did you mean 'deep-compression'?")
    path = tmp_path / "bare.yaml"
    path.write_text("steps: []", encoding="utf-8")
    assert refused("compress", path) == (
        f"{path}: no network is named; add a 'model:' line, or give --model"
    )
    assert "no model is called 'digits_cn'; did you mean" in refused(
        "compress", path, "--model", "digits_cn"
    )


def test_a_network_is_no_recipe(artefact: Path) -> None:
    said = refused("compress", artefact)
    assert said.startswith(f"{artefact} is no recipe, which is a text (YAML or JSON); ")
    assert f"--model '{{\"laconic:load\": {{path: {artefact}}}}}'" in said


def test_a_device_that_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    words = ("compress", folder / "recipe.yaml", "--out", tmp_path / "run", "--device", "gpu")
    assert refused(*words) == (
        "device 'gpu' cannot be used here (there is no such kind); give cpu, which always can, or "
        "cuda for a GPU"
    )
    assert "device 'cuda:99' cannot be used here" in refused(*words[:-1], "cuda:99")
