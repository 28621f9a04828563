"""Self-attention whose query heads share key and value heads in groups.

    q_h = x W_q,h        k_g = x W_k,g,   v_g = x W_v,g        g = h // (H / G)
    y = [softmax(q_h k_gᵀ / √d + mask) v_g]_h W_o

With as many key heads as query heads it is the multi-head attention of Vaswani et al.
2017, arXiv:1706.03762; with one it is multi-query attention, Shazeer 2019,
arXiv:1911.02150; between, Ainslie et al. 2023, GQA, arXiv:2305.13245.
"""

import keras
from keras import ops

from keras_edifice.blocks.alibi import ALiBi, alibi_slopes
from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.kv_cache import KVCache, ranks
from keras_edifice.blocks.rms_norm import RMSNorm
from keras_edifice.blocks.rotary_embedding import RotaryEmbedding
from keras_edifice.ops.attention import sdpa
from keras_edifice.ops.masks import both, rank_4, visible
from keras_edifice.ops.tracing import static_length


@keras.saving.register_keras_serializable("keras_edifice")
class GroupedQueryAttention(Composite):
    """(batch, time, features) -> the same. Causal unless told otherwise.

    A mask (batch, time) hides padding, on either side. The state of a causal layer is
    that of a `KVCache`: of `max_length` tokens, or rolling over `attention_window`.

    Args:
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of `num_heads`; None for as many.
        head_dim: size of each head; None for an equal share of the features.
        causal: whether later tokens are hidden.
        attention_window: tokens that each sees, itself included; None for all.
        rotary: options of the `RotaryEmbedding` of queries and keys; None for none.
        alibi: whether scores fall with the distance, as in `ALiBi`.
        qk_norm: whether queries and keys pass an `RMSNorm` over each head, before
            they are turned.
        norm_epsilon: of these norms.
        logit_soft_cap: bound of the scores, by a tanh; None for none.
        scale: of the scores; None for 1/√head_dim.
        use_bias: whether queries, keys and values have biases.
        use_output_bias: whether the output has one; as `use_bias` if None.
        dropout: rate on the attention weights, in training.
        kernel_initializer: of the matrices.
        output_initializer: of the output's matrix; as the others if None.
        block_size: compute in blocks of so many tokens, in memory linear in time.
        max_length: tokens that fit the cache where there is no window.

    Raises:
        ValueError: heads that do not divide, or dropout together with blocks.
    """

    def __init__(
        self,
        num_heads,
        num_kv_heads=None,
        head_dim=None,
        causal=True,
        attention_window=None,
        rotary=None,
        alibi=False,
        qk_norm=False,
        norm_epsilon=1e-6,
        logit_soft_cap=None,
        scale=None,
        use_bias=False,
        use_output_bias=None,
        dropout=0.0,
        kernel_initializer="glorot_uniform",
        output_initializer=None,
        block_size=None,
        max_length=2048,
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
        self.head_dim, self.causal = head_dim, causal
        self.attention_window, self.rotary, self.alibi = attention_window, rotary, alibi
        self.qk_norm, self.norm_epsilon = qk_norm, norm_epsilon
        self.logit_soft_cap, self.scale = logit_soft_cap, scale
        self.use_bias, self.use_output_bias = use_bias, use_output_bias
        self.dropout, self.block_size = dropout, block_size
        self.kernel_initializer = kernel_initializer
        self.output_initializer = output_initializer
        self.max_length = max_length
        self.supports_masking = True
        self.seed_generator = keras.random.SeedGenerator() if dropout else None
        self.cache = KVCache(
            attention_window or max_length,
            rolling=attention_window is not None,
            dtype=self.dtype_policy,
            name="cache",
        )

    def build(self, input_shape):
        features, heads = input_shape[-1], self.num_heads
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
        initializer = self.output_initializer or self.kernel_initializer
        self.out = self._dense("out", features, bias, initializer)
        for dense in (self.q, self.k, self.v):
            dense.build(input_shape)
        self.out.build((*input_shape[:-1], heads * self.size))
        policy, heads_shape = self.dtype_policy, (None, None, heads, self.size)
        if self.qk_norm:
            self.q_norm = RMSNorm(self.norm_epsilon, dtype=policy, name="q_norm")
            self.k_norm = RMSNorm(self.norm_epsilon, dtype=policy, name="k_norm")
            self.q_norm.build(heads_shape)
            self.k_norm.build(heads_shape)
        if self.rotary is not None:
            options = dict(self.rotary, dtype=policy, name="turn")
            self.turn = RotaryEmbedding(**options)
            self.turn.build(heads_shape)
        if self.alibi:
            self.bias = ALiBi(heads, dtype=policy, name="bias")
            self.bias.build(input_shape)
        self.cache.build(heads_shape)

    def _dense(self, name, units, use_bias, initializer=None):
        initializer = keras.initializers.get(initializer or self.kernel_initializer)
        return Dense(
            units,
            use_bias=use_bias,
            kernel_initializer=initializer.clone(),  # of another seed for each matrix
            dtype=self.dtype_policy,
            name=name,
        )

    def call(
        self,
        x,
        mask=None,
        attention_mask=None,
        initial_state=None,
        return_state=False,
        training=False,
    ):
        """Attends.

        Args:
            x: (batch, time, features).
            mask: (batch, time), False for padding.
            attention_mask: (batch, time, time), False where a token does not see
                another; not together with a state.
            initial_state: of the tokens before, or None.
            return_state: whether to give the state after the last token too.
            training: whether to drop attention weights.
        """
        stateful = return_state or initial_state is not None
        if stateful and (attention_mask is not None or not self.causal):
            raise ValueError(
                "a state is that of causal attention without attention_mask, received "
                f"causal={self.causal}; call without initial_state and return_state"
            )
        if initial_state is not None:
            y, state = self._continued(x, initial_state, mask, training)
            return (y, state) if return_state else y
        # In a cache the first valid token has position 0.
        ranked = return_state and mask is not None
        q, k, v = self._projected(x, ranks(mask) if ranked else None)
        seen = None if attention_mask is None else rank_4(attention_mask)
        seen = seen if mask is None else both(seen, rank_4(mask))
        y = self._attended(
            q,
            k,
            v,
            training,
            mask=seen,
            slopes=alibi_slopes(self.num_heads) if self.alibi else None,
            causal=self.causal,
            window=self.attention_window,
        )
        if not return_state:
            return y
        empty = self.initial_state(ops.shape(x)[0])
        return y, self.cache.update(empty, {"k": k, "v": v}, mask)

    def _projected(self, x, positions=None):
        """q, k and v, (batch, time, heads, size), turned."""
        batch, time, _ = ops.shape(x)
        q = ops.reshape(self.q(x), (batch, time, self.num_heads, self.size))
        k = ops.reshape(self.k(x), (batch, time, self.kv_heads, self.size))
        v = ops.reshape(self.v(x), (batch, time, self.kv_heads, self.size))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q = self.turn(q, positions=positions)
            k = self.turn(k, positions=positions)
        return q, k, v

    def _attended(self, q, k, v, training=False, **options):
        """The output for queries, keys and values."""
        y = sdpa(
            q,
            k,
            v,
            scale=self.scale,
            logit_soft_cap=self.logit_soft_cap,
            dropout=self.dropout if training else 0.0,
            seed=self.seed_generator,
            block_size=self.block_size,
            **options,
        )
        batch, time = ops.shape(q)[:2]
        return self.out(ops.reshape(y, (batch, time, self.num_heads * self.size)))

    def _continued(self, x, state, mask, training=False):
        """The output after the tokens of a state, and the new state."""
        cache = self.cache
        now = cache.next_positions(state, x, mask)
        q, k, v = self._projected(x, now)
        new_state = cache.update(state, {"k": k, "v": v}, mask)
        if cache.rolling and static_length(x) != 1:
            # New tokens push out what others of them still see.
            held = ops.cast(cache.positions(state), "float32")
            own = now if mask is None else ops.where(mask, now, -1.0)
            held = ops.concatenate([held, own], axis=1)
            k = ops.concatenate([ops.cast(state["k"], k.dtype), k], axis=1)
            v = ops.concatenate([ops.cast(state["v"], v.dtype), v], axis=1)
        else:
            held = ops.cast(cache.positions(new_state), "float32")
            k, v = (ops.cast(new_state[name], q.dtype) for name in ("k", "v"))
        seen = visible(now, held, causal=True, window=self.attention_window)
        seen = both(seen, rank_4(held >= 0.0))
        bias = self.bias.between(now, held) if self.alibi else None
        return self._attended(q, k, v, training, mask=seen, bias=bias), new_state

    def initial_state(self, batch_size, max_length=None):
        """An empty cache.

        Args:
            batch_size: number of rows.
            max_length: tokens that fit, where there is no window; the layer's if None.
        """
        entry = (self.kv_heads, self.size)
        slots = None if self.cache.rolling else max_length
        shapes = {"k": entry, "v": entry}
        return self.cache.initial_state(batch_size, shapes, slots=slots)

    def step(self, x_t, state):
        """One token: (batch, features) and the state -> the output and new state."""
        x_t = ops.cast(ops.convert_to_tensor(x_t), self.compute_dtype)
        y, state = self._continued(ops.expand_dims(x_t, 1), state, None)
        return y[:, 0], state

    def compute_output_shape(self, input_shape):
        return input_shape
