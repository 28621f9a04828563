"""Densely Connected Network: every layer sees the maps of all layers before it.

    x_l = H([x_0, x_1, ..., x_{l-1}])                                       (eq. 2)
    H   = C3×3(k) ∘ ReLU ∘ BN ∘ C1×1(4k) ∘ ReLU ∘ BN

[...] joins channels, so that each layer of a block adds its k to them; k is the growth
rate. Between two blocks BN, ReLU, a 1×1 convolution to θ of the channels and averages
of 2×2 pixels halve the map (section 3, DenseNet-BC).
"""

from typing import Annotated, Literal

from keras import layers

from keras_edifice.blocks.batch_norm import BatchNorm
from keras_edifice.blocks.convolution import Conv2D
from keras_edifice.blocks.drop_path import DropPath, drop_path_rates
from keras_edifice.blocks.global_pool import global_pool
from keras_edifice.blocks.heads import class_scores
from keras_edifice.blocks.images import image_input, stage_maps
from keras_edifice.blocks.max_pooling import MaxPooling
from keras_edifice.model import EdificeModel
from keras_edifice.options import Activation, Range, Rate, Size
from keras_edifice.registry import architecture

Share = Annotated[float, Range(0.0, 1.0, open_low=True)]


def _imagenet(growth_rate, block_sizes):
    return {**locals(), "num_classes": 1000}


def _cifar(size, growth_rate, **options):
    """Three blocks of `size` layers."""
    blocks = dict(growth_rate=growth_rate, block_sizes=[size] * 3)
    return {**blocks, "stem": "cifar", **options}


_VARIANTS = {  # table 1, 161 of the authors' code; table 2, by their layers
    "121": _imagenet(32, [6, 12, 24, 16]),
    "169": _imagenet(32, [6, 12, 32, 32]),
    "201": _imagenet(32, [6, 12, 48, 32]),
    "161": _imagenet(48, [6, 12, 36, 24]),
    "264": _imagenet(32, [6, 12, 64, 48]),
    "cifar40": _cifar(12, 12, bn_size=None, compression=1.0, initial_channels=16),
    "cifar_bc100": _cifar(16, 12),
    "cifar_bc250": _cifar(41, 24),
    "cifar_bc190": _cifar(31, 40),
}


def _convolution(x, filters, kernel_size, strides=1, *, name):
    """Zeros are padded alike on both sides. The kernel starts as He et al. 2015."""
    if strides > 1:
        x = layers.ZeroPadding2D(kernel_size // 2, name=f"{name}_pad")(x)
    return Conv2D(
        filters,
        kernel_size,
        strides,
        padding="same" if strides == 1 else "valid",
        use_bias=False,
        kernel_initializer="he_normal",
        name=f"{name}_conv",
    )(x)


def _activated(x, name):
    """ReLU ∘ BN."""
    x = BatchNorm(momentum=0.9, epsilon=1e-5, name=f"{name}_norm")(x)
    return layers.Activation("relu", name=f"{name}_relu")(x)


def _unit(x, filters, kernel_size, dropout, name):
    """C ∘ ReLU ∘ BN, the order of He et al. 2016 (arXiv:1603.05027), and dropout."""
    x = _activated(x, name)
    x = _convolution(x, filters, kernel_size, name=name)
    return layers.Dropout(dropout, name=f"{name}_dropout")(x) if dropout else x


def _stem(x, kind, filters):
    """The layers before the first block, and the stride of what they give."""
    if kind == "cifar":
        return _convolution(x, filters, 3, name="stem"), 1
    x = _convolution(x, filters, 7, 2, name="stem")
    x = _activated(x, "stem")
    return MaxPooling(3, 2, padding=1, name="stem_pool")(x), 4


def _layer(x, growth_rate, bn_size, dropout, drop_path, name):
    """Joins H(x) to x. (b, h, w, c) -> (b, h, w, c + growth_rate)."""
    y = x
    if bn_size is not None:
        y = _unit(y, bn_size * growth_rate, 1, dropout, f"{name}_1")
    y = _unit(y, growth_rate, 3, dropout, f"{name}_2")
    if drop_path:
        y = DropPath(drop_path, name=f"{name}_drop_path")(y)
    return layers.Concatenate(name=f"{name}_join")([x, y])


def _transition(x, compression, dropout, name):
    """(b, h, w, c) -> (b, ⌊h / 2⌋, ⌊w / 2⌋, ⌊compression c⌋)."""
    filters = max(1, int(compression * x.shape[-1]))
    x = _unit(x, filters, 1, dropout, name)
    return layers.AveragePooling2D(2, name=f"{name}_pool")(x)


@architecture(
    paper="Huang et al. 2016, Densely Connected Convolutional Networks, "
    "arXiv:1608.06993",
    kind="image",
    inputs="(batch, image_size, image_size, input_channels)",
    outputs="(batch, num_classes | features)",
    tiny=dict(
        image_size=15,
        input_channels=2,
        num_classes=3,
        growth_rate=3,
        block_sizes=[1, 2],
        bn_size=2,
    ),
    variants=_VARIANTS,
)
def densenet(
    *,
    image_size: Size | None = None,
    input_channels: Size = 3,
    num_classes: Size | None = 10,
    classifier_activation: Activation | None = "softmax",
    growth_rate: Size = 32,
    block_sizes: list[Size] = [6, 12, 24, 16],
    bn_size: Size | None = 4,
    compression: Share = 0.5,
    initial_channels: Size | None = None,
    stem: Literal["imagenet", "cifar"] = "imagenet",
    pooling: Literal["avg", "max"] | None = "avg",
    dropout: Rate = 0.0,
    drop_path: Rate = 0.0,
    features_only: bool = False,
) -> EdificeModel:
    """Blocks of layers that join their outputs; the map is halved between blocks.

    Args:
        image_size: height and width, None for any; exported models need a number.
        input_channels: channels of the image.
        num_classes: classes of the head; None gives the features.
        classifier_activation: of the head; None gives logits.
        growth_rate: k, the channels that each layer adds.
        block_sizes: layers of each block.
        bn_size: width of each layer's 1x1 convolution in growth rates; None for no such
            convolution.
        compression: θ, the part of the channels that a transition keeps.
        initial_channels: channels of the stem; None for two growth rates.
        stem: a 7x7 convolution with stride 2 and pooling, or a 3x3 convolution.
        pooling: how the last map is summarised; None keeps it, without classes.
        dropout: rate after each convolution but the first, in training; the paper has
            0.2 where images are not augmented.
        drop_path: rate at which the maps that the last layer adds are zeros for an
            example, in training, growing linearly from 0 at the first layer.
        features_only: give the map of each block, {"stride_4": ...}, and no head.
    """
    inputs = image_input(image_size, input_channels)
    x, stride = _stem(inputs, stem, initial_channels or 2 * growth_rate)
    maps, rates = {}, iter(drop_path_rates(drop_path, sum(block_sizes)))
    for block, size in enumerate(block_sizes, 1):
        if block > 1:
            x = _transition(x, compression, dropout, name=f"transition{block - 1}")
            stride *= 2
        for i in range(1, size + 1):
            name, rate = f"block{block}_layer{i}", next(rates)
            x = _layer(x, growth_rate, bn_size, dropout, rate, name)
        maps[stride] = x
    maps[stride] = x = _activated(x, "last")
    if features_only:
        return EdificeModel(inputs, stage_maps(maps), name="densenet")
    x = global_pool(x, pooling, num_classes)
    if num_classes is not None:
        x = class_scores(x, num_classes, classifier_activation)
    return EdificeModel(inputs, x, name="densenet")
