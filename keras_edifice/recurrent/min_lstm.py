"""minLSTM: an LSTM whose gates do not look at the state and share it out between them.

    f = σ(x_t W_f + β),    i = σ(x_t W_i),    h̃_t = g(x_t W_h)
    h_t = f/(f + i) ⊙ h_{t-1} + i/(f + i) ⊙ h̃_t

There is neither a separate cell nor an output gate. Read `min_gru.py` first, which
has g. With f = σ(f̃) and i = σ(ĩ), nothing is divided by what may vanish:

    i/(f + i) = σ(d),    f/(f + i) = 1 - σ(d),    d = softplus(-f̃) - softplus(-ĩ)
"""

from typing import Literal

import keras
from keras import ops

from keras_edifice.blocks.sequence import sequence_input, sequence_model
from keras_edifice.model import EdificeModel
from keras_edifice.options import Positive, Rate, Size
from keras_edifice.recurrent.min_gru import FACTS, MinGRULayer, minimal_stack
from keras_edifice.registry import architecture


@keras.saving.register_keras_serializable("keras_edifice")
class MinLSTMLayer(MinGRULayer):
    """(batch, time, features) -> the same. Causal; O(1) state per step.

    The state is h, (batch, expand_factor * features), in float32. A masked step leaves
    it as it is.

    Args:
        expand_factor: width of the state relative to that of the input; unless it is
            one, a matrix leads back.
        log_space: whether the candidates are positive, g(x W_h), as in the paper's
            log-space form, or plain, x W_h.
        forget_bias: β, added to f̃; above zero the state is kept for longer.
    """

    gates = ("forget_gate", "input_gate")

    def __init__(self, expand_factor=1.0, log_space=True, forget_bias=0.0, **kwargs):
        super().__init__(expand_factor, log_space, **kwargs)
        self.forget_bias = forget_bias

    def _share(self, forget, write):
        d = ops.softplus(-forget - self.forget_bias) - ops.softplus(-write)
        return ops.sigmoid(d)


@architecture(**FACTS)
def min_lstm(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    num_layers: Size = 4,
    expand_factor: Positive = 1.0,
    log_space: bool = True,
    forget_bias: float = 0.0,
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
    """Pre-norm residual stack of minLSTM layers.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the residual stream.
        num_layers: number of recurrences.
        expand_factor: width of the recurrence relative to hidden_size; unless it is
            one, a matrix leads back.
        log_space: candidates are positive, as in the paper's log-space form.
        forget_bias: added to the argument of the forget gate; above zero the state is
            kept for longer.
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
        return MinLSTMLayer(expand_factor, log_space, forget_bias, name=f"min_lstm_{i}")

    x = minimal_stack(
        x, mixer, num_layers, use_conv, conv_size, use_mlp, mlp_ratio, dropout
    )
    return sequence_model(inputs, x, return_sequences, pool, name="min_lstm")
