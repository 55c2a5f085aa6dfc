"""Image networks of the papers: LeNet, ResNet, VGG, DenseNet, and a small one for digits."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.errors import ModelError
from laconic.models.notes import built

__all__ = [
    "densenet",
    "digits_cnn",
    "lenet_5",
    "lenet_300_100",
    "preresnet",
    "resnet",
    "resnet20",
    "resnet32",
    "resnet56",
    "vgg",
]

# Channels of each 3x3 convolution, "M" for 2x2 max pooling (Simonyan & Zisserman 2015, table 1).
VGG_PLANS: dict[int | str, tuple[int | str, ...]] = {
    "small": (32, 32, "M", 64, 64, "M", 128, 128, "M"),
    11: (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    13: (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    16: (64, 64, "M", 128, 128, "M", *(256,) * 3, "M", *(512,) * 3, "M", *(512,) * 3, "M"),
    19: (64, 64, "M", 128, 128, "M", *(256,) * 4, "M", *(512,) * 4, "M", *(512,) * 4, "M"),
}

# Channels that a bottleneck puts out for each one inside; in DenseNet it is the other way round.
EXPANSION = 4


def lenet_300_100() -> nn.Module:
    """Return LeNet-300-100 (LeCun et al. 1998): 784-300-100-10, 266,610 parameters.

    It maps images [batch, 1, 28, 28] to scores [batch, 10].

    >>> sum(parameter.numel() for parameter in lenet_300_100().parameters())
    266610
    """
    layers = OrderedDict(
        flatten=nn.Flatten(),
        fc1=nn.Linear(784, 300),
        relu1=nn.ReLU(),
        fc2=nn.Linear(300, 100),
        relu2=nn.ReLU(),
        fc3=nn.Linear(100, 10),
    )
    return built(nn.Sequential(layers), "lenet_300_100")


def lenet_5() -> nn.Module:
    """Return Caffe's LeNet-5: 431,080 parameters, one ReLU, after its first linear.

    It maps images [batch, 1, 28, 28] to scores [batch, 10].

    >>> sum(parameter.numel() for parameter in lenet_5().parameters())
    431080
    """
    layers = OrderedDict(
        conv1=nn.Conv2d(1, 20, 5),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(20, 50, 5),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(800, 500),
        relu=nn.ReLU(),
        fc2=nn.Linear(500, 10),
    )
    return built(nn.Sequential(layers), "lenet_5")


class PadShortcut(nn.Module):
    """Shortcut without parameters: every second pixel, zeros for the new channels.

    Args:
        pad: zero channels added on each side.
    """

    def __init__(self, pad: int) -> None:
        super().__init__()
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, channels, height, width] to half the height and width."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 2).

    Args:
        inputs: channels of the input.
        outputs: channels of the output; twice ``inputs`` where the stride is 2.
        stride: of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else PadShortcut((outputs - inputs) // 2)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, inputs, height, width] to [batch, outputs, height, width] / stride."""
        inner = self.relu1(self.bn1(self.conv1(x)))
        outer: Tensor = self.relu2(self.bn2(self.conv2(inner)) + self.shortcut(x))
        return outer


class ResNet(nn.Module):
    """The CIFAR ResNet of He et al. 2016, section 4.2: three stages of 16, 32, 64 channels.

    Args:
        blocks: blocks per stage, n in depth = 6n + 2.
        classes: number of scores.
    """

    def __init__(self, blocks: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [batch, 3, height, width] to scores [batch, classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: Tensor = self.linear(x.mean(dim=(2, 3)))
        return scores


def resnet(depth: int = 20, classes: int = 10) -> nn.Module:
    """Return the CIFAR ResNet, shortcuts of option A (He et al. 2016, section 4.2).

    It maps images [batch, 3, 32, 32] to scores [batch, classes].

    Args:
        depth: layers with weights, 6n + 2: 20, 32, 44, 56, 110, ...
        classes: number of scores.

    Raises:
        ModelError: the depth is not 6n + 2, or a number is below 1.

    >>> sum(parameter.numel() for parameter in resnet(20).parameters())
    269722
    """
    if depth < 8 or (depth - 2) % 6:
        raise ModelError(f"resnet: depth {depth} is not 6n + 2; choose 8, 14, 20, 32, 44, 56, 110")
    check_classes("resnet", classes)
    model = he_initialised(ResNet((depth - 2) // 6, classes))
    return built(model, "resnet", depth=depth, classes=classes)


def resnet20(classes: int = 10) -> nn.Module:
    """Return ``resnet(20)``: 269,722 parameters.

    >>> resnet20().linear.out_features
    10
    """
    return resnet(20, classes)


def resnet32(classes: int = 10) -> nn.Module:
    """Return ``resnet(32)``: 464,154 parameters.

    >>> len(resnet32().layer1)
    5
    """
    return resnet(32, classes)


def resnet56(classes: int = 10) -> nn.Module:
    """Return ``resnet(56)``: 853,018 parameters.

    >>> len(resnet56().layer1)
    9
    """
    return resnet(56, classes)


class PreBottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions, each after its norm and ReLU (He et al. 2016b, figure 4e).

    Args:
        inputs: channels of the input.
        width: channels inside; four times as many go out.
        stride: of the 3x3 convolution.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu3 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        plain = inputs == outputs
        self.shortcut = (
            nn.Identity() if plain else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, inputs, height, width] to [batch, 4 width, height, width] / stride."""
        inner = self.conv1(self.relu1(self.bn1(x)))
        inner = self.conv2(self.relu2(self.bn2(inner)))
        inner = self.conv3(self.relu3(self.bn3(inner)))
        outer: Tensor = inner + self.shortcut(x)
        return outer


class PreResNet(nn.Module):
    """The pre-activation ResNet of He et al. 2016b for 32x32 images, with bottlenecks.

    Args:
        blocks: blocks per stage, n in depth = 9n + 2.
        classes: number of scores.
    """

    def __init__(self, blocks: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = _pre_stage(16, 16, blocks)
        self.layer2 = _pre_stage(64, 32, blocks)
        self.layer3 = _pre_stage(128, 64, blocks)
        self.bn = nn.BatchNorm2d(256)
        self.relu = nn.ReLU()
        self.linear = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [batch, 3, height, width] to scores [batch, classes]."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        scores: Tensor = self.linear(self.relu(self.bn(x)).mean(dim=(2, 3)))
        return scores


def preresnet(depth: int = 110, classes: int = 10) -> nn.Module:
    """Return the pre-activation CIFAR ResNet with bottlenecks (He et al. 2016b).

    It maps images [batch, 3, 32, 32] to scores [batch, classes]. At depth 110 it is the
    PreResNet-110 of Liu et al. 2019 ("Rethinking the value of network pruning"); He et al.
    print 164 with bottlenecks, and 110 with blocks of two 3x3 convolutions. At depth 110 it has
    1,146,842 parameters, at 164 it has 1,703,258.

    Args:
        depth: layers with weights, 9n + 2: 20, 29, 56, 110, 164, ...
        classes: number of scores.

    Raises:
        ModelError: the depth is not 9n + 2, or a number is below 1.

    >>> sum(parameter.numel() for parameter in preresnet(11).parameters())
    126746
    """
    if depth < 11 or (depth - 2) % 9:
        raise ModelError(f"preresnet: depth {depth} is not 9n + 2; choose 11, 20, 29, 56, 110, 164")
    check_classes("preresnet", classes)
    model = he_initialised(PreResNet((depth - 2) // 9, classes))
    return built(model, "preresnet", depth=depth, classes=classes)


class DenseLayer(nn.Module):
    """1x1 to 4k channels and 3x3 to k, put beside the input (Huang et al. 2017, DenseNet-B).

    Args:
        inputs: channels of the input.
        growth: channels added, k.
    """

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        width = EXPANSION * growth
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, inputs, height, width] to [batch, inputs + growth, height, width]."""
        inner = self.conv1(self.relu1(self.bn1(x)))
        return torch.cat([x, self.conv2(self.relu2(self.bn2(inner)))], dim=1)


def densenet(depth: int = 100, growth: int = 12, classes: int = 10) -> nn.Module:
    """Return DenseNet-BC, compression 0.5, for 32x32 images (Huang et al. 2017).

    It maps images [batch, 3, 32, 32] to scores [batch, classes].

    Args:
        depth: layers with weights, 6n + 4: 40, 100, 190, 250, ...
        growth: channels that a layer adds, k; the first convolution has 2k.
        classes: number of scores.

    Raises:
        ModelError: the depth is not 6n + 4, or a number is below 1.

    >>> sum(parameter.numel() for parameter in densenet(40).parameters())
    176122
    """
    if depth < 10 or (depth - 4) % 6:
        raise ModelError(f"densenet: depth {depth} is not 6n + 4; choose 10, 22, 40, 100, 190, 250")
    if growth < 1:
        raise ModelError(f"densenet: growth {growth} must be at least 1")
    check_classes("densenet", classes)
    channels = 2 * growth
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
    for stage in range(3):
        if stage:
            layers.append(_transition(channels))
            channels //= 2
        stacked = [DenseLayer(channels + n * growth, growth) for n in range((depth - 4) // 6)]
        layers.append(nn.Sequential(*stacked))
        channels += len(stacked) * growth
    names = ("conv1", "dense1", "transition1", "dense2", "transition2", "dense3")
    end = OrderedDict(
        bn=nn.BatchNorm2d(channels),
        relu=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        linear=nn.Linear(channels, classes),
    )
    model = nn.Sequential(OrderedDict(zip(names, layers, strict=True)) | end)
    return built(he_initialised(model), "densenet", depth=depth, growth=growth, classes=classes)


class VGG(nn.Module):
    """Stacked 3x3 convolutions with BatchNorm, average pooling and one linear classifier.

    Args:
        plan: channels of each convolution, "M" for 2x2 max pooling.
        classes: number of scores.
    """

    def __init__(self, plan: tuple[int | str, ...], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for entry in plan:
            if isinstance(entry, str):
                layers.append(nn.MaxPool2d(2))
                continue
            convolution = nn.Conv2d(channels, entry, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(entry), nn.ReLU()]
            channels = entry
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [batch, 3, height, width] to scores [batch, classes]."""
        scores: Tensor = self.classifier(self.features(x).mean(dim=(2, 3)))
        return scores


def vgg(depth: int | str = 16, classes: int = 10) -> nn.Module:
    """Return a VGG with BatchNorm for 32x32 images (Simonyan & Zisserman 2015).

    It maps images [batch, 3, 32, 32] to scores [batch, classes].

    Args:
        depth: 11, 13, 16 or 19; "small": six convolutions of 32 to 128 channels.
        classes: number of scores.

    Raises:
        ModelError: another depth, or fewer than one class.

    >>> vgg("small").classifier
    Linear(in_features=128, out_features=10, bias=True)
    """
    if depth not in VGG_PLANS:
        raise ModelError(f"vgg: depth {depth!r} is unknown; choose one of {list(VGG_PLANS)}")
    check_classes("vgg", classes)
    return built(
        he_initialised(VGG(VGG_PLANS[depth], classes)), "vgg", depth=depth, classes=classes
    )


def digits_cnn() -> nn.Module:
    """Return a small network for 8x8 digits: three convolutions, 40,506 parameters.

    It maps images [batch, 1, 8, 8] to scores [batch, 10].

    >>> sum(parameter.numel() for parameter in digits_cnn().parameters())
    40506
    """
    layers = OrderedDict(
        conv1=nn.Conv2d(1, 16, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(16),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(16, 32, 3, padding=1, bias=False),
        bn2=nn.BatchNorm2d(32),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        conv3=nn.Conv2d(32, 64, 3, padding=1, bias=False),
        bn3=nn.BatchNorm2d(64),
        relu3=nn.ReLU(),
        pool3=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(256, 64),
        relu4=nn.ReLU(),
        fc2=nn.Linear(64, 10),
    )
    return built(he_initialised(nn.Sequential(layers)), "digits_cnn")


def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, 1 if inputs == outputs else 2)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


def _pre_stage(inputs: int, width: int, blocks: int) -> nn.Sequential:
    first = PreBottleneck(inputs, width, 1 if inputs == width else 2)
    more = (PreBottleneck(EXPANSION * width, width, 1) for _ in range(blocks - 1))
    return nn.Sequential(first, *more)


def _transition(channels: int) -> nn.Sequential:
    layers = OrderedDict(
        bn=nn.BatchNorm2d(channels),
        relu=nn.ReLU(),
        conv=nn.Conv2d(channels, channels // 2, 1, bias=False),
        pool=nn.AvgPool2d(2),
    )
    return nn.Sequential(layers)


def he_initialised(model: nn.Module) -> nn.Module:
    """Draw convolutions and linear layers from N(0, 2 / fan-in) (He et al. 2015, eq. 10)."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def check_classes(name: str, classes: int) -> None:
    """Refuse a network without classes."""
    if classes < 1:
        raise ModelError(f"{name}: classes {classes} must be at least 1")
