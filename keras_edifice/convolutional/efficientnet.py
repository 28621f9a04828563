"""EfficientNet: depth, width and resolution of a network grown in proportion.

    MBConv:   y = [x +] BN ∘ C1×1 ∘ SE ∘ SiLU ∘ BN ∘ D_k×k ∘ SiLU ∘ BN ∘ C1×1(x)
    scaling:  ⌈d L_i⌉ blocks of w C_i channels in stage i,    d = α^φ, w = β^φ  (eq. 3)

The network of table 1 is B0, with φ = 0. The block is that of
`blocks/inverted_residual.py`, with squeeze and excitation in every one.
"""

import math
from functools import partial
from typing import Literal

from keras import layers
from keras.initializers import VarianceScaling

from keras_edifice.blocks.conv_unit import conv_unit
from keras_edifice.blocks.global_pool import global_pool
from keras_edifice.blocks.heads import class_scores
from keras_edifice.blocks.images import image_input, stage_maps
from keras_edifice.blocks.inverted_residual import inverted_residual, rounded_width
from keras_edifice.blocks.squeeze_excite import SqueezeExcite
from keras_edifice.model import EdificeModel
from keras_edifice.options import Activation, Positive, Rate, Size
from keras_edifice.registry import architecture

_STAGES = [  # expansion, kernel, strides, filters, blocks: table 1
    [1, 3, 1, 16, 1],
    [6, 3, 2, 24, 2],
    [6, 5, 2, 40, 2],
    [6, 3, 2, 80, 3],
    [6, 5, 1, 112, 3],
    [6, 5, 2, 192, 4],
    [6, 3, 1, 320, 1],
]
_unit = partial(conv_unit, padding="same", epsilon=1e-3, momentum=0.99)


def _size(width_multiplier, depth_multiplier, image_size, dropout):
    """The options of a published size."""
    return locals()


_VARIANTS = {
    "b0": _size(1.0, 1.0, 224, 0.2),
    "b1": _size(1.0, 1.1, 240, 0.2),
    "b2": _size(1.1, 1.2, 260, 0.3),
    "b3": _size(1.2, 1.4, 300, 0.3),
    "b4": _size(1.4, 1.8, 380, 0.4),
    "b5": _size(1.6, 2.2, 456, 0.4),
    "b6": _size(1.8, 2.6, 528, 0.5),
    "b7": _size(2.0, 3.1, 600, 0.5),
}


def _block(x, expansion, kernel_size, strides, filters, se_ratio, drop_path, name):
    """MBConv; the squeezed width is a part of the block's input, not of the inside."""
    squeezed_size = max(1, int(se_ratio * x.shape[-1]))
    return inverted_residual(
        x,
        filters,
        expansion * x.shape[-1],
        kernel_size,
        strides,
        "silu",
        squeeze=SqueezeExcite(squeezed_size, "silu", name=f"{name}_squeeze"),
        drop_path=drop_path,
        unit=_unit,
        name=name,
    )


def _rows(stages, width, depth):
    """The scaled table: one row for each block, with its name."""
    for stage, (expansion, kernel_size, first, filters, blocks) in enumerate(stages, 1):
        for block in range(math.ceil(depth * blocks)):
            strides = 1 if block else first
            sizes = expansion, kernel_size, strides, rounded_width(width * filters)
            yield f"stage{stage}_block{block + 1}", sizes


def _check_stages(stages):
    for row in stages:
        if len(row) != 5:
            raise ValueError(
                "each of the blocks must have 5 numbers (expansion, kernel size, "
                f"strides, filters, repeats), received {row}"
            )


@architecture(
    paper="Tan and Le 2019, EfficientNet: Rethinking Model Scaling for Convolutional "
    "Neural Networks, arXiv:1905.11946",
    kind="image",
    inputs="(batch, image_size, image_size, input_channels)",
    outputs="(batch, num_classes | features)",
    tiny=dict(
        image_size=15,
        input_channels=2,
        num_classes=3,
        width_multiplier=0.01,
        blocks=[[1, 3, 1, 8, 1], [2, 5, 2, 8, 2]],
    ),
    variants=_VARIANTS,
)
def efficientnet(
    *,
    image_size: Size | None = None,
    input_channels: Size = 3,
    num_classes: Size | None = 1000,
    classifier_activation: Activation | None = "softmax",
    width_multiplier: Positive = 1.0,
    depth_multiplier: Positive = 1.0,
    blocks: list[list[Size]] | None = None,
    se_ratio: Positive = 0.25,
    pooling: Literal["avg", "max"] | None = "avg",
    dropout: Rate = 0.2,
    drop_path: Rate = 0.2,
    features_only: bool = False,
) -> EdificeModel:
    """Inverted residuals with squeeze and excitation, in seven stages.

    Args:
        image_size: height and width, None for any; exported models need a number.
        input_channels: channels of the image.
        num_classes: classes of the head; None gives the features.
        classifier_activation: of the head; None gives logits.
        width_multiplier: factor w of all widths, which become multiples of 8.
        depth_multiplier: factor d of the blocks of each stage, rounded up.
        blocks: rows of expansion, kernel size, strides, filters and number of blocks,
            one for each stage, instead of the paper's table.
        se_ratio: width of squeeze and excitation, in widths of the block's input.
        pooling: how the last map is summarised; None keeps it, without classes.
        dropout: rate before the head, in training.
        drop_path: rate that dropped branches grow to, linearly from block to block.
        features_only: give the last map of each stride, {"stride_2": ...}, and no head.
    """
    inputs, stages = image_input(image_size, input_channels), blocks or _STAGES
    _check_stages(stages)
    rows = list(_rows(stages, width_multiplier, depth_multiplier))
    x = _unit(inputs, rounded_width(width_multiplier * 32), 3, 2, "silu", name="stem")
    maps, stride = {}, 2
    for i, (name, sizes) in enumerate(rows):
        x = _block(x, *sizes, se_ratio, drop_path * i / len(rows), name)
        stride *= sizes[2]
        maps[stride] = x
    if features_only:
        return EdificeModel(inputs, stage_maps(maps), name="efficientnet")
    x = _unit(x, rounded_width(width_multiplier * 1280), 1, 1, "silu", name="last")
    x = global_pool(x, pooling, num_classes)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    if num_classes is not None:
        start = VarianceScaling(1 / 3, "fan_out", "uniform")  # ±1 / √num_classes
        x = class_scores(
            x, num_classes, classifier_activation, kernel_initializer=start
        )
    return EdificeModel(inputs, x, name="efficientnet")
