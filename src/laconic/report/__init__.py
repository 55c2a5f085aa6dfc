"""What a run is shown as."""

from laconic._lazy import attach

_TABLE: dict[str, str] = {
    "terminal": "laconic.report.report",
    "write_report": "laconic.report.report",
}

__getattr__, __dir__, __all__ = attach(__name__, _TABLE)
