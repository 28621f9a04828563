"""Layer normalisation of each head by itself, with a weight for each feature.

    y_h = γ_h (x_h - mean(x_h)) / sqrt(var(x_h) + ε) + β_h

A group norm whose groups are the heads (Wu & He 2018, arXiv:1803.08494) and whose
statistics never run over time: a later step changes no earlier one.
"""

import keras
from keras import layers, ops


@keras.saving.register_keras_serializable("keras_edifice")
class PerHeadNorm(layers.Layer):
    """(..., heads · features) or (..., heads, features) -> the same, in float32.

    Args:
        num_heads: heads that the last axis is divided among; None if they have an
            axis of their own.
        epsilon: added to the variance.
        center: whether there is a learned shift.
        scale: whether there is a learned scale.
        subtract_mean: whether the mean is taken off; False is an RMS norm.

    Raises:
        ValueError: the heads do not divide the last axis.
    """

    per_step = True

    def __init__(
        self,
        num_heads=None,
        epsilon=1e-5,
        center=True,
        scale=True,
        subtract_mean=True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_heads, self.epsilon = num_heads, epsilon
        self.center, self.scale = center, scale
        self.subtract_mean = subtract_mean
        self.supports_masking = True

    def build(self, input_shape):
        heads, features = self.num_heads, input_shape[-1]
        if heads is None:
            heads = input_shape[-2]
        elif features % heads:
            raise ValueError(
                f"the features must be a multiple of num_heads, received {features} "
                f"and {heads}"
            )
        else:
            features //= heads
        self.heads, self.features = heads, features
        self.gamma = self.beta = None
        if self.scale:
            self.gamma = self.add_weight((heads, features), "ones", name="gamma")
        if self.center:
            self.beta = self.add_weight((heads, features), "zeros", name="beta")

    def call(self, x):
        dtype, shape = x.dtype, ops.shape(x)
        x = ops.cast(x, "float32")
        if self.num_heads is not None:
            x = ops.reshape(x, (*shape[:-1], self.heads, self.features))
        if self.subtract_mean:
            x = x - ops.mean(x, axis=-1, keepdims=True)
        variance = ops.mean(ops.square(x), axis=-1, keepdims=True)
        y = x * ops.rsqrt(variance + self.epsilon)
        if self.scale:
            y = y * ops.cast(self.gamma, "float32")
        if self.center:
            y = y + ops.cast(self.beta, "float32")
        return ops.cast(ops.reshape(y, shape), dtype)

    def compute_output_shape(self, input_shape):
        return input_shape
