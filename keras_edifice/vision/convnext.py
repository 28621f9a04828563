"""ConvNeXt: a convolutional network with the proportions of a Transformer.

    y = x + γ ⊙ W_2 gelu(W_1 LN(D_7×7(x)))

D is a depthwise convolution; the rest acts on each pixel by itself. Stem and layers
between the stages cut the map into patches of 4×4 and 2×2 (section 2.2 and 2.6).
"""

from typing import Literal

from keras import layers

from keras_edifice.blocks.channel_mlp import ChannelMLP
from keras_edifice.blocks.convolution import DepthwiseConv2D
from keras_edifice.blocks.drop_path import DropPath, drop_path_rates
from keras_edifice.blocks.global_pool import global_pool
from keras_edifice.blocks.heads import class_scores
from keras_edifice.blocks.images import image_input, stage_maps
from keras_edifice.blocks.initializers import matrix_initializer
from keras_edifice.blocks.layer_norm import LayerNorm
from keras_edifice.blocks.layer_scale import LayerScale
from keras_edifice.blocks.stages import check_stages, patch_conv
from keras_edifice.model import EdificeModel
from keras_edifice.options import Activation, NonNegative, Rate, Size
from keras_edifice.registry import architecture


def _size(depths, width, drop_path):
    """The options of a published size, with ImageNet's classes."""
    widths = [width * 2**stage for stage in range(4)]
    return dict(
        depths=depths, hidden_sizes=widths, drop_path=drop_path, num_classes=1000
    )


_VARIANTS = {  # section 3; dropped branches as in table 5, XL as on ImageNet-22K
    "tiny": _size([3, 3, 9, 3], 96, 0.1),
    "small": _size([3, 3, 27, 3], 96, 0.4),
    "base": _size([3, 3, 27, 3], 128, 0.5),
    "large": _size([3, 3, 27, 3], 192, 0.5),
    "xlarge": _size([3, 3, 27, 3], 256, 0.2),
}


def _block(x, kernel_size, layer_scale, drop_path, name):
    """The module's equation. (b, h, w, c) -> the same."""
    y = DepthwiseConv2D(
        kernel_size,
        padding="same",
        depthwise_initializer=matrix_initializer("truncated"),
        name=f"{name}_depthwise",
    )(x)
    y = LayerNorm(1e-6, name=f"{name}_norm")(y)
    hidden_size = 4 * x.shape[-1]
    y = ChannelMLP(hidden_size, initializer="truncated", name=f"{name}_mlp")(y)
    if layer_scale is not None:
        y = LayerScale(layer_scale, name=f"{name}_scale")(y)
    if drop_path:
        y = DropPath(drop_path, name=f"{name}_drop_path")(y)
    return layers.Add(name=f"{name}_add")([x, y])


def _check_size(image_size, patch_size, num_stages):
    smallest = patch_size * 2 ** (num_stages - 1)
    if image_size is not None and image_size < smallest:
        raise ValueError(
            f"image_size must be at least {smallest} for {num_stages} stages after "
            f"patches of {patch_size}, received {image_size}; give fewer stages or "
            "smaller patches"
        )


@architecture(
    paper="Liu et al. 2022, A ConvNet for the 2020s, arXiv:2201.03545",
    kind="image",
    inputs="(batch, image_size, image_size, num_channels)",
    outputs="(batch, num_classes | hidden_sizes[-1])",
    tiny=dict(
        image_size=9,
        num_channels=2,
        num_classes=3,
        patch_size=2,
        depths=[1, 2],
        hidden_sizes=[4, 6],
        kernel_size=3,
        layer_scale=0.5,
    ),
    variants=_VARIANTS,
)
def convnext(
    *,
    image_size: Size | None = None,
    num_channels: Size = 3,
    patch_size: Size = 4,
    depths: list[Size] = [3, 3, 9, 3],
    hidden_sizes: list[Size] = [96, 192, 384, 768],
    kernel_size: Size = 7,
    layer_scale: NonNegative | None = 1e-6,
    num_classes: Size | None = None,
    classifier_activation: Activation | None = "softmax",
    pooling: Literal["avg", "max"] | None = "avg",
    dropout: Rate = 0.0,
    drop_path: Rate = 0.1,
    features_only: bool = False,
) -> EdificeModel:
    """Stages of depthwise convolutions and channel MLPs; each stage halves the map.

    Args:
        image_size: height and width, None for any; exported models need a number.
        num_channels: channels of the image.
        patch_size: side of the stem's patches.
        depths: blocks of each stage.
        hidden_sizes: width of each stage.
        kernel_size: side of the depthwise kernels.
        layer_scale: the factor γ of each branch at the start; None for no factor.
        num_classes: classes of the head; None gives the features.
        classifier_activation: of the head; None gives logits.
        pooling: how the last map is summarised before the last norm; None gives the
            map, without norm and classes.
        dropout: rate before the head, in training.
        drop_path: rate of dropped branches at the last block, growing linearly.
        features_only: give the map of each stage, {"stride_4": ...}, and no head.
    """
    check_stages(depths=depths, hidden_sizes=hidden_sizes)
    _check_size(image_size, patch_size, len(depths))
    inputs = image_input(image_size, num_channels)
    rates = iter(drop_path_rates(drop_path, sum(depths)))
    x = patch_conv(inputs, hidden_sizes[0], patch_size, patch_size, name="stem")
    x = LayerNorm(1e-6, name="stem_norm")(x)
    maps = {}
    for stage, (depth, width) in enumerate(zip(depths, hidden_sizes, strict=True)):
        name = f"stage{stage + 1}"
        if stage:
            x = LayerNorm(1e-6, name=f"{name}_norm")(x)
            x = patch_conv(x, width, 2, 2, name=f"{name}_downsample")
        for i in range(depth):
            x = _block(x, kernel_size, layer_scale, next(rates), f"{name}_block{i + 1}")
        maps[patch_size * 2**stage] = x
    if features_only:
        return EdificeModel(inputs, stage_maps(maps), name="convnext")
    x = global_pool(x, pooling, num_classes)
    if pooling is not None:
        x = LayerNorm(1e-6, name="norm")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    if num_classes is not None:
        start = matrix_initializer("truncated")
        x = class_scores(
            x, num_classes, classifier_activation, kernel_initializer=start
        )
    return EdificeModel(inputs, x, name="convnext")
