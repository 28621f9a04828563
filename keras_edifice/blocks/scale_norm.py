"""Normalisation to a learned length.

    y = g x / max(‖x‖, ε)

Nguyen & Salazar 2019, Transformers without Tears, arXiv:1910.05895, eq. 5.
"""

import math

import keras
from keras import layers, ops


@keras.saving.register_keras_serializable("keras_edifice")
class ScaleNorm(layers.Layer):
    """(..., features) -> the same, of the learned length g. Computes in float32.

    Args:
        epsilon: smallest length that is divided by.
        initial_scale: g at the start; None for the root of the number of features.
    """

    per_step = True

    def __init__(self, epsilon=1e-5, initial_scale=None, **kwargs):
        super().__init__(**kwargs)
        self.epsilon, self.initial_scale = epsilon, initial_scale
        self.supports_masking = True

    def build(self, input_shape):
        start = self.initial_scale or math.sqrt(input_shape[-1])
        self.g = self.add_weight((), keras.initializers.Constant(start), name="g")

    def call(self, x):
        dtype, x = x.dtype, ops.cast(x, "float32")
        square = ops.sum(ops.square(x), axis=-1, keepdims=True)
        y = x * ops.rsqrt(ops.maximum(square, self.epsilon**2))
        return ops.cast(ops.cast(self.g, "float32") * y, dtype)

    def compute_output_shape(self, input_shape):
        return input_shape
