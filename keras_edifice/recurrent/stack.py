"""Recurrent layers one on another, each on the whole output sequence of the last."""

from keras import layers

from keras_edifice.blocks.layer_norm import LayerNorm
from keras_edifice.blocks.sequence import read_out, sequence_input
from keras_edifice.model import EdificeModel


def recurrent_stack(
    name,
    make_layer,
    hidden_size,
    num_layers=1,
    dropout=0.0,
    bidirectional=False,
    input_layer_norm=False,
    use_layer_norm=False,
    return_sequences=False,
    pool=None,
    return_state=False,
    embed_size=None,
    vocab_size=None,
    tie_embeddings=False,
    window_size=None,
):
    """The model of `lstm` and `gru`; the options that are not here are theirs.

    Args:
        name: of the architecture.
        make_layer: function of a layer's name that makes it; it gives every step, and
            its states after them if `return_state`.
        hidden_size: and the others as in `lstm`.
        num_layers: see there.
        dropout: see there.
        bidirectional: see there.
        input_layer_norm: see there.
        use_layer_norm: see there.
        return_sequences: see there.
        pool: see there.
        return_state: see there.
        embed_size: see there.
        vocab_size: see there.
        tie_embeddings: see there.
        window_size: see there.

    Raises:
        ValueError: `vocab_size` together with `bidirectional`.
    """
    inputs, x = sequence_input(
        window_size,
        embed_size,
        hidden_size if vocab_size else None,
        vocab_size,
        tie_embeddings,
        bidirectional,
    )
    if input_layer_norm:
        x = LayerNorm(1e-6, name="input_norm")(x)
    states = []
    for i in range(num_layers):
        if i and dropout:
            x = layers.Dropout(dropout, name=f"dropout_{i}")(x)
        layer = make_layer(f"{name}_{i}")
        if bidirectional:
            layer = layers.Bidirectional(layer, name=f"bidirectional_{i}")
        x = layer(x)
        if return_state:
            x, *state = x
            states += state
        if use_layer_norm:
            x = LayerNorm(1e-6, name=f"norm_{i}")(x)
    pool = pool or ("mean" if bidirectional else "last")
    x = read_out(inputs, x, return_sequences, pool)
    return EdificeModel(inputs, [x, *states] if return_state else x, name=name)
