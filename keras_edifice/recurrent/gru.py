"""Gated Recurrent Unit: a state that one gate keeps and another hides.

    z = σ(x_t W_z + h_{t-1} U_z + b_z),    r = σ(x_t W_r + h_{t-1} U_r + b_r)
    n = tanh(x_t W_n + b_n + r ⊙ (h_{t-1} U_n + c_n))         the reset after the matrix
    n = tanh(x_t W_n + b_n + (r ⊙ h_{t-1}) U_n)               or before it, as in Cho
    h_t = z ⊙ h_{t-1} + (1 - z) ⊙ n

Read `lstm.py` first. The reset after the matrix has biases b and c for z and r as well.
"""

from typing import Literal

import keras
from keras import layers, ops

from keras_edifice.backends.fused_recurrence import FusedRecurrence
from keras_edifice.model import EdificeModel
from keras_edifice.ops.gru_scan import gru_scan
from keras_edifice.options import Rate, Size
from keras_edifice.recurrent.scanned import ScannedRecurrence
from keras_edifice.recurrent.stack import recurrent_stack
from keras_edifice.recurrent.truncation import TruncatedBPTT
from keras_edifice.registry import architecture


@keras.saving.register_keras_serializable("keras_edifice")
class GRULayer(TruncatedBPTT, FusedRecurrence, ScannedRecurrence, layers.GRU):
    """Keras's GRU, (batch, time, features) -> (batch, time, units), that streams.

    The state is h, (batch, units). Masked steps leave it as it is.

    Args:
        units: width of the state.
        truncate_bptt: the last steps, as a number, through whose states the gradient
            runs; None for all. See `TruncatedBPTT`.
        **kwargs: those of `keras.layers.GRU`.
    """

    def initial_state(self, batch_size):
        """The state before the first step: zeros."""
        return self.get_initial_state(batch_size)[0]

    def step(self, x_t, state):
        """One step: (batch, features) and the state -> the new state, twice."""
        return self.cell(x_t, state, training=False)

    def scan(self, x, h):
        """All steps: (time, batch, features) and the state -> all states, the last."""
        cell = self.cell
        biases = cell.bias if self.use_bias else ops.zeros((2, 3 * self.units))
        return gru_scan(x, cell.kernel, cell.recurrent_kernel, biases[0], biases[1], h)


@architecture(
    paper="Cho et al. 2014, Learning Phrase Representations using RNN "
    "Encoder-Decoder for Statistical Machine Translation, arXiv:1406.1078",
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
def gru(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    num_layers: Size = 1,
    dropout: Rate = 0.0,
    recurrent_dropout: Rate = 0.0,
    reset_after: bool = True,
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
    """GRU layers, each on the whole output sequence of the one before.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the state of each layer, and direction.
        num_layers: number of layers.
        dropout: rate between layers, in training.
        recurrent_dropout: rate on the state h_{t-1}, in training, the same units at
            every step; it forgoes the fused kernels.
        reset_after: the reset gate acts on h_{t-1} U_n, which the fused kernels need;
            False for the paper's, on h_{t-1}.
        bidirectional: a second GRU per layer goes from the end to the beginning; the
            outputs stand side by side, 2 hidden_size wide.
        truncate_bptt: stop the gradient at the state this many steps before the end;
            None for no stop.
        input_layer_norm: normalise the input.
        use_layer_norm: normalise the output of each layer.
        return_sequences: give every step, (batch, window_size, hidden_size).
        pool: how the steps become one vector, by the last or by their mean; None for
            the last, for the mean if bidirectional.
        return_state: give a list of the output and of h of each layer, each (batch,
            hidden_size), those of both directions if bidirectional.
        vocab_size: number of tokens, where the input is their numbers, (batch,
            window_size), instead of features; they are embedded into hidden_size. The
            output is then the logits of the next token at every step, (batch,
            window_size, vocab_size).
        tie_embeddings: those logits use the matrix that embeds the tokens.
        window_size: steps of the input, None for any number.
    """

    def make_layer(name):
        return GRULayer(
            hidden_size,
            truncate_bptt=truncate_bptt,
            recurrent_dropout=recurrent_dropout,
            reset_after=reset_after,
            return_sequences=True,
            return_state=return_state,
            name=name,
        )

    return recurrent_stack(
        "gru",
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
