"""How accuracy is won back."""

from laconic._lazy import attach

_TABLE: dict[str, str] = {
    "Adam": "laconic.recover.optimize",
    "AdamW": "laconic.recover.optimize",
    "Constant": "laconic.recover.optimize",
    "Cosine": "laconic.recover.optimize",
    "Decay": "laconic.recover.optimize",
    "L1": "laconic.recover.penalties",
    "L2": "laconic.recover.penalties",
    "Label": "laconic.recover.objectives",
    "Linear": "laconic.recover.optimize",
    "Milestones": "laconic.recover.optimize",
    "Objective": "laconic.recover.objectives",
    "Optimizer": "laconic.recover.optimize",
    "Penalty": "laconic.recover.penalties",
    "Recalibrate": "laconic.recover.recalibrate",
    "SGD": "laconic.recover.optimize",
    "Stop": "laconic.recover.optimize",
    "Train": "laconic.recover.train",
}

__getattr__, __dir__, __all__ = attach(__name__, _TABLE)
