"""Max pooling with symmetric padding, which exports from every backend."""

import keras
from keras import layers

from keras_edifice.ops.max_pool import max_pool


@keras.saving.register_keras_serializable("keras_edifice")
class MaxPooling(layers.Layer):
    """(batch, height, width, channels) -> windows' maxima, channels kept.

    Args:
        pool_size: side of a window.
        strides: distance between windows.
        padding: rows and columns added on each side; they are never the maximum.
    """

    def __init__(self, pool_size=2, strides=2, padding=0, **kwargs):
        super().__init__(**kwargs)
        self.pool_size, self.strides, self.padding = pool_size, strides, padding

    def call(self, x):
        return max_pool(x, self.pool_size, self.strides, self.padding)

    def compute_output_shape(self, input_shape):
        batch, *sides, channels = input_shape
        sides = [side if side is None else self._pooled(side) for side in sides]
        return (batch, *sides, channels)

    def _pooled(self, side):
        return (side + 2 * self.padding - self.pool_size) // self.strides + 1
