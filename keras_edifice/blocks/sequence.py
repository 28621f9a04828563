"""What sequence models share: the input, the residual branch and the read-out.

    x_0 = W u,    x_l = x_{l-1} + dropout(mixer(norm(x_{l-1}))),    y = pool(norm(x_L))

For tokens, W u is their row of the embedding E, and y = norm(x_L) Eᵀ the logits of the
next token at every step.

A mask that comes with the input (a `Masking` layer before the model, or `mask=` in
the call) travels along, and the read-out leaves masked steps out.
"""

import keras
from keras import Input, layers, ops

from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.rms_norm import RMSNorm
from keras_edifice.model import EdificeModel


def sequence_input(
    window_size,
    embed_size,
    hidden_size=None,
    vocab_size=None,
    tie_embeddings=True,
    bidirectional=False,
):
    """The input of a sequence model, and the stream that its layers work on.

    Args:
        window_size: steps of the input, None for any number.
        embed_size: features of each step; None for tokens.
        hidden_size: width of the stream, reached by a linear map where it differs;
            None for the input itself.
        vocab_size: number of tokens, for an input of their numbers; None for features.
        tie_embeddings: whether the logits of `sequence_model` come from the same
            matrix as the stream, which then needs `hidden_size`.
        bidirectional: whether steps see those ahead, which tokens are not for.

    Returns:
        (the input, the stream), symbolic: (batch, window_size, embed_size), or
        (batch, window_size) for tokens, and (batch, window_size, hidden_size).

    Raises:
        ValueError: both or neither of `embed_size` and `vocab_size` are given, or
            `vocab_size` together with `bidirectional`.
    """
    if (embed_size is None) == (vocab_size is None):
        raise ValueError(
            "the input is either features or tokens: pass embed_size or vocab_size, "
            f"received embed_size={embed_size}, vocab_size={vocab_size}"
        )
    if vocab_size and bidirectional:
        raise ValueError(
            "vocab_size gives logits of the next token, which bidirectional=True sees; "
            "pass embed_size or bidirectional=False"
        )
    if vocab_size is not None:
        inputs = Input((window_size,), dtype="int32", name="inputs")
        embed = layers.ReversibleEmbedding(
            vocab_size,
            hidden_size,
            tie_weights=tie_embeddings,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=0.02),
            reverse_dtype="float32",
            name="embed",
        )
        return inputs, embed(inputs)
    inputs = Input((window_size, embed_size), name="inputs")
    if hidden_size in (None, embed_size):
        return inputs, inputs
    return inputs, Dense(hidden_size, use_bias=False, name="embed")(inputs)


def residual(x, mixer, norm=RMSNorm, epsilon=1e-5, dropout=0.0):
    """A branch added: x + dropout(mixer(norm(x))), symbolic. Named after the mixer.

    Args:
        x: a symbolic tensor.
        mixer: a layer that keeps the shape.
        norm: class of the normalisation, RMSNorm or LayerNorm.
        epsilon: of the normalisation.
        dropout: rate on the mixer's output.
    """
    y = mixer(norm(epsilon, name=f"{mixer.name}_norm")(x))
    if dropout:
        y = layers.Dropout(dropout, name=f"{mixer.name}_dropout")(y)
    return layers.Add(name=f"{mixer.name}_add")([x, y])


def read_out(inputs, x, return_sequences=False, pool="last"):
    """Every step, or one vector for the sequence; logits where the input is tokens.

    Args:
        inputs: of `sequence_input`.
        x: (batch, time, features), symbolic, normalised where the paper does.
        return_sequences: give every step instead of one vector.
        pool: "last" or "mean", how the steps become one vector.

    Returns:
        (batch, time, features) or (batch, features), symbolic; for tokens always
        (batch, time, vocab_size): the logits of the next token, in float32.
    """
    if "int" in inputs.dtype:
        embed = keras.Model(inputs, x).get_layer("embed")
        return embed(x, reverse=True)
    return x if return_sequences else SequencePool(pool, name="pool")(x)


def sequence_model(inputs, x, return_sequences=False, pool="last", name=None):
    """The model from an input to the `read_out` of a stream, with its arguments."""
    outputs = read_out(inputs, x, return_sequences, pool)
    return EdificeModel(inputs, outputs, name=name)


@keras.saving.register_keras_serializable("keras_edifice")
class SequencePool(layers.Layer):
    """(batch, time, features) -> (batch, features). Blind to masked steps.

    A sequence without a valid step gives zeros. Streamed, the output at each step is
    that of the sequence so far.

    Args:
        pool: "last" valid step, or "mean" over the valid steps, taken in float32.

    Raises:
        ValueError: `pool` is neither.
    """

    def __init__(self, pool="last", **kwargs):
        super().__init__(**kwargs)
        if pool not in ("last", "mean"):
            raise ValueError(f"pool must be one of 'last', 'mean', received {pool!r}")
        self.pool = pool
        self.supports_masking = True

    def build(self, input_shape):
        self.features = input_shape[-1]

    def call(self, x, mask=None):
        if mask is None:
            if self.pool == "last":
                return x[:, -1]
            mask = ops.ones_like(x[:, :, 0], dtype="bool")
        valid = ops.cast(mask, "float32")  # (b, t)
        count = ops.sum(valid, axis=1, keepdims=True)
        if self.pool == "last":  # no gather: exporters take this one
            mask = ops.logical_and(mask, ops.cumsum(valid, axis=1) >= count)
        chosen = ops.where(ops.expand_dims(mask, -1), x, ops.zeros_like(x))
        if self.pool == "last":
            return ops.sum(chosen, axis=1)
        total = ops.sum(ops.cast(chosen, "float32"), axis=1)
        return ops.cast(total / ops.maximum(count, 1.0), x.dtype)

    def compute_mask(self, x, mask=None):
        return None

    def initial_state(self, batch_size):
        """Sum and number of the steps so far; nothing for "last"."""
        if self.pool == "last":
            return ()
        return ops.zeros((batch_size, self.features)), ops.zeros((batch_size, 1))

    def step(self, x_t, state):
        """One step: (batch, features) and the state -> the output so far, the state."""
        if self.pool == "last":
            return x_t, ()
        total, count = state[0] + ops.cast(x_t, "float32"), state[1] + 1.0
        return ops.cast(total / count, x_t.dtype), (total, count)

    def prefill(self, x, state):
        """Many steps: (batch, time, features), the state -> the output, the state."""
        if self.pool == "last":
            return self(x), ()
        total = state[0] + ops.sum(ops.cast(x, "float32"), axis=1)
        count = state[1] + ops.cast(ops.shape(x)[1], "float32")
        return ops.cast(total / count, x.dtype), (total, count)

    def compute_output_shape(self, input_shape):
        return input_shape[0], input_shape[-1]
