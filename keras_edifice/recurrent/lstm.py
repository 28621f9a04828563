"""Long Short-Term Memory: a cell that gates decide to keep, write and read.

    [i f g o] = x_t W + h_{t-1} U + b
    c_t = σ(f) ⊙ c_{t-1} + σ(i) ⊙ tanh(g),    h_t = σ(o) ⊙ tanh(c_t)

The forget gate is that of Gers et al. 2000, Learning to Forget, Neural Computation 12;
its bias starts at one.
"""

from typing import Literal

import keras
from keras import layers, ops

from keras_edifice.backends.fused_recurrence import FusedRecurrence
from keras_edifice.model import EdificeModel
from keras_edifice.ops.lstm_scan import lstm_scan
from keras_edifice.options import Rate, Size
from keras_edifice.recurrent.scanned import ScannedRecurrence
from keras_edifice.recurrent.stack import recurrent_stack
from keras_edifice.recurrent.truncation import TruncatedBPTT
from keras_edifice.registry import architecture


@keras.saving.register_keras_serializable("keras_edifice")
class LSTMLayer(TruncatedBPTT, FusedRecurrence, ScannedRecurrence, layers.LSTM):
    """Keras's LSTM, (batch, time, features) -> (batch, time, units), that streams.

    The state is (h, c), each (batch, units). Masked steps leave it as it is.

    Args:
        units: width of the state.
        truncate_bptt: the last steps, as a number, through whose states the gradient
            runs; None for all. See `TruncatedBPTT`.
        **kwargs: those of `keras.layers.LSTM`.
    """

    def initial_state(self, batch_size):
        """(h, c) before the first step: zeros."""
        return tuple(self.get_initial_state(batch_size))

    def step(self, x_t, state):
        """One step: (batch, features) and (h, c) -> (batch, units) and (h, c)."""
        h, state = self.cell(x_t, list(state), training=False)
        return h, tuple(state)

    def scan(self, x, h, c):
        """All steps: (time, batch, features), h, c -> all h, the last h and c."""
        cell = self.cell
        bias = cell.bias if self.use_bias else ops.zeros(4 * self.units)
        return lstm_scan(x, cell.kernel, cell.recurrent_kernel, bias, h, c)


@architecture(
    paper="Hochreiter & Schmidhuber 1997, Long Short-Term Memory, "
    "Neural Computation 9(8)",
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, hidden_size)",
    causal=True,
    streaming=True,
    tiny=dict(
        embed_size=3,
        hidden_size=5,
        num_layers=2,
        dropout=0.1,
        use_layer_norm=True,
        window_size=7,
    ),
)
def lstm(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    num_layers: Size = 1,
    dropout: Rate = 0.0,
    recurrent_dropout: Rate = 0.0,
    bidirectional: bool = False,
    truncate_bptt: Size | None = None,
    input_layer_norm: bool = False,
    use_layer_norm: bool = False,
    return_sequences: bool = False,
    pool: Literal["last", "mean"] | None = None,
    return_state: bool = False,
    vocab_size: Size | None = None,
    tie_embeddings: bool = False,
    window_size: Size | None = 60,
) -> EdificeModel:
    """LSTM layers, each on the whole output sequence of the one before.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the state of each layer, and direction.
        num_layers: number of layers.
        dropout: rate between layers, in training.
        recurrent_dropout: rate on the state h_{t-1}, in training, the same units at
            every step; it forgoes the fused kernels.
        bidirectional: a second LSTM per layer goes from the end to the beginning; the
            outputs stand side by side, 2 hidden_size wide.
        truncate_bptt: stop the gradient at the state this many steps before the end;
            None for no stop.
        input_layer_norm: normalise the input.
        use_layer_norm: normalise the output of each layer.
        return_sequences: give every step, (batch, window_size, hidden_size).
        pool: how the steps become one vector, by the last or by their mean; None for
            the last, for the mean if bidirectional.
        return_state: give a list of the output and of h and c of each layer, each
            (batch, hidden_size), those of both directions if bidirectional.
        vocab_size: number of tokens, where the input is their numbers, (batch,
            window_size), instead of features; they are embedded into hidden_size. The
            output is then the logits of the next token at every step, (batch,
            window_size, vocab_size).
        tie_embeddings: those logits use the matrix that embeds the tokens.
        window_size: steps of the input, None for any number.
    """

    def make_layer(name):
        return LSTMLayer(
            hidden_size,
            truncate_bptt=truncate_bptt,
            recurrent_dropout=recurrent_dropout,
            return_sequences=True,
            return_state=return_state,
            name=name,
        )

    return recurrent_stack(
        "lstm",
        make_layer,
        hidden_size,
        num_layers=num_layers,
        dropout=dropout,
        bidirectional=bidirectional,
        input_layer_norm=input_layer_norm,
        use_layer_norm=use_layer_norm,
        return_sequences=return_sequences,
        pool=pool,
        return_state=return_state,
        embed_size=embed_size,
        vocab_size=vocab_size,
        tie_embeddings=tie_embeddings,
        window_size=window_size,
    )
