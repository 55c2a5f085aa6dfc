"""The command line: every command, its exit codes, its JSON, its help and its hints."""

import json
import logging
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.text import Text
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from laconic import rundir
from laconic.cli import app, demo
from laconic.cli.contents import catalogue, file_manifest
from laconic.cli.output import Output, _fitting, jsonable
from laconic.cli.own_code import own_code
from laconic.cli.predict import predict, trainings
from laconic.errors import FeatureError, RunError
from laconic.models import digits_cnn, load_model
from laconic.recipe import Recipe
from laconic.recover import (
    Gradient,
    Hidden,
    Hint,
    Label,
    Logits,
    ProximalChannels,
    Reconstruct,
    Train,
)
from laconic.recover.descent import Descent
from laconic.ship import save
from laconic.ship.checkpoint import model_hash
from laconic.ship.container import read, write
from laconic.step import State, run_step
from laconic.structure import Embedding, Factorize, Prune
from laconic.tasks import Task
from laconic.weights import Gobo, MinMax, Product, Quantize, Symmetric

COMMANDS = ("demo", "compress", "measure", "analyse", "report", "show", "verify", "list", "schema")
HEAVY = ("torch", "numpy", "pydantic", "yaml", "sklearn", "laconic.step", "laconic.run")

RECIPE = """\
# Small: two steps and a little training.
model: digits_cnn
task: {npz: digits.npz}
steps:
  - prune: {axes: weights, keep: 0.25}
  - quantize: {weight: 4}
  - train: {epochs: 1, batch: 20}
"""


def laconic(*words: object) -> Result:
    """Run a command in this process; only what a user may cause is caught."""
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def answer(*words: object) -> dict[str, Any]:
    """Return the last JSON line of a command."""
    found = laconic("--json", *words)
    assert found.exit_code == 0, found.output
    last: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    assert last["event"] == "result"
    return last


def refused(*words: object, code: int = 2) -> str:
    """Return what a command that stops says on standard error."""
    found = laconic(*words)
    assert found.exit_code == code, found.output
    assert "Traceback" not in found.output
    return found.stderr.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe, its data, and the run the recipe made."""
    import numpy as np

    path = tmp_path_factory.mktemp("cli")
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 10
    images = generator.integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.savez(
        path / "digits.npz",
        train_images=images[:40],
        train_labels=labels[:40],
        test_images=images[40:],
        test_labels=labels[40:],
    )
    (path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    found = laconic("compress", path / "recipe.yaml", "--out", path / "run", "--device", "cpu")
    assert found.exit_code == 0, found.output
    (path / "said.txt").write_text(found.stdout, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def artefact(folder: Path) -> Path:
    return folder / "run" / rundir.ARTIFACT


# -- help, hints and options ----------------------------------------------------------------------


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = f"""
import sys, time
sys.argv = ["laconic", "--help"]
from laconic.cli import main
try:
    main()
except SystemExit as stop:
    print(stop.code, time.process_time(), [name for name in {HEAVY} if name in sys.modules])
"""
    fastest = math.inf
    for _ in range(3):
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        status, seconds, heavy = found.stdout.splitlines()[-1].split(" ", 2)
        assert (status, heavy) == ("0", "[]")
        fastest = min(fastest, float(seconds))
    assert fastest < 0.5


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(name: str) -> None:
    found = laconic(name, "--help")
    assert found.exit_code == 0
    assert "Example" in found.stdout
    assert f"laconic {name}" in found.stdout
    for option in ("--json", "--quiet", "--debug"):
        assert option in found.stdout


def test_the_commands_are_all_there() -> None:
    found = laconic("--help").stdout
    assert all(f" {name} " in found for name in COMMANDS)
    bare = laconic()
    assert "Commands" in bare.output


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("compres",), "compress"),
        (("shwo",), "show"),
        (("compress", "x", "--resum"), "--resume"),
        (("verify", "x", "--logit"), "--logits"),
        (("--jsn",), "--json"),
    ],
)
def test_a_slip_names_the_nearest(words: tuple[str, ...], hint: str) -> None:
    assert hint in refused(*words)


def test_a_missing_argument_is_refused() -> None:
    assert "RECIPE" in refused("compress")


def test_the_version_is_printed() -> None:
    from laconic import __version__

    assert laconic("--version").stdout.strip() == __version__


def test_the_modules_run_as_programs() -> None:
    from laconic import __version__

    for module in ("laconic", "laconic.cli"):
        command = [sys.executable, "-m", module, "--version"]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == __version__


@pytest.mark.parametrize("words", [("--json", "list"), ("list", "--json")])
def test_common_options_stand_before_or_after_the_command(words: tuple[str, ...]) -> None:
    assert json.loads(laconic(*words).stdout)["event"] == "result"


# -- list and schema ------------------------------------------------------------------------------


def test_list_names_every_kind_and_describes_every_member() -> None:
    found = answer("list")
    kinds = {"steps", "representations", "criteria", "penalties", "objectives", "optimizers"}
    kinds |= {"schedules", "decays", "models", "tasks", "recipes", "coders"}
    assert kinds <= set(found)
    for kind in kinds:
        assert found[kind], kind
        assert all(found[kind].values()), kind


def test_list_of_one_kind_is_one_line_each() -> None:
    lines = laconic("list", "models").stdout.splitlines()
    assert len(lines) == 1 + len(catalogue("models")["models"])
    assert any(line.startswith("digits_cnn  ") for line in lines)
    assert "deep-compression" in laconic("list", "recipes").stdout
    assert "huffman" in answer("list", "coders")["coders"]


def test_list_explains_a_name() -> None:
    found = answer("list", "kmeans")["methods"]
    assert [method["family"] for method in found] == ["representation"]
    assert found[0]["fields"][0] == ["bits", "5", "width of an index, 1 to 8."]
    assert [method["family"] for method in answer("list", "prune")["methods"]] == ["step"]
    assert "max_length" in laconic("list", "glue").stdout
    assert "- factorize: svd" in laconic("list", "factorize").stdout
    assert "quantize:" in laconic("list", "ternarybert").stdout
    assert "stop: {patience: ...}" in laconic("list", "train").stdout
    assert laconic("list", "prune").stdout.count("required") == 2
    assert refused("list", "prun") == "there is nothing called 'prun'; did you mean 'prune'?"


def test_list_of_an_unknown_kind_names_the_nearest() -> None:
    assert refused("list", "stepz") == "there is nothing called 'stepz'; did you mean 'steps'?"
    assert "representations" in refused("list", "zzz")


def test_schema_is_json_and_can_be_written(tmp_path: Path) -> None:
    printed = json.loads(laconic("schema").stdout)
    path = tmp_path / "recipe.schema.json"
    assert laconic("schema", "--out", path).stdout.strip() == str(path)
    assert json.loads(path.read_text(encoding="utf-8")) == printed
    assert printed["properties"]["steps"]
    assert answer("schema")["schema"] == printed


# -- compress -------------------------------------------------------------------------------------


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


def test_a_network_is_no_recipe(artefact: Path) -> None:
    said = refused("compress", artefact)
    assert said.startswith(f"{artefact} is no recipe, which is a text (YAML or JSON); ")
    assert f"--model '{{\"laconic:load\": {{path: {artefact}}}}}'" in said


def test_a_compressed_network_is_no_state_dict(artefact: Path) -> None:
    said = refused("measure", artefact, "--model", f"{{digits_cnn: {{weights: {artefact}}}}}")
    assert f'take it as it is: model: {{"laconic:load": {{path: {artefact}}}}}' in said


def test_a_folder_with_a_run_is_not_overwritten_but_can_be_resumed(
    folder: Path, artefact: Path
) -> None:
    before = artefact.read_bytes()
    words = ("compress", folder / "recipe.yaml", "--out", folder / "run", "--device", "cpu")
    assert refused(*words) == (
        f"{folder / 'run'} holds a run already; resume it (resume=True, or --resume), or choose "
        "another directory"
    )
    assert laconic(*words, "--resume").exit_code == 0
    assert artefact.read_bytes() == before
    assert "another recipe" in refused(*words, "--resume", "--set", "seed=5")


def test_json_is_one_object_per_line_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    found = laconic("compress", folder / "recipe.yaml", "--out", tmp_path / "run", "--json")
    events = [json.loads(line) for line in found.stdout.splitlines()]
    assert [event["event"] for event in events][-1] == "result"
    assert {event["event"] for event in events} == {"log", "result"}
    assert any("prune" in event.get("message", "") for event in events)


def test_quiet_prints_the_result_alone(folder: Path, tmp_path: Path) -> None:
    words = ("compress", folder / "recipe.yaml", "--set", "steps=[]")
    loud = laconic(*words, "--out", tmp_path / "loud")
    quiet = laconic(*words, "--out", tmp_path / "quiet", "--quiet")
    assert "original: " in loud.stderr
    assert quiet.stderr == ""
    assert "original" in quiet.stdout


def test_the_folder_is_runs_and_the_recipes_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert laconic("compress", folder / "recipe.yaml", "--set", "steps=[]", "-h").exit_code == 0
    assert laconic("compress", folder / "recipe.yaml", "--set", "steps=[]").exit_code == 0
    assert (tmp_path / "runs" / "recipe" / "model.safetensors").is_file()


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


def test_check_predicts_and_leaves_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = answer("compress", folder / "recipe.yaml", "--check")
    assert [row["step"] for row in found["rows"]] == ["original", "prune", "quantize", "train"]
    assert [row["updates"] for row in found["rows"]] == [0, 0, 0, 2]
    assert found["rows"][-1]["seconds"] > 0
    assert found["seconds"] == pytest.approx(sum(row["seconds"] for row in found["rows"]))
    assert list(tmp_path.iterdir()) == []
    text = laconic("compress", folder / "recipe.yaml", "--check").stdout
    assert "recipe fits: prune, quantize, train" in text
    heads = "Step Predicted size Codes alone, all File, all Updates Training"
    assert heads in [" ".join(line.split()) for line in text.splitlines()]
    assert "Predicted: a file about" in text
    assert "(codes alone, as papers count: 26.1x)" in text


def test_the_predicted_size_is_near_the_one_that_comes_out(folder: Path) -> None:
    rows = answer("compress", folder / "recipe.yaml", "--check")["rows"]
    history, _ = rundir.read_history(folder / "run")
    for row, measured in zip(rows, history, strict=True):
        assert row["nominal_bytes"] == pytest.approx(measured.nominal_bits / 8, rel=1e-3)
        assert row["size_bytes"] == pytest.approx(measured.size_bytes, rel=0.05)


def test_check_refuses_what_compress_would_refuse(folder: Path) -> None:
    recipe = folder / "recipe.yaml"
    said = refused("compress", recipe, "--check", "--set", "steps.2.train.scope=conv9")
    assert said.startswith(f"{recipe}:") and ": steps.2 (train): 'conv9' selects no" in said
    said = refused("compress", recipe, "--check", "--set", "steps.0.prune.keeps=1")
    assert said == f"{recipe}:5: steps.0 (prune): 'keeps' is not a field; did you mean 'keep'?"


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


def test_a_device_that_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    words = ("compress", folder / "recipe.yaml", "--out", tmp_path / "run", "--device", "gpu")
    assert refused(*words) == (
        "device 'gpu' cannot be used here (there is no such kind); give cpu, which always can, or "
        "cuda for a GPU"
    )
    assert "device 'cuda:99' cannot be used here" in refused(*words[:-1], "cuda:99")


def test_an_interrupt_says_how_to_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, out: Path, **options: Any) -> None:
        if out.name == "begun":
            (out / rundir.CHECKPOINT).touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("laconic.run.compress", interrupted)
    (tmp_path / "begun").mkdir()
    given = ("--set", "seed=1", "--device", "cpu")
    words = ("compress", folder / "recipe.yaml", "--out")
    assert refused(*words, tmp_path, *given, code=130) == "stopped before anything was done"
    assert refused(*words, tmp_path / "begun", *given, code=130) == (
        f"stopped; go on with: laconic compress {folder / 'recipe.yaml'} --out "
        f"{tmp_path / 'begun'} --resume --set seed=1 --device cpu"
    )


# -- measure, report, show, verify ----------------------------------------------------------------


def test_measure_of_a_run_is_its_ledger(folder: Path) -> None:
    text = laconic("measure", folder / "run").stdout.splitlines()
    assert " ".join(text[0].split())[:53] == "Step Size Codes alone File Codes alone, all File, all"
    assert [line.split()[0] for line in text[1:]] == ["original", "prune", "quantize", "train"]
    history = answer("measure", folder / "run")["history"]
    assert [measured["step"] for measured in history] == ["original", "prune", "quantize", "train"]


def test_measure_of_a_file_counts_its_bytes(artefact: Path, folder: Path) -> None:
    found = answer("measure", artefact)
    parts = ("codes", "index", "tables", "dense", "header")
    assert found["size_bytes"] == artefact.stat().st_size
    assert sum(found[f"{part}_bytes"] for part in parts) == found["size_bytes"]
    assert found["parameters"] == 40506
    assert found["ratio"] > 4
    assert "metrics" not in found
    scored = answer("measure", artefact, "--task", f"{{npz: {folder / 'digits.npz'}}}")
    history, _ = rundir.read_history(folder / "run")
    assert scored["metrics"] == pytest.approx(dict(history[-1].metrics))
    assert scored["macs"] == history[-1].macs
    assert (
        "accuracy"
        in laconic("measure", artefact, "--task", f"{{npz: {folder / 'digits.npz'}}}").stdout
    )


@pytest.mark.parametrize("words", [("analyse", "FILE", "--task", "digits"), ("schema",)])
def test_where_nothing_can_be_written_is_told_before_the_work(
    words: tuple[str, ...], artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("laconic.cli.contents.file_analyses", lambda *_, **__: pytest.fail("ran"))
    (tmp_path / "file").write_text("")
    given = [artefact if word == "FILE" else word for word in words]
    said = refused(*given, "--out", tmp_path / "file" / "x.html")
    assert "nothing can be written there" in said and "choose another --out" in said


def test_list_explains_whatever_it_lists() -> None:
    for name, line in (("huffman", "in fewer bits"), ("hf", "a folder of Hugging Face")):
        assert line in laconic("list", name).stdout
    both = laconic("list", "gobo").stdout
    assert "steps:" in both and "gobo  (representation)" in both


def test_analyse_writes_a_page(artefact: Path, folder: Path, tmp_path: Path) -> None:
    task, path = f"{{npz: {folder / 'digits.npz'}}}", tmp_path / "page.html"
    found = answer("analyse", artefact, "--task", task, "--batches", 1, "--out", path)
    assert Path(found["report"]) == path
    assert "<html" in path.read_text(encoding="utf-8").lower()
    assert list(found["eigenvalues"]["values"][artefact.stem]) == list(found["bits"]["scores"])
    assert set(found["bits"]["scores"]["conv1"]) == {"2 bit", "4 bit", "8 bit"}
    assert "task" in refused("analyse", artefact)


def test_report_writes_the_page_or_prints_the_tables(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    assert laconic("report", folder / "run", "--out", path).stdout.strip() == str(path)
    assert "<html" in path.read_text(encoding="utf-8").lower()
    (folder / "run" / "report.html").unlink()
    found = answer("report", folder / "run")
    assert Path(found["report"]) == folder / "run" / "report.html"
    assert Path(found["report"]).is_file()
    printed = laconic("report", folder / "run", "--terminal").stdout
    assert "quantize" in printed
    assert not any(line.endswith(" ") for line in printed.splitlines())


def test_show_says_how_every_weight_is_stored(artefact: Path) -> None:
    found = answer("show", artefact)
    assert sum(found["bytes"].values()) == found["size_bytes"] == artefact.stat().st_size
    assert {row["name"] for row in found["tensors"]} == set(file_manifest(artefact).tensors)
    assert all(row["representation"] == "Symmetric(4)" for row in found["tensors"])
    assert found["manifest"]["builder"]["laconic"] == "digits_cnn"
    text = laconic("show", artefact).stdout
    for word in ("conv1.weight", "16x1x3x3", "Symmetric(4)", "digits_cnn", "torch", "codes"):
        assert word in text


def test_show_and_measure_say_how_wide_everything_is(tmp_path: Path) -> None:
    """Few bits, blocks that share a code, rounded inputs and operands, and what stays float."""
    transformers = pytest.importorskip("transformers", reason="encoders need transformers")
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
    config = transformers.BertConfig(**sizes, num_hidden_layers=1, vocab_size=20)
    network, path = transformers.BertModel(config), tmp_path / "model.safetensors"
    scope = "*.word_embeddings, encoder.*"
    few = Quantize(Gobo(3), embedding=Product(block=4), activation=MinMax(6), scope=scope)
    for step in (few, Quantize(Symmetric(8), scope="pooler.*")):
        step.apply(State(network))
    save(network, path)
    found = answer("show", path)
    assert found["widths"] == {"weights": [3, 8], "embeddings": [2], "activations": [6]}
    assert found["represented"] == {"weights": [7, 7], "embeddings": [1, 3]}
    rounded = {row["name"]: row for row in found["activations"]}
    operands = rounded.pop("encoder.layer.0.attention.self")
    assert sorted(operands["places"]) == ["key", "probabilities", "query", "value"]
    assert len(rounded) == 6 and all(row["places"] == ["input"] for row in rounded.values())
    assert {row["activation"] for row in rounded.values()} == {"MinMax(6)"}
    words = "3/8-2-6 (weights-embeddings-activations), of 1 of 3 embeddings; the others are floats"
    assert words in laconic("show", path).stdout and words in laconic("measure", path).stdout
    assert "key, probabilities, query, value" in laconic("show", path).stdout
    assert "defaults" not in laconic("show", path).stdout


def test_a_patch_convolution_is_no_embedding(tmp_path: Path) -> None:
    """Tables of rows are embeddings, and so are the parts that took the place of one."""
    transformers = pytest.importorskip("transformers", reason="encoders need transformers")
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
    images = transformers.ViTConfig(**sizes, num_hidden_layers=1, image_size=8, patch_size=4)
    texts = transformers.BertConfig(**sizes, num_hidden_layers=1, vocab_size=200)
    path, found = tmp_path / "model.safetensors", []
    for network, steps in (
        (transformers.ViTModel(images), [Quantize(4, scope="*patch_embeddings*")]),
        (
            transformers.BertModel(texts),
            [
                Factorize(Embedding(4), scope="*.word_embeddings"),
                Quantize(4, embedding=8, scope="*.word_embeddings.*"),
            ],
        ),
    ):
        for step in steps:
            step.apply(State(network))
        save(network, path)
        found.append(answer("show", path))
        words = laconic("show", path).stdout
    assert found[0]["widths"] == {"weights": [4], "activations": [32]}
    assert found[0]["represented"] == {"weights": [1, 10]}
    assert found[1]["widths"] == {"weights": [32], "embeddings": [4, 8], "activations": [32]}
    assert found[1]["represented"] == {"weights": [0, 7], "embeddings": [2, 4]}
    assert "32-4/8-32 (weights-embeddings-activations), of 2 of 4 embeddings; the others" in words


def test_a_plain_network_without_embeddings_has_two_widths(tmp_path: Path) -> None:
    save(digits_cnn(), tmp_path / "model.safetensors")
    found = answer("measure", tmp_path / "model.safetensors")
    assert found["widths"] == {"weights": [32], "activations": [32]}
    assert "Rounded" not in laconic("show", tmp_path / "model.safetensors").stdout


def test_show_refuses_a_file_that_rounds_by_what_there_is_not(tmp_path: Path) -> None:
    state = State(digits_cnn())
    run_step(Quantize(activation=4, scope="fc*"), state)
    save(state.model, tmp_path / "x.safetensors")
    manifest, blobs = read(tmp_path / "x.safetensors")
    hostile = {"activations": {"fc1": {"input": "os.system"}}}
    write(tmp_path / "x.safetensors", manifest | hostile, blobs)
    assert "no activation is called 'os.system'" in refused("show", tmp_path / "x.safetensors")


def test_verify_compares_weights_and_logits(artefact: Path) -> None:
    found = answer("verify", artefact, "--logits")
    assert found["logits"] is True
    assert found["tensors"] == 5
    assert answer("verify", artefact)["logits"] is None
    assert "identical bit for bit" in laconic("verify", artefact, "--logits").stdout


def test_logits_under_other_threads_are_not_compared_and_it_is_said(artefact: Path) -> None:
    threads = torch.get_num_threads()
    try:
        found = laconic("verify", artefact, "--logits", "--threads", threads + 1)
    finally:
        torch.set_num_threads(threads)
    assert found.exit_code == 3
    assert "5 decoded weights match" in found.stdout
    there, here = ("1 thread" if n == 1 else f"{n} threads" for n in (threads, threads + 1))
    assert found.stderr.strip() == (
        f"the logits were not compared: those of the file come from {there}, not from {here} as "
        "here; compare under the same conditions"
    )


def test_a_file_without_logits_cannot_be_compared(tmp_path: Path) -> None:
    save(digits_cnn(), tmp_path / "x.safetensors")
    said = refused("verify", tmp_path / "x.safetensors", "--logits", code=3)
    assert said == "the logits were not compared: the file holds no probe"
    assert laconic("verify", tmp_path / "x.safetensors").exit_code == 0


def test_a_damaged_file_is_refused(artefact: Path, tmp_path: Path) -> None:
    content = bytearray(artefact.read_bytes())
    content[-1] ^= 1
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    for command in ("verify", "show", "measure"):
        assert "checksum" in refused(command, path)


@pytest.mark.parametrize("command", ["measure", "show", "verify"])
def test_a_file_that_is_not_there_is_refused(command: str, tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    assert refused(command, path) == f"{path}: no such file"


def test_a_report_is_of_a_folder(artefact: Path) -> None:
    assert refused("report", artefact) == (
        f"{artefact} is a file; give the folder of a run, such as {artefact.parent}"
    )


@pytest.mark.parametrize(
    ("option", "text"), [("--task", "{npz: x.npz}"), ("--model", "digits_cnn")]
)
def test_a_run_is_measured_on_its_own_data(option: str, text: str, artefact: Path) -> None:
    run = artefact.parent
    said = refused("measure", run, option, text)
    assert said.startswith(f"{run} is a run, whose measurements are made already; {option} is for")
    assert f"laconic measure {artefact} {option} " in said


@pytest.mark.parametrize("command", ["measure", "report"])
def test_a_folder_without_a_run_is_refused(command: str, tmp_path: Path) -> None:
    assert refused(command, tmp_path) == f"{tmp_path} holds no run (history.json is missing)"


@pytest.fixture(scope="module")
def stopped(folder: Path) -> Path:
    """Return the folder of a run that was stopped after its first step."""
    step = Quantize.apply

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    Quantize.apply = interrupted  # type: ignore[method-assign]
    try:
        words = ("compress", folder / "recipe.yaml", "--out", folder / "stopped")
        assert laconic(*words, "--device", "cpu").exit_code == 130
    finally:
        Quantize.apply = step  # type: ignore[method-assign]
    return folder / "stopped"


@pytest.mark.parametrize("words", [("measure",), ("report",), ("report", "--terminal")])
def test_a_run_that_was_stopped_is_unfinished(words: tuple[str, ...], stopped: Path) -> None:
    recipe = stopped / rundir.RECIPE
    again = ("compress", str(recipe), "--out", str(stopped), "--resume")
    said = (
        f"{stopped} is unfinished: 1 of 3 steps are done; where it was stopped, it goes on with: "
        f"laconic {' '.join(again)}"
    )
    command, *options = words
    assert laconic(command, stopped, *options).stdout.splitlines()[-1] == said
    assert answer(command, stopped, *options)["unfinished"] == said
    if command == "report" and not options:
        page = (stopped / rundir.REPORT).read_text(encoding="utf-8")
        assert "Unfinished: 1 of 3 steps are done." in page


def test_a_stopped_run_goes_on_as_it_is_told(stopped: Path, artefact: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    words = laconic("measure", tmp_path / "run").stdout.splitlines()[-1].partition("laconic ")[2]
    assert laconic(*words.split()).exit_code == 0
    assert (tmp_path / "run" / rundir.ARTIFACT).read_bytes() == artefact.read_bytes()
    assert answer("measure", tmp_path / "run")["unfinished"] == ""
    assert "unfinished" not in laconic("measure", tmp_path / "run").stdout


def test_a_run_of_python_goes_on_in_python(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    facts = json.loads((tmp_path / "run" / rundir.RUN).read_text(encoding="utf-8"))
    facts["recipe"] = "steps: [train, train]"
    (tmp_path / "run" / rundir.RUN).write_text(json.dumps(facts), encoding="utf-8")
    said = laconic("measure", tmp_path / "run").stdout.splitlines()[-1]
    assert said.endswith(f"compress(..., out='{tmp_path / 'run'}', resume=True)")


# -- errors ---------------------------------------------------------------------------------------


def test_an_error_is_an_event_too(tmp_path: Path) -> None:
    found = laconic("show", tmp_path / "x", "--json")
    assert json.loads(found.stdout) == {
        "event": "error",
        "message": f"{tmp_path / 'x'}: no such file",
    }
    assert found.exit_code == 2


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    found = laconic("show", tmp_path / "x", "--debug")
    assert found.exit_code == 2
    assert "Traceback" in found.stderr
    assert found.stderr.strip().endswith("no such file")


def test_what_the_system_refuses_is_a_message(tmp_path: Path) -> None:
    assert "Is a directory" in refused("schema", "--out", tmp_path)


@pytest.mark.parametrize("text", ["{", "3", "[]", ""])
def test_an_option_that_is_no_yaml_is_refused(text: str, artefact: Path) -> None:
    assert refused("measure", artefact, "--task", text).startswith(f"--task {text}: write a name")


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    code = """
from laconic.cli import app
from laconic.cli.command import command
@command()
def spill(output):
    for _ in range(1000):
        output.line("x" * 1000)
    return 0
app(["spill"])
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        assert started.stdout is not None
        assert started.stderr is not None
        started.stdout.close()
        said = started.stderr.read()
        assert started.wait() == 0
    assert said == b""


OWN = """\
import threading

import torch
from torch import nn


def boom(width=3):
    raise ValueError("my own bug")


def misused():
    return nn.Linear("a", 3)


def leaves():
    raise SystemExit


def on_meta():
    with torch.device("meta"):
        return nn.Linear(2, 3)


def script():
    return torch.jit.trace(nn.Linear(2, 3), torch.ones(1, 2))


def lazy():
    return nn.Sequential(nn.LazyLinear(3))


def locked():
    made = nn.Linear(2, 3)
    made.lock = threading.Lock()
    return made
"""
MODULES = {
    "own_works": OWN,
    "own_syntax": "x = 1\ndef f(:\n",
    "own_key": "x = 1\n{}['y']\n",
    "own_value": "x = 1\nint('zz')\n",
    "own_attribute": "x = 1\nx.nothing\n",
    "own_import": "x = 1\nimport nothing_there\n",
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put a user's own modules where Python looks, and forget them afterwards."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_works:boom", "ValueError: my own bug (own_works.py, line 8)"),
        ("own_works:leaves", "SystemExit (own_works.py, line 16)"),
        ("own_syntax:f", "SyntaxError: invalid syntax (own_syntax.py, line 2)"),
        ("own_key:f", "KeyError: 'y' (own_key.py, line 2)"),
        ("own_value:f", "ValueError: invalid literal for int() with base 10: 'zz' (own_value.py, "),
        ("own_attribute:f", "AttributeError: 'int' object has no attribute 'nothing' (own_attribu"),
        ("own_import:f", "ModuleNotFoundError: No module named 'nothing_there' (own_import.py, "),
    ],
)
@pytest.mark.usefixtures("own")
def test_what_the_users_own_code_raises_is_a_sentence(name: str, said: str, folder: Path) -> None:
    words = ("compress", folder / "recipe.yaml", "--check")
    assert refused(*words, "--model", name).startswith(f"model: '{name}' raised {said}")
    assert refused(*words, "--teacher", name).startswith(f"teacher: '{name}' raised {said}")
    assert refused(*words, "--task", name).startswith(f"task: '{name}' raised {said}")
    assert refused("measure", "x", "--model", name).startswith(f"model: '{name}' raised {said}")


@pytest.mark.usefixtures("own")
def test_the_place_is_the_users_where_a_package_refuses_what_it_is_given(folder: Path) -> None:
    said = refused("compress", folder / "recipe.yaml", "--model", "{'own_works:misused': {}}")
    assert said.startswith("model: 'own_works:misused' raised TypeError: ")
    assert said.endswith("(own_works.py, line 12)")


@pytest.mark.usefixtures("own")
def test_the_traceback_of_own_code_is_shown_on_demand(folder: Path) -> None:
    words = ("compress", folder / "recipe.yaml", "--model", "own_works:boom", "--debug")
    assert 'raise ValueError("my own bug")' in laconic(*words).stderr


def test_a_bug_of_laconic_goes_through_where_no_own_code_is_named() -> None:
    for line in ("digits_cnn", {"hf": "folder"}, {"laconic:load": {"path": "x"}}):
        with pytest.raises(ZeroDivisionError), own_code("model", line):
            raise ZeroDivisionError


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("on_meta", "'weight' of Linear is on the device 'meta' and holds no numbers; load its"),
        ("script", "TopLevelTracedModule is TorchScript, whose layers cannot be changed; give"),
        ("lazy", "'0.weight' of Sequential has no shape yet; call the network once, on an example"),
        ("locked", "Linear cannot be copied (TypeError: cannot pickle '_thread.lock' object); "),
    ],
)
@pytest.mark.usefixtures("own")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:Lazy modules")
def test_a_network_that_cannot_be_worked_on_is_a_sentence(
    name: str, said: str, folder: Path
) -> None:
    words = ("compress", folder / "recipe.yaml", "--check", "--model", f"own_works:{name}")
    assert refused(*words).startswith(said)


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    from laconic.cli import contents

    def broken(kind: str | None) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(contents, "catalogue", broken)
    with pytest.raises(ZeroDivisionError):
        laconic("list")


# -- the demonstration's folder -------------------------------------------------------------------


def test_the_demonstration_takes_new_empty_and_its_own_folders(tmp_path: Path) -> None:
    for name in ("new/er", "empty"):
        path = tmp_path / name
        if name == "empty":
            path.mkdir()
        demo._claim(path)
        (path / rundir.CHECKPOINT).touch()
        (path / "notes.txt").touch()
        demo._claim(path)
        assert not (path / rundir.CHECKPOINT).exists()
        assert (path / "notes.txt").exists()


def test_the_demonstration_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = Recipe((Prune("weights", keep=0.1), Quantize(4)))
    monkeypatch.setattr(Recipe, "read", classmethod(lambda cls, path: short))
    found = laconic("demo", "--out", tmp_path / "demo", "--threads", torch.get_num_threads())
    assert found.exit_code == 0, found.output
    assert "5 weights and all logits are identical bit for bit" in found.output
    assert (tmp_path / "demo" / demo.ORIGINAL).is_file()


def test_the_demonstration_leaves_other_folders_and_files_alone(tmp_path: Path) -> None:
    (tmp_path / rundir.CHECKPOINT).touch()
    file = tmp_path / "file"
    file.touch()
    for path in (tmp_path, file):
        with pytest.raises(RunError, match="is not a demonstration's; give another --out"):
            demo._claim(path)
    assert (tmp_path / rundir.CHECKPOINT).exists()


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


# -- output and prediction ------------------------------------------------------------------------


def test_json_holds_what_json_can_hold() -> None:
    data = {"a": math.nan, "b": (1, Path("x")), 3: {"c": -math.inf}, "d": None, "e": True, "f": 1.5}
    held = {"a": "nan", "b": [1, "x"], "3": {"c": "-inf"}, "d": None, "e": True, "f": 1.5}
    assert jsonable(data) == held


def test_log_lines_are_shown_while_working_and_not_afterwards(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = logging.getLogger("laconic.recover.train")
    before = (logging.getLogger("laconic").level, list(logging.getLogger("laconic").handlers))
    with Output().working():
        logger.info("an epoch")
    with Output(json=True).working():
        logger.info("as data")
    with Output(quiet=True).working():
        logger.info("too much")
        logger.warning("a warning")
    with Output().working(about="laconic.run"):
        logger.info("a detail")
        logger.warning("another warning")
    logger.info("afterwards")
    printed = capsys.readouterr()
    assert [line.split("  ")[1] for line in printed.err.splitlines()] == [
        "an epoch",
        "a warning",
        "another warning",
    ]
    assert json.loads(printed.out) == {"event": "log", "level": "info", "message": "as data"}
    root = logging.getLogger("laconic")
    assert (root.level, list(root.handlers)) == before


def test_a_narrow_terminal_gives_up_spare_columns_first_to_last() -> None:
    columns, rows = ("Step", "One", "Two", "Three"), [("prune", "1", "22", "333")]
    wide = sum(len(text) + 2 for text in ("prune", "One", "Two", "Three"))
    assert _fitting(columns, rows, ("Two", "One"), wide) == [0, 1, 2, 3]
    assert _fitting(columns, rows, ("Two", "One"), wide - 1) == [0, 1, 3]
    assert _fitting(columns, rows, ("Two", "One"), 3) == [0, 3]


def test_cells_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table(("Name", "Value"), [("[bold]x[/bold]", "[/]")])
    assert capsys.readouterr().out.splitlines()[1].split() == ["[bold]x[/bold]", "[/]"]
    Output(json=True).table(("Name",), [("x",)])
    Output(json=True).show(Text("x"))
    Output(json=True).line("x")
    assert capsys.readouterr().out == ""


def small_task() -> Task:
    images, labels = torch.zeros(50, 1, 8, 8), torch.arange(50) % 10
    return Task((images, labels), (images[:10], labels[:10]), (images[:10], labels[:10]))


@pytest.mark.parametrize(
    ("steps", "updates"),
    [
        ([Train(epochs=3, batch=20)], [9]),
        ([Prune("weights", keep=0.5, rounds=4, retrain=Train(epochs=2, batch=25))], [16]),
        ([Prune("weights", keep=0.5, retrain=Train(batch=50)), Train(batch=10)], [1, 5]),
        ([Train(batch=50, during=(Prune("weights", keep=0.5),)), Quantize(8)], [1, 0]),
    ],
)
def test_updates_are_counted_through_nested_training(steps: list[Any], updates: list[int]) -> None:
    found = predict(Recipe(tuple(steps)), digits_cnn(), small_task(), device="cpu")
    assert [row.updates for row in found.rows[1:]] == updates
    assert all((row.seconds > 0) == (row.updates > 0) for row in found.rows)


@pytest.mark.parametrize("steps", [(Prune("weights", keep=0.25), Quantize(4)), (Quantize(8),)])
def test_the_nominal_size_is_weights_times_keep_times_bits(steps: tuple[Any, ...]) -> None:
    model = digits_cnn()
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    others = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    keep, bits = (0.25, 4) if len(steps) == 2 else (1.0, 8)
    found = predict(Recipe(steps), model, None, device="cpu").rows[-1].nominal_bytes
    assert found == pytest.approx((weights * keep * bits + others * 32) / 8, abs=5)


def test_a_prediction_of_parts_fits_them_by_a_few_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    update = Descent.update
    monkeypatch.setattr(Descent, "update", lambda *args: taken.append(1) or update(*args))
    step = Reconstruct(solve=Gradient(3000, penalty=ProximalChannels(0.5)))
    first, last = predict(Recipe((step,)), digits_cnn(), small_task(), device="cpu").rows
    assert last.size_bytes < 0.6 * first.size_bytes
    assert last.updates == 3 * 3000 and last.seconds > 0
    assert len(taken) < 30


def test_a_prediction_changes_neither_the_network_nor_the_generator() -> None:
    model, task = digits_cnn(), small_task()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    predict(Recipe((Prune("weights", keep=0.5), Train(batch=25))), model, task, device="cpu")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(task.train) == 50
    assert len(task.validate) == 10


def test_a_prediction_lends_the_network_as_its_own_teacher() -> None:
    steps = (
        Prune("weights", keep=0.5, retrain=Train(0.5 * Label() + 0.5 * Logits(4.0), batch=25)),
        Train(Hint("output:conv1"), batch=50),
    )
    found = predict(Recipe(steps), digits_cnn(), small_task(), device="cpu")
    assert [row.updates for row in found.rows[1:]] == [2, 1]
    assert all(row.seconds > 0 for row in found.rows[1:])


def test_a_prediction_refuses_features_that_the_network_does_not_have() -> None:
    recipe = Recipe((Train(Hidden(), batch=25),))
    with pytest.raises(FeatureError, match="0 layers of the student"):
        predict(recipe, digits_cnn(), small_task(), device="cpu")


def test_trainings_are_found_however_deep() -> None:
    inner = Prune("weights", keep=0.5, rounds=2, retrain=Train(epochs=3))
    outer = Prune("weights", keep=0.5, rounds=5, retrain=inner)
    assert list(trainings(outer)) == [(Train(epochs=3), 10)]
    assert list(trainings(Quantize(4))) == []


def test_one_process_of_several_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    assert laconic("list", "steps").stdout
    monkeypatch.setattr("laconic.ranks.prints", lambda: False)
    found = laconic("list", "steps")
    assert (found.exit_code, found.stdout) == (0, "")
