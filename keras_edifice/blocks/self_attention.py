"""Multi-head self-attention, every token with every token.

    [Q, K, V] = X W + b
    head_i = softmax(Q_i K_iᵀ / √d) V_i,    Y = [head_1, ..., head_h] W_o + b_o

Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762, section 3.2, with the
three projections in one matrix.
"""

import keras
from keras import layers, ops

from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.initializers import matrix_initializer
from keras_edifice.ops.attention import sdpa


@keras.saving.register_keras_serializable("keras_edifice")
class SelfAttention(Composite):
    """(batch, tokens, features) -> the same. Equivariant to the order of the tokens.

    A mask (batch, tokens) hides tokens from all others.

    Args:
        num_heads: heads, which share the features equally.
        use_bias: whether queries, keys and values have biases.
        dropout: rate on the attention weights, in training.
        initializer: "xavier" or "truncated", of the matrices.
    """

    def __init__(
        self, num_heads, use_bias=True, dropout=0.0, initializer="xavier", **kwargs
    ):
        super().__init__(**kwargs)
        self.num_heads, self.use_bias = num_heads, use_bias
        self.dropout, self.initializer = dropout, initializer
        self.supports_masking = True
        self.drop = layers.Dropout(dropout, dtype=self.dtype_policy, name="drop")

    def build(self, input_shape):
        features = input_shape[-1]
        if features % self.num_heads:
            raise ValueError(
                f"the features must be a multiple of num_heads, received {features} "
                f"and {self.num_heads}; change one of them"
            )
        self.qkv = Dense(
            3 * features,
            use_bias=self.use_bias,
            kernel_initializer=matrix_initializer(self.initializer, parts=3),
            dtype=self.dtype_policy,
            name="qkv",
        )
        self.out = Dense(
            features,
            kernel_initializer=matrix_initializer(self.initializer),
            dtype=self.dtype_policy,
            name="out",
        )
        self.qkv.build(input_shape)
        self.out.build(input_shape)

    def call(self, x, mask=None, training=False):
        dropping = {}
        if training and self.dropout:
            dropping = dict(dropout=self.dropout, seed=self.drop.seed_generator)
        y = sdpa(*self._heads(x), mask=mask, **dropping)
        return self.out(ops.reshape(y, ops.shape(x)))

    def attention_weights(self, x, mask=None):
        """How much each token looks at each other: (b, heads, tokens, tokens).

        Rows sum to one, to zero where a mask leaves nothing to see. In float32.
        """
        heads = self._heads(ops.convert_to_tensor(x))
        return sdpa(*heads, mask=mask, return_weights=True)[1]

    def _heads(self, x):
        batch, tokens, features = ops.shape(x)
        shape = (batch, tokens, self.num_heads, features // self.num_heads)
        parts = ops.split(self.qkv(x), 3, axis=-1)
        return [ops.reshape(part, shape) for part in parts]  # each (b, t, h, d)

    def compute_output_shape(self, input_shape):
        return input_shape
