"""Convolutions of images that are not laid out anew on PyTorch."""

import keras
from keras import layers, ops

from keras_edifice.backends.fused_layers import (
    FusedConvolution,
    FusedDepthwiseConvolution,
)
from keras_edifice.backends.traits import STRIDES_OVER_POINTS


@keras.saving.register_keras_serializable("keras_edifice")
class Conv2D(FusedConvolution, layers.Conv2D):
    """(batch, height, width, channels) -> (batch, rows, columns, filters).

    Args:
        **kwargs: those of `keras.layers.Conv2D`.
    """

    def convolution_op(self, inputs, kernel):
        points = self.kernel_size == (1, 1) and self.data_format == "channels_last"
        if STRIDES_OVER_POINTS or not points or self.strides == (1, 1):
            return super().convolution_op(inputs, kernel)
        down, right = self.strides
        seen = inputs[:, ::down, ::right]
        return ops.conv(seen, kernel, data_format=self.data_format)


@keras.saving.register_keras_serializable("keras_edifice")
class DepthwiseConv2D(FusedDepthwiseConvolution, layers.DepthwiseConv2D):
    """(batch, height, width, channels) -> (batch, rows, columns, features).

    Args:
        **kwargs: those of `keras.layers.DepthwiseConv2D`.
    """
