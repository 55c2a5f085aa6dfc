"""Write the golden artefact: one weight for every representation, masked and not.

Run once per format version and commit what it writes: python tests/golden/artifacts/make.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from laconic.ship import save
from laconic.ship.container import FORMAT, digest
from laconic.step import members
from laconic.weights import Representation, lay

FOLDER = Path(__file__).parent
SHAPE = (24, 20)


def network() -> nn.Module:
    """Return the plain network: a dense and a masked layer for each representation."""
    names = [name for name, kind in members(Representation, every=True).items() if _ours(kind)]
    layers = {
        f"{name}_{kind}": nn.Linear(*SHAPE[::-1]) for name in names for kind in ("all", "few")
    }
    return nn.ModuleDict(layers)


def _ours(kind: type) -> bool:
    return kind.__module__.startswith("laconic.")


def laid() -> nn.Module:
    """Return the network with drawn numbers, every weight laid."""
    generator = torch.Generator().manual_seed(1)
    model = network()
    for name, layer in model.items():
        weight = torch.randn(SHAPE, generator=generator)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(torch.randn(SHAPE[0], generator=generator))
        representation = members(Representation)[name.rpartition("_")[0]]()
        mask = weight.abs() > 1.5 if name.endswith("few") else None
        lay(model, f"{name}.weight", representation, mask=mask)
    return model


def main() -> None:
    """Write the file and the hashes of what it decodes to."""
    model = laid()
    save(model, FOLDER / f"format{FORMAT}.safetensors")
    hashes = {f"{name}.weight": digest(layer.weight) for name, layer in model.items()}
    hashes |= {f"{name}.bias": digest(layer.bias) for name, layer in model.items()}
    text = json.dumps(hashes, indent=1, sort_keys=True) + "\n"
    (FOLDER / f"format{FORMAT}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
