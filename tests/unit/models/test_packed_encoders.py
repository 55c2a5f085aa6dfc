"""Torch's encoders pack padded batches: steps see features, files compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from laconic import Hidden, Prune, Quantize, Reconstruct, Task, Train, compress, load, save
from laconic.recover import Gradient
from laconic.step import Step
from laconic.structure import DropLayers, Factorize, SetDropout, Unpack

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
FEW = Gradient(3)


class Encoder(nn.Module):
    """Pools over padded positions too, which are zeros where the batch was packed."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.words, self.head = nn.Embedding(30, 8, padding_idx=0), nn.Linear(8, 3)
        self.layers = nn.TransformerEncoder(layer, 2)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.layers(self.words(ids), src_key_padding_mask=ids.eq(0))
        logits: Tensor = self.head(hidden.mean(1))
        return logits


def padded() -> Tensor:
    ids = torch.randint(1, 30, (24, 9), generator=torch.Generator().manual_seed(0))
    ids[::2, 4:] = 0
    return ids


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return Encoder().eval()


@pytest.fixture
def task() -> Task:
    return Task.from_arrays((padded(), torch.arange(24) % 3), (padded(), torch.arange(24) % 3))


@pytest.mark.parametrize(
    ("steps", "packs"),
    [
        ([], True),
        ([SetDropout(0)], True),
        ([Quantize(4)], True),
        ([DropLayers({"top": 1})], True),
        ([Train(Hidden(), batch=12)], True),
        ([Quantize(4), Reconstruct(solve=FEW)], True),
        ([Quantize(4), Reconstruct(parts="block", solve=FEW)], True),
        ([Quantize(4), Reconstruct(parts=1, order="parallel", solve=FEW)], True),
        ([Prune("weights", keep=0.5, by="obs", scope="*.linear1")], True),
        ([Unpack()], False),
        ([Unpack(), Quantize(4, activation=8)], False),
        ([Unpack(), Factorize("datasvd", scope="*.linear1"), Reconstruct(solve=FEW)], False),
    ],
    ids=lambda value: "-".join(step.name for step in value) if isinstance(value, list) else "",
)
def test_a_file_computes_what_the_network_does_where_there_is_padding(
    network: nn.Module, task: Task, tmp_path: Path, steps: list[Step], packs: bool
) -> None:
    before = network(padded())
    model = compress(network, task, steps).model.eval()
    assert torch.equal(network(padded()), before) and network.layers.use_nested_tensor
    assert model.layers.use_nested_tensor == packs
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", model=Encoder())
    assert torch.equal(again(padded()), model(padded()))
