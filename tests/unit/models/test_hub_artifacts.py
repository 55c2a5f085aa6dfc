"""Artefacts of transformers' networks: the file alone rebuilds them, edited ones too."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from helpers.hub import SMALL, behead, cut, outputs, same, small, transformers
from laconic.errors import ArtifactError
from laconic.ship import load, save, verify
from laconic.ship.container import read
from laconic.structure.surgery import edits_of, keep_, replace_
from laconic.weights import Ternary, bake, lay


@pytest.fixture
def bert() -> nn.Module:
    return small()


@pytest.mark.parametrize("name", SMALL)
def test_an_artefact_needs_nothing_but_the_file(name, tmp_path):
    model = small(name, num_labels=3)
    for module in ("classifier", "pooler.dense"):
        if f"{module}.weight" in model.state_dict():
            lay(model, f"{module}.weight", Ternary())
    save(model, tmp_path / "a")
    assert read(tmp_path / "a")[0]["builder"].keys() == {"hf"}
    before = torch.random.get_rng_state()
    again = load(tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert type(again) is type(model)
    assert torch.equal(outputs(again), outputs(model))
    assert not any(tensor.is_meta for tensor in [*again.parameters(), *again.buffers()])


def test_what_was_loaded_is_saved_to_the_same_bytes(bert, tmp_path):
    lay(bert, "classifier.weight", Ternary())
    keep_(bert, "bert.encoder.layer", [2, 0])
    save(bert, tmp_path / "a")
    assert verify(tmp_path / "a").tensors == 1
    save(load(tmp_path / "a"), tmp_path / "b")
    bake(bert)
    save(bert, tmp_path / "c")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_a_file_names_the_version_of_transformers(bert, tmp_path):
    save(bert, tmp_path / "a")
    assert read(tmp_path / "a")[0]["versions"]["transformers"] == transformers.__version__


def test_tied_weights_stay_tied(tmp_path):
    model = small("BertForMaskedLM")
    save(model, tmp_path / "a")
    again = load(tmp_path / "a")
    assert again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight


def test_an_edited_network_is_rebuilt_from_its_file(bert, tmp_path):
    cut(bert, "bert.encoder.layer.2", 7)
    behead(bert, "bert.encoder.layer.2", 2, 5)
    keep_(bert, "bert.encoder.layer", [0, 2])
    replace_(bert, "bert.encoder.layer.0.output.dense", nn.Sequential(
        nn.Linear(20, 4, bias=False), nn.Linear(4, 24)
    ))  # fmt: skip
    lay(bert, "bert.encoder.layer.1.output.dense.weight", Ternary("row"))
    save(bert, tmp_path / "a")
    manifest = read(tmp_path / "a")[0]
    assert manifest["builder"]["hf"]["config"]["num_hidden_layers"] == 3
    assert manifest["edits"]["lists"] == {"bert.encoder.layer": [0, 2]}
    again = load(tmp_path / "a")
    same(again, bert)
    assert edits_of(again) == edits_of(bert)
    same(load(tmp_path / "a", model=small()), bert)
    behead(again, "bert.encoder.layer.0", 1)
    save(again, tmp_path / "b")
    same(load(tmp_path / "b"), again)


def test_a_network_changed_by_hand_is_its_users_own(bert, tmp_path, caplog):
    bert.classifier = nn.Linear(24, 7)
    with caplog.at_level(logging.WARNING):
        save(bert, tmp_path / "a")
    assert "not as its builder and recorded edits make it" in caplog.text
    with pytest.raises(ArtifactError, match="BertForSequenceClassification', code that a file"):
        load(tmp_path / "a")
    plain = small()
    plain.classifier = nn.Linear(24, 7)
    same(load(tmp_path / "a", model=copy.deepcopy(plain)), bert)
    cut(bert, "bert.encoder.layer.0", 3)
    save(bert, tmp_path / "a")
    same(load(tmp_path / "a", model=plain), bert)


def test_a_configuration_no_file_may_hold_is_its_users_own(tmp_path):
    model = small(num_hidden_layers=66, hidden_size=6, intermediate_size=2)
    save(model, tmp_path / "a")
    assert "custom" in read(tmp_path / "a")[0]["builder"]


def test_the_configuration_of_before_the_first_edit_counts(bert, tmp_path):
    keep_(bert, "bert.encoder.layer", [1])
    bert.config.num_hidden_layers = 1
    save(bert, tmp_path / "a")
    same(load(tmp_path / "a"), bert)
