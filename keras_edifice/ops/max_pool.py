"""Largest value of each window of an image."""

from keras import ops

from keras_edifice.backends import fused_layers
from keras_edifice.backends.running_torch import runs_now
from keras_edifice.backends.traits import EXPORTS_POOLING


def max_pool(x, size, strides, padding=0):
    """(b, h, w, c) -> (b, (h + 2 padding - size) // strides + 1, ..., c).

    Args:
        x: images, channels last.
        size: side of a window.
        strides: distance between windows.
        padding: rows and columns added on each side, smaller than any number.
    """
    if runs_now(x) and 2 * padding <= size:
        return fused_layers.max_pool(x, size, strides, padding)
    if padding:
        edge = [padding, padding]
        x = ops.pad(x, [[0, 0], edge, edge, [0, 0]], constant_values=float("-inf"))
    if EXPORTS_POOLING:
        return ops.max_pool(x, size, strides, "valid", "channels_last")
    return sliced_max_pool(x, size, strides)


def sliced_max_pool(x, size, strides):
    """The same without padding, as a maximum of shifted slices, rows then columns.

    JAX exports no pooling to ONNX, and its gradient of pooling is several times
    slower than this on a CPU. Needs a known height and width.
    """
    x = _maximum([x[:, s] for s in _windows(x.shape[1], size, strides)])
    return _maximum([x[:, :, s] for s in _windows(x.shape[2], size, strides)])


def _windows(length, size, strides):
    """For each place in the window, the slice that holds it for all windows."""
    last = (length - size) // strides * strides
    return [slice(i, i + last + 1, strides) for i in range(size)]


def _maximum(parts):
    largest, *others = parts
    for part in others:
        largest = ops.maximum(largest, part)
    return largest
