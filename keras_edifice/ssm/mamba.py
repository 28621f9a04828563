"""Mamba: a state-space model whose step size, input and output look at the token.

    [x, z] = u W_in,    x ← SiLU(conv(x)),    [δ, B, C] = x W_x
    Δ = softplus(δ W_dt + b_dt),    A = -exp(A_log)
    h_t = exp(Δ_t A) ⊙ h_{t-1} + (Δ_t x_t) B_tᵀ,    y_t = h_t C_t + D ⊙ x_t
    output = (y ⊙ SiLU(z)) W_out

The recurrence is `selective_scan` of `ops/linear_scan.py`.
"""

import math
from typing import Literal

import keras
from keras import initializers, ops

from keras_edifice.blocks.causal_conv import CausalConv
from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.recurrence_initializers import (
    fan_in_uniform,
    step_size_bias,
)
from keras_edifice.blocks.rms_norm import RMSNorm
from keras_edifice.blocks.sequence import residual, sequence_input, sequence_model
from keras_edifice.model import EdificeModel
from keras_edifice.ops.linear_scan import METHODS, selective_scan, selective_step
from keras_edifice.options import Positive, Rate, Size, check
from keras_edifice.registry import architecture, with_defaults

Scan = Literal[METHODS]
Discretization = Literal["euler_b", "zoh"]


def log_arange(shape, dtype=None):
    """S4D-Real: row e of A is -1, -2, ..., -N."""
    rates = ops.log(ops.arange(1, shape[-1] + 1, dtype="float32"))
    return ops.cast(rates + ops.zeros(shape), dtype or "float32")


@keras.saving.register_keras_serializable("keras_edifice")
class MambaBlock(Composite):
    """(batch, time, features) -> the same. Causal; O(1) state per step.

    The state is (the last conv_size - 1 inputs of the convolution, h), of the shapes
    (batch, conv_size - 1, E) and (batch, E, state_size), E = expand_factor * features.
    A masked step leaves it as it is; padding belongs on one side, not in between.

    Args:
        state_size: N, numbers that each channel remembers.
        expand_factor: width of the recurrence relative to that of the input.
        conv_size: taps of the convolution.
        dt_rank: width of δ; None for features / 16, rounded up.
        scan: how the recurrence is computed, see `selective_scan`. All are equal.
        chunk_size: steps whose states exist at once, for "auto", "chunked" and
            "sequential".
        discretization: "euler_b" for Δ B as the input's weight, "zoh" for
            (exp(Δ A) - 1) / A B.
        dt_min: smallest Δ at the start.
        dt_max: largest Δ at the start.
        dt_init_floor: Δ at the start is not below this.
        dt_scale: scale of W_dt at the start.
        conv_bias: whether the convolution has a bias.
        use_bias: whether W_in and W_out have biases.
        inner_norms: whether δ, B and C are normalised (Lieber et al. 2024, Jamba,
            arXiv:2403.19887).
        norm_eps: of those norms.
        depth: number of such blocks in the model; W_out starts divided by its root.

    Raises:
        ValueError: `scan` or `discretization` is not one of the above.
    """

    def __init__(
        self,
        state_size=16,
        expand_factor=2,
        conv_size=4,
        dt_rank=None,
        scan="auto",
        chunk_size=16,
        discretization="euler_b",
        dt_min=0.001,
        dt_max=0.1,
        dt_init_floor=1e-4,
        dt_scale=1.0,
        conv_bias=True,
        use_bias=False,
        inner_norms=False,
        norm_eps=1e-5,
        depth=1,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)  # the state keeps its precision
        self.state_size, self.expand_factor = state_size, expand_factor
        self.conv_size, self.dt_rank = conv_size, dt_rank
        self.scan, self.chunk_size = check(Scan, "scan", scan), chunk_size
        self.discretization = check(Discretization, "discretization", discretization)
        self.dt_min, self.dt_max = dt_min, dt_max
        self.dt_init_floor, self.dt_scale = dt_init_floor, dt_scale
        self.conv_bias, self.use_bias = conv_bias, use_bias
        self.inner_norms, self.norm_eps, self.depth = inner_norms, norm_eps, depth
        self.supports_masking = True

    def build(self, input_shape):
        features = input_shape[-1]
        width = self.expand_factor * features
        self.rank = self.dt_rank or math.ceil(features / 16)
        self.in_proj = self._dense("in_proj", 2 * width, features, None, self.use_bias)
        self._build_core(width)
        start = fan_in_uniform(self.depth)
        self.out_proj = self._dense("out_proj", features, width, start, self.use_bias)

    def _dense(self, name, units, inputs, initializer=None, use_bias=False):
        layer = Dense(
            units,
            use_bias=use_bias,
            kernel_initializer=initializer or fan_in_uniform(),
            dtype=self.dtype_policy,
            name=name,
        )
        layer.build((None, None, inputs))
        return layer

    def _build_core(self, width):
        """What is between the projections, for a recurrence of this width."""
        self.channels, rank, size = width, self.rank, self.state_size
        self.conv = CausalConv(
            self.conv_size,
            self.conv_bias,
            "silu",
            dtype=self.dtype_policy,
            name="conv",
        )
        self.conv.build((None, None, width))
        self.x_proj = self._dense("x_proj", self._selected(), width)
        bound = self.dt_scale * rank**-0.5
        uniform = initializers.RandomUniform(-bound, bound)
        self.dt_proj = self._dense("dt_proj", width, rank, uniform)
        self._build_recurrence(width, size)
        self.norms = []
        if self.inner_norms:
            sizes = {"dt_norm": rank, "B_norm": size, "C_norm": size}
            self.norms = [
                RMSNorm(self.norm_eps, dtype=self.dtype_policy, name=name)
                for name in sizes
            ]
            for norm, inputs in zip(self.norms, sizes.values(), strict=True):
                norm.build((None, None, inputs))

    def _selected(self):
        """Width of what is selected by the token: δ, B and C."""
        return self.rank + 2 * self.state_size

    def _build_recurrence(self, width, size):
        """The weights of Δ, A and D, in float32 at any precision."""
        bias = step_size_bias(self.dt_min, self.dt_max, self.dt_init_floor)
        starts = {
            "dt_bias": ((width,), bias),
            "A_log": ((width, size), log_arange),
            "D": ((width,), "ones"),
        }
        for name, (shape, start) in starts.items():
            weight = self.add_weight(shape, start, autocast=False, name=name)
            setattr(self, name, weight)

    def call(self, x, mask=None, initial_state=None, return_state=False):
        seen, h = (None, None) if initial_state is None else initial_state
        x, z = ops.split(self.in_proj(x), 2, axis=-1)
        conv = self.conv(x, mask=mask, initial_state=seen, return_state=return_state)
        x, seen = conv if return_state else (conv, None)
        dt, B, C = self._select(x)
        if mask is not None:  # exp(0 A) = 1 and 0 B x = 0: the state stays
            dt = ops.where(ops.expand_dims(mask, -1), dt, ops.zeros_like(dt))
        y, h = selective_scan(
            x,
            dt,
            self._A(),
            B,
            C,
            initial_state=h,
            method=self.scan,
            chunk_size=self.chunk_size,
            discretization=self.discretization,
        )
        y = self._gated(y, x, z)
        return (y, (seen, h)) if return_state else y

    def _select(self, x):
        """Δ (in float32), B and C of each step."""
        rank, size = self.rank, self.state_size
        dt, B, C = ops.split(self.x_proj(x), [rank, rank + size], axis=-1)
        if self.inner_norms:
            dt, B, C = (norm(z) for norm, z in zip(self.norms, (dt, B, C), strict=True))
        dt = ops.cast(self.dt_proj(dt), "float32")
        return ops.softplus(dt + ops.cast(self.dt_bias, "float32")), B, C

    def _A(self):
        return -ops.exp(ops.cast(self.A_log, "float32"))

    def _gated(self, y, x, z):
        y = y + ops.cast(self.D, "float32") * ops.cast(x, "float32")
        return self.out_proj(ops.cast(y, self.compute_dtype) * ops.silu(z))

    def initial_state(self, batch_size):
        """The state before the first step: zeros."""
        h = ops.zeros((batch_size, self.channels, self.state_size), dtype="float32")
        return self.conv.initial_state(batch_size), h

    def step(self, x_t, state):
        """One step: (batch, features) and the state -> the output and the new state."""
        seen, h = state
        x, z = ops.split(self.in_proj(x_t), 2, axis=-1)
        x, seen = self.conv.step(x, seen)
        dt, B, C = self._select(x)
        y, h = selective_step(x, dt, self._A(), B, C, h, self.discretization)
        return self._gated(y, x, z), (seen, h)

    def compute_output_shape(self, input_shape):
        return input_shape


FACTS = dict(
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, hidden_size)",
    causal=True,
    streaming=True,
    tiny=dict(
        embed_size=3,
        hidden_size=4,
        state_size=3,
        dt_rank=2,
        num_layers=1,
        inner_norms=True,
        chunk_size=3,
        dropout=0.1,
        window_size=7,
    ),
    variants={
        "130m": dict(hidden_size=768, num_layers=24),
        "370m": dict(hidden_size=1024, num_layers=48),
        "790m": dict(hidden_size=1536, num_layers=48),
        "1.4b": dict(hidden_size=2048, num_layers=48),
        "2.8b": dict(hidden_size=2560, num_layers=64),
    },
)
PAPER = (
    "Gu & Dao 2023, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, "
    "arXiv:2312.00752"
)


@architecture(paper=PAPER, **FACTS)
def mamba(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    state_size: Size = 16,
    expand_factor: Size = 2,
    conv_size: Size = 4,
    dt_rank: Size | None = None,
    num_layers: Size = 2,
    scan: Scan = "auto",
    chunk_size: Size = 16,
    discretization: Discretization = "euler_b",
    dt_min: Positive = 0.001,
    dt_max: Positive = 0.1,
    dt_init_floor: Positive = 1e-4,
    dt_scale: Positive = 1.0,
    conv_bias: bool = True,
    use_bias: bool = False,
    inner_norms: bool = False,
    norm_eps: Positive = 1e-5,
    dropout: Rate = 0.0,
    return_sequences: bool = False,
    pool: Literal["last", "mean"] = "last",
    vocab_size: Size | None = None,
    tie_embeddings: bool = True,
    window_size: Size | None = 60,
) -> EdificeModel:
    """Pre-norm residual stack of Mamba blocks.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the residual stream.
        state_size: numbers that each channel remembers.
        expand_factor: width of the recurrence relative to hidden_size.
        conv_size: taps of the convolution before the recurrence.
        dt_rank: width of the projection that gives the step sizes; None for
            hidden_size / 16, rounded up.
        num_layers: number of blocks.
        scan: how the recurrence is computed; all ways give the same numbers.
        chunk_size: steps whose states exist at once, for the scans "auto", "chunked"
            and "sequential".
        discretization: weight of the input, Euler's Δ B as in the authors' code, or
            the zero-order hold of the paper's equation 4.
        dt_min: smallest step size at the start.
        dt_max: largest step size at the start.
        dt_init_floor: no step size is below this at the start.
        dt_scale: scale of the step sizes' projection at the start.
        conv_bias: the convolution has a bias.
        use_bias: the projections into and out of the block have biases.
        inner_norms: normalise what selects step size, input and output, as in Jamba.
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
        block = MambaBlock(
            state_size=state_size,
            expand_factor=expand_factor,
            conv_size=conv_size,
            dt_rank=dt_rank,
            scan=scan,
            chunk_size=chunk_size,
            discretization=discretization,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dt_scale=dt_scale,
            conv_bias=conv_bias,
            use_bias=use_bias,
            inner_norms=inner_norms,
            norm_eps=norm_eps,
            depth=num_layers,
            name=f"mamba_{i}",
        )
        x = residual(x, block, epsilon=norm_eps, dropout=dropout)
    x = RMSNorm(norm_eps, name="final_norm")(x)
    return sequence_model(inputs, x, return_sequences, pool, name="mamba")


architecture(
    paper="Heinsen 2023, Efficient Parallelization of a Ubiquitous Sequential "
    "Computation, arXiv:2311.06281",
    title="Mamba by cumulative sums",
    **FACTS,
)(
    with_defaults(
        mamba,
        "mamba_cumsum",
        "Mamba whose recurrence is cumulative sums in log space.",
        scan="cumsum",
    )
)

architecture(
    paper="Hillis & Steele 1986, Data Parallel Algorithms, Communications of the ACM "
    "29(12)",
    title="Mamba with the scan of Hillis and Steele",
    **FACTS,
)(
    with_defaults(
        mamba,
        "mamba_hillis_steele",
        "Mamba whose recurrence is doubled in rounds, the logarithm of its length.",
        scan="hillis_steele",
    )
)
