"""mLSTM: an LSTM whose memory is a matrix, with gates that are exponentials.

    m_t = max(log f_t + m_{t-1}, ĩ_t),    log f = log σ(f̃)
    C_t = e^{log f_t + m_{t-1} - m_t} C_{t-1} + e^{ĩ_t - m_t} k_t v_tᵀ,    n_t likewise
    h_t = C_tᵀ q_t / (max(|n_t · q_t|, e^{-m_t}) + ε)

No gate looks at h_{t-1}, so that the steps are computed side by side, by
`stabilized_linear_attention` of `ops/linear_attention.py`. m keeps the exponentials in
range and cancels. Around the memory, in the block of the paper,

    [x_m, z] = W_up x,    x_c = SiLU(conv(x_m)),    q = W_q x_c,    k = W_k x_c / √d
    v = W_v x_m,    [ĩ, f̃] = W_if [q; k; v] + b
    output = W_down ((norm(h) + s ⊙ x_c) ⊙ SiLU(z))

and in that of xLSTM 7B (Beck et al. 2025, arXiv:2503.13427), all of x itself,

    output = W_out (σ(W_o x) ⊙ norm(h)),    ĩ, f̃ ← 15 tanh(ĩ / 15), 15 tanh(f̃ / 15)

`slstm.py` has the other memory of the paper, `xlstm.py` both.
"""

import functools
import math
from typing import Literal

import keras
import numpy as np
from keras import initializers, layers, ops

from keras_edifice.blocks.causal_conv import CausalConv
from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.feed_forward import activation as function_of
from keras_edifice.blocks.layer_norm import LayerNorm
from keras_edifice.blocks.per_head_norm import PerHeadNorm
from keras_edifice.blocks.rms_norm import RMSNorm
from keras_edifice.blocks.sequence import read_out, residual, sequence_input
from keras_edifice.model import EdificeModel
from keras_edifice.ops.linear_attention import (
    stabilized_linear_attention,
    stabilized_linear_attention_step,
)
from keras_edifice.options import Count, Positive, Rate, Size
from keras_edifice.registry import architecture

BlockStyle = Literal["original", "7b"]
GATE_CAP = 15.0
LOGIT_CAP = 30.0
BLOCK = 16
"""Features of a block that is large enough for a matrix product of its own."""
ScaleNorm = functools.partial(LayerNorm, center=False)


def round_up(size, multiple):
    """The smallest multiple that is not below the size."""
    return multiple * math.ceil(size / multiple)


def small_init(features):
    """N(0, 2 / (5 · features)), Nguyen & Salazar 2019, arXiv:1910.05895."""
    return initializers.RandomNormal(stddev=math.sqrt(2 / (5 * features)))


def down_init(features, depth):
    """N(0, 4 / (depth² · features)), for what leads back to the residual stream."""
    return initializers.RandomNormal(stddev=2 / (depth * math.sqrt(features)))


def gate_bias(input_bias, input_deviation, heads):
    """Biases of the input gates, then of the forget gates, which run from 3 to 6."""

    def initialize(shape, dtype=None):
        normal = initializers.RandomNormal(input_bias, input_deviation)
        forget = ops.convert_to_tensor(np.linspace(3.0, 6.0, heads), dtype="float32")
        biases = ops.concatenate([normal((heads,), "float32"), forget])
        return ops.cast(biases, dtype or "float32")

    return initialize


def soft_cap(x, cap):
    """Numbers within ±cap, near zero as they are."""
    return cap * ops.tanh(x / cap)


@keras.saving.register_keras_serializable("keras_edifice")
class BlockDiagonalDense(layers.Layer):
    """(..., features) -> (..., num_blocks · units). Each block of features by itself.

    Args:
        num_blocks: parts that the features are divided among.
        units: outputs of each; None for as many as inputs.
        stddev: of the normal distribution that the matrices start from.

    Raises:
        ValueError: the blocks do not divide the features.
    """

    def __init__(self, num_blocks, units=None, stddev=0.02, **kwargs):
        super().__init__(**kwargs)
        self.num_blocks, self.units, self.stddev = num_blocks, units, stddev
        self.supports_masking = True

    def build(self, input_shape):
        if input_shape[-1] % self.num_blocks:
            raise ValueError(
                "the features must be a multiple of num_blocks, received "
                f"{input_shape[-1]} and {self.num_blocks}"
            )
        self.inputs = input_shape[-1] // self.num_blocks
        self.kernel = self.add_weight(
            (self.num_blocks, self.inputs, self.units or self.inputs),
            initializers.RandomNormal(stddev=self.stddev),
            name="kernel",
        )

    def call(self, x):
        lead, kernel = ops.shape(x)[:-1], self._joined_blocks()
        if kernel.shape[0] == 1:
            return ops.matmul(x, kernel[0])
        x = ops.reshape(x, (*lead, *kernel.shape[:2]))
        y = ops.matmul(ops.swapaxes(x, -3, -2), kernel)  # the blocks before time
        outputs = kernel.shape[0] * kernel.shape[2]
        return ops.reshape(ops.swapaxes(y, -3, -2), (*lead, outputs))

    def _joined_blocks(self):
        """Small blocks as fewer and larger ones with zeros, which multiply faster."""
        kernel = ops.convert_to_tensor(self.kernel)
        count, rows, columns = kernel.shape
        joined = math.gcd(count, max(1, BLOCK // rows))
        kernel = ops.reshape(kernel, (-1, joined, rows, 1, columns))
        own = ops.reshape(ops.eye(joined, dtype=kernel.dtype), (joined, 1, joined, 1))
        return ops.reshape(kernel * own, (-1, joined * rows, joined * columns))

    def compute_output_shape(self, input_shape):
        units = self.units or input_shape[-1] // self.num_blocks
        return (*input_shape[:-1], self.num_blocks * units)


@keras.saving.register_keras_serializable("keras_edifice")
class MLSTMGates(layers.Layer):
    """q, k and v, (..., width) each, -> (..., 2 num_heads): W_if [q; k; v] + b.

    The three are multiplied one by one and never put side by side.

    Args:
        num_heads: input gates, which come first, and as many forget gates.
    """

    def __init__(self, num_heads, **kwargs):
        super().__init__(**kwargs)
        self.num_heads = num_heads

    def build(self, q_shape, k_shape, v_shape):
        inputs, gates = q_shape[-1] + k_shape[-1] + v_shape[-1], 2 * self.num_heads
        bias = gate_bias(0.0, 0.1, self.num_heads)
        self.kernel = self.add_weight((inputs, gates), "zeros", name="kernel")
        self.bias = self.add_weight((gates,), bias, name="bias")

    def call(self, q, k, v):
        kernel, total, start = ops.convert_to_tensor(self.kernel), self.bias, 0
        for x in (q, k, v):
            end = start + x.shape[-1]
            total = total + ops.matmul(x, kernel[start:end])
            start = end
        return total

    def compute_output_shape(self, q_shape, k_shape, v_shape):
        return (*q_shape[:-1], 2 * self.num_heads)


@keras.saving.register_keras_serializable("keras_edifice")
class XLSTMFeedForward(Composite):
    """W_down (φ(W_gate x) ⊙ W_up x), (..., features) -> the same, without biases.

    Args:
        hidden_size: width between the matrices.
        activation: φ, a name of Keras.
        depth: number of blocks in the model; the last matrix starts divided by it.
    """

    per_step = True

    def __init__(self, hidden_size, activation="silu", depth=1, **kwargs):
        super().__init__(**kwargs)
        self.hidden_size, self.activation, self.depth = hidden_size, activation, depth
        self.supports_masking = True

    def build(self, input_shape):
        features, width = input_shape[-1], self.hidden_size
        for name in ("gate", "up"):
            setattr(self, name, dense(self, name, width, features))
        self.down = dense(
            self, "down", features, width, down_init(features, self.depth)
        )

    def call(self, x):
        return self.down(function_of(self.activation)(self.gate(x)) * self.up(x))

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable("keras_edifice")
class SoftCap(layers.Layer):
    """cap · tanh(x / cap), (..., features) -> the same.

    Args:
        cap: bound of the outputs.
    """

    per_step = True

    def __init__(self, cap=LOGIT_CAP, **kwargs):
        super().__init__(**kwargs)
        self.cap = cap
        self.supports_masking = True

    def call(self, x):
        return soft_cap(x, self.cap)

    def compute_output_shape(self, input_shape):
        return input_shape


def dense(owner, name, units, inputs, initializer=None, bias_initializer=None):
    """A built Dense layer of another layer, from `small_init` if nothing is said."""
    layer = Dense(
        units,
        use_bias=bias_initializer is not None,
        kernel_initializer=initializer or small_init(inputs),
        bias_initializer=bias_initializer or "zeros",
        dtype=owner.dtype_policy,
        name=name,
    )
    layer.build((None, None, inputs))
    return layer


class _MatrixMemory(Composite):
    """What the layers of this file share: the memory itself and its state.

    They have `_branches(x)` -> (x_m, what the output takes of x), `_heads(x_m, x_c)`
    -> (q, k, v, gate pre-activations) and `_output(h, x_c, rest)`.
    """

    def call(self, x, mask=None, initial_state=None, return_state=False):
        seen, memory = (None, None) if initial_state is None else initial_state
        x_m, rest = self._branches(x)
        x_c, seen = self._convolved(x_m, mask, seen)
        x_c = self._activated(x_c)
        *heads, gates = self._heads(x_m, x_c)
        log_input, log_forget = self._gates(gates)
        if mask is not None:  # nothing is written nor forgotten: the state stays
            valid = ops.expand_dims(mask, -1)
            log_input = ops.where(valid, log_input, -float("inf"))
            log_forget = ops.where(valid, log_forget, 0.0)
        h, memory = stabilized_linear_attention(
            *heads,
            log_input,
            log_forget,
            initial_state=memory,
            return_state=True,
            chunk_size=self.chunk_size,
        )
        y = self._output(h, x_c, rest)
        return (y, (seen, memory)) if return_state else y

    def _convolved(self, x, mask, seen):
        if self.conv is None:
            return x, ()
        return self.conv(x, mask=mask, initial_state=seen, return_state=True)

    def _activated(self, x):
        return x

    def _gates(self, preactivations):
        """ĩ and log f, (..., heads) each, in float32."""
        gates = ops.cast(preactivations, "float32")
        log_input, forget = ops.split(gates, 2, axis=-1)
        return log_input, -ops.softplus(-forget)

    def _split(self, x):
        """(..., width) -> (..., heads, width of a head)."""
        width = x.shape[-1] // self.num_heads
        return ops.reshape(x, (*ops.shape(x)[:-1], self.num_heads, width))

    def initial_state(self, batch_size):
        """The state before the first step: zeros."""
        seen = () if self.conv is None else self.conv.initial_state(batch_size)
        shape = (batch_size, self.num_heads, self.key_size, self.value_size)
        memory = shape, shape[:3], shape[:2]
        return seen, tuple(ops.zeros(part, dtype="float32") for part in memory)

    def step(self, x_t, state):
        """One step: (batch, features) and the state -> the output and the new state."""
        seen, memory = state
        x_m, rest = self._branches(x_t)
        x_c, seen = (x_m, ()) if self.conv is None else self.conv.step(x_m, seen)
        x_c = self._activated(x_c)
        *heads, gates = self._heads(x_m, x_c)
        h, memory = stabilized_linear_attention_step(
            *heads, *self._gates(gates), memory
        )
        return self._output(h, x_c, rest), (seen, memory)

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable("keras_edifice")
class MLSTMLayer(_MatrixMemory):
    """(batch, time, features) -> the same. Causal; O(1) state per step.

    The state is (the last conv_size - 1 inputs of the convolution, (C, n, m)), C of
    the shape (batch, num_heads, d, d), n (batch, num_heads, d), m (batch, num_heads),
    in float32. Masked steps leave it as it is, so that sequences may be padded on
    either side.

    Args:
        num_heads: memories side by side.
        proj_factor: width of the memories relative to that of the input.
        proj_round: that width is rounded up to a multiple of this.
        conv_size: taps of the convolution; 0 for none.
        qkv_block_size: features that q, k and v mix with each other.
        chunk_size: steps that are computed side by side; changes no number.
        depth: number of blocks in the model; W_down starts divided by it.

    Raises:
        ValueError: the heads, or the blocks, do not divide the width.
    """

    def __init__(
        self,
        num_heads=4,
        proj_factor=2.0,
        proj_round=64,
        conv_size=4,
        qkv_block_size=4,
        chunk_size=64,
        depth=1,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)  # the state keeps its precision
        self.num_heads, self.conv_size = num_heads, conv_size
        self.proj_factor, self.proj_round = proj_factor, proj_round
        self.qkv_block_size, self.chunk_size = qkv_block_size, chunk_size
        self.depth = depth
        self.supports_masking = True

    def build(self, input_shape):
        features = input_shape[-1]
        self.width = width = round_up(self.proj_factor * features, self.proj_round)
        for name in ("num_heads", "qkv_block_size"):
            if width % getattr(self, name):
                raise ValueError(
                    f"the width {width} must be a multiple of {name}, received "
                    f"{getattr(self, name)}; change it or proj_round"
                )
        self.key_size = self.value_size = width // self.num_heads
        self.up_proj = dense(self, "up_proj", 2 * width, features)
        self.conv = None
        if self.conv_size:
            self.conv = CausalConv(self.conv_size, dtype=self.dtype_policy, name="conv")
            self.conv.build((None, None, width))
        for name in ("q_proj", "k_proj", "v_proj"):
            layer = BlockDiagonalDense(
                width // self.qkv_block_size,
                stddev=math.sqrt(2 / (5 * features)),
                dtype=self.dtype_policy,
                name=name,
            )
            layer.build((None, None, width))
            setattr(self, name, layer)
        self.gates = MLSTMGates(self.num_heads, dtype=self.dtype_policy, name="gates")
        self.gates.build(*[(None, None, width)] * 3)
        self.norm = PerHeadNorm(center=False, dtype=self.dtype_policy, name="norm")
        self.norm.build((None, None, self.num_heads, self.value_size))
        self.skip = self.add_weight((width,), "ones", name="skip")
        down = down_init(features, self.depth)
        self.down_proj = dense(self, "down_proj", features, width, down)

    def _branches(self, x):
        return ops.split(self.up_proj(x), 2, axis=-1)

    def _activated(self, x):
        return ops.silu(x)

    def _heads(self, x_m, x_c):
        q, k, v = self.q_proj(x_c), self.k_proj(x_c), self.v_proj(x_m)
        gates = self.gates(q, k, v)
        q, k, v = self._split(q), self._split(k), self._split(v)
        return q, k * self.key_size**-0.5, v, gates

    def _output(self, h, x_c, z):
        h = ops.reshape(self.norm(h), ops.shape(x_c))
        return self.down_proj((h + ops.cast(self.skip, x_c.dtype) * x_c) * ops.silu(z))


@keras.saving.register_keras_serializable("keras_edifice")
class MLSTM7BLayer(_MatrixMemory):
    """(batch, time, features) -> the same. Causal; O(1) state per step.

    The memory of xLSTM 7B: keys of half the features, values of all, no convolution.
    The state is ((), (C, n, m)) as in `MLSTMLayer`, C of the shape (batch, num_heads,
    d / 2, d), d = features / num_heads.

    Args:
        num_heads: memories side by side.
        chunk_size: steps that are computed side by side; changes no number.
        depth: number of blocks in the model; W_out starts divided by it.

    Raises:
        ValueError: the heads do not divide half the features.
    """

    def __init__(self, num_heads=4, chunk_size=64, depth=1, **kwargs):
        super().__init__(autocast=False, **kwargs)  # the state keeps its precision
        self.num_heads, self.chunk_size, self.depth = num_heads, chunk_size, depth
        self.supports_masking = True

    def build(self, input_shape):
        features, heads = input_shape[-1], self.num_heads
        if features % (2 * heads):
            raise ValueError(
                "the features must be a multiple of 2 * num_heads, received "
                f"{features} and num_heads={heads}"
            )
        self.key_size, self.value_size = features // (2 * heads), features // heads
        self.conv = None
        widths = {"q_proj": features // 2, "k_proj": features // 2}
        for name, units in {**widths, "v_proj": features, "o_proj": features}.items():
            setattr(self, name, dense(self, name, units, features))
        bias = gate_bias(-10.0, 0.0, heads)
        self.gates = dense(self, "gates", 2 * heads, features, "zeros", bias)
        self.norm = PerHeadNorm(
            epsilon=1e-6, center=False, dtype=self.dtype_policy, name="norm"
        )
        self.norm.build((None, None, heads, self.value_size))
        out = down_init(features, self.depth)
        self.out_proj = dense(self, "out_proj", features, features, out)

    def _branches(self, x):
        return x, self.o_proj(x)

    def _heads(self, x, x_c):
        q, k, v = (self._split(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return q, k * self.key_size**-0.5, v, self.gates(x)

    def _gates(self, preactivations):
        return super()._gates(soft_cap(ops.cast(preactivations, "float32"), GATE_CAP))

    def _output(self, h, x_c, gate):
        h = ops.reshape(self.norm(h), ops.shape(gate))
        return self.out_proj(ops.sigmoid(gate) * h)


def mlstm_block(x, i, block_style, dropout, proj_round, num_layers, **options):
    """The i-th block on the stream x, symbolic; for "7b" with its feed-forward.

    Args:
        x: (batch, time, features).
        i: index of the block.
        block_style: "original" or "7b".
        dropout: rate on each branch's output.
        proj_round: see `mlstm`.
        num_layers: number of blocks in the model.
        **options: of `MLSTMLayer`; "7b" takes num_heads and chunk_size of them.
    """
    if block_style == "original":
        mixer = MLSTMLayer(
            proj_round=proj_round, depth=num_layers, name=f"mlstm_{i}", **options
        )
        return residual(x, mixer, ScaleNorm, 1e-5, dropout)
    mixer = MLSTM7BLayer(
        options["num_heads"],
        options["chunk_size"],
        depth=num_layers,
        name=f"mlstm_{i}",
    )
    x = residual(x, mixer, RMSNorm, 1e-6, dropout)
    width = round_up(8 * x.shape[-1] / 3, proj_round)
    ffn = XLSTMFeedForward(width, depth=num_layers, name=f"ffn_{i}")
    return residual(x, ffn, RMSNorm, 1e-6, dropout)


def xlstm_model(inputs, x, block_style, return_sequences, pool, name):
    """The model from an input to the norm of the stream and its read-out."""
    norm, epsilon = (RMSNorm, 1e-6) if block_style == "7b" else (ScaleNorm, 1e-5)
    x = norm(epsilon, name="final_norm")(x)
    outputs = read_out(inputs, x, return_sequences, pool)
    if "int" in inputs.dtype and block_style == "7b":
        outputs = SoftCap(dtype="float32", name="logits")(outputs)
    return EdificeModel(inputs, outputs, name=name)


@architecture(
    paper="Beck et al. 2024, xLSTM: Extended Long Short-Term Memory, arXiv:2405.04517",
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, hidden_size)",
    causal=True,
    streaming=True,
    tiny=dict(
        embed_size=3,
        hidden_size=4,
        num_layers=1,
        num_heads=2,
        qkv_block_size=2,
        proj_round=4,
        chunk_size=4,
        window_size=7,
    ),
    variants={
        "164m": dict(hidden_size=768, num_layers=24, num_heads=4),
        "409m": dict(hidden_size=1024, num_layers=48, num_heads=4),
        "7b": dict(hidden_size=4096, num_layers=32, num_heads=8, block_style="7b"),
    },
)
def mlstm(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    num_layers: Size = 4,
    num_heads: Size = 4,
    block_style: BlockStyle = "original",
    conv_size: Count = 4,
    qkv_block_size: Size = 4,
    mlstm_proj_factor: Positive = 2.0,
    proj_round: Size = 64,
    chunk_size: Size = 64,
    dropout: Rate = 0.0,
    return_sequences: bool = False,
    pool: Literal["last", "mean"] = "last",
    vocab_size: Size | None = None,
    tie_embeddings: bool = False,
    window_size: Size | None = 60,
) -> EdificeModel:
    """Pre-norm residual stack of matrix memories.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the residual stream.
        num_layers: number of blocks.
        num_heads: memories of each block, side by side.
        block_style: "original", where the memory is wider than the stream, or "7b",
            where a feed-forward follows it, gates and logits are capped and the norms
            are RMSNorms. The four options that follow belong to "original",
            but for proj_round.
        conv_size: taps of the convolution before queries and keys; 0 for none.
        qkv_block_size: features that queries, keys and values mix with each other.
        mlstm_proj_factor: width of the memories relative to hidden_size.
        proj_round: that width, or that of the feed-forward, 8/3 hidden_size, is rounded
            up to a multiple of this.
        chunk_size: steps that are computed side by side; changes no number.
        dropout: rate on each branch's output, in training.
        return_sequences: give every step, (batch, window_size, hidden_size).
        pool: how the steps become one vector, by the last or by their mean.
        vocab_size: number of tokens, where the input is their numbers, (batch,
            window_size), instead of features; the output is then the logits of the
            next token at every step, (batch, window_size, vocab_size).
        tie_embeddings: those logits use the matrix that embeds the tokens.
        window_size: steps of the input, None for any number.
    """
    inputs, x = sequence_input(
        window_size, embed_size, hidden_size, vocab_size, tie_embeddings
    )
    for i in range(num_layers):
        x = mlstm_block(
            x,
            i,
            block_style,
            dropout,
            proj_round,
            num_layers,
            num_heads=num_heads,
            proj_factor=mlstm_proj_factor,
            conv_size=conv_size,
            qkv_block_size=qkv_block_size,
            chunk_size=chunk_size,
        )
    return xlstm_model(inputs, x, block_style, return_sequences, pool, "mlstm")
