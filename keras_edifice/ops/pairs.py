"""Complex numbers as pairs (real part, imaginary part) of real tensors.

Layers hold no complex weights and exporters know no complex numbers; two real tensors
are the same on every backend.
"""

from keras import ops

from keras_edifice.ops.precision import exact_dtype


def exact(a):
    """The pair in its `exact_dtype`."""
    return tuple(ops.cast(part, exact_dtype(part)) for part in a)


def add(a, b):
    """The sum a + b."""
    return a[0] + b[0], a[1] + b[1]


def times(a, b):
    """The product a b, element by element."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def conjugate(a):
    """The complex conjugate of a."""
    return a[0], -a[1]


def reciprocal(a):
    """1 / a, for a that is not zero."""
    square = ops.square(a[0]) + ops.square(a[1])
    return a[0] / square, -a[1] / square


def exp(a):
    """The exponential function of a."""
    scale = ops.exp(a[0])
    return scale * ops.cos(a[1]), scale * ops.sin(a[1])
