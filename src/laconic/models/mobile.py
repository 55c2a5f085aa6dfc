"""Image networks for small machines: MobileNet, MobileNetV2, and MobileNet without its trick."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from laconic.errors import ModelError
from laconic.models.notes import built
from laconic.models.vision import check_classes, he_initialised

__all__ = ["mobilenet_v1", "mobilenet_v1_full", "mobilenet_v2"]

# Channels and stride of each separable convolution (Howard et al. 2017, table 1; the last
# depthwise layer, printed "s2" at 7x7 pixels, has stride 1, or the printed 569 M would fail).
V1_PLAN = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5)
V1_PLAN += ((1024, 2), (1024, 1))

# Expansion, channels, blocks and stride of each stage (Sandler et al. 2018, table 2).
V2_PLAN = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)
# Images of at most so many pixels a side are not halved by the first two strides.
SMALL = 64
# Channels of MobileNetV2 are multiples of this.
DIVISOR = 8


def mobilenet_v1(width: float = 1.0, classes: int = 10, image: int = 32) -> nn.Module:
    """Return MobileNet: depthwise and pointwise convolutions (Howard et al. 2017).

    It maps images [batch, 3, image, image] to scores [batch, classes]. At 224 pixels and 1000
    classes: 4,231,976 parameters, 568.74 M multiply-accumulates. Both the width alpha and the
    resolution rho scale the cost by about their square.

    Args:
        width: alpha, the factor of every number of channels.
        classes: number of scores.
        image: pixels a side. Above 64 the strides are the paper's, which halve five times;
            up to 64 the first two are 1.

    Raises:
        ModelError: a number is too small.

    >>> model = mobilenet_v1(0.25)
    >>> model.body[0].depthwise
    Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=8, bias=False)
    """
    return _v1("mobilenet_v1", _separable, width=width, classes=classes, image=image)


def mobilenet_v1_full(width: float = 1.0, classes: int = 10, image: int = 32) -> nn.Module:
    """Return MobileNet with full 3x3 convolutions (Howard et al. 2017, table 4).

    What its depthwise-separable convolutions are compared with: 29,282,120 weights of
    convolutions and classifier, 4867.3 M multiply-accumulates at 224 pixels and 1000 classes.

    Args:
        width: factor of every number of channels.
        classes: number of scores.
        image: pixels a side, as in ``mobilenet_v1``.

    Raises:
        ModelError: a number is too small.

    >>> mobilenet_v1_full(0.25).body[0].conv
    Conv2d(8, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    """
    return _v1("mobilenet_v1_full", _full, width=width, classes=classes, image=image)


class InvertedResidual(nn.Module):
    """1x1 out, 3x3 depthwise, 1x1 in without activation (Sandler et al. 2018, figure 3b).

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        expansion: times as many channels in between; 1: there is no first convolution.
        stride: of the depthwise convolution.
    """

    def __init__(self, inputs: int, outputs: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        inner = expansion * inputs
        expand = [] if expansion == 1 else [_unit(inputs, inner, 1, act=nn.ReLU6())]
        self.layers = nn.Sequential(
            *expand,
            _unit(inner, inner, 3, stride=stride, groups=inner, act=nn.ReLU6()),
            _unit(inner, outputs, 1, act=nn.Identity()),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, inputs, height, width] to [batch, outputs, height, width] / stride."""
        inner: Tensor = self.layers(x)
        return x + inner if self.residual else inner


def mobilenet_v2(width: float = 1.0, classes: int = 10, image: int = 32) -> nn.Module:
    """Return MobileNetV2, of inverted residuals (Sandler et al. 2018).

    It maps images [batch, 3, image, image] to scores [batch, classes]. At 224 pixels and 1000
    classes: 3,504,872 parameters, 300.77 M multiply-accumulates.

    Args:
        width: factor of every number of channels, which are rounded to multiples of 8; the
            last one, 1280, is never less.
        classes: number of scores.
        image: pixels a side. Above 64 the strides are the paper's, which halve five times;
            up to 64 the first two are 1.

    Raises:
        ModelError: a number is too small.

    >>> mobilenet_v2(0.25).linear
    Linear(in_features=1280, out_features=10, bias=True)
    """
    _check("mobilenet_v2", width, classes, image)
    channels = _divisible(32 * width)
    stem = _unit(3, channels, 3, stride=1 if image <= SMALL else 2, act=nn.ReLU6())
    blocks: list[nn.Module] = []
    for stage, (expansion, wanted, count, stride) in enumerate(V2_PLAN):
        outputs = _divisible(wanted * width)
        for index in range(count):
            halves = index == 0 and not (stage == 1 and image <= SMALL)
            step = stride if halves else 1
            blocks.append(InvertedResidual(channels, outputs, expansion=expansion, stride=step))
            channels = outputs
    last = _divisible(1280 * max(1.0, width))
    head = _unit(channels, last, 1, act=nn.ReLU6())
    model = _network(stem, blocks, head, last=last, classes=classes)
    return built(model, "mobilenet_v2", width=width, classes=classes, image=image)


def _v1(
    name: str,
    block: Callable[[int, int, int], nn.Module],
    *,
    width: float,
    classes: int,
    image: int,
) -> nn.Module:
    _check(name, width, classes, image)
    channels = _scaled(32, width)
    stem = _unit(3, channels, 3, stride=1 if image <= SMALL else 2, act=nn.ReLU())
    blocks: list[nn.Module] = []
    for index, (wanted, stride) in enumerate(V1_PLAN):
        outputs = _scaled(wanted, width)
        blocks.append(block(channels, outputs, 1 if index == 1 and image <= SMALL else stride))
        channels = outputs
    model = _network(stem, blocks, nn.Identity(), last=channels, classes=classes)
    return built(model, name, width=width, classes=classes, image=image)


def _separable(inputs: int, outputs: int, stride: int) -> nn.Module:
    depthwise = nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False)
    layers = OrderedDict(
        depthwise=depthwise,
        bn1=nn.BatchNorm2d(inputs),
        relu1=nn.ReLU(),
        pointwise=nn.Conv2d(inputs, outputs, 1, bias=False),
        bn2=nn.BatchNorm2d(outputs),
        relu2=nn.ReLU(),
    )
    return nn.Sequential(layers)


def _full(inputs: int, outputs: int, stride: int) -> nn.Module:
    return _unit(inputs, outputs, 3, stride=stride, act=nn.ReLU())


def _unit(
    inputs: int, outputs: int, size: int, *, stride: int = 1, groups: int = 1, act: nn.Module
) -> nn.Sequential:
    """Return a convolution that pads to the same pixels, its norm and its activation."""
    convolution = nn.Conv2d(
        inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False
    )
    return nn.Sequential(OrderedDict(conv=convolution, bn=nn.BatchNorm2d(outputs), act=act))


def _network(
    stem: nn.Module, blocks: list[nn.Module], head: nn.Module, *, last: int, classes: int
) -> nn.Module:
    layers = OrderedDict(
        stem=stem,
        body=nn.Sequential(*blocks),
        head=head,
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        linear=nn.Linear(last, classes),
    )
    return he_initialised(nn.Sequential(layers))


def _scaled(channels: int, width: float) -> int:
    return max(1, int(channels * width))


def _divisible(channels: float) -> int:
    """Return the nearest multiple of 8, at least 8 and never more than 10 % below."""
    nearest = max(DIVISOR, int(channels + DIVISOR / 2) // DIVISOR * DIVISOR)
    return nearest if nearest >= 0.9 * channels else nearest + DIVISOR


def _check(name: str, width: float, classes: int, image: int) -> None:
    check_classes(name, classes)
    if not width > 0:
        raise ModelError(f"{name}: width {width} must be above 0")
    if image < 1:
        raise ModelError(f"{name}: image {image} must be at least 1 pixel a side")
