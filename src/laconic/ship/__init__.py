"""Bytes and execution."""

from laconic._lazy import attach

_TABLE: dict[str, str] = {
    "Inventory": "laconic.ship.artifact",
    "Verification": "laconic.ship.artifact",
    "inspect": "laconic.ship.artifact",
    "load": "laconic.ship.artifact",
    "save": "laconic.ship.artifact",
    "verify": "laconic.ship.artifact",
}

__getattr__, __dir__, __all__ = attach(__name__, _TABLE)
