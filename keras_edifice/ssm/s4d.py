"""S4D: each feature convolved with the impulse response of a diagonal state space.

    x' = Λ x + B u,    y = 2 Re(C x) + D u,    Λ = -exp(a) + i b
    h_t = Ā h_{t-1} + B̄ u_t,    y_t = 2 Re(C h_t) + D u_t,    k_l = 2 Re(C Ā^l B̄)
    output = GLU(W dropout(GELU(k * u + D u)) + b)

Every feature has a step Δ of its own, and nothing depends on the input, so that the
recurrence is a convolution: `modal_conv` of `ops/state_space.py`.
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
from keras_edifice.blocks.recurrence_initializers import fan_in_uniform, step_size_bias
from keras_edifice.blocks.sequence import residual, sequence_input, sequence_model
from keras_edifice.model import EdificeModel
from keras_edifice.ops.gelu import gelu
from keras_edifice.ops.hippo import INITS, s4d_init
from keras_edifice.ops.long_conv import MODES
from keras_edifice.ops.state_space import (
    DISCRETIZATIONS,
    diagonal_modes,
    modal_conv,
    modal_scan,
    modal_step,
)
from keras_edifice.options import NonNegative, Positive, Rate, Size, check
from keras_edifice.registry import architecture

Init = Literal[INITS]
Discretization = Literal[DISCRETIZATIONS]
StepTransform = Literal["exp", "softplus"]
ConvMode = Literal[MODES]


def _repeated(values):
    """The same row for every system."""

    def initialize(shape, dtype=None):
        return ops.convert_to_tensor(np.broadcast_to(values, shape).copy(), dtype)

    return initialize


@keras.saving.register_keras_serializable("keras_edifice")
class S4DLayer(Composite):
    """(batch, time, features) -> the same. Causal; O(1) state per step.

    The same at all times: a shifted input gives a shifted output. The state is h as its
    real and its imaginary part, (batch, features, state_size / 2) each, in float32. A
    masked step leaves it as it is; padding belongs on one side, not in between. A mask
    together with a state takes the memory of the states of all steps.

    The weights `A_log`, `A_imag`, `B_real`, `B_imag` and `inv_dt` want a learning rate
    of at most 0.001, and they and `C_real` and `C_imag` no weight decay.

    Args:
        state_size: N; N/2 eigenvalues, each of which stands for its conjugate too.
        num_ssm: number of different Λ and B, which the features take in turn; None for
            one for each feature.
        init: Λ and B at the start, see `s4d_init`.
        discretization: "zoh" or "bilinear", how Ā and B̄ follow from Λ, B and Δ.
        learn_b: whether B is learned.
        dt_min: smallest Δ at the start.
        dt_max: largest Δ at the start.
        dt_transform: the function that gives Δ from its weight, "exp" or "softplus".
        bidirectional: adds a convolution with the steps ahead, with a C of its own;
            then there is no state.
        dropout: rate before the last matrix, in training.
        conv_mode: "fft" or "direct", see `long_conv`.

    Raises:
        ValueError: a choice is not one of the above, `state_size` is odd, or `num_ssm`
            does not divide the features; a state of a bidirectional layer.
    """

    def __init__(
        self,
        state_size=64,
        num_ssm=None,
        init="lin",
        discretization="zoh",
        learn_b=False,
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
        self.state_size, self.num_ssm = state_size, num_ssm
        self.init = check(Init, "init", init)
        self.discretization = check(Discretization, "discretization", discretization)
        self.learn_b, self.dt_min, self.dt_max = learn_b, dt_min, dt_max
        self.dt_transform = check(StepTransform, "dt_transform", dt_transform)
        self.bidirectional, self.dropout = bidirectional, dropout
        self.conv_mode = check(ConvMode, "conv_mode", conv_mode)
        self.supports_masking = True

    def build(self, input_shape):
        self.features = features = input_shape[-1]
        self._build_systems(features)
        self._build_readout((features, self.state_size // 2))
        self.drop = layers.Dropout(self.dropout, dtype=self.dtype_policy, name="drop")
        self.out_proj = Dense(
            2 * features,
            kernel_initializer=fan_in_uniform(),
            dtype=self.dtype_policy,
            name="out_proj",
        )
        self.out_proj.build((None, None, features))

    def _build_systems(self, features):
        """The weights of Λ, B and Δ."""
        systems = self.num_ssm or features
        if features % systems:
            raise ValueError(
                "the features must be a multiple of num_ssm, received "
                f"{features} and {systems}"
            )
        Lambda, B = s4d_init(self.init, self.state_size)
        starts = dict(A_log=np.log(-Lambda.real), A_imag=Lambda.imag)
        starts |= dict(B_real=B.real, B_imag=B.imag)
        for name, values in starts.items():
            weight = self.add_weight(
                (systems, len(B)),
                _repeated(values),
                trainable=self.learn_b or name.startswith("A"),
                autocast=False,
                name=name,
            )
            setattr(self, name, weight)
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        start = initializers.RandomUniform(low, high)
        if self.dt_transform == "softplus":
            start = step_size_bias(self.dt_min, self.dt_max)
        self.inv_dt = self.add_weight((features,), start, autocast=False, name="inv_dt")

    def _build_readout(self, shape):
        """The weights of C, complex normal of unit variance, and of D."""
        names = ["C_real", "C_imag"]
        if self.bidirectional:
            names += ["C_ahead_real", "C_ahead_imag"]
        for name in names:
            start = initializers.RandomNormal(stddev=math.sqrt(0.5))
            weight = self.add_weight(shape, start, autocast=False, name=name)
            setattr(self, name, weight)
        start = initializers.RandomNormal(stddev=1.0)
        self.D = self.add_weight(shape[:1], start, autocast=False, name="D")

    def modes(self, ahead=False):
        """Rates r and weights w of the kernel k_l = Re Σ_n w_n e^{l r_n}.

        Args:
            ahead: those of the steps ahead, of a bidirectional layer.

        Returns:
            Two pairs (real part, imaginary part) of (features, state_size / 2).
        """
        dt = ops.cast(self.inv_dt, "float32")
        dt = ops.exp(dt) if self.dt_transform == "exp" else ops.softplus(dt)
        Lambda = -ops.exp(ops.cast(self.A_log, "float32")), self.A_imag
        copies = (self.features // Lambda[0].shape[0], 1)
        Lambda, B = (
            tuple(ops.tile(ops.cast(part, "float32"), copies) for part in pair)
            for pair in (Lambda, (self.B_real, self.B_imag))
        )
        C = self.C_real, self.C_imag
        if ahead:
            C = self.C_ahead_real, self.C_ahead_imag
        C = tuple(ops.cast(part, "float32") for part in C)
        return diagonal_modes(Lambda, B, C, dt, self.discretization)

    def call(
        self, x, mask=None, initial_state=None, return_state=False, training=False
    ):
        stateful = initial_state is not None or return_state
        if stateful and self.bidirectional:
            raise ValueError("a bidirectional S4DLayer has no state; pass none")
        u = ops.cast(x, "float32")
        if mask is not None:
            u = ops.where(ops.expand_dims(mask, -1), u, ops.zeros_like(u))
        if stateful and mask is not None:
            y, state = modal_scan(u, *self.modes(), mask, initial_state)
        else:
            y = modal_conv(
                u, *self.modes(), initial_state, return_state, self.conv_mode
            )
            y, state = y if return_state else (y, None)
        if self.bidirectional:
            y = y + self._ahead(u)
        y = self._mixed(y, u, training)
        return (y, state) if return_state else y

    def _ahead(self, u):
        """The convolution with what comes after each step."""
        modes = self.modes(ahead=True)
        y = modal_conv(ops.flip(u, axis=1), *modes, mode=self.conv_mode)
        y = ops.flip(y, axis=1)
        return ops.concatenate([y[:, 1:], ops.zeros_like(y[:, :1])], axis=1)

    def _mixed(self, y, u, training=False):
        """What happens at each step by itself: D, GELU and the gated linear unit."""
        y = gelu(y + ops.cast(self.D, "float32") * u)
        y = self.drop(ops.cast(y, self.compute_dtype), training=training)
        y, gate = ops.split(self.out_proj(y), 2, axis=-1)
        return y * ops.sigmoid(gate)

    def initial_state(self, batch_size):
        """The state before the first step: zeros."""
        shape = (batch_size, self.features, self.state_size // 2)
        return ops.zeros(shape, dtype="float32"), ops.zeros(shape, dtype="float32")

    def step(self, x_t, state):
        """One step: (batch, features) and the state -> the output and the new state."""
        if self.bidirectional:
            raise ValueError("a bidirectional S4DLayer cannot run step by step")
        u = ops.cast(x_t, "float32")
        y, state = modal_step(u, *self.modes(), state)
        return self._mixed(y, u), state

    def compute_output_shape(self, input_shape):
        return input_shape


@architecture(
    paper="Gu et al. 2022, On the Parameterization and Initialization of Diagonal "
    "State Space Models, arXiv:2206.11893",
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
        init="legs",
        learn_b=True,
        num_layers=1,
        mlp_ratio=2.0,
        window_size=7,
    ),
)
def s4d(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    state_size: Size = 64,
    num_layers: Size = 4,
    num_ssm: Size | None = None,
    init: Init = "lin",
    discretization: Discretization = "zoh",
    learn_b: bool = False,
    dt_min: Positive = 0.001,
    dt_max: Positive = 0.1,
    dt_transform: StepTransform = "exp",
    bidirectional: bool = False,
    mlp_ratio: NonNegative = 0.0,
    prenorm: bool = True,
    conv_mode: ConvMode = "fft",
    dropout: Rate = 0.1,
    return_sequences: bool = False,
    pool: Literal["last", "mean"] | None = None,
    vocab_size: Size | None = None,
    tie_embeddings: bool = True,
    window_size: Size | None = 60,
) -> EdificeModel:
    """Residual stack of S4D layers.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the residual stream.
        state_size: numbers that each feature remembers, even.
        num_layers: number of S4D layers.
        num_ssm: different state spaces of a layer, which its features share in turn;
            None for one for each feature.
        init: frequencies at the start: multiples of π, their inverse spacing, those of
            HiPPO-LegS, or none ("real").
        discretization: zero-order hold or bilinear method.
        learn_b: the input's weights in the state space are learned.
        dt_min: smallest step size at the start.
        dt_max: largest step size at the start.
        dt_transform: function that makes the step sizes positive.
        bidirectional: steps see those ahead, too; then it cannot run token by token.
        mlp_ratio: width of a feed-forward layer after each S4D layer, relative to
            hidden_size; 0 for none.
        prenorm: normalise before each layer and at the end, instead of after each sum.
        conv_mode: convolve by Fourier transforms or by the direct sum.
        dropout: rate within each layer and on its output, in training.
        return_sequences: give every step, (batch, window_size, hidden_size).
        pool: how the steps become one vector, by the last or by their mean; None for
            the last, for the mean if bidirectional.
        vocab_size: number of tokens, where the input is their numbers, (batch,
            window_size), instead of features; the output is then the logits of the
            next token at every step, (batch, window_size, vocab_size).
        tie_embeddings: those logits use the matrix that embeds the tokens.
        window_size: steps of the input, None for any number.

    Raises:
        ValueError: `vocab_size` together with `bidirectional`.
    """
    inputs, x = sequence_input(
        window_size, embed_size, hidden_size, vocab_size, tie_embeddings, bidirectional
    )
    add = residual if prenorm else post_norm_residual
    for i in range(num_layers):
        mixers = [
            S4DLayer(
                state_size=state_size,
                num_ssm=num_ssm,
                init=init,
                discretization=discretization,
                learn_b=learn_b,
                dt_min=dt_min,
                dt_max=dt_max,
                dt_transform=dt_transform,
                bidirectional=bidirectional,
                dropout=dropout,
                conv_mode=conv_mode,
                name=f"s4d_{i}",
            )
        ]
        if width := int(mlp_ratio * hidden_size):
            mixers.append(FeedForward(width, dropout=dropout, name=f"mlp_{i}"))
        for mixer in mixers:
            x = add(x, mixer, LayerNorm, dropout=dropout)
    if prenorm:
        x = LayerNorm(name="final_norm")(x)
    pool = pool or ("mean" if bidirectional else "last")
    return sequence_model(inputs, x, return_sequences, pool, name="s4d")
