"""Sizes as papers count them: BERT-base in low bits, to the digits printed."""

from __future__ import annotations

import copy
import functools
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.measure import size_report
from laconic.weights import Binary, Laid, Representation, Symmetric, Ternary

# Counting needs shapes alone: the meta device computes nothing.
META = torch.device("meta")


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers", reason="published encoders need transformers")


class Pair(nn.Module):
    """Two layers in the place of one, whose outputs are added: a split layer."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, inputs: Tensor) -> Tensor:
        return self.first(inputs) + self.second(inputs)


@functools.cache
def plain_bert(transformers: ModuleType, layers: int) -> nn.Module:
    with META:
        return transformers.BertModel(transformers.BertConfig(num_hidden_layers=layers))


def bert(transformers: ModuleType, layers: int = 12) -> nn.Module:
    return copy.deepcopy(plain_bert(transformers, layers))


def tiny_bert_6(transformers: ModuleType) -> nn.Module:
    return bert(transformers, 6)


def split_bert(transformers: ModuleType) -> nn.Module:
    """Return two networks of 6 heads and 1536 neurons in one."""
    model = bert(transformers)

    def pair(inputs: int, outputs: int) -> Pair:
        return Pair(nn.Linear(inputs, outputs), nn.Linear(inputs, outputs))

    with META:
        for block in model.encoder.layer:
            for name in ("query", "key", "value"):
                setattr(block.attention.self, name, pair(768, 384))
            block.attention.output.dense = pair(384, 768)
            block.intermediate.dense, block.output.dense = pair(768, 1536), pair(1536, 768)
        model.pooler.dense = pair(768, 768)
        words = [nn.Embedding(30522, 768) for _ in range(2)]
        model.embeddings.word_embeddings = Pair(*words)
    return model


def laid(model: nn.Module, weight: Representation, embedding: Representation) -> nn.Module:
    """Lay representations on all matrices but those of places, without a number to encode."""
    for name, module in list(model.named_modules()):
        words = "word_embeddings" in name
        if isinstance(module, nn.Linear) or (words and isinstance(module, nn.Embedding)):
            layer = Laid(embedding if words else weight)
            parametrize.register_parametrization(module, "weight", layer, unsafe=True)
    return model


def bits(count: int, granularity: Any = "tensor") -> Representation:
    kinds = {1: Binary(granularity), 2: Ternary(granularity)}
    return kinds.get(count, Symmetric(max(count, 2), granularity=granularity))


@pytest.mark.parametrize(
    ("network", "weight", "embedding", "mebibytes"),
    [
        (bert, 1, 1, "14.96"),
        (split_bert, 1, 1, "17.90"),
        (bert, 2, 2, "27.95"),
        (bert, 3, 3, "40.94"),
        (bert, 8, 8, "105.89"),
        (bert, 2, 8, "44.72"),
        (bert, 4, 4, "53.93"),
        (bert, 3, 4, "43.74"),
        (tiny_bert_6, 2, 2, "17.60"),
        (tiny_bert_6, 3, 3, "25.52"),
        (tiny_bert_6, 8, 8, "65.16"),
    ],
)
def test_strict_sizes(
    transformers: ModuleType, network: Any, weight: int, embedding: int, mebibytes: str
) -> None:
    """One scale per tensor: the sizes that tables round to 28, 41, 106, 43, 18, 25 and 65 MB."""
    model = laid(network(transformers), bits(weight), bits(embedding))
    assert f"{size_report(model, 'strict').mib:.2f}" == mebibytes


@pytest.mark.parametrize(
    ("network", "weight", "embedding", "mebibytes", "strict"),
    [
        (bert, 1, 1, "13.43", "15.08"),
        (split_bert, 1, 1, "16.48", "18.13"),
        (bert, 2, 8, "43.18", "44.83"),
        (bert, 4, 4, "52.39", "54.05"),
    ],
)
def test_paper_sizes(
    transformers: ModuleType,
    network: Any,
    weight: int,
    embedding: int,
    mebibytes: str,
    strict: str,
) -> None:
    """Bai et al. 2021, table 1: 13.4 and 16.5 MB; 43 and 52 for the mixed ones; scales of rows."""
    model = laid(network(transformers), bits(weight), bits(embedding, "row"))
    assert f"{size_report(model, 'paper').mib:.2f}" == mebibytes
    assert f"{size_report(model, 'strict').mib:.2f}" == strict


def test_parts_of_the_split_network(transformers: ModuleType) -> None:
    model = laid(split_bert(transformers), Binary(), Binary("row"))
    assert size_report(model, "paper").parts == {
        "word embedding": 2 * 23_440_896 / 8,
        "tables of the word embedding": 4 * 2 * 30_522,
        "positions and types": 4 * 514 * 768,
        "encoder matrices": 2 * 42_467_328 / 8,
        "pooler": 2 * 589_824 / 8,
        "biases": 4 * 102_912,
        "norms": 4 * 25 * 2 * 768,
        "other tables": 4 * 2 * 73,
    }


def test_plain_bert_is_the_published_418(transformers: ModuleType) -> None:
    """109,482,240 parameters; the paper count leaves out what stays float in every row."""
    report = size_report(bert(transformers))
    assert report.size_bytes == 4 * 109_482_240
    assert f"{report.mib:.2f}" == "417.64"
    assert f"{size_report(bert(transformers), 'paper').mib:.2f}" == "415.99"
