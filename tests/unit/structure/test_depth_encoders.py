"""Dropping and sharing blocks of published encoders, and their files."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laconic
from helpers.depth import numbers
from laconic.errors import ModelError
from laconic.recover import Train
from laconic.step import State, Step, run_step
from laconic.structure import AllBut, DropLayers, LayerDrop, ShareLayers, Spread, Top


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers", reason="published encoders need transformers")


SIZES = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
FAMILIES = {
    "Bert": SIZES | {"vocab_size": 20, "num_hidden_layers": 4},
    "Roberta": SIZES | {"vocab_size": 20, "num_hidden_layers": 4},
    "Electra": SIZES | {"vocab_size": 20, "num_hidden_layers": 4, "embedding_size": 8},
    "DistilBert": {"vocab_size": 20, "dim": 8, "n_heads": 2, "hidden_dim": 12, "n_layers": 4},
    "ViT": SIZES | {"num_hidden_layers": 4, "image_size": 8, "patch_size": 4},
}


def published(transformers: ModuleType, family: str, **fields: Any) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**(FAMILIES[family] | fields))
    kind = "Image" if family == "ViT" else "Sequence"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{family}For{kind}Classification")(config).eval()


def feed(family: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if family == "ViT":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    ids = torch.randint(5, 20, (2, 7), generator=generator)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shortened_encoder_is_the_class_with_fewer_layers(
    transformers: ModuleType, family: str
) -> None:
    model = published(transformers, family)
    run_step(DropLayers(AllBut((0, 3))), State(model))
    depth = {"n_layers": 2} if family == "DistilBert" else {"num_hidden_layers": 2}
    small = published(transformers, family, **depth)
    small.load_state_dict(model.state_dict())
    with torch.no_grad():
        found = model(**feed(family), output_hidden_states=True)
        wanted = small(**feed(family), output_hidden_states=True)
    assert torch.equal(found.logits, wanted.logits)
    assert len(found.hidden_states) == len(wanted.hidden_states) == 3
    assert model.config.num_hidden_layers == 2


@pytest.mark.parametrize("step", [DropLayers(AllBut((0, 3))), ShareLayers(2)], ids=repr)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_alone_brings_an_encoder_back(
    transformers: ModuleType, family: str, step: Step, tmp_path: Path
) -> None:
    model = published(transformers, family)
    run_step(step, State(model))
    laconic.save(model, tmp_path / "small.safetensors")
    again = laconic.load(tmp_path / "small.safetensors")
    assert numbers(again) == numbers(model)
    assert again.config.num_hidden_layers == model.config.num_hidden_layers
    with torch.no_grad():
        assert torch.equal(again(**feed(family)).logits, model(**feed(family)).logits)


def test_distilbert_starts_from_every_second_layer(transformers: ModuleType) -> None:
    """Sanh et al. 2019: six layers, each the same as one of the teacher's twelve."""
    teacher = published(transformers, "Bert", num_hidden_layers=12)
    student = copy.deepcopy(teacher)
    run_step(DropLayers(Spread(0.5)), State(student))
    blocks = student.bert.encoder.layer
    assert len(blocks) == 6
    for place, block in enumerate(blocks):
        origin = teacher.bert.encoder.layer[2 * place].state_dict()
        assert all(torch.equal(tensor, origin[name]) for name, tensor in block.state_dict().items())
    assert len(teacher.bert.encoder.layer) == 12 == teacher.config.num_hidden_layers
    torch.testing.assert_close(
        student.bert.embeddings.state_dict(), teacher.bert.embeddings.state_dict(), rtol=0, atol=0
    )


def test_one_block_for_every_layer_is_no_block_to_drop(transformers: ModuleType) -> None:
    config = transformers.AlbertConfig(vocab_size=20, embedding_size=8, **SIZES)
    model = transformers.AlbertModel(config)
    for step in (DropLayers(Top(1)), LayerDrop(0.2, retrain=Train()), ShareLayers()):
        with pytest.raises(ModelError, match="AlbertModel computes every layer with the same"):
            step.check(model, None)
