"""sLSTM: an LSTM with exponential gates and a normaliser, whose heads mix memories.

    ĩ, f̃ = W_i x_c, W_f x_c,    z̃, õ = W_z x, W_o x,    each + R h_{t-1} + b
    m_t = max(log σ(f̃) + m_{t-1}, ĩ)
    i' = e^{ĩ - m_t},    f' = e^{log σ(f̃) + m_{t-1} - m_t}
    c_t = f' c_{t-1} + i' tanh(z̃),    n_t = f' n_{t-1} + i',    h_t = σ(õ) c_t / n_t
    x_c = SiLU(conv(x)),    output = norm(h)

R has one block for each head: a head sees its own h_{t-1} only. m keeps the
exponentials in range and cancels; before the first step it is -∞, so that n ≥ 1 and
|h| ≤ 1 at every step. The gates look at h_{t-1}: the steps follow one another.

`mlstm.py` has the other memory of the paper, `xlstm.py` both.
"""

import math
from typing import Literal

import keras
import numpy as np
from keras import layers, ops

from keras_edifice.blocks.causal_conv import CausalConv
from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.per_head_norm import PerHeadNorm
from keras_edifice.blocks.sequence import residual, sequence_input
from keras_edifice.model import EdificeModel
from keras_edifice.ops.step_scan import step_scan
from keras_edifice.options import Count, Positive, Rate, Size, check
from keras_edifice.recurrent.mlstm import (
    BlockDiagonalDense,
    ScaleNorm,
    XLSTMFeedForward,
    round_up,
    xlstm_model,
)
from keras_edifice.registry import architecture

BiasInit = Literal["powerlaw", "linspace", "zeros"]
NEVER = -1e30
"""m before the first step: the exponential of its difference to any other is zero."""


def forget_bias(kind, size, position):
    """f̃ of the units of a head at the start.

    Args:
        kind: "powerlaw" from 5 down to -7, "linspace" from 3 to 6, or "zeros".
        size: units of a head.
        position: of the block in the model, from 0 to 1; of "powerlaw".
    """
    if kind == "powerlaw":
        unit = np.arange(size) / max(1, size - 1)
        return 5.0 - 12.0 * unit ** (0.3 + 1.3 * position)
    return np.linspace(3.0, 6.0, size) if kind == "linspace" else np.zeros(size)


@keras.saving.register_keras_serializable("keras_edifice")
class SLSTMLayer(Composite):
    """(batch, time, features) -> the same. Causal; sequential; O(1) state per step.

    The state is (the last conv_size - 1 inputs, (h, c, n, m)), each of the four
    (batch, features), in float32. Masked steps leave it as it is, so that sequences
    may be padded on either side.

    Args:
        num_heads: parts of the memory that see themselves only.
        conv_size: taps of the convolution before i and f; 0 for none, and no SiLU.
        bias_init: the forget gates at the start: "powerlaw" from 5 down to -7 within a
            head, "linspace" from 3 to 6, or "zeros".
        position: of the block in the model, from 0 to 1, on which "powerlaw" depends.
        dropout: rate on h before its norm, in training; the memory sees all of it.

    Raises:
        ValueError: an unknown `bias_init`; the heads do not divide the features.
    """

    def __init__(
        self,
        num_heads=4,
        conv_size=4,
        bias_init="powerlaw",
        position=0.0,
        dropout=0.0,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)  # the state keeps its precision
        self.num_heads, self.conv_size = num_heads, conv_size
        self.bias_init = check(BiasInit, "bias_init", bias_init)
        self.position, self.dropout = position, dropout
        self.supports_masking = True

    def build(self, input_shape):
        self.features, heads = input_shape[-1], self.num_heads
        if self.features % heads:
            raise ValueError(
                "the features must be a multiple of num_heads, received "
                f"{self.features} and num_heads={heads}"
            )
        self.size = size = self.features // heads
        self.conv = None
        if self.conv_size:
            self.conv = CausalConv(
                self.conv_size, activation="silu", dtype=self.dtype_policy, name="conv"
            )
            self.conv.build(input_shape)
        for name in ("if_proj", "zo_proj"):
            layer = BlockDiagonalDense(
                heads,
                2 * size,
                stddev=math.sqrt(2 / (5 * self.features)),
                dtype=self.dtype_policy,
                name=name,
            )
            layer.build(input_shape)
            setattr(self, name, layer)
        self.R = self.add_weight(
            (heads, size, 4 * size), "zeros", autocast=False, name="R"
        )
        self.bias = self.add_weight(
            (heads, 4 * size), self._bias, autocast=False, name="bias"
        )
        self.drop = layers.Dropout(self.dropout, dtype=self.dtype_policy, name="drop")
        self.norm = PerHeadNorm(
            heads, center=False, dtype=self.dtype_policy, name="norm"
        )
        self.norm.build(input_shape)

    def _bias(self, shape, dtype=None):
        """Those of the forget gates, the second of four, and zeros."""
        bias = np.zeros((self.num_heads, 4, self.size))
        bias[:, 1] = forget_bias(self.bias_init, self.size, self.position)
        return ops.convert_to_tensor(bias.reshape(shape), dtype=dtype or "float32")

    def call(
        self, x, mask=None, initial_state=None, return_state=False, training=False
    ):
        seen, memory = (None, None) if initial_state is None else initial_state
        x_c, seen = self._convolved(x, mask, seen)
        driven = self._driven(x, x_c)
        if memory is None:
            zero = ops.zeros_like(driven[:, 0, : self.features])
            memory = zero, zero, zero, zero + NEVER
        if mask is not None:
            valid = ops.cast(ops.expand_dims(mask, -1), "float32")
            driven = ops.concatenate([driven, valid], axis=-1)

        def step(now, before):
            after = self._next(now[:, : 4 * self.features], before)
            if mask is not None:
                valid = now[:, 4 * self.features :] > 0
                pairs = zip(after, before, strict=True)
                after = [ops.where(valid, new, old) for new, old in pairs]
            return after[0], list(after)

        h, memory = step_scan(step, driven, list(memory))
        y = self.norm(self.drop(ops.cast(h, self.compute_dtype), training=training))
        return (y, (seen, tuple(memory))) if return_state else y

    def _convolved(self, x, mask, seen):
        if self.conv is None:
            return x, ()
        return self.conv(x, mask=mask, initial_state=seen, return_state=True)

    def _driven(self, x, x_c):
        """W x + b of all gates, (..., heads · 4 · size), by heads and i, f, z, o."""
        lead = ops.shape(x)[:-1]
        halves = (
            ops.reshape(half, (*lead, self.num_heads, 2 * self.size))
            for half in (self.if_proj(x_c), self.zo_proj(x))
        )
        driven = ops.cast(ops.concatenate(list(halves), axis=-1), "float32")
        return ops.reshape(driven + self.bias, (*lead, 4 * self.features))

    def _next(self, driven, state):
        """(h, c, n, m) after a step, from W x + b and those before it."""
        shape = (-1, self.num_heads, self.size)
        h, c, n, m = (ops.reshape(part, shape) for part in state)
        recurrent = ops.matmul(ops.swapaxes(h, 0, 1), self.R)  # (heads, b, 4 size)
        gates = ops.reshape(driven, (-1, self.num_heads, 4 * self.size))
        gates = gates + ops.swapaxes(recurrent, 0, 1)
        i, f, z, o = ops.split(gates, 4, axis=-1)
        kept = m - ops.softplus(-f)
        m = ops.stop_gradient(ops.maximum(kept, i))  # cancels in c / n
        i, f = ops.exp(i - m), ops.exp(kept - m)
        c, n = f * c + i * ops.tanh(z), f * n + i
        h = ops.sigmoid(o) * c / n
        return tuple(ops.reshape(part, (-1, self.features)) for part in (h, c, n, m))

    def initial_state(self, batch_size):
        """The state before the first step: zeros, and m so low that nothing is kept."""
        seen = () if self.conv is None else self.conv.initial_state(batch_size)
        zero = ops.zeros((batch_size, self.features), dtype="float32")
        return seen, (zero, zero, zero, zero + NEVER)

    def step(self, x_t, state):
        """One step: (batch, features) and the state -> the output and the new state."""
        seen, memory = state
        x_c, seen = (x_t, ()) if self.conv is None else self.conv.step(x_t, seen)
        memory = self._next(self._driven(x_t, x_c), memory)
        return self.norm(ops.cast(memory[0], self.compute_dtype)), (seen, memory)

    def compute_output_shape(self, input_shape):
        return input_shape


def slstm_block(x, i, mlp_factor, proj_round, dropout, num_layers, **options):
    """The i-th block on the stream x, symbolic: a memory and a feed-forward.

    Args:
        x: (batch, time, features).
        i: index of the block.
        mlp_factor: see `slstm`.
        proj_round: see `slstm`.
        dropout: see `slstm`.
        num_layers: number of blocks in the model.
        **options: of `SLSTMLayer`.
    """
    position = i / (num_layers - 1) if num_layers > 1 else 0.0
    mixer = SLSTMLayer(position=position, dropout=dropout, name=f"slstm_{i}", **options)
    x = residual(x, mixer, ScaleNorm, 1e-5)
    width = round_up(mlp_factor * x.shape[-1], proj_round)
    ffn = XLSTMFeedForward(width, "gelu", num_layers, name=f"ffn_{i}")
    return residual(x, ffn, ScaleNorm, 1e-5, dropout)


@architecture(
    paper="Beck et al. 2024, xLSTM: Extended Long Short-Term Memory, arXiv:2405.04517",
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, hidden_size)",
    causal=True,
    streaming=True,
    multiples=dict(hidden_size="num_heads"),
    tiny=dict(
        embed_size=3,
        hidden_size=4,
        num_layers=1,
        num_heads=2,
        proj_round=2,
        window_size=7,
    ),
)
def slstm(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    num_layers: Size = 4,
    num_heads: Size = 4,
    conv_size: Count = 4,
    mlp_factor: Positive = 1.3,
    proj_round: Size = 64,
    bias_init: BiasInit = "powerlaw",
    dropout: Rate = 0.0,
    return_sequences: bool = False,
    pool: Literal["last", "mean"] = "last",
    vocab_size: Size | None = None,
    tie_embeddings: bool = False,
    window_size: Size | None = 60,
) -> EdificeModel:
    """Pre-norm residual stack of scalar memories and gated feed-forwards.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the residual stream and of the memories.
        num_layers: number of memories, each with its feed-forward.
        num_heads: parts of each memory that see themselves only.
        conv_size: taps of the convolution before input and forget gates; 0 for none.
        mlp_factor: width of the feed-forwards relative to hidden_size.
        proj_round: that width is rounded up to a multiple of this.
        bias_init: the forget gates at the start, within each head: "powerlaw" from 5
            down to -7, "linspace" from 3 to 6, or "zeros".
        dropout: rate on each branch, in training.
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
        x = slstm_block(
            x,
            i,
            mlp_factor,
            proj_round,
            dropout,
            num_layers,
            num_heads=num_heads,
            conv_size=conv_size,
            bias_init=bias_init,
        )
    return xlstm_model(inputs, x, "original", return_sequences, pool, "slstm")
