"""Which part a tensor belongs to, what is counted, and what is left as found."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from laconic.errors import ModelError
from laconic.measure import measure, size_report
from laconic.models import digits_cnn
from laconic.scope import Scope
from laconic.ship import save
from laconic.step import State
from laconic.weights import Binary, Float, KMeans, Quantize, Representation, Symmetric, Ternary, lay
from laconic.weights.laid import laid_tensors, tie_, weights_of

# What a file says besides its numbers: of every weight in codes, of every plain tensor, of itself.
CODED, PLAIN, WHOLE = 350, 60, 500


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers", reason="encoders need transformers")


def test_a_plain_network_takes_four_bytes_a_parameter(tiny_cnn: nn.Module) -> None:
    report = size_report(tiny_cnn)
    assert report.size_bytes == 4 * sum(parameter.numel() for parameter in tiny_cnn.parameters())
    assert report.parts == {"weights": 4 * (36 + 48), "biases": 4 * 3, "norms": 4 * 8}
    assert size_report(tiny_cnn, "paper").size_bytes == 4 * (36 + 48 + 3)


def test_half_precision_counts_its_own_width(tiny_mlp: nn.Module) -> None:
    assert 2 * size_report(tiny_mlp.half()).size_bytes == size_report(tiny_mlp.float()).size_bytes


def test_codes_and_tables_of_what_is_laid(tiny_mlp: nn.Module) -> None:
    lay(tiny_mlp, "0.weight", Symmetric(3, granularity="row"))  # [8, 6]
    lay(tiny_mlp, "2.weight", KMeans(2))  # [3, 8], and a codebook that is learned
    report = size_report(tiny_mlp)
    assert report.parts == {
        "weights": (3 * 48 + 2 * 24) / 8,
        "biases": 4 * 11,
        "other tables": 4 * (8 + 4),
    }
    assert size_report(tiny_mlp, "paper").size_bytes == (3 * 48 + 2 * 24) / 8 + 4 * 11


def test_pruned_weights_take_a_bit_for_their_place(tiny_mlp: nn.Module) -> None:
    mask = torch.zeros(8, 6, dtype=torch.bool)
    mask[0] = True
    lay(tiny_mlp, "0.weight", Float(), mask=mask)
    report = size_report(tiny_mlp)
    assert report.parts["weights"] == 4 * (6 + 24)
    assert report.parts["positions of survivors"] == 48 / 8
    lay(tiny_mlp, "0.weight", Binary())
    assert size_report(tiny_mlp).parts["weights"] == 6 / 8 + 4 * 24
    assert "positions of survivors" not in size_report(tiny_mlp, "paper").counted


def test_everything_pruned_and_nothing_there() -> None:
    network = nn.Linear(2, 2, bias=False)
    lay(network, "weight", Binary(), mask=torch.zeros(2, 2, dtype=torch.bool))
    assert size_report(network).parts == {"other tables": 4, "positions of survivors": 0.5}
    assert size_report(nn.ReLU()).size_bytes == 0


def test_a_shared_weight_counts_once() -> None:
    network = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tie_(network, {"1.weight": "0.weight"})
    assert size_report(network).size_bytes == 64
    lay(network, "0.weight", Binary())
    assert size_report(network).size_bytes == 16 / 8 + 4


def test_the_codes_are_those_of_the_nominal_bits() -> None:
    network = digits_cnn()
    for name in weights_of(network, Scope("*")):
        lay(network, name, Symmetric(4))
    parts = size_report(network).parts
    tables = parts.pop("other tables")
    assert 8 * sum(parts.values()) == measure(network).nominal_bits
    assert tables == 4 * len(laid_tensors(network))


def test_the_network_and_the_generator_stay_as_found(tiny_mlp: nn.Module) -> None:
    lay(tiny_mlp, "0.weight", Symmetric(4, rounding="stochastic"))
    before = {name: tensor.clone() for name, tensor in tiny_mlp.state_dict().items()}
    standing = torch.random.get_rng_state()
    size_report(tiny_mlp)
    assert torch.equal(torch.random.get_rng_state(), standing)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_mlp.state_dict().items())


def test_both_counts_are_named(tiny_cnn: nn.Module) -> None:
    first, *rest = str(size_report(tiny_cnn, "paper")).splitlines()
    assert "by the paper count" in first and "by the strict count" in first
    assert [line.endswith("not counted") for line in rest] == [False, False, True]


def test_no_such_count(tiny_cnn: nn.Module) -> None:
    with pytest.raises(ModelError, match="'papr' of sizes; did you mean 'paper'"):
        size_report(tiny_cnn, "papr")  # type: ignore[arg-type]


def small(**fields: int) -> dict[str, int]:
    return {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2} | fields


def test_parts_of_a_classifier(transformers: ModuleType) -> None:
    config = transformers.BertConfig(**small(intermediate_size=12, vocab_size=20))
    parts = size_report(transformers.BertForSequenceClassification(config)).parts
    assert parts["word embedding"] == 4 * 20 * 8
    assert parts["positions and types"] == 4 * (512 + 2) * 8
    assert parts["encoder matrices"] == 4 * 2 * (4 * 64 + 2 * 96)
    assert parts["pooler"] == 4 * 64
    assert parts["head"] == 4 * (2 * 8 + 2)
    assert parts["biases"] == 4 * (2 * (4 * 8 + 12 + 8) + 8)
    assert parts["norms"] == 4 * (5 * 16)


def test_parts_of_other_families(transformers: ModuleType) -> None:
    """The projection of pixels, or of small embeddings, is a matrix of the encoder."""
    config = transformers.ViTConfig(**small(intermediate_size=12), image_size=8, patch_size=4)
    vit = size_report(transformers.ViTModel(config)).parts
    assert vit["encoder matrices"] == 4 * (3 * 16 * 8 + 2 * (4 * 64 + 2 * 96))
    assert vit["positions and types"] == 4 * (1 + 5) * 8
    assert "word embedding" not in vit
    fields = small(intermediate_size=12, vocab_size=20, embedding_size=4)
    albert = size_report(transformers.AlbertModel(transformers.AlbertConfig(**fields))).parts
    assert albert["word embedding"] == 4 * 20 * 4
    assert albert["encoder matrices"] == 4 * (4 * 8 + 4 * 64 + 2 * 96)
    distil = transformers.DistilBertConfig(
        dim=8, hidden_dim=12, n_layers=2, n_heads=2, vocab_size=20
    )
    assert "pooler" not in size_report(transformers.DistilBertModel(distil)).parts


@pytest.mark.parametrize(
    ("weight", "embedding", "most"),
    [
        (Ternary(), Ternary("row"), 1.62 / 2),
        (Symmetric(3), Symmetric(3, granularity="row"), 0.8),
        (Symmetric(8), Symmetric(8, granularity="row"), 1.0),
        (Binary(), Binary("row"), 1.0),
    ],
    ids=["ternary", "3 bit", "8 bit", "binary"],
)
def test_a_file_takes_what_is_counted_and_its_header(
    weight: Representation,
    embedding: Representation,
    most: float,
    transformers: ModuleType,
    tmp_path: Path,
) -> None:
    """As benchmarks/lowbit_size.py measures it, at the shape of BERT base."""
    fields = small(hidden_size=96, intermediate_size=384, vocab_size=1000)
    network = transformers.BertModel(transformers.BertConfig(**fields))
    scope = Scope("embeddings.word_embeddings, encoder.*, pooler.*")
    Quantize(weight, embedding=embedding, scope=scope).apply(State(network))
    report, coded = size_report(network), len(laid_tensors(network))
    header = CODED * coded + PLAIN * (len(network.state_dict()) - coded) + WHOLE
    codes = sum(report.parts[part] for part in ("word embedding", "encoder matrices", "pooler"))
    assert save(network, tmp_path / "model") <= report.size_bytes - (1 - most) * codes + header
