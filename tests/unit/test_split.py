"""Ternary weight splitting: identities of one weight, whole networks, and what is split."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import laconic
from laconic.errors import ChainError, LaconicError, ModelError
from laconic.measure import macs, measure
from laconic.models import digits_cnn, layers
from laconic.models.halves import Halves
from laconic.recover import SGD, Train
from laconic.scope import Scope
from laconic.step import State, Step, run_step
from laconic.structure import Prune, ShareLayers, Split, find_axes, slice_, split_ternary
from laconic.structure.surgery import apply_edits_, edits_of
from laconic.tasks import Task
from laconic.weights import (
    Binary,
    Float,
    Quantize,
    Representation,
    Symmetric,
    Ternary,
    activations_of,
)
from laconic.weights.laid import laid_tensors, lay, mask_of, tie_

# A few hundred float64 roundings of numbers near one.
IDENTITY = 1e-12
# Of logits in float32, where the two scales of a pair differ in the last bits.
LOGITS = 1e-4


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shipped(representation: Representation, weight: Tensor, mask: Tensor | None) -> Tensor:
    return representation.decode(representation.encode(weight, mask=mask))


def check_identities(weight: Tensor, ternary: Ternary, mask: Tensor | None = None) -> None:
    """Assert that latent and shipped halves add up, and that they keep what is pruned at zero."""
    halves, binary = split_ternary(weight, ternary, mask=mask), Binary(ternary.granularity)
    first, second = halves
    assert first.shape == second.shape == weight.shape
    assert first.dtype == second.dtype == weight.dtype
    assert torch.allclose(first + second, weight, rtol=0, atol=IDENTITY)
    found = sum(shipped(binary, half, mask) for half in halves)
    assert torch.allclose(found, shipped(ternary, weight, mask), rtol=0, atol=IDENTITY)
    assert mask is None or not bool(found[~mask].any())


def after(step: Step, model: nn.Module, task: Task | None = None) -> Any:
    step.check(model, task)
    run_step(step, State(model, task))
    return model


# ------------------------------------------------------------------ one weight

granularities = pytest.mark.parametrize("granularity", ["tensor", "row", 5])
thresholds = pytest.mark.parametrize("threshold", ["heuristic", "exact"])


@granularities
@thresholds
@given(seed=st.integers(0, 99), mean=st.sampled_from([0.0, 0.5, -3.0]), keep=st.floats(0.1, 1))
def test_halves_add_up(
    granularity: Any, threshold: Any, seed: int, mean: float, keep: float
) -> None:
    ternary = Ternary(granularity, threshold=threshold)
    weight = drawn(6, 10, seed=seed).double() + mean
    check_identities(weight, ternary)
    check_identities(weight, ternary, drawn(6, 10, seed=seed + 1).sigmoid() < keep)


@granularities
@thresholds
@pytest.mark.parametrize(
    "rows",
    [
        [[0.0] * 5, [0.0] * 5],
        [[2.0] * 5, [-2.0] * 5],
        [[1.0, -1.0, 1.0, -1.0, 1.0], [0.0, 0.0, 3.0, 0.0, 0.0]],
        [[0.5, 0.5, -0.5, 0.5, 1.0], [0.0, -0.0, 1e-30, -1e-30, 0.0]],
        [[1e30, 1.0, -1.0, 1e-30, 0.0], [1.0, 0.36, 0.36, 0.36, 0.36]],
        [[-1.0, -0.3, -0.3, -0.3, -0.3], [1.0, -0.36, -0.36, -0.36, -0.36]],
    ],
    ids=["zero", "no zeros", "ties", "nearly zero", "spread", "one-sided"],
)
def test_degenerate_groups(granularity: Any, threshold: Any, rows: list[list[float]]) -> None:
    weight = torch.tensor(rows, dtype=torch.float64)
    largest = float(weight.abs().max())
    check_identities(weight / (largest or 1.0), Ternary(granularity, threshold=threshold))


@pytest.mark.parametrize("value", [3.0, -3.0, 0.0])
def test_one_weight(value: float) -> None:
    weight = torch.tensor([[value]], dtype=torch.float64)
    check_identities(weight, Ternary())
    assert split_ternary(weight, Ternary())[0] == value / 2


def test_a_group_without_zeros_is_halved() -> None:
    weight = torch.tensor([1.0, -1.1, 0.9])
    assert all(torch.equal(half, weight / 2) for half in split_ternary(weight, Ternary()))


@pytest.mark.parametrize("mask", [[[False] * 4] * 2, [[True, False, False, True], [False] * 4]])
def test_rows_without_survivors(mask: list[list[bool]]) -> None:
    check_identities(drawn(2, 4).double(), Ternary("row"), torch.tensor(mask))


def test_a_weight_without_elements() -> None:
    first, second = split_ternary(torch.zeros(3, 0), Ternary("row"))
    assert first.shape == second.shape == (3, 0)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("count", [4, 6, 11, 100])
def test_one_sided_rows_have_halves_too(count: int, sign: int) -> None:
    """The paper's a is outside (0, 1) there, and the halves would not be binary as they must."""
    weight = torch.full((1, count), 0.36, dtype=torch.float64)
    weight[0, 0] = 1.0
    weight *= sign
    while not bool((Ternary().encode(weight).streams["code"].tensor == 1)[0, 1:].all()):
        weight[0, 0] *= 1.1
    rest = weight[0, 1:]
    by_paper = (weight[0, 0].abs() - sign * rest.sum()) / (2 * weight[0, 0].abs())
    assert not 0 < float(by_paper) < 1
    check_identities(weight, Ternary())
    for half in split_ternary(weight, Ternary()):
        assert 0 < float(half[0, 0] / weight[0, 0]) < 1


def test_halves_of_float32_are_computed_in_float64() -> None:
    weight = drawn(300, 400) + 0.3
    half = split_ternary(weight, Ternary("row"))[0]
    exact = split_ternary(weight.double(), Ternary("row"))[0]
    assert half.dtype == torch.float32
    assert torch.equal(half, exact.float())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(wrong: float) -> None:
    with pytest.raises(ModelError, match=r"a weight \[2\] holds NaN or infinity"):
        split_ternary(torch.tensor([1.0, wrong]), Ternary())


# ------------------------------------------------------------------ the layer

LINEAR = {"Linear": {"in_features": 4, "out_features": 6}}


@pytest.mark.parametrize(
    ("spec", "inputs"),
    [
        (LINEAR, drawn(2, 5, 4)),
        ({"Conv2d": {"in_channels": 3, "out_channels": 4, "kernel_size": 3}}, drawn(2, 3, 6, 6)),
        ({"Embedding": {"num_embeddings": 9, "embedding_dim": 4}}, torch.arange(8)[None]),
    ],
)
def test_halves_are_added_and_described(spec: dict[str, Any], inputs: Tensor) -> None:
    halves = Halves(spec, spec)
    assert torch.equal(halves(inputs), halves.first(inputs) + halves.second(inputs))
    described = layers.describe(halves)
    whole = layers.describe(layers.layer(spec))
    assert described == {"Halves": {"first": whole, "second": whole}}
    again = layers.layer(described)
    again.load_state_dict(halves.state_dict())
    assert torch.equal(again(inputs), halves(inputs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first": LINEAR}, "Halves cannot be built"),
        ({"first": LINEAR, "second": 3}, "describes no layer"),
        ({"first": LINEAR, "second": {"Bad": {}}}, "no layer is called 'Bad'"),
    ],
)
def test_a_hostile_description_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        layers.layer({"Halves": arguments})


def test_halves_without_end_are_refused() -> None:
    spec: dict[str, Any] = LINEAR
    for _ in range(30):
        spec = {"Halves": {"first": spec, "second": LINEAR}}
    with pytest.raises(ModelError, match="nest too deep"):
        layers.layer(spec)


# ------------------------------------------------------------------ networks


def network() -> nn.Sequential:
    """Return a network [batch, 1, 6, 6] -> [batch, 3], in double for exact comparisons."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, stride=2, groups=2, padding_mode="circular", padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(36, 8),
            nn.ReLU(),
            nn.Linear(8, 3),
        )
    return model.eval()


def images(count: int = 4) -> Tensor:
    return drawn(count, 1, 6, 6, seed=5)


def task() -> Task:
    labels = torch.arange(24) % 3
    inputs = drawn(24, 1, 6, 6) + labels[:, None, None, None]
    return Task((inputs, labels), (inputs[:9], labels[:9]), (inputs[:9], labels[:9]))


def ternary_network(representation: Representation | None = None, scope: str = "*") -> Any:
    return after(Quantize(representation or Ternary(), scope=Scope(scope)), network())


@granularities
@thresholds
def test_a_split_network_computes_the_same(granularity: Any, threshold: Any) -> None:
    granularity = 2 if granularity == 5 else granularity
    model = ternary_network(Ternary(granularity, threshold=threshold)).double()
    wanted = model(images().double())
    after(Split(), model)
    assert torch.allclose(model(images().double()), wanted, rtol=0, atol=IDENTITY)
    for name, (laid, _) in laid_tensors(model).items():
        assert laid.representation == Binary(granularity), name
    assert len(laid_tensors(model)) == 8
    assert type(model[1]) is nn.BatchNorm2d


def test_single_precision() -> None:
    model = ternary_network()
    wanted = model(images())
    after(Split(), model)
    torch.testing.assert_close(model(images()), wanted, rtol=0, atol=LOGITS)


def test_biases_are_halved_and_only_where_there_are_any() -> None:
    model = ternary_network()
    bias = model[6].bias.detach().clone()
    after(Split(), model)
    assert torch.equal(model[6].first.bias, bias / 2)
    assert torch.equal(model[6].second.bias, bias / 2)
    assert model[0].first.bias is None


def test_a_laid_bias_is_halved_as_the_network_uses_it() -> None:
    model = ternary_network()
    lay(model, "8.bias", Float(), mask=torch.tensor([True, False, True]))
    wanted = model(images())
    after(Split(), model)
    assert model[8].first.bias[1] == 0
    torch.testing.assert_close(model(images()), wanted, rtol=0, atol=LOGITS)


def test_pruned_weights_stay_pruned_in_both_halves() -> None:
    model = after(Prune("weights", keep=0.4), network())
    after(Quantize(Ternary("row")), model)
    masks = {name: mask_of(model, name) for name in laid_tensors(model)}
    wanted = model(images())
    after(Split(), model)
    for name, mask in masks.items():
        for half in ("first", "second"):
            own = name.replace(".weight", f".{half}.weight")
            assert torch.equal(mask_of(model, own), mask)
    torch.testing.assert_close(model(images()), wanted, rtol=0, atol=LOGITS)


def test_only_what_is_ternary_in_the_scope_is_split() -> None:
    model = ternary_network(scope="3, 6")
    lay(model, "0.weight", Symmetric(4))
    after(Split(scope=Scope("kind:conv")), model)
    assert [isinstance(layer, Halves) for layer in model] == [i == 3 for i in range(9)]
    assert laid_tensors(model)["0.weight"][0].representation == Symmetric(4)
    assert laid_tensors(model)["6.weight"][0].representation == Ternary()
    after(Split(), model)
    assert isinstance(model[6], Halves)
    before = list(model.state_dict())
    after(Split(), model)
    assert list(model.state_dict()) == before


def test_what_may_move_and_modes_stay() -> None:
    model = ternary_network().train()
    model[3].parametrizations.weight.original.requires_grad_(False)
    model[6].bias.requires_grad_(False)
    after(Split(), model)
    still = {plain for plain, p in model.named_parameters() if not p.requires_grad}
    weights = {f"3.{half}.parametrizations.weight.original" for half in ("first", "second")}
    assert still == weights | {"6.first.bias", "6.second.bias"}
    assert all(module.training for module in model.modules())


def test_a_network_with_nothing_ternary_is_refused() -> None:
    for model, earlier in (
        (network(), ()),
        (network(), (Quantize(4),)),
        (ternary_network(), (Quantize(4),)),
        (network(), (Quantize(Ternary()), Quantize(Binary()))),
    ):
        with pytest.raises(ChainError, match=r"split: nothing in '\*' is ternary"):
            Split().check(model, None, earlier)
    Split().check(network(), None, (Quantize(4), Quantize(Ternary(), scope=Scope("3"))))


def test_a_plan_without_ternary_parts_leaves_nothing_to_split() -> None:
    model = network()
    names = list(model.state_dict())
    run_step(Split(), State(model))
    assert list(model.state_dict()) == names


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x)[0])


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tie_(model, {"1.weight": "0.weight"})
    return model


def with_a_tied_bias() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tie_(model, {"1.bias": "0.bias"})
    return model


def with_something_attached() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].add_module("extra", nn.Identity())
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Recurrent(), "split: 'lstm' is a LSTM, which cannot be split"),
        (tied(), "split: the weight of '0' is also that of '1'"),
        (with_a_tied_bias(), r"split: '0\.bias' and '1\.bias' are one parameter"),
        (nn.Sequential(nn.MultiheadAttention(4, 1)), "split: '0' is a MultiheadAttention"),
        (nn.TransformerEncoderLayer(4, 1, 8), "is a MultiheadAttention|is a Transformer"),
        (nn.Linear(4, 4), "split: the network is a single layer"),
        (with_something_attached(), "split: '0' carries 'extra'"),
    ],
    ids=["lstm", "tied", "bias", "attention", "encoder", "root", "attached"],
)
def test_what_has_no_halves_is_refused_before_any_work(model: nn.Module, message: str) -> None:
    with pytest.raises(LaconicError, match=message):
        Split().check(model, None, (Quantize(Ternary()),))
    run_step(Quantize(Ternary()), State(model))
    names = list(model.state_dict())
    with pytest.raises(LaconicError, match=message):
        run_step(Split(), State(model))
    assert list(model.state_dict()) == names


def test_a_recurrent_network_is_split_where_it_can_be() -> None:
    model = Recurrent().eval()
    run_step(Quantize(Ternary()), State(model))
    wanted = model(drawn(3, 1, 4))
    after(Split(scope=Scope("*, !lstm")), model)
    assert isinstance(model.last, Halves)
    torch.testing.assert_close(model(drawn(3, 1, 4)), wanted, rtol=0, atol=LOGITS)


# ------------------------------------------------------------------ what comes after


def test_a_file_brings_it_back_bit_for_bit(tmp_path: Path) -> None:
    model = after(Split(), ternary_network())
    laconic.save(model, tmp_path / "split.safetensors")
    again = laconic.load(tmp_path / "split.safetensors", model=network())
    assert torch.equal(again(images()), model(images()))
    assert isinstance(again[6], Halves)
    twin = network()
    apply_edits_(twin, edits_of(model), {})
    assert list(twin.state_dict()) == list(again.state_dict())


def test_costs_count_both_halves() -> None:
    model = ternary_network()
    before = macs(model, images(1))[""]
    plain = measure(model, task(), latency=False).layers
    after(Split(), model)
    counted = measure(model, task(), latency=False)
    assert counted.macs == 2 * before == sum(layer.macs or 0 for layer in counted.layers)
    assert {layer.bits for layer in counted.layers} == {1.0}
    assert {layer.bits for layer in plain} == {2.0}


@pytest.mark.parametrize(
    "step",
    [
        Train(batch=8, optimizer=SGD(0.1)),
        Quantize(4),
        Prune("weights", keep=0.5),
        Prune("channels", keep=0.5),
        Prune("neurons", keep=0.5),
        Prune("neurons", keep=0.5, scope=Scope("6")),
    ],
    ids=repr,
)
def test_steps_afterwards(step: Step, tmp_path: Path) -> None:
    model = after(Split(), ternary_network())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after(step, model, task())
    now = model.state_dict()
    same = now.keys() == before.keys()
    assert not same or any(not torch.equal(now[name], before[name]) for name in before)
    laconic.save(model, tmp_path / "model.safetensors")
    again = laconic.load(tmp_path / "model.safetensors", model=network())
    assert torch.equal(again(images()), model.eval()(images()))


def test_training_keeps_halves_binary_and_lets_them_part() -> None:
    model = after(Split(), ternary_network())
    after(Train(batch=8, epochs=3, optimizer=SGD(0.1)), model, task())
    for half in (model[6].first, model[6].second):
        assert half.weight.detach().abs().unique().numel() == 1
    sums = (model[6].first.weight + model[6].second.weight).detach()
    assert not bool((sums == 0).any())  # their scales differ now


def test_axes_go_through_both_halves() -> None:
    model = after(Split(), ternary_network())
    axes = find_axes(model, images(1))
    kinds = [axis.kind for axis in find_axes(network(), images(1))]
    assert [axis.kind for axis in axes if axis.frozen is None] == [
        axis.kind for axis in find_axes(network(), images(1)) if axis.frozen is None
    ]
    assert "neuron" in kinds
    (neurons,) = (axis for axis in axes if axis.kind == "neuron")
    names = {use.name for use in neurons.uses}
    assert names == {f"{place}.{half}.weight" for place in "68" for half in ("first", "second")} | {
        f"6.{half}.bias" for half in ("first", "second")
    }
    slice_(model, {neurons: [0, 2, 5]})
    assert model[6].first.out_features == model[6].second.out_features == 3
    assert model[8].second.in_features == 3
    assert model(images()).shape == (4, 3)


# ------------------------------------------------------------------ encoders


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers", reason="published encoders need transformers")


SIZES = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}


def encoder(transformers: ModuleType, family: str = "Bert") -> nn.Module:
    own: dict[str, dict[str, Any]] = {
        "DistilBert": {"dim": 8, "n_heads": 2, "hidden_dim": 12, "n_layers": 2},
        "Albert": SIZES | {"embedding_size": 8, "num_hidden_layers": 2},
        "ViT": SIZES | {"num_hidden_layers": 2, "image_size": 8, "patch_size": 4},
    }
    fields = own.get(family, SIZES | {"num_hidden_layers": 2, "embedding_size": 8})
    words = {} if family == "ViT" else {"vocab_size": 20}
    config = getattr(transformers, f"{family}Config")(**fields, **words)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        name = "ForImageClassification" if family == "ViT" else "ForSequenceClassification"
        return getattr(transformers, f"{family}{name}")(config).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        if "ViT" in type(model).__name__:
            return model(pixel_values=drawn(2, 3, 8, 8)).logits
        return model(input_ids=torch.arange(14).reshape(2, 7) + 3).logits


def ternarize(model: nn.Module) -> Any:
    """Make an encoder ternary as BinaryBERT does: rows of tables, whole matrices, no head."""
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, nn.Embedding) and "classifier" not in name:
            granularity = "row" if type(module) is nn.Embedding else "tensor"
            lay(model, f"{name}.weight", Ternary(granularity))
    return model


@pytest.mark.parametrize(
    "family", ["Bert", "DistilBert", "Albert", "Roberta", "Electra", "MobileBert", "ViT"]
)
def test_encoders_compute_the_same(transformers: ModuleType, family: str) -> None:
    model = ternarize(encoder(transformers, family))
    wanted, count = logits(model), len(laid_tensors(model))
    after(Split(), model)
    assert len(laid_tensors(model)) == 2 * count
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=LOGITS)


def test_a_network_that_reads_the_weight_is_told_which_one(transformers: ModuleType) -> None:
    model = encoder(transformers, "ViT")
    lay(model, "vit.embeddings.patch_embeddings.projection.weight", Ternary())
    pictures, labels = drawn(6, 3, 8, 8), torch.arange(6) % 2
    data = Task((pictures, labels), (pictures, labels), (pictures, labels))
    with pytest.raises(ModelError, match=r"split: the network runs no more.*projection\.weight"):
        run_step(Split(), State(model, data))


def test_an_encoder_in_a_file(transformers: ModuleType, tmp_path: Path) -> None:
    model = after(Split(), ternarize(encoder(transformers)))
    laconic.save(model, tmp_path / "split.safetensors")
    assert torch.equal(logits(laconic.load(tmp_path / "split.safetensors")), logits(model))


def test_axes_of_a_split_encoder_can_be_pruned(transformers: ModuleType) -> None:
    model = after(Split(), ternarize(encoder(transformers)))
    tokens = torch.arange(14).reshape(2, 7) + 3
    axes = [axis for axis in find_axes(model, input_ids=tokens) if axis.frozen is None]
    twin = find_axes(encoder(transformers), input_ids=tokens)
    assert [(axis.kind, axis.size) for axis in axes] == [
        (axis.kind, axis.size) for axis in twin if axis.frozen is None
    ]
    heads = next(axis for axis in axes if axis.kind == "head")
    neurons = next(axis for axis in axes if axis.kind == "neuron")
    slice_(model, {heads: [1], neurons: [0, 3, 4]})
    block = model.bert.encoder.layer[0]
    assert block.attention.self.query.second.weight.shape == (4, 8)
    assert block.output.dense.first.weight.shape == (8, 3)
    assert bool(logits(model).isfinite().all())


def test_blocks_that_share_weights_are_refused(transformers: ModuleType) -> None:
    scope = Scope("*.encoder.* kind:linear")
    earlier = (ShareLayers(), Quantize(Ternary(), scope=scope))
    with pytest.raises(ChainError, match=r"split: 'bert\.encoder.*' shares its weight"):
        Split(scope=scope).check(encoder(transformers), None, earlier)
    model = after(ShareLayers(), encoder(transformers))
    after(earlier[1], model)
    with pytest.raises(ModelError, match=r"split: the weight of .* is also that of"):
        run_step(Split(scope=scope), State(model))


def test_halves_may_be_shared_afterwards(transformers: ModuleType) -> None:
    model = after(Split(), ternarize(encoder(transformers)))
    after(ShareLayers(), model)
    first, second = (block.output.dense.second for block in model.bert.encoder.layer)
    latent = [layer.parametrizations.weight.original for layer in (first, second)]
    assert latent[0] is latent[1]


def test_an_independent_copy(transformers: ModuleType) -> None:
    model = after(Split(), ternarize(encoder(transformers)))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_halves_round_the_input_that_their_layer_did() -> None:
    model = digits_cnn()
    after(Quantize(Ternary(), activation=4), model)
    images = drawn(8, 1, 8, 8)
    before, places = model.eval()(images), activations_of(model)
    after(Split(), model)
    assert activations_of(model) == places
    torch.testing.assert_close(model.eval()(images), before, rtol=0, atol=LOGITS)
    after(Quantize(activation=8), model)
    assert activations_of(model).keys() == places.keys()


def test_only_what_is_ternary_by_its_kind_is_split() -> None:
    step, model = Quantize(Binary(), embedding=Ternary("row")), nn.Sequential(nn.Embedding(3, 2))
    model.append(nn.Linear(2, 2))
    with pytest.raises(ChainError, match="nothing in"):
        Split(scope="kind:linear").check(model, None, (step,))
    Split().check(model, None, (step,))
