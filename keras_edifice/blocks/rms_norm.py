"""Root-mean-square normalisation.

    y = γ x / sqrt(mean(x²) + ε)

Zhang & Sennrich 2019, Root Mean Square Layer Normalization, arXiv:1910.07467. Keras
has the same layer; ours is written in plain operations, which every ONNX exporter
takes.
"""

import keras
from keras import layers, ops


@keras.saving.register_keras_serializable("keras_edifice")
class RMSNorm(layers.Layer):
    """(..., features) -> the same. Normalised over the last axis, in float32.

    Args:
        epsilon: added to the mean square, inside the root.
        scale: whether there is a learned scale γ.
        zero_centered: γ is one plus the weight, which starts at zero (Gemma, Griffin).
    """

    per_step = True

    def __init__(self, epsilon=1e-5, scale=True, zero_centered=False, **kwargs):
        super().__init__(**kwargs)
        self.epsilon, self.scale = epsilon, scale
        self.zero_centered = zero_centered
        self.supports_masking = True

    def build(self, input_shape):
        self.gamma = None
        if self.scale:
            start = "zeros" if self.zero_centered else "ones"
            self.gamma = self.add_weight((input_shape[-1],), start, name="gamma")

    def call(self, x):
        dtype, x = x.dtype, ops.cast(x, "float32")
        mean_square = ops.mean(ops.square(x), axis=-1, keepdims=True)
        y = x * ops.rsqrt(mean_square + self.epsilon)
        if self.scale:
            y = y * (ops.cast(self.gamma, "float32") + float(self.zero_centered))
        return ops.cast(y, dtype)

    def compute_output_shape(self, input_shape):
        return input_shape
