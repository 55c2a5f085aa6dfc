"""Which tensors exist and how large they are."""

from laconic._lazy import attach

_TABLE: dict[str, str] = {
    "Criterion": "laconic.structure.criteria",
    "Geometric": "laconic.structure.prune",
    "Gradual": "laconic.structure.prune",
    "Hessian": "laconic.structure.criteria",
    "Magnitude": "laconic.structure.criteria",
    "Prune": "laconic.structure.prune",
    "Random": "laconic.structure.criteria",
    "Schedule": "laconic.structure.prune",
    "Taylor": "laconic.structure.criteria",
}

__getattr__, __dir__, __all__ = attach(__name__, _TABLE)
