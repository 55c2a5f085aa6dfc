"""Networks: where they come from and what their parts are called."""

from laconic._lazy import attach

_TABLE: dict[str, str] = {
    "build": "laconic.models.load",
    "built": "laconic.models.load",
    "digits_cnn": "laconic.models.vision",
    "lenet_300_100": "laconic.models.vision",
    "lenet_5": "laconic.models.vision",
    "load_model": "laconic.models.load",
    "resnet": "laconic.models.vision",
    "resnet20": "laconic.models.vision",
    "resnet32": "laconic.models.vision",
    "resnet56": "laconic.models.vision",
    "vgg": "laconic.models.vision",
}

# The functions above that a recipe may name and an artefact may call, with JSON arguments.
BUILDERS: tuple[str, ...] = (
    "digits_cnn",
    "lenet_300_100",
    "lenet_5",
    "resnet",
    "resnet20",
    "resnet32",
    "resnet56",
    "vgg",
)

__getattr__, __dir__, __all__ = attach(__name__, _TABLE)
