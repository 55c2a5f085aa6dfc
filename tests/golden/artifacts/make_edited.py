"""Write golden artefacts of edited networks: one of laconic.models, one of transformers.

Run once and commit what it writes: python tests/golden/artifacts/make_edited.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from laconic.models import digits_cnn
from laconic.ship import save
from laconic.ship.container import digest
from laconic.structure.surgery import keep_, replace_, resize_, set_attributes_
from laconic.weights import Symmetric, Ternary, lay

FOLDER = Path(__file__).parent
# Sizes after the cut: dimension 0 of every tensor of a layer, dimension 1 of its weight.
CNN = {
    "conv1": (2, None),
    "bn1": (2, None),
    "conv2": (3, 2),
    "bn2": (3, None),
    "conv3": (4, 3),
    "bn3": (4, None),
    "fc1": (5, 16),
    "fc2": (None, 5),
}
BERT = {
    "bert.encoder.layer.0.intermediate.dense": (5, None),
    "bert.encoder.layer.0.output.dense": (None, 5),
}
ATTRIBUTES = {
    nn.BatchNorm2d: ("num_features", ""),
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.Linear: ("out_features", "in_features"),
}
TOKENS = {"input_ids": torch.arange(10).reshape(2, 5)}
IMAGES = {"input": torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)}


def cut(model: nn.Module, sizes: Mapping[str, tuple[int | None, int | None]]) -> None:
    for path, (rows, columns) in sizes.items():
        layer = model.get_submodule(path)
        for name, tensor in list(layer.state_dict().items()):
            if tensor.dim():
                kept = tensor[:rows] if tensor.dim() == 1 else tensor[:rows, :columns]
                resize_(model, f"{path}.{name}", kept)
        named = zip(ATTRIBUTES[type(layer)], (rows, columns), strict=True)
        set_attributes_(model, path, {name: size for name, size in named if size})


def drawn(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            low = 0.5 if name.endswith("running_var") else -0.4
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return model.eval()


def convolutional() -> nn.Module:
    model = digits_cnn()
    cut(model, CNN)
    keep_(model, "", [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14])  # all but relu3
    replace_(model, "relu1", nn.GELU("tanh"))
    replace_(model, "fc1", nn.Sequential(nn.Linear(16, 2, bias=False), nn.Linear(2, 5)))
    drawn(model)
    lay(model, "conv2.weight", Ternary("row"))
    return model


def encoder() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=12,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=6,
        max_position_embeddings=6,
        id2label={0: "no", 1: "yes"},
        attn_implementation="eager",
    )
    model = BertForSequenceClassification(config)
    keep_(model, "bert.encoder.layer", [1])
    cut(model, BERT)
    drawn(model)
    lay(model, "bert.embeddings.word_embeddings.weight", Symmetric(4, granularity="row"))
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**IMAGES) if isinstance(model, nn.Sequential) else model(**TOKENS).logits


def main() -> None:
    """Write each file and, beside it, hashes of all tensors and logits."""
    for name, model in {"edited1": convolutional(), "hf1": encoder()}.items():
        size = save(model, FOLDER / f"{name}.safetensors")
        hashes = {key: digest(tensor) for key, tensor in plain(model).items()}
        content = {"hashes": hashes, "logits": logits(model).tolist(), "bytes": size}
        text = json.dumps(content, indent=1, sort_keys=True)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def plain(model: nn.Module) -> dict[str, Tensor]:
    from laconic.weights import bake

    bake(model)
    return model.state_dict()


if __name__ == "__main__":
    main()
