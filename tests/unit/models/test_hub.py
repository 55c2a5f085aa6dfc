"""Folders of Hugging Face: what is read, which head is drawn, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.hub import SMALL, same, small, task_of
from laconic.errors import MissingExtra, ModelError
from laconic.models import build, hf, hf_builder, load_model
from laconic.ship import load, save


@pytest.fixture
def bert() -> nn.Module:
    return small()


@pytest.fixture
def folder(bert, tmp_path) -> Path:
    bert.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize("name", SMALL)
def test_a_folder_is_read(name, tmp_path, capfd):
    model = small(name, num_labels=3)
    model.save_pretrained(tmp_path)
    capfd.readouterr()
    again = hf(tmp_path, task=task_of(name))
    assert capfd.readouterr() == ("", "")
    same(model, again)
    assert not again.training
    builder = again.laconic["builder"]
    assert builder == hf_builder(model) and json.loads(json.dumps(builder)) == builder
    with torch.device("meta"):
        empty = build(builder)
    assert {key: value.shape for key, value in empty.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert empty.laconic["builder"] == builder


def test_classification_is_the_default(folder, tmp_path):
    assert type(hf(folder)).__name__ == "BertForSequenceClassification"
    small("ViTForImageClassification").save_pretrained(tmp_path / "vit")
    assert type(hf(tmp_path / "vit")).__name__ == "ViTForImageClassification"
    with pytest.raises(ModelError, match="task 'masked-lm' is not one of 'vit'"):
        hf(tmp_path / "vit", task="masked-lm")


def test_half_precision_becomes_single(bert, tmp_path):
    bert.half().save_pretrained(tmp_path)
    model = hf(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.classifier.weight.half(), bert.classifier.weight)


def test_a_head_that_is_not_there_is_drawn(tmp_path):
    small("BertModel").save_pretrained(tmp_path)
    torch.manual_seed(1)
    first = hf(tmp_path, num_labels=5)
    torch.manual_seed(1)
    second = hf(tmp_path, num_labels=5)
    assert first.classifier.weight.shape == (5, 24)
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    assert first.laconic["builder"]["hf"]["config"]["num_labels"] == 5


def test_another_number_of_labels_draws_another_head(folder, bert):
    assert hf(folder, num_labels=2).classifier.weight.shape == (2, 24)
    model = hf(folder, num_labels=4)
    assert model.classifier.weight.shape == (4, 24)
    assert torch.equal(model.bert.pooler.dense.weight, bert.bert.pooler.dense.weight)


def test_labels_have_names(tmp_path):
    model = small(id2label={0: "no", 1: "yes", 2: "maybe"}, label2id={"no": 0})
    model.save_pretrained(tmp_path)
    again = hf(tmp_path)
    assert again.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert again.config.label2id == {"no": 0, "yes": 1, "maybe": 2}
    built = build(again.laconic["builder"])
    assert built.config.id2label == again.config.id2label
    assert built.config.label2id == again.config.label2id


def test_the_way_to_compute_attention_is_kept(folder):
    assert hf(folder).config._attn_implementation == "sdpa"
    model = hf(folder, attention="eager")
    assert model.config._attn_implementation == "eager"
    assert build(model.laconic["builder"]).config._attn_implementation == "eager"
    with pytest.raises(ModelError, match="attention 'flash' is none of"):
        hf(folder, attention="flash")


def test_a_recipe_names_a_folder(folder, bert, tmp_path):
    same(load_model({"hf": "bert"}, base=tmp_path), bert)
    assert type(load_model({"hf": str(folder), "task": "base"})).__name__ == "BertModel"
    state = {key: value + 1 for key, value in bert.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    model = load_model({"hf": "bert", "weights": "w.safetensors"}, base=tmp_path)
    assert torch.equal(model.classifier.bias, bert.classifier.bias + 1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"hf": 3}, "hf: a name is needed, got 3"),
        ({"hf": None}, "hf: a name is needed"),
        ({"hf": "bert", "tasks": "base"}, "'tasks' is not an option; did you mean 'task'"),
        ({"hf": "bert", "trust_remote_code": True}, "'trust_remote_code' is not an option"),
        ({"hf": "bert", "task": "bas"}, "task 'bas' is not one of 'bert'; did you mean 'base'"),
        ({"hf": "bert", "num_labels": 0}, "num_labels 0 is out of bounds"),
        ({"hf": "bert", "num_labels": "3"}, "num_labels '3' is out of bounds"),
        ({"hf": "nowhere"}, r"nowhere/config\.json: cannot be read; name a Hugging Face folder"),
        ({"hf": "bert", "weights": "no.safetensors"}, r"no\.safetensors: cannot be read"),
    ],
)
def test_a_model_line_that_is_wrong_is_refused(folder, spec, message):
    with pytest.raises(ModelError, match=message):
        load_model(spec, base=folder.parent)


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "networks of the type 'gpt2' are not known"),
        ({"model_type": None}, "networks of the type 'None' are not known"),
        ({"num_hidden_layers": 4}, r"no weights of a BertFor.* for bert\.encoder\.layer\.3"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers 1000000 is out of bounds"),
        ({"hidden_size": 36}, "does not hold a BertForSequenceClassification"),
        ({"num_attention_heads": 5}, "does not hold|cannot be built"),
        ({"hidden_act": "no"}, "does not hold|cannot be built"),
        ({"vocab_size": "40"}, "cannot be built from its configuration: .*vocab_size"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(folder, fields, message):
    edit_config(folder, **fields)
    with pytest.raises(ModelError, match=message):
        hf(folder)


def test_code_in_a_folder_is_never_run(folder):
    (folder / "own.py").write_text("raise SystemExit('it ran')\n")
    maps = {"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Model"}
    edit_config(folder, auto_map=maps, architectures=["Own"])
    assert type(hf(folder)).__name__ == "BertForSequenceClassification"


def test_pickles_are_never_read(folder, bert):
    (folder / "model.safetensors").unlink()
    torch.save(bert.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no safetensors file, and pickles are never read"):
        hf(folder)


def test_weights_that_are_wrong_are_refused(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    state["classifier.bias"][0] = torch.nan
    save_file(state, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"'classifier\.bias' holds NaN"):
        hf(folder)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ModelError, match="does not hold a BertForSequenceClassification"):
        hf(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="is no configuration"):
        hf(folder)


def test_transformers_that_is_not_there_is_named(folder, bert, tmp_path, monkeypatch):
    save(bert, tmp_path / "a")
    monkeypatch.setitem(sys.modules, "transformers", None)
    for work in (lambda: hf(folder), lambda: load(tmp_path / "a")):
        with pytest.raises(
            MissingExtra, match=r"'transformers' is not installed.*install '\.\[hf\]'"
        ):
            work()
