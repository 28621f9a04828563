"""What sets the backends apart, for the few operations that must choose a form."""

import keras

_backend = keras.backend.backend()

COMPILES_LOOPS = _backend != "torch"
"""A loop over time compiles as one step; PyTorch runs each step by itself."""

EXPORTS_ERF = _backend != "jax"
"""A SavedModel with erf can be read back; JAX writes an operation of its own."""

EXPORTS_GELU = _backend != "tensorflow"
"""The exact gelu of the backend has an ONNX form; TensorFlow's calls erfc."""

EXPORTS_POOLING = _backend != "jax"
"""Pooling has an ONNX form."""

SLICES_BACK_SLOWLY = _backend == "tensorflow"
"""The gradient of a slice is an array of the whole size, for each of several slices."""

STRIDES_OVER_POINTS = _backend != "tensorflow"
"""A 1×1 convolution may have strides; the gradient of TensorFlow's writes beyond its
memory on CPUs (2.21 with oneDNN), which ends the process."""

SHARES_MATRICES = _backend != "tensorflow"
"""A product of stacks of matrices may have one right-hand side for several on the left;
TensorFlow's writes beyond its memory on CPUs (2.21 with oneDNN)."""
