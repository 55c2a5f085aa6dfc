"""Token ghosts (GhostBERT): every sublayer of an encoder, each head, what is laid or shared."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laconic
from helpers.ghost import ROUNDING, after, drawn, numbers
from laconic.errors import ChainError, ModelError
from laconic.measure import macs
from laconic.models.ghosts import GhostProjection, neighbour_mean
from laconic.scope import Scope
from laconic.step import State, run_step
from laconic.structure import Ghost, ShareLayers, TokenGhosts
from laconic.structure.surgery import replace_
from laconic.weights import Float, Ternary
from laconic.weights.laid import laid_tensors, lay


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
