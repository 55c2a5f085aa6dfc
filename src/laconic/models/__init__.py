"""Networks: where they come from and what their parts are called."""

from laconic._lazy import attach

_TABLE: dict[str, str] = {
    "BlockDiagonalLinear": "laconic.models.factored",
    "BlockTermLinear": "laconic.models.factored",
    "Reorder": "laconic.models.factored",
    "TTLinear": "laconic.models.factored",
    "build": "laconic.models.load",
    "built": "laconic.models.notes",
    "densenet": "laconic.models.vision",
    "digits_cnn": "laconic.models.vision",
    "hf": "laconic.models.hub",
    "hf_builder": "laconic.models.hub",
    "lenet_300_100": "laconic.models.vision",
    "lenet_5": "laconic.models.vision",
    "load_model": "laconic.models.load",
    "mobilenet_v1": "laconic.models.mobile",
    "mobilenet_v1_full": "laconic.models.mobile",
    "mobilenet_v2": "laconic.models.mobile",
    "preresnet": "laconic.models.vision",
    "resnet": "laconic.models.vision",
    "resnet20": "laconic.models.vision",
    "resnet32": "laconic.models.vision",
    "resnet56": "laconic.models.vision",
    "save_pretrained": "laconic.models.hub",
    "vgg": "laconic.models.vision",
}

# The functions above that a recipe may name and an artefact may call, with JSON arguments.
BUILDERS: tuple[str, ...] = (
    "densenet",
    "digits_cnn",
    "lenet_300_100",
    "lenet_5",
    "mobilenet_v1",
    "mobilenet_v1_full",
    "mobilenet_v2",
    "preresnet",
    "resnet",
    "resnet20",
    "resnet32",
    "resnet56",
    "vgg",
)

__getattr__, __dir__, __all__ = attach(__name__, _TABLE)
