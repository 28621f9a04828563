"""What weights are like at the start."""

import numpy as np


def is_truncated(values):
    """Normal with deviation 0.02, cut at two; Keras' cut lets single values through."""
    beyond = np.mean(np.abs(values) > 0.0401)
    return 0.012 < values.std() < 0.022 and beyond < 0.01
