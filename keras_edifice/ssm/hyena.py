"""Hyena: long convolutions whose filters are functions of time, between gates.

    [x_0, .. x_{N-1}, v] = short convolution of W u
    v ← h_o * (v ⊙ x_{N-1-o}) + b_o ⊙ (v ⊙ x_{N-1-o}),    o = 0 .. N-2
    output = W_o (v ⊙ x_0)
    h(t) = (MLP(z(t))) ⊙ (e^{-|δ| t} + shift),    φ(a) = sin(ω ⊙ a) in the MLP
    z(t) = [t, cos f_1 τ, .. -sin f_1 τ, ..],    t from 0 to 1, τ = 2π n / L

The paper counts N convolutions; as in its code the short one is the first of them, and
N - 1 are long. Compare `h3.py`, where state spaces take the place of the filters.
"""

import math
from typing import Annotated, Literal

import keras
import numpy as np
from keras import initializers, layers, ops

from keras_edifice.blocks.causal_conv import CausalConv
from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.layer_norm import LayerNorm
from keras_edifice.blocks.recurrence_initializers import fan_in_uniform
from keras_edifice.blocks.sequence import residual, sequence_input, sequence_model
from keras_edifice.model import EdificeModel
from keras_edifice.ops.long_conv import MODES, long_conv, long_conv_step
from keras_edifice.ops.tracing import static_length
from keras_edifice.options import (
    NonNegative,
    Positive,
    Range,
    Rate,
    Size,
    check,
)
from keras_edifice.registry import architecture
from keras_edifice.ssm.h3 import H3FeedForward

ConvMode = Literal[MODES]
Order = Annotated[int, Range(2)]
Bands = Annotated[int, Range(3)]
Target = Annotated[float, Range(0.0, 1.0, open_low=True)]


@keras.saving.register_keras_serializable("keras_edifice")
class HyenaFilter(layers.Layer):
    """No input -> `taps`, (max_length, features) in float32: functions of time.

    Its weights want no weight decay.

    Args:
        features: number of filters.
        max_length: L, number of taps.
        filter_size: width of the MLP.
        filter_emb: features of the time, odd: itself, and cosines and sines.
        filter_layers: hidden layers of the MLP after the first.
        filter_freq: ω at the start.
        modulate: whether the filters fall off with time.
        fast_decay_pct: part of the time after which the last feature's window is
            `decay_target`.
        slow_decay_pct: the same of the first feature.
        decay_target: height of the window that these are about.
        decay_shift: added to the window.

    Raises:
        ValueError: `filter_emb` is even or below 3.
    """

    def __init__(
        self,
        features,
        max_length,
        filter_size=64,
        filter_emb=33,
        filter_layers=2,
        filter_freq=14.0,
        modulate=True,
        fast_decay_pct=0.3,
        slow_decay_pct=1.5,
        decay_target=1e-2,
        decay_shift=0.0,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        if filter_emb < 3 or filter_emb % 2 == 0:
            raise ValueError(
                "filter_emb must be odd and at least 3: the time, and as many cosines "
                f"as sines; received {filter_emb}"
            )
        self.features, self.max_length = features, max_length
        self.filter_size, self.filter_emb = filter_size, filter_emb
        self.filter_layers, self.filter_freq = filter_layers, filter_freq
        self.modulate, self.fast_decay_pct = modulate, fast_decay_pct
        self.slow_decay_pct, self.decay_target = slow_decay_pct, decay_target
        self.decay_shift = decay_shift

    def build(self, input_shape=None):
        width = self.filter_size
        shape = self.max_length, self.filter_emb
        self.z = self._weight("z", shape, initializers.Constant(_times(*shape)))
        self.kernels, self.biases = [], []
        for i in range(self.filter_layers + 1):
            inputs = width if i else self.filter_emb
            bound = inputs**-0.5
            self.kernels.append(
                self._weight(f"kernel_{i}", (inputs, width), fan_in_uniform())
            )
            start = initializers.RandomUniform(-bound, bound)
            self.biases.append(self._weight(f"bias_{i}", (width,), start))
        start = initializers.Constant(self.filter_freq)
        self.freq = self._weight("freq", (width,), start)
        shape = width, self.features
        self.out_kernel = self._weight("out_kernel", shape, fan_in_uniform())

    def _weight(self, name, shape, initializer):
        return self.add_weight(shape, initializer, autocast=False, name=name)

    def window(self):
        """e^{-|δ| t} + shift, (max_length, features) in NumPy."""
        slow = math.log(self.decay_target) / self.slow_decay_pct
        fast = math.log(self.decay_target) / self.fast_decay_pct
        delta = np.abs(np.linspace(slow, fast, self.features))
        t = np.linspace(0.0, 1.0, self.max_length)[:, None]
        return (np.exp(-t * delta) + self.decay_shift).astype("float32")

    def taps(self, length=None):
        """The first `length` taps, all max_length if None: (taps, features)."""
        h = ops.convert_to_tensor(self.z)[:length]
        for kernel, bias in zip(self.kernels, self.biases, strict=True):
            h = ops.sin(self.freq * (ops.matmul(h, kernel) + bias))
        h = ops.matmul(h, self.out_kernel)
        if not self.modulate:
            return h
        return h * ops.convert_to_tensor(self.window()[:length])


def _times(length, features):
    """What z starts from, (length, features)."""
    t = np.linspace(0.0, 1.0, length)[:, None]
    bands = (features - 1) // 2
    frequencies = np.linspace(1e-4, bands - 1, bands)
    angles = 2 * np.pi * np.arange(length)[:, None] / length * frequencies
    z = np.concatenate([t, np.cos(angles), -np.sin(angles)], axis=1)
    return z.astype("float32")


@keras.saving.register_keras_serializable("keras_edifice")
class HyenaOperator(Composite):
    """(batch, time, features) -> the same. Causal; O(max_length) state and step.

    The state is that of the short convolution, and for each long one its last
    max_length - 1 inputs, (batch, order - 1, max_length - 1, features) in float32: all
    that its filter reaches, so that a stream may go on for longer. A masked step leaves
    it as it is; without a state padding belongs on one side, not in between.

    Args:
        max_length: taps of the long filters. What is further back counts for nothing.
        order: N, number of products; N - 1 convolutions are long.
        conv_size: taps of the short convolution.
        conv_mode: "fft" or "direct", see `long_conv`.
        filter_options: further options of the `HyenaFilter`; None for none.
    """

    def __init__(
        self,
        max_length,
        order=2,
        conv_size=3,
        conv_mode="fft",
        filter_options=None,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)  # the state keeps its precision
        self.max_length, self.conv_size = max_length, conv_size
        self.order = check(Order, "order", order)
        self.conv_mode = check(ConvMode, "conv_mode", conv_mode)
        self.filter_options = filter_options
        self.supports_masking = True

    def build(self, input_shape):
        self.features = features = input_shape[-1]
        width = (self.order + 1) * features
        self.in_proj = self._dense("in_proj", width, features)
        self.out_proj = self._dense("out_proj", features, features)
        self.conv = CausalConv(self.conv_size, dtype=self.dtype_policy, name="conv")
        self.conv.build((None, None, width))
        self.filter = HyenaFilter(
            (self.order - 1) * features,
            self.max_length,
            **(self.filter_options or {}),
            dtype="float32",
            name="filter",
        )
        self.filter.build()
        self.bias = self.add_weight(
            (self.order - 1, features),
            initializers.RandomNormal(stddev=1.0),
            autocast=False,
            name="bias",
        )

    def _dense(self, name, units, inputs):
        bound = inputs**-0.5
        layer = Dense(
            units,
            kernel_initializer=fan_in_uniform(),
            bias_initializer=initializers.RandomUniform(-bound, bound),
            dtype=self.dtype_policy,
            name=name,
        )
        layer.build((None, None, inputs))
        return layer

    def call(self, x, mask=None, initial_state=None, return_state=False):
        stateful = initial_state is not None or return_state
        sort = stateful and mask is not None  # no gaps between inputs and the state
        if sort:
            places = _valid_first(mask)
            x, mask = _taken(x, places), _taken(mask, places)
        short, past = (None, None) if initial_state is None else initial_state
        options = dict(mask=mask, initial_state=short, return_state=return_state)
        p = self.conv(self.in_proj(x), **options)
        p, short = p if return_state else (p, None)
        first, *gates, v = self._split(p)
        taps = self._taps(None if stateful else static_length(x))
        kept = []
        for o, gate in enumerate(reversed(gates)):
            v = v * gate
            if mask is not None:
                v = ops.where(ops.expand_dims(mask, -1), v, ops.zeros_like(v))
            before = None if past is None else past[:, o]
            if return_state:
                kept.append(self._last(v, before, mask))
            v = long_conv(v, taps[o], before, mode=self.conv_mode) + self.bias[o] * v
        y = self.out_proj(ops.cast(v * first, self.compute_dtype))
        if sort:
            y = _taken(y, ops.argsort(places, axis=1))
        return (y, (short, ops.stack(kept, axis=1))) if return_state else y

    def _split(self, p):
        """x_0, x_1, .. v in float32."""
        return ops.split(ops.cast(p, "float32"), self.order + 1, axis=-1)

    def _taps(self, length=None):
        """The filter of each long convolution: [(taps, features), ...]."""
        return ops.split(self.filter.taps(length), self.order - 1, axis=-1)

    def _last(self, v, before, mask):
        """The last max_length - 1 inputs of a convolution, of those not masked."""
        batch, time, kept = ops.shape(v)[0], ops.shape(v)[1], self.max_length - 1
        if before is None:
            before = ops.zeros((batch, kept, self.features), dtype=v.dtype)
        seen = ops.concatenate([before, v], axis=1)
        if mask is None:
            return seen[:, time:]
        count = ops.sum(ops.cast(mask, "int32"), axis=1, keepdims=True)
        places = ops.expand_dims(ops.arange(0, kept, dtype="int32"), 0)
        return _taken(seen, count + places)

    def initial_state(self, batch_size):
        """The state before the first step: zeros."""
        shape = batch_size, self.order - 1, self.max_length - 1, self.features
        return self.conv.initial_state(batch_size), ops.zeros(shape, dtype="float32")

    def step(self, x_t, state):
        """One step: (batch, features) and the state -> the output and the new state."""
        short, past = state
        p, short = self.conv.step(self.in_proj(x_t), short)
        first, *gates, v = self._split(p)
        taps, kept = self._taps(), []
        for o, gate in enumerate(reversed(gates)):
            v = v * gate
            y, seen = long_conv_step(v, taps[o], past[:, o])
            kept.append(seen)
            v = y + self.bias[o] * v
        y = self.out_proj(ops.cast(v * first, self.compute_dtype))
        return y, (short, ops.stack(kept, axis=1))

    def compute_output_shape(self, input_shape):
        return input_shape


def _valid_first(mask):
    """The order of the steps of each row, (batch, time), with the masked ones last."""
    time = ops.shape(mask)[1]
    step = ops.expand_dims(ops.arange(0, time, dtype="int32"), 0)
    return ops.argsort(ops.where(mask, step, step + time), axis=1)


def _taken(x, places):
    """The steps of x at the places of each row, (batch, steps)."""
    places = ops.reshape(places, (*ops.shape(places), *(1,) * (len(x.shape) - 2)))
    return ops.take_along_axis(x, places, axis=1)


@architecture(
    paper="Poli et al. 2023, Hyena Hierarchy: Towards Larger Convolutional Language "
    "Models, arXiv:2302.10866",
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, hidden_size)",
    causal=True,
    streaming=True,
    tiny=dict(
        embed_size=3,
        hidden_size=4,
        order=3,
        filter_size=5,
        filter_emb=5,
        filter_layers=1,
        mlp_ratio=1.5,
        num_layers=1,
        max_length=512,
        window_size=7,
    ),
    variants={"small": dict(hidden_size=864, num_layers=18, window_size=2048)},
)
def hyena(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    order: Order = 2,
    filter_size: Size = 64,
    filter_emb: Bands = 33,
    filter_layers: Size = 2,
    filter_freq: Positive = 14.0,
    conv_size: Size = 3,
    modulate: bool = True,
    fast_decay_pct: Positive = 0.3,
    slow_decay_pct: Positive = 1.5,
    decay_target: Target = 0.01,
    decay_shift: NonNegative = 0.0,
    mlp_ratio: NonNegative = 2.0,
    num_layers: Size = 4,
    conv_mode: ConvMode = "fft",
    dropout: Rate = 0.1,
    max_length: Size | None = None,
    return_sequences: bool = False,
    pool: Literal["last", "mean"] = "last",
    vocab_size: Size | None = None,
    tie_embeddings: bool = True,
    window_size: Size | None = 60,
) -> EdificeModel:
    """Pre-norm residual stack of Hyena operators and MLPs.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the residual stream.
        order: products of each operator; one less are its long convolutions.
        filter_size: width of the MLP that makes the filters.
        filter_emb: features of the time that it sees, odd.
        filter_layers: its hidden layers after the first.
        filter_freq: frequency of its sines at the start.
        conv_size: taps of the short convolution.
        modulate: let the filters fall off with time.
        fast_decay_pct: part of max_length in which the fastest filter falls to
            decay_target.
        slow_decay_pct: the same of the slowest.
        decay_target: height that these two options are about.
        decay_shift: height at which filters end, at the least.
        mlp_ratio: width of the MLP after each operator, relative to hidden_size; 0 for
            none.
        num_layers: number of operators.
        conv_mode: convolve by Fourier transforms or by the direct sum.
        dropout: rate on each branch's output, in training.
        max_length: taps of the filters, the steps that they reach back; None for
            window_size.
        return_sequences: give every step, (batch, window_size, hidden_size).
        pool: how the steps become one vector, by the last or by their mean.
        vocab_size: number of tokens, where the input is their numbers, (batch,
            window_size), instead of features; the output is then the logits of the
            next token at every step, (batch, window_size, vocab_size).
        tie_embeddings: those logits use the matrix that embeds the tokens.
        window_size: steps of the input, None for any number.

    Raises:
        ValueError: neither `max_length` nor `window_size` is given; `filter_emb` is
            even.
    """
    if max_length is None and window_size is None:
        raise ValueError(
            "the filters need a length: give max_length where window_size is None, "
            "received neither"
        )
    inputs, x = sequence_input(
        window_size, embed_size, hidden_size, vocab_size, tie_embeddings
    )
    filter_options = dict(
        filter_size=filter_size,
        filter_emb=filter_emb,
        filter_layers=filter_layers,
        filter_freq=filter_freq,
        modulate=modulate,
        fast_decay_pct=fast_decay_pct,
        slow_decay_pct=slow_decay_pct,
        decay_target=decay_target,
        decay_shift=decay_shift,
    )
    width = int(mlp_ratio * hidden_size)
    for i in range(num_layers):
        mixers = [
            HyenaOperator(
                max_length or window_size,
                order=order,
                conv_size=conv_size,
                conv_mode=conv_mode,
                filter_options=filter_options,
                name=f"hyena_{i}",
            )
        ]
        if width:
            mixers.append(H3FeedForward(width, name=f"mlp_{i}"))
        for mixer in mixers:
            x = residual(x, mixer, LayerNorm, dropout=dropout)
    x = LayerNorm(name="final_norm")(x)
    return sequence_model(inputs, x, return_sequences, pool, name="hyena")
