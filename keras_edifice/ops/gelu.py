"""The exact Gaussian error linear unit, in the form that each backend exports.

    gelu(x) = x Φ(x) = x (1 + erf(x / √2)) / 2

Hendrycks & Gimpel 2016, Gaussian Error Linear Units, arXiv:1606.08415.
"""

from keras import ops

from keras_edifice.backends.traits import EXPORTS_GELU

_SQRT_HALF = 0.7071067811865476


def gelu(x):
    """Each x times the normal distribution function of x; any shape -> the same.

    TensorFlow's own gelu calls erfc, which ONNX lacks; JAX's erf cannot be read back
    from a SavedModel, its gelu can.
    """
    if EXPORTS_GELU:
        return ops.gelu(x, approximate=False)
    return 0.5 * x * (1.0 + ops.erf(x * _SQRT_HALF))
