"""Small networks of transformers, what they compute, and cuts that make BERT smaller."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from laconic.models import configs
from laconic.structure.surgery import resize_, set_attributes_

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


def task_of(name: str) -> str:
    prefixes, tasks = (
        (configs.IMAGES, configs.IMAGE_TASKS)
        if "Image" in name
        else (configs.TEXTS, configs.TEXT_TASKS)
    )
    prefix = max((each for each in prefixes.values() if name.startswith(each)), key=len)
    return next(task for task, suffix in tasks.items() if prefix + suffix == name)


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
