"""Mamba-2: a state-space model that is also linear attention, by one decay per head.

    [z, xBC, δ] = u W_in,    [x, B, C] = SiLU(conv(xBC)),    Δ = softplus(δ + b_dt)
    S_t = exp(Δ_t A) S_{t-1} + B_t (Δ_t x_t)ᵀ,    y_t = S_tᵀ C_t + D x_t,    A < 0
    output = RMSNorm(y ⊙ SiLU(z)) W_out

A and D are one number for each head, which makes C the queries, B the keys and Δ x the
values of `ops/linear_attention.py`. Read `mamba.py` first.
"""

from typing import Literal

import keras
from keras import ops

from keras_edifice.blocks.causal_conv import CausalConv
from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.gated_rms_norm import GatedRMSNorm
from keras_edifice.blocks.recurrence_initializers import (
    fan_in_uniform,
    log_of_uniform,
    step_size_bias,
)
from keras_edifice.blocks.rms_norm import RMSNorm
from keras_edifice.blocks.sequence import residual, sequence_input, sequence_model
from keras_edifice.model import EdificeModel
from keras_edifice.ops.linear_attention import linear_attention, linear_attention_step
from keras_edifice.options import NonNegative, Positive, Rate, Size
from keras_edifice.registry import architecture


def _interval(name, bounds):
    """[low, high] of an option, checked."""
    bounds = list(bounds)
    if len(bounds) != 2 or bounds[0] > bounds[1]:
        raise ValueError(
            f"{name} must be two numbers, the lower one first, received {bounds}"
        )
    return bounds


def _by_head(x, heads):
    """(..., features) -> (..., heads, features / heads)."""
    return ops.reshape(x, (*ops.shape(x)[:-1], heads, x.shape[-1] // heads))


@keras.saving.register_keras_serializable("keras_edifice")
class Mamba2Block(Composite):
    """(batch, time, features) -> the same. Causal; O(1) state per step.

    The width E of the recurrence is expand_factor * features, in E / head_dim heads.
    The state is (the last conv_size - 1 inputs of the convolution, S), of the shapes
    (batch, conv_size - 1, E + 2 * num_groups * state_size) and (batch, heads,
    state_size, head_dim). A masked step leaves it as it is; padding belongs on one
    side, not in between.

    Args:
        state_size: rows of S, the width of B and C.
        head_dim: columns of S, the channels of a head.
        expand_factor: width of the recurrence relative to that of the input.
        num_groups: pairs of B and C; each serves as many consecutive heads.
        conv_size: taps of the convolution over x, B and C.
        chunk_size: steps computed as one masked attention; all sizes are equal.
        a_init_range: smallest and largest -A at the start.
        dt_min: smallest Δ at the start.
        dt_max: largest Δ at the start.
        dt_init_floor: Δ at the start is not below this.
        dt_limit: smallest and largest Δ at any time.
        conv_bias: whether the convolution has a bias.
        norm_eps: of the gated norm.
        depth: number of such blocks in the model; W_out starts divided by its root.

    Raises:
        ValueError: `head_dim` does not divide the width, or `num_groups` the heads; a
            range is not two numbers in order.
    """

    def __init__(
        self,
        state_size=64,
        head_dim=64,
        expand_factor=2,
        num_groups=1,
        conv_size=4,
        chunk_size=64,
        a_init_range=(1.0, 16.0),
        dt_min=0.001,
        dt_max=0.1,
        dt_init_floor=1e-4,
        dt_limit=(0.0, float("inf")),
        conv_bias=True,
        norm_eps=1e-5,
        depth=1,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)  # the state keeps its precision
        self.state_size, self.head_dim = state_size, head_dim
        self.expand_factor, self.num_groups = expand_factor, num_groups
        self.conv_size, self.chunk_size = conv_size, chunk_size
        self.a_init_range = _interval("a_init_range", a_init_range)
        self.dt_min, self.dt_max = dt_min, dt_max
        self.dt_init_floor = dt_init_floor
        self.dt_limit = _interval("dt_limit", dt_limit)
        self.conv_bias, self.norm_eps, self.depth = conv_bias, norm_eps, depth
        self.supports_masking = True

    def build(self, input_shape):
        features = input_shape[-1]
        self.channels = width = self.expand_factor * features
        self.heads = self._number_of_heads(width)
        self.convolved = width + 2 * self.num_groups * self.state_size

        def dense(units, name, inputs, initializer):
            layer = Dense(
                units,
                use_bias=False,
                kernel_initializer=initializer,
                dtype=self.dtype_policy,
                name=name,
            )
            layer.build((None, None, inputs))
            return layer

        projected = width + self.convolved + self.heads
        self.in_proj = dense(projected, "in_proj", features, fan_in_uniform())
        self.conv = CausalConv(
            self.conv_size,
            self.conv_bias,
            "silu",
            dtype=self.dtype_policy,
            name="conv",
        )
        self.conv.build((None, None, self.convolved))
        self._build_heads()
        self.norm = GatedRMSNorm(
            self.norm_eps,
            norm_before_gate=False,
            group_size=width // self.num_groups,
            dtype=self.dtype_policy,
            name="norm",
        )
        self.norm.build((None, None, width))
        self.out_proj = dense(features, "out_proj", width, fan_in_uniform(self.depth))

    def _number_of_heads(self, width):
        if width % self.head_dim:
            raise ValueError(
                "the width of the recurrence must be a multiple of head_dim, received "
                f"{width} and {self.head_dim}; change hidden_size or expand_factor"
            )
        heads = width // self.head_dim
        if heads % self.num_groups:
            raise ValueError(
                "the heads must be a multiple of num_groups, received "
                f"{heads} and {self.num_groups}; change head_dim or num_groups"
            )
        return heads

    def _build_heads(self):
        """What each head has one number of."""
        bias = step_size_bias(self.dt_min, self.dt_max, self.dt_init_floor)
        rates = log_of_uniform(*self.a_init_range)
        starts = {"dt_bias": bias, "A_log": rates, "D": "ones"}
        for name, start in starts.items():
            weight = self.add_weight((self.heads,), start, autocast=False, name=name)
            setattr(self, name, weight)

    def call(self, x, mask=None, initial_state=None, return_state=False):
        seen, S = (None, None) if initial_state is None else initial_state
        z, x, dt = self._project(x)
        conv = self.conv(x, mask=mask, initial_state=seen, return_state=return_state)
        x, seen = conv if return_state else (conv, None)
        x, B, C = self._split(x)
        dt, g = self._steps(dt, mask)
        y, S = linear_attention(
            C,
            B,
            ops.expand_dims(dt, -1) * x,
            g,
            initial_state=S,
            return_state=True,
            chunk_size=self.chunk_size,
        )
        y = self._gated(y, x, z)
        return (y, (seen, S)) if return_state else y

    def _project(self, u):
        """The gate z, xBC before its convolution, and δ."""
        width = self.channels
        return ops.split(self.in_proj(u), [width, width + self.convolved], axis=-1)

    def _split(self, x):
        """The x of each head, in float32, and B and C of each group."""
        places = [self.channels, self.convolved - self.num_groups * self.state_size]
        x, B, C = ops.split(x, places, axis=-1)
        x = ops.cast(_by_head(x, self.heads), "float32")
        return x, _by_head(B, self.num_groups), _by_head(C, self.num_groups)

    def _steps(self, dt, mask=None):
        """Δ and the log-decays Δ A of each head, in float32."""
        dt = ops.cast(dt, "float32") + ops.cast(self.dt_bias, "float32")
        dt, (low, high) = ops.softplus(dt), self.dt_limit
        if low > 0 or high < float("inf"):
            dt = ops.clip(dt, low, high)
        if mask is not None:  # no decay, and nothing written: the state stays
            dt = ops.where(ops.expand_dims(mask, -1), dt, ops.zeros_like(dt))
        return dt, -ops.exp(ops.cast(self.A_log, "float32")) * dt

    def _gated(self, y, x, z):
        y = y + ops.expand_dims(ops.cast(self.D, "float32"), -1) * x
        y = ops.reshape(y, (*ops.shape(y)[:-2], self.channels))
        return self.out_proj(ops.cast(self.norm(y, z), self.compute_dtype))

    def initial_state(self, batch_size):
        """The state before the first step: zeros."""
        shape = (batch_size, self.heads, self.state_size, self.head_dim)
        return self.conv.initial_state(batch_size), ops.zeros(shape, dtype="float32")

    def step(self, x_t, state):
        """One step: (batch, features) and the state -> the output and the new state."""
        seen, S = state
        z, x, dt = self._project(x_t)
        x, seen = self.conv.step(x, seen)
        x, B, C = self._split(x)
        dt, g = self._steps(dt)
        y, S = linear_attention_step(C, B, ops.expand_dims(dt, -1) * x, g, S)
        return self._gated(y, x, z), (seen, S)

    def compute_output_shape(self, input_shape):
        return input_shape


@architecture(
    paper="Dao & Gu 2024, Transformers are SSMs: Generalized Models and Efficient "
    "Algorithms Through Structured State Space Duality, arXiv:2405.21060",
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, hidden_size)",
    causal=True,
    streaming=True,
    tiny=dict(
        embed_size=3,
        hidden_size=4,
        state_size=3,
        head_dim=2,
        num_groups=2,
        chunk_size=4,
        num_layers=1,
        dropout=0.1,
        window_size=7,
    ),
    variants={
        "130m": dict(hidden_size=768, num_layers=24, state_size=128),
        "370m": dict(hidden_size=1024, num_layers=48, state_size=128),
        "780m": dict(hidden_size=1536, num_layers=48, state_size=128),
        "1.3b": dict(hidden_size=2048, num_layers=48, state_size=128),
        "2.7b": dict(hidden_size=2560, num_layers=64, state_size=128),
    },
)
def mamba_ssd(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    state_size: Size = 64,
    head_dim: Size = 64,
    expand_factor: Size = 2,
    num_groups: Size = 1,
    conv_size: Size = 4,
    chunk_size: Size = 64,
    num_layers: Size = 2,
    a_init_range: list[Positive] = [1.0, 16.0],
    dt_min: Positive = 0.001,
    dt_max: Positive = 0.1,
    dt_init_floor: Positive = 1e-4,
    dt_limit: list[NonNegative] = [0.0, float("inf")],
    conv_bias: bool = True,
    norm_eps: Positive = 1e-5,
    dropout: Rate = 0.0,
    return_sequences: bool = False,
    pool: Literal["last", "mean"] = "last",
    vocab_size: Size | None = None,
    tie_embeddings: bool = True,
    window_size: Size | None = 60,
) -> EdificeModel:
    """Pre-norm residual stack of Mamba-2 blocks.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the residual stream.
        state_size: width of the keys and queries, rows of each head's state.
        head_dim: channels of a head, which divide expand_factor * hidden_size.
        expand_factor: width of the recurrence relative to hidden_size.
        num_groups: pairs of keys and queries; each serves as many consecutive heads.
        conv_size: taps of the convolution before the recurrence.
        chunk_size: steps computed as one masked attention; all sizes give the same
            numbers.
        num_layers: number of blocks.
        a_init_range: smallest and largest rate of decay at the start.
        dt_min: smallest step size at the start.
        dt_max: largest step size at the start.
        dt_init_floor: no step size is below this at the start.
        dt_limit: smallest and largest step size at any time.
        conv_bias: the convolution has a bias.
        norm_eps: epsilon of every RMSNorm.
        dropout: rate on each block's output, in training.
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
        block = Mamba2Block(
            state_size=state_size,
            head_dim=head_dim,
            expand_factor=expand_factor,
            num_groups=num_groups,
            conv_size=conv_size,
            chunk_size=chunk_size,
            a_init_range=a_init_range,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dt_limit=dt_limit,
            conv_bias=conv_bias,
            norm_eps=norm_eps,
            depth=num_layers,
            name=f"mamba_{i}",
        )
        x = residual(x, block, epsilon=norm_eps, dropout=dropout)
    x = RMSNorm(norm_eps, name="final_norm")(x)
    return sequence_model(inputs, x, return_sequences, pool, name="mamba_ssd")
