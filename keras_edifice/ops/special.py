"""Sparse relatives of softmax: probabilities with exact zeros.

    sparsemax(z) = max(z - τ, 0),        entmax15(z) = max(z/2 - τ, 0)²

with the τ that makes the entries sum to one. Martins & Astudillo 2016, From Softmax to
Sparsemax, arXiv:1602.02068; Peters et al. 2019, arXiv:1905.05702.

Sorting tells which entries stay above τ. Given those, τ is a formula, whose gradient is
the one of the papers: nothing is differentiated through the sort.
"""

import numpy as np
from keras import ops


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
