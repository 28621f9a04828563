"""Residual Network: every block adds what it computes to its input.

    y = ReLU(F(x) + S(x)),    S = identity where the shape is kept

    basic:       F = BN ∘ C3×3 ∘ ReLU ∘ BN ∘ C3×3
    bottleneck:  F = BN ∘ C1×1(4w) ∘ ReLU ∘ BN ∘ C3×3(w) ∘ ReLU ∘ BN ∘ C1×1(w)

Where the shape changes, S is a 1×1 convolution or zero padding (section 4.1).
"""

from typing import Literal

import keras
from keras import layers, ops

from keras_edifice.blocks.conv_unit import conv_unit
from keras_edifice.blocks.drop_path import DropPath, drop_path_rates
from keras_edifice.blocks.global_pool import global_pool
from keras_edifice.blocks.heads import class_scores
from keras_edifice.blocks.images import image_input, stage_maps
from keras_edifice.blocks.max_pooling import MaxPooling
from keras_edifice.model import EdificeModel
from keras_edifice.options import Activation, Rate, Size
from keras_edifice.registry import architecture

_DEPTHS = {  # depth -> block and blocks per stage: table 1; section 4.2, 6n + 2 layers
    18: ("basic", [2, 2, 2, 2]),
    34: ("basic", [3, 4, 6, 3]),
    50: ("bottleneck", [3, 4, 6, 3]),
    101: ("bottleneck", [3, 4, 23, 3]),
    152: ("bottleneck", [3, 8, 36, 3]),
    20: ("basic", [3, 3, 3]),
    32: ("basic", [5, 5, 5]),
    44: ("basic", [7, 7, 7]),
    56: ("basic", [9, 9, 9]),
    110: ("basic", [18, 18, 18]),
}
_IMAGENET = dict(num_classes=1000)
_CIFAR = dict(stem="cifar", hidden_size=16, shortcut="pad")


@keras.saving.register_keras_serializable("keras_edifice")
class PadShortcut(layers.Layer):
    """(b, h, w, c) -> (b, ⌈h / strides⌉, ⌈w / strides⌉, filters), without weights.

    Option A of section 4.1: every `strides`-th pixel, and zeros for the new channels.

    Args:
        filters: channels of the output, at least those of the input.
        strides: distance between the pixels that are kept.
    """

    def __init__(self, filters, strides=1, **kwargs):
        super().__init__(**kwargs)
        self.filters, self.strides = filters, strides

    def call(self, x):
        kept = x[:, :: self.strides, :: self.strides]
        return ops.pad(kept, [[0, 0]] * 3 + [[0, self.filters - x.shape[-1]]])

    def compute_output_shape(self, input_shape):
        batch, *sides, _ = input_shape
        sides = [side if side is None else -(-side // self.strides) for side in sides]
        return (batch, *sides, self.filters)


def _stem(x, kind, width):
    """The layers before the first block, and the stride of what they give."""
    if kind == "cifar":
        return conv_unit(x, width, 3, name="stem"), 1
    x = conv_unit(x, width, 7, 2, name="stem")
    return MaxPooling(3, 2, padding=1, name="stem_pool")(x), 4


def _block(x, block_type, width, strides, stride_on, shortcut, gamma, drop_path, name):
    """One block of the module's equation; `gamma` starts the scale of its last BN."""
    if block_type == "basic":
        filters = width
        y = conv_unit(x, width, 3, strides, name=f"{name}_1")
        y = conv_unit(y, filters, 3, 1, None, gamma, name=f"{name}_2")
    else:
        filters = 4 * width
        first, second = (strides, 1) if stride_on == "1x1" else (1, strides)
        y = conv_unit(x, width, 1, first, name=f"{name}_1")
        y = conv_unit(y, width, 3, second, name=f"{name}_2")
        y = conv_unit(y, filters, 1, 1, None, gamma, name=f"{name}_3")
    if strides > 1 or x.shape[-1] != filters:
        if shortcut == "pad":
            x = PadShortcut(filters, strides, name=f"{name}_shortcut")(x)
        else:
            x = conv_unit(x, filters, 1, strides, None, name=f"{name}_shortcut")
    if drop_path:
        y = DropPath(drop_path, name=f"{name}_drop_path")(y)
    x = layers.Add(name=f"{name}_add")([x, y])
    return layers.Activation("relu", name=f"{name}_relu")(x)


def stage_blocks(depth, block_type=None, block_sizes=None):
    """The kind of block and the number in each stage; what is given, or of `depth`."""
    depth_type, depth_sizes = _DEPTHS[depth]
    return block_type or depth_type, block_sizes or depth_sizes


def _head(x, pooling, dropout, num_classes, activation):
    """The last map, pooled and classified, as far as the options ask for it."""
    x = global_pool(x, pooling, num_classes)
    if dropout and pooling is not None:
        x = layers.Dropout(dropout, name="dropout")(x)
    return x if num_classes is None else class_scores(x, num_classes, activation)


@architecture(
    paper="He et al. 2015, Deep Residual Learning for Image Recognition, "
    "arXiv:1512.03385",
    kind="image",
    inputs="(batch, image_size, image_size, input_channels)",
    outputs="(batch, num_classes | features)",
    tiny=dict(
        image_size=15,
        input_channels=2,
        num_classes=3,
        hidden_size=4,
        block_sizes=[1, 2],
        block_type="bottleneck",
    ),
    variants={
        **{f"imagenet{n}": dict(depth=n, **_IMAGENET) for n in (18, 34, 50, 101, 152)},
        **{f"cifar{n}": dict(depth=n, **_CIFAR) for n in (20, 32, 44, 56, 110)},
    },
)
def resnet(
    *,
    image_size: Size | None = None,
    input_channels: Size = 3,
    num_classes: Size | None = 10,
    classifier_activation: Activation | None = "softmax",
    depth: Literal[18, 34, 50, 101, 152, 20, 32, 44, 56, 110] = 18,
    block_sizes: list[Size] | None = None,
    block_type: Literal["basic", "bottleneck"] | None = None,
    hidden_size: Size = 64,
    stem: Literal["imagenet", "cifar"] = "imagenet",
    shortcut: Literal["projection", "pad"] = "projection",
    stride_on: Literal["3x3", "1x1"] = "3x3",
    zero_init_residual: bool = False,
    pooling: Literal["avg", "max"] | None = "avg",
    dropout: Rate = 0.0,
    drop_path: Rate = 0.0,
    features_only: bool = False,
) -> EdificeModel:
    """Stages of residual blocks; each stage halves the map and doubles the channels.

    Args:
        image_size: height and width, None for any; exported models need a number.
        input_channels: channels of the image.
        num_classes: classes of the head; None gives the features.
        classifier_activation: of the head; None gives logits.
        depth: layers with weights, which says the blocks and how many: 18 to 152 with
            four stages for large images, 20 to 110 with three for small ones.
        block_sizes: blocks of each stage, instead of those of `depth`.
        block_type: kind of block, instead of that of `depth`.
        hidden_size: width of the first stage; a bottleneck gives four times as many.
        stem: a 7x7 convolution with stride 2 and pooling, or a 3x3 convolution.
        shortcut: where the shape changes, a 1x1 convolution (option B of the paper) or
            every second pixel and zero channels, without weights (option A).
        stride_on: the convolution of a bottleneck that halves the map: 3x3 as Goyal et
            al. 2017 (arXiv:1706.02677), or the first 1x1 as the paper.
        zero_init_residual: start the last scale of each block at zero, so that every
            block begins as its shortcut (Goyal et al. 2017).
        pooling: how the last map is summarised; None keeps it, without classes.
        dropout: rate before the head, in training.
        drop_path: rate of dropped branches at the last block, growing linearly from
            zero: stochastic depth, Huang et al. 2016 (arXiv:1603.09382).
        features_only: give the map of each stage, {"stride_4": ...}, and no head.
    """
    inputs = image_input(image_size, input_channels)
    block_type, block_sizes = stage_blocks(depth, block_type, block_sizes)
    gamma = "zeros" if zero_init_residual else "ones"
    rates = iter(drop_path_rates(drop_path, sum(block_sizes)))
    x, stride = _stem(inputs, stem, hidden_size)
    maps = {}
    for stage, blocks in enumerate(block_sizes):
        for block in range(blocks):
            x = _block(
                x,
                block_type,
                hidden_size * 2**stage,
                strides := 2 if stage and not block else 1,
                stride_on,
                shortcut,
                gamma,
                next(rates),
                name=f"stage{stage + 1}_block{block + 1}",
            )
            stride *= strides
        maps[stride] = x
    if features_only:
        return EdificeModel(inputs, stage_maps(maps), name="resnet")
    x = _head(x, pooling, dropout, num_classes, classifier_activation)
    return EdificeModel(inputs, x, name="resnet")
