"""Laconic makes a trained PyTorch network small and fast, and ships it as one file."""

from laconic._lazy import attach

__version__ = "0.1.0"

_TABLE: dict[str, str] = {
    "Attention": "laconic.recover.matching",
    "Budget": "laconic.budget",
    "Factorize": "laconic.structure.factorize",
    "HeadImportance": "laconic.structure.importance",
    "Hidden": "laconic.recover.matching",
    "KMeans": "laconic.weights.codebook",
    "Label": "laconic.recover.objectives",
    "LaconicError": "laconic.errors",
    "Logits": "laconic.recover.distill",
    "Prune": "laconic.structure.prune",
    "Quantize": "laconic.weights.quantize",
    "Recipe": "laconic.recipe",
    "Reconstruct": "laconic.recover.reconstruct",
    "Result": "laconic.run",
    "Scope": "laconic.scope",
    "Task": "laconic.tasks.task",
    "Train": "laconic.recover.train",
    "bake": "laconic.weights.laid",
    "compress": "laconic.run",
    "lay": "laconic.weights.laid",
    "load": "laconic.ship.artifact",
    "save": "laconic.ship.artifact",
    "verify": "laconic.ship.verification",
}

__getattr__, __dir__, __all__ = attach(__name__, _TABLE)
