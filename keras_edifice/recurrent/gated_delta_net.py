"""Gated DeltaNet: the delta rule on a memory that also forgets.

    α_t = exp(g_t),    g_t = -exp(A_log) softplus(W_a x_t + b_dt), one for each head
    S̄_t = α_t S_{t-1},    S_t = S̄_t + β_t k_t (v_t - S̄_tᵀ k_t)ᵀ,    o_t = S_tᵀ q_t
    output = W_o (RMSNorm(o) ⊙ SiLU(W_g x))

The decay comes first: what is corrected is the error of the decayed memory. Read
`delta_net.py` first, for q, k, v and β.
"""

from typing import Literal

import keras
from keras import ops

from keras_edifice.blocks.feed_forward import GatedFFN
from keras_edifice.blocks.recurrence_initializers import (
    log_of_uniform,
    step_size_bias,
)
from keras_edifice.blocks.rms_norm import RMSNorm
from keras_edifice.blocks.sequence import residual, sequence_input, sequence_model
from keras_edifice.model import EdificeModel
from keras_edifice.options import Count, NonNegative, Positive, Rate, Size
from keras_edifice.recurrent.delta_net import (
    DeltaNetLayer,
    QKActivation,
    QKNorm,
    whole,
)
from keras_edifice.registry import architecture

SMALLEST_RATE = 0.01
"""exp(A_log) is not below this at the start, for the logarithm of 0 is none."""


@keras.saving.register_keras_serializable("keras_edifice")
class GatedDeltaNetLayer(DeltaNetLayer):
    """(batch, time, features) -> the same. Causal; O(1) state per step.

    The state is that of `DeltaNetLayer`, with num_v_heads memories.

    Args:
        num_heads: number of queries and of keys.
        head_dim: d_k, width of a key; None for 3/4 features / num_heads.
        expand_v: width of a value, relative to head_dim.
        num_v_heads: number of values and memories, a multiple of num_heads: each query
            and key serves as many, one after the other; None for num_heads.
        conv_size: as in `DeltaNetLayer`.
        qk_activation: as in `DeltaNetLayer`.
        qk_norm: as in `DeltaNetLayer`.
        use_gate: as in `DeltaNetLayer`.
        allow_neg_eigval: as in `DeltaNetLayer`.
        dt_min: smallest softplus(b_dt) at the start.
        dt_max: largest softplus(b_dt) at the start.
        dt_init_floor: softplus(b_dt) at the start is not below this.
        a_init_range: exp(A_log) starts uniform between these two, but not below 0.01.
        chunk_size: as in `DeltaNetLayer`.
        norm_eps: as in `DeltaNetLayer`.

    Raises:
        ValueError: as in `DeltaNetLayer`; num_v_heads is no multiple of num_heads;
            a_init_range is not two rising numbers.
    """

    def __init__(
        self,
        num_heads=4,
        head_dim=None,
        expand_v=2.0,
        num_v_heads=None,
        conv_size=4,
        qk_activation="silu",
        qk_norm="l2",
        use_gate=True,
        allow_neg_eigval=False,
        dt_min=0.001,
        dt_max=0.1,
        dt_init_floor=1e-4,
        a_init_range=(0.0, 16.0),
        chunk_size=64,
        norm_eps=1e-5,
        **kwargs,
    ):
        super().__init__(
            num_heads,
            expand_v=expand_v,
            conv_size=conv_size,
            qk_activation=qk_activation,
            qk_norm=qk_norm,
            use_gate=use_gate,
            allow_neg_eigval=allow_neg_eigval,
            chunk_size=chunk_size,
            norm_eps=norm_eps,
            **kwargs,
        )
        if num_v_heads is not None and num_v_heads % num_heads:
            raise ValueError(
                "num_v_heads must be a multiple of num_heads, received "
                f"{num_v_heads} and {num_heads}"
            )
        if len(a_init_range) != 2 or not 0 <= a_init_range[0] <= a_init_range[1]:
            raise ValueError(
                "a_init_range must be two numbers, not negative and rising, received "
                f"{list(a_init_range)}"
            )
        self.head_dim, self.num_v_heads = head_dim, num_v_heads
        self.dt_min, self.dt_max = dt_min, dt_max
        self.dt_init_floor, self.a_init_range = dt_init_floor, a_init_range

    def _sizes(self, features):
        heads, size = self.num_heads, self.head_dim
        if size is None:
            what = f"head_dim = 3/4 * {features} / {heads}"
            size = whole(what, 0.75 * features / heads, "num_heads, or pass head_dim")
        self.key_size, self.value_heads = size, self.num_v_heads or heads
        what = f"expand_v * {size}"
        self.value_size = whole(what, self.expand_v * size, "expand_v or head_dim")

    def build(self, input_shape):
        super().build(input_shape)
        heads = self.value_heads
        self.a_proj = self._dense("a_proj", heads, input_shape[-1])
        bias = step_size_bias(self.dt_min, self.dt_max, self.dt_init_floor)
        rate = log_of_uniform(*(max(a, SMALLEST_RATE) for a in self.a_init_range))
        # Decays in float32 also where the layer computes in half precision.
        self.dt_bias = self.add_weight((heads,), bias, autocast=False, name="dt_bias")
        self.A_log = self.add_weight((heads,), rate, autocast=False, name="A_log")

    def _heads(self, q, k, v):
        q, k, v = super()._heads(q, k, v)
        served = self.value_heads // self.num_heads
        if served > 1:
            q, k = (ops.repeat(z, served, axis=-2) for z in (q, k))
        return q, k, v

    def _gates(self, x):
        """β and the log-decay g of each head, in float32."""
        beta, _ = super()._gates(x)
        dt = ops.softplus(ops.cast(self.a_proj(x), "float32") + self.dt_bias)
        return beta, -ops.exp(self.A_log) * dt


@architecture(
    paper="Yang, Kautz & Hatamizadeh 2024, Gated Delta Networks: Improving Mamba2 with "
    "Delta Rule, arXiv:2412.06464",
    title="Gated DeltaNet",
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, hidden_size)",
    causal=True,
    streaming=True,
    multiples={"num_v_heads": "num_heads"},
    tiny=dict(
        embed_size=3,
        hidden_size=4,
        num_heads=2,
        head_dim=2,
        num_v_heads=4,
        expand_v=1.5,
        num_layers=1,
        chunk_size=4,
        window_size=7,
    ),
    variants={"1.3b": dict(hidden_size=2048, num_heads=6, num_layers=21)},
)
def gated_delta_net(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    num_heads: Size = 4,
    head_dim: Size | None = None,
    expand_v: Positive = 2.0,
    num_v_heads: Size | None = None,
    num_layers: Size = 4,
    conv_size: Count = 4,
    qk_activation: QKActivation = "silu",
    qk_norm: QKNorm = "l2",
    use_gate: bool = True,
    allow_neg_eigval: bool = False,
    dt_min: Positive = 0.001,
    dt_max: Positive = 0.1,
    dt_init_floor: Positive = 1e-4,
    a_init_range: list[NonNegative] = [0.0, 16.0],
    mlp_ratio: NonNegative = 4.0,
    chunk_size: Size = 64,
    norm_eps: Positive = 1e-5,
    dropout: Rate = 0.1,
    return_sequences: bool = False,
    pool: Literal["last", "mean"] = "last",
    vocab_size: Size | None = None,
    tie_embeddings: bool = False,
    window_size: Size | None = 60,
) -> EdificeModel:
    """Pre-norm residual stack of decaying delta rule memories and feed-forwards.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the residual stream.
        num_heads: queries and keys of each layer.
        head_dim: width of a key; None for 3/4 hidden_size / num_heads.
        expand_v: width of a value relative to that of a key.
        num_v_heads: values and memories of each layer, a multiple of num_heads; None
            for as many.
        num_layers: number of layers of memories, each with its feed-forward.
        conv_size: taps of the convolutions on queries, keys and values; 0 for none.
        qk_activation: function of queries and keys, elu(x) + 1 for "elu".
        qk_norm: divide queries and keys by their lengths, or by the sums of their
            features, which takes the activation "relu" or "elu".
        use_gate: a gate on the output of each memory.
        allow_neg_eigval: let a memory change sign along a key, by β up to 2.
        dt_min: smallest step size of the decay at the start.
        dt_max: largest step size of the decay at the start.
        dt_init_floor: no step size is below this at the start.
        a_init_range: rates of the decay start uniform between these two, but not
            below 0.01.
        mlp_ratio: width of the feed-forwards relative to hidden_size, before the two
            thirds that their gate costs; rounded up to a multiple of 256, of 8 for a
            hidden_size below 256. 0 for none.
        chunk_size: steps that are computed side by side; changes no number.
        norm_eps: epsilon of every RMSNorm.
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
        mixer = GatedDeltaNetLayer(
            num_heads=num_heads,
            head_dim=head_dim,
            expand_v=expand_v,
            num_v_heads=num_v_heads,
            conv_size=conv_size,
            qk_activation=qk_activation,
            qk_norm=qk_norm,
            use_gate=use_gate,
            allow_neg_eigval=allow_neg_eigval,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            a_init_range=a_init_range,
            chunk_size=chunk_size,
            norm_eps=norm_eps,
            name=f"gated_delta_net_{i}",
        )
        x = residual(x, mixer, epsilon=norm_eps, dropout=dropout)
        if mlp_ratio:
            ffn = GatedFFN(
                expansion=mlp_ratio,
                multiple_of=256 if hidden_size >= 256 else 8,
                stddev=0.02,
                name=f"ffn_{i}",
            )
            x = residual(x, ffn, epsilon=norm_eps, dropout=dropout)
    x = RMSNorm(norm_eps, name="final_norm")(x)
    return sequence_model(inputs, x, return_sequences, pool, name="gated_delta_net")
