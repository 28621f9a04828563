"""The precision that recurrences, sums and exponentials are computed in."""

from keras import backend


def exact_dtype(x):
    """float32, or float64 for a float64 x: never less, however few bits x has."""
    return "float64" if backend.standardize_dtype(x.dtype) == "float64" else "float32"
