"""Published counts of parameters, multiply-accumulates and bytes, to the digits printed."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from laconic.ledger import Measurement, ledger
from laconic.measure import float_bytes, macs, measure
from laconic.models import (
    densenet,
    lenet_5,
    lenet_300_100,
    mobilenet_v1,
    mobilenet_v1_full,
    mobilenet_v2,
    preresnet,
    resnet,
)
from laconic.scope import Scope
from laconic.weights.codebook import KMeans
from laconic.weights.laid import lay, weights_of
from laconic.weights.representation import Float

# Counting needs shapes alone: the meta device computes nothing.
META = torch.device("meta")


@pytest.mark.parametrize(("depth", "millions"), [(20, "40.55"), (56, "125.49"), (110, "252.89")])
def test_cifar_resnet_macs(depth: int, millions: str) -> None:
    """He et al. 2016 with option A shortcuts, which cost nothing.

    The printed figures count the convolutions alone; the classifier's 640 MACs do not show.
    """
    found = macs(resnet(depth).to(META), torch.zeros(1, 3, 32, 32, device=META))
    assert f"{found[''] / 1e6:.2f}" == millions
    assert found["linear.weight"] == 640
    assert f"{(found[''] - 640) / 1e6:.2f}" == millions
    assert found[""] == sum(count for name, count in found.items() if name)


def test_lenet_parameters() -> None:
    """Han et al. 2016, tables 2 and 3: 266 K and 431 K parameters, 1070 and 1720 kB."""
    assert measure(lenet_300_100()).parameters == 266_610
    assert measure(lenet_5()).parameters == 431_080
    assert float_bytes(lenet_300_100()) == pytest.approx(266_610 * 4, rel=0.001)
    assert float_bytes(lenet_5()) == pytest.approx(431_080 * 4, rel=0.001)


def test_lenet_macs() -> None:
    image = torch.zeros(1, 1, 28, 28)
    assert macs(lenet_300_100(), image)[""] == 784 * 300 + 300 * 100 + 100 * 10
    convolutions = 20 * 25 * 24 * 24 + 50 * 20 * 25 * 8 * 8
    assert macs(lenet_5(), image)[""] == convolutions + 800 * 500 + 500 * 10


# ------------------------------------------------------------------ Transformers

MIB = 2**20
# What the small tables print for ALBERT was rounded in several ways.
LOOSE = 0.04


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers", reason="published encoders need transformers")


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def bert(transformers: ModuleType, layers: int = 12, **fields: Any) -> nn.Module:
    """Return the encoder with pooler and without a head, on the meta device."""
    config = transformers.BertConfig(num_hidden_layers=layers, **fields)
    with META:
        return transformers.BertModel(config)


def tiny_bert(transformers: ModuleType) -> nn.Module:
    return bert(transformers, 4, hidden_size=312, intermediate_size=1200)


def narrow_bert(transformers: ModuleType, heads: int) -> nn.Module:
    """Return BERT-base with so many of its twelve heads, and that share of its neurons."""
    model = bert(transformers)
    neurons = 3072 * heads // 12
    with META:
        for block in model.encoder.layer:
            for name in ("query", "key", "value"):
                setattr(block.attention.self, name, nn.Linear(768, 64 * heads))
            block.attention.output.dense = nn.Linear(64 * heads, 768)
            block.intermediate.dense = nn.Linear(768, neurons)
            block.output.dense = nn.Linear(neurons, 768)
    return model


def encoder_flops(model: nn.Module) -> tuple[float, float]:
    """Return G operations of 128 tokens, two per MAC: of the blocks' weights, of attention."""
    found = macs(model, {"input_ids": torch.zeros(1, 128, dtype=torch.long, device=META)})
    products = found[""] - sum(count for name, count in found.items() if name)
    weights = sum(count for name, count in found.items() if name.startswith("encoder."))
    return 2 * weights / 1e9, 2 * products / 1e9


@pytest.mark.parametrize(
    ("layers", "count", "mebibytes"),
    [(12, 109_482_240, "417.64"), (6, 66_955_008, "255.41"), (4, 52_779_264, "201.34")],
)
def test_bert_parameters(transformers: ModuleType, layers: int, count: int, mebibytes: str) -> None:
    """BERT-base is the "418 MB" of the tables, whose MB are MiB; 6 layers are "67.0M"."""
    model = bert(transformers, layers)
    assert parameters(model) == count
    assert f"{4 * count / MIB:.2f}" == mebibytes
    # "52.2M" for 4 layers leaves the pooler out.
    assert parameters(model) - parameters(model.pooler) == count - 590_592
    assert 52_779_264 - 590_592 == 52_188_672


def test_bert_with_what_distillation_adds(transformers: ModuleType) -> None:
    """Jiao et al. 2020: a fit layer to the teacher's width, and a head of two classes."""
    with META:
        fit, head = nn.Linear(768, 768), nn.Linear(768, 2)
        small_fit, small_head = nn.Linear(312, 768), nn.Linear(312, 2)
    assert parameters(bert(transformers)) + parameters(fit) + parameters(head) == 110_074_370
    six = parameters(bert(transformers, 6)) + parameters(fit)
    assert f"{4 * six / MIB:.1f}" == "257.7"
    tiny = parameters(tiny_bert(transformers))
    assert (tiny, parameters(small_fit), parameters(small_head)) == (14_350_248, 240_384, 626)
    assert tiny + parameters(small_fit) + parameters(small_head) == 14_591_258
    assert f"{4 * tiny / MIB:.2f}" == "54.74"


def test_distilbert_and_roberta_parameters(transformers: ModuleType) -> None:
    """Sanh et al. 2019, without pooler and token types; Fan et al. 2020, in decimal MB."""
    with META:
        distilled = transformers.DistilBertModel(transformers.DistilBertConfig())
        config = transformers.RobertaConfig(
            num_hidden_layers=6, vocab_size=50265, max_position_embeddings=514, type_vocab_size=1
        )
        roberta = transformers.RobertaModel(config)
    assert parameters(distilled) == 66_362_880
    assert f"{4 * parameters(distilled) / MIB:.1f}" == "253.2"
    assert parameters(roberta) == 82_118_400
    assert f"{4 * parameters(roberta) / MIB:.1f}" == "313.3"
    assert f"{4 * parameters(roberta) / 1e6:.1f}" == "328.5"


@pytest.mark.parametrize(
    ("width", "millions", "mebibytes", "printed"),
    [
        (64, "9.681", "36.9", 38),
        (128, "11.684", "44.6", 45),
        (256, "15.688", "59.8", 62),
        (768, "31.705", "120.9", 120),
    ],
)
def test_albert_parameters(
    transformers: ModuleType, width: int, millions: str, mebibytes: str, printed: int
) -> None:
    """Lan et al. 2020, table 3: embeddings of E columns, one block for all twelve layers."""
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    for layers in (12, 3):  # sharing: the number of layers does not count
        config = transformers.AlbertConfig(
            vocab_size=30_000, embedding_size=width, num_hidden_layers=layers, **sizes
        )
        with META:
            count = parameters(transformers.AlbertModel(config))
        assert f"{count / 1e6:.3f}" == millions
        assert f"{4 * count / MIB:.1f}" == mebibytes
        assert 4 * count / MIB == pytest.approx(printed, rel=LOOSE)


def test_weights_of_bert_that_are_binarised(transformers: ModuleType) -> None:
    """Bai et al. 2021: matrices of the blocks, word embedding and pooler, no biases."""
    weights = weights_of(bert(transformers), Scope("*"))
    blocks = sum(weight.numel() for name, weight in weights.items() if ".layer." in name)
    words = weights["embeddings.word_embeddings.weight"].numel()
    pooler = weights["pooler.dense.weight"].numel()
    assert (blocks, words, pooler) == (84_934_656, 23_440_896, 589_824)
    assert blocks + words + pooler == 108_965_376


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bert_operations(transformers: ModuleType, attention: str) -> None:
    """128 tokens: 21.743 G and 0.604 G; TinyBERT of 4 layers: 1.165 G and 0.082 G."""
    base = encoder_flops(bert(transformers, attn_implementation=attention))
    assert [f"{part:.3f}" for part in base] == ["21.743", "0.604"]
    assert f"{sum(base):.2f}" == "22.35"
    fields = {"hidden_size": 312, "intermediate_size": 1200}
    tiny = encoder_flops(bert(transformers, 4, attn_implementation=attention, **fields))
    assert [f"{part:.3f}" for part in tiny] == ["1.165", "0.082"]
    assert f"{sum(tiny):.2f}" == "1.25"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_mask_of_padding_changes_no_count(transformers: ModuleType, attention: str) -> None:
    config = transformers.BertConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        attn_implementation=attention,
    )
    model = transformers.BertModel(config)
    batch = {"input_ids": torch.ones(3, 5, dtype=torch.long)}
    plain = macs(model, batch)
    padded = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    assert macs(model, batch | {"attention_mask": padded}) == plain
    # Scores and context: 2 layers * 2 products * 3 examples * 5 * 5 pairs of tokens * width 8.
    assert plain[""] - sum(count for name, count in plain.items() if name) == 2 * 2 * 3 * 25 * 8


@pytest.mark.parametrize(
    ("heads", "printed", "millions"), [(9, 16.9, 88), (6, 11.3, 67), (3, 5.8, 46), (1, 2.0, 32)]
)
def test_bert_of_fewer_heads_and_neurons(
    transformers: ModuleType, heads: int, printed: float, millions: int
) -> None:
    """Huang et al. 2021, table 1: 22.35 m G + 0.15 G for what no MAC counts, 24.43 + 85.05 m M."""
    model, share = narrow_bert(transformers, heads), heads / 12
    counted = sum(encoder_flops(model))
    assert counted == pytest.approx(22.35 * share, abs=0.005)
    assert counted + 0.15 == pytest.approx(printed, abs=0.1)
    # Norms and output biases, 0.055 M, do not shrink, which the formula neglects.
    assert parameters(model) / 1e6 == pytest.approx(24.43 + 85.05 * share, abs=0.06)
    assert round(parameters(model) / 1e6) == millions


# ------------------------------------------------------------------ image networks


def without_norms(model: nn.Module) -> int:
    """Return the parameters of everything but BatchNorm."""
    norms = (module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    return parameters(model) - sum(parameters(norm) for norm in norms)


def image_macs(model: nn.Module, pixels: int) -> int:
    return macs(model.to(META), torch.zeros(1, 3, pixels, pixels, device=META))[""]


def test_mobilenet() -> None:
    """Howard et al. 2017, table 4: 569 M and 4.2 M, without its convolutions 4866 M and 29.3 M."""
    with META:
        model, full = mobilenet_v1(1.0, 1000, 224), mobilenet_v1_full(1.0, 1000, 224)
    assert f"{image_macs(model, 224) / 1e6:.2f}" == "568.74"
    assert without_norms(model) == 4_210_088
    assert parameters(model) == 4_210_088 + 21_888 == 4_231_976
    assert f"{image_macs(full, 224) / 1e6:.1f}" == "4867.3"
    assert without_norms(full) == 29_282_120


@pytest.mark.parametrize(
    ("width", "operations", "count"), [(0.75, 325, "2.6"), (0.5, 149, "1.3"), (0.25, 41, "0.5")]
)
def test_mobilenet_of_another_width(width: float, operations: int, count: str) -> None:
    """Howard et al. 2017, table 6."""
    with META:
        model = mobilenet_v1(width, 1000, 224)
    assert int(image_macs(model, 224) / 1e6) == operations
    assert f"{parameters(model) / 1e6:.1f}" == count


@pytest.mark.parametrize(("pixels", "operations"), [(192, 418), (160, 290), (128, 186)])
def test_mobilenet_at_another_resolution(pixels: int, operations: int) -> None:
    """Howard et al. 2017, table 7."""
    with META:
        model = mobilenet_v1(1.0, 1000, pixels)
    assert int(image_macs(model, pixels) / 1e6) == operations


def test_mobilenet_v2() -> None:
    """Sandler et al. 2018, table 4: 300 M and 3.4 M; torchvision counts 3,504,872."""
    with META:
        model = mobilenet_v2(1.0, 1000, 224)
    assert f"{image_macs(model, 224) / 1e6:.2f}" == "300.77"
    assert parameters(model) == 3_504_872


@pytest.mark.parametrize(
    ("depth", "growth", "millions"), [(100, 12, "0.8"), (250, 24, "15.3"), (190, 40, "25.6")]
)
def test_densenet_parameters(depth: int, growth: int, millions: str) -> None:
    """Huang et al. 2017, table 2: DenseNet-BC."""
    with META:
        model = densenet(depth, growth)
    assert f"{parameters(model) / 1e6:.1f}" == millions
    assert depth != 100 or parameters(model) == 769_162


def test_preresnet_parameters() -> None:
    """He et al. 2016b, table 2: 1.7 M at depth 164."""
    with META:
        model = preresnet(164)
    assert f"{parameters(model) / 1e6:.1f}" == "1.7"


# ------------------------------------------------------------------ the chaining table


def chained(bits: int | None, survivors: int) -> Measurement:
    """Return a network of 20,000 weights, pruned to survivors, with so many bits each."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(100, 200, bias=False))
    kept = torch.zeros(20_000, dtype=torch.bool)
    kept[model[0].weight.detach().abs().flatten().topk(survivors).indices] = True
    if survivors < 20_000:
        lay(model, "0.weight", Float(), mask=kept.reshape(200, 100))
    if bits is not None:
        lay(model, "0.weight", KMeans(bits))
    return measure(model)


@pytest.mark.parametrize(
    ("bits", "survivors", "factor"),
    [(4, 20_000, "8.00"), (None, 3130, "6.39"), (6, 3130, "34.08")],
)
def test_chaining_table(bits: int | None, survivors: int, factor: str) -> None:
    """Factors of the papers, 32 / (bits * density): 4 bit, 15.65 % kept, both with 6 bit."""
    row = ledger([chained(None, 20_000), chained(bits, survivors)])[-1]
    assert f"{row.nominal_total:.2f}" == factor


def test_chaining_is_the_product_of_the_stages() -> None:
    rows = ledger([chained(None, 20_000), chained(None, 3130), chained(6, 3130)])
    assert f"{rows[1].nominal * rows[2].nominal:.2f}" == "34.08"
    assert rows[2].nominal_total == pytest.approx(rows[1].nominal * rows[2].nominal)
    # On disk, positions of the survivors are not free.
    assert rows[2].measured_total < rows[2].nominal_total
