"""Ternary weight splitting of encoders: families, files, pruned axes and shared blocks."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laconic
from helpers.split import IDENTITY, after
from helpers.tensors import drawn
from laconic.errors import ChainError, ModelError
from laconic.scope import Scope
from laconic.step import State, run_step
from laconic.structure import ShareLayers, Split, find_axes, slice_
from laconic.structure import split as splitting
from laconic.tasks import Task
from laconic.weights import Quantize, Ternary, activations_of
from laconic.weights.laid import laid_tensors, lay

# Of the largest logit: float32, where the two scales of a pair differ in the last bits.
CLOSE = 1e-5
# Of the largest logit: what lies between two of 256 levels may be rounded either way, and the next
# layers round what becomes of it.
LEVELS = 10 / 255
# Published encoders start at 0.02, so that all logits are nearly zero; here they are of order one.
SPREAD = {"initializer_range": 0.5}
FAMILIES = ["Bert", "DistilBert", "Albert", "Roberta", "Electra", "MobileBert", "ViT"]


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
    config = getattr(transformers, f"{family}Config")(**fields, **words, **SPREAD)
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


def apart(model: nn.Module, wanted: Tensor) -> float:
    """Return how far the logits are from others, as a share of the largest of those."""
    assert float(wanted.abs().max()) > 0.5
    return float((logits(model) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_encoders_compute_the_same(transformers: ModuleType, family: str) -> None:
    model = ternarize(encoder(transformers, family))
    wanted, count = logits(model), len(laid_tensors(model))
    after(Split(), model)
    assert len(laid_tensors(model)) == 2 * count
    assert apart(model, wanted) < CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sign_of_the_slides_would_be_seen(
    transformers: ModuleType, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes of the paper's a ``1 - a``: where a weight is not zero, its halves change places."""
    split = splitting.split_ternary

    def slides(
        weight: Tensor, ternary: Ternary, *, mask: None, left: None
    ) -> tuple[Tensor, Tensor]:
        first, second = split(weight, ternary, mask=mask, left=left)
        kept = ternary.decode(ternary.encode(weight)) != 0
        return first.where(~kept, second), second.where(~kept, first)

    monkeypatch.setattr(splitting, "split_ternary", slides)
    model = ternarize(encoder(transformers, family))
    wanted = logits(model)
    assert apart(after(Split(), model), wanted) > 1e-2


@pytest.mark.parametrize("family", ["Bert", "DistilBert", "Roberta"])
def test_an_encoder_of_rounded_activations(transformers: ModuleType, family: str) -> None:
    """The weights are the same; where a sum lies between two levels, its last bits decide."""
    step = Quantize(Ternary(), embedding=Ternary("row"), activation=8, scope=Scope("!classifier*"))
    model = after(step, encoder(transformers, family).double())
    wanted, rounded = logits(model), activations_of(model)
    ternary = {name: laid(latent) for name, (laid, latent) in laid_tensors(model).items()}
    binary = laid_tensors(after(Split(), model))
    assert len(binary) == 2 * len(ternary) > 0
    assert activations_of(model) == rounded
    for name, whole in ternary.items():
        own = (binary[name.replace(".weight", f".{half}.weight")] for half in ("first", "second"))
        first, second = (laid(latent) for laid, latent in own)
        assert torch.equal(first.sign() + second.sign(), 2 * whole.sign())
        assert torch.allclose(first + second, whole, rtol=0, atol=IDENTITY)
    assert apart(model, wanted) < LEVELS


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
