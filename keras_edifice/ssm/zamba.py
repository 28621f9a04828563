"""Zamba: a stack of Mamba with one transformer block that several depths share.

    x ← x + mamba_i(norm(x + t_i)),    t_i = L_i F([x; x_0]), or 0 in most layers
    F(u) = W_d (GELU(g) ⊙ v),    [g, v] = W_gv norm(attention(norm(u)))

x_0 is what entered the first layer. F has one set of weights wherever it is used, only
L_i is that of the place; with `adapter_rank` its matrices also get a product of two
narrow ones of the place (Zamba2). F has no residual connections, and t_i enters the
Mamba branch alone. Read `mamba.py`, and `mamba_ssd.py` for version 2.
"""

import math
from typing import Literal

import keras
from keras import initializers, layers, ops

from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.grouped_query_attention import GroupedQueryAttention
from keras_edifice.blocks.recurrence_initializers import fan_in_uniform
from keras_edifice.blocks.rms_norm import RMSNorm
from keras_edifice.blocks.rotary_embedding import RotaryEmbedding
from keras_edifice.blocks.sequence import sequence_input, sequence_model
from keras_edifice.model import EdificeModel
from keras_edifice.ops.gelu import gelu
from keras_edifice.options import Count, Positive, Rate, Size
from keras_edifice.registry import architecture
from keras_edifice.ssm.bimamba import MambaCore
from keras_edifice.ssm.mamba_ssd import Mamba2Block


def _dense(units, name):
    start = initializers.RandomNormal(stddev=0.02)
    return Dense(units, use_bias=False, kernel_initializer=start, name=name)


@keras.saving.register_keras_serializable("keras_edifice")
class SideBySide(layers.Layer):
    """[(..., a), (..., b), ...] -> (..., a + b + ...). Each position by itself."""

    per_step = True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, parts):
        return ops.concatenate(parts, axis=-1)

    def compute_mask(self, parts, mask=None):
        return mask[0] if isinstance(mask, list | tuple) else mask

    def compute_output_shape(self, shapes):
        return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))


@keras.saving.register_keras_serializable("keras_edifice")
class GatedGELU(layers.Layer):
    """(..., 2 * features), gate and value -> (..., features). Without weights."""

    per_step = True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, x):
        gate, value = ops.split(x, 2, axis=-1)
        return gelu(gate) * value

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], input_shape[-1] // 2)


@keras.saving.register_keras_serializable("keras_edifice")
class ProjectedAttention(GroupedQueryAttention):
    """(batch, time, 3 * features), q, k and v -> (batch, time, features). Causal.

    `GroupedQueryAttention` without matrices, which layers around it share. The state
    is that of a `KVCache`, of each place by itself.

    Args:
        num_heads: heads, a divisor of the features.
        scale: of the scores; None for 1/√head_dim.
        rotary: options of the `RotaryEmbedding` of queries and keys; None for none.
        max_length: tokens that fit the cache.
    """

    def __init__(self, num_heads, scale=None, rotary=None, max_length=2048, **kwargs):
        super().__init__(
            num_heads, scale=scale, rotary=rotary, max_length=max_length, **kwargs
        )

    def build(self, input_shape):
        features = input_shape[-1] // 3
        if features % self.num_heads:
            raise ValueError(
                "the features of the attention must be a multiple of num_heads, "
                f"received {features} and {self.num_heads}; change one of them"
            )
        self.kv_heads, self.size = self.num_heads, features // self.num_heads
        self.out = layers.Identity(dtype=self.dtype_policy, name="out")
        heads_shape = (None, None, self.num_heads, self.size)
        if self.rotary is not None:
            options = dict(self.rotary, dtype=self.dtype_policy, name="turn")
            self.turn = RotaryEmbedding(**options)
            self.turn.build(heads_shape)
        self.cache.build(heads_shape)

    def _projected(self, x, positions=None):
        batch, time, _ = ops.shape(x)
        q, k, v = (
            ops.reshape(part, (batch, time, self.num_heads, self.size))
            for part in ops.split(x, 3, axis=-1)
        )
        if self.rotary is not None:
            q = self.turn(q, positions=positions)
            k = self.turn(k, positions=positions)
        return q, k, v

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], input_shape[-1] // 3)


@keras.saving.register_keras_serializable("keras_edifice")
class MultiHeadMamba(Composite):
    """(batch, time, features) -> the same. Causal; O(1) state per step.

    Mamba whose channels are split into heads, each of which selects Δ, B and C from
    its own channels. The state is that of a `MambaCore` for each head.

    Args:
        num_heads: a divisor of expand_factor * features.
        state_size: numbers that each channel remembers.
        expand_factor: width of all heads relative to that of the input.
        conv_size: taps of the convolution.
        depth: number of such blocks in the model; W_out starts divided by its root.
    """

    def __init__(
        self,
        num_heads=2,
        state_size=16,
        expand_factor=2,
        conv_size=4,
        depth=1,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)  # the state keeps its precision
        self.num_heads, self.state_size = num_heads, state_size
        self.expand_factor, self.conv_size = expand_factor, conv_size
        self.depth = depth
        self.supports_masking = True

    def build(self, input_shape):
        features = input_shape[-1]
        width = self.expand_factor * features
        if width % self.num_heads:
            raise ValueError(
                "the width of the recurrence must be a multiple of num_mamba_heads, "
                f"received {width} and {self.num_heads}; change one of them"
            )
        self.in_proj = self._dense("in_proj", 2 * width, fan_in_uniform())
        self.out_proj = self._dense("out_proj", features, fan_in_uniform(self.depth))
        self.in_proj.build((None, None, features))
        self.out_proj.build((None, None, width))
        self.heads = [
            MambaCore(
                self.state_size,
                conv_size=self.conv_size,
                dt_rank=math.ceil(features / 16),
                dtype=self.dtype_policy,
                name=f"head_{j}",
            )
            for j in range(self.num_heads)
        ]
        for head in self.heads:
            head.build((None, None, 2 * width // self.num_heads))

    def _dense(self, name, units, initializer):
        return Dense(
            units,
            use_bias=False,
            kernel_initializer=initializer,
            dtype=self.dtype_policy,
            name=name,
        )

    def call(self, x, mask=None, initial_state=None, return_state=False):
        states = [None] * self.num_heads if initial_state is None else initial_state
        parts = ops.split(self.in_proj(x), self.num_heads, axis=-1)
        found = [
            head(part, mask=mask, initial_state=state, return_state=True)
            for head, part, state in zip(self.heads, parts, states, strict=True)
        ]
        y = self.out_proj(ops.concatenate([y for y, _ in found], axis=-1))
        return (y, tuple(state for _, state in found)) if return_state else y

    def initial_state(self, batch_size):
        """The state before the first step: zeros."""
        return tuple(head.initial_state(batch_size) for head in self.heads)

    def step(self, x_t, state):
        """One step: (batch, features) and the state -> the output and the new state."""
        parts = ops.split(self.in_proj(x_t), self.num_heads, axis=-1)
        found = [
            head.step(part, own)
            for head, part, own in zip(self.heads, parts, state, strict=True)
        ]
        y = self.out_proj(ops.concatenate([y for y, _ in found], axis=-1))
        return y, tuple(own for _, own in found)

    def compute_output_shape(self, input_shape):
        return input_shape


class SharedTransformer:
    """F: layers with one set of weights; each `use` of it is at another place.

    Args:
        hidden_size: width of the stream.
        num_heads: of the attention over twice that width.
        mlp_size: width between the last two matrices.
        adapter_rank: of the matrices that a place adds; 0 for none.
        attention_adapters: whether queries, keys and values get such, too.
        use_rope: whether queries and keys are turned by their position.
        norm_eps: of the norms.
        name: begins the names of the layers.
    """

    def __init__(
        self,
        hidden_size,
        num_heads,
        mlp_size,
        adapter_rank,
        attention_adapters,
        use_rope,
        norm_eps,
        name,
    ):
        self.num_heads, self.use_rope = num_heads, use_rope
        self.head_dim = 2 * hidden_size // num_heads
        self.mlp_rank = adapter_rank
        self.attention_rank = adapter_rank if attention_adapters else 0
        self.norm = RMSNorm(norm_eps, name=f"{name}_norm")
        self.q, self.k, self.v = (
            _dense(2 * hidden_size, f"{name}_{part}") for part in "qkv"
        )
        self.out = _dense(hidden_size, f"{name}_out")
        self.mlp_norm = RMSNorm(norm_eps, name=f"{name}_mlp_norm")
        self.gate_up = _dense(2 * mlp_size, f"{name}_gate_up")
        self.gelu = GatedGELU(name=f"{name}_gelu")
        self.down = _dense(hidden_size, f"{name}_down")

    def use(self, x, x_0, i):
        """F([x; x_0]) with the cache and the adapters of layer i. Symbolic."""
        u = self.norm(SideBySide(name=f"join_{i}")([x, x_0]))
        qkv = [
            self._adapted(dense, u, self.attention_rank, f"{part}_adapter_{i}")
            for dense, part in ((self.q, "q"), (self.k, "k"), (self.v, "v"))
        ]
        attention = ProjectedAttention(
            self.num_heads,
            scale=(self.head_dim / 2) ** -0.5,  # the share of x alone
            rotary={} if self.use_rope else None,
            name=f"attention_{i}",
        )
        u = self.out(attention(SideBySide(name=f"qkv_{i}")(qkv)))
        hidden = self._adapted(
            self.gate_up, self.mlp_norm(u), self.mlp_rank, f"gate_up_adapter_{i}"
        )
        return self.down(self.gelu(hidden))

    def _adapted(self, dense, x, rank, name):
        """(W + U_i V_i) x, the second product being that of the place."""
        y = dense(x)
        if not rank:
            return y
        narrow = _dense(rank, f"{name}_in")(x)
        added = _dense(dense.units, f"{name}_out")(narrow)
        return layers.Add(name=f"{name}_add")([y, added])


def _places(num_layers, attention_every, attention_offset, attention_layers):
    """The layers that use a shared transformer."""
    if attention_layers is not None:
        if any(i >= num_layers for i in attention_layers):
            raise ValueError(
                f"attention_layers must be below num_layers, {num_layers}, received "
                f"{attention_layers}; change one of them"
            )
        return sorted(set(attention_layers))
    if attention_offset is None:
        attention_offset = attention_every - 1
    if attention_offset >= attention_every:
        raise ValueError(
            "attention_offset must be below attention_every, received "
            f"{attention_offset} and {attention_every}; change one of them"
        )
    return list(range(attention_offset, num_layers, attention_every))


def _mixer(version, width, num_mamba_heads, options):
    """The Mamba layer of a version, for a recurrence of this width."""
    if version == 1:
        return MultiHeadMamba(num_mamba_heads, **options)
    if width % num_mamba_heads:
        raise ValueError(
            "the width of the recurrence must be a multiple of num_mamba_heads, "
            f"received {width} and {num_mamba_heads}; change one of them"
        )
    return Mamba2Block(head_dim=width // num_mamba_heads, **options)


@architecture(
    paper="Glorioso et al. 2024, Zamba: A Compact 7B SSM Hybrid Model, "
    "arXiv:2405.16712; Glorioso et al. 2024, The Zamba2 Suite, arXiv:2411.15242",
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, hidden_size)",
    causal=True,
    streaming=True,
    tiny=dict(
        embed_size=3,
        hidden_size=4,
        num_layers=2,
        attention_every=1,
        num_heads=2,
        state_size=3,
        mlp_size=5,
        adapter_rank=1,
        window_size=7,
    ),
    variants={
        "7b": dict(
            hidden_size=3712,
            num_layers=76,
            num_heads=16,
            attention_layers=[2, *range(7, 74, 6)],
        ),
        "2.7b": dict(
            version=2,
            hidden_size=2560,
            num_layers=54,
            num_heads=32,
            num_mamba_heads=80,
            state_size=64,
            num_shared_blocks=2,
            adapter_rank=128,
            attention_layers=[*range(6, 43, 6), 47, 51],
        ),
    },
)
def zamba(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    num_layers: Size = 6,
    attention_every: Size = 3,
    attention_offset: Count | None = None,
    attention_layers: list[Count] | None = None,
    num_heads: Size = 4,
    state_size: Size = 16,
    expand_factor: Size = 2,
    conv_size: Size = 4,
    num_mamba_heads: Size = 2,
    mlp_size: Size | None = None,
    version: Literal[1, 2] = 1,
    num_shared_blocks: Size = 1,
    adapter_rank: Count = 0,
    attention_adapters: bool = False,
    use_rope: bool = False,
    norm_eps: Positive = 1e-5,
    dropout: Rate = 0.1,
    return_sequences: bool = False,
    pool: Literal["last", "mean"] = "last",
    vocab_size: Size | None = None,
    tie_embeddings: bool = True,
    window_size: Size | None = 60,
) -> EdificeModel:
    """Pre-norm residual stack of Mamba with a transformer block shared by some layers.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the residual stream.
        num_layers: number of Mamba layers.
        attention_every: layers from one use of the shared block to the next.
        attention_offset: first layer with such a use, from 0; None for the last of
            the first attention_every.
        attention_layers: the layers with such a use, from 0, instead of a period.
        num_heads: heads of its attention, which divide twice hidden_size.
        state_size: numbers that each channel of Mamba remembers.
        expand_factor: width of its recurrence relative to hidden_size.
        conv_size: taps of the convolution before the recurrence.
        num_mamba_heads: heads of the recurrence.
        mlp_size: width of the shared block's feed-forward; None for 4 times
            hidden_size.
        version: 1 for Mamba in heads, 2 for Mamba-2.
        num_shared_blocks: shared blocks, which take turns; 2 in Zamba2.
        adapter_rank: rank of what each use adds to the feed-forward's first matrix;
            0 for nothing.
        attention_adapters: each use adds the same to queries, keys and values.
        use_rope: queries and keys are turned by their position.
        norm_eps: epsilon of every RMSNorm.
        dropout: rate on each Mamba layer's output, in training.
        return_sequences: give every step, (batch, window_size, hidden_size).
        pool: how the steps become one vector, by the last or by their mean.
        vocab_size: number of tokens, where the input is their numbers, (batch,
            window_size), instead of features; the output is then the logits of the
            next token at every step, (batch, window_size, vocab_size).
        tie_embeddings: those logits use the matrix that embeds the tokens.
        window_size: steps of the input, None for any number.
    """
    places = _places(num_layers, attention_every, attention_offset, attention_layers)
    inputs, x = sequence_input(
        window_size, embed_size, hidden_size, vocab_size, tie_embeddings
    )
    shared = [
        SharedTransformer(
            hidden_size,
            num_heads,
            mlp_size or 4 * hidden_size,
            adapter_rank,
            attention_adapters,
            use_rope,
            norm_eps,
            name=f"shared_{b}",
        )
        for b in range(num_shared_blocks)
    ]
    x_0 = x
    for i in range(num_layers):
        y = x
        if i in places:
            block = shared[places.index(i) % num_shared_blocks]
            t = _dense(hidden_size, f"linear_{i}")(block.use(x, x_0, i))
            y = layers.Add(name=f"linear_{i}_add")([x, t])
        options = dict(
            state_size=state_size,
            expand_factor=expand_factor,
            conv_size=conv_size,
            depth=num_layers,
            name=f"mamba_{i}",
        )
        mixer = _mixer(version, expand_factor * hidden_size, num_mamba_heads, options)
        y = mixer(RMSNorm(norm_eps, name=f"mamba_{i}_norm")(y))
        if dropout:
            y = layers.Dropout(dropout, name=f"mamba_{i}_dropout")(y)
        x = layers.Add(name=f"mamba_{i}_add")([x, y])
    x = RMSNorm(norm_eps, name="final_norm")(x)
    return sequence_model(inputs, x, return_sequences, pool, name="zamba")
