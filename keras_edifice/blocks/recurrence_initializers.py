"""Initialisers of state-space and gated linear recurrences.

Gu & Dao 2023, Mamba, arXiv:2312.00752, sec. 3.6 and its code; the same step sizes
start Mamba-2 and Gated DeltaNet.
"""

import math

from keras import initializers, ops


def fan_in_uniform(divisor=1):
    """U(±1/√inputs) over √divisor, for a dense kernel. A new one for each layer."""
    return initializers.VarianceScaling(1 / (3 * divisor), "fan_in", "uniform")


def step_size_bias(low, high, floor=0.0):
    """softplus⁻¹(Δ) for Δ log-uniform from low to high, but not below floor."""

    def initialize(shape, dtype=None):
        uniform = initializers.RandomUniform(math.log(low), math.log(high))
        dt = ops.maximum(ops.exp(uniform(shape, "float32")), floor)
        return ops.cast(dt + ops.log(-ops.expm1(-dt)), dtype or "float32")

    return initialize


def log_of_uniform(low, high):
    """The logarithm of a uniform number: A_log, where a head has one decay."""

    def initialize(shape, dtype=None):
        uniform = initializers.RandomUniform(low, high)(shape, "float32")
        return ops.cast(ops.log(uniform), dtype or "float32")

    return initialize
