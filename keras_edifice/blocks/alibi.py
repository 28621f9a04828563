"""Attention with linear biases: the nearer a key, the higher its score.

    b_hij = -m_h |i - j|,    m_h = 2^(-8 h / H),    h = 1 .. H

for H heads, a power of two; for other H the slopes of the next lower power n, and then
2^(-4 h / n) for h = 1, 3, 5, ... Press et al. 2021, Train Short, Test Long,
arXiv:2108.12409, section 3 and the code of its authors.
"""

import math

import keras
import numpy as np
from keras import layers, ops

from keras_edifice.ops.masks import positions


def alibi_slopes(num_heads):
    """The m of each head, (num_heads,) in float32."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4.0 * np.arange(1, 2 * (num_heads - power), 2) / power)
    return np.concatenate([slopes, between]).astype("float32")


@keras.saving.register_keras_serializable("keras_edifice")
class ALiBi(layers.Layer):
    """(batch, queries, ...) -> (1 or batch, heads, queries, keys), without weights.

    The bias is to be added to the scores after their scale, in float32; no other
    position enters. With a causal mask |i - j| is the i - j of the paper.

    Args:
        num_heads: heads of the attention.
    """

    def __init__(self, num_heads, **kwargs):
        super().__init__(**kwargs)
        self.num_heads = num_heads

    def call(self, queries, keys=None, offset=0):
        """The bias.

        Args:
            queries: tensor whose axis 1 are the queries.
            keys: tensor whose axis 1 are the keys; the queries if None.
            offset: position of the first query among the keys, number or (batch,).
        """
        i = positions(queries, offset)
        return self.between(i, positions(queries if keys is None else keys))

    def between(self, q_positions, k_positions):
        """The bias for positions (queries,) or (batch, queries), keys likewise."""
        slopes = ops.convert_to_tensor(alibi_slopes(self.num_heads))
        q_positions = ops.expand_dims(q_positions, -1)
        distance = ops.abs(q_positions - ops.expand_dims(k_positions, -2))
        if len(distance.shape) == 2:
            distance = ops.expand_dims(distance, 0)
        return -ops.reshape(slopes, (-1, 1, 1)) * ops.expand_dims(distance, 1)

    def compute_output_shape(self, queries_shape, keys_shape=None):
        keys_shape = keys_shape or queries_shape
        return None, self.num_heads, queries_shape[1], keys_shape[1]

    def compute_mask(self, queries, previous_mask=None):
        return None
