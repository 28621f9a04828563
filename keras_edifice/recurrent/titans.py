"""Titans: attention beside a memory that learns, and forgets, while it reads.

    q, k, v = conv(SiLU(W_q x)), conv(SiLU(W_k x)), conv(SiLU(W_v x)),    |q| = |k| = 1
    S_t = η_t S_{t-1} - θ_t ∂/∂M ‖M(k_t) - v_t‖²,    M_t = (1 - α_t) M_{t-1} + S_t
    memory(x)_t = W_o M_t(q_t),    θ, α, η sigmoids of x_t, one for each head

M is a perceptron of each head and M_0 is learned; the gradients are taken at the M with
which a chunk began. It is `titans_scan` of `ops/fast_weights.py`; read `ttt.py` first.
With persistent tokens P, learned, and a ⊗ b = norm(a) ⊙ σ(norm(b)):

    context (MAC)  in segments s:  h = M(q(s)) of the segments before,
                   y = attention([P, h, s]),  y ⊗ memory(y)
    gate (MAG)     window attention([P, x]) ⊗ memory([P, x])
    layer (MAL)    window attention(memory([P, x]))
    alone (LMM)    memory(x)

The paper lets the whole segment see h and the memory after it. Here token i sees what
comes from tokens up to i, so that the model can predict the next one.
"""

from typing import Literal

import keras
from keras import ops, tree

from keras_edifice.backends.traits import COMPILES_LOOPS
from keras_edifice.blocks.causal_conv import CausalConv
from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.feed_forward import GatedFFN
from keras_edifice.blocks.grouped_query_attention import GroupedQueryAttention
from keras_edifice.blocks.kv_cache import KVCache
from keras_edifice.blocks.rms_norm import RMSNorm
from keras_edifice.blocks.sequence import residual, sequence_input, sequence_model
from keras_edifice.model import EdificeModel
from keras_edifice.ops.fast_weights import (
    titans_initial_state,
    titans_scan,
    titans_step,
)
from keras_edifice.ops.gelu import gelu
from keras_edifice.ops.masks import both, make_mask
from keras_edifice.ops.step_scan import step_scan
from keras_edifice.ops.tracing import exporting, static_length
from keras_edifice.options import Count, Positive, Rate, Size
from keras_edifice.recurrent.ttt import by_token, flat, unflat, without_masked
from keras_edifice.registry import architecture

EPSILON = 1e-6


@keras.saving.register_keras_serializable("keras_edifice")
class NeuralMemory(Composite):
    """(batch, time, features) -> the same. Causal; O(1) state per step.

    The state is (the last conv_size - 1 inputs of the three convolutions, that of
    `titans_scan`), the latter in float32. Masked tokens do not exist to it, so that
    sequences may be padded on either side.

    Args:
        num_heads: memories side by side.
        memory_size: features of the keys and values of each.
        depth: matrices of M, with a GELU between them.
        expansion: width between these matrices, relative to memory_size.
        residual_norm: M(x) is x + LN(z(x)) (1 + γ) of its matrices' z, and γ learns
            as they do.
        chunk_size: tokens whose gradients are taken at the same M. Another number is
            another memory.
        use_momentum: whether there is η, else zero.
        use_forgetting: whether there is α, else zero.
        max_lr: largest θ.
        conv_size: taps of the convolutions; 0 for none.
    """

    def __init__(
        self,
        num_heads=4,
        memory_size=64,
        depth=2,
        expansion=4.0,
        residual_norm=True,
        chunk_size=16,
        use_momentum=True,
        use_forgetting=True,
        max_lr=1e-2,
        conv_size=4,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)  # the state keeps its precision
        self.num_heads, self.memory_size = num_heads, memory_size
        self.depth, self.expansion = depth, expansion
        self.residual_norm, self.chunk_size = residual_norm, chunk_size
        self.use_momentum, self.use_forgetting = use_momentum, use_forgetting
        self.max_lr, self.conv_size = max_lr, conv_size
        self.supports_masking = True

    def build(self, input_shape):
        features, width = input_shape[-1], self.num_heads * self.memory_size
        policy = self.dtype_policy
        self.projections, self.convs = [], []
        for name in "qkv":
            dense = Dense(width, use_bias=False, dtype=policy, name=f"{name}_proj")
            dense.build(input_shape)
            self.projections.append(dense)
            if self.conv_size:
                conv = CausalConv(
                    self.conv_size, False, dtype=policy, name=f"{name}_conv"
                )
                conv.build((None, None, width))
                self.convs.append(conv)
        self.o_proj = Dense(features, use_bias=False, dtype=policy, name="o_proj")
        self.o_proj.build((None, None, width))
        # At the start θ is half of its largest, little is forgotten, S is halved.
        biases = {"theta": 0.0}
        biases |= {"alpha": -3.0} if self.use_forgetting else {}
        biases |= {"eta": 0.0} if self.use_momentum else {}
        self.gates = {
            name: self._gate(name, features, bias) for name, bias in biases.items()
        }
        self._build_memory()

    def _gate(self, name, features, bias):
        start = keras.initializers.RandomNormal(stddev=0.02)
        kernel = self._weight(f"{name}_kernel", (features, self.num_heads), start)
        start = keras.initializers.Constant(bias)
        return kernel, self._weight(f"{name}_bias", (self.num_heads,), start)

    def _build_memory(self):
        size = self.memory_size
        wide = max(1, round(self.expansion * size))
        widths = [size, *[wide] * (self.depth - 1), size]
        self.matrices = []
        for i in range(1, len(widths)):
            bound = (6.0 / (widths[i - 1] + widths[i])) ** 0.5  # Glorot, of each head
            start = keras.initializers.RandomUniform(-bound, bound)
            shape = (self.num_heads, widths[i - 1], widths[i])
            self.matrices.append(self._weight(f"M{i}", shape, start))
        self.gain = None
        if self.residual_norm:
            self.gain = self._weight("gain", (self.num_heads, size), "zeros")

    def _weight(self, name, shape, initializer):
        """In float32 also where the layer computes in half precision."""
        return self.add_weight(shape, initializer, autocast=False, name=name)

    def call(self, x, mask=None, initial_state=None, return_state=False):
        if mask is not None:
            return without_masked(self, x, mask, initial_state, return_state)
        seen, memory = (None, None) if initial_state is None else initial_state
        q, k, v, seen = self._streams(x, seen)
        y = titans_scan(
            *(q, k, v, *self._rates(x)),
            self.matrices,
            self.gain,
            self.chunk_size,
            initial_state=memory,
            return_state=return_state,
        )
        if not return_state:
            return self._output(y)
        y, memory = y
        return self._output(y), (seen, memory)

    def _streams(self, x, seen=None):
        """q, k and v, (b, t, h, d) each, and the last inputs of the convolutions."""
        seen = seen or [None] * 3
        found = [self._stream(i, x, last) for i, last in enumerate(seen)]
        (q, k, v), seen = zip(*found, strict=True)
        return q, k, v, seen if self.convs else ()

    def _stream(self, i, x, last=None):
        """Number i of q, k and v, and the last inputs of its convolution."""
        z = ops.silu(self.projections[i](x))
        if self.convs:
            z, last = self.convs[i](z, initial_state=last, return_state=True)
        return self._in_heads(z, unit=i < 2), last

    def _stream_step(self, i, x_t, last):
        z = ops.silu(self.projections[i](x_t))
        if self.convs:
            z, last = self.convs[i].step(z, last)
        return self._in_heads(z, unit=i < 2), last

    def _in_heads(self, z, unit):
        z = ops.reshape(z, (*ops.shape(z)[:-1], self.num_heads, self.memory_size))
        if not unit:
            return z
        z = ops.cast(z, "float32")
        return z * ops.rsqrt(ops.sum(z * z, axis=-1, keepdims=True) + EPSILON)

    def _rates(self, x):
        """θ, α and η, (..., heads) each in float32."""
        x = ops.cast(x, "float32")
        found = {
            name: ops.sigmoid(ops.matmul(x, kernel) + bias)
            for name, (kernel, bias) in self.gates.items()
        }
        theta = self.max_lr * found["theta"]
        none = ops.zeros_like(theta)
        return theta, found.get("alpha", none), found.get("eta", none)

    def _output(self, y):
        width = self.num_heads * self.memory_size
        y = ops.reshape(y, (*ops.shape(y)[:-2], width))
        return self.o_proj(ops.cast(y, self.compute_dtype))

    def recall(self, q, parameters):
        """W_o M(q) of a memory as it is.

        Args:
            q: (batch, time, heads, memory_size).
            parameters: M, the first part of a state of `titans_scan`.
        """
        matrices, gain = parameters
        q = ops.transpose(ops.cast(q, "float32"), (0, 2, 1, 3))
        z = ops.matmul(q, matrices[0])
        for matrix in matrices[1:]:
            z = ops.matmul(gelu(z), matrix)
        if gain:
            z = z - ops.mean(z, axis=-1, keepdims=True)
            scale = ops.rsqrt(ops.mean(z * z, axis=-1, keepdims=True) + 1e-5)
            z = q + z * scale * (1.0 + gain[0])
        return self._output(ops.transpose(z, (0, 2, 1, 3)))

    def initial_state(self, batch_size):
        """The state before the first token: the learned M_0, and no S."""
        seen = tuple(conv.initial_state(batch_size) for conv in self.convs)
        return seen, titans_initial_state(self.matrices, self.gain, batch_size)

    def step(self, x_t, state):
        """One token: (batch, features), the state -> the output, the new state."""
        x_t = ops.cast(ops.convert_to_tensor(x_t), self.compute_dtype)
        seen, memory = state
        lasts = seen or [None] * 3
        found = [self._stream_step(i, x_t, last) for i, last in enumerate(lasts)]
        (q, k, v), lasts = zip(*found, strict=True)
        rates = self._rates(x_t)
        y, memory = titans_step(q, k, v, *rates, memory, self.chunk_size)
        return self._output(y), (lasts if self.convs else (), memory)

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable("keras_edifice")
class PersistentAttention(GroupedQueryAttention):
    """(batch, time, features) -> the same. Attention that also sees learned tokens.

    A `GroupedQueryAttention`; every token sees all of the learned ones.

    Args:
        num_heads: as there.
        num_persistent: number of learned tokens.
        attention_window: as there; the learned tokens do not count.
    """

    def __init__(self, num_heads, num_persistent=4, attention_window=None, **kwargs):
        super().__init__(num_heads, attention_window=attention_window, **kwargs)
        self.num_persistent = num_persistent

    def build(self, input_shape):
        super().build(input_shape)
        self.persistent = persistent_tokens(self, input_shape[-1])

    def _attended(
        self, q, k, v, training=False, mask=None, causal=False, window=None, **options
    ):
        if not self.num_persistent:
            options |= dict(mask=mask, causal=causal, window=window)
            return super()._attended(q, k, v, training, **options)
        mask = both(mask, make_mask(q, k, causal=causal, window=window))
        batch, count = ops.shape(q)[0], self.num_persistent
        seen = ops.repeat(ops.ones_like(mask[..., :1]), count, axis=-1)
        mask = ops.concatenate([seen, mask], axis=-1)
        learned = ops.cast(self.persistent, self.compute_dtype)

        def after_learned(dense, x):
            own = ops.reshape(dense(learned), (1, count, self.kv_heads, self.size))
            own = ops.broadcast_to(own, (batch, *own.shape[1:]))
            return ops.concatenate([ops.cast(own, x.dtype), x], axis=1)

        k, v = after_learned(self.k, k), after_learned(self.v, v)
        return super()._attended(q, k, v, training, mask=mask, **options)


def persistent_tokens(layer, features):
    """The weight (num_persistent, features) of a layer with this attribute."""
    start = keras.initializers.RandomNormal(stddev=0.02)
    shape = (layer.num_persistent, features)
    return layer.add_weight(shape, start, name="persistent")


class _TitansBlock(Composite):
    """(batch, time, features) -> the same. Causal. What the three wirings share.

    Masked tokens do not exist to it, so that sequences may be padded on either side.

    Args:
        num_heads: of the attention.
        num_persistent: learned tokens before the sequence.
        memory: options of the `NeuralMemory`.
    """

    def __init__(self, num_heads=4, num_persistent=4, memory=None, **kwargs):
        super().__init__(autocast=False, **kwargs)  # the state keeps its precision
        self.num_heads, self.num_persistent = num_heads, num_persistent
        self.memory = dict(memory or {})
        self.supports_masking = True

    def build(self, input_shape):
        policy = self.dtype_policy
        self.recurrent = NeuralMemory(**self.memory, dtype=policy, name="memory")
        self.recurrent.build(input_shape)
        self.attention = self._attention()
        self.attention.build(input_shape)

    def _build_product(self, input_shape):
        """The norms of a ⊗ b."""
        policy = self.dtype_policy
        self.attention_norm = RMSNorm(EPSILON, dtype=policy, name="attention_norm")
        self.memory_norm = RMSNorm(EPSILON, dtype=policy, name="memory_norm")
        self.attention_norm.build(input_shape)
        self.memory_norm.build(input_shape)

    def _product(self, y, read):
        """Of the output of the attention and that of the memory."""
        return self.attention_norm(y) * ops.sigmoid(self.memory_norm(read))

    def call(self, x, mask=None, initial_state=None, return_state=False):
        if mask is not None:
            return without_masked(self, x, mask, initial_state, return_state)
        if initial_state is None and not return_state:
            return self._whole(x)
        if initial_state is None:
            initial_state = self.initial_state(ops.shape(x)[0])
        y, state = self._continued(x, initial_state)
        return (y, state) if return_state else y

    def _learned(self, batch_size):
        """The persistent tokens of each example, (batch, num_persistent, features)."""
        tokens = ops.cast(self._tokens(), self.compute_dtype)
        return ops.broadcast_to(tokens, (batch_size, *tokens.shape))

    def _after_learned(self, x):
        learned = self._learned(ops.shape(x)[0])
        return ops.concatenate([learned, ops.cast(x, self.compute_dtype)], axis=1)

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable("keras_edifice")
class MemoryAsGate(_TitansBlock):
    """(batch, time, features) -> the same. Causal; O(1) state per step.

    The state is (that of the memory, which has read the persistent tokens, and the
    cache of the window).

    Args:
        num_heads: of the attention.
        attention_window: tokens that each sees, itself included and the persistent
            ones besides.
        num_persistent: learned tokens before the sequence.
        memory: options of the `NeuralMemory`.
    """

    def __init__(
        self, num_heads=4, attention_window=16, num_persistent=4, memory=None, **kwargs
    ):
        super().__init__(num_heads, num_persistent, memory, **kwargs)
        self.attention_window = attention_window

    def build(self, input_shape):
        super().build(input_shape)
        self._build_product(input_shape)

    def _attention(self):
        return PersistentAttention(
            self.num_heads,
            self.num_persistent,
            self.attention_window,
            dtype=self.dtype_policy,
            name="attention",
        )

    def _tokens(self):
        return self.attention.persistent

    def _whole(self, x):
        read = self.recurrent(self._after_learned(x))[:, self.num_persistent :]
        return self._product(self.attention(x), read)

    def _continued(self, x, state):
        memory, cache = state
        options = dict(return_state=True)
        read, memory = self.recurrent(x, initial_state=memory, **options)
        y, cache = self.attention(x, initial_state=cache, **options)
        return self._product(y, read), (memory, cache)

    def initial_state(self, batch_size):
        """The state before the first token of the sequence, after the learned ones."""
        memory = self.recurrent.initial_state(batch_size)
        if self.num_persistent:
            learned = self._learned(batch_size)
            _, memory = self.recurrent(learned, return_state=True)
        return memory, self.attention.initial_state(batch_size)

    def step(self, x_t, state):
        """One token: (batch, features), the state -> the output, the new state."""
        memory, cache = state
        read, memory = self.recurrent.step(x_t, memory)
        y, cache = self.attention.step(x_t, cache)
        return self._product(y, read), (memory, cache)


@keras.saving.register_keras_serializable("keras_edifice")
class MemoryAsLayer(MemoryAsGate):
    """(batch, time, features) -> the same. Causal; O(1) state per step.

    The state is (that of the memory, the cache of the window), both after the
    persistent tokens.

    Args:
        num_heads: of the attention.
        attention_window: tokens that each sees, itself included.
        num_persistent: learned tokens before the sequence.
        memory: options of the `NeuralMemory`.
    """

    def build(self, input_shape):
        _TitansBlock.build(self, input_shape)
        self.persistent = persistent_tokens(self, input_shape[-1])

    def _attention(self):
        return GroupedQueryAttention(
            self.num_heads,
            attention_window=self.attention_window,
            dtype=self.dtype_policy,
            name="attention",
        )

    def _tokens(self):
        return self.persistent

    def _whole(self, x):
        y = self.attention(self.recurrent(self._after_learned(x)))
        return y[:, self.num_persistent :]

    def _continued(self, x, state):
        memory, cache = state
        options = dict(return_state=True)
        y, memory = self.recurrent(x, initial_state=memory, **options)
        y, cache = self.attention(y, initial_state=cache, **options)
        return y, (memory, cache)

    def initial_state(self, batch_size):
        """The state before the first token of the sequence, after the learned ones."""
        empty = self.recurrent.initial_state(batch_size)
        empty = empty, self.attention.initial_state(batch_size)
        if not self.num_persistent:
            return empty
        return self._continued(self._learned(batch_size), empty)[1]

    def step(self, x_t, state):
        """One token: (batch, features), the state -> the output, the new state."""
        memory, cache = state
        y, memory = self.recurrent.step(x_t, memory)
        y, cache = self.attention.step(y, cache)
        return y, (memory, cache)


@keras.saving.register_keras_serializable("keras_edifice")
class MemoryAsContext(_TitansBlock):
    """(batch, time, features) -> the same. Causal; O(1) state per step.

    The state is (the last inputs of the convolution of q(s), the state of the memory,
    M at the segment's start, keys and values of the segment's tokens and of h so far).
    With a state it goes token by token.

    Args:
        num_heads: of the attention.
        segment_size: tokens of a segment, a multiple of the memory's chunk_size.
        num_persistent: learned tokens that all see.
        memory: options of the `NeuralMemory`.

    Raises:
        ValueError: segment_size is no multiple of the memory's chunk_size; PyTorch
            exports an unknown length.
    """

    def __init__(
        self, num_heads=4, segment_size=16, num_persistent=4, memory=None, **kwargs
    ):
        super().__init__(num_heads, num_persistent, memory, **kwargs)
        self.segment_size = segment_size
        chunk_size = self.memory.get("chunk_size", 16)
        if segment_size % chunk_size:
            raise ValueError(
                "segment_size must be a multiple of chunk_size, received "
                f"{segment_size} and {chunk_size}; change one of them"
            )
        self.cache = KVCache(segment_size, dtype=self.dtype_policy, name="cache")

    def build(self, input_shape):
        super().build(input_shape)
        self._build_product(input_shape)
        self.cache.build(input_shape)

    def _attention(self):
        return PersistentAttention(
            self.num_heads,
            self.num_persistent,
            dtype=self.dtype_policy,
            name="attention",
        )

    def _whole(self, x):
        """The loop over the segments, of which the last may be incomplete."""
        if static_length(x) is None and exporting():
            if not COMPILES_LOOPS:
                raise ValueError(
                    "PyTorch exports memory_as='context' for a fixed length only, "
                    "received an unknown one; fix it, or export from TensorFlow or JAX"
                )
            return self._continued(x, self.initial_state(ops.shape(x)[0]))[0]
        size, batch, length = self.segment_size, ops.shape(x)[0], ops.shape(x)[1]
        query, _ = self.recurrent._stream(0, x)
        parts = [query, *self.attention._projected(x)]
        shapes = [part.shape[2:] for part in parts]
        parts = [ops.reshape(part, (batch, length, -1)) for part in parts]
        widths = [shape[0] * shape[1] for shape in shapes]
        tokens = ops.concatenate([ops.cast(z, "float32") for z in parts], axis=-1)
        count = (length + size - 1) // size
        place = ops.minimum(ops.arange(0, count * size, dtype="int32"), length - 1)
        tokens = ops.take(tokens, place, axis=1)
        seen, memory = self.recurrent.initial_state(batch)
        state = seen, memory[:-1]

        def segment(tokens, leaves):
            tokens = ops.reshape(tokens, (-1, size, sum(widths)))
            ends = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
            parts = ops.split(tokens, ends, axis=-1)
            parts = [
                ops.reshape(part, (-1, size, *shape))
                for part, shape in zip(parts, shapes, strict=True)
            ]
            y, new = self._segment(*parts, unflat(leaves, state))
            return ops.reshape(y, (-1, size * y.shape[-1])), flat(new)

        tokens = ops.reshape(tokens, (batch, count, size * sum(widths)))
        y, _ = step_scan(segment, tokens, flat(state))
        y = ops.reshape(y, (batch, count * size, 2 * x.shape[-1]))[:, :length]
        y, read = ops.split(ops.cast(y, self.compute_dtype), 2, axis=-1)
        return self._product(y, read)

    def _segment(self, query, q, k, v, state):
        """Attention and memory of one segment, side by side, and the next state."""
        seen, memory = state
        dtype = self.compute_dtype
        q, k, v = (ops.cast(z, dtype) for z in (q, k, v))
        _, k_h, v_h = self.attention._projected(self.recurrent.recall(query, memory[0]))
        k, v = ops.concatenate([k_h, k], axis=1), ops.concatenate([v_h, v], axis=1)
        mask = make_mask(self.segment_size, causal=True)
        mask = ops.concatenate([mask, mask], axis=-1)
        y = self.attention._attended(q, k, v, mask=mask)
        # No number of tokens in the chunk: a chunk begins with the segment.
        state = seen, (*memory, None)
        read, (seen, memory) = self.recurrent(y, initial_state=state, return_state=True)
        y = ops.concatenate([y, read], axis=-1)
        return ops.cast(y, "float32"), (seen, memory[:-1])

    def _continued(self, x, state):
        return by_token(self, x, state)

    def initial_state(self, batch_size):
        """The state before the first token."""
        convs = self.recurrent.convs
        seen = convs[0].initial_state(batch_size) if convs else ()
        memory = self.recurrent.initial_state(batch_size)
        entry = (self.num_heads, self.attention.size)
        shapes = dict.fromkeys(("k", "v", "k_h", "v_h"), entry)
        cache = self.cache.initial_state(batch_size, shapes)
        return seen, memory, memory[1][0], cache

    def step(self, x_t, state):
        """One token: (batch, features), the state -> the output, the new state."""
        x_t = ops.cast(ops.convert_to_tensor(x_t), self.compute_dtype)
        seen, memory, start, cache = state
        begins = ops.equal(cache["length"] % self.segment_size, 0)
        start = tree.map_structure(
            lambda now, old: ops.where(ops.reshape(begins, (-1, 1, 1, 1)), now, old),
            memory[1][0],
            start,
        )
        length = ops.where(begins, ops.zeros_like(cache["length"]), cache["length"])
        query, last = self.recurrent._stream_step(0, x_t, seen)
        h = self.recurrent.recall(ops.expand_dims(query, 1), start)
        _, k_h, v_h = self.attention._projected(h)
        q, k, v = self.attention._projected(ops.expand_dims(x_t, 1))
        entries = {"k": k, "v": v, "k_h": k_h, "v_h": v_h}
        cache = self.cache.update({**cache, "length": length}, entries)
        mask = self.cache.positions(cache) >= 0
        mask = ops.concatenate([mask, mask], axis=1)[:, None, None]
        k = ops.concatenate([cache["k_h"], cache["k"]], axis=1)
        v = ops.concatenate([cache["v_h"], cache["v"]], axis=1)
        y = self.attention._attended(q, k, v, mask=mask)[:, 0]
        read, memory = self.recurrent.step(y, memory)
        seen = last if self.recurrent.convs else ()
        return self._product(y, read), (seen, memory, start, cache)


WIRINGS = {"context": MemoryAsContext, "gate": MemoryAsGate, "layer": MemoryAsLayer}


@architecture(
    paper="Behrouz, Zhong & Mirrokni 2025, Titans: Learning to Memorize at Test Time, "
    "arXiv:2501.00663",
    title="Titans",
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, hidden_size)",
    causal=True,
    streaming=True,
    multiples={"hidden_size": "num_heads"},
    tiny=dict(
        embed_size=3,
        hidden_size=4,
        num_heads=2,
        num_layers=1,
        memory_size=4,
        memory_expansion=1.5,
        memory_residual_norm=False,  # with it, rounding grows over 512 tokens
        chunk_size=4,
        segment_size=4,
        num_persistent=2,
        window_size=7,
    ),
    variants={
        "mac": dict(memory_as="context"),
        "mag": dict(memory_as="gate"),
        "mal": dict(memory_as="layer"),
        "lmm": dict(memory_as="alone"),
    },
)
def titans(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    num_heads: Size = 4,
    num_layers: Size = 4,
    memory_as: Literal["context", "gate", "layer", "alone"] = "context",
    memory_size: Size = 64,
    memory_depth: Size = 2,
    memory_expansion: Positive = 4.0,
    memory_residual_norm: bool = True,
    chunk_size: Size = 16,
    segment_size: Size = 16,
    attention_window: Size = 16,
    num_persistent: Count = 4,
    use_momentum: bool = True,
    use_forgetting: bool = True,
    max_lr: Positive = 1e-2,
    conv_size: Count = 4,
    mlp_ratio: Positive = 4.0,
    dropout: Rate = 0.1,
    return_sequences: bool = False,
    pool: Literal["last", "mean"] = "last",
    vocab_size: Size | None = None,
    tie_embeddings: bool = True,
    window_size: Size | None = 60,
) -> EdificeModel:
    """Pre-norm residual stack of attention with a memory, and gated feed-forwards.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the residual stream.
        num_heads: of the attention, and memories of each layer.
        num_layers: number of layers, each with its feed-forward.
        memory_as: what the memory is to the attention: its context (MAC), its gate
            (MAG) or the layer before it (MAL); alone, without attention (LMM).
        memory_size: features of the keys and values of each memory.
        memory_depth: matrices of each memory, with a GELU between them.
        memory_expansion: width between them, relative to memory_size.
        memory_residual_norm: a memory adds its norm to what it is asked.
        chunk_size: tokens whose gradients are taken at the same weights.
        segment_size: tokens that attend to each other in "context", a multiple of
            chunk_size.
        attention_window: tokens that each sees in "gate" and "layer".
        num_persistent: learned tokens before each sequence.
        use_momentum: the memory keeps a part of its last steps.
        use_forgetting: the memory loses a part of itself with each step.
        max_lr: largest step size of the memory.
        conv_size: taps of the convolutions on its queries, keys and values; 0 for
            none.
        mlp_ratio: width of the feed-forwards relative to hidden_size, before the two
            thirds that their gate costs; rounded up to a multiple of 256, of 8 for a
            hidden_size below 256.
        dropout: rate on each branch's output, in training.
        return_sequences: give every step, (batch, window_size, hidden_size).
        pool: how the steps become one vector, by the last or by their mean.
        vocab_size: number of tokens, where the input is their numbers, (batch,
            window_size), instead of features; the output is then the logits of the
            next token at every step, (batch, window_size, vocab_size).
        tie_embeddings: those logits use the matrix that embeds the tokens.
        window_size: steps of the input, None for any number.

    Raises:
        ValueError: in "context", segment_size is no multiple of chunk_size.
    """
    inputs, x = sequence_input(
        window_size, embed_size, hidden_size, vocab_size, tie_embeddings
    )
    memory = dict(
        num_heads=num_heads,
        memory_size=memory_size,
        depth=memory_depth,
        expansion=memory_expansion,
        residual_norm=memory_residual_norm,
        chunk_size=chunk_size,
        use_momentum=use_momentum,
        use_forgetting=use_forgetting,
        max_lr=max_lr,
        conv_size=conv_size,
    )
    reach = segment_size if memory_as == "context" else attention_window
    for i in range(num_layers):
        name = f"titans_{i}"
        if memory_as == "alone":
            mixer = NeuralMemory(**memory, name=name)
        else:
            wiring = WIRINGS[memory_as]
            mixer = wiring(num_heads, reach, num_persistent, memory, name=name)
        x = residual(x, mixer, epsilon=EPSILON, dropout=dropout)
        multiple = 256 if hidden_size >= 256 else 8
        ffn = GatedFFN(expansion=mlp_ratio, multiple_of=multiple, name=f"ffn_{i}")
        x = residual(x, ffn, epsilon=EPSILON, dropout=dropout)
    x = RMSNorm(EPSILON, name="final_norm")(x)
    return sequence_model(inputs, x, return_sequences, pool, name="titans")
