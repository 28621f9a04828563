"""Convolution, batch normalisation, activation: the unit of convolutional networks."""

from keras import layers
from keras.initializers import VarianceScaling


def he_fan_out():
    """Normal with variance 2 / fan_out (He et al. 2015, arXiv:1502.01852, eq. 14).

    A new one for each layer: Keras gives an initialiser's values twice if it is asked
    twice.
    """
    return VarianceScaling(2.0, "fan_out", "untruncated_normal")


def conv_unit(
    x, filters, kernel_size, strides=1, activation="relu", gamma="ones", *, name
):
    """(b, h, w, c) -> (b, ⌈h / strides⌉, ⌈w / strides⌉, filters), symbolic.

    Zeros are padded alike on both sides, (kernel_size - 1) / 2 of them; padding="same"
    would put one fewer before than after when the stride is 2. The convolution has no
    bias, for the normalisation has one.

    Args:
        x: a symbolic tensor.
        filters: channels of the output.
        kernel_size: odd side of the kernel.
        strides: distance between the places where the kernel is applied.
        activation: name of the activation, or None.
        gamma: initialiser of the normalisation's scale.
        name: prefix of the layers' names.
    """
    border = kernel_size // 2
    if border and strides > 1:
        x = layers.ZeroPadding2D(border, name=f"{name}_pad")(x)
    x = layers.Conv2D(
        filters,
        kernel_size,
        strides,
        padding="same" if strides == 1 else "valid",
        use_bias=False,
        kernel_initializer=he_fan_out(),
        name=f"{name}_conv",
    )(x)
    x = layers.BatchNormalization(
        momentum=0.9, epsilon=1e-5, gamma_initializer=gamma, name=f"{name}_norm"
    )(x)
    if activation:
        x = layers.Activation(activation, name=f"{name}_{activation}")(x)
    return x
