"""Laws of axes, for every family of networks; run as a script, this file writes docs/axes.md."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic import models
from laconic.models.mobile import InvertedResidual
from laconic.ship import load, save
from laconic.step import State
from laconic.structure import Unpack, surgery
from laconic.structure.axes import Axis, find_axes, permute_, slice_, sliced_shapes, widen_

PAGE = Path(__file__).parents[2] / "docs" / "axes.md"
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


by_family = pytest.mark.parametrize("name", list(FAMILIES))


# ------------------------------------------------------------------ the laws


@by_family
def test_slicing_everything_is_the_identity(name: str) -> None:
    model = copy.deepcopy(network(name))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    edit = slice_(model, {axis: range(axis.size) for axis in free(name)})
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert edit.axes == list(axes_of(name)) and surgery.edits_of(model).get("shapes") is None


@by_family
def test_permuting_computes_the_same(name: str) -> None:
    model = copy.deepcopy(network(name))
    before = run(model, name)
    for axis in free(name):
        order = torch.randperm(axis.size, generator=torch.Generator().manual_seed(axis.size))
        permute_(model, axis, order.tolist())
    torch.testing.assert_close(run(model, name), before, rtol=TOLERANCE, atol=TOLERANCE)


@by_family
def test_slicing_is_zeroing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A norm over a sliced axis averages fewer numbers: compare with one that looks away.
    before = run(network(name), name)
    every = {axis.kind for axis in free(name)}
    for kinds in [every, *({kind} for kind in sorted(every) if len(every) > 1)]:
        kept = {axis: some(axis) for axis in free(name) if axis.kind in kinds}
        model, zeroed = copy.deepcopy(network(name)), copy.deepcopy(network(name))
        slice_(model, kept)
        zero_(zeroed, kept)
        with monkeypatch.context() as patched:
            patched.setattr(F, "layer_norm", masked_layer_norm)
            expected = run(zeroed, name)
        torch.testing.assert_close(run(model, name), expected, rtol=TOLERANCE, atol=TOLERANCE)
        assert not torch.allclose(expected, before), "the law would hold for anything"


@by_family
def test_every_axis_is_as_predicted_and_found_again(name: str) -> None:
    model = copy.deepcopy(network(name))
    kept = {axis: some(axis) for axis in free(name)}
    predicted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    predicted |= sliced_shapes(model, kept)
    edit = slice_(model, kept)
    assert {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} == predicted
    args, kwargs = called(name)
    again = find_axes(model, *args, **kwargs)
    # Axes of one element are not told from dimensions of size 1.
    found = {axis.uses: axis.kind for axis in again if axis.frozen is None}
    left = [axis for axis in edit.axes if axis.frozen is None and axis.size > 1]
    if not any(axis.size == 1 for axis in edit.axes):
        assert {axis.uses: axis.kind for axis in left} == found
    assert {edit.replaced[axis].size for axis in kept} == {len(each) for each in kept.values()}


@by_family
def test_axis_after_axis_is_all_at_once(name: str) -> None:
    model, at_once = copy.deepcopy(network(name)), copy.deepcopy(network(name))
    slice_(at_once, {axis: some(axis) for axis in free(name)})
    axes = list(axes_of(name))
    for place in range(len(axes)):
        if axes[place].frozen is None:
            axes = slice_(model, {axes[place]: some(axes[place])}).axes
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in at_once.state_dict().items())
    assert surgery.edits_of(model) == surgery.edits_of(at_once)


@by_family
def test_half_of_everything_runs_and_learns(name: str) -> None:
    model = copy.deepcopy(network(name)).train()
    slice_(model, {axis: some(axis) for axis in free(name)})
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    outputs = run(model, name)
    assert outputs.shape == run(network(name), name).shape
    outputs.square().mean().backward()
    optimizer.step()
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    moved = [bool((new != old).any()) for new, old in zip(model.parameters(), before, strict=True)]
    assert sum(moved) > len(moved) / 2


@by_family
def test_a_sliced_network_is_saved_and_loaded_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = copy.deepcopy(network(name))
    slice_(model, {axis: some(axis) for axis in free(name)})
    save(model, tmp_path / "model.safetensors")
    fresh = FAMILIES[name].build().double()
    loaded = load(tmp_path / "model.safetensors", model=fresh)
    assert torch.equal(run(loaded, name), run(model, name))


# What a norm averages over, and products of two activations, do change.
WIDENED = ("CIFAR ResNet", "DenseNet", "groups", "MobileNetV2", "squeeze and excitation", "LeNet-5")


HEADS = ("BERT", "ViT", "ALBERT", "fused attention", "gated linear unit", "LSTM")


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        *((name, {"channel", "neuron"}) for name in WIDENED),
        *((name, {"head", "neuron", "other"}) for name in HEADS),
    ],
)
def test_widening_computes_the_same(name: str, kinds: set[str]) -> None:
    model, axes = copy.deepcopy(network(name)), list(axes_of(name))
    before = run(model, name)
    for place in range(len(axes)):
        axis = axes[place]
        if axis.frozen is None and axis.kind in kinds:
            source = [*range(axis.size), *(element % axis.size for element in (1, 2, 1))]
            axes = widen_(model, axis, source).axes
    torch.testing.assert_close(run(model, name), before, rtol=TOLERANCE, atol=TOLERANCE)
    assert sum(axis.size for axis in axes) > sum(axis.size for axis in axes_of(name))


# ------------------------------------------------------------------ random networks


class Tangle(nn.Module):
    """Random operations on vectors, each on some of the results before it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.draw, self.parts, self.plan = random.Random(seed), nn.ModuleList(), []
        self.sizes = [6]
        while len(self.plan) < 9:
            self.add(*(self.draw.choice(range(len(self.sizes))[-4:]) for _ in range(2)))
        self.scores = nn.Linear(sum(self.sizes[-3:]), 3)

    def add(self, one: int, other: int) -> None:
        size, width = self.sizes[one], self.sizes[other]
        modules = {
            "linear": lambda: nn.Linear(size, self.draw.choice([4, 6, 8, 12])),
            "norm": lambda: nn.LayerNorm(size),
            "batch norm": lambda: nn.BatchNorm1d(size),
            "groups": lambda: Grouped(size, groups=2 if size % 2 == 0 else size),
        }
        sizes = {
            "join": size + width,
            "add": size if size == width else 0,
            "gate": size // 2 if size % 2 == 0 else 0,
            "shuffle": size if size % 2 == 0 else 0,
            "pad": size + 2,
            "attend": size if size == width else 0,
            "largest": size // 4 if size % 4 == 0 else 0,
            "outer": size * width if size * width < 80 else 0,
        }
        kind = self.draw.choice([*modules, *sizes, "linear", "linear"])
        if kind in modules:
            self.parts.append(modules[kind]())
            features = getattr(self.parts[-1], "out_features", size)
            self.sizes.append(features)
            self.plan.append(("module", one, len(self.parts) - 1))
        elif sizes[kind]:
            self.sizes.append(sizes[kind])
            self.plan.append((kind, one, other))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for kind, one, other in self.plan:
            y = values[one]
            if kind == "module":
                values.append(torch.tanh(self.parts[other](y)))
            else:
                values.append(TANGLED[kind](y, values[other]))
        return self.scores(torch.cat(values[-3:], 1))


class Grouped(nn.Conv1d):
    def __init__(self, size: int, *, groups: int) -> None:
        super().__init__(size, size, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, None])[:, :, 0]


TANGLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "join": lambda x, y: torch.cat([x, y], 1),
    "add": lambda x, y: x + y,
    "gate": lambda x, y: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid(),
    "shuffle": lambda x, y: x.view(len(x), 2, -1).transpose(1, 2).reshape(len(x), -1),
    "pad": lambda x, y: F.pad(x, (1, 1)),
    "attend": lambda x, y: (x @ y.T).softmax(-1) @ y,
    "largest": lambda x, y: x.unflatten(1, (-1, 4)).amax(2),
    "outer": lambda x, y: (x[:, :, None] * y[:, None]).flatten(1),
}


@pytest.mark.parametrize("seed", range(25))
def test_the_laws_hold_for_random_networks(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed)
    model, x = Tangle(seed).double().eval(), noise(5, 6)()
    for parameter in model.parameters():
        parameter.data.normal_(0.1, 0.4)
    axes = [axis for axis in find_axes(model, x) if axis.frozen is None]
    before = model(x)
    for group in [*([axis] for axis in axes), axes]:
        kept = {axis: some(axis, seed) for axis in group}
        small, zeroed, permuted = (copy.deepcopy(model) for _ in range(3))
        slice_(small, kept)
        zero_(zeroed, kept)
        with monkeypatch.context() as patched:
            patched.setattr(F, "layer_norm", masked_layer_norm)
            expected = zeroed(x)
        torch.testing.assert_close(small(x), expected, rtol=TOLERANCE, atol=TOLERANCE)
        for axis in group:
            permute_(permuted, axis, torch.randperm(axis.size).tolist())
        torch.testing.assert_close(permuted(x), before, rtol=TOLERANCE, atol=TOLERANCE)


# ------------------------------------------------------------------ what must be found

EXPECTED: dict[str, dict[str, int]] = {
    "BERT": {"hidden": 1, "head": 2, "head_dim": 2, "neuron": 3},
    "BERT, eager attention": {"hidden": 1, "head": 2, "head_dim": 2, "neuron": 3},
    "BERT, language model": {"hidden": 1, "head": 2, "head_dim": 2, "neuron": 2},
    "RoBERTa": {"hidden": 1, "head": 2, "head_dim": 2, "neuron": 3},
    "DistilBERT": {"hidden": 1, "head": 2, "head_dim": 2, "neuron": 3},
    "ALBERT": {"hidden": 2, "head": 1, "head_dim": 1, "neuron": 2},
    "ELECTRA": {"hidden": 2, "head": 2, "head_dim": 2, "neuron": 3},
    "MobileBERT": {"hidden": 5, "head": 2, "head_dim": 2, "neuron": 5, "other": 1},
    "ViT": {"hidden": 1, "head": 2, "head_dim": 2, "neuron": 2},
    "ConvNeXt": {"hidden": 4, "neuron": 5},
    "ResNet, bottlenecks": {"channel": 12},
    "LeNet-5": {"channel": 2, "neuron": 1},
    "CIFAR ResNet": {"channel": 4},
    "CIFAR ResNet, pre-activation": {"channel": 10},
    "VGG": {"channel": 6},
    "DenseNet": {"channel": 9},
    "MobileNet": {"channel": 13},
    "MobileNetV2": {"channel": 5},
    "squeeze and excitation": {"channel": 1, "neuron": 1},
    "groups": {"channel": 4},
    "LSTM": {"other": 1, "neuron": 1},
    "GRU": {"other": 1, "neuron": 1},
    "fused attention": {"hidden": 1, "head": 1, "head_dim": 1},
    "fused attention, heads written down": {"hidden": 1, "head_dim": 1},
    "torch's encoder layer": {"neuron": 1},
    "torch's encoder layer, unpacked": {"head": 1, "head_dim": 1, "neuron": 1, "hidden": 1},
    "gated linear unit": {"neuron": 1, "hidden": 1},
}


@by_family
def test_so_many_axes_of_each_kind_are_free(name: str) -> None:
    kinds = [axis.kind for axis in free(name)]
    assert {kind: kinds.count(kind) for kind in kinds} == EXPECTED[name]


# ------------------------------------------------------------------ the page in the docs

INTRODUCTION = """# Axes

<!-- Written by `python tests/laws/test_axis_laws.py`, and checked by the same file as a test. -->

An *axis* is a set of coupled dimensions: a channel, a head, a neuron stands in several tensors, and
comes and goes in all of them at once. `laconic.structure.find_axes(model, example)` runs a network
and finds them, without a rule for any one network. What it cannot vouch for is *frozen*, with
a reason: an operation it has no rule for, an input or an output, a size that is written in the code
of the forward. So an unusual network is pruned less, never wrongly.

The table is a test: for each of these tiny networks, slicing is compared with zeroing, permuting
with the network as it was; half of everything is cut off, trained a step, saved and loaded.
Each entry is a size, or `count x size`.
"""


def sizes(axes: list[Axis]) -> str:
    counts: dict[int, int] = {}
    for axis in axes:
        counts[axis.size] = counts.get(axis.size, 0) + 1
    return ", ".join(f"{n} x {size}" if n > 1 else f"{size}" for size, n in counts.items())


def listing(axes: Iterator[Axis], key: Callable[[Axis], str]) -> str:
    groups: dict[str, list[Axis]] = {}
    for axis in axes:
        groups.setdefault(key(axis), []).append(axis)
    return "; ".join(f"{word}: {sizes(group)}" for word, group in sorted(groups.items()))


def page() -> str:
    """Return docs/axes.md."""
    lines = ["| network | prunable | frozen |", "| --- | --- | --- |"]
    for name in FAMILIES:
        prunable = listing(iter(free(name)), lambda axis: axis.kind)
        frozen = (axis for axis in axes_of(name) if axis.frozen is not None)
        reasons = listing(frozen, lambda axis: str(axis.frozen).partition(":")[0])
        lines.append(f"| {name} | {prunable} | {reasons} |")
    return INTRODUCTION + "\n" + "\n".join(lines) + "\n"


def test_the_table_in_the_docs_is_true() -> None:
    stale = "docs/axes.md is stale: run python tests/laws/test_axis_laws.py"
    assert PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page(), stale


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
