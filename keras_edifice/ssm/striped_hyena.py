"""StripedHyena: gated convolutions with modal filters, striped with attention.

    [x_2, x_1, v] = short convolution of W u,    w = x_1 ⊙ v
    y_t = Σ_{s<=t} h_{t-s} w_s,    h_l = Re Σ_n R_n p_n^l
    output = W_o (x_2 ⊙ (y + D w)) + b

Its filters are sums of decaying oscillations, so that they are recurrences too, with a
state of constant size: s_t = p s_{t-1} + w_t, y_t = Re Σ_n R_n s_n. Those of `hyena.py`
are not. The poles are p = exp(-softplus(a) + iθ), within the unit circle always.
"""

import math
from typing import Literal

import keras
from keras import initializers, ops

from keras_edifice.blocks.causal_conv import CausalConv
from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.feed_forward import GatedFFN
from keras_edifice.blocks.grouped_query_attention import GroupedQueryAttention
from keras_edifice.blocks.recurrence_initializers import fan_in_uniform, step_size_bias
from keras_edifice.blocks.rms_norm import RMSNorm
from keras_edifice.blocks.sequence import residual, sequence_input, sequence_model
from keras_edifice.model import EdificeModel
from keras_edifice.ops.state_space import modal_conv, modal_scan, modal_step
from keras_edifice.options import Positive, Rate, Size
from keras_edifice.registry import architecture


@keras.saving.register_keras_serializable("keras_edifice")
class LengthNorm(RMSNorm):
    """(..., features) -> the same, γ x / (‖x‖/√features + ε), in float32.

    An `RMSNorm` with its ε outside of the root.
    """

    def call(self, x):
        dtype, x = x.dtype, ops.cast(x, "float32")
        mean_square = ops.mean(ops.square(x), axis=-1, keepdims=True)
        # The root has a slope at zero thereby.
        y = x / (ops.sqrt(ops.maximum(mean_square, 1e-30)) + self.epsilon)
        if self.scale:
            y = y * (ops.cast(self.gamma, "float32") + float(self.zero_centered))
        return ops.cast(y, dtype)


@keras.saving.register_keras_serializable("keras_edifice")
class ModalHyena(Composite):
    """(batch, time, features) -> the same. Causal; O(1) state per step.

    The state is that of the short convolution, and s as its real and its imaginary
    part, (batch, features, state_size) each, in float32. A masked step leaves it as it
    is; padding belongs on one side, not in between. A mask together with a state takes
    the memory of the states of all steps.

    Args:
        state_size: poles of each feature's filter.
        num_heads: groups of features whose x_2, x_1 and v lie side by side in W; a
            permutation of its columns and no more.
        conv_size: taps of the short convolution.

    Raises:
        ValueError: `num_heads` does not divide the features.
    """

    def __init__(self, state_size=2, num_heads=1, conv_size=3, **kwargs):
        super().__init__(autocast=False, **kwargs)  # the state keeps its precision
        self.state_size, self.num_heads = state_size, num_heads
        self.conv_size = conv_size
        self.supports_masking = True

    def build(self, input_shape):
        self.features = features = input_shape[-1]
        if features % self.num_heads:
            raise ValueError(
                "the features must be a multiple of num_heads, received "
                f"{features} and {self.num_heads}"
            )
        self.in_proj = self._dense("in_proj", 3 * features, features)
        self.out_proj = self._dense("out_proj", features, features)
        self.conv = CausalConv(self.conv_size, dtype=self.dtype_policy, name="conv")
        self.conv.build((None, None, 3 * features))
        residues = initializers.RandomNormal(stddev=self.state_size**-0.5)
        starts = {
            "decay": step_size_bias(0.001, 0.5),
            "phase": initializers.RandomUniform(0.0, math.pi / 4),
            "R_real": residues,
            "R_imag": residues.clone(),
            "D": "zeros",
        }
        for name, start in starts.items():
            shape = (features,) if name == "D" else (features, self.state_size)
            weight = self.add_weight(shape, start, autocast=False, name=name)
            setattr(self, name, weight)

    def _dense(self, name, units, inputs):
        layer = Dense(
            units,
            kernel_initializer=fan_in_uniform(),
            dtype=self.dtype_policy,
            name=name,
        )
        layer.build((None, None, inputs))
        return layer

    def modes(self):
        """The logarithms of the poles p and the residues R.

        Returns:
            Two pairs (real part, imaginary part) of (features, state_size).
        """
        rate = -ops.softplus(self.decay), ops.convert_to_tensor(self.phase)
        R = ops.convert_to_tensor(self.R_real), ops.convert_to_tensor(self.R_imag)
        return rate, R

    def call(self, x, mask=None, initial_state=None, return_state=False):
        stateful = initial_state is not None or return_state
        short, state = (None, None) if initial_state is None else initial_state
        options = dict(mask=mask, initial_state=short, return_state=return_state)
        p = self.conv(self.in_proj(x), **options)
        p, short = p if return_state else (p, None)
        x2, w = self._gated(p)
        if mask is not None:
            w = ops.where(ops.expand_dims(mask, -1), w, ops.zeros_like(w))
        if stateful and mask is not None:
            y, state = modal_scan(w, *self.modes(), mask, state)
        else:
            y = modal_conv(w, *self.modes(), state, return_state)
            y, state = y if return_state else (y, None)
        y = self._output(y, w, x2)
        return (y, (short, state)) if return_state else y

    def _gated(self, p):
        """x_2 and w = x_1 v in float32: (..., 3 features) -> (..., features) each."""
        around, size = ops.shape(p)[:-1], self.features // self.num_heads
        p = ops.reshape(ops.cast(p, "float32"), (*around, self.num_heads, 3 * size))
        x2, x1, v = (
            ops.reshape(part, (*around, self.features))
            for part in ops.split(p, 3, axis=-1)
        )
        return x2, x1 * v

    def _output(self, y, w, x2):
        return self.out_proj(ops.cast((y + self.D * w) * x2, self.compute_dtype))

    def initial_state(self, batch_size):
        """The state before the first step: zeros."""
        shape = batch_size, self.features, self.state_size
        state = ops.zeros(shape, dtype="float32"), ops.zeros(shape, dtype="float32")
        return self.conv.initial_state(batch_size), state

    def step(self, x_t, state):
        """One step: (batch, features) and the state -> the output and the new state."""
        short, state = state
        p, short = self.conv.step(self.in_proj(x_t), short)
        x2, w = self._gated(p)
        y, state = modal_step(w, *self.modes(), state)
        return self._output(y, w, x2), (short, state)

    def compute_output_shape(self, input_shape):
        return input_shape


@architecture(
    paper="Poli et al. 2023, StripedHyena: Moving Beyond Transformers with Hybrid "
    "Signal Processing Models, Together; Massaroli et al. 2023, Laughing Hyena "
    "Distillery, arXiv:2310.18780",
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, hidden_size)",
    causal=True,
    streaming=True,
    multiples={"hidden_size": "num_heads"},
    tiny=dict(
        embed_size=3,
        hidden_size=4,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        mlp_size=5,
        window_size=7,
    ),
    variants={
        "7b": dict(
            hidden_size=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            mlp_size=14_336,
        )
    },
)
def striped_hyena(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    num_layers: Size = 4,
    attention_every: Size = 2,
    num_heads: Size = 4,
    num_kv_heads: Size | None = None,
    rope_base: Positive = 10000.0,
    state_size: Size = 2,
    conv_size: Size = 3,
    mlp_size: Size | None = None,
    norm_eps: Positive = 1e-5,
    dropout: Rate = 0.1,
    return_sequences: bool = False,
    pool: Literal["last", "mean"] = "last",
    vocab_size: Size | None = None,
    tie_embeddings: bool = False,
    window_size: Size | None = 60,
) -> EdificeModel:
    """Pre-norm residual stack of modal Hyena blocks, attention blocks and gated MLPs.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the residual stream.
        num_layers: number of blocks, each with an MLP.
        attention_every: the last of so many blocks is attention.
        num_heads: heads of the attention.
        num_kv_heads: its heads of keys and values; None for as many.
        rope_base: of the frequencies that queries and keys are turned by.
        state_size: poles of each feature's filter; 8 to 16 serve better than 2 where a
            model is trained from the start.
        conv_size: taps of the short convolution.
        mlp_size: width of the MLPs; None for 8/3 of hidden_size.
        norm_eps: epsilon of every norm, added to the length.
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
        if (i + 1) % attention_every:
            mixer = ModalHyena(state_size, num_heads, conv_size, name=f"hyena_{i}")
        else:
            mixer = GroupedQueryAttention(
                num_heads,
                num_kv_heads,
                rotary={"base": rope_base},
                kernel_initializer=fan_in_uniform(),
                name=f"attention_{i}",
            )
        for branch in (mixer, GatedFFN(mlp_size, name=f"mlp_{i}")):
            x = residual(x, branch, LengthNorm, norm_eps, dropout)
    x = LengthNorm(norm_eps, name="final_norm")(x)
    return sequence_model(inputs, x, return_sequences, pool, name="striped_hyena")
