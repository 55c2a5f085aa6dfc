"""Commands on a compressed file: measure, analyse, show and verify."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.cli import answer, finished_run, laconic, refused
from laconic import rundir
from laconic.cli.contents import file_manifest
from laconic.models import digits_cnn
from laconic.ship import save
from laconic.ship.container import read, write
from laconic.step import State, run_step
from laconic.structure import Embedding, Factorize
from laconic.weights import Gobo, MinMax, Product, Quantize, Symmetric

PLAIN = """
import torch
from laconic.tasks import Task

def task():
    images = torch.zeros(20, 1, 8, 8)
    scored = images, torch.arange(20) % 10
    return Task.from_arrays(images, scored, validate=scored)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe, its data, and the run the recipe made."""
    return finished_run(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def artefact(folder: Path) -> Path:
    return folder / "run" / rundir.ARTIFACT


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


def test_analyse_writes_a_page(artefact: Path, folder: Path, tmp_path: Path) -> None:
    task, path = f"{{npz: {folder / 'digits.npz'}}}", tmp_path / "page.html"
    found = answer("analyse", artefact, "--task", task, "--batches", 1, "--out", path)
    assert Path(found["report"]) == path
    assert "<html" in path.read_text(encoding="utf-8").lower()
    assert list(found["eigenvalues"]["values"][artefact.stem]) == list(found["bits"]["scores"])
    assert set(found["bits"]["scores"]["conv1"]) == {"2 bit", "4 bit", "8 bit"}
    assert "task" in refused("analyse", artefact)


def test_analyse_refuses_data_that_do_not_fit(artefact: Path, tmp_path: Path) -> None:
    images, labels = np.zeros((20, 3, 8, 8), np.float32), np.arange(20) % 10
    data = {f"{part}_images": images for part in ("train", "test")}
    np.savez(tmp_path / "d.npz", **data, train_labels=labels, test_labels=labels)
    said = refused("analyse", artefact, "--task", f"{{npz: {tmp_path / 'd.npz'}}}")
    assert "the network cannot be called with inputs [2, 3, 8, 8]" in said


def test_analyse_compares_files_of_one_network(folder: Path, tmp_path: Path) -> None:
    task, path = f"{{npz: {folder / 'digits.npz'}}}", tmp_path / "page.html"
    network, files = (
        digits_cnn(),
        [tmp_path / f"{kind}.safetensors" for kind in ("float", "binary")],
    )
    save(network, files[0])
    run_step(Quantize("binary"), State(network))
    save(network, files[1])
    words = ("--task", task, "--batches", 1, "--out", path)
    found = answer("analyse", *files, *words)["eigenvalues"]["values"]
    assert list(found) == ["float", "binary"] and found["float"] != found["binary"]
    for name, one in zip(found, files, strict=True):
        assert found[name] == answer("analyse", one, *words)["eigenvalues"]["values"][name]
    again = tmp_path / "again" / "float.safetensors"
    again.parent.mkdir()
    again.write_bytes(files[1].read_bytes())
    same_stems = answer("analyse", files[0], again, *words)["eigenvalues"]["values"]
    assert list(same_stems) == [str(files[0]), str(again)]
    assert "no such file" in refused("analyse", files[0], tmp_path / "none", *words)


def test_analyse_refuses_examples_without_targets_before_the_work(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("laconic.cli.contents.file_analyses", lambda *_, **__: pytest.fail("ran"))
    (tmp_path / "plain.py").write_text(PLAIN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    said = refused("analyse", artefact, "--task", "plain:task")
    assert "have no targets" in said and "laconic measure" in said


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


@pytest.mark.parametrize("words", [("analyse", "FILE", "--task", "digits"), ("schema",)])
def test_where_nothing_can_be_written_is_told_before_the_work(
    words: tuple[str, ...], artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("laconic.cli.contents.file_analyses", lambda *_, **__: pytest.fail("ran"))
    (tmp_path / "file").write_text("")
    given = [artefact if word == "FILE" else word for word in words]
    said = refused(*given, "--out", tmp_path / "file" / "x.html")
    assert "nothing can be written there" in said and "choose another --out" in said
