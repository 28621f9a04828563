"""minGRU: a GRU whose gates do not look at the state, so that it can be scanned.

    z_t = σ(x_t W_z),    h̃_t = g(x_t W_h)
    h_t = (1 - z_t) ⊙ h_{t-1} + z_t ⊙ h̃_t
    g(u) = u + 1/2 where u >= 0, σ(u) elsewhere

The positive g is that of the paper's log-space form (appendix B). Each h_t is an
average of candidates, so the scan needs no logarithm to be stable. Read `gru.py`
first; `min_lstm.py` is the same idea.
"""

from typing import Literal

import keras
from keras import ops

from keras_edifice.blocks.causal_conv import CausalConv
from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.feed_forward import FeedForward
from keras_edifice.blocks.recurrence_initializers import fan_in_uniform
from keras_edifice.blocks.rms_norm import RMSNorm
from keras_edifice.blocks.sequence import residual, sequence_input, sequence_model
from keras_edifice.model import EdificeModel
from keras_edifice.ops.linear_scan import linear_scan, linear_scan_step
from keras_edifice.ops.precision import exact_dtype
from keras_edifice.options import Positive, Rate, Size
from keras_edifice.registry import architecture


def positive(u):
    """The module's g: increasing, continuous, above zero."""
    return ops.where(u >= 0, u + 0.5, ops.sigmoid(u))


@keras.saving.register_keras_serializable("keras_edifice")
class MinGRULayer(Composite):
    """(batch, time, features) -> the same. Causal; O(1) state per step.

    The state is h, (batch, expand_factor * features), in float32. A masked step leaves
    it as it is.

    Args:
        expand_factor: width of the state relative to that of the input; unless it is
            one, a matrix leads back.
        log_space: whether the candidates are positive, g(x W_h), as in the paper's
            log-space form, or plain, x W_h.
    """

    gates = ("update_gate",)
    """Names of the matrices whose outputs give `_share`."""

    def __init__(self, expand_factor=1.0, log_space=True, **kwargs):
        super().__init__(autocast=False, **kwargs)  # the state keeps its precision
        self.expand_factor, self.log_space = expand_factor, log_space
        self.supports_masking = True

    def build(self, input_shape):
        features = input_shape[-1]
        self.width = max(1, int(self.expand_factor * features))
        for name in (*self.gates, "candidate"):
            setattr(self, name, self._dense(features, self.width, name))
        self.out = None
        if self.expand_factor != 1.0:
            self.out = self._dense(self.width, features, "out")

    def _dense(self, inputs, units, name):
        layer = Dense(
            units,
            use_bias=False,
            kernel_initializer=fan_in_uniform(),
            dtype=self.dtype_policy,
            name=name,
        )
        layer.build((None, None, inputs))
        return layer

    def _share(self, update):
        """The share of h̃_t in h_t; the rest is that of h_{t-1}."""
        return ops.sigmoid(update)

    def _terms(self, x):
        """The share of h_{t-1}, and h̃_t times its own, in float32."""
        matrices = [getattr(self, name) for name in (*self.gates, "candidate")]
        *gates, candidate = (ops.cast(m(x), exact_dtype(x)) for m in matrices)
        share = self._share(*gates)
        return 1.0 - share, share * (
            positive(candidate) if self.log_space else candidate
        )

    def _output(self, h):
        h = ops.cast(h, self.compute_dtype)
        return h if self.out is None else self.out(h)

    def call(self, x, mask=None, initial_state=None, return_state=False):
        kept, written = self._terms(x)
        if mask is not None:  # 1 h + 0: the state stays
            mask = ops.expand_dims(mask, -1)
            kept = ops.where(mask, kept, ops.ones_like(kept))
            written = ops.where(mask, written, ops.zeros_like(written))
        h, state = linear_scan(kept, written, initial_state, return_state=True)
        return (self._output(h), state) if return_state else self._output(h)

    def initial_state(self, batch_size):
        """The state before the first step: zeros."""
        return ops.zeros((batch_size, self.width), dtype="float32")

    def step(self, x_t, state):
        """One step: (batch, features) and the state -> the output and the new state."""
        state = linear_scan_step(*self._terms(x_t), state)
        return self._output(state), state

    def compute_output_shape(self, input_shape):
        return input_shape


def minimal_stack(
    x, mixer, num_layers, use_conv, conv_size, use_mlp, mlp_ratio, dropout
):
    """Pre-norm residual branches and a final norm, symbolic.

    Args:
        x: (batch, time, features), symbolic.
        mixer: function of the number of a layer that makes its recurrence.
        num_layers: number of recurrences.
        use_conv: whether a causal convolution comes before each.
        conv_size: its taps.
        use_mlp: whether a feed-forward network comes after each.
        mlp_ratio: its width, in features.
        dropout: rate on the output of each branch.
    """
    for i in range(num_layers):
        if use_conv:
            x = residual(x, CausalConv(conv_size, name=f"conv_{i}"), dropout=dropout)
        x = residual(x, mixer(i), dropout=dropout)
        if use_mlp:
            width = max(1, int(mlp_ratio * x.shape[-1]))
            mlp = FeedForward(width, use_bias=False, name=f"mlp_{i}")
            x = residual(x, mlp, dropout=dropout)
    return RMSNorm(1e-5, name="final_norm")(x)


FACTS = dict(
    paper="Feng et al. 2024, Were RNNs All We Needed?, arXiv:2410.01201",
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, hidden_size)",
    causal=True,
    streaming=True,
    tiny=dict(
        embed_size=3,
        hidden_size=4,
        num_layers=1,
        expand_factor=1.5,
        use_conv=True,
        conv_size=3,
        use_mlp=True,
        mlp_ratio=2.0,
        window_size=7,
    ),
)


@architecture(**FACTS)
def min_gru(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    num_layers: Size = 4,
    expand_factor: Positive = 1.0,
    log_space: bool = True,
    use_conv: bool = False,
    conv_size: Size = 4,
    use_mlp: bool = False,
    mlp_ratio: Positive = 4.0,
    dropout: Rate = 0.1,
    return_sequences: bool = False,
    pool: Literal["last", "mean"] = "last",
    vocab_size: Size | None = None,
    tie_embeddings: bool = True,
    window_size: Size | None = 60,
) -> EdificeModel:
    """Pre-norm residual stack of minGRU layers.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the residual stream.
        num_layers: number of recurrences.
        expand_factor: width of the recurrence relative to hidden_size; unless it is
            one, a matrix leads back.
        log_space: candidates are positive, as in the paper's log-space form.
        use_conv: a causal depthwise convolution, a branch of its own, comes before
            each recurrence.
        conv_size: taps of that convolution.
        use_mlp: a feed-forward network, a branch of its own, comes after each
            recurrence.
        mlp_ratio: width of that network relative to hidden_size.
        dropout: rate on the output of each branch, in training.
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

    def mixer(i):
        return MinGRULayer(expand_factor, log_space, name=f"min_gru_{i}")

    x = minimal_stack(
        x, mixer, num_layers, use_conv, conv_size, use_mlp, mlp_ratio, dropout
    )
    return sequence_model(inputs, x, return_sequences, pool, name="min_gru")
