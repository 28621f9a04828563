"""Gradients of a function of several arrays, beside those of a NumPy reference."""

import keras
import numpy as np
from keras import ops

from tests.support.close import assert_close, to_numpy
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient


class Applied(keras.layers.Layer):
    """A function of arrays that are its weights, so that all gradients come at once."""

    def __init__(self, function, arrays):
        super().__init__()
        self.function = function
        self.arguments = [self.add_weight(z.shape, trainable=True) for z in arrays]
        self.set_weights(arrays)
        self.built = True

    def call(self, x):
        return self.function(*(ops.convert_to_tensor(z) * 1.0 for z in self.arguments))


def gradients_in_all(function, arrays, weights):
    """Gradient of Σ weights * function(*arrays) in each of the arrays."""
    weights = ops.convert_to_tensor(weights)
    unused = np.zeros((1, 1), "float32")
    layer = Applied(function, arrays)
    return gradients(layer, unused, lambda y: ops.sum(y * weights))[0]


def assert_same_gradients(function, reference, arrays, tolerance=1e-4):
    """Fails if the gradients of `function` are not those of `reference`.

    Args:
        function: of float32 tensors, giving a tensor.
        reference: the same of float64 arrays.
        arrays: list of float32 arrays.
        tolerance: of `assert_close`.
    """
    exact = [to_numpy(z) for z in arrays]
    output = reference(*exact)
    weights = np.random.default_rng(1).normal(size=output.shape).astype("float32")
    found = gradients_in_all(function, arrays, weights)
    for i, gradient in enumerate(found):

        def value(z, i=i):
            return (reference(*exact[:i], z, *exact[i + 1 :]) * weights).sum()

        assert_close(gradient, numerical_gradient(value, exact[i]), tolerance)
