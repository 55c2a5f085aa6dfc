"""How the numbers of a tensor are represented."""

from laconic._lazy import attach

_TABLE: dict[str, str] = {
    "Affine": "laconic.weights.uniform",
    "Binary": "laconic.weights.lowbit",
    "Codes": "laconic.weights.representation",
    "DynamicFixedPoint": "laconic.weights.uniform",
    "FixedPoint": "laconic.weights.uniform",
    "Float": "laconic.weights.representation",
    "Gobo": "laconic.weights.outliers",
    "Groups": "laconic.weights.representation",
    "KMeans": "laconic.weights.codebook",
    "Laid": "laconic.weights.laid",
    "LearnedStep": "laconic.weights.uniform",
    "Logarithmic": "laconic.weights.uniform",
    "LossAware": "laconic.weights.lossaware",
    "Product": "laconic.weights.product",
    "QuantNoise": "laconic.weights.noise",
    "Quantize": "laconic.weights.quantize",
    "Representation": "laconic.weights.representation",
    "Stream": "laconic.weights.representation",
    "Symmetric": "laconic.weights.uniform",
    "Ternary": "laconic.weights.lowbit",
    "bake": "laconic.weights.laid",
    "lay": "laconic.weights.laid",
    "ste": "laconic.weights.representation",
}

__getattr__, __dir__, __all__ = attach(__name__, _TABLE)
