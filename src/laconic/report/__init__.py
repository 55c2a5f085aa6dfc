"""What a run is shown as, and analyses of a loss and of students."""

from laconic._lazy import attach

_TABLE: dict[str, str] = {
    "BitSensitivity": "laconic.report.analyse",
    "Eigenvalues": "laconic.report.analyse",
    "EstimationError": "laconic.report.estimation",
    "LossSurface": "laconic.report.analyse",
    "Trajectory": "laconic.report.analyse",
    "bit_sensitivity": "laconic.report.analyse",
    "eigenvalues": "laconic.report.analyse",
    "estimation_error": "laconic.report.estimation",
    "loss_surface": "laconic.report.analyse",
    "terminal": "laconic.report.report",
    "trajectory": "laconic.report.analyse",
    "write_analysis": "laconic.report.report",
    "write_report": "laconic.report.report",
}

__getattr__, __dir__, __all__ = attach(__name__, _TABLE)
