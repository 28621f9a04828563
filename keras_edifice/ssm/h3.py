"""H3: a shift register and a diagonal state space between queries, keys and values.

    q, k, v = W_q u, W_k u, W_v u
    k'_t = Σ_i c_i k_{t-i} + d k_t,    c_i = Σ_n b_n e_{n+i}
    y = SSM(k' ⊗ v) + D (k' ⊗ v),    output = W_o (q · y) + b

The shift lets a token meet the one before it, the diagonal state space (`s4d.py`) keeps
what they made together, and the query asks for it: linear attention whose sums are
state spaces.
"""

import math
from typing import Literal

import keras
import numpy as np
from keras import initializers, ops

from keras_edifice.blocks.causal_conv import CausalConv
from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.feed_forward import FeedForward
from keras_edifice.blocks.grouped_query_attention import GroupedQueryAttention
from keras_edifice.blocks.layer_norm import LayerNorm
from keras_edifice.blocks.recurrence_initializers import fan_in_uniform
from keras_edifice.blocks.sequence import residual, sequence_input, sequence_model
from keras_edifice.model import EdificeModel
from keras_edifice.ops.hippo import INITS, s4d_init
from keras_edifice.ops.long_conv import MODES, long_conv
from keras_edifice.ops.state_space import (
    DISCRETIZATIONS,
    diagonal_modes,
    modal_conv,
    modal_scan,
    modal_step,
)
from keras_edifice.ops.tracing import exporting, static_length
from keras_edifice.options import Count, NonNegative, Positive, Rate, Size, check
from keras_edifice.registry import architecture

Init = Literal[INITS]
Discretization = Literal[DISCRETIZATIONS]
ConvMode = Literal[MODES]


@keras.saving.register_keras_serializable("keras_edifice")
class ShiftSSM(CausalConv):
    """(batch, time, channels) -> the same. Causal; each channel by itself.

    The state space of a shift register: s_t is s_{t-1} moved on by one place plus B
    times the input, and the output is C s_t + D times the input. B starts as the first
    unit vector; then C are the taps of a filter. State and masks as in `CausalConv`.

    Args:
        kernel_size: N, places of the register.
        conv_mode: "fft" or "direct", see `long_conv`.
    """

    def __init__(self, kernel_size, conv_mode="fft", **kwargs):
        super().__init__(kernel_size, use_bias=False, **kwargs)
        self.conv_mode = check(ConvMode, "conv_mode", conv_mode)

    def build(self, input_shape):
        shape = self.kernel_size, input_shape[-1]
        first = np.zeros(shape, "float32")
        first[0] = 1.0
        bound = self.kernel_size**-0.5
        starts = {
            "B": initializers.Constant(first),
            "C": initializers.RandomUniform(-bound, bound),
            "D": initializers.RandomNormal(stddev=1.0),
        }
        for name, start in starts.items():
            weight = self.add_weight(shape[name == "D" :], start, name=name)
            setattr(self, name, weight)

    @property
    def kernel(self):
        """The taps of the whole filter, that of the present step last."""
        # c_i = Σ_n B_n C_{n+i} is a convolution of B with C from its end.
        C = ops.expand_dims(ops.flip(self.C, axis=0), 0)
        B = ops.convert_to_tensor(self.B)
        taps = long_conv(C, B, mode="direct")[0]
        D = ops.expand_dims(self.D, 0)
        return taps + ops.pad(D, [(self.kernel_size - 1, 0), (0, 0)])

    def call(self, x, mask=None, initial_state=None, return_state=False):
        if exporting() and static_length(x) is None:  # tap by tap
            return super().call(x, mask, initial_state, return_state)
        if mask is not None:
            x = ops.where(ops.expand_dims(mask, -1), x, ops.zeros_like(x))
        if initial_state is None:
            before = ops.zeros_like(x[:, :1])
            initial_state = ops.repeat(before, self.kept, axis=1)
        taps = ops.flip(self.kernel, axis=0)
        y = long_conv(x, taps, initial_state, mode=self.conv_mode)
        if not return_state:
            return y
        return y, self._last(ops.concatenate([initial_state, x], axis=1), mask)


@keras.saving.register_keras_serializable("keras_edifice")
class H3Layer(Composite):
    """(batch, time, features) -> the same. Causal; O(1) state per step.

    The state is that of the `ShiftSSM`, the last keys, and that of the diagonal state
    space as its real and its imaginary part, (batch, heads, head_dim², state_size / 2)
    each, in float32. A masked step leaves it as it is; padding belongs on one side, not
    in between. A mask together with a state takes the memory of the states of all
    steps.

    The weights of the state spaces but `C` want a learning rate of at most 0.001, and
    all of them no weight decay.

    Args:
        state_size: N of the diagonal state space, even; N/2 eigenvalues, each of which
            stands for its conjugate too.
        shift_size: places of the shift register; None for state_size.
        head_dim: size of the heads within which keys and values make products.
        init: eigenvalues at the start, see `s4d_init`.
        discretization: "zoh" or "bilinear", how a step follows from the eigenvalues.
        dt_min: smallest Δ at the start.
        dt_max: largest Δ at the start.
        conv_mode: "fft" or "direct", see `long_conv`.
        depth: number of branches in the model; W_o starts divided by its root.

    Raises:
        ValueError: a choice is not one of the above, `state_size` is odd, or `head_dim`
            does not divide the features.
    """

    def __init__(
        self,
        state_size=64,
        shift_size=None,
        head_dim=1,
        init="lin",
        discretization="bilinear",
        dt_min=0.001,
        dt_max=0.1,
        conv_mode="fft",
        depth=1,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)  # the state keeps its precision
        if state_size % 2:
            raise ValueError(
                f"state_size must be even, for conjugate pairs, received {state_size}"
            )
        self.state_size, self.shift_size = state_size, shift_size
        self.head_dim, self.init = head_dim, check(Init, "init", init)
        self.discretization = check(Discretization, "discretization", discretization)
        self.dt_min, self.dt_max, self.depth = dt_min, dt_max, depth
        self.conv_mode = check(ConvMode, "conv_mode", conv_mode)
        self.supports_masking = True

    def build(self, input_shape):
        features = input_shape[-1]
        if features % self.head_dim:
            raise ValueError(
                "the features must be a multiple of head_dim, received "
                f"{features} and {self.head_dim}"
            )
        self.heads = features // self.head_dim
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            dense = Dense(
                features,
                kernel_initializer=fan_in_uniform(
                    self.depth if name == "out_proj" else 1
                ),
                dtype=self.dtype_policy,
                name=name,
            )
            dense.build((None, None, features))
            setattr(self, name, dense)
        self.shift = ShiftSSM(
            self.shift_size or self.state_size,
            self.conv_mode,
            dtype="float32",
            name="shift",
        )
        self.shift.build((None, None, features))
        self._build_diagonal((self.heads, self.state_size // 2))

    def _build_diagonal(self, shape):
        """The weights of the diagonal state space of every head."""
        Lambda, B = s4d_init(self.init, self.state_size)
        starts = dict(A_log=np.log(-Lambda.real), A_imag=Lambda.imag)
        starts |= dict(B_real=B.real, B_imag=B.imag)
        starts = {
            name: initializers.Constant(values.astype("float32"))
            for name, values in starts.items()
        }
        for name in ("C_real", "C_imag"):  # unit variance of the complex number
            starts[name] = initializers.RandomNormal(stddev=math.sqrt(0.5))
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        starts["log_dt"] = initializers.RandomUniform(low, high)
        starts["D"] = initializers.RandomNormal(stddev=1.0)
        for name, start in starts.items():
            size = shape[:1] if name in ("log_dt", "D") else shape
            weight = self.add_weight(size, start, autocast=False, name=name)
            setattr(self, name, weight)

    def modes(self):
        """Rates r and weights w of the kernel k_l = Re Σ_n w_n e^{l r_n}.

        Returns:
            Two pairs (real part, imaginary part) of (heads, 1, state_size / 2).
        """
        Lambda = -ops.exp(self.A_log), ops.convert_to_tensor(self.A_imag)
        B, C = (
            tuple(ops.convert_to_tensor(z) for z in pair)
            for pair in ((self.B_real, self.B_imag), (self.C_real, self.C_imag))
        )
        dt = ops.exp(self.log_dt)
        modes = diagonal_modes(Lambda, B, C, dt, self.discretization)
        return tuple(tuple(ops.expand_dims(z, 1) for z in pair) for pair in modes)

    def call(self, x, mask=None, initial_state=None, return_state=False):
        stateful = initial_state is not None or return_state
        keys, state = (None, None) if initial_state is None else initial_state
        k = ops.cast(self.k_proj(x), "float32")
        options = dict(initial_state=keys, return_state=return_state)
        k = self.shift(k, mask=mask, **options)
        k, keys = k if return_state else (k, None)
        kv = self._products(k, self.v_proj(x))  # (b, t, heads, head_dim²)
        if mask is not None:
            valid = ops.expand_dims(ops.expand_dims(mask, -1), -1)
            kv = ops.where(valid, kv, ops.zeros_like(kv))
        if stateful and mask is not None:
            y, state = self._held(kv, mask, state)
        else:
            y = modal_conv(kv, *self.modes(), state, return_state, self.conv_mode)
            y, state = y if return_state else (y, None)
        y = self._asked(self.q_proj(x), y, kv)
        return (y, (keys, state)) if return_state else y

    def _products(self, k, v):
        """The products of each head: (..., features) -> (..., heads, head_dim²)."""
        d, around = self.head_dim, ops.shape(k)[:-1]
        k = ops.reshape(k, (*around, self.heads, d, 1))
        v = ops.reshape(ops.cast(v, "float32"), (*around, self.heads, 1, d))
        return ops.reshape(k * v, (*around, self.heads, d * d))

    def _held(self, kv, mask, state):
        """The recurrence of the products, which stands still at masked steps."""
        d, (batch, time) = self.head_dim**2, ops.shape(kv)[:2]
        rate, weight = (
            tuple(ops.repeat(z[:, 0], d, axis=0) for z in pair) for pair in self.modes()
        )
        if state is not None:
            flat = (-1, self.heads * d, self.state_size // 2)
            state = tuple(ops.reshape(z, flat) for z in state)
        flat = ops.reshape(kv, (batch, time, self.heads * d))
        y, state = modal_scan(flat, rate, weight, mask, state)
        shape = (-1, self.heads, d, self.state_size // 2)
        state = tuple(ops.reshape(z, shape) for z in state)
        return ops.reshape(y, (batch, time, self.heads, d)), state

    def _asked(self, q, y, kv):
        """W_o (q · (y + D kv)), the sum over the axis of the keys in each head."""
        y = y + ops.expand_dims(self.D, -1) * kv
        d, around = self.head_dim, ops.shape(y)[:-2]
        q = ops.reshape(ops.cast(q, "float32"), (*around, self.heads, d, 1))
        y = ops.sum(q * ops.reshape(y, (*around, self.heads, d, d)), axis=-2)
        y = ops.reshape(y, (*around, self.heads * d))
        return self.out_proj(ops.cast(y, self.compute_dtype))

    def initial_state(self, batch_size):
        """The state before the first step: zeros."""
        shape = batch_size, self.heads, self.head_dim**2, self.state_size // 2
        state = ops.zeros(shape, dtype="float32"), ops.zeros(shape, dtype="float32")
        return self.shift.initial_state(batch_size), state

    def step(self, x_t, state):
        """One step: (batch, features) and the state -> the output and the new state."""
        keys, state = state
        k, keys = self.shift.step(ops.cast(self.k_proj(x_t), "float32"), keys)
        kv = self._products(k, self.v_proj(x_t))
        y, state = modal_step(kv, *self.modes(), state)
        return self._asked(self.q_proj(x_t), y, kv), (keys, state)

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable("keras_edifice")
class H3FeedForward(FeedForward):
    """(..., features) -> the same. Each position by itself, by GELU's tanh form.

    Args:
        hidden_size: width between the matrices.
        depth: number of branches in the model; W_2 starts divided by its root.
    """

    def __init__(self, hidden_size, depth=1, **kwargs):
        super().__init__(hidden_size, "gelu_tanh", **kwargs)
        self.depth = depth

    def _start(self, name):
        return fan_in_uniform(self.depth if name == "down" else 1)


def _attention(num_heads, depth, name):
    return GroupedQueryAttention(
        num_heads,
        use_bias=True,
        kernel_initializer=fan_in_uniform(),
        output_initializer=fan_in_uniform(depth),
        name=name,
    )


@architecture(
    paper="Fu et al. 2023, Hungry Hungry Hippos: Towards Language Modeling with State "
    "Space Models, arXiv:2212.14052",
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, hidden_size)",
    causal=True,
    streaming=True,
    multiples={"hidden_size": "head_dim"},
    tiny=dict(
        embed_size=3,
        hidden_size=4,
        state_size=4,
        shift_size=3,
        head_dim=2,
        num_layers=2,
        attention_layers=[1],
        num_heads=2,
        mlp_ratio=2.0,
        window_size=7,
    ),
    variants={
        "125m": dict(
            hidden_size=768, num_layers=12, attention_layers=[1, 8], num_heads=12
        ),
        "355m": dict(
            hidden_size=1024, num_layers=24, attention_layers=[1, 13], num_heads=16
        ),
    },
)
def h3(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    state_size: Size = 64,
    shift_size: Size | None = None,
    head_dim: Size = 1,
    num_layers: Size = 4,
    attention_layers: list[Count] = [],
    num_heads: Size = 4,
    mlp_ratio: NonNegative = 4.0,
    init: Init = "lin",
    discretization: Discretization = "bilinear",
    dt_min: Positive = 0.001,
    dt_max: Positive = 0.1,
    conv_mode: ConvMode = "fft",
    dropout: Rate = 0.1,
    return_sequences: bool = False,
    pool: Literal["last", "mean"] = "last",
    vocab_size: Size | None = None,
    tie_embeddings: bool = True,
    window_size: Size | None = 60,
) -> EdificeModel:
    """Pre-norm residual stack of H3 layers, some of them attention, and of MLPs.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the residual stream.
        state_size: numbers that each product of key and value is remembered in, even.
        shift_size: keys that a token sees, its own included; None for state_size.
        head_dim: size of the heads within which keys and values make products.
        num_layers: number of layers.
        attention_layers: numbers of the layers, from 0, that are causal attention.
        num_heads: heads of that attention.
        mlp_ratio: width of the MLP after each layer, relative to hidden_size; 0 for
            none.
        init: frequencies at the start: multiples of π, their inverse spacing, those of
            HiPPO-LegS, or none ("real").
        discretization: zero-order hold or bilinear method.
        dt_min: smallest step size at the start.
        dt_max: largest step size at the start.
        conv_mode: convolve by Fourier transforms or by the direct sum.
        dropout: rate on each branch's output, in training.
        return_sequences: give every step, (batch, window_size, hidden_size).
        pool: how the steps become one vector, by the last or by their mean.
        vocab_size: number of tokens, where the input is their numbers, (batch,
            window_size), instead of features; the output is then the logits of the
            next token at every step, (batch, window_size, vocab_size).
        tie_embeddings: those logits use the matrix that embeds the tokens.
        window_size: steps of the input, None for any number.

    Raises:
        ValueError: a number in `attention_layers` is not that of a layer.
    """
    if any(i >= num_layers for i in attention_layers):
        raise ValueError(
            f"attention_layers must be below num_layers={num_layers}, "
            f"received {list(attention_layers)}"
        )
    inputs, x = sequence_input(
        window_size, embed_size, hidden_size, vocab_size, tie_embeddings
    )
    width = int(mlp_ratio * hidden_size)
    depth = (2 if width else 1) * num_layers
    for i in range(num_layers):
        if i in attention_layers:
            mixers = [_attention(num_heads, depth, f"attention_{i}")]
        else:
            mixers = [
                H3Layer(
                    state_size=state_size,
                    shift_size=shift_size,
                    head_dim=head_dim,
                    init=init,
                    discretization=discretization,
                    dt_min=dt_min,
                    dt_max=dt_max,
                    conv_mode=conv_mode,
                    depth=depth,
                    name=f"h3_{i}",
                )
            ]
        if width:
            mixers.append(H3FeedForward(width, depth, name=f"mlp_{i}"))
        for mixer in mixers:
            x = residual(x, mixer, LayerNorm, dropout=dropout)
    x = LayerNorm(name="final_norm")(x)
    return sequence_model(inputs, x, return_sequences, pool, name="h3")
