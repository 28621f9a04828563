"""Positions along an axis whose length may be unknown while it is traced."""

from keras import ops


def positions(x, axis=1):
    """0, 1, ... along an axis of x: (length,), float32.

    A cumulative sum of ones, which every exporter takes where `arange` of an unknown
    length is refused by some.
    """
    line = ops.moveaxis(x, axis, 0)
    while len(line.shape) > 1:
        line = line[:, 0]
    return ops.cumsum(ops.ones_like(line, dtype="float32"), axis=0) - 1.0
