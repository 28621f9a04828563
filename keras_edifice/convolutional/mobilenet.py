"""MobileNet: a convolution in two parts, one over space and one over channels.

    V1:  y = ReLU6 ∘ BN ∘ C1×1 ∘ ReLU6 ∘ BN ∘ D3×3(x)
    V2:  y = [x +] BN ∘ C1×1 ∘ ReLU6 ∘ BN ∘ D3×3 ∘ ReLU6 ∘ BN ∘ C1×1(x)
    V3:  V2 with other kernels, squeeze and excitation, and HS(x) = x ReLU6(x + 3) / 6

D is a depthwise convolution. The blocks of V2 and V3 are those of
`blocks/inverted_residual.py`; the tables below are those of the papers.
"""

from functools import partial
from typing import Literal

from keras import layers
from keras.initializers import RandomNormal

from keras_edifice.blocks.conv_unit import conv_unit
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.drop_path import drop_path_rates
from keras_edifice.blocks.global_pool import global_pool
from keras_edifice.blocks.heads import class_scores
from keras_edifice.blocks.images import image_input, stage_maps
from keras_edifice.blocks.inverted_residual import inverted_residual, rounded_width
from keras_edifice.blocks.squeeze_excite import SqueezeExcite
from keras_edifice.model import EdificeModel
from keras_edifice.options import Activation, Count, Positive, Rate, Size
from keras_edifice.registry import architecture

_TABLES = {
    "v1": [  # filters, strides: V1, table 1
        [64, 1],
        [128, 2],
        [128, 1],
        [256, 2],
        [256, 1],
        [512, 2],
        *[[512, 1]] * 5,
        [1024, 2],
        [1024, 1],
    ],
    "v2": [  # expansion, filters, repeats, strides: V2, table 2
        [1, 16, 1, 1],
        [6, 24, 2, 2],
        [6, 32, 3, 2],
        [6, 64, 4, 2],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ],
    "v3_large": [  # kernel, expanded, filters, squeeze, swish, strides: V3, table 1
        [3, 16, 16, 0, 0, 1],
        [3, 64, 24, 0, 0, 2],
        [3, 72, 24, 0, 0, 1],
        [5, 72, 40, 1, 0, 2],
        *[[5, 120, 40, 1, 0, 1]] * 2,
        [3, 240, 80, 0, 1, 2],
        [3, 200, 80, 0, 1, 1],
        *[[3, 184, 80, 0, 1, 1]] * 2,
        [3, 480, 112, 1, 1, 1],
        [3, 672, 112, 1, 1, 1],
        [5, 672, 160, 1, 1, 2],
        *[[5, 960, 160, 1, 1, 1]] * 2,
    ],
    "v3_small": [  # the same: V3, table 2
        [3, 16, 16, 1, 0, 2],
        [3, 72, 24, 0, 0, 2],
        [3, 88, 24, 0, 0, 1],
        [5, 96, 40, 1, 1, 2],
        *[[5, 240, 40, 1, 1, 1]] * 2,
        [5, 120, 48, 1, 1, 1],
        [5, 144, 48, 1, 1, 1],
        [5, 288, 96, 1, 1, 2],
        *[[5, 576, 96, 1, 1, 1]] * 2,
    ],
}
_STEM = {"v1": 32, "v2": 32, "v3_large": 16, "v3_small": 16}
_LAST_HIDDEN = {"v3_large": 1280, "v3_small": 1024}
_v3_unit = partial(conv_unit, epsilon=1e-3, momentum=0.99)


def _separable_blocks(x, table, width, drop_path):
    """V1: the map after each block, and the block's stride."""
    if drop_path:
        raise ValueError(
            "drop_path must be 0 for version 'v1', whose blocks have no branches, "
            f"received {drop_path}"
        )
    for i, (filters, strides) in enumerate(table, 1):
        x = conv_unit(x, None, 3, strides, "relu6", name=f"block{i}_depthwise")
        filters = rounded_width(width * filters)
        x = conv_unit(x, filters, 1, 1, "relu6", name=f"block{i}_pointwise")
        yield x, strides


def _inverted_blocks(x, table, width, drop_path):
    """V2: the map after each block, and the block's stride."""
    rates = iter(drop_path_rates(drop_path, sum(row[2] for row in table)))
    for i, (expansion, filters, repeats, first) in enumerate(table, 1):
        for j in range(repeats):
            strides = 1 if j else first
            x = inverted_residual(
                x,
                rounded_width(width * filters),
                expansion * x.shape[-1],
                strides=strides,
                drop_path=next(rates),
                name=f"stage{i}_block{j + 1}",
            )
            yield x, strides


def _searched_blocks(x, table, width, drop_path):
    """V3: the map after each block, and the block's stride."""
    source = 16  # channels before the row; in their proportion the block expands
    rates = drop_path_rates(drop_path, len(table))
    for i, (row, rate) in enumerate(zip(table, rates, strict=True), 1):
        kernel_size, expanded, filters, squeeze, hard_swish, strides = row
        expanded = rounded_width(x.shape[-1] * expanded / source)
        excite = None
        if squeeze:
            squeezed, name = rounded_width(expanded / 4), f"block{i}_squeeze"
            excite = SqueezeExcite(squeezed, "relu", "hard_sigmoid", name=name)
        x = inverted_residual(
            x,
            rounded_width(width * filters),
            expanded,
            kernel_size,
            strides,
            "hard_swish" if hard_swish else "relu",
            squeeze=excite,
            drop_path=rate,
            unit=_v3_unit,
            name=f"block{i}",
        )
        source = filters
        yield x, strides


_BLOCKS = {
    "v1": _separable_blocks,
    "v2": _inverted_blocks,
    "v3_large": _searched_blocks,
    "v3_small": _searched_blocks,
}


def _check_rows(version, table):
    length = len(_TABLES[version][0])
    for row in table:
        if len(row) != length:
            raise ValueError(
                f"each of the blocks of {version!r} must have {length} numbers, "
                f"received {row}; the docstring of `blocks` names them"
            )


def _last_convolution(x, version, width):
    """The 1×1 convolution after the blocks: none, 1280 or six times as many."""
    if version == "v1":
        return x
    if version == "v2":
        filters = rounded_width(1280 * max(1.0, width))
        return conv_unit(x, filters, 1, 1, "relu6", name="last")
    return _v3_unit(x, 6 * x.shape[-1], 1, 1, "hard_swish", name="last")


def _last_hidden(x, version, width):
    """The hidden layer of V3's head; narrow networks keep its width."""
    if version not in _LAST_HIDDEN:
        return x
    return Dense(
        rounded_width(_LAST_HIDDEN[version] * max(1.0, width)),
        activation="hard_swish",
        kernel_initializer=RandomNormal(stddev=0.01),
        name="last_hidden",
    )(x)


@architecture(
    paper="Howard et al. 2017, MobileNets: Efficient Convolutional Neural Networks for "
    "Mobile Vision Applications, arXiv:1704.04861; V2: Sandler et al. 2018, "
    "arXiv:1801.04381; V3: Howard et al. 2019, arXiv:1905.02244",
    kind="image",
    inputs="(batch, image_size, image_size, input_channels)",
    outputs="(batch, num_classes | features)",
    tiny=dict(
        image_size=15,
        input_channels=2,
        num_classes=3,
        version="v3_small",
        width_multiplier=0.1,
        blocks=[[3, 32, 16, 0, 0, 2], [5, 32, 16, 1, 1, 1]],
    ),
    variants={
        "v1": dict(version="v1"),
        "v1_0.5": dict(version="v1", width_multiplier=0.5),
        "v1_1.25": dict(version="v1", width_multiplier=1.25),
        "v2": dict(version="v2"),
        "v2_0.5": dict(version="v2", width_multiplier=0.5),
        "v2_0.75": dict(version="v2", width_multiplier=0.75),
        "v2_1.4": dict(version="v2", width_multiplier=1.4),
        "v3_large": dict(version="v3_large", dropout=0.2),
        "v3_large_0.75": dict(version="v3_large", width_multiplier=0.75, dropout=0.2),
        "v3_small": dict(version="v3_small", dropout=0.2),
        "v3_small_0.75": dict(version="v3_small", width_multiplier=0.75, dropout=0.2),
    },
)
def mobilenet(
    *,
    image_size: Size | None = None,
    input_channels: Size = 3,
    num_classes: Size | None = 1000,
    classifier_activation: Activation | None = "softmax",
    version: Literal["v1", "v2", "v3_large", "v3_small"] = "v1",
    width_multiplier: Positive = 1.0,
    blocks: list[list[Count]] | None = None,
    pooling: Literal["avg", "max"] | None = "avg",
    dropout: Rate = 0.0,
    drop_path: Rate = 0.0,
    features_only: bool = False,
) -> EdificeModel:
    """Depthwise separable convolutions, or inverted residuals made of them.

    Args:
        image_size: height and width, None for any; exported models need a number.
        input_channels: channels of the image.
        num_classes: classes of the head; None gives the features.
        classifier_activation: of the head; None gives logits.
        version: the paper; "v3_large" and "v3_small" are the two networks of the third.
        width_multiplier: factor of all widths, which become multiples of 8.
        blocks: rows of numbers instead of the table of the paper. V1: filters and
            strides of each block. V2: expansion, filters, repeats and strides of each
            stage. V3: kernel size, expanded channels, filters, 1 for squeeze and
            excitation, 1 for a hard swish, and strides of each block.
        pooling: how the last map is summarised; None keeps it, without classes.
        dropout: rate before the last layer, in training.
        drop_path: of V2 and V3, rate of dropped branches at the last block, growing
            linearly from zero.
        features_only: give the last map of each stride, {"stride_2": ...}, and no head.
    """
    inputs, table = image_input(image_size, input_channels), blocks or _TABLES[version]
    _check_rows(version, table)
    width = rounded_width(width_multiplier * _STEM[version])
    if version in ("v1", "v2"):
        stem = conv_unit(inputs, width, 3, 2, "relu6", name="stem")
    else:
        stem = _v3_unit(inputs, width, 3, 2, "hard_swish", name="stem")
    maps, stride = {}, 2
    for x, strides in _BLOCKS[version](stem, table, width_multiplier, drop_path):
        stride *= strides
        maps[stride] = x
    if features_only:
        return EdificeModel(inputs, stage_maps(maps), name="mobilenet")
    x = _last_convolution(x, version, width_multiplier)
    x = global_pool(x, pooling, num_classes)
    if num_classes is not None:
        x = _last_hidden(x, version, width_multiplier)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    if num_classes is not None:
        start = RandomNormal(stddev=0.01)
        x = class_scores(
            x, num_classes, classifier_activation, kernel_initializer=start
        )
    return EdificeModel(inputs, x, name="mobilenet")
