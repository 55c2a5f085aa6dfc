"""Networks written back into a folder of Hugging Face, and what no class can express."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from helpers.hub import SMALL, behead, cut, outputs, same, small, task_of
from laconic.errors import ModelError
from laconic.models import hf, save_pretrained
from laconic.ship import load, save
from laconic.structure.surgery import keep_, replace_, resize_, set_attributes_
from laconic.weights import Ternary, lay


@pytest.fixture
def bert() -> nn.Module:
    return small()


@pytest.mark.parametrize("name", SMALL)
def test_a_baked_network_becomes_a_folder(name, tmp_path, capfd):
    model = small(name, num_labels=3)
    save_pretrained(model, tmp_path)
    assert capfd.readouterr() == ("", "")
    same(hf(tmp_path, task=task_of(name)), model)
    theirs = type(model).from_pretrained(tmp_path)
    assert torch.equal(outputs(theirs), outputs(model))


def test_a_uniformly_smaller_network_becomes_a_folder(bert, tmp_path):
    keep_(bert, "bert.encoder.layer", [0, 2])
    for place in range(2):
        cut(bert, f"bert.encoder.layer.{place}", 7)
    save_pretrained(bert, tmp_path)
    again = type(bert).from_pretrained(tmp_path)
    assert torch.equal(outputs(again), outputs(bert))
    assert (again.config.num_hidden_layers, again.config.intermediate_size) == (2, 7)
    assert (bert.config.num_hidden_layers, bert.config.intermediate_size) == (2, 20)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in bert.parameters())


def test_fewer_heads_of_a_vit_become_a_folder(tmp_path):
    model = small("ViTForImageClassification")
    for place in range(3):
        path = f"vit.layers.{place}.attention"
        for part in ("q_proj", "k_proj", "v_proj"):
            for kind in ("weight", "bias"):
                resize_(
                    model,
                    f"{path}.{part}.{kind}",
                    model.get_parameter(f"{path}.{part}.{kind}")[:16],
                )
            set_attributes_(model, f"{path}.{part}", {"out_features": 16})
        resize_(
            model, f"{path}.o_proj.weight", model.get_parameter(f"{path}.o_proj.weight")[:, :16]
        )
        set_attributes_(model, f"{path}.o_proj", {"in_features": 16})
        set_attributes_(model, path, {"num_attention_heads": 2})
    save_pretrained(model, tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    assert again.config.num_attention_heads == 2
    same(hf(tmp_path), model)


def all_layers(edit: Any, *arguments: int) -> Any:
    def run(model: nn.Module) -> None:
        for place in range(3):
            edit(model, f"bert.encoder.layer.{place}", *arguments)

    return run


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda m: cut(m, "bert.encoder.layer.1", 7),
            "cannot express this network: neuron differs between layers: 20, 7, 20; laconic.save",
        ),
        (
            lambda m: behead(m, "bert.encoder.layer.1", 2),
            "head differs between layers: 3, 2, 3; laconic.save keeps it as it is",
        ),
        (
            all_layers(behead, 2),
            "2 heads of 8 are 16 numbers, but its configuration makes heads of .* = 24 / 2",
        ),
        (all_layers(behead, 3, 4), "3 heads of 4 are 12 numbers, but its configuration makes"),
        (
            lambda m: replace_(m, "classifier", nn.Sequential(nn.Linear(24, 4), nn.Linear(4, 2))),
            r"no 'classifier.weight', no 'classifier.bias', 'classifier.0.weight' is another and",
        ),
        (
            lambda m: replace_(m, "bert.pooler.activation", nn.ReLU()),
            r"'bert.pooler.activation' is ReLU, not Tanh",
        ),
        (
            lambda m: replace_(m, "bert.encoder.layer.0.output.dense", nn.Sequential()),
            r"cannot express this network: no 'bert.encoder",
        ),
        (
            lambda m: replace_(m, "bert.encoder.layer.0.intermediate.dense", nn.Identity()),
            r"cannot express this network: no 'bert.encoder.*dense.weight'",
        ),
        (lambda m: lay(m, "classifier.weight", Ternary()), r"'classifier' is laid; bake the net"),
    ],
)
def test_what_a_class_cannot_express_is_refused(bert, tmp_path, edit, message):
    edit(bert)
    with pytest.raises(ModelError, match=message):
        save_pretrained(bert, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_told(bert, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="cannot be written"):
        save_pretrained(bert, tmp_path / "file")


def test_a_published_encoder(laconic_data, tmp_path):
    folder = laconic_data / "encoder_minilm_l6_h384"
    if not folder.is_dir():
        pytest.skip("the data hold no encoder_minilm_l6_h384")
    model = hf(folder, num_labels=3)
    keep_(model, "bert.encoder.layer", [0, 5])
    save(model, tmp_path / "a")
    same(load(tmp_path / "a"), model)
    save_pretrained(model, tmp_path / "folder")
    same(hf(tmp_path / "folder"), model)
