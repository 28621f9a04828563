"""Mamba-3: Mamba-2 with a trapezoidal rule, a turning state and several inputs at once.

    [z, x, B, C, δ, a, λ̃, θ̃] = u W_in,    Δ = softplus(δ + b_dt),    A = -ψ(a)
    φ_t = φ_{t-1} + π Δ_t tanh(θ̃_t);  B_t, C_t: normalised, biased, turned by φ_t
    S_t = α_t S_{t-1} + (1 - λ_t) Δ_t α_t B_{t-1} x_{t-1}ᵀ + λ_t Δ_t B_t x_tᵀ
    y_t = S_tᵀ C_t + D x_t,    α = exp(Δ A),    λ = σ(λ̃),    out = (y ⊙ SiLU(z)) W_out

To turn B and C is to turn the state the other way at every step, as if its decays were
complex numbers. What step t writes is written in part at t + 1: in parallel form its
key has the weight λ_t Δ_t + (1 - λ_{t+1}) Δ_{t+1} in `ops/linear_attention.py`, and
what is too much at t itself is taken off its output. With several inputs (MIMO) a step
is as many writes and reads in a row. There is no convolution. Read `mamba_ssd.py`
first.
"""

import math
from typing import Literal

import keras
import numpy as np
from keras import ops

from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.feed_forward import GatedFFN
from keras_edifice.blocks.gated_rms_norm import GatedRMSNorm
from keras_edifice.blocks.recurrence_initializers import fan_in_uniform, step_size_bias
from keras_edifice.blocks.rms_norm import RMSNorm
from keras_edifice.blocks.sequence import residual, sequence_input, sequence_model
from keras_edifice.model import EdificeModel
from keras_edifice.ops.linear_attention import linear_attention
from keras_edifice.ops.linear_scan import linear_scan
from keras_edifice.options import Fraction, NonNegative, Positive, Rate, Size
from keras_edifice.registry import architecture


def _rate(a, activation):
    """ψ(a) > 0; the heavy tail is 1 + a above zero and 1 / (1 - a) below."""
    if activation == "softplus":
        return ops.softplus(a)
    return ops.maximum(a, 0.0) + 1.0 / (1.0 - ops.minimum(a, 0.0))


def _turned(x, angle):
    """The pairs (2i, 2i + 1) of x (..., R, heads, N) by angle (..., heads, pairs)."""
    width, angle = 2 * angle.shape[-1], ops.expand_dims(angle, -3)
    pairs = ops.reshape(x[..., :width], (*ops.shape(x)[:-1], width // 2, 2))
    a, b, cos, sin = pairs[..., 0], pairs[..., 1], ops.cos(angle), ops.sin(angle)
    pairs = ops.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    turned = ops.reshape(pairs, (*ops.shape(x)[:-1], width))
    if width == x.shape[-1]:
        return turned
    return ops.concatenate([turned, x[..., width:]], axis=-1)


def _wrapped(angle):
    """The angle from 0 to 2π, so that it keeps its precision."""
    return angle - 2 * math.pi * ops.floor(angle / (2 * math.pi))


def _scaled(x, weight):
    """Each head of x (..., heads, features) times its weight (..., heads)."""
    return x * ops.expand_dims(weight, -1)


def _last_valid(x, valid, before):
    """The last valid step of x (batch, time, ...); `before` where there is none."""
    if valid is None:
        return x[:, -1]
    count, ones = ops.sum(valid, axis=1, keepdims=True), (1,) * (len(x.shape) - 2)
    last = ops.logical_and(valid > 0, ops.cumsum(valid, axis=1) == count)
    last = ops.reshape(last, (*ops.shape(valid), *ones))
    found = ops.sum(ops.where(last, x, ops.zeros_like(x)), axis=1)
    if before is None:
        return found
    return ops.where(ops.reshape(count == 0, (-1, *ones)), before, found)


@keras.saving.register_keras_serializable("keras_edifice")
class Mamba3Block(Composite):
    """(batch, time, features) -> the same. Causal; O(1) state per step.

    The width E of the recurrence is expand_factor * features, in E / head_dim heads; R
    is `rank` with `mimo`, else 1. The state is (S, the last B, the last x), of the
    shapes (batch, heads, state_size, head_dim), (batch, R, heads, state_size) and
    (batch, heads, head_dim), and with `complex` the angle φ, (batch, heads, pairs). A
    masked step leaves it as it is, wherever it lies.

    With MIMO there are R of B, C and their outputs; x^r = m_x^r ⊙ x, z^r = m_z^r ⊙ z,
    the state takes Σ_r B^r x^rᵀ, and the output of a head is Σ_r m_o^r ⊙ y^r.

    Args:
        state_size: N, rows of S, the width of B and C.
        head_dim: P, columns of S, the channels of a head.
        expand_factor: width of the recurrence relative to that of the input.
        num_groups: B and C that are projected; each serves as many consecutive heads.
        rope_fraction: part of the state_size that turns, rounded down to pairs.
        complex: whether the state turns at all.
        mimo: whether a step writes and reads `rank` times.
        rank: R with `mimo`.
        out_norm: an RMSNorm of each head before the gate.
        a_activation: ψ, "heavy_tail" or "softplus".
        a_floor: smallest -A at any time.
        dt_min: smallest Δ at the start.
        dt_max: largest Δ at the start.
        dt_init_floor: Δ at the start is not below this.
        chunk_size: writes, R at each step, that are computed as one masked attention;
            all sizes are equal.
        depth: number of residual branches in the model; W_out starts divided by its
            root.

    Raises:
        ValueError: `head_dim` does not divide the width, or `num_groups` the heads; no
            pair is left to turn; `a_activation` is neither.
    """

    def __init__(
        self,
        state_size=64,
        head_dim=64,
        expand_factor=2,
        num_groups=1,
        rope_fraction=0.5,
        complex=True,
        mimo=False,
        rank=4,
        out_norm=False,
        a_activation="heavy_tail",
        a_floor=1e-4,
        dt_min=0.001,
        dt_max=0.1,
        dt_init_floor=1e-4,
        chunk_size=64,
        depth=1,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)  # the state keeps its precision
        if a_activation not in ("heavy_tail", "softplus"):
            raise ValueError(
                "a_activation must be one of 'heavy_tail', 'softplus', received "
                f"{a_activation!r}"
            )
        self.state_size, self.head_dim = state_size, head_dim
        self.expand_factor, self.num_groups = expand_factor, num_groups
        self.rope_fraction, self.complex = rope_fraction, complex
        self.mimo, self.rank, self.out_norm = mimo, rank, out_norm
        self.a_activation, self.a_floor = a_activation, a_floor
        self.dt_min, self.dt_max = dt_min, dt_max
        self.dt_init_floor = dt_init_floor
        self.chunk_size, self.depth = chunk_size, depth
        self.supports_masking = True

    def build(self, input_shape):
        features = input_shape[-1]
        self.channels = width = self.expand_factor * features
        self.heads = heads = self._number_of_heads(width)
        self.inputs_per_step = self.rank if self.mimo else 1
        self.pairs = self._number_of_pairs()
        keys = self.inputs_per_step * self.num_groups * self.state_size
        self.parts = [width, width, keys, keys, heads, heads, heads, self.pairs]

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

        self.in_proj = dense(sum(self.parts), "in_proj", features, fan_in_uniform())
        for name in ("B_norm", "C_norm"):
            norm = RMSNorm(dtype=self.dtype_policy, name=name)
            norm.build((None, self.state_size))
            setattr(self, name, norm)
        self._build_heads()
        if self.out_norm:
            self.norm = GatedRMSNorm(
                group_size=self.head_dim, dtype=self.dtype_policy, name="norm"
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

    def _number_of_pairs(self):
        pairs = int(self.rope_fraction * self.state_size) // 2
        if self.complex and not pairs:
            raise ValueError(
                "rope_fraction of state_size must be at least 2, received "
                f"{self.rope_fraction} of {self.state_size}; or pass complex=False"
            )
        return pairs if self.complex else 0

    def _build_heads(self):
        """What each head has for itself."""
        heads, R = self.heads, self.inputs_per_step
        bias = step_size_bias(self.dt_min, self.dt_max, self.dt_init_floor)
        starts = {"dt_bias": ((heads,), bias), "D": ((heads,), "ones")}
        for name in ("B_bias", "C_bias"):
            starts[name] = (heads, R, self.state_size), "ones"
        if self.mimo:
            part = keras.initializers.Constant(1 / R)
            for name, start in {"x": part, "z": "ones", "o": part}.items():
                starts[f"mimo_{name}"] = (heads, R, self.head_dim), start
        for name, (shape, start) in starts.items():
            weight = self.add_weight(shape, start, autocast=False, name=name)
            setattr(self, name, weight)

    def call(self, x, mask=None, initial_state=None, return_state=False):
        S, last_B, last_x, *angle = initial_state or (None, None, None)
        z, x, B, C, a, dt, lam, turn = self._project(x)
        valid = None
        if mask is not None:  # no decay, nothing written: the state stays
            valid = ops.cast(mask, "float32")
            dt = _scaled(dt, valid)
        if self.complex:
            turn = ops.cumsum(self._turn(turn, dt), axis=1)
            angle = [turn + ops.expand_dims(angle[0], 1) if angle else turn]
            B, C = _turned(B, angle[0]), _turned(C, angle[0])
        now, first, total = self._weights(dt, lam, valid)
        if S is not None:
            S = S + self._written(last_B, last_x, first)
        y, S = self._attend(C, B, x, -a * dt, now, total, S)
        y = self._gated(y, z)
        if not return_state:
            return y
        last_B = _last_valid(B, valid, last_B)
        last_x = _last_valid(x, valid, last_x)
        return y, (S, last_B, last_x, *(_wrapped(angle[-1][:, -1]) for _ in angle))

    def _project(self, u):
        """z, x, B, C, -A, Δ, λ and θ̃ of each step; all but z in float32."""
        places = np.cumsum(self.parts)[: 7 if self.complex else 6].tolist()
        z, x, B, C, dt, a, lam, *turn = ops.split(self.in_proj(u), places, axis=-1)
        x, dt, a, lam, *turn = (ops.cast(v, "float32") for v in (x, dt, a, lam, *turn))
        x = ops.reshape(x, (*ops.shape(x)[:-1], self.heads, self.head_dim))
        B = self._keys(B, self.B_norm, self.B_bias)
        C = self._keys(C, self.C_norm, self.C_bias)
        a = ops.maximum(_rate(a, self.a_activation), self.a_floor)
        dt = ops.softplus(dt + ops.cast(self.dt_bias, "float32"))
        return z, x, B, C, a, dt, ops.sigmoid(lam), turn[0] if turn else None

    def _keys(self, B, norm, bias):
        """(..., R · groups · N) -> (..., R, heads, N), normalised and biased."""
        R, groups, lead = self.inputs_per_step, self.num_groups, ops.shape(B)[:-1]
        B = norm(ops.reshape(B, (*lead, R, groups, 1, self.state_size)))
        bias = ops.transpose(ops.cast(bias, "float32"), (1, 0, 2))
        bias = ops.reshape(bias, (R, groups, self.heads // groups, self.state_size))
        B = ops.cast(B, "float32") + bias
        return ops.reshape(B, (*lead, R, self.heads, self.state_size))

    def _turn(self, turn, dt):
        """By how much the state of each head turns: (..., heads, pairs)."""
        return _scaled(ops.expand_dims(math.pi * ops.tanh(turn), -2), dt)

    def _spread(self, x, name):
        """x^r of every r: (..., heads, P) -> (..., R, heads, P)."""
        x = ops.expand_dims(x, -3)
        if not self.mimo:
            return x
        return x * self._mixing(name)

    def _written(self, B, x, weight):
        """Weight · Σ_r B^r x^rᵀ of one step, (batch, heads, N, P)."""
        B = _scaled(B, ops.expand_dims(weight, 1))
        return ops.einsum("brhn,brhp->bhnp", B, self._spread(x, "x"))

    def _mixing(self, name):
        """The m of x, z or o: (R, heads, P)."""
        weight = ops.cast(getattr(self, f"mimo_{name}"), "float32")
        return ops.transpose(weight, (1, 0, 2))

    def _weights(self, dt, lam, valid):
        """What each step writes: at once, and in all until the next step.

        Returns:
            (λ_t Δ_t, the (1 - λ_1) Δ_1 that goes to the state before,
            λ_t Δ_t + (1 - λ_{t+1}) Δ_{t+1}), where t + 1 is the next valid step.
        """
        now, follow = lam * dt, (1.0 - lam) * dt
        if valid is not None:  # (1 - λ) Δ of the next valid step, itself included
            skipped = ops.expand_dims(1.0 - valid, -1) * ops.ones_like(follow)
            skipped, follow = ops.flip(skipped, axis=1), ops.flip(follow, axis=1)
            follow = ops.flip(linear_scan(skipped, follow), axis=1)
        total = now + ops.pad(follow[:, 1:], [(0, 0), (0, 1), (0, 0)])
        if valid is not None:
            total = _scaled(total, valid)
        return now, follow[:, 0], total

    def _attend(self, C, B, x, log_decay, now, total, S):
        """What each step reads, (batch, time, R, heads, P), and the last state.

        The R writes of a step follow one another; its r-th read sees the first r of
        them in full, where it should see all of them by what they write at once.
        """
        R, v = self.inputs_per_step, self._spread(x, "x")
        decay = ops.expand_dims(log_decay, 2)
        decay = ops.concatenate([decay] + [ops.zeros_like(decay)] * (R - 1), axis=2)
        k = _scaled(B, ops.expand_dims(total, 2))

        def in_a_row(x):
            batch, time, _, *rest = ops.shape(x)
            return ops.reshape(x, (batch, time * R, *rest))

        y, S = linear_attention(
            *(in_a_row(x) for x in (C, k, v, decay)),
            initial_state=S,
            return_state=True,
            chunk_size=self.chunk_size,
        )
        y = ops.reshape(y, ops.shape(v))
        seen = ops.convert_to_tensor(np.tril(np.ones((R, R), "float32")))
        now, total = (ops.reshape(w, (*ops.shape(w), 1, 1)) for w in (now, total))
        own = ops.einsum("btrhn,btqhn->bthrq", C, B) * (now - total * seen)
        return y + ops.einsum("bthrq,btqhp->btrhp", own, v) + self._skip(v), S

    def _skip(self, v):
        return _scaled(v, ops.cast(self.D, "float32"))

    def _gated(self, y, z):
        """The output (..., features) of y (..., R, heads, P) and z (..., E)."""
        z = ops.cast(z, "float32")
        z = ops.reshape(z, (*ops.shape(z)[:-1], self.heads, self.head_dim))
        z, merged = self._spread(z, "z"), (*ops.shape(y)[:-2], self.channels)
        if self.out_norm:
            gated = self.norm(ops.reshape(y, merged), ops.reshape(z, merged))
            y = ops.reshape(gated, ops.shape(y))
        else:
            y = y * ops.silu(z)
        if self.mimo:
            y = y * self._mixing("o")
        y = ops.reshape(ops.sum(y, axis=-3), (*ops.shape(y)[:-3], self.channels))
        return self.out_proj(ops.cast(y, self.compute_dtype))

    def initial_state(self, batch_size):
        """The state before the first step: zeros."""
        heads, size, R = self.heads, self.state_size, self.inputs_per_step
        shapes = [
            (heads, size, self.head_dim),
            (R, heads, size),
            (heads, self.head_dim),
        ]
        if self.complex:
            shapes.append((heads, self.pairs))
        return tuple(ops.zeros((batch_size, *s), dtype="float32") for s in shapes)

    def step(self, x_t, state):
        """One step: (batch, features) and the state -> the output and the new state."""
        S, last_B, last_x, *angle = state
        z, x, B, C, a, dt, lam, turn = self._project(x_t)
        if self.complex:
            angle = [_wrapped(angle[0] + self._turn(turn, dt))]
            B, C = _turned(B, angle[0]), _turned(C, angle[0])
        S = S + self._written(last_B, last_x, (1.0 - lam) * dt)
        decay = ops.expand_dims(ops.exp(-a * dt), -1)
        S = _scaled(S, decay) + self._written(B, x, lam * dt)
        y = ops.einsum("brhn,bhnp->brhp", C, S) + self._skip(self._spread(x, "x"))
        return self._gated(y, z), (S, B, x, *angle)

    def compute_output_shape(self, input_shape):
        return input_shape


@architecture(
    paper="Lahoti et al. 2026, Mamba-3: Improved Sequence Modeling using State Space "
    "Principles, arXiv:2603.15569",
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, hidden_size)",
    causal=True,
    streaming=True,
    tiny=dict(
        embed_size=3,
        hidden_size=4,
        state_size=5,
        head_dim=2,
        num_groups=2,
        mimo=True,
        rank=2,
        chunk_size=4,
        num_layers=1,
        dropout=0.1,
        window_size=7,
    ),
)
def mamba3(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    state_size: Size = 64,
    head_dim: Size = 64,
    expand_factor: Size = 2,
    num_groups: Size = 1,
    rope_fraction: Fraction = 0.5,
    complex: bool = True,
    mimo: bool = False,
    rank: Size = 4,
    out_norm: bool = False,
    a_activation: Literal["heavy_tail", "softplus"] = "heavy_tail",
    a_floor: NonNegative = 1e-4,
    dt_min: Positive = 0.001,
    dt_max: Positive = 0.1,
    dt_init_floor: Positive = 1e-4,
    mlp_ratio: Positive = 8 / 3,
    chunk_size: Size = 64,
    num_layers: Size = 2,
    dropout: Rate = 0.0,
    return_sequences: bool = False,
    pool: Literal["last", "mean"] = "last",
    vocab_size: Size | None = None,
    tie_embeddings: bool = True,
    window_size: Size | None = 60,
) -> EdificeModel:
    """Pre-norm residual stack of Mamba-3 blocks and gated feed-forwards in turn.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the residual stream.
        state_size: width of the keys and queries, rows of each head's state.
        head_dim: channels of a head, which divide expand_factor * hidden_size.
        expand_factor: width of the recurrence relative to hidden_size.
        num_groups: keys and queries that are projected; each serves as many
            consecutive heads.
        rope_fraction: part of the state_size that turns.
        complex: whether the state turns, as one with complex decays does.
        mimo: several writes and reads of the state at each step.
        rank: number of these writes and reads.
        out_norm: an RMSNorm of each head before its gate.
        a_activation: what makes the rate of decay positive, softplus or 1 + a above
            zero and 1 / (1 - a) below.
        a_floor: smallest rate of decay.
        dt_min: smallest step size at the start.
        dt_max: largest step size at the start.
        dt_init_floor: no step size is below this at the start.
        mlp_ratio: width of the feed-forwards relative to hidden_size.
        chunk_size: writes computed as one masked attention; all sizes give the same
            numbers.
        num_layers: number of pairs of a block and a feed-forward.
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
        block = Mamba3Block(
            state_size=state_size,
            head_dim=head_dim,
            expand_factor=expand_factor,
            num_groups=num_groups,
            rope_fraction=rope_fraction,
            complex=complex,
            mimo=mimo,
            rank=rank,
            out_norm=out_norm,
            a_activation=a_activation,
            a_floor=a_floor,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            chunk_size=chunk_size,
            depth=2 * num_layers,
            name=f"mamba_{i}",
        )
        x = residual(x, block, dropout=dropout)
        ffn = GatedFFN(round(mlp_ratio * hidden_size), name=f"ffn_{i}")
        x = residual(x, ffn, dropout=dropout)
    x = RMSNorm(name="final_norm")(x)
    return sequence_model(inputs, x, return_sequences, pool, name="mamba3")
