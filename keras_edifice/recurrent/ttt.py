"""TTT: a recurrence whose state is a small model that trains while it reads.

    q, k, v = W_q x, W_k x, W_v x, of each head; q and k turned by t mod C
    f(x; W) = x + LN(z(x; W)),    z = x W1 + b1    or    GELU(x W1 + b1) W2 + b2
    W_t = W - Σ_{s<=t} η_ts ∂/∂W ½‖f(k_s; W) - v_s‖²,    W of the mini-batch's start
    η_ts = max(1/(t+1) + τ_t, 0) · base_lr · σ(w_lr x_s + b_lr) / d
    output = W_o LN(f(q_t; W_t))

t and s count in mini-batches of C tokens, and each begins with the W that the one
before ended with. The first W is learned, as is all else, through these steps. They
are `ttt_scan` of `ops/fast_weights.py`. `titans.py` adds momentum and forgetting;
`delta_net.py` is the case C = 1 of a z without bias and norm.
"""

import math
from typing import Literal

import keras
import numpy as np
from keras import ops, tree

from keras_edifice.blocks.causal_conv import CausalConv
from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.feed_forward import GatedFFN
from keras_edifice.blocks.layer_norm import LayerNorm
from keras_edifice.blocks.rms_norm import RMSNorm
from keras_edifice.blocks.rotary_embedding import RotaryEmbedding
from keras_edifice.blocks.sequence import residual, sequence_input, sequence_model
from keras_edifice.model import EdificeModel
from keras_edifice.ops.fast_weights import ttt_initial_state, ttt_scan, ttt_step
from keras_edifice.ops.positions import positions
from keras_edifice.ops.step_scan import step_scan
from keras_edifice.options import NonNegative, Positive, Rate, Size, check
from keras_edifice.registry import architecture

InnerModel = Literal["linear", "mlp"]
BASE_LR = {"linear": 1.0, "mlp": 0.1}
EPSILON = 1e-6


def without_masked(layer, x, mask, initial_state=None, return_state=False):
    """The call of a causal layer to which masked tokens do not exist.

    The valid tokens move to the front, as what follows them changes nothing. Where the
    state is wanted as well, the layer goes token by token.

    Args:
        layer: with `call`, `step` and `initial_state`.
        x: (batch, time, features).
        mask: (batch, time), False for tokens that do not exist. What the layer gives
            there has no meaning.
        initial_state: as in the layer's call.
        return_state: as in the layer's call.
    """
    if return_state:
        if initial_state is None:
            initial_state = layer.initial_state(ops.shape(x)[0])
        return by_token(layer, x, initial_state, mask)
    mask = ops.cast(mask, "int32")
    place = ops.cumsum(ops.ones_like(mask), axis=1) - 1
    length = ops.shape(x)[1]
    valid_first = ops.argsort(place + length * (1 - mask), axis=1)
    rank = ops.maximum(ops.cumsum(mask, axis=1) - 1, 0)
    y = layer.call(_taken(x, valid_first), initial_state=initial_state)
    return _taken(y, rank)


def _taken(x, places):
    """The tokens of x (batch, time, features) at the places (batch, time)."""
    places = ops.expand_dims(ops.cast(places, "int32"), -1)
    return ops.take_along_axis(x, places, axis=1)


def by_token(layer, x, state, mask=None):
    """The steps of a layer one after the other: the outputs and the last state."""
    dtype, width = layer.compute_dtype, x.shape[-1]

    def step(x_t, parts):
        y, new = layer.step(ops.cast(x_t[:, :width], dtype), unflat(parts, state))
        new = flat(new)
        if mask is not None:
            pairs = zip(new, parts, strict=True)
            new = [ops.where(x_t[:, width:] > 0.0, a, b) for a, b in pairs]
        return ops.cast(y, "float32"), new

    inputs = ops.cast(x, "float32")
    if mask is not None:
        valid = ops.expand_dims(ops.cast(mask, "float32"), -1)
        inputs = ops.concatenate([inputs, valid], axis=-1)
    y, parts = step_scan(step, inputs, flat(state))
    return ops.cast(y, dtype), unflat(parts, state)


def flat(state):
    """The tensors of a state as a list of (batch, size) in float32."""
    return [
        ops.reshape(ops.cast(leaf, "float32"), (-1, math.prod(leaf.shape[1:])))
        for leaf in tree.flatten(state)
    ]


def unflat(parts, like):
    """Undoes `flat`, for a state of the shapes and dtypes of `like`."""
    pairs = zip(parts, tree.flatten(like), strict=True)
    leaves = [
        ops.cast(ops.reshape(part, (-1, *leaf.shape[1:])), leaf.dtype)
        for part, leaf in pairs
    ]
    return tree.pack_sequence_as(like, leaves)


@keras.saving.register_keras_serializable("keras_edifice")
class TTTLayer(Composite):
    """(batch, time, features) -> the same. Causal; O(1) state per step.

    The state is (the last conv_size - 1 inputs of the two convolutions, that of
    `ttt_scan`), the latter in float32. Masked tokens do not exist to it, so that
    sequences may be padded on either side.

    Args:
        num_heads: inner models side by side, each on its share of the features.
        inner_model: z, "linear" for one matrix, "mlp" for two with four times the
            width between them.
        base_lr: largest step size of the inner model, before the division by its
            width; None for 1 of the linear model and 0.1 of the MLP.
        chunk_size: C, tokens of a mini-batch. Another number is another model.
        use_gate: the output is multiplied by GELU(W_g x) after its norm.
        share_qk: queries and keys are one projection, and differ by a convolution
            each.
        conv_size: taps of these convolutions.
        rope_base: base of the angles by which queries and keys are turned.

    Raises:
        ValueError: an unknown inner model; features that are no even number for each
            head.
    """

    def __init__(
        self,
        num_heads=4,
        inner_model="linear",
        base_lr=None,
        chunk_size=16,
        use_gate=False,
        share_qk=False,
        conv_size=4,
        rope_base=10000.0,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)  # the state keeps its precision
        self.num_heads, self.chunk_size = num_heads, chunk_size
        self.inner_model = check(InnerModel, "inner_model", inner_model)
        self.base_lr, self.use_gate = base_lr, use_gate
        self.share_qk, self.conv_size = share_qk, conv_size
        self.rope_base = rope_base
        self.supports_masking = True

    def build(self, input_shape):
        features, heads = input_shape[-1], self.num_heads
        if features % (2 * heads):
            raise ValueError(
                "the features must be a multiple of 2 * num_heads, received "
                f"{features} and num_heads={heads}; change one of them"
            )
        self.head_dim = features // heads
        names = "qvo" if self.share_qk else "qkvo"
        for name in names + "g" * self.use_gate:
            setattr(self, f"{name}_proj", self._dense(f"{name}_proj", features))
        self.convs = []
        for name in ("q_conv", "k_conv") if self.share_qk else ():
            conv = CausalConv(self.conv_size, dtype=self.dtype_policy, name=name)
            conv.build(input_shape)
            self.convs.append(conv)
        self.turn = RotaryEmbedding(
            self.rope_base,
            "interleaved",
            dtype="float32",
            name="turn",
        )
        self.turn.build((None, None, heads, self.head_dim))
        self.post_norm = LayerNorm(EPSILON, dtype=self.dtype_policy, name="post_norm")
        self.post_norm.build(input_shape)
        self._build_inner_model()
        self.lr_kernel = self._weight("lr_kernel", (features, heads), normal())
        self.lr_bias = self._weight("lr_bias", (heads,), "zeros")
        self.token_rate = self._weight("token_rate", (self.chunk_size,), "zeros")

    def _build_inner_model(self):
        heads, size = self.num_heads, self.head_dim
        widths = (
            [size, size] if self.inner_model == "linear" else [size, 4 * size, size]
        )
        self.weights_at_start, self.biases_at_start = [], []
        for i in range(1, len(widths)):
            shape = (heads, widths[i - 1], widths[i])
            self.weights_at_start.append(self._weight(f"W{i}", shape, normal()))
            shape = (heads, widths[i])
            self.biases_at_start.append(self._weight(f"b{i}", shape, "zeros"))
        self.gamma = self._weight("gamma", (heads, size), "ones")
        self.beta = self._weight("beta", (heads, size), "zeros")

    def _weight(self, name, shape, initializer):
        """In float32 also where the layer computes in half precision."""
        return self.add_weight(shape, initializer, autocast=False, name=name)

    def _dense(self, name, features):
        layer = Dense(
            features,
            use_bias=False,
            kernel_initializer=normal(),
            dtype=self.dtype_policy,
            name=name,
        )
        layer.build((None, None, features))
        return layer

    def call(self, x, mask=None, initial_state=None, return_state=False):
        if mask is not None:
            return without_masked(self, x, mask, initial_state, return_state)
        seen, memory = (None, None) if initial_state is None else initial_state
        around = ops.shape(x)[:-1]  # the shape of a product is lost in tf2onnx
        q, k = self.q_proj(x), None if self.share_qk else self.k_proj(x)
        if self.share_qk:
            pairs = zip(self.convs, seen or [None] * 2, strict=True)
            streams = [
                conv(q, initial_state=last, return_state=True) for conv, last in pairs
            ]
            (q, k), seen = zip(*streams, strict=True)
        place = ops.expand_dims(positions(x), 0)
        if memory is not None:
            place = place + ops.expand_dims(memory[-1], 1)
        y = ttt_scan(
            *self._turned(q, k, place, around),
            self._in_heads(self.v_proj(x), around),
            self._rate(x),
            self._token_rate(),
            self.weights_at_start,
            self.biases_at_start,
            (self.gamma, self.beta),
            initial_state=memory,
            return_state=return_state,
        )
        if not return_state:
            return self._output(y, x)
        y, memory = y
        return self._output(y, x), (tuple(seen or ()), memory)

    def _in_heads(self, x, around):
        """(*around, features) -> (*around, heads, head_dim)."""
        return ops.reshape(x, (*around, self.num_heads, self.head_dim))

    def _turned(self, q, k, place, around):
        """Queries and keys (b, t, h, d), turned by their places in the mini-batch."""
        place = place - self.chunk_size * ops.floor(place / self.chunk_size)
        return [self.turn(self._in_heads(z, around), positions=place) for z in (q, k)]

    def _rate(self, x):
        """The part of η_ts that the token s brings, (..., heads) in float32."""
        base_lr = BASE_LR[self.inner_model] if self.base_lr is None else self.base_lr
        logits = ops.matmul(ops.cast(x, "float32"), self.lr_kernel) + self.lr_bias
        return base_lr / self.head_dim * ops.sigmoid(logits)

    def _token_rate(self):
        """The part of η_ts that the place t brings, (chunk_size,)."""
        decay = 1.0 / np.arange(1, self.chunk_size + 1)
        decay = ops.convert_to_tensor(decay.astype("float32"))
        return ops.relu(decay + self.token_rate)

    def _output(self, y, x):
        y = ops.reshape(y, ops.shape(x))
        y = self.post_norm(ops.cast(y, self.compute_dtype))
        if self.use_gate:
            y = ops.gelu(self.g_proj(x), approximate=True) * y
        return self.o_proj(y)

    def initial_state(self, batch_size):
        """The state before the first token: the learned inner models."""
        seen = tuple(conv.initial_state(batch_size) for conv in self.convs)
        weights = self.weights_at_start, self.biases_at_start
        return seen, ttt_initial_state(*weights, batch_size)

    def step(self, x_t, state):
        """One token: (batch, features), the state -> the output, the new state."""
        x_t = ops.cast(ops.convert_to_tensor(x_t), self.compute_dtype)
        seen, memory = state
        around = ops.shape(x_t)[:-1]
        q, k = self.q_proj(x_t), None if self.share_qk else self.k_proj(x_t)
        if self.share_qk:
            pairs = zip(self.convs, seen, strict=True)
            steps = [conv.step(q, last) for conv, last in pairs]
            (q, k), seen = zip(*steps, strict=True)
        place = ops.expand_dims(memory[-1], 1)
        q, k = self._turned(q, k, place, (*around, 1))
        y, memory = ttt_step(
            q[:, 0],
            k[:, 0],
            self._in_heads(self.v_proj(x_t), around),
            self._rate(x_t),
            self._token_rate(),
            memory,
            (self.gamma, self.beta),
        )
        return self._output(y, x_t), (tuple(seen), memory)

    def compute_output_shape(self, input_shape):
        return input_shape


def normal():
    """The distribution that matrices start from, of another seed each time."""
    return keras.initializers.RandomNormal(stddev=0.02)


@architecture(
    paper="Sun et al. 2024, Learning to (Learn at Test Time): RNNs with Expressive "
    "Hidden States, arXiv:2407.04620",
    title="Test-Time Training",
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, hidden_size)",
    causal=True,
    streaming=True,
    multiples={"hidden_size": "num_heads"},
    tiny=dict(
        embed_size=3,
        hidden_size=8,
        num_heads=2,
        num_layers=1,
        inner_model="mlp",
        backbone="mamba",
        pre_conv=True,
        chunk_size=4,
        window_size=7,
    ),
    variants={
        "125m": dict(hidden_size=768, num_heads=12, num_layers=12),
        "350m": dict(
            hidden_size=1024, num_heads=16, num_layers=24, mlp_ratio=2736 / 1024
        ),
        "760m": dict(hidden_size=1536, num_heads=16, num_layers=24),
        "1.3b": dict(
            hidden_size=2048, num_heads=32, num_layers=24, mlp_ratio=5504 / 2048
        ),
    },
)
def ttt(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    num_heads: Size = 4,
    num_layers: Size = 4,
    inner_model: InnerModel = "linear",
    base_lr: NonNegative | None = None,
    chunk_size: Size = 16,
    backbone: Literal["transformer", "mamba"] = "transformer",
    pre_conv: bool = False,
    conv_size: Size = 4,
    rope_base: Positive = 10000.0,
    mlp_ratio: Positive = 8 / 3,
    dropout: Rate = 0.1,
    return_sequences: bool = False,
    pool: Literal["last", "mean"] = "last",
    vocab_size: Size | None = None,
    tie_embeddings: bool = True,
    window_size: Size | None = 60,
) -> EdificeModel:
    """Pre-norm residual stack of models that train at test time and feed-forwards.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the residual stream, an even number for each head.
        num_heads: inner models of each layer, side by side.
        num_layers: number of layers of inner models, each with its feed-forward.
        inner_model: what trains at test time, one matrix or two with a GELU.
        base_lr: its largest step size, before the division by its width; None for 1
            of the linear model and 0.1 of the MLP.
        chunk_size: tokens of a mini-batch, whose gradients are taken at the same
            weights.
        backbone: what is around the inner models: queries, keys and values of their
            own as in a transformer, or as in Mamba a gate on the output, and
            queries and keys that differ by their short convolutions alone.
        pre_conv: a residual convolution of its own before each layer of inner models.
        conv_size: taps of all convolutions.
        rope_base: base of the angles by which queries and keys are turned.
        mlp_ratio: width of the gated feed-forwards relative to hidden_size.
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
        if pre_conv:
            conv = CausalConv(conv_size, name=f"conv_{i}")
            x = residual(x, conv, epsilon=EPSILON, dropout=dropout)
        mixer = TTTLayer(
            num_heads=num_heads,
            inner_model=inner_model,
            base_lr=base_lr,
            chunk_size=chunk_size,
            use_gate=backbone == "mamba",
            share_qk=backbone == "mamba",
            conv_size=conv_size,
            rope_base=rope_base,
            name=f"ttt_{i}",
        )
        x = residual(x, mixer, epsilon=EPSILON, dropout=dropout)
        width = max(1, round(mlp_ratio * hidden_size))
        ffn = GatedFFN(width, stddev=0.02, name=f"ffn_{i}")
        x = residual(x, ffn, epsilon=EPSILON, dropout=dropout)
    x = RMSNorm(EPSILON, name="final_norm")(x)
    return sequence_model(inputs, x, return_sequences, pool, name="ttt")
