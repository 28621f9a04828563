"""Attention of one sequence to another.

    q_h = x W_q,h        k_g = c W_k,g,   v_g = c W_v,g        g = h // (H / G)
    y = tanh(α) [softmax(q_h k_gᵀ / √d + mask) v_g]_h W_o

Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3. The gate, which starts closed, is
that of Alayrac et al. 2022, Flamingo, arXiv:2204.14198, and there only if asked for.
"""

import keras
from keras import ops

from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.rms_norm import RMSNorm
from keras_edifice.ops.attention import sdpa


@keras.saving.register_keras_serializable("keras_edifice")
class CrossAttention(Composite):
    """(batch, queries, features) and (batch, tokens, others) -> as the queries.

    Blind to the order of the context. A mask of the context hides tokens; a query that
    sees none gets the bias of the output.

    Args:
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of `num_heads`; None for as many.
        head_dim: size of each head; None for an equal share of the queries' features.
        output_size: features of the output; None for those of the queries.
        qk_norm: whether queries and keys pass an `RMSNorm` over each head.
        norm_epsilon: of these norms.
        gated: whether the output is scaled by tanh(α), α = 0 at first.
        use_bias: whether queries, keys and values have biases.
        use_output_bias: whether the output has one; as `use_bias` if None.
        dropout: rate on the attention weights, in training.
        kernel_initializer: of the matrices.
        block_size: compute in blocks of so many tokens, in memory linear in both
            lengths; None for all scores at once.

    Raises:
        ValueError: heads that do not divide, or dropout together with blocks.
    """

    def __init__(
        self,
        num_heads,
        num_kv_heads=None,
        head_dim=None,
        output_size=None,
        qk_norm=False,
        norm_epsilon=1e-6,
        gated=False,
        use_bias=False,
        use_output_bias=None,
        dropout=0.0,
        kernel_initializer="glorot_uniform",
        block_size=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if num_heads % (num_kv_heads or num_heads):
            raise ValueError(
                "num_heads must be a multiple of num_kv_heads, received "
                f"{num_heads} and {num_kv_heads}; change one of them"
            )
        if dropout and block_size is not None:
            raise ValueError(
                "attention in blocks has no weights to drop, received "
                f"dropout={dropout} and block_size={block_size}; leave one away"
            )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim, self.output_size = head_dim, output_size
        self.qk_norm, self.norm_epsilon, self.gated = qk_norm, norm_epsilon, gated
        self.use_bias, self.use_output_bias = use_bias, use_output_bias
        self.dropout, self.block_size = dropout, block_size
        self.kernel_initializer = kernel_initializer
        self.supports_masking = True
        self.seed_generator = keras.random.SeedGenerator() if dropout else None

    def build(self, query_shape, context_shape):
        features, heads = query_shape[-1], self.num_heads
        if self.head_dim is None and features % heads:
            raise ValueError(
                "the features must be a multiple of num_heads, received "
                f"{features} and {heads}; change one of them or give head_dim"
            )
        self.size = self.head_dim or features // heads
        self.kv_heads = self.num_kv_heads or heads
        self.q = self._dense("q", heads * self.size, self.use_bias)
        self.k = self._dense("k", self.kv_heads * self.size, self.use_bias)
        self.v = self._dense("v", self.kv_heads * self.size, self.use_bias)
        bias = self.use_bias if self.use_output_bias is None else self.use_output_bias
        self.out = self._dense("out", self.output_size or features, bias)
        self.q.build(query_shape)
        self.k.build(context_shape)
        self.v.build(context_shape)
        self.out.build((*query_shape[:-1], heads * self.size))
        if self.qk_norm:
            policy, heads_shape = self.dtype_policy, (None, None, heads, self.size)
            self.q_norm = RMSNorm(self.norm_epsilon, dtype=policy, name="q_norm")
            self.k_norm = RMSNorm(self.norm_epsilon, dtype=policy, name="k_norm")
            self.q_norm.build(heads_shape)
            self.k_norm.build(heads_shape)
        if self.gated:
            self.gate = self.add_weight((), "zeros", name="gate")

    def _dense(self, name, units, use_bias):
        initializer = keras.initializers.get(self.kernel_initializer)
        return Dense(
            units,
            use_bias=use_bias,
            kernel_initializer=initializer.clone(),  # of another seed for each matrix
            dtype=self.dtype_policy,
            name=name,
        )

    def call(self, query, context, context_mask=None, training=False):
        """Attends.

        Args:
            query: (batch, queries, features).
            context: (batch, tokens, others).
            context_mask: (batch, tokens), False for those that are not seen.
            training: whether to drop attention weights.
        """
        return self.attend(query, *self.project(context), context_mask, training)

    def project(self, context):
        """The keys and values of a context, (batch, tokens, kv_heads, size) each.

        They stay the same while queries come one by one: decoders keep them.
        """
        k, v = (self._heads(dense(context)) for dense in (self.k, self.v))
        return (self.k_norm(k) if self.qk_norm else k), v

    def attend(self, query, k, v, context_mask=None, training=False):
        """The output for queries, with the keys and values of `project`."""
        q = self._heads(self.q(query))
        q = self.q_norm(q) if self.qk_norm else q
        y = sdpa(
            q,
            k,
            v,
            mask=context_mask,
            dropout=self.dropout if training else 0.0,
            seed=self.seed_generator,
            block_size=self.block_size,
        )
        batch, time = ops.shape(q)[:2]
        y = self.out(ops.reshape(y, (batch, time, self.num_heads * self.size)))
        return y * ops.tanh(ops.cast(self.gate, y.dtype)) if self.gated else y

    def _heads(self, x):
        """(batch, time, heads * size) -> (batch, time, heads, size)."""
        batch, time = ops.shape(x)[:2]
        return ops.reshape(x, (batch, time, x.shape[-1] // self.size, self.size))

    def compute_output_shape(self, query_shape, context_shape):
        return (*query_shape[:-1], self.output_size or query_shape[-1])
