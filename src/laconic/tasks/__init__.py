"""Data, loss and metrics of one problem: what a network is compressed for."""

from laconic._lazy import attach

_TABLE: dict[str, str] = {
    "Arrays": "laconic.tasks.split",
    "Batch": "laconic.tasks.split",
    "Loader": "laconic.tasks.split",
    "Normalize": "laconic.tasks.split",
    "PadCropFlip": "laconic.tasks.vision",
    "Split": "laconic.tasks.split",
    "Task": "laconic.tasks.task",
    "accuracy": "laconic.tasks.metrics",
    "cifar": "laconic.tasks.vision",
    "digits": "laconic.tasks.vision",
    "evaluation": "laconic.tasks.task",
    "hold_out": "laconic.tasks.task",
    "images": "laconic.tasks.vision",
    "mnist": "laconic.tasks.vision",
    "npz": "laconic.tasks.vision",
    "task_from_dict": "laconic.tasks.task",
    "top5_accuracy": "laconic.tasks.metrics",
}

# The names above that the `task:` line of a recipe may use; each returns a Task.
KINDS: tuple[str, ...] = ("cifar", "digits", "images", "mnist", "npz")

__getattr__, __dir__, __all__ = attach(__name__, _TABLE)
