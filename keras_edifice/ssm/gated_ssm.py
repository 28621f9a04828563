"""Gated state space: Mamba as a gate between what was and what is.

    g_t = σ(x_t W_1 W_2 + b),    r_n = n,    n = 1 .. N
    h_tn = (1 - g_t)^(r_n) h_(t-1)n + (1 - (1 - g_t)^(r_n)) / r_n B_tn x_t
    y_t = Σ_n C_tn h_tn + D x_t

Theorem 1 of Gu & Dao 2023, Mamba, arXiv:2312.00752, extended to N states. Since
1 - g = exp(-softplus(u)) for g = σ(u), it is the zero-order hold of a state space with
A = -r and Δ = softplus(u). Read `mamba.py` first, for x, B, C and what is around.
"""

from typing import Literal

import keras
from keras import ops

from keras_edifice.blocks.rms_norm import RMSNorm
from keras_edifice.blocks.sequence import residual, sequence_input, sequence_model
from keras_edifice.model import EdificeModel
from keras_edifice.options import Rate, Size
from keras_edifice.registry import architecture
from keras_edifice.ssm.mamba import MambaBlock


@keras.saving.register_keras_serializable("keras_edifice")
class GatedSSMBlock(MambaBlock):
    """(batch, time, features) -> the same. Causal; O(1) state per step.

    The state is that of `MambaBlock`.

    Args:
        state_size: N, numbers that each channel remembers.
        expand_factor: width of the recurrence relative to that of the input.
        conv_size: taps of the convolution.
        learn_rates: whether the r_n of each channel are learned.
        unit_bc: whether B and C are ones instead of selected by the token.
        depth: number of such blocks in the model; W_out starts divided by its root.
    """

    def __init__(
        self,
        state_size=16,
        expand_factor=2,
        conv_size=4,
        learn_rates=False,
        unit_bc=False,
        depth=1,
        **kwargs,
    ):
        super().__init__(
            state_size,
            expand_factor,
            conv_size,
            discretization="zoh",
            depth=depth,
            **kwargs,
        )
        self.learn_rates, self.unit_bc = learn_rates, unit_bc

    def _selected(self):
        return self.rank if self.unit_bc else super()._selected()

    def _build_recurrence(self, width, size):
        super()._build_recurrence(width, size)
        self.A_log.trainable = self.learn_rates

    def _select(self, x):
        """softplus(u) in float32, B and C of each step."""
        if not self.unit_bc:
            return super()._select(x)
        dt = ops.cast(self.dt_proj(self.x_proj(x)), "float32")
        ones = ops.ones((*ops.shape(x)[:-1], self.state_size), dtype="float32")
        return ops.softplus(dt + self.dt_bias), ones, ones


@architecture(
    paper="Gu & Dao 2023, Mamba: Linear-Time Sequence Modeling with Selective State "
    "Spaces, arXiv:2312.00752, theorem 1",
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, hidden_size)",
    causal=True,
    streaming=True,
    tiny=dict(
        embed_size=3,
        hidden_size=4,
        state_size=3,
        num_layers=1,
        learn_rates=True,
        dropout=0.1,
        window_size=7,
    ),
)
def gated_ssm(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    state_size: Size = 16,
    expand_factor: Size = 2,
    conv_size: Size = 4,
    num_layers: Size = 2,
    learn_rates: bool = False,
    unit_bc: bool = False,
    dropout: Rate = 0.0,
    return_sequences: bool = False,
    pool: Literal["last", "mean"] = "last",
    vocab_size: Size | None = None,
    tie_embeddings: bool = True,
    window_size: Size | None = 60,
) -> EdificeModel:
    """Pre-norm residual stack of gated state spaces.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the residual stream.
        state_size: numbers that each channel remembers, at rates 1, 2, 3 and so on.
        expand_factor: width of the recurrence relative to hidden_size.
        conv_size: taps of the convolution before the recurrence.
        num_layers: number of blocks.
        learn_rates: the rates of each channel are learned.
        unit_bc: every state takes the input and gives the output as it is; with
            state_size=1 the recurrence is h = (1 - g) h + g x.
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
        block = GatedSSMBlock(
            state_size=state_size,
            expand_factor=expand_factor,
            conv_size=conv_size,
            learn_rates=learn_rates,
            unit_bc=unit_bc,
            depth=num_layers,
            name=f"gated_ssm_{i}",
        )
        x = residual(x, block, dropout=dropout)
    x = RMSNorm(1e-5, name="final_norm")(x)
    return sequence_model(inputs, x, return_sequences, pool, name="gated_ssm")
