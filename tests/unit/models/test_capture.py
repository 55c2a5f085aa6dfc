"""Features of a forward against what the networks themselves return."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laconic.errors import FeatureError
from laconic.models import digits_cnn, resnet
from laconic.models.capture import Features, attention_scores, capture, layer_count, observe
from laconic.tasks import Batch, Task
from laconic.weights import Ternary, lay
from laconic.weights.laid import laid_tensors

CLOSE = {"atol": 1e-6, "rtol": 1e-5}  # the same sums, perhaps in another order
TINY = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "attn_implementation": "eager",
}
DISTIL = {
    "vocab_size": 30,
    "dim": 16,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_dim": 24,
    "max_position_embeddings": 20,
    "attn_implementation": "eager",
}
MOBILE = TINY | {"embedding_size": 8, "intra_bottleneck_size": 8, "num_feedforward_networks": 2}
VIT = {
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "attn_implementation": "eager",
}
FAMILIES = {
    "Bert": TINY,
    "Roberta": TINY,
    "Electra": TINY | {"embedding_size": 8},
    "DistilBert": DISTIL,
    "Albert": TINY | {"embedding_size": 8},
    "MobileBert": MOBILE,
    "ViT": VIT,
}


def network(family: str, attention: str = "eager") -> nn.Module:
    """Return a tiny network of Hugging Face in evaluation mode."""
    transformers = pytest.importorskip("transformers")
    settings = FAMILIES[family] | {"attn_implementation": attention}
    kind = "ForImageClassification" if family == "ViT" else "ForSequenceClassification"
    config = getattr(transformers, f"{family}Config")(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, f"{family}{kind}")(config)
        for parameter in model.parameters():  # its own start is nearly zero
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def example(family: str) -> dict[str, Tensor]:
    """Return two examples; a sentence of four tokens is padded to six."""
    generator = torch.Generator().manual_seed(1)
    if family == "ViT":
        return {"pixel_values": torch.randn(2, 1, 8, 8, generator=generator)}
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    tokens = torch.randint(3, 30, (2, 6), generator=generator)
    return {"input_ids": torch.where(mask.bool(), tokens, 1), "attention_mask": mask}


def names(count: int) -> list[str]:
    layered = [f"{kind}.{n + 1}" for n in range(count) for kind in ("hidden", "attention", "value")]
    return ["hidden.0", *layered]


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_scores_are_those_of_the_network(family: str) -> None:
    model, inputs = network(family), example(family)
    assert layer_count(model) == 3
    with torch.no_grad(), capture(model, names(3)) as features:
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert features.layers == 3
    for layer in range(3):  # the last is tested below: some networks return it after a norm
        found = features[f"hidden.{layer}"]
        torch.testing.assert_close(found, outputs.hidden_states[layer], **CLOSE)
    mask = inputs.get("attention_mask")
    for layer in range(1, 4):
        scores = features[f"attention.{layer}"]
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e9)
        probabilities = outputs.attentions[layer - 1]
        torch.testing.assert_close(scores.softmax(-1), probabilities, **CLOSE)
        size = 2 if family == "MobileBert" else 4
        assert features[f"value.{layer}"].shape == (2, 4, scores.shape[-1], size)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_block_is_what_the_base_model_returns(family: str) -> None:
    model, inputs = network(family), example(family)
    with torch.no_grad(), capture(model, ["hidden.3"]) as features:
        last = model.base_model(**inputs).last_hidden_state
    norm = model.vit.layernorm if family == "ViT" else nn.Identity()
    torch.testing.assert_close(norm(features["hidden.3"]), last, **CLOSE)


@pytest.mark.parametrize("family", ["Bert", "DistilBert", "Albert"])
def test_scores_do_not_depend_on_the_attention_that_computes(family: str) -> None:
    """Hazard 4: sdpa returns no scores, so whoever asks it for them learns nothing."""
    found = []
    for attention in ("eager", "sdpa"):
        model = network(family, attention)
        with torch.no_grad(), capture(model, ["attention.2"]) as features:
            model(**example(family))
        found.append(features["attention.2"])
    real = example(family)["attention_mask"].bool()
    pairs = (real[:, :, None] & real[:, None, :])[:, None].expand_as(found[0])
    torch.testing.assert_close(found[0][pairs], found[1][pairs], **CLOSE)
    assert float(found[0].abs().max()) > 0.1


def test_a_network_with_heads_pruned_is_read_by_its_own_sizes() -> None:
    model = network("Bert")
    attention = model.bert.encoder.layer[0].attention.self
    for name in ("query", "key", "value"):
        layer = getattr(attention, name)
        layer.weight = nn.Parameter(layer.weight[:8].detach().clone())
        layer.bias = nn.Parameter(layer.bias[:8].detach().clone())
    with capture(model, ["query.1", "attention.1"]) as features:
        attention.key(torch.ones(1, 5, 16))
        attention.query(torch.ones(1, 5, 16))
    assert features["query.1"].shape == (1, 2, 5, 4)
    assert features["attention.1"].shape == (1, 2, 5, 5)


def test_the_formula_of_scores() -> None:
    query, key = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    expected = torch.einsum("bhid,bhjd->bhij", query, key) / 2
    torch.testing.assert_close(attention_scores(query, key, 0.5), expected)
    low = attention_scores(query.bfloat16(), key.bfloat16(), 0.5)
    assert low.dtype == torch.float32
    assert attention_scores(query.double(), key.double(), 0.5).dtype == torch.float64


# ------------------------------------------------------------------ any network


class Stack(nn.Module):
    """Blocks in a list, called by keyword; one may stand in several places."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(hidden_states=x)
        return x.sum(dim=1)


class Named(nn.Module):
    """A linear layer that is called by keyword and answers in a tuple, after nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, *, scale: float = 0.5, hidden_states: Tensor) -> tuple[Any, ...]:
        return None, (scale * self.inner(hidden_states),)


class Unpacked(Stack):
    """The same stack, which takes the tensor out of each answer."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(hidden_states=x)[1][0]
        return x.sum(dim=1)


def test_blocks_of_any_list_and_tensors_in_any_place() -> None:
    model, x = Unpacked([Named(), Named()]), torch.randn(2, 3, 4)
    assert layer_count(model) == 2
    assert layer_count(Unpacked([Named()])) == 1
    with capture(model, ["hidden.0", "hidden.1", "hidden.2"]) as features:
        outputs = model(x)
    assert features["hidden.0"] is x
    first = 0.5 * model.blocks[0].inner(x)
    torch.testing.assert_close(features["hidden.1"], first)
    torch.testing.assert_close(features["hidden.2"].sum(dim=1), outputs)


def test_a_shared_block_is_told_apart_by_its_calls() -> None:
    shared = Named()
    model, x = Unpacked([shared, Named(), shared]), torch.randn(2, 3, 4)
    assert layer_count(model) == 3
    with capture(model, [f"hidden.{n}" for n in range(4)]) as features:
        model(x)
        outputs = model(2 * x)  # the second forward replaces the first
    values = [features[f"hidden.{n}"] for n in range(4)]
    torch.testing.assert_close(values[0], 2 * x)
    torch.testing.assert_close(values[3].sum(dim=1), outputs)
    torch.testing.assert_close(0.5 * shared.inner(values[2]), values[3])
    torch.testing.assert_close(0.5 * shared.inner(values[0]), values[1])


def test_the_blocks_of_a_resnet_are_those_of_its_stages() -> None:
    model = resnet(8).eval()
    assert [layer_count(m) for m in (model, resnet(20), digits_cnn())] == [3, 9, 0]
    wanted = ["hidden.0", "hidden.1", "hidden.3", "output:layer1", "input:linear", "output:layer3"]
    with torch.no_grad(), capture(model, wanted) as features:
        model(torch.randn(2, 3, 16, 16))
    assert features["hidden.0"].shape == (2, 16, 16, 16)
    assert features["hidden.1"] is features["output:layer1"]
    assert features["hidden.3"] is features["output:layer3"]
    torch.testing.assert_close(features["hidden.3"].mean(dim=(2, 3)), features["input:linear"])


def test_gradients_flow_through_features_also_of_laid_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    lay(model, "0.weight", Ternary())
    with capture(model, ["output:0", "input:2"]) as features:
        model(torch.randn(3, 4))
    assert features["input:2"].equal(features["output:0"].tanh())
    features["output:0"].square().mean().backward()
    assert float(laid_tensors(model)["0.weight"][1].grad.abs().sum()) > 0


class Wrapped(nn.parallel.DistributedDataParallel):
    """DistributedDataParallel without processes: what it wraps is under ``module``."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        outputs: Tensor = self.module(*inputs)
        return outputs


def test_a_wrapped_network_is_read_by_its_own_names() -> None:
    model = Wrapped(nn.Sequential(nn.Linear(4, 2)))
    with capture(model, ["output:0"]) as features:
        outputs = model(torch.ones(1, 4))
    assert features["output:0"] is outputs


# ------------------------------------------------------------------ what is left behind, refused


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_network_is_left_as_it_was_even_after_an_error() -> None:
    model = Unpacked([Named(), Named()])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with capture(model, ["hidden.0", "hidden.1", "input:blocks.0.inner"]):
        assert hooks(model) == 4
        model(torch.ones(1, 2, 4))
    assert hooks(model) == 0
    with pytest.raises(ZeroDivisionError), capture(model, ["hidden.2"]):
        raise ZeroDivisionError
    with pytest.raises(FeatureError), capture(model, ["hidden.1", "hidden.3"]):
        raise AssertionError
    assert hooks(model) == 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    copy.deepcopy(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hidden.3", "Unpacked has 2 blocks, so the features are 'hidden.0' to 'hidden.2'"),
        ("attention.0", "the features are 'attention.1' to 'attention.2'"),
        ("attention.1", "what Unpacked calls its heads is unknown; networks of Hugging Face"),
        ("output:blocks.1.iner", "no module 'blocks.1.iner'; did you mean 'blocks.1.inner'"),
        ("hiden.1", "no feature is called 'hiden.1'; did you mean 'hidden.N'"),
        ("output:", "no feature is called 'output:'"),
    ],
)
def test_a_feature_that_is_not_there_is_named_with_the_nearest(name: str, message: str) -> None:
    model = Unpacked([Named(), Named()])
    with pytest.raises(FeatureError, match=message), capture(model, [name]):
        raise AssertionError


def test_a_network_without_blocks_says_so() -> None:
    with (
        pytest.raises(FeatureError, match=r"Sequential has no list of blocks.*output:PATH"),
        capture(digits_cnn(), ["hidden.1"]),
    ):
        raise AssertionError


def test_what_the_forward_does_not_call_is_refused() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    with (
        pytest.raises(FeatureError, match=r"'output:other' was not produced.*did not call Linear"),
        capture(model, ["output:other"]),
    ):
        model["used"](torch.ones(1, 2))


class Empty(nn.Module):
    def forward(self, x: Tensor) -> tuple[Any, ...]:
        return ()


def test_an_empty_tuple_is_no_feature() -> None:
    model = nn.Sequential(Empty())
    with (
        pytest.raises(FeatureError, match=r"'output:0' was empty: the output of Empty holds no"),
        capture(model, ["output:0"]),
    ):
        model(torch.ones(1))


def test_a_feature_changed_in_place_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    with (
        pytest.raises(FeatureError, match=r"'output:0' was changed in place.*inplace=False"),
        capture(model, ["output:0"]),
    ):
        model(torch.ones(1, 2))
    with torch.inference_mode(), capture(model, ["output:1"]) as features:
        model(torch.ones(1, 2))
    assert features["output:1"].shape == (1, 2)


def test_a_feature_that_was_not_asked_for_is_named_with_the_nearest() -> None:
    features = Features({"hidden.1": torch.ones(1)}, layers=2)
    assert features.get("hidden.2") is None and "hidden.2" not in features
    with pytest.raises(FeatureError, match=r"'hidden.2' was not taken.*did you mean 'hidden.1'"):
        features["hidden.2"]


# ------------------------------------------------------------------ observe


def task(model: nn.Module) -> Task:
    pair = (torch.randn(20, 4), torch.arange(20) % 2)
    return Task(pair, pair, pair)


def test_observe_returns_logits_in_float32_and_what_was_asked() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    batch = task(model).example_batch(3)
    with torch.autocast("cpu", torch.bfloat16):
        features = observe(task(model), model, batch, ["logits", "output:0"])
    assert sorted(features) == ["logits", "output:0"]
    assert {tensor.dtype for tensor in features.values()} == {torch.float32}
    assert features["logits"].requires_grad


def test_the_mask_is_that_of_the_batch() -> None:
    model = network("Bert")
    batch = Batch(example("Bert"), torch.tensor([0, 1]))
    called = task(nn.Identity())
    called.call = lambda model, batch: model(**batch.inputs).logits
    features = observe(called, model, batch, ["hidden.1"])
    assert features["mask"].dtype == torch.bool and features.layers == 3
    assert features["mask"].sum(dim=1).tolist() == [6, 4]
