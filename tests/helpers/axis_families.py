"""A tiny network of every family whose axes are found, and what slicing is compared with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic import models
from laconic.models.mobile import InvertedResidual
from laconic.step import State
from laconic.structure import Unpack
from laconic.structure.axes import Axis, find_axes

# Networks compute in float64 here: what is left is the order of sums.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Family:
    """A tiny network with random weights, and an example for its forward."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    call: str = ""


# ------------------------------------------------------------------ the families


def tokens() -> Tensor:
    return torch.tensor([[5, 7, 11, 13, 17], [2, 3, 19, 23, 29]])


def noise(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(3)).double()


def text(name: str, **options: Any) -> Family:
    """Return a Hugging Face encoder of two layers for text."""

    def build() -> nn.Module:
        import transformers

        sizes = {
            "vocab_size": 40,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 20,
            "max_position_embeddings": 16,
            "attn_implementation": "sdpa",
        }
        kind, _, head = name.partition(":")
        config = getattr(transformers, f"{kind}Config")(**sizes | options)
        head = head or "ForSequenceClassification"
        network: nn.Module = getattr(transformers, f"{kind}{head}")(config)
        return network

    return Family(build, tokens, "input_ids")


def picture(name: str, **options: Any) -> Family:
    """Return a Hugging Face network for images of 16 x 16 pixels."""

    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(**options)
        network: nn.Module = getattr(transformers, f"{name}ForImageClassification")(config)
        return network

    return Family(build, noise(2, 3, 16, 16), "pixel_values")


def ours(name: str, *shape: int, **arguments: Any) -> Family:
    return Family(lambda: getattr(models, name)(**arguments), noise(2, *shape))


class Excited(nn.Module):
    """Squeeze and excitation by linear layers (Hu et al. 2018), with swish."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.squeeze, self.excite = nn.Linear(6, 4), nn.Linear(4, 6)
        self.last = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.first(x))
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean((2, 3))))))
        return F.interpolate(self.last(x * gate[:, :, None, None]), scale_factor=2)


class Recurrent(nn.Module):
    """Embedding, recurrent layers of both directions, the last state."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 6)
        self.layers = kind(6, 4, 2, bidirectional=True, batch_first=True)
        self.hidden, self.scores = nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.layers(self.embedding(x))
        return self.scores(torch.relu(self.hidden(states[:, -1])))


class Fused(nn.Module):
    """Attention whose queries, keys and values come from one linear layer, as in timm."""

    def __init__(self, heads: int = -1) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, 4
        self.inputs, self.norm = nn.Linear(5, 12), nn.LayerNorm(12)
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.outputs = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        split = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, self.head_dim))
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        scores = torch.einsum("bhid,bhjd->bhij", query, key) * 0.5
        context = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), value)
        x = x + self.proj(context.transpose(1, 2).flatten(2))
        return self.outputs(x.mean(1))


class Encoder(nn.Module):
    """torch's own encoder layer, whose sizes only its constructor can set."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.outputs = nn.Linear(5, 12), nn.Linear(12, 3)
        self.layer = nn.TransformerEncoderLayer(12, 3, 10, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(self.layer(self.inputs(x)).sum(1))


def unpacked_encoder() -> nn.Module:
    """Return it after the step that gives its attention layers of their own."""
    state = State(Encoder())
    Unpack().apply(state)
    return state.model


class Gated(nn.Module):
    """A gated linear unit, in halves of one layer; a residual added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.pair = nn.Linear(5, 6), nn.Linear(6, 16)
        self.back, self.outputs = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        up, gate = self.pair(x).chunk(2, dim=-1)
        inner = self.back(up * torch.sigmoid(gate))
        inner += x
        return self.outputs(inner)


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.GroupNorm(4, 12),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3, groups=4),
        nn.ReLU(),
        nn.Conv2d(8, 16, 1, groups=8),
        nn.Conv2d(16, 9, 1),
        nn.GroupNorm(9, 9),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(81, 4),
    )


def inverted() -> nn.Module:
    """Return three blocks of MobileNetV2 between its first and last convolutions."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        InvertedResidual(8, 8, expansion=1, stride=1),
        InvertedResidual(8, 8, expansion=3, stride=1),
        InvertedResidual(8, 6, expansion=3, stride=2),
        nn.Conv2d(6, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


MOBILEBERT = {
    "embedding_size": 8,
    "intra_bottleneck_size": 12,
    "true_hidden_size": 12,
    "num_feedforward_networks": 2,
}
FAMILIES: dict[str, Family] = {
    "BERT": text("Bert"),
    "BERT, eager attention": text("Bert", attn_implementation="eager"),
    "BERT, language model": text("Bert:ForMaskedLM"),
    "RoBERTa": text("Roberta"),
    "DistilBERT": text("DistilBert", hidden_dim=20),
    "ALBERT": text("Albert", embedding_size=10),
    "ELECTRA": text("Electra", embedding_size=10),
    "MobileBERT": text("MobileBert", **MOBILEBERT),
    "ViT": picture(
        "ViT",
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        image_size=16,
        patch_size=8,
    ),
    "ConvNeXt": picture(
        "ConvNext", hidden_sizes=[6, 8, 10, 12], depths=[1, 1, 2, 1], image_size=16, patch_size=2
    ),
    "ResNet, bottlenecks": picture(
        "ResNet",
        embedding_size=8,
        hidden_sizes=[8, 12, 16, 20],
        depths=[1, 1, 1, 1],
        layer_type="bottleneck",
    ),
    "LeNet-5": ours("lenet_5", 1, 28, 28),
    "CIFAR ResNet": ours("resnet", 3, 16, 16, depth=8),
    "CIFAR ResNet, pre-activation": ours("preresnet", 3, 16, 16, depth=11),
    "VGG": ours("vgg", 3, 16, 16, depth="small"),
    "DenseNet": ours("densenet", 3, 16, 16, depth=10, growth=4),
    "MobileNet": ours("mobilenet_v1", 3, 8, 8, width=0.05),
    "MobileNetV2": Family(inverted, noise(2, 3, 8, 8)),
    "squeeze and excitation": Family(Excited, noise(2, 3, 6, 6)),
    "groups": Family(grouped, noise(2, 3, 10, 10)),
    "LSTM": Family(lambda: Recurrent(nn.LSTM), tokens),
    "GRU": Family(lambda: Recurrent(nn.GRU), tokens),
    "fused attention": Family(Fused, noise(2, 4, 5)),
    "fused attention, heads written down": Family(lambda: Fused(3), noise(2, 4, 5)),
    "torch's encoder layer": Family(Encoder, noise(2, 4, 5)),
    "torch's encoder layer, unpacked": Family(unpacked_encoder, noise(2, 4, 5)),
    "gated linear unit": Family(Gated, noise(2, 5)),
}
LIBRARY = {name for name, family in FAMILIES.items() if family.call}


# ------------------------------------------------------------------ their networks and axes


@functools.cache
def network(name: str) -> nn.Module:
    """Return the network of a family, random in every parameter and statistic."""
    if name in LIBRARY:
        pytest.importorskip("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = FAMILIES[name].build().double().eval()
        for parameter in dict.fromkeys(made.parameters()):
            parameter.data.normal_(0.1, 0.3)
        for key, buffer in made.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_(0, 0.3)
            elif key.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return made


@functools.cache
def axes_of(name: str) -> tuple[Axis, ...]:
    made, (args, kwargs) = network(name), called(name)
    return tuple(find_axes(made, *args, **kwargs))


def called(name: str) -> tuple[list[Any], dict[str, Any]]:
    family = FAMILIES[name]
    return ([], {family.call: family.inputs()}) if family.call else ([family.inputs()], {})


def run(model: nn.Module, name: str) -> Tensor:
    args, kwargs = called(name)
    found = model(*args, **kwargs)
    return found.logits if FAMILIES[name].call else found


def free(name: str) -> list[Axis]:
    return [axis for axis in axes_of(name) if axis.frozen is None]


def some(axis: Axis, seed: int = 0) -> list[int]:
    """Return about half of the elements of an axis, in order."""
    order = torch.randperm(axis.size, generator=torch.Generator().manual_seed(seed + axis.size))
    return sorted(order[: max(1, axis.size // 2)].tolist())


# ------------------------------------------------------------------ what slicing is compared with


def zero_(model: nn.Module, kept: Mapping[Axis, list[int]]) -> None:
    """Zero every parameter and statistic of the other elements."""
    for axis, elements in kept.items():
        gone = [element for element in range(axis.size) if element not in elements]
        for use in axis.uses:
            path, _, attribute = use.name.rpartition(".")
            tensor = getattr(model.get_submodule(path), attribute)
            with torch.no_grad():
                tensor.index_fill_(use.dim, use.places()[gone].flatten(), 0.0)


def masked_layer_norm(
    x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> Tensor:
    """Normalise over what has a weight: the norm of a network that was sliced."""
    there = (weight != 0).to(x)
    mean = (x * there).sum(-1, keepdim=True) / there.sum()
    spread = ((x - mean).square() * there).sum(-1, keepdim=True) / there.sum()
    return (x - mean) / (spread + eps).sqrt() * weight + bias * there
