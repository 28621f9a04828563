"""S4: each feature convolved with the impulse response of a state space that remembers.

    x' = A x + B u,    y = C x + D u,    A = Λ - P P*,    Λ = diag(-exp(a) + i b)
    Ā = (I - ΔA/2)⁻¹ (I + ΔA/2),    B̄ = (I - ΔA/2)⁻¹ Δ B,    K_l = Re(C Ā^l B̄)
    output = GLU(W dropout(GELU(K * u + D u)) + b)

A starts as HiPPO-LegS, a normal matrix minus one of rank one. The kernel of L taps
comes from its spectrum, where P costs no more than a division: `ssm_kernel_dplr` of
`ops/state_space.py`. C is held as C̃ = C (I - Ā^L). Without P it is `s4d.py`.
"""

import math
from typing import Literal

import keras
import numpy as np
from keras import initializers, layers, ops

from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.feed_forward import FeedForward
from keras_edifice.blocks.layer_norm import LayerNorm
from keras_edifice.blocks.post_norm import post_norm_residual
from keras_edifice.blocks.recurrence_initializers import fan_in_uniform
from keras_edifice.blocks.sequence import residual, sequence_input, sequence_model
from keras_edifice.model import EdificeModel
from keras_edifice.ops.gelu import gelu
from keras_edifice.ops.hippo import nplr, truncated_output
from keras_edifice.ops.long_conv import MODES, long_conv
from keras_edifice.ops.state_space import (
    dplr_conv,
    dplr_step,
    dplr_system,
    ssm_kernel_dplr,
)
from keras_edifice.ops.step_scan import step_scan
from keras_edifice.ops.tracing import static_length
from keras_edifice.options import NonNegative, Positive, Rate, Size, check
from keras_edifice.registry import architecture

StepTransform = Literal["exp", "softplus"]
ConvMode = Literal[MODES]


@keras.saving.register_keras_serializable("keras_edifice")
class S4Layer(Composite):
    """(batch, time, features) -> the same. Causal; O(1) state per step.

    The same at all times: a shifted input gives a shifted output. The state is the
    real and then the imaginary part of x, (batch, features, state_size), in float32. A
    masked step leaves it as it is; padding belongs on one side, not in between. A
    state together with a mask, or with an unknown length, takes the recurrence step by
    step. `step`, and every call with a state, computes Ā anew.

    The weights `A_log`, `A_imag`, `P_real`, `P_imag`, `B_real`, `B_imag` and `inv_dt`
    want a learning rate of at most 0.001, and they and `C_real` and `C_imag` no weight
    decay.

    Args:
        max_length: L, taps of the kernel: no call may have more steps. One with a
            state may continue where another ended.
        state_size: N; N/2 eigenvalues, each of which stands for its conjugate too.
        rank: number of columns of P.
        num_ssm: number of different Λ, P and B, which the features take in turn; None
            for one for each feature.
        dt_min: smallest Δ at the start.
        dt_max: largest Δ at the start.
        dt_transform: the function that gives Δ from its weight, "exp" or "softplus".
        bidirectional: adds a convolution with the steps ahead, with a C of its own;
            then there is no state.
        dropout: rate before the last matrix, in training.
        conv_mode: "fft" or "direct", see `long_conv`.

    Raises:
        ValueError: a choice is not one of the above, `state_size` is odd, or `num_ssm`
            does not divide the features; more than `max_length` steps; a state of a
            bidirectional layer.
    """

    def __init__(
        self,
        max_length,
        state_size=64,
        rank=1,
        num_ssm=None,
        dt_min=0.001,
        dt_max=0.1,
        dt_transform="exp",
        bidirectional=False,
        dropout=0.0,
        conv_mode="fft",
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)  # the state keeps its precision
        if state_size % 2:
            raise ValueError(
                f"state_size must be even, for conjugate pairs, received {state_size}"
            )
        self.max_length, self.state_size, self.rank = max_length, state_size, rank
        self.num_ssm, self.dt_min, self.dt_max = num_ssm, dt_min, dt_max
        self.dt_transform = check(StepTransform, "dt_transform", dt_transform)
        self.bidirectional, self.dropout = bidirectional, dropout
        self.conv_mode = check(ConvMode, "conv_mode", conv_mode)
        self.supports_masking = True

    def build(self, input_shape):
        self.features = features = input_shape[-1]
        self._build_systems(features)
        self.drop = layers.Dropout(self.dropout, dtype=self.dtype_policy, name="drop")
        self.out_proj = Dense(
            2 * features,
            kernel_initializer=fan_in_uniform(),
            dtype=self.dtype_policy,
            name="out_proj",
        )
        self.out_proj.build((None, None, features))

    def _build_systems(self, features):
        """The weights of Λ, P, B, C, Δ and D."""
        systems, half = self.num_ssm or features, self.state_size // 2
        if features % systems:
            raise ValueError(
                "the features must be a multiple of num_ssm, received "
                f"{features} and {systems}"
            )
        # C̃ depends on Δ: both are drawn here, from a seed that Keras gives.
        rng = np.random.default_rng(initializers.RandomNormal().seed)
        Lambda, P, B, _ = nplr("legs", self.state_size)
        Lambda, P, B = Lambda[:half], P[:, :half], B[:half]
        if self.rank > 1:  # where P is zero, its gradient is zero too
            more = rng.normal(size=(2, self.rank - 1, half), scale=0.01)
            P = np.concatenate([P, more[0] + 1j * more[1]])
        P = np.broadcast_to(P[:, None], (self.rank, systems, half))
        log_dt = rng.uniform(math.log(self.dt_min), math.log(self.dt_max), features)
        arrays = self._outputs(rng, Lambda, P, np.exp(log_dt))
        if self.dt_transform == "softplus":
            log_dt = np.log(np.expm1(np.exp(log_dt)))
        each = np.ones((systems, 1))
        arrays |= dict(A_log=each * np.log(-Lambda.real), A_imag=each * Lambda.imag)
        arrays |= dict(B_real=each * B.real, B_imag=each * B.imag)
        arrays |= dict(P_real=P.real, P_imag=P.imag, inv_dt=log_dt)
        arrays["D"] = rng.normal(size=features)
        for name, array in arrays.items():
            start = initializers.Constant(array.astype("float32"))
            weight = self.add_weight(array.shape, start, autocast=False, name=name)
            setattr(self, name, weight)

    def _outputs(self, rng, Lambda, P, dt):
        """C̃ of a C that is complex normal of unit variance; another for steps ahead."""
        P, arrays = np.tile(P, (1, len(dt) // P.shape[1], 1)), {}
        Lambda = np.broadcast_to(Lambda, P.shape[1:])
        for name in ["C", "C_ahead"][: 1 + self.bidirectional]:
            C = rng.normal(size=(2, *Lambda.shape), scale=math.sqrt(0.5))
            C = truncated_output(Lambda, P, C[0] + 1j * C[1], dt, self.max_length)
            arrays |= {f"{name}_real": C.real, f"{name}_imag": C.imag}
        return arrays

    def matrices(self, ahead=False):
        """Λ, P, B and C̃ of every feature, pairs (real, imaginary part), and Δ.

        Args:
            ahead: with the C̃ of the steps ahead, of a bidirectional layer.
        """
        dt = ops.cast(self.inv_dt, "float32")
        dt = ops.exp(dt) if self.dt_transform == "exp" else ops.softplus(dt)
        copies = self.features // self.A_log.shape[0]
        Lambda = -ops.exp(self.A_log), ops.convert_to_tensor(self.A_imag)
        B, P = (self.B_real, self.B_imag), (self.P_real, self.P_imag)
        Lambda, B = (
            tuple(ops.tile(ops.convert_to_tensor(z), (copies, 1)) for z in pair)
            for pair in (Lambda, B)
        )
        P = tuple(ops.tile(ops.convert_to_tensor(z), (1, copies, 1)) for z in P)
        C = (
            (self.C_ahead_real, self.C_ahead_imag)
            if ahead
            else (self.C_real, self.C_imag)
        )
        return Lambda, P, B, tuple(ops.convert_to_tensor(z) for z in C), dt

    def kernel(self, ahead=False):
        """K, or that of the steps ahead: (max_length, features) in float32."""
        return ssm_kernel_dplr(*self.matrices(ahead), self.max_length)

    def call(
        self, x, mask=None, initial_state=None, return_state=False, training=False
    ):
        stateful = initial_state is not None or return_state
        if stateful and self.bidirectional:
            raise ValueError("a bidirectional S4Layer has no state; pass none")
        length = static_length(x)
        if length is not None and length > self.max_length:
            raise ValueError(
                f"{self.name} has a kernel of max_length={self.max_length} taps, "
                f"received {length} steps; raise it, or pass parts with the state"
            )
        u = ops.cast(x, "float32")
        if mask is not None:
            u = ops.where(ops.expand_dims(mask, -1), u, ops.zeros_like(u))
        y, state = self._filtered(u, mask, initial_state, return_state)
        y = self._mixed(y, u, training)
        return (y, state) if return_state else y

    def _filtered(self, u, mask, initial_state, return_state):
        """K * u, and the state where it is asked for."""
        if initial_state is None and not return_state:
            ahead = None
            if self.bidirectional:  # the step itself belongs to K
                ahead = ops.pad(self.kernel(ahead=True)[:-1], [(1, 0), (0, 0)])
            y = long_conv(u, self.kernel(), backward_kernel=ahead, mode=self.conv_mode)
            return y, None
        system = dplr_system(*self.matrices(), self.max_length)
        if mask is not None or static_length(u) is None:
            return self._stepped(u, system, mask, initial_state)
        y = dplr_conv(
            u, system, self.kernel(), initial_state, return_state, self.conv_mode
        )
        return y if return_state else (y, None)

    def _stepped(self, u, system, mask, state):
        """The recurrence, which stands still at masked steps."""
        if state is None:
            state = self.initial_state(ops.shape(u)[0])
        if mask is None:
            mask = ops.ones_like(u[..., 0])

        def step(now, states):
            h, (u_t, valid) = states[0], ops.split(now, [self.features], axis=-1)
            y, new = dplr_step(u_t, system, ops.reshape(h, (-1, *shape)))
            return y, [ops.where(valid > 0.5, ops.reshape(new, (-1, width)), h)]

        shape = self.features, self.state_size
        width = self.features * self.state_size
        valid = ops.expand_dims(ops.cast(mask, "float32"), -1)
        state = [ops.reshape(state, (-1, width))]
        y, (state,) = step_scan(step, ops.concatenate([u, valid], axis=-1), state)
        return y, ops.reshape(state, (-1, *shape))

    def _mixed(self, y, u, training=False):
        """What happens at each step by itself: D, GELU and the gated linear unit."""
        y = gelu(y + ops.cast(self.D, "float32") * u)
        y = self.drop(ops.cast(y, self.compute_dtype), training=training)
        y, gate = ops.split(self.out_proj(y), 2, axis=-1)
        return y * ops.sigmoid(gate)

    def initial_state(self, batch_size):
        """The state before the first step: zeros."""
        return ops.zeros((batch_size, self.features, self.state_size), dtype="float32")

    def step(self, x_t, state):
        """One step: (batch, features) and the state -> the output and the new state."""
        if self.bidirectional:
            raise ValueError("a bidirectional S4Layer cannot run step by step")
        u = ops.cast(x_t, "float32")
        y, state = dplr_step(u, dplr_system(*self.matrices(), self.max_length), state)
        return self._mixed(y, u), state

    def compute_output_shape(self, input_shape):
        return input_shape


@architecture(
    paper="Gu, Goel & Ré 2022, Efficiently Modeling Long Sequences with Structured "
    "State Spaces, arXiv:2111.00396",
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, hidden_size)",
    causal=True,
    streaming=True,
    multiples={"hidden_size": "num_ssm"},
    tiny=dict(
        embed_size=3,
        hidden_size=4,
        state_size=4,
        num_ssm=2,
        rank=2,
        num_layers=1,
        mlp_ratio=2.0,
        max_length=512,
        window_size=7,
    ),
)
def s4(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    state_size: Size = 64,
    num_layers: Size = 4,
    rank: Size = 1,
    num_ssm: Size | None = None,
    dt_min: Positive = 0.001,
    dt_max: Positive = 0.1,
    dt_transform: StepTransform = "exp",
    bidirectional: bool = False,
    mlp_ratio: NonNegative = 0.0,
    prenorm: bool = True,
    conv_mode: ConvMode = "fft",
    dropout: Rate = 0.1,
    max_length: Size | None = None,
    return_sequences: bool = False,
    pool: Literal["last", "mean"] | None = None,
    vocab_size: Size | None = None,
    tie_embeddings: bool = True,
    window_size: Size | None = 60,
) -> EdificeModel:
    """Residual stack of S4 layers.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the residual stream.
        state_size: numbers that each feature remembers, even.
        num_layers: number of S4 layers.
        rank: of what is subtracted from the diagonal state matrix.
        num_ssm: different state spaces of a layer, which its features share in turn;
            None for one for each feature.
        dt_min: smallest step size at the start.
        dt_max: largest step size at the start.
        dt_transform: function that makes the step sizes positive.
        bidirectional: steps see those ahead, too; then it cannot run token by token.
        mlp_ratio: width of a feed-forward layer after each S4 layer, relative to
            hidden_size; 0 for none.
        prenorm: normalise before each layer and at the end, instead of after each sum.
        conv_mode: convolve by Fourier transforms or by the direct sum.
        dropout: rate within each layer and on its output, in training.
        max_length: taps of the kernels, the most steps of an input; None for
            window_size.
        return_sequences: give every step, (batch, window_size, hidden_size).
        pool: how the steps become one vector, by the last or by their mean; None for
            the last, for the mean if bidirectional.
        vocab_size: number of tokens, where the input is their numbers, (batch,
            window_size), instead of features; the output is then the logits of the
            next token at every step, (batch, window_size, vocab_size).
        tie_embeddings: those logits use the matrix that embeds the tokens.
        window_size: steps of the input, None for any number up to max_length.

    Raises:
        ValueError: `vocab_size` together with `bidirectional`; `max_length` neither
            given nor at least `window_size`.
    """
    taps = max_length or window_size
    if taps is None or taps < (window_size or 0):
        raise ValueError(
            "max_length must be given and no smaller than window_size, received "
            f"max_length={max_length}, window_size={window_size}"
        )
    inputs, x = sequence_input(
        window_size, embed_size, hidden_size, vocab_size, tie_embeddings, bidirectional
    )
    add = residual if prenorm else post_norm_residual
    for i in range(num_layers):
        mixers = [
            S4Layer(
                taps,
                state_size=state_size,
                rank=rank,
                num_ssm=num_ssm,
                dt_min=dt_min,
                dt_max=dt_max,
                dt_transform=dt_transform,
                bidirectional=bidirectional,
                dropout=dropout,
                conv_mode=conv_mode,
                name=f"s4_{i}",
            )
        ]
        if width := int(mlp_ratio * hidden_size):
            mixers.append(FeedForward(width, dropout=dropout, name=f"mlp_{i}"))
        for mixer in mixers:
            x = add(x, mixer, LayerNorm, dropout=dropout)
    if prenorm:
        x = LayerNorm(name="final_norm")(x)
    pool = pool or ("mean" if bidirectional else "last")
    return sequence_model(inputs, x, return_sequences, pool, name="s4")
