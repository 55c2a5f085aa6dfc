"""Builders of transformers' networks in a file: every class, and hostile ones refused."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from torch import nn

from helpers.hub import TEXT, small, transformers
from laconic.errors import ModelError
from laconic.models import build, configs, hf_builder


@pytest.fixture
def bert() -> nn.Module:
    return small()


@pytest.mark.parametrize("name", sorted(configs.CLASSES))
def test_every_class_of_the_list_is_built_again(name):
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class())
        builder = json.loads(json.dumps(hf_builder(model)))
        again = build(builder)
    assert [(key, value.shape) for key, value in again.state_dict().items()] == [
        (key, value.shape) for key, value in model.state_dict().items()
    ]
    assert again.laconic == {"builder": builder}


def test_a_class_of_the_list_may_lose_an_option(bert):
    builder = hf_builder(bert)
    builder["hf"]["defaults"]["an_option_of_before"] = True
    assert build(builder).config.hidden_size == 24
    builder["hf"]["config"]["an_option_of_later"] = True
    with pytest.raises(ModelError, match=r"has no \['an_option_of_later'\] in the transformers"):
        build(builder)


def changed(**fields: Any) -> dict[str, Any]:
    kind = transformers.BertForSequenceClassification
    with torch.device("meta"):
        builder = hf_builder(kind(transformers.BertConfig(**TEXT)))
    builder["hf"]["config"] |= fields
    return builder


HOSTILE = [
    ({"hf": None}, "needs 'class', 'config' and 'defaults'"),
    ({"hf": {"class": "BertModel"}}, "needs 'class', 'config' and 'defaults'"),
    ({"hf": {}, "arguments": {}}, "is none; the file is damaged"),
    *(
        ({"hf": {"class": name, "config": {}, "defaults": {}}}, "no class .* may be built")
        for name in (
            *("GPT2Model", "AutoModel", "pipeline", "__version__", "os.system", None, 1, ["a"]),
            *("BertConfig", "BertPreTrainedModel", "x" * 10**6, "\ud800"),
        )
    ),
    ({"hf": {"class": "BertModel", "config": [], "defaults": {}}}, "must be a mapping"),
    ({"hf": {"class": "BertModel", "config": {}, "defaults": None}}, "must be a mapping"),
    ({"timm": 3, "arguments": {}}, "is none; the file is damaged"),
    ({"timm": "resnet18"}, "is none; the file is damaged"),
    ({"timm": "resnet18", "arguments": {"pretrained": True}}, "'pretrained' is not an option"),
    ({"timm": "resnet18", "arguments": {"num_classes": 10**9}}, "num_classes 1000000000 is out"),
    ({"timm": "resnet18", "arguments": {"num_classes": True}}, "num_classes True is out of"),
    ({"torchvision": "resnet18", "arguments": {"weights": "DEFAULT"}}, "'weights' is not an op"),
    ({"torchvision": "resnet18", "timm": "resnet18", "arguments": {}}, "is none; the file is"),
]


ABSURD = [
    *({"hidden_size": value} for value in (0, -1, 10**9, 10**400, 1.5, "24", True, [24], None)),
    *({"num_hidden_layers": value} for value in (0, -1, 65, 10**9, 2.0, None, "3")),
    *({"max_position_embeddings": value} for value in (0, -1, 10**7, 16.0)),
    *({"num_attention_heads": value} for value in (0, -3, 5, 10**6)),
    *({"vocab_size": value} for value in (-1, 10**8)),
    *({"hidden_act": value} for value in ("nothing", "x" * 100, 3, None)),
    *({"attn_implementation": value} for value in ("flash_attention_2", "a/b", None, {}, 3)),
    *({"id2label": value} for value in ({}, {"a": "b"}, {"1": "a"}, {"0": 1}, ["a"])),
    {"id2label": {"0": "x" * 999}},
    *({"num_labels": value} for value in (0, -1, 10**7, 2.0, "2")),
    *({key: 1} for key in ("auto_map", "dtype", "torch_dtype", "architectures", "__class__", "")),
    *({key: {}} for key in ("quantization_config", "per_layer_config", "pad_token_id")),
    {"layer_norm_eps": 10**400},
    {"problem_type": [1] * 100},
    {"use_cache": [[1]]},
]  # fmt: skip


@pytest.mark.parametrize(
    ("builder", "message"),
    HOSTILE,
    ids=lambda value: repr(value)[:60],
)
def test_a_hostile_builder_is_refused(builder, message):
    with torch.device("meta"), pytest.raises(ModelError, match=message) as caught:
        build(builder)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("fields", ABSURD, ids=lambda value: repr(value)[:60])
def test_an_absurd_configuration_is_refused(fields):
    with torch.device("meta"), pytest.raises(ModelError) as caught:
        build(changed(**fields))
    assert len(str(caught.value)) < 700


def test_nothing_is_computed_that_a_file_holds():
    fields = {"vocab_size": 9, "max_position_embeddings": 1 << 17, "dim": 1 << 12, "n_heads": 1}
    config = {**fields, "n_layers": 1, "hidden_dim": 1, "sinusoidal_pos_embds": True}
    builder = {"class": "DistilBertModel", "config": config, "defaults": {}}
    with torch.device("meta"):
        model = build({"hf": builder})
    assert model.embeddings.position_embeddings.weight.shape == (1 << 17, 1 << 12)


LARGE = {
    "hidden_size": 1 << 20,
    "num_attention_heads": 1,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 20,
    "max_position_embeddings": 1 << 17,
    "num_hidden_layers": 64,
}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("BertModel", {**LARGE, "is_decoder": True, "add_cross_attention": True}),
        ("AlbertModel", {**LARGE, "num_hidden_groups": 16, "inner_group_num": 4}),
        ("MobileBertModel", {**LARGE, "num_feedforward_networks": 8}),
        ("ResNetModel", {"depths": [48] * 8, "hidden_sizes": [1 << 20] * 8}),
        ("BertForSequenceClassification", {"num_labels": 100_000}),
    ],
)
def test_the_largest_network_to_be_asked_for_takes_little_time(name, config):
    start = time.process_time()
    with torch.device("meta"):
        build({"hf": {"class": name, "config": config, "defaults": {}}})
    assert time.process_time() - start < 5.0


def test_other_modules_have_no_builder_of_transformers():
    with pytest.raises(ModelError, match="Linear is no class of transformers that a file may"):
        hf_builder(nn.Linear(2, 2))
    config = transformers.GPT2Config(n_layer=1, n_embd=4, n_head=1, vocab_size=8)
    with pytest.raises(ModelError, match="GPT2Model is no class of transformers"):
        hf_builder(transformers.GPT2Model(config))
