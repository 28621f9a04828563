"""Functions that Keras lacks: probabilities with exact zeros, and those of factorials.

    sparsemax(z) = max(z - τ, 0),        entmax15(z) = max(z/2 - τ, 0)²
    lgamma(x) = ln Γ(x),                 digamma(x) = d ln Γ(x) / dx

The first two are relatives of softmax, with the τ that makes the entries sum to one.
Martins & Astudillo 2016, From Softmax to Sparsemax, arXiv:1602.02068; Peters et al.
2019, arXiv:1905.05702. Sorting tells which entries stay above τ. Given those, τ is a
formula, whose gradient is the one of the papers: nothing is differentiated through the
sort.

The other two are Stirling's series at z = x + 3, taken back to x by
Γ(z) = x (x + 1) (x + 2) Γ(x). Abramowitz & Stegun 1964, 6.1.41 and 6.3.18. The second
series is the derivative of the first, term by term.
"""

import math

import numpy as np
from keras import ops

_LOG_2PI = math.log(2.0 * math.pi)


def sparsemax(z):
    """(..., n) -> probabilities over the last axis; n is known. Computes in float32.

    The Jacobian is I - 11ᵀ/k on the k entries above zero, and zero elsewhere.
    """
    dtype, z = z.dtype, _centred(z)
    ordered, ranks = _descending(z)
    above = 1.0 + ranks * ordered > ops.cumsum(ordered, axis=-1)
    support = z > _sparsemax_threshold(ordered, above)
    return ops.cast(ops.relu(z - _sparsemax_threshold(z, support)), dtype)


def entmax15(z):
    """(..., n) -> probabilities over the last axis; n is known. Computes in float32.

    Entmax with α = 1.5, between softmax (α = 1) and sparsemax (α = 2). With s = √p, the
    Jacobian is diag(s) - ssᵀ/Σs.
    """
    dtype, z = z.dtype, _centred(z) / 2.0
    ordered, ranks = _descending(z)
    means = ops.cumsum(ordered, axis=-1) / ranks
    spreads = ops.cumsum(ops.square(ordered), axis=-1) - ranks * ops.square(means)
    above = means - ops.sqrt(ops.relu(1.0 - spreads) / ranks) <= ordered
    support = z > _entmax15_threshold(ordered, above)
    return ops.cast(ops.square(ops.relu(z - _entmax15_threshold(z, support))), dtype)


def lgamma(x):
    """Logarithm of Γ(x) for x > 0, any shape. Computes in float32.

    The derivative is `digamma`. The error is 1e-6 of the larger of 1 and |ln Γ(x)|,
    which is zero at 1 and 2.
    """
    dtype, x = x.dtype, ops.cast(x, "float32")
    small = x < 3.0
    z = ops.where(small, x + 3.0, x)  # from 3 on, a shift would only lose digits
    w = 1.0 / ops.square(z)
    series = 1 / 12 - w * (1 / 360 - w * (1 / 1260 - w * (1 / 1680 - w / 1188)))
    # z (ln z - 1) keeps the digits that the difference of z ln z and z would lose.
    at_z = (z - 0.5) * (ops.log(z) - 1.0) + series / z + 0.5 * (_LOG_2PI - 1.0)
    kept = ops.minimum(x, 3.0)  # so that the product does not overflow
    below = ops.log(kept * (kept + 1.0) * (kept + 2.0))
    return ops.cast(at_z - ops.where(small, below, 0.0), dtype)


def digamma(x):
    """Derivative of ln Γ(x) for x > 0, any shape. Computes in float32.

    The error is 1e-6 of the larger of 1 and |ψ(x)|, which is zero near 1.46.
    """
    dtype, x = x.dtype, ops.cast(x, "float32")
    z = x + 3.0
    w = 1.0 / ops.square(z)
    series = w * (1 / 12 - w * (1 / 120 - w * (1 / 252 - w * (1 / 240 - w / 132))))
    at_z = ops.log(z) - 0.5 / z - series
    below = 1.0 / x + 1.0 / (x + 1.0) + 1.0 / (x + 2.0)
    return ops.cast(at_z - below, dtype)


def _sparsemax_threshold(z, support):
    """The τ for which Σ (z - τ) over the support is one."""
    return (_sum(z, support) - 1.0) / _count(support)


def _entmax15_threshold(z, support):
    """The τ for which Σ (z - τ)² over the support is one."""
    mean = _sum(z, support) / _count(support)
    spread = _sum(ops.square(z - mean), support)  # at most 1 - 1/k: the root is smooth
    return mean - ops.sqrt((1.0 - spread) / _count(support))


def _centred(z):
    """In float32, the largest entry at zero; both functions ignore such a shift."""
    z = ops.cast(z, "float32")
    return z - ops.stop_gradient(ops.max(z, axis=-1, keepdims=True))


def _descending(z):
    """The entries from the largest down, and their ranks 1, 2, ... n."""
    ordered = ops.flip(ops.sort(ops.stop_gradient(z), axis=-1), axis=-1)
    return ordered, ops.convert_to_tensor(
        np.arange(1, z.shape[-1] + 1, dtype="float32")
    )


def _sum(z, support):
    return ops.sum(ops.where(support, z, 0.0), axis=-1, keepdims=True)


def _count(support):
    return ops.sum(ops.cast(support, "float32"), axis=-1, keepdims=True)
