"""The MLP on the channels of each token, with the exact GELU.

    y = W_2 gelu(W_1 x + b_1) + b_2

Used by image transformers and mixers; `ops/gelu.py` has the activation.
"""

import keras
from keras import layers

from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.initializers import matrix_initializer, mlp_bias_initializer
from keras_edifice.ops.gelu import gelu


@keras.saving.register_keras_serializable("keras_edifice")
class ChannelMLP(Composite):
    """(batch, ..., features) -> the same. Each position by itself.

    Args:
        hidden_size: width between the two matrices.
        dropout: rate after the activation, in training.
        initializer: "xavier", "truncated" or "lecun", of the matrices.
    """

    def __init__(self, hidden_size, dropout=0.0, initializer="xavier", **kwargs):
        super().__init__(**kwargs)
        self.hidden_size, self.dropout = hidden_size, dropout
        self.initializer = initializer
        self.supports_masking = True
        self.drop = layers.Dropout(dropout, dtype=self.dtype_policy, name="drop")

    def build(self, input_shape):
        self.first = self._dense(self.hidden_size, "first")
        self.second = self._dense(input_shape[-1], "second")
        self.first.build(input_shape)
        self.second.build((*input_shape[:-1], self.hidden_size))

    def _dense(self, units, name):
        return Dense(
            units,
            kernel_initializer=matrix_initializer(self.initializer),
            bias_initializer=mlp_bias_initializer(self.initializer),
            dtype=self.dtype_policy,
            name=name,
        )

    def call(self, x, training=False):
        return self.second(self.drop(gelu(self.first(x)), training=training))

    def compute_output_shape(self, input_shape):
        return input_shape
