"""Learned tokens before those of the input, for the model to write its answer into."""

import keras
from keras import layers, ops


@keras.saving.register_keras_serializable("keras_edifice")
class ClassToken(layers.Layer):
    """(batch, tokens, features) -> (batch, count + tokens, features).

    Args:
        count: number of learned tokens.
        stddev: of the normal distribution that they start from.
    """

    def __init__(self, count=1, stddev=0.0, **kwargs):
        super().__init__(**kwargs)
        self.count, self.stddev = count, stddev

    def build(self, input_shape):
        start = keras.initializers.RandomNormal(stddev=self.stddev)
        self.token = self.add_weight(
            (1, self.count, input_shape[-1]), start, name="token"
        )

    def call(self, x):
        token = ops.cast(ops.convert_to_tensor(self.token), x.dtype)
        repeated = ops.zeros_like(x[:, :1]) + token  # (b, count, d)
        return ops.concatenate([repeated, x], axis=1)

    def compute_output_shape(self, input_shape):
        batch, tokens, features = input_shape
        return (batch, None if tokens is None else tokens + self.count, features)
