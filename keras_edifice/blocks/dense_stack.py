"""A chain of dense layers, the trunk of every network on flat vectors."""

from keras import layers

from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.layer_norm import LayerNorm

# Rectifiers pass about half of the variance on, which He's initialisation makes up for.
_RECTIFIERS = ("relu", "relu6", "leaky_relu", "elu", "silu", "swish", "gelu", "mish")


def kernel_initializer(activation):
    """He-normal before a rectifier, Glorot-uniform otherwise."""
    return "he_normal" if activation in _RECTIFIERS else "glorot_uniform"


def dense_stack(
    x, sizes, activation="relu", dropout=0.0, layer_norm=False, residual=False, name=""
):
    """(batch, ..., features) -> (batch, ..., sizes[-1]), symbolic.

    Args:
        x: a symbolic tensor.
        sizes: width of each layer.
        activation: after each layer.
        dropout: rate after each activation.
        layer_norm: whether to normalise before each activation.
        residual: whether each layer adds its input, projected if widths differ.
        name: prefix of the layers' names.
    """
    prefix = f"{name}_" if name else ""
    for i, size in enumerate(sizes):
        h = Dense(
            size,
            kernel_initializer=kernel_initializer(activation),
            name=f"{prefix}dense_{i}",
        )(x)
        if layer_norm:
            h = LayerNorm(name=f"{prefix}norm_{i}")(h)
        h = layers.Activation(activation, name=f"{prefix}activation_{i}")(h)
        if dropout:
            h = layers.Dropout(dropout, name=f"{prefix}dropout_{i}")(h)
        if residual:
            if x.shape[-1] != size:
                x = Dense(size, name=f"{prefix}shortcut_{i}")(x)
            h = layers.Add(name=f"{prefix}add_{i}")([x, h])
        x = h
    return x
