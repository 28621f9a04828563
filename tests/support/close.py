"""Comparison of arrays that says how far apart they are."""

import keras
import numpy as np


def to_numpy(x):
    """A tensor of any backend, or an array, as float64."""
    x = keras.ops.convert_to_numpy(x) if keras.ops.is_tensor(x) else np.asarray(x)
    return x.astype("float64")


def difference(actual, expected):
    """Largest |actual - expected|, relative to the largest |expected|.

    Below 0.01 the largest |expected| counts as 0.01: there float32 itself is coarse
    beside what the numbers were computed from.
    """
    actual, expected = to_numpy(actual), to_numpy(expected)
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    if not actual.size:
        return 0.0
    return np.abs(actual - expected).max() / max(1e-2, np.abs(expected).max())


def assert_close(actual, expected, tolerance=1e-5):
    """Fails if the largest difference exceeds `tolerance`, or either is not finite."""
    actual, expected = to_numpy(actual), to_numpy(expected)
    assert np.isfinite(actual).all(), "actual is not finite"
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)
