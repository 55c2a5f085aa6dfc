"""Bytes and execution."""

from laconic._lazy import attach

_TABLE: dict[str, str] = {
    "CODERS": "laconic.ship.coding",
    "Coded": "laconic.ship.coding",
    "Inventory": "laconic.ship.inventory",
    "Verification": "laconic.ship.verification",
    "canonical_codes": "laconic.ship._huffman",
    "code_lengths": "laconic.ship._huffman",
    "decode": "laconic.ship.coding",
    "encode": "laconic.ship.coding",
    "entropy": "laconic.ship.coding",
    "from_gaps": "laconic.ship.coding",
    "gaps": "laconic.ship.coding",
    "inputs_of": "laconic.ship.content",
    "inspect": "laconic.ship.inventory",
    "load": "laconic.ship.artifact",
    "overhead": "laconic.ship.coding",
    "pack": "laconic.ship._packing",
    "save": "laconic.ship.artifact",
    "unpack": "laconic.ship._packing",
    "verify": "laconic.ship.verification",
}

__getattr__, __dir__, __all__ = attach(__name__, _TABLE)
