"""The products of a computation, counted in its trace: nothing is computed.

Each adapter has the signature (function, inputs) -> (count, outputs).
"""

import importlib

import keras


def unknown_steps():
    """The error of a loop of which a trace cannot tell the steps."""
    return ValueError(
        "the steps of a loop depend on the data, so that its multiply-accumulates "
        "cannot be counted; build the model with a fixed number of steps"
    )


def multiply_accumulates(function, inputs):
    """The multiply-accumulates of the matrix products and convolutions in a function.

    A product of (m, k) and (k, n) has m k n; a convolution has outputs x taps x input
    channels of a group, padding included; a transposed one has inputs x taps x output
    channels of a group. Loops count by their steps, and of two branches the larger
    one. All else counts nothing: arithmetic on elements, norms, pooling, Fourier
    transforms. What no output needs is left out, but PyTorch computes and counts it.

    Args:
        function: of a flat list of tensors, giving tensors in a nested structure.
        inputs: a list of `keras.KerasTensor`, of which all sizes are known.

    Returns:
        The count, and the outputs as `keras.KerasTensor`.

    Raises:
        ValueError: the steps of a loop depend on the data.
    """
    name = f"{__package__}.products_{keras.backend.backend()}"
    count, outputs = importlib.import_module(name).count(function, inputs)
    return count, keras.tree.map_structure(_spec, outputs)


def _spec(x):
    if x is None:
        return None
    return keras.KerasTensor(tuple(x.shape), keras.backend.standardize_dtype(x.dtype))
