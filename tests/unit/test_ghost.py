"""Ghosts of a Transformer's sublayers and of a convolution's channels."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import laconic
from laconic.errors import ChainError, ModelError, RecipeError, ScopeError
from laconic.measure import macs
from laconic.models import layers, resnet, vgg
from laconic.models.ghosts import GhostConv2d, GhostProjection, neighbour_mean
from laconic.recover import Reset
from laconic.scope import Scope
from laconic.step import State, Step, run_step
from laconic.structure import ChannelGhosts, Ghost, ShareLayers, TokenGhosts
from laconic.structure.ghost import nearest_multiples
from laconic.structure.surgery import apply_edits_, edits_of, replace_
from laconic.weights import Float, Ternary
from laconic.weights.laid import laid_tensors, lay

# Two sums in another order, float32.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


def numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def after(step: Step, model: nn.Module) -> Any:
    step.check(model, None)
    run_step(step, State(model))
    return model


# ------------------------------------------------------------------ the mean of neighbours


def test_the_published_formula() -> None:
    """O_i = sum_m softmax(W)_m X_{i - ceil((k + 1) / 2) + m}, zeros beyond the ends."""
    x = drawn(2, 6, 3)
    for taps in (1, 2, 3, 4, 5):
        logits = drawn(3, taps, seed=taps)
        weight, shift = torch.softmax(logits, dim=1), -(-(taps + 1) // 2)
        wanted = torch.zeros_like(x)
        for i in range(6):
            for m in range(1, taps + 1):
                place = i - shift + m
                if 0 <= place < 6:
                    wanted[:, i] += weight[:, m - 1] * x[:, place]
        torch.testing.assert_close(neighbour_mean(x, logits), wanted)


@given(seed=st.integers(0, 50), taps=st.sampled_from([1, 3, 5]))
def test_a_mean_is_within_its_window(seed: int, taps: int) -> None:
    x, logits = drawn(2, 7, 3, seed=seed), 3 * drawn(3, taps, seed=seed + 1)
    padded = F.pad(x.transpose(1, 2), (taps // 2, taps // 2)).unfold(2, taps, 1)
    found = neighbour_mean(x, logits).transpose(1, 2)
    slack = 1e-6
    assert bool((found <= padded.amax(dim=-1) + slack).all())
    assert bool((found >= padded.amin(dim=-1) - slack).all())


def test_constants_are_kept_but_at_the_ends() -> None:
    found = neighbour_mean(torch.full((1, 6, 2), 4.0), drawn(2, 3))
    torch.testing.assert_close(found[:, 1:-1], torch.full((1, 4, 2), 4.0))
    assert bool((found[:, [0, -1]] < 4.0 - 1e-3).all())


def test_it_is_a_grouped_convolution() -> None:
    x, logits = drawn(2, 5, 4), drawn(4, 3, seed=1)
    kernel = torch.softmax(logits, dim=1)[:, None]
    wanted = F.conv1d(x.transpose(1, 2), kernel, padding=1, groups=4).transpose(1, 2)
    assert torch.equal(neighbour_mean(x, logits), wanted)


def test_no_channel_sees_another() -> None:
    x, logits = drawn(1, 5, 3), drawn(3, 3, seed=1)
    other = x.clone()
    other[..., 1] += 1
    same = neighbour_mean(x, logits) == neighbour_mean(other, logits)
    assert bool(same[..., [0, 2]].all()) and not bool(same[..., 1].any())


# ------------------------------------------------------------------ a projection with ghosts


def projection(parts: int = 1, **options: Any) -> GhostProjection:
    dense = {"Linear": {"in_features": 12 // parts, "out_features": 6, "bias": False}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = GhostProjection([dense] * parts, 6, **options)
        nn.init.normal_(made.logits)
        if made.bias is not None:
            nn.init.normal_(made.bias)
    return made


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("ghosts", [1, 2])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_what_a_projection_computes(parts: int, ghosts: int, activation: str) -> None:
    layer = projection(parts, ghosts=ghosts, activation=activation, gain=0.5)
    x = drawn(2, 5, 12)
    wanted = layer.bias.expand(2, 5, 6).clone()
    kernels = layer.logits.detach().reshape(parts, ghosts, 6, 3)
    for part in range(parts):
        own = slice(part * 12 // parts, (part + 1) * 12 // parts)
        feature = x[..., own] @ layer.dense[part].weight.T
        wanted = wanted + feature
        for ghost in range(ghosts):
            mean = neighbour_mean(feature, kernels[part, ghost])
            wanted = wanted + 0.5 * (mean.relu() if activation == "relu" else mean)
    torch.testing.assert_close(layer(x), wanted, **ROUNDING)
    assert layer.logits.numel() == parts * ghosts * 6 * 3


@pytest.mark.parametrize("gain", [0.0, "learned"])
def test_a_gain_of_zero_is_the_projection_alone(gain: float | str) -> None:
    layer, x = projection(2, gain=gain), drawn(2, 5, 12)
    plain = torch.cat([part.weight for part in layer.dense], dim=1)
    torch.testing.assert_close(layer(x), F.linear(x, plain, layer.bias), **ROUNDING)


def test_a_learned_gain_leaves_zero() -> None:
    layer = projection(gain="learned")
    layer(drawn(2, 5, 12)).square().sum().backward()
    assert float(layer.gain.grad.abs()) > 0
    assert not bool(layer.logits.grad.any())  # until the gain has moved


@pytest.mark.parametrize(
    "layer",
    [
        projection(),
        projection(3, ghosts=2, taps=5, gain="learned", activation="relu", bias=False),
        GhostConv2d({"Conv2d": {"in_channels": 3, "out_channels": 4, "kernel_size": 3}}, 4, 7),
        GhostConv2d(
            {"Conv2d": {"in_channels": 3, "out_channels": 2, "kernel_size": 1, "bias": False}},
            *(2, 8),
            ratio=4,
            taps=5,
            bias=True,
        ),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_is_rebuilt_from_its_description(layer: nn.Module) -> None:
    spec = layers.describe(layer)
    again = layers.layer(spec)
    assert layers.describe(again) == spec
    again.load_state_dict(layer.state_dict())
    x = drawn(2, 5, 12) if isinstance(layer, GhostProjection) else drawn(2, 3, 8, 8)
    assert torch.equal(again(x), layer(x))


def test_a_description_follows_what_is_inside() -> None:
    model = nn.Sequential(projection())
    low = nn.Sequential(nn.Linear(12, 2, bias=False), nn.Linear(2, 6, bias=False))
    replace_(model, "0", projection())
    replace_(model, "0.dense.0", low)
    again = nn.Sequential(nn.Linear(12, 6))
    apply_edits_(again, edits_of(model), {})
    again.load_state_dict(model.state_dict())
    x = drawn(2, 5, 12)
    assert torch.equal(again(x), model(x))


CONV = {"Conv2d": {"in_channels": 3, "out_channels": 4, "kernel_size": 3}}
LINEAR = {"Linear": {"in_features": 4, "out_features": 6}}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("GhostProjection", {"dense": [], "outputs": 6}, "parts 0 of a ghost layer"),
        ("GhostProjection", {"dense": [LINEAR] * 129, "outputs": 6}, "parts 129 of a ghost"),
        ("GhostProjection", {"dense": [LINEAR], "outputs": 6, "ghosts": 1000}, "ghosts 1000 of"),
        ("GhostProjection", {"dense": [LINEAR], "outputs": 6, "taps": 0}, "taps 0 of a ghost"),
        ("GhostProjection", {"dense": [LINEAR], "outputs": 6, "activation": "exp"}, "'exp'"),
        ("GhostProjection", {"dense": [LINEAR], "outputs": 6, "gain": "much"}, "cannot be built"),
        ("GhostProjection", {"dense": [{"Bad": {}}], "outputs": 6}, "no layer is called 'Bad'"),
        ("GhostProjection", {"dense": 3, "outputs": 6}, "cannot be built"),
        ("GhostConv2d", {"primary": CONV, "inputs": 4, "outputs": 9}, "give 5 channels"),
        ("GhostConv2d", {"primary": CONV, "inputs": 4, "outputs": 8, "taps": 2}, "an odd number"),
        ("GhostConv2d", {"primary": CONV, "inputs": 4, "outputs": 8, "ratio": 1}, "ratio 1 of"),
        ("GhostConv2d", {"primary": CONV, "inputs": 4, "outputs": 8, "taps": 999}, "taps 999 of"),
    ],
)
def test_a_hostile_description_is_refused(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        layers.layer({name: arguments})


# ------------------------------------------------------------------ GhostBERT


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers", reason="published encoders need transformers")


def bert(transformers: ModuleType, layers: int = 2, **fields: Any) -> nn.Module:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
    config = transformers.BertConfig(
        **{**sizes, "num_hidden_layers": layers, "vocab_size": 20, **fields}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config).eval()


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(14).reshape(2, 7) + 3}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**tokens()).logits


def sublayers(model: nn.Module) -> list[nn.Module]:
    return [
        place.dense
        for block in model.bert.encoder.layer
        for place in (block.attention.output, block.output)
    ]


def test_extra_parameters_and_operations_of_bert_base(transformers: ModuleType) -> None:
    """Huang et al. 2021: 55.3 K parameters and 14.2 M FLOPs more, at 128 tokens."""
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig())
    batch = {"input_ids": torch.zeros(1, 128, dtype=torch.long, device="meta")}
    before, operations = numbers(model), macs(model, batch)[""]
    after(Ghost(TokenGhosts()), model)
    assert numbers(model) - before == 55_296
    assert 2 * (macs(model, batch)[""] - operations) == 55_296 * 128 * 2 == 14_155_776


@pytest.mark.parametrize("per", ["sublayer", "head"])
def test_ghosts_without_gain_leave_the_network_as_it_was(
    transformers: ModuleType, per: str
) -> None:
    model = bert(transformers)
    wanted = logits(model)
    plain = numbers(model)
    after(Ghost(TokenGhosts(gain=0.0, per=per)), model)
    torch.testing.assert_close(logits(model), wanted, **ROUNDING)
    parts = 1 if per == "sublayer" else 2
    assert numbers(model) - plain == 2 * 2 * parts * 8 * 3
    learned = after(Ghost(TokenGhosts(gain="learned", per=per)), bert(transformers))
    torch.testing.assert_close(logits(learned), wanted, **ROUNDING)


def test_ghosts_are_added_to_every_sublayer(transformers: ModuleType) -> None:
    model = bert(transformers)
    plain = copy.deepcopy(model)
    after(Ghost(TokenGhosts(activation="none")), model)
    x = drawn(1, 5, 12)
    for ghosted, dense in zip(sublayers(model), sublayers(plain), strict=True):
        inputs = x[..., : dense.in_features]
        feature = inputs @ dense.weight.T
        wanted = feature + neighbour_mean(feature, torch.zeros(8, 3)) + dense.bias
        torch.testing.assert_close(ghosted(inputs), wanted, **ROUNDING)
        # The weights are the same objects, so what shares them goes on sharing.
        assert isinstance(ghosted.dense[0], nn.Linear) and ghosted.dense[0].bias is None
        assert torch.equal(ghosted.bias, dense.bias)
    assert not torch.equal(logits(model), logits(plain))


def test_kernels_may_start_at_the_token_itself(transformers: ModuleType) -> None:
    model = after(Ghost(TokenGhosts(start="centre", taps=5)), bert(transformers))
    for ghosted in sublayers(model):
        weights = torch.softmax(ghosted.logits.detach().reshape(8, 5), dim=1)
        assert bool((weights[:, 2] > 0.97).all())
        assert torch.equal(weights[:, 0], weights[:, 4])
    mean = after(Ghost(TokenGhosts(taps=5)), bert(transformers))
    assert not bool(sublayers(mean)[0].logits.any())


def test_a_pruned_encoder_gets_a_kernel_for_each_head_that_is_left(
    transformers: ModuleType,
) -> None:
    model = bert(transformers)
    block = model.bert.encoder.layer[0]
    for name in ("query", "key", "value"):
        setattr(block.attention.self, name, nn.Linear(8, 4))
    block.attention.output.dense = nn.Linear(4, 8)
    wanted = logits(model)
    after(Ghost(TokenGhosts(gain=0.0, per="head")), model)
    assert len(block.attention.output.dense.dense) == 1
    assert len(model.bert.encoder.layer[1].attention.output.dense.dense) == 2
    torch.testing.assert_close(logits(model), wanted, **ROUNDING)


def test_the_scope_says_where(transformers: ModuleType) -> None:
    model = bert(transformers)
    after(Ghost(TokenGhosts(), scope=Scope("bert.encoder.layer.1.*, !*.attention.*")), model)
    kinds = [isinstance(layer, GhostProjection) for layer in sublayers(model)]
    assert kinds == [False, False, False, True]


def test_ghosts_come_once(transformers: ModuleType) -> None:
    model = after(Ghost(TokenGhosts()), bert(transformers))
    before = copy.deepcopy(model.state_dict())
    after(Ghost(TokenGhosts(ghosts=3)), model)
    assert list(model.state_dict()) == list(before)


@pytest.mark.parametrize("family", ["DistilBert", "Albert", "Roberta", "Electra", "ViT"])
def test_families(transformers: ModuleType, family: str) -> None:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
    own: dict[str, dict[str, Any]] = {
        "DistilBert": {"dim": 8, "n_heads": 2, "hidden_dim": 12, "n_layers": 2},
        "Albert": sizes | {"embedding_size": 8, "num_hidden_layers": 2},
        "ViT": sizes | {"num_hidden_layers": 2, "image_size": 8, "patch_size": 4},
    }
    fields = own.get(family, sizes | {"num_hidden_layers": 2, "embedding_size": 8})
    words = {} if family == "ViT" else {"vocab_size": 20}
    config = getattr(transformers, f"{family}Config")(**fields, **words)
    model = getattr(transformers, f"{family}Model")(config).eval()
    batch = {"pixel_values": drawn(1, 3, 8, 8)} if family == "ViT" else tokens()
    before = numbers(model)
    with torch.no_grad():
        wanted = model(**batch).last_hidden_state
        after(Ghost(TokenGhosts(gain=0.0, per="head")), model)
        torch.testing.assert_close(model(**batch).last_hidden_state, wanted, **ROUNDING)
    blocks = 1 if family == "Albert" else 2
    assert numbers(model) - before == blocks * 2 * 2 * 8 * 3


@pytest.mark.parametrize("per", ["sublayer", "head"])
def test_what_is_laid_stays(transformers: ModuleType, per: str) -> None:
    model = bert(transformers)
    name = "bert.encoder.layer.0.output.dense"
    mask = torch.arange(96).reshape(8, 12) % 3 != 0
    lay(model, f"{name}.weight", Float(), mask=mask)
    lay(model, "bert.encoder.layer.1.output.dense.weight", Ternary())
    wanted = logits(model)
    after(Ghost(TokenGhosts(gain=0.0, per=per)), model)
    parts = 1 if per == "sublayer" else 2
    found = [laid_tensors(model)[f"{name}.dense.{part}.weight"][0] for part in range(parts)]
    assert torch.equal(torch.cat([layer.mask for layer in found], dim=1), mask)
    assert len(laid_tensors(model)) == 2 * parts
    if per == "sublayer":
        torch.testing.assert_close(logits(model), wanted, **ROUNDING)


def test_shared_blocks_get_ghosts_of_their_own(transformers: ModuleType) -> None:
    model = after(ShareLayers(), bert(transformers))
    before = numbers(model)
    after(Ghost(TokenGhosts()), model)
    assert numbers(model) - before == 2 * 2 * 8 * 3
    first, second = (block.output.dense for block in model.bert.encoder.layer)
    assert first.dense[0].weight is second.dense[0].weight
    assert first.logits is not second.logits


def test_weights_that_are_shared_cannot_be_cut_into_heads(transformers: ModuleType) -> None:
    model = bert(transformers)
    after(ShareLayers(0), model)
    with pytest.raises(ModelError, match=r"ghost: the weight of .* is also that of"):
        after(Ghost(TokenGhosts(per="head")), model)


def test_a_projection_that_is_no_linear_layer_is_refused(transformers: ModuleType) -> None:
    model = bert(transformers)
    low = nn.Sequential(nn.Linear(12, 2), nn.Linear(2, 8))
    replace_(model, "bert.encoder.layer.1.output.dense", low)
    with pytest.raises(ChainError, match=r"layer\.1\.output\.dense' is a Sequential, not a linear"):
        run_step(Ghost(TokenGhosts()), State(model))


def test_neurons_that_do_not_divide_are_refused(transformers: ModuleType) -> None:
    model = bert(transformers, intermediate_size=13)
    with pytest.raises(ModelError, match=r"the 13 inputs of .* cannot be cut into 2 equal parts"):
        run_step(Ghost(TokenGhosts(per="head")), State(model))


def test_a_file_brings_the_ghosts_back(transformers: ModuleType, tmp_path: Path) -> None:
    model = after(Ghost(TokenGhosts(per="head", gain="learned")), bert(transformers))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.ones_like(parameter))
    laconic.save(model, tmp_path / "ghost.safetensors")
    again = laconic.load(tmp_path / "ghost.safetensors")
    assert torch.equal(logits(again), logits(model))


# ------------------------------------------------------------------ GhostNet


def test_what_a_convolution_computes() -> None:
    layer = GhostConv2d(CONV, 4, 11, ratio=3, taps=3, bias=True)
    nn.init.normal_(layer.bias)
    x = drawn(2, 3, 9, 9)
    whole = layer.primary(x)
    cheap = F.conv2d(whole, layer.cheap.weight, padding=1, groups=4)
    wanted = torch.cat([whole, cheap], dim=1)[:, :11] + layer.bias[None, :, None, None]
    assert torch.equal(layer(x), wanted)
    assert layer(x).shape == (2, 11, 7, 7)


@pytest.mark.parametrize(("outputs", "ratio"), [(8, 2), (9, 2), (9, 4), (10, 4), (6, 3), (5, 5)])
def test_filters_that_are_multiples_are_made_exactly(outputs: int, ratio: int) -> None:
    conv = nn.Conv2d(3, outputs, 3, stride=2, padding=1)
    kept = -(-outputs // ratio)
    with torch.no_grad():
        for place in range(kept, outputs):
            source = (place - kept) // (ratio - 1)
            conv.weight[place] = (place - 3.5) * conv.weight[source]
    model, x = nn.Sequential(copy.deepcopy(conv)), drawn(2, 3, 7, 7)
    after(Ghost(ChannelGhosts(ratio=ratio)), model)
    torch.testing.assert_close(model(x), conv(x), **ROUNDING)


def test_nearest_multiples_are_least_squares() -> None:
    kept, others = drawn(2, 3, 3), drawn(5, 3, 3, seed=1)
    found = nearest_multiples(kept, others, 3)
    for place, scale in enumerate(found):
        own = kept[place // 3].flatten()[:, None]
        solved = torch.linalg.lstsq(own, others[place].flatten()[:, None]).solution
        assert float(scale) == pytest.approx(float(solved), rel=1e-5)
    assert nearest_multiples(torch.zeros(1, 4), torch.ones(1, 4), 1).tolist() == [0.0]


@pytest.mark.parametrize(
    ("make", "millions"), [(lambda: vgg(16), "158"), (lambda: resnet(56), "65")]
)
def test_operations_of_published_networks(make: Any, millions: str) -> None:
    """Han et al. 2020: VGG-16 falls from 313 M to 158 M at s = 2, d = 3 (ResNet-56: 63 M)."""
    with torch.device("meta"):
        model = after(Ghost(ChannelGhosts(), scope=Scope("kind:conv")), make())
        found = macs(model, torch.zeros(1, 3, 32, 32))[""]
    assert f"{found / 1e6:.0f}" == millions


def test_convolutions_that_cannot_have_ghosts_are_left() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 1, 1), nn.Conv1d(3, 8, 1)
    )
    after(Ghost(ChannelGhosts()), model)
    assert [isinstance(layer, GhostConv2d) for layer in model] == [True, False, False, False]
    before = list(model.state_dict())
    after(Ghost(ChannelGhosts()), model)
    assert list(model.state_dict()) == before


def test_a_laid_convolution_keeps_mask_and_representation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False))
    mask = torch.rand(8, 3, 3, 3) < 0.5
    lay(model, "0.weight", Float(), mask=mask)
    wanted = model[0].weight.detach().clone()
    after(Ghost(ChannelGhosts()), model)
    ((name, (layer, _)),) = laid_tensors(model).items()
    assert name == "0.primary.weight" and torch.equal(layer.mask, mask[:4])
    assert torch.equal(model[0].primary.weight, wanted[:4])


def test_a_tied_convolution_is_refused_and_a_laid_bias_taken_over() -> None:
    tied = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    tied[1].weight = tied[0].weight
    with pytest.raises(ModelError, match="ghost: the weight of '0' is also that of '1'"):
        after(Ghost(ChannelGhosts()), tied)
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    lay(model, "0.bias", Float(), mask=torch.tensor([True, False, True, True]))
    bias = model[0].bias.detach().clone()
    after(Ghost(ChannelGhosts()), model)
    assert torch.equal(model[0].bias, bias) and bias[1] == 0


def test_a_frozen_convolution_stays_frozen() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[0].requires_grad_(False)
    after(Ghost(ChannelGhosts()), model)
    moving = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert moving == {"1"}


def test_what_is_cheap_may_be_replaced_and_described() -> None:
    ghosted = GhostConv2d({"Conv2d": {"in_channels": 3, "out_channels": 4, "kernel_size": 1}}, 4, 8)
    arguments = ghosted.arguments
    ghosted.cheap = nn.Identity()
    assert ghosted.arguments == arguments


def test_ghosts_start_again_as_new_layers_do() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    after(Ghost(ChannelGhosts()), model)
    before = model[0].primary.weight.detach().clone()
    after(Reset(), model)
    assert not model[0].bias.any() and not torch.equal(model[0].primary.weight, before)
    layer = projection(gain="learned")
    nn.init.ones_(layer.logits)
    layer.reset_parameters()
    assert not layer.logits.any() and not layer.gain.any()


def test_a_file_brings_the_convolutions_back(tmp_path: Path) -> None:
    model = after(Ghost(ChannelGhosts(ratio=4)), vgg("small")).eval()
    laconic.save(model, tmp_path / "ghost.safetensors")
    again = laconic.load(tmp_path / "ghost.safetensors")
    x = drawn(1, 3, 32, 32)
    assert torch.equal(again(x), model(x))


# ------------------------------------------------------------------ what is refused


def test_a_network_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(ModelError, match="Sequential is no Transformer whose parts have known"):
        Ghost(TokenGhosts()).check(nn.Sequential(nn.Linear(2, 2)), None)
    with pytest.raises(ScopeError, match=r"nothing in '\*' can have channel ghosts"):
        Ghost(ChannelGhosts()).check(nn.Sequential(nn.Linear(2, 2)), None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChannelGhosts(taps=4), "4 taps have no middle"),
        (lambda: ChannelGhosts(ratio=1), "ratio"),
        (lambda: TokenGhosts(ghosts=0), "ghosts"),
        (lambda: TokenGhosts(gain="much"), "gain"),
        (lambda: TokenGhosts(activation="gelu"), "activation"),
    ],
)
def test_values_out_of_bounds_are_refused(make: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()
