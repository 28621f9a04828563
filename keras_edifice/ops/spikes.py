"""Spikes: a step function forward, the slope of a smooth one backward.

    S = H(x), 0 or 1;    dS/dx = f'(x)

The three slopes of Neftci et al. 2019 (arXiv:1901.09948) and Eshraghian et al. 2021
(arXiv:2109.12894). Each f is the primitive of the slope that its name stands for.
"""

import math

from keras import ops

from keras_edifice.ops.tracing import exporting

SLOPES = {"atan": 2.0, "fast_sigmoid": 25.0, "sigmoid": 25.0}
"""Surrogate -> the slope that is usual for it."""


def spike(x, surrogate="atan", slope=None):
    """1 where x > 0, else 0, strictly; the gradient is that of the surrogate.

    Args:
        x: membrane above threshold, any shape.
        surrogate: "atan", "fast_sigmoid" or "sigmoid".
        slope: how narrow the surrogate is, α or k below; None is the usual one.

    Returns:
        A tensor like x, of exact zeros and ones.
    """
    hard = ops.cast(x > 0, x.dtype)
    if exporting():  # a file has no gradient
        return hard
    soft = primitive(x, surrogate, SLOPES[surrogate] if slope is None else slope)
    return ops.stop_gradient(hard) + (soft - ops.stop_gradient(soft))


def primitive(x, surrogate, slope):
    """The function whose derivative is the surrogate.

    "atan": α/2 / (1 + (π α x / 2)²), "fast_sigmoid": 1 / (1 + k |x|)²,
    "sigmoid": k σ(k x) (1 - σ(k x)).
    """
    if surrogate == "atan":
        return ops.arctan((math.pi / 2 * slope) * x) / math.pi
    if surrogate == "fast_sigmoid":
        return x / (1.0 + slope * ops.abs(x))
    return ops.sigmoid(slope * x)
