"""DeltaNet: linear attention whose memory is corrected instead of only added to.

    q, k, v = SiLU(conv(W_q x)), SiLU(conv(W_k x)), SiLU(conv(W_v x))
    q ← q / (|q| √d_k),    k ← k / |k|,    β = σ(W_β x), one number for each head
    S_t = S_{t-1} + β_t k_t (v_t - S_{t-1}ᵀ k_t)ᵀ,    o_t = S_tᵀ q_t
    output = W_o RMSNorm(o)

The recurrence is `delta_rule` of `ops/delta_rule.py`, in the chunks of Yang et al.
2024, Parallelizing Linear Transformers with the Delta Rule, arXiv:2406.06484.
`gated_delta_net.py` lets the memory decay as well.
"""

import math
from typing import Literal

import keras
from keras import ops

from keras_edifice.blocks.causal_conv import CausalConv
from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.feed_forward import GatedFFN
from keras_edifice.blocks.gated_rms_norm import GatedRMSNorm
from keras_edifice.blocks.rms_norm import RMSNorm
from keras_edifice.blocks.sequence import residual, sequence_input, sequence_model
from keras_edifice.model import EdificeModel
from keras_edifice.ops.delta_rule import delta_rule, delta_rule_step
from keras_edifice.options import Count, NonNegative, Positive, Rate, Size, check
from keras_edifice.registry import architecture

QKActivation = Literal["silu", "relu", "elu", "identity"]
QKNorm = Literal["l2", "sum"]
FEATURE_MAPS = {
    "silu": ops.silu,
    "relu": ops.relu,
    "elu": lambda x: ops.elu(x) + 1.0,
    "identity": lambda x: x,
}


def whole(what, size, options):
    """The size as an int, or one line that names the options to change."""
    if round(size) < 1 or not math.isclose(size, round(size)):
        raise ValueError(
            f"{what} must be a whole number above zero, received {size:g}; "
            f"change {options}"
        )
    return round(size)


@keras.saving.register_keras_serializable("keras_edifice")
class DeltaNetLayer(Composite):
    """(batch, time, features) -> the same. Causal; O(1) state per step.

    The state is (the last conv_size - 1 inputs of the three convolutions, S), S of the
    shape (batch, num_heads, d_k, d_v) in float32. Masked steps leave it as it is, so
    that sequences may be padded on either side.

    Args:
        num_heads: memories side by side.
        expand_k: width of all keys relative to that of the input.
        expand_v: width of all values relative to that of the input.
        conv_size: taps of the convolutions; 0 for none.
        qk_activation: function of queries and keys; "elu" is elu(x) + 1.
        qk_norm: "l2" divides queries and keys by their lengths, "sum" by the sums of
            their features, which must not be negative: "relu" or "elu".
        use_gate: the output is multiplied by SiLU(W_g x) after its norm.
        allow_neg_eigval: β runs from 0 to 2 instead of 1, so that a memory can change
            sign along a key (Grazzi et al. 2024, arXiv:2411.12537).
        chunk_size: steps that are computed side by side; changes no number.
        norm_eps: epsilon of the norm of the output.

    Raises:
        ValueError: an unknown choice; "sum" of features that may be negative; a width
            that the heads do not divide.
    """

    def __init__(
        self,
        num_heads=4,
        expand_k=1.0,
        expand_v=1.0,
        conv_size=4,
        qk_activation="silu",
        qk_norm="l2",
        use_gate=False,
        allow_neg_eigval=False,
        chunk_size=64,
        norm_eps=1e-6,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)  # the state keeps its precision
        self.num_heads, self.conv_size = num_heads, conv_size
        self.expand_k, self.expand_v = expand_k, expand_v
        self.qk_activation = check(QKActivation, "qk_activation", qk_activation)
        self.qk_norm = check(QKNorm, "qk_norm", qk_norm)
        if qk_norm == "sum" and qk_activation not in ("relu", "elu"):
            raise ValueError(
                "qk_norm='sum' needs features that are not negative, received "
                f"qk_activation={qk_activation!r}; pass 'relu' or 'elu'"
            )
        self.use_gate, self.allow_neg_eigval = use_gate, allow_neg_eigval
        self.chunk_size, self.norm_eps = chunk_size, norm_eps
        self.supports_masking = True

    def _sizes(self, features):
        """Sets the number of values, and the widths of keys and values, d_k and d_v."""
        self.value_heads = heads = self.num_heads
        self.key_size = whole(
            f"expand_k * {features} / {heads}",
            self.expand_k * features / heads,
            "expand_k or num_heads",
        )
        self.value_size = whole(
            f"expand_v * {features} / {heads}",
            self.expand_v * features / heads,
            "expand_v or num_heads",
        )

    def build(self, input_shape):
        features = input_shape[-1]
        self._sizes(features)
        keys = self.num_heads * self.key_size
        values = self.value_heads * self.value_size
        self.q_proj = self._dense("q_proj", keys, features)
        self.k_proj = self._dense("k_proj", keys, features)
        self.v_proj = self._dense("v_proj", values, features)
        self.b_proj = self._dense("b_proj", self.value_heads, features)
        self.convs = []
        if self.conv_size:
            widths = {"q_conv": keys, "k_conv": keys, "v_conv": values}
            for name, width in widths.items():
                conv = CausalConv(
                    self.conv_size, False, dtype=self.dtype_policy, name=name
                )
                conv.build((None, None, width))
                self.convs.append(conv)
        if self.use_gate:
            self.g_proj = self._dense("g_proj", values, features)
        norm = GatedRMSNorm if self.use_gate else RMSNorm
        self.o_norm = norm(self.norm_eps, dtype=self.dtype_policy, name="o_norm")
        self.o_norm.build((None, None, self.value_heads, self.value_size))
        self.o_proj = self._dense("o_proj", features, values)

    def _dense(self, name, units, inputs):
        layer = Dense(
            units,
            use_bias=False,
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.02),
            dtype=self.dtype_policy,
            name=name,
        )
        layer.build((None, None, inputs))
        return layer

    def call(self, x, mask=None, initial_state=None, return_state=False):
        seen, S = (None, None) if initial_state is None else initial_state
        streams = self._projected(x)
        if self.convs:
            lasts = seen or [None] * len(self.convs)
            parts = zip(self.convs, streams, lasts, strict=True)
            streams, seen = zip(
                *[
                    conv(z, mask=mask, initial_state=last, return_state=True)
                    for conv, z, last in parts
                ],
                strict=True,
            )
        beta, log_decay = self._gates(x)
        if mask is not None:  # nothing is corrected, nothing decays: the state stays
            valid = ops.expand_dims(mask, -1)
            beta = ops.where(valid, beta, 0.0)
            log_decay = None if log_decay is None else ops.where(valid, log_decay, 0.0)
        o, S = delta_rule(
            *self._heads(*streams),
            beta,
            log_decay,
            initial_state=S,
            return_state=True,
            chunk_size=self.chunk_size,
        )
        y = self._output(o, x)
        return (y, (tuple(seen or ()), S)) if return_state else y

    def _projected(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def _heads(self, q, k, v):
        """What the rule takes: (..., heads, d_k) twice and (..., heads, d_v)."""
        lead = ops.shape(v)[:-1]
        q = ops.reshape(q, (*lead, self.num_heads, self.key_size))
        k = ops.reshape(k, (*lead, self.num_heads, self.key_size))
        v = ops.reshape(v, (*lead, self.value_heads, self.value_size))
        return self._features(q) * self.key_size**-0.5, self._features(k), ops.silu(v)

    def _features(self, x):
        """φ(x), normalised: of length or sum one, in float32."""
        x = ops.cast(FEATURE_MAPS[self.qk_activation](x), "float32")
        if self.qk_norm == "sum":
            return x / (ops.sum(x, axis=-1, keepdims=True) + 1e-6)
        return x * ops.rsqrt(ops.sum(ops.square(x), axis=-1, keepdims=True) + 1e-6)

    def _gates(self, x):
        """β of each head in float32, and the log-decay: none here."""
        beta = ops.sigmoid(ops.cast(self.b_proj(x), "float32"))
        return (2.0 * beta if self.allow_neg_eigval else beta), None

    def _output(self, o, x):
        lead = ops.shape(o)[:-2]
        if self.use_gate:
            o = self.o_norm(o, ops.reshape(self.g_proj(x), ops.shape(o)))
        else:
            o = self.o_norm(o)
        return self.o_proj(ops.reshape(o, (*lead, self.value_heads * self.value_size)))

    def initial_state(self, batch_size):
        """The state before the first step: zeros."""
        seen = tuple(conv.initial_state(batch_size) for conv in self.convs)
        shape = (batch_size, self.value_heads, self.key_size, self.value_size)
        return seen, ops.zeros(shape, dtype="float32")

    def step(self, x_t, state):
        """One step: (batch, features) and the state -> the output and the new state."""
        seen, S = state
        streams = self._projected(x_t)
        if self.convs:
            parts = zip(self.convs, streams, seen, strict=True)
            steps = [conv.step(z, last) for conv, z, last in parts]
            streams, seen = zip(*steps, strict=True)
        o, S = delta_rule_step(*self._heads(*streams), *self._gates(x_t), S)
        return self._output(o, x_t), (tuple(seen), S)

    def compute_output_shape(self, input_shape):
        return input_shape


@architecture(
    paper="Schlag, Irie & Schmidhuber 2021, Linear Transformers Are Secretly Fast "
    "Weight Programmers, arXiv:2102.11174",
    title="DeltaNet",
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, hidden_size)",
    causal=True,
    streaming=True,
    tiny=dict(
        embed_size=3,
        hidden_size=4,
        num_heads=2,
        num_layers=1,
        expand_v=1.5,
        use_gate=True,
        chunk_size=4,
        window_size=7,
    ),
    variants={"1.3b": dict(hidden_size=2048, num_heads=16, num_layers=24)},
)
def delta_net(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    num_heads: Size = 4,
    num_layers: Size = 4,
    expand_k: Positive = 1.0,
    expand_v: Positive = 1.0,
    conv_size: Count = 4,
    qk_activation: QKActivation = "silu",
    qk_norm: QKNorm = "l2",
    use_gate: bool = False,
    allow_neg_eigval: bool = False,
    mlp_ratio: NonNegative = 4.0,
    chunk_size: Size = 64,
    norm_eps: Positive = 1e-6,
    dropout: Rate = 0.1,
    return_sequences: bool = False,
    pool: Literal["last", "mean"] = "last",
    vocab_size: Size | None = None,
    tie_embeddings: bool = False,
    window_size: Size | None = 60,
) -> EdificeModel:
    """Pre-norm residual stack of delta rule memories and gated feed-forwards.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the residual stream.
        num_heads: memories of each layer, side by side.
        num_layers: number of memories, each with its feed-forward.
        expand_k: width of all keys relative to hidden_size.
        expand_v: width of all values relative to hidden_size.
        conv_size: taps of the convolutions on queries, keys and values; 0 for none.
        qk_activation: function of queries and keys, elu(x) + 1 for "elu".
        qk_norm: divide queries and keys by their lengths, or by the sums of their
            features, which takes the activation "relu" or "elu".
        use_gate: a gate on the output of each memory.
        allow_neg_eigval: let a memory change sign along a key, by β up to 2.
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
        mixer = DeltaNetLayer(
            num_heads=num_heads,
            expand_k=expand_k,
            expand_v=expand_v,
            conv_size=conv_size,
            qk_activation=qk_activation,
            qk_norm=qk_norm,
            use_gate=use_gate,
            allow_neg_eigval=allow_neg_eigval,
            chunk_size=chunk_size,
            norm_eps=norm_eps,
            name=f"delta_net_{i}",
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
    return sequence_model(inputs, x, return_sequences, pool, name="delta_net")
