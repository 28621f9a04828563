"""Hard values forward, the gradient of something soft backward.

    straight_through(hard, soft) = sg(hard) + soft - sg(soft)

with sg = stop_gradient: exactly `hard` in value, the derivative of `soft`. Bengio et
al. 2013, arXiv:1308.3432. Built on it: rounding, signs, the weights and activations of
BitNet (Wang et al. 2023, arXiv:2310.11453; Ma et al. 2024, arXiv:2402.17764), one-hot
choices, and the Gumbel-softmax (Jang et al. 2016, arXiv:1611.01144).
"""

import keras
from keras import ops

from keras_edifice.ops.tracing import exporting

SMALLEST = 1e-5
"""Lower bound of the scales of BitNet, so that zeros stay zeros."""


def straight_through(hard, soft):
    """The value of `hard` with the gradient of `soft`, of one shape and dtype."""
    if exporting():  # a file has no gradient
        return hard
    return ops.stop_gradient(hard) + (soft - ops.stop_gradient(soft))


def with_identity_gradient(hard, x, low=None, high=None):
    """The value of `hard` with the gradient of x, where low <= x <= high.

    Args:
        hard: tensor of the shape of x.
        x: what the gradient goes to, unchanged.
        low: below it the gradient is zero; None for no bound.
        high: above it the gradient is zero; None for no bound.
    """
    soft = x
    if low is not None:
        soft = soft * ops.cast(x >= low, x.dtype)
    if high is not None:
        soft = soft * ops.cast(x <= high, x.dtype)
    return straight_through(hard, soft)


def hard_round(x, low=None, high=None):
    """The nearest whole number, halves to the even one; the gradient is 1.

    Args:
        x: any shape.
        low: smallest result, below which the gradient is zero; None for no bound.
        high: largest result, above which the gradient is zero; None for no bound.
    """
    rounded = ops.round(x)
    if low is not None:
        rounded = ops.maximum(rounded, ops.cast(low, x.dtype))
    if high is not None:
        rounded = ops.minimum(rounded, ops.cast(high, x.dtype))
    return with_identity_gradient(rounded, x, low, high)


def hard_sign(x, limit=None):
    """+1 where x > 0, else -1; the gradient is 1 where |x| <= limit, else 0.

    Args:
        x: any shape.
        limit: None for a gradient of 1 everywhere.
    """
    low = None if limit is None else -limit
    return with_identity_gradient(_sign(x), x, low, limit)


def _sign(x):
    """Never zero, as in section 2.1 of BitNet."""
    return 2.0 * ops.cast(x > 0, x.dtype) - 1.0


# Quantisers.


def ternary_codes(w):
    """Weights as -1, 0 and 1 and one scale, w ≈ codes · scale.

    scale = max(mean |w|, 1e-5),    codes = clip(round(w / scale), -1, 1)

    Args:
        w: any shape.

    Returns:
        Codes of the shape of w, and the scale, without a shape; both in float32.
    """
    w = ops.cast(w, "float32")
    scale = ops.maximum(ops.mean(ops.abs(w)), SMALLEST)
    return ops.clip(ops.round(w / scale), -1.0, 1.0), scale


def binary_codes(w):
    """Weights as -1 and 1 and one scale: sign(w - mean w) and mean |w|.

    Args:
        w: any shape.

    Returns:
        Codes of the shape of w, and the scale, without a shape; both in float32.
    """
    w = ops.cast(w, "float32")
    return _sign(w - ops.mean(w)), ops.mean(ops.abs(w))


def int_codes(x, bits=8, axis=-1):
    """Whole numbers of `bits` bits and their scale, x ≈ codes · scale.

    With Q = 2^(bits - 1): scale = max(max |x|, 1e-5) / (Q - 1), and the codes are
    round(x / scale), from -Q to Q - 1.

    Args:
        x: any shape.
        bits: of a code.
        axis: which entries share a scale; None for all of them.

    Returns:
        Codes of the shape of x, and scales with size 1 along `axis`; both in float32.
    """
    x, top = ops.cast(x, "float32"), 2.0 ** (bits - 1)
    largest = ops.max(ops.abs(x), axis=axis, keepdims=True)
    factor = (top - 1.0) / ops.maximum(largest, SMALLEST)
    return ops.clip(ops.round(x * factor), -top, top - 1.0), 1.0 / factor


def quantize_ternary(w):
    """`ternary_codes` times their scale, the gradient that of w itself."""
    return _scaled(w, *ternary_codes(w))


def quantize_binary(w):
    """`binary_codes` times their scale, the gradient that of w itself."""
    return _scaled(w, *binary_codes(w))


def quantize_int(x, bits=8, axis=-1):
    """`int_codes` times their scale, the gradient that of x itself.

    Args:
        x: any shape.
        bits: of a code.
        axis: which entries share a scale; None for all of them.
    """
    return _scaled(x, *int_codes(x, bits, axis))


def _scaled(x, codes, scale):
    return with_identity_gradient(ops.cast(codes * scale, x.dtype), x)


# One-hot choices.


def one_hot_max(x, allowed=None):
    """Marks the largest entry of the last axis, the first of several.

    Args:
        x: (..., n).
        allowed: (..., n), which entries may be chosen; None for all. A row without
            any gives zeros.

    Returns:
        (..., n), zeros and ones in float32, without a gradient.
    """
    x = ops.stop_gradient(ops.cast(x, "float32"))
    if allowed is None and exporting() != "onnx":
        return ops.one_hot(ops.argmax(x, axis=-1), x.shape[-1], dtype="float32")
    if allowed is not None:
        allowed = ops.cast(allowed, "bool")
        x = ops.where(allowed, x, float("-inf"))
    largest = x >= ops.max(x, axis=-1, keepdims=True)
    if allowed is not None:
        largest = ops.logical_and(largest, allowed)
    largest = ops.cast(largest, "float32")
    return largest * ops.cast(ops.cumsum(largest, axis=-1) < 1.5, "float32")


def one_hot_min(x, allowed=None):
    """Marks the smallest entry of the last axis; otherwise as `one_hot_max`.

    Args:
        x: (..., n).
        allowed: (..., n), which entries may be chosen; None for all.

    Returns:
        (..., n), zeros and ones in float32, without a gradient.
    """
    return one_hot_max(-x, allowed)


def nearest_code(z, codebook):
    """Marks the code with the smallest |z - e|², as |e|² - 2 z·e.

    Van den Oord et al. 2017, arXiv:1711.00937.

    Args:
        z: (..., d).
        codebook: (k, d).

    Returns:
        (..., k), one-hot in float32, without a gradient.
    """
    z = ops.stop_gradient(ops.cast(z, "float32"))
    codebook = ops.stop_gradient(ops.cast(codebook, "float32"))
    lengths = ops.sum(ops.square(codebook), axis=-1)
    return one_hot_min(lengths - 2.0 * ops.matmul(z, ops.transpose(codebook)))


def one_hot_indices(one_hot):
    """(..., n) -> (...), int32: which entry of a one-hot row is set."""
    places = ops.arange(0, one_hot.shape[-1], dtype="float32")
    return ops.cast(ops.sum(ops.cast(one_hot, "float32") * places, axis=-1), "int32")


def hard_softmax(logits, temperature=1.0):
    """One-hot of the largest logit with the gradient of softmax(logits / temperature).

    Args:
        logits: (..., n), n known.
        temperature: of the softmax.

    Returns:
        (..., n) in the dtype of the logits; the gradient is computed in float32.
    """
    scaled = ops.cast(logits, "float32") / temperature
    return ops.cast(
        straight_through(one_hot_max(scaled), _softmax(scaled)), logits.dtype
    )


def gumbel_softmax(logits, temperature=1.0, noise=None, seed=None, hard=True):
    """A random choice with probabilities softmax(logits), by its soft version.

        y = softmax((logits + g) / temperature),    g = -log(-log u), u uniform

    Args:
        logits: (..., n), n known.
        temperature: τ; towards zero the soft choice becomes one-hot.
        noise: g, of the shape of the logits.
        seed: `SeedGenerator` that draws g if there is no noise; with neither, g = 0.
        hard: whether the value is the one-hot choice, with the gradient of y.

    Returns:
        (..., n) in the dtype of the logits; computed in float32.
    """
    noisy = ops.cast(logits, "float32")
    if noise is None and seed is not None:
        noise = gumbel_noise(ops.shape(logits), seed)
    if noise is not None:
        noisy = noisy + ops.cast(noise, "float32")
    if hard:
        return ops.cast(hard_softmax(noisy, temperature), logits.dtype)
    return ops.cast(_softmax(noisy / temperature), logits.dtype)


def gumbel_noise(shape, seed):
    """Draws -log(-log u), u uniform between zero and one, in float32.

    Args:
        shape: of the result.
        seed: a `SeedGenerator`.
    """
    # From the smallest normal number on; one itself is never drawn.
    u = keras.random.uniform(shape, 1.2e-38, 1.0, dtype="float32", seed=seed)
    return -ops.log(-ops.log(u))


def _softmax(x):
    """Over the last axis, of a single entry too, of which Keras warns."""
    return ops.ones_like(x) if x.shape[-1] == 1 else ops.softmax(x, axis=-1)
