"""Published counts of parameters, multiply-accumulates and bytes, to the digits printed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laconic.measure import Measurement, float_bytes, ledger, macs, measure
from laconic.models import lenet_5, lenet_300_100, resnet
from laconic.weights.codebook import KMeans
from laconic.weights.laid import lay
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


@pytest.mark.parametrize(
    ("layers", "width", "inner", "linear", "products"),
    [(12, 768, 3072, "21.743", "0.604"), (4, 312, 1200, "1.165", "0.082")],
)
def test_bert_operations(layers: int, width: int, inner: int, linear: str, products: str) -> None:
    """BERT-base and TinyBERT of 4 layers, 128 tokens, in G at two operations per MAC."""
    layer = nn.TransformerEncoderLayer(width, 12, inner, batch_first=True, device=META)
    encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    found = macs(encoder, torch.zeros(1, 128, width, device=META))
    total = found.pop("")
    of_weights = sum(found.values())
    assert f"{2 * of_weights / 1e9:.3f}" == linear
    assert f"{2 * (total - of_weights) / 1e9:.3f}" == products


def mobilenet(separable: bool) -> nn.Sequential:
    """Return MobileNet-V1 at 224 pixels, its last depthwise layer of stride 1."""
    plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5]
    plan += [(1024, 2), (1024, 1)]
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, padding=1, bias=False)]
    channels = 32
    for outputs, stride in plan:
        if separable:
            layers += [
                nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
                nn.Conv2d(channels, outputs, 1, bias=False),
            ]
        else:
            layers.append(nn.Conv2d(channels, outputs, 3, stride, 1, bias=False))
        channels = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 1000))


@pytest.mark.parametrize(("separable", "millions"), [(True, "568.74"), (False, "4867.3")])
def test_mobilenet_macs(separable: bool, millions: str) -> None:
    """Howard et al. 2017, table 4: 569 M with separable convolutions, 4866 M without."""
    with META:
        model = mobilenet(separable)
        found = macs(model, torch.zeros(1, 3, 224, 224))[""] / 1e6
    assert f"{found:.{len(millions.split('.')[1])}f}" == millions


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
    assert f"{row.predicted_total:.2f}" == factor


def test_chaining_is_the_product_of_the_stages() -> None:
    rows = ledger([chained(None, 20_000), chained(None, 3130), chained(6, 3130)])
    assert f"{rows[1].predicted * rows[2].predicted:.2f}" == "34.08"
    assert rows[2].predicted_total == pytest.approx(rows[1].predicted * rows[2].predicted)
    # On disk, positions of the survivors are not free.
    assert rows[2].measured_total < rows[2].predicted_total
