"""Networks to save and load; run as a script, it prints hashes of all artefacts of a folder."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from laconic.errors import RecipeError
from laconic.models import resnet
from laconic.ship import load
from laconic.ship.container import digest
from laconic.step import members
from laconic.weights import Float, KMeans, Representation, Symmetric, Ternary, bake, lay

ROWS, COLUMNS = 8, 12


class Fan(nn.Module):
    """Linear layers side by side, so that one file holds every representation there is."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(COLUMNS, ROWS) for _ in range(count))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([layer(inputs) for layer in self.layers])


class Shared(nn.Module):
    """One block in three places, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.blocks = nn.ModuleList([block, nn.ReLU(), block])
        self.last = block

    def forward(self, inputs: Tensor) -> Tensor:
        for block in [*self.blocks, self.last]:
            inputs = block(inputs)
        return inputs


def every_representation() -> list[Representation]:
    """Return the default of each registered one, each width and each granularity."""
    found: dict[Representation, None] = {}
    for member in members(Representation, every=True).values():
        found[member()] = None
        for fields in [*({"bits": bits} for bits in range(1, 9)), *GRANULARITIES]:
            if fields.keys() <= member.model_fields.keys():
                try:
                    found[member(**fields)] = None
                except RecipeError:
                    continue  # not every width exists
    return list(found)


GRANULARITIES = ({"granularity": "row"}, {"granularity": 4})
EVERY = every_representation()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and digest(left) == digest(right)


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found = model.eval()(inputs)
    return found[0] if isinstance(found, tuple) else found


def convolutional() -> nn.Module:
    """Return a network with a builder, its norms away from their start, several ways laid."""
    model = resnet(8, 3)
    model.train()(normal(16, 3, 8, 8))
    lay(model, "conv1.weight", KMeans(4))
    lay(model, "layer1.0.conv1.weight", Ternary("row"), mask=torch.rand(16, 16, 3, 3) < 0.3)
    lay(model, "layer2.0.conv1.weight", Float(), mask=torch.rand(32, 16, 3, 3) < 0.1)
    lay(model, "layer3.0.conv2.weight", Symmetric(4, granularity="row"))
    lay(model, "linear.bias", Symmetric(8))
    return model.eval()


def laid_linear() -> nn.Module:
    model = nn.Linear(3, 2)
    lay(model, "weight", Ternary())
    return model


def hashes(model: nn.Module, inputs: Tensor) -> dict[str, str]:
    """Return the sha256 of every tensor as the network uses it, and of its logits."""
    plain = copy.deepcopy(model)
    bake(plain)
    found = {name: digest(tensor) for name, tensor in plain.state_dict().items()}
    with torch.no_grad():
        return found | {"logits": digest(model(inputs))}


def read_folder(folder: Path) -> dict[str, dict[str, str]]:
    """Return the hashes of every artefact of a folder: what the other process prints."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.stem == "built":
            found[path.stem] = hashes(load(path), normal(2, 3, 8, 8))
        else:
            with torch.device("meta"):
                empty = Fan(3 * len(EVERY))
            found[path.stem] = hashes(load(path, model=empty), normal(5, COLUMNS))
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(read_folder(Path(sys.argv[1]))))
