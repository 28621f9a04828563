"""Root-mean-square normalisation.

    y = γ x / sqrt(mean(x²) + ε)

Zhang & Sennrich 2019, Root Mean Square Layer Normalization, arXiv:1910.07467.
"""

import keras
from keras import layers, ops


@keras.saving.register_keras_serializable("keras_edifice")
class RMSNorm(layers.Layer):
    """(..., features) -> the same. Normalised over the last axis, in float32.

    Args:
        epsilon: added to the mean square, inside the root.
        scale: whether there is a learned scale.
    """

    def __init__(self, epsilon=1e-5, scale=True, **kwargs):
        super().__init__(**kwargs)
        self.epsilon, self.scale = epsilon, scale
        self.supports_masking = True

    def build(self, input_shape):
        self.gamma = None
        if self.scale:
            self.gamma = self.add_weight((input_shape[-1],), "ones", name="gamma")

    def call(self, x):
        dtype, x = x.dtype, ops.cast(x, "float32")
        mean_square = ops.mean(ops.square(x), axis=-1, keepdims=True)
        y = x * ops.rsqrt(mean_square + self.epsilon)
        if self.scale:
            y = y * ops.cast(self.gamma, "float32")
        return ops.cast(y, dtype)

    def compute_output_shape(self, input_shape):
        return input_shape
