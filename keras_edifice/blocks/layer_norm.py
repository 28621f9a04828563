"""Layer normalisation that exports from every backend.

    y = γ (x - mean(x)) / sqrt(var(x) + ε) + β

Ba et al. 2016, Layer Normalization, arXiv:1607.06450. Keras has the same layer; ours
is written in plain operations, which every ONNX exporter takes. PyTorch has it in one.
"""

import keras
from keras import layers, ops

from keras_edifice.backends.running_torch import runs_now


@keras.saving.register_keras_serializable("keras_edifice")
class LayerNorm(layers.Layer):
    """(..., features) -> the same. Normalised over the last axis, in float32.

    Args:
        epsilon: added to the variance.
        center: whether there is a learned shift.
        scale: whether there is a learned scale.
    """

    per_step = True

    def __init__(self, epsilon=1e-5, center=True, scale=True, **kwargs):
        super().__init__(**kwargs)
        self.epsilon, self.center, self.scale = epsilon, center, scale
        self.supports_masking = True

    def build(self, input_shape):
        features = (input_shape[-1],)
        self.gamma = self.beta = None
        if self.scale:
            self.gamma = self.add_weight(features, "ones", name="gamma")
        if self.center:
            self.beta = self.add_weight(features, "zeros", name="beta")

    def call(self, x):
        if runs_now(x):
            return ops.layer_normalization(x, self.gamma, self.beta, -1, self.epsilon)
        dtype, x = x.dtype, ops.cast(x, "float32")
        centred = x - ops.mean(x, axis=-1, keepdims=True)
        variance = ops.mean(ops.square(centred), axis=-1, keepdims=True)
        y = centred * ops.rsqrt(variance + self.epsilon)
        if self.scale:
            y = y * ops.cast(self.gamma, "float32")
        if self.center:
            y = y + ops.cast(self.beta, "float32")
        return ops.cast(y, dtype)

    def compute_output_shape(self, input_shape):
        return input_shape
