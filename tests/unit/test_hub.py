"""Networks of Hugging Face, timm and torchvision: folders, builders in a file, and back."""

from __future__ import annotations

import copy
import json
import logging
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from laconic.errors import ArtifactError, MissingExtra, ModelError
from laconic.models import build, configs, hf, hf_builder, load_model, save_pretrained
from laconic.ship import load, save, verify
from laconic.ship.container import read
from laconic.structure.surgery import edits_of, keep_, replace_, resize_, set_attributes_
from laconic.weights import Ternary, bake, lay

transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")

TEXT = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1}
VIT = {**IMAGE, **{key: TEXT[key] for key in list(TEXT)[1:5]}}
SMALL: dict[str, dict[str, Any]] = {
    "AlbertForSequenceClassification": {**TEXT, "embedding_size": 6},
    "BertForSequenceClassification": TEXT,
    "BertForMaskedLM": TEXT,
    "BertModel": TEXT,
    "DistilBertForSequenceClassification": {
        "vocab_size": 40,
        "dim": 24,
        "n_layers": 2,
        "n_heads": 3,
        "hidden_dim": 20,
        "max_position_embeddings": 16,
    },
    "ElectraForSequenceClassification": {**TEXT, "embedding_size": 6},
    "MobileBertForSequenceClassification": {
        **TEXT,
        "num_attention_heads": 2,
        "embedding_size": 6,
        "intra_bottleneck_size": 8,
    },
    "RobertaForTokenClassification": TEXT,
    "ViTForImageClassification": VIT,
    "ResNetForImageClassification": {
        "num_channels": 1,
        "embedding_size": 4,
        "hidden_sizes": [4, 6],
        "depths": [1, 2],
        "layer_type": "basic",
    },
    "ConvNextForImageClassification": {
        **IMAGE,
        "hidden_sizes": [4, 6],
        "depths": [1, 1],
        "num_stages": 2,
        "patch_size": 2,
    },
}


def small(name: str = "BertForSequenceClassification", **fields: Any) -> nn.Module:
    """Return a network of a class of transformers, away from its start."""
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**SMALL[name] | fields))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).mul(0.1))
    return model.eval()


def inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)}
    tokens = torch.arange(14).reshape(2, 7) * 5 % 40
    return {"input_ids": tokens, "attention_mask": (torch.arange(7) < 5).long().expand(2, 7)}


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(model))[0]


def same(left: nn.Module, right: nn.Module) -> None:
    assert type(left) is type(right)
    assert torch.equal(outputs(left), outputs(right))


@pytest.fixture
def bert() -> nn.Module:
    return small()


@pytest.fixture
def folder(bert, tmp_path) -> Path:
    bert.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


# A folder of Hugging Face.


def task_of(name: str) -> str:
    prefixes, tasks = (
        (configs.IMAGES, configs.IMAGE_TASKS)
        if "Image" in name
        else (configs.TEXTS, configs.TEXT_TASKS)
    )
    prefix = max((each for each in prefixes.values() if name.startswith(each)), key=len)
    return next(task for task, suffix in tasks.items() if prefix + suffix == name)


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


# A builder in a file.


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


# Artefacts.


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


def cut(model: nn.Module, path: str, neurons: int) -> None:
    """Keep the first neurons of a feed-forward part of BERT."""
    inner, outer = f"{path}.intermediate.dense", f"{path}.output.dense"
    for name, kept in ((f"{inner}.weight", neurons), (f"{inner}.bias", neurons)):
        resize_(model, name, model.get_parameter(name)[:kept])
    resize_(model, f"{outer}.weight", model.get_parameter(f"{outer}.weight")[:, :neurons])
    set_attributes_(model, inner, {"out_features": neurons})
    set_attributes_(model, outer, {"in_features": neurons})


def behead(model: nn.Module, path: str, heads: int, size: int = 8) -> None:
    """Keep the first heads of an attention of BERT, of their first dimensions."""
    attention = f"{path}.attention.self"
    for part in ("query", "key", "value"):
        for kind in ("weight", "bias"):
            name = f"{attention}.{part}.{kind}"
            tensor = model.get_parameter(name)
            resize_(model, name, tensor.unflatten(0, (3, 8))[:heads, :size].flatten(0, 1))
        set_attributes_(model, f"{attention}.{part}", {"out_features": heads * size})
    name = f"{path}.attention.output.dense"
    weight = model.get_parameter(f"{name}.weight").unflatten(1, (3, 8))[:, :heads, :size]
    resize_(model, f"{name}.weight", weight.flatten(1))
    set_attributes_(model, name, {"in_features": heads * size})
    set_attributes_(
        model,
        attention,
        {
            "num_attention_heads": heads,
            "attention_head_size": size,
            "all_head_size": heads * size,
        },
    )


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


# Back into a folder.


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


# timm and torchvision.


def pretend(
    monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module] = nn.Linear
) -> list[tuple[Any, ...]]:
    """Stand in for both packages; return what they are asked for."""
    asked: list[tuple[Any, ...]] = []

    def make(name: str, **arguments: Any) -> nn.Module:
        asked.append((name, arguments))
        return kind(2, arguments.get("num_classes", 10))

    names = {"list_models": lambda: ["resnet18", "resnet34"]}
    timm = SimpleNamespace(**names, create_model=make)
    vision = SimpleNamespace(models=SimpleNamespace(**names, get_model=make))
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "torchvision", vision)
    return asked


@pytest.mark.parametrize(
    ("name", "none"), [("timm", {"pretrained": False}), ("torchvision", {"weights": None})]
)
def test_a_package_of_networks_is_asked_by_name(name, none, monkeypatch, tmp_path):
    asked = pretend(monkeypatch)
    model = load_model({name: "resnet18", "num_classes": 3})
    assert asked == [("resnet18", {"num_classes": 3, **none})]
    assert model.laconic["builder"] == {name: "resnet18", "arguments": {"num_classes": 3}}
    save(model, tmp_path / "a")
    assert torch.equal(load(tmp_path / "a").weight, model.weight)
    with pytest.raises(ModelError, match="no network 'resnet19'; did you mean 'resnet18'"):
        load_model({name: "resnet19"})
    with pytest.raises(ModelError, match="'pretrained' is not an option"):
        load_model({name: "resnet18", "pretrained": True})
    save_file({"weight": torch.ones(3, 2), "bias": torch.ones(3)}, tmp_path / "w")
    model = load_model({name: "resnet18", "num_classes": 3, "weights": "w"}, base=tmp_path)
    assert model.weight.sum() == 6


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_what_a_package_cannot_build_is_told(name, monkeypatch, tmp_path, caplog):
    class Stubborn(nn.Linear):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            if self.weight.is_meta:
                raise RuntimeError("Tensor on device meta is not on the expected device")

    pretend(monkeypatch, Stubborn)
    model = load_model({name: "resnet18"})
    with torch.device("meta"), pytest.raises(ModelError, match=f"{name} cannot build 'resnet18'"):
        build(model.laconic["builder"])
    save(model, tmp_path / "a")
    assert "load it with load(path, model=...)" in caplog.text
    again = load(tmp_path / "a", model=load_model({name: "resnet18"}))
    assert torch.equal(again.weight, model.weight)


def test_buffers_that_a_package_fills_are_filled(monkeypatch, tmp_path):
    class Filled(nn.Linear):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.register_buffer("places", torch.empty(3), persistent=False)
            self.places.copy_(torch.arange(3.0))

    pretend(monkeypatch, Filled)
    save(load_model({"timm": "resnet18"}), tmp_path / "a")
    assert load(tmp_path / "a").places.tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_a_package_that_is_not_there_is_named(name, monkeypatch, tmp_path):
    pretend(monkeypatch)
    save(load_model({name: "resnet18"}), tmp_path / "a")
    monkeypatch.setitem(sys.modules, name, None)
    for work in (lambda: load_model({name: "resnet18"}), lambda: load(tmp_path / "a")):
        with pytest.raises(MissingExtra, match=rf"'{name}' is not installed.*install '\.\[zoo\]'"):
            work()


def test_transformers_that_is_not_there_is_named(folder, bert, tmp_path, monkeypatch):
    save(bert, tmp_path / "a")
    monkeypatch.setitem(sys.modules, "transformers", None)
    for work in (lambda: hf(folder), lambda: load(tmp_path / "a")):
        with pytest.raises(
            MissingExtra, match=r"'transformers' is not installed.*install '\.\[hf\]'"
        ):
            work()


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_a_real_package_makes_a_network_that_is_rebuilt(name, tmp_path):
    pytest.importorskip(name, reason=f"{name} is not installed")
    model = load_model({name: "resnet18", "num_classes": 3}).eval()
    save(model, tmp_path / "a")
    images = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    assert torch.equal(load(tmp_path / "a")(images), model(images))


# Real weights.


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
