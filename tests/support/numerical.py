"""Central differences in float64, the gradient of any NumPy reference."""

import numpy as np


def numerical_gradient(function, x, step=1e-6):
    """d function(x) / dx for a scalar function of a float64 array."""
    x = np.array(x, dtype="float64")
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        kept = x[index]
        x[index] = kept + step
        above = function(x)
        x[index] = kept - step
        below = function(x)
        x[index] = kept
        gradient[index] = (above - below) / (2 * step)
    return gradient
