"""Convolutional network for images: the same few filters at every pixel.

    h = φ(norm(Σ_ij x_{su + id - p, sv + jd - p} W_ij)),    y = pool(dropout(h))

One such block after another; without a norm, which has a bias of its own, there is a
bias after the sum. Read `conv1d.py` first, which is the same for sequences.
"""

from typing import Literal

import keras
from keras import layers, ops

from keras_edifice.blocks.batch_norm import BatchNorm
from keras_edifice.blocks.convolution import Conv2D
from keras_edifice.blocks.dense_stack import kernel_initializer
from keras_edifice.blocks.global_pool import global_pool
from keras_edifice.blocks.heads import class_scores
from keras_edifice.blocks.images import image_input, stage_maps
from keras_edifice.blocks.layer_norm import LayerNorm
from keras_edifice.blocks.max_pooling import MaxPooling
from keras_edifice.convolutional.conv1d import check_dilation, one_per_block
from keras_edifice.model import EdificeModel
from keras_edifice.options import Activation, Rate, Size
from keras_edifice.registry import architecture

_NORMS = {"batch": BatchNorm, "layer": LayerNorm}
_POOLS = {"max": MaxPooling, "avg": layers.AveragePooling2D}


@keras.saving.register_keras_serializable("keras_edifice")
class GroupedConv2D(layers.Conv2D):
    """Keras's Conv2D with groups, (b, h, w, c) -> (b, h', w', filters).

    Each group has a convolution of its own, for TensorFlow has no gradient of groups on
    a CPU and no ONNX form; with one channel per group it is a depthwise convolution.

    Args:
        **kwargs: those of `keras.layers.Conv2D`.
    """

    def convolution_op(self, inputs, kernel):
        options = dict(
            strides=self.strides,
            padding=self.padding,
            data_format=self.data_format,
            dilation_rate=self.dilation_rate,
        )
        channels = inputs.shape[-1]
        if self.groups == channels:
            height, width, _, filters = kernel.shape
            shape = (height, width, channels, filters // channels)
            return ops.depthwise_conv(inputs, ops.reshape(kernel, shape), **options)
        parts = zip(
            ops.split(inputs, self.groups, axis=-1),
            ops.split(kernel, self.groups, axis=-1),
            strict=True,
        )
        return ops.concatenate([ops.conv(*p, **options) for p in parts], axis=-1)


def _pairs(kernel_size, hidden_sizes):
    """[height, width] of the kernel of each block."""
    kernels = one_per_block(kernel_size, hidden_sizes)
    pairs = [[k, k] if isinstance(k, int) else k for k in kernels]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            "kernel_size must have one number or one pair, height and width, for each "
            f"block, received {kernel_size}"
        )
    return pairs


def _check_groups(groups, input_channels, hidden_sizes):
    for size in (input_channels, *hidden_sizes):
        if size % groups:
            raise ValueError(
                "input_channels and each of hidden_sizes must be a multiple of groups, "
                f"received {input_channels}, {hidden_sizes} and {groups}"
            )


def _convolution(
    x, filters, kernel, strides, dilation, groups, padding, name, **options
):
    """The zeros of "same" are alike on both sides, with strides as well."""
    if padding == "same" and strides > 1:
        zeros = [(side - 1) * dilation for side in kernel]
        zeros = [(n // 2, n - n // 2) for n in zeros]
        x = layers.ZeroPadding2D(zeros, name=f"{name}_pad")(x)
        padding = "valid"
    options |= dict(strides=strides, padding=padding, dilation_rate=dilation)
    options["name"] = f"{name}_conv"
    if groups == 1:
        return Conv2D(filters, kernel, **options)(x)
    return GroupedConv2D(filters, kernel, groups=groups, **options)(x)


def _block(x, activation, norm, dropout, spatial_dropout, pooling, name, **convolution):
    """One block of the module's equation."""
    x = _convolution(
        x,
        use_bias=norm is None,
        kernel_initializer=kernel_initializer(activation),
        name=name,
        **convolution,
    )
    if norm is not None:
        x = _NORMS[norm](name=f"{name}_norm")(x)
    x = layers.Activation(activation, name=f"{name}_activation")(x)
    if dropout:
        kind = layers.SpatialDropout2D if spatial_dropout else layers.Dropout
        x = kind(dropout, name=f"{name}_dropout")(x)
    if pooling is not None:
        x = _POOLS[pooling](2, 2, name=f"{name}_pool")(x)
    return x


@architecture(
    paper="LeCun et al. 1998, Gradient-Based Learning Applied to Document Recognition, "
    "Proceedings of the IEEE 86(11)",
    kind="image",
    inputs="(batch, image_size, image_size, input_channels)",
    outputs="(batch, height, width, hidden_sizes[-1])",
    tiny=dict(
        image_size=9,
        input_channels=2,
        hidden_sizes=[4, 6],
        kernel_size=[[3, 3], [2, 3]],
        groups=2,
        pooling="max",
    ),
)
def conv2d(
    *,
    image_size: Size | None = None,
    input_channels: Size = 3,
    hidden_sizes: list[Size] = [32, 64, 128],
    kernel_size: Size | list[Size] | list[list[Size]] = 3,
    strides: Size = 1,
    dilation: Size = 1,
    groups: Size = 1,
    padding: Literal["same", "valid"] = "same",
    activation: Activation = "relu",
    norm: Literal["batch", "layer"] | None = "batch",
    dropout: Rate = 0.1,
    spatial_dropout: bool = False,
    pooling: Literal["max", "avg"] | None = None,
    num_classes: Size | None = None,
    classifier_activation: Activation | None = "softmax",
    features_only: bool = False,
) -> EdificeModel:
    """Blocks of convolution, normalisation, activation and pooling.

    Args:
        image_size: height and width, None for any; exported models need a number.
        input_channels: channels of the image.
        hidden_sizes: filters of each block.
        kernel_size: side of the filters, one number, one for each block, or [height,
            width] for each block.
        strides: distance between the pixels at which the filters are applied.
        dilation: distance between the pixels that a filter sees.
        groups: parts of the channels that the filters see apart from each other.
        padding: zeros on all sides, so that no pixel is lost, or no zeros.
        activation: after each convolution and its norm.
        norm: over the batch and the pixels, over the channels, or None, with a bias.
        dropout: rate after each activation, in training. There are no branches that
            could be dropped, hence no drop_path.
        spatial_dropout: drop whole channels instead of single numbers.
        pooling: of each 2x2 pixels after each block, their maximum or mean; the last
            row and column of an odd number are left out. The head has the mean.
        num_classes: classes of the head, (batch, num_classes), on the mean of the last
            map; None gives that map.
        classifier_activation: of the head; None gives logits.
        features_only: give the last map of each size, {"stride_1": ...}, and no head.
    """
    check_dilation(strides, dilation)
    _check_groups(groups, input_channels, hidden_sizes)
    x = inputs = image_input(image_size, input_channels)
    kernels, stride, maps = _pairs(kernel_size, hidden_sizes), 1, {}
    for i, (filters, kernel) in enumerate(zip(hidden_sizes, kernels, strict=True)):
        x = _block(
            x,
            activation,
            norm,
            dropout,
            spatial_dropout,
            pooling,
            name=f"block_{i}",
            filters=filters,
            kernel=kernel,
            strides=strides,
            dilation=dilation,
            groups=groups,
            padding=padding,
        )
        stride *= strides * (2 if pooling else 1)
        maps[stride] = x
    if features_only:
        return EdificeModel(inputs, stage_maps(maps), name="conv2d")
    if num_classes is not None:
        x = global_pool(x, "avg", num_classes)
        x = class_scores(x, num_classes, classifier_activation)
    return EdificeModel(inputs, x, name="conv2d")
