"""Data, loss and metrics of one problem: what a network is compressed for."""

from laconic._lazy import attach

_TABLE: dict[str, str] = {
    "Arrays": "laconic.tasks.split",
    "Batch": "laconic.tasks.split",
    "Loader": "laconic.tasks.loader",
    "Normalize": "laconic.tasks.split",
    "PadCropFlip": "laconic.tasks.vision",
    "Split": "laconic.tasks.split",
    "Task": "laconic.tasks.task",
    "Texts": "laconic.tasks.tokens",
    "accuracy": "laconic.tasks.metrics",
    "as_tokenizer": "laconic.tasks.tokens",
    "cifar": "laconic.tasks.vision",
    "digits": "laconic.tasks.vision",
    "evaluation": "laconic.tasks.task",
    "f1": "laconic.tasks.metrics",
    "glue": "laconic.tasks.text",
    "hold_out": "laconic.tasks.task",
    "images": "laconic.tasks.vision",
    "matthews": "laconic.tasks.metrics",
    "mnist": "laconic.tasks.vision",
    "npz": "laconic.tasks.vision",
    "pearson": "laconic.tasks.metrics",
    "read_glue": "laconic.tasks.glue_files",
    "spearman": "laconic.tasks.metrics",
    "squared_error": "laconic.tasks.task",
    "task_from_dict": "laconic.tasks.line",
    "tokenizer_of": "laconic.tasks.tokens",
    "top5_accuracy": "laconic.tasks.metrics",
}

# The names above that the `task:` line of a recipe may use; each returns a Task.
KINDS: tuple[str, ...] = ("cifar", "digits", "glue", "images", "mnist", "npz")

__getattr__, __dir__, __all__ = attach(__name__, _TABLE)
