"""Gated State Spaces: a state space on a narrow stream that gates a wide one.

    u = GELU(W_u x),    v = norm(GELU(W_v x)),    y = k * v + D v
    output = W_o ((W_y y) ⊙ u) + b
    k_l = Re Σ_n C_n (e^(Λ_n) - 1) / Λ_n e^(l Λ_n),    Λ = -exp(a) + i exp(b)

The N poles Λ are shared by all features, C and D are not; the step is one. All four
start standard normal: the paper's point is that no other start is needed.
"""

from typing import Literal

import keras
from keras import initializers, ops

from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.grouped_query_attention import GroupedQueryAttention
from keras_edifice.blocks.layer_norm import LayerNorm
from keras_edifice.blocks.recurrence_initializers import fan_in_uniform
from keras_edifice.blocks.sequence import residual, sequence_input, sequence_model
from keras_edifice.model import EdificeModel
from keras_edifice.ops.gelu import gelu
from keras_edifice.ops.state_space import (
    diagonal_modes,
    modal_conv,
    modal_scan,
    modal_step,
)
from keras_edifice.options import Count, Positive, Rate, Size
from keras_edifice.registry import architecture


@keras.saving.register_keras_serializable("keras_edifice")
class GSSLayer(Composite):
    """(batch, time, features) -> the same. Causal; O(1) state per step.

    The state is h as its real and its imaginary part, (batch, ssm_size, state_size)
    each, in float32. A masked step leaves it as it is. A mask together with a state
    takes the memory of the states of all steps.

    Args:
        ssm_size: width of the narrow stream; None for features / 4.
        state_size: N, number of poles.
        expand_factor: width of the wide stream relative to that of the input.
        exp_imag: whether the imaginary parts of the poles are exp(b) instead of b.
        inner_norm: whether v is normalised before the state space.
        norm_eps: of that norm.
    """

    def __init__(
        self,
        ssm_size=None,
        state_size=64,
        expand_factor=4,
        exp_imag=True,
        inner_norm=True,
        norm_eps=1e-5,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)  # the state keeps its precision
        self.ssm_size, self.state_size = ssm_size, state_size
        self.expand_factor, self.exp_imag = expand_factor, exp_imag
        self.inner_norm, self.norm_eps = inner_norm, norm_eps
        self.supports_masking = True

    def build(self, input_shape):
        features = input_shape[-1]
        self.width = width = self.ssm_size or max(1, features // 4)
        wide = self.expand_factor * features
        self.u_proj = self._dense("u_proj", wide, features)
        self.v_proj = self._dense("v_proj", width, features)
        self.y_proj = self._dense("y_proj", wide, width)
        self.out_proj = self._dense("out_proj", features, wide, use_bias=True)
        if self.inner_norm:
            self.norm = LayerNorm(self.norm_eps, dtype=self.dtype_policy, name="norm")
            self.norm.build((None, None, width))
        poles = (self.state_size,)
        shapes = {"Lambda_real": poles, "Lambda_imag": poles}
        shapes |= {"C_real": (width, *poles), "C_imag": (width, *poles), "D": (width,)}
        for name, shape in shapes.items():
            start = initializers.RandomNormal(stddev=1.0)
            weight = self.add_weight(shape, start, autocast=False, name=name)
            setattr(self, name, weight)

    def _dense(self, name, units, inputs, use_bias=False):
        layer = Dense(
            units,
            use_bias=use_bias,
            kernel_initializer=fan_in_uniform(),
            dtype=self.dtype_policy,
            name=name,
        )
        layer.build((None, None, inputs))
        return layer

    def modes(self):
        """Rates r and weights w of the kernel k_l = Re Σ_n w_n e^{l r_n}.

        Returns:
            Pairs (real part, imaginary part) of (1, state_size) and of (ssm_size,
            state_size).
        """
        real, imag = self.Lambda_real, self.Lambda_imag
        imag = ops.exp(imag) if self.exp_imag else ops.convert_to_tensor(imag)
        Lambda = ops.expand_dims(-ops.exp(real), 0), ops.expand_dims(imag, 0)
        B = ops.ones_like(Lambda[0]), ops.zeros_like(Lambda[0])
        C = ops.convert_to_tensor(self.C_real), ops.convert_to_tensor(self.C_imag)
        return diagonal_modes(Lambda, B, C, 1.0, conjugates=False)

    def call(self, x, mask=None, initial_state=None, return_state=False):
        v = self._narrow(x)
        if mask is not None:
            v = ops.where(ops.expand_dims(mask, -1), v, ops.zeros_like(v))
        state = None
        if mask is not None and (return_state or initial_state is not None):
            y, state = modal_scan(v, *self.modes(), mask, initial_state)
        else:
            y = modal_conv(v, *self.modes(), initial_state, return_state)
            y, state = y if return_state else (y, None)
        y = self._output(y, v, x)
        return (y, state) if return_state else y

    def _narrow(self, x):
        """v, in float32."""
        v = gelu(self.v_proj(x))
        return ops.cast(self.norm(v) if self.inner_norm else v, "float32")

    def _output(self, y, v, x):
        y = ops.cast(y + self.D * v, self.compute_dtype)
        return self.out_proj(self.y_proj(y) * gelu(self.u_proj(x)))

    def initial_state(self, batch_size):
        """The state before the first step: zeros."""
        shape = (batch_size, self.width, self.state_size)
        return ops.zeros(shape, dtype="float32"), ops.zeros(shape, dtype="float32")

    def step(self, x_t, state):
        """One step: (batch, features) and the state -> the output and the new state."""
        v = self._narrow(x_t)
        y, state = modal_step(v, *self.modes(), state)
        return self._output(y, v, x_t), state

    def compute_output_shape(self, input_shape):
        return input_shape


@architecture(
    paper="Mehta et al. 2022, Long Range Language Modeling via Gated State Spaces, "
    "arXiv:2206.13947",
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, hidden_size)",
    causal=True,
    streaming=True,
    tiny=dict(
        embed_size=3,
        hidden_size=4,
        ssm_size=2,
        state_size=3,
        expand_factor=2,
        num_layers=2,
        attention_every=2,
        num_heads=2,
        attention_window=3,
        window_size=7,
    ),
)
def gss(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    ssm_size: Size | None = None,
    state_size: Size = 64,
    expand_factor: Size = 4,
    num_layers: Size = 4,
    exp_imag: bool = True,
    inner_norm: bool = True,
    attention_every: Count = 0,
    num_heads: Size = 4,
    attention_window: Size | None = 512,
    norm_eps: Positive = 1e-5,
    dropout: Rate = 0.0,
    return_sequences: bool = False,
    pool: Literal["last", "mean"] = "last",
    vocab_size: Size | None = None,
    tie_embeddings: bool = True,
    window_size: Size | None = 60,
) -> EdificeModel:
    """Pre-norm residual stack of gated state spaces, with attention if asked.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the residual stream.
        ssm_size: width of the state spaces; None for hidden_size / 4.
        state_size: poles of each layer, shared by its features.
        expand_factor: width of the gated stream relative to hidden_size.
        num_layers: number of state space layers.
        exp_imag: the imaginary parts of the poles are exponentials of their weights.
        inner_norm: normalise the input of the state space.
        attention_every: a layer of local attention with rotary positions comes after
            as many state space layers, the hybrid of the paper; 0 for none.
        num_heads: heads of that attention.
        attention_window: tokens that it sees, its own included; None for all before.
        norm_eps: epsilon of every LayerNorm.
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
        mixers = [
            GSSLayer(
                ssm_size=ssm_size,
                state_size=state_size,
                expand_factor=expand_factor,
                exp_imag=exp_imag,
                inner_norm=inner_norm,
                norm_eps=norm_eps,
                name=f"gss_{i}",
            )
        ]
        if attention_every and (i + 1) % attention_every == 0:
            mixers.append(
                GroupedQueryAttention(
                    num_heads,
                    attention_window=attention_window,
                    rotary={"base": 10000.0},
                    name=f"attention_{i}",
                )
            )
        for mixer in mixers:
            x = residual(x, mixer, LayerNorm, norm_eps, dropout)
    x = LayerNorm(norm_eps, name="final_norm")(x)
    return sequence_model(inputs, x, return_sequences, pool, name="gss")
