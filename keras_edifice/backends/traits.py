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
