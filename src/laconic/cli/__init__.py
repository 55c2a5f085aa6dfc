"""The command ``laconic``."""

from laconic._lazy import attach

_TABLE: dict[str, str] = {
    "app": "laconic.cli.entry",
    "main": "laconic.cli.entry",
}

__getattr__, __dir__, __all__ = attach(__name__, _TABLE)
