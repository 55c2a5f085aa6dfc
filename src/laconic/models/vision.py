"""Image networks of the papers: LeNet, CIFAR ResNet, VGG, and a small one for digits."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from laconic.errors import ModelError
from laconic.models.load import built

__all__ = [
    "digits_cnn",
    "lenet_5",
    "lenet_300_100",
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
    _check_classes("resnet", classes)
    model = _he(ResNet((depth - 2) // 6, classes))
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
    _check_classes("vgg", classes)
    return built(_he(VGG(VGG_PLANS[depth], classes)), "vgg", depth=depth, classes=classes)


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
    return built(_he(nn.Sequential(layers)), "digits_cnn")


def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, 1 if inputs == outputs else 2)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


def _he(model: nn.Module) -> nn.Module:
    """Draw convolutions and linear layers from N(0, 2 / fan-in) (He et al. 2015, eq. 10)."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def _check_classes(name: str, classes: int) -> None:
    if classes < 1:
        raise ModelError(f"{name}: classes {classes} must be at least 1")
