"""Batch normalisation of images, and of sequences that run step by step.

    y = γ (x - μ) / sqrt(σ² + ε) + β

Ioffe & Szegedy 2015, Batch Normalization, arXiv:1502.03167. μ and σ² are those of each
channel, over the batch and all its steps, in training; moving averages of them
otherwise, which makes each step independent of the others.
"""

import keras
from keras import layers

from keras_edifice.backends.fused_layers import FusedBatchNorm


@keras.saving.register_keras_serializable("keras_edifice")
class BatchNorm(FusedBatchNorm, layers.BatchNormalization):
    """(batch, ..., channels) -> the same. Blind to masked steps.

    Args:
        **kwargs: those of `keras.layers.BatchNormalization`.
    """

    per_step = True

    def build(self, input_shape):
        super().build(input_shape)
        self.input_spec = keras.InputSpec(min_ndim=2, axes={-1: input_shape[-1]})
