"""How the numbers of a tensor are represented."""

from laconic._lazy import attach

_TABLE: dict[str, str] = {
    "Activation": "laconic.weights.activations",
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
    "LearnedClip": "laconic.weights.activations",
    "LearnedSpacing": "laconic.weights.activations",
    "LearnedStep": "laconic.weights.learned_step",
    "LeastError": "laconic.weights.activations",
    "Logarithmic": "laconic.weights.uniform",
    "LossAware": "laconic.weights.lossaware",
    "MinMax": "laconic.weights.activations",
    "MixedPrecision": "laconic.weights.mixed",
    "MovingAverage": "laconic.weights.activations",
    "Percentile": "laconic.weights.activations",
    "Product": "laconic.weights.product",
    "QuantNoise": "laconic.weights.noise",
    "Quantize": "laconic.weights.quantize",
    "Quantizer": "laconic.weights.quantizer",
    "Representation": "laconic.weights.representation",
    "Stream": "laconic.weights.representation",
    "Symmetric": "laconic.weights.uniform",
    "Ternary": "laconic.weights.lowbit",
    "activations_of": "laconic.weights.quantizer",
    "attach_": "laconic.weights.quantizer",
    "bake": "laconic.weights.laid",
    "calibrate": "laconic.weights.quantizer",
    "lay": "laconic.weights.laid",
    "ste": "laconic.weights.representation",
}

__getattr__, __dir__, __all__ = attach(__name__, _TABLE)
