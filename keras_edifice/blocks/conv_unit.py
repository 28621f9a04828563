"""Convolution, batch normalisation, activation: the unit of convolutional networks."""

from keras import layers
from keras.initializers import VarianceScaling

from keras_edifice.blocks.batch_norm import BatchNorm
from keras_edifice.blocks.convolution import Conv2D, DepthwiseConv2D


def he_fan_out():
    """Normal with variance 2 / fan_out (He et al. 2015, arXiv:1502.01852, eq. 14).

    A new one for each layer: Keras gives an initialiser's values twice if it is asked
    twice.
    """
    return VarianceScaling(2.0, "fan_out", "untruncated_normal")


def conv_unit(
    x,
    filters,
    kernel_size,
    strides=1,
    activation="relu",
    gamma="ones",
    *,
    padding="symmetric",
    epsilon=1e-5,
    momentum=0.9,
    name,
):
    """(b, h, w, c) -> (b, ⌈h / strides⌉, ⌈w / strides⌉, filters), symbolic.

    The convolution has no bias, for the normalisation has one.

    Args:
        x: a symbolic tensor.
        filters: channels of the output; None for a depthwise convolution, which gives
            each channel a kernel of its own and keeps them apart.
        kernel_size: odd side of the kernel.
        strides: distance between the places where the kernel is applied.
        activation: name of the activation, or None.
        gamma: initialiser of the normalisation's scale.
        padding: "symmetric" puts (kernel_size - 1) / 2 zeros on both sides; "same", as
            TensorFlow has it, may put one fewer before than after if the stride is 2.
        epsilon: added to the variance by the normalisation.
        momentum: of the normalisation's moving averages.
        name: prefix of the layers' names.
    """
    border = kernel_size // 2
    symmetric = padding == "symmetric" and strides > 1  # with stride 1 both are alike
    if symmetric and border:
        x = layers.ZeroPadding2D(border, name=f"{name}_pad")(x)
    options = dict(
        strides=strides,
        padding="valid" if symmetric else "same",
        use_bias=False,
        name=f"{name}_conv",
    )
    start = he_fan_out()
    if filters is None:
        options["depthwise_initializer"] = start
        x = DepthwiseConv2D(kernel_size, **options)(x)
    else:
        x = Conv2D(filters, kernel_size, kernel_initializer=start, **options)(x)
    x = BatchNorm(
        momentum=momentum,
        epsilon=epsilon,
        gamma_initializer=gamma,
        name=f"{name}_norm",
    )(x)
    if activation:
        x = layers.Activation(activation, name=f"{name}_{activation}")(x)
    return x
