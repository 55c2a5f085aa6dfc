"""Unpacking torch's attention: the same function, what can be changed then, files, bad input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laconic import load, save
from laconic.errors import AxisError, ChainError, LaconicError, ModelError, ScopeError
from laconic.models.attention import UnpackedAttention
from laconic.models.layers import describe, layer
from laconic.recipe import Recipe
from laconic.run import compress
from laconic.scope import Scope
from laconic.step import State, run_step
from laconic.structure import SVD, Factorize, Prune, Unpack, find_axes, unpacked
from laconic.tasks import Task
from laconic.weights import Quantize, activations_of
from laconic.weights.laid import laid_tensors, mask_of

# What torch says of its own packing of padded batches.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
# Of float64 sums in another order.
CLOSE = 1e-12
WIDTH, HEADS, BATCH, QUERIES, KEYS = 12, 3, 2, 4, 5


def noise(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(WIDTH, HEADS, **options).double().eval()
    for parameter in made.parameters():
        parameter.data.normal_()
    return made


def given(*, batch_first: bool, key: int = WIDTH, value: int = WIDTH) -> tuple[Tensor, ...]:
    sizes = ((QUERIES, WIDTH), (KEYS, key), (KEYS, value))
    found = [noise(BATCH, *size) for size in sizes]
    return tuple(each if batch_first else each.transpose(0, 1) for each in found)


MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
    "added padding": {"key_padding_mask": noise(BATCH, KEYS)},
    "scores": {"attn_mask": torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(2)},
    "added to scores": {"attn_mask": noise(QUERIES, KEYS)},
    "every head's own": {"attn_mask": noise(BATCH * HEADS, QUERIES, KEYS)},
    "both": {
        "attn_mask": torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(3),
        "key_padding_mask": torch.tensor([[False] * 5, [False] * 4 + [True]]),
    },
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "other sizes": {"kdim": 7, "vdim": 5},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("weights", "average"), [(False, True), (True, True), (True, False)])
def test_it_computes_what_torch_computes(
    options: str, mask: str, weights: bool, average: bool
) -> None:
    arguments = OPTIONS[options]
    packed = attention(**arguments)
    inputs = given(
        batch_first=arguments.get("batch_first", False),
        key=arguments.get("kdim", WIDTH),
        value=arguments.get("vdim", WIDTH),
    )
    named = {"need_weights": weights, "average_attn_weights": average, **MASKS[mask]}
    expected, probabilities = packed(*inputs, **named)
    found, chances = unpacked(packed)(*inputs, **named)
    torch.testing.assert_close(found, expected, rtol=CLOSE, atol=CLOSE)
    assert (chances is None) == (probabilities is None)
    if probabilities is not None:
        torch.testing.assert_close(chances, probabilities, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("average", [True, False])
def test_a_sequence_without_a_batch(average: bool) -> None:
    packed, x = attention(), noise(QUERIES, WIDTH)
    padding = torch.tensor([False, False, False, True])
    named = {"key_padding_mask": padding, "average_attn_weights": average}
    pairs = zip(unpacked(packed)(x, x, x, **named), packed(x, x, x, **named), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=CLOSE, atol=CLOSE)


def test_the_same_probabilities_are_dropped_in_training() -> None:
    packed = attention(dropout=0.5).train()
    inputs = given(batch_first=False)
    torch.manual_seed(4)
    expected, chances = packed(*inputs)
    torch.manual_seed(4)
    found, again = unpacked(packed)(*inputs)
    torch.testing.assert_close(found, expected, rtol=CLOSE, atol=CLOSE)
    assert torch.equal(again == 0, chances == 0)


def test_what_is_frozen_stays_frozen_and_nothing_is_drawn() -> None:
    packed = attention().train()
    packed.in_proj_weight.requires_grad_(False)
    state = torch.get_rng_state()
    made = unpacked(packed)
    assert torch.equal(torch.get_rng_state(), state)
    frozen = {name for name, each in made.named_parameters() if not each.requires_grad}
    assert frozen == {"q_proj.weight", "k_proj.weight", "v_proj.weight"}
    assert made.training


# ------------------------------------------------------------------ in a network


class Encoder(nn.Module):
    """torch's encoder on vectors; every example's last token is padding."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        one = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True, **options)
        self.encoder, self.scores = nn.TransformerEncoder(one, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -1] = True
        hidden = self.encoder(x, src_key_padding_mask=padding)
        return self.scores(hidden[:, :-1].mean(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    made = Encoder()
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.3)
    return made.eval()


def task() -> Task:
    labels = torch.arange(24) % 3
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(24, 5, 16, generator=generator) + labels[:, None, None]
    return Task((inputs, labels), (inputs, labels), (inputs, labels))


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(task().example_batch(8).inputs[0])


def test_torch_s_encoder_computes_the_same_and_keeps_its_name_in_files(tmp_path: Path) -> None:
    model = network()
    result = compress(model, task(), [Unpack()])
    torch.testing.assert_close(outputs(result.model), outputs(model), rtol=1e-5, atol=1e-5)
    save(result.model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", model=network())
    assert torch.equal(outputs(again), outputs(result.model))
    assert isinstance(again.encoder.layers[1].self_attn, UnpackedAttention)


def test_heads_can_be_pruned_inputs_rounded_and_matrices_split(tmp_path: Path) -> None:
    steps = [
        Unpack(),
        Prune("heads", keep=0.5),
        Factorize(SVD(rank=2), scope=Scope("*.v_proj, *.linear1")),
        Quantize(8, activation=8, operands=True),
    ]
    recipe = Recipe(steps)
    assert Recipe.parse(recipe.to_yaml()) == recipe
    result = compress(network(), task(), recipe)
    attentions = [m for m in result.model.modules() if isinstance(m, UnpackedAttention)]
    assert [list(each.q_proj.weight.shape) for each in attentions] == [[8, 16]] * 2
    assert [each.v_proj[0].out_features for each in attentions] == [2, 2]
    rounded = activations_of(result.model)
    assert set(rounded["encoder.layers.0.self_attn"]) == {"query", "key", "probabilities", "value"}
    assert set(rounded["encoder.layers.0.self_attn.q_proj"]) == {"input"}
    result.save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", model=network())
    assert torch.equal(outputs(again), outputs(result.model))


class Asking(nn.Module):
    """Attention that is asked for its probabilities, which are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.scores = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.attention(x, x, x)
        return self.scores(hidden.mean(1))


@pytest.mark.parametrize("build", [network, Asking])
def test_heads_are_free_axes(build: Callable[[], nn.Module]) -> None:
    state = State(build().double().eval())
    run_step(Unpack(), state)
    heads = [axis for axis in find_axes(state.model, noise(2, 5, 16)) if axis.kind == "head"]
    assert heads and all((axis.size, axis.frozen) == (4, None) for axis in heads)


def test_masks_stay_where_they_are() -> None:
    state = State(network())
    run_step(Prune("weights", keep=0.5), state)
    name = "encoder.layers.0.self_attn"
    before = mask_of(state.model, f"{name}.in_proj_weight")
    expected = outputs(copy.deepcopy(state.model))
    run_step(Unpack(), state)
    parts = [mask_of(state.model, f"{name}.{each}_proj.weight") for each in "qkv"]
    assert before is not None
    assert torch.equal(torch.cat([part for part in parts if part is not None]), before)
    assert f"{name}.out_proj.weight" in laid_tensors(state.model)
    torch.testing.assert_close(outputs(state.model), expected, rtol=1e-5, atol=1e-5)


def test_decoders_too() -> None:
    torch.manual_seed(0)
    layer_ = nn.TransformerDecoderLayer(16, 4, 24, dropout=0.0)
    model = nn.ModuleDict({"decoder": nn.TransformerDecoder(layer_, 2)}).double().eval()
    target, memory = noise(4, 2, 16), noise(5, 2, 16)
    causal = nn.Transformer.generate_square_subsequent_mask(4).double()
    named = {"tgt_mask": causal, "tgt_is_causal": True}
    expected = model["decoder"](target, memory, **named)
    run_step(Unpack(), State(model))
    found = model["decoder"](target, memory, **named)
    torch.testing.assert_close(found, expected, rtol=CLOSE, atol=CLOSE)


def test_checking_a_recipe_leaves_the_network_as_it_was() -> None:
    model = network()
    names, state = list(model.state_dict()), torch.get_rng_state()
    Recipe([Unpack(), Prune("heads", keep=0.5)]).check(model, task())
    assert list(model.state_dict()) == names and torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------ bad input


def added_keys() -> nn.Module:
    return nn.Sequential(nn.MultiheadAttention(4, 2, add_bias_kv=True))


class Halved(nn.MultiheadAttention):
    """Attention that computes something else."""

    def forward(self, *inputs: Tensor, **named: Any) -> tuple[Tensor, Tensor | None]:
        return super().forward(*inputs, **named)[0] / 2, None


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2)), ScopeError, r"selects no nn\.MultiheadAttention"),
        (added_keys(), ScopeError, r"selects no nn\.MultiheadAttention without add_bias_kv"),
        (nn.Sequential(Halved(4, 2)), ScopeError, r"selects no nn\.MultiheadAttention"),
        (nn.MultiheadAttention(4, 2), ModelError, "the network is a single layer"),
    ],
    ids=["none", "added keys", "subclass", "root"],
)
def test_what_cannot_be_unpacked_is_refused(
    model: nn.Module, kind: type[LaconicError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        Unpack().check(model, None)
    with pytest.raises(kind, match=message):
        run_step(Unpack(), State(model))


def test_codes_are_refused_before_any_work_and_stay() -> None:
    model, step = nn.Sequential(nn.MultiheadAttention(4, 2)), Quantize(4)
    message = r"unpack after quantize \(symmetric\) at '0\.in_proj_weight'.*unpack first"
    with pytest.raises(ChainError, match=message):
        Unpack().check(model, None, (step,))
    run_step(step, State(model))
    names = list(model.state_dict())
    run_step(Unpack(), State(model))
    assert list(model.state_dict()) == names


def test_steps_that_need_it_say_so() -> None:
    with pytest.raises(ModelError, match="put the step 'unpack' before"):
        Quantize(activation=8).check(network(), task())
    with pytest.raises(ModelError, match="put the step 'unpack' before"):
        Factorize(scope=Scope("*.linear1"), method=SVD(rank=2)).check(network(), None)
    with pytest.raises(AxisError, match="put the step 'unpack' before"):
        Prune("heads", keep=0.5).check(network(), task())


def test_an_attention_that_computes_more_is_not_unpacked() -> None:
    for attention in (nn.MultiheadAttention(4, 2, add_zero_attn=True), Halved(4, 2)):
        with pytest.raises(ModelError, match="cannot be unpacked"):
            unpacked(attention)


def test_causal_without_a_mask_is_refused_as_torch_refuses_it() -> None:
    x = noise(QUERIES, 1, WIDTH)
    with pytest.raises(ModelError, match="give that mask too"):
        unpacked(attention())(x, x, x, is_causal=True)


LINEAR = {"Linear": {"in_features": 4, "out_features": 4}}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"head_dim": 0}, "head_dim 0 must be a positive whole number"),
        ({"head_dim": 2.0}, "head_dim 2.0 must be"),
        ({"dropout": 7.0}, "dropout 7.0 from 0 to 1"),
        ({"q_proj": {"Linear": {"in_features": 1 << 40, "out_features": 1}}}, "out of bounds"),
        ({"v_proj": {"System": {}}}, "no layer is called"),
        ({"k_proj": 3}, "describes no layer"),
        ({"spare": 1}, "cannot be built"),
    ],
)
def test_a_hostile_description_is_refused(changed: dict[str, Any], message: str) -> None:
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    arguments = {**dict.fromkeys(names, LINEAR), "head_dim": 2} | changed
    with pytest.raises(ModelError, match=message):
        layer({"UnpackedAttention": arguments})


def test_a_description_builds_it_again() -> None:
    for options in OPTIONS.values():
        made = unpacked(attention(**options))
        again = layer(describe(made))
        assert describe(again) == describe(made)
        assert {n: t.shape for n, t in again.state_dict().items()} == {
            n: t.shape for n, t in made.state_dict().items()
        }
