"""PoolFormer: a Transformer's blocks, with average pooling in place of attention.

    z = x + λ_1 ⊙ (AvgPool(n) - n),    n = GN(x)                  (eq. 2 and 4)
    y = z + λ_2 ⊙ MLP(GN(z))                                      (eq. 3)

GN normalises over all pixels and channels of an image. Each stage begins with patches
that overlap. What is left of the Transformer is called MetaFormer.
"""

from typing import Literal

import keras
from keras import layers, ops

from keras_edifice.blocks.channel_mlp import ChannelMLP
from keras_edifice.blocks.drop_path import drop_path_rates
from keras_edifice.blocks.global_pool import global_pool
from keras_edifice.blocks.heads import class_scores
from keras_edifice.blocks.images import image_input, stage_maps
from keras_edifice.blocks.initializers import matrix_initializer
from keras_edifice.blocks.pre_norm import pre_norm_residual
from keras_edifice.blocks.stages import check_stages, patch_conv
from keras_edifice.model import EdificeModel
from keras_edifice.options import Activation, NonNegative, Positive, Rate, Size
from keras_edifice.registry import architecture


@keras.saving.register_keras_serializable("keras_edifice")
class PoolMixer(layers.Layer):
    """(b, h, w, c) -> the same, without weights; zeros for a constant map (eq. 4).

    The mean of the pixels around each pixel, less the pixel, which the residual
    connection adds again. At the border the mean is of the pixels that exist.

    Args:
        pool_size: odd side of the window of the mean.

    Raises:
        ValueError: `pool_size` is even.
    """

    def __init__(self, pool_size=3, **kwargs):
        super().__init__(**kwargs)
        if pool_size % 2 == 0:
            raise ValueError(
                f"pool_size must be odd, for a window with a middle, received "
                f"{pool_size}"
            )
        self.pool_size = pool_size

    def call(self, x):
        return ops.average_pool(x, self.pool_size, strides=1, padding="same") - x

    def compute_output_shape(self, input_shape):
        return input_shape


def _norm(name):
    """GN: one group, so that the statistics are those of the whole map."""
    return layers.GroupNormalization(1, epsilon=1e-5, name=name)


def _block(x, pool_size, mlp_ratio, layer_scale, drop_path, name):
    """The module's equations: (b, h, w, c) -> the same.

    The shift of the first norm has no effect, for the mixer takes constants away; the
    authors' code has it, and their weights.
    """
    mixer = PoolMixer(pool_size, name=f"{name}_mixer")
    mlp_size = int(mlp_ratio * x.shape[-1])
    mlp = ChannelMLP(mlp_size, initializer="truncated", name=f"{name}_mlp")
    for branch in (mixer, mlp):
        x = pre_norm_residual(
            x,
            branch,
            norm=_norm(f"{branch.name}_norm"),
            layer_scale=layer_scale,
            drop_path=drop_path,
        )
    return x


def _size(depths, hidden_sizes, layer_scale, drop_path):
    """The options of a published size, with ImageNet's classes."""
    return {**locals(), "num_classes": 1000}


_SMALL, _MEDIUM = [64, 128, 320, 512], [96, 192, 384, 768]
_VARIANTS = {  # table 1; factors and rates of section 4.1
    "s12": _size([2, 2, 6, 2], _SMALL, 1e-5, 0.1),
    "s24": _size([4, 4, 12, 4], _SMALL, 1e-5, 0.1),
    "s36": _size([6, 6, 18, 6], _SMALL, 1e-6, 0.2),
    "m36": _size([6, 6, 18, 6], _MEDIUM, 1e-6, 0.3),
    "m48": _size([8, 8, 24, 8], _MEDIUM, 1e-6, 0.4),
}


@architecture(
    paper="Yu et al. 2021, MetaFormer Is Actually What You Need for Vision, "
    "arXiv:2111.11418",
    kind="image",
    inputs="(batch, image_size, image_size, num_channels)",
    outputs="(batch, num_classes | hidden_sizes[-1])",
    tiny=dict(
        image_size=15,
        num_channels=2,
        depths=[1, 2],
        hidden_sizes=[4, 6],
        layer_scale=0.5,
        num_classes=3,
    ),
    variants=_VARIANTS,
)
def poolformer(
    *,
    image_size: Size | None = None,
    num_channels: Size = 3,
    depths: list[Size] = [2, 2, 6, 2],
    hidden_sizes: list[Size] = [64, 128, 320, 512],
    pool_size: Size = 3,
    mlp_ratio: Positive = 4.0,
    layer_scale: NonNegative | None = 1e-5,
    num_classes: Size | None = None,
    classifier_activation: Activation | None = "softmax",
    pooling: Literal["avg", "max"] | None = "avg",
    dropout: Rate = 0.0,
    drop_path: Rate = 0.1,
    features_only: bool = False,
) -> EdificeModel:
    """Stages of pooling mixers and channel MLPs; each stage halves the map.

    Args:
        image_size: height and width, None for any; exported models need a number.
        num_channels: channels of the image.
        depths: blocks of each stage.
        hidden_sizes: width of each stage.
        pool_size: odd side of the mixers' window.
        mlp_ratio: width of the MLP's hidden layer, in widths of its stage.
        layer_scale: the factor λ of each branch at the start; None for no factor.
        num_classes: classes of the head; None gives the features.
        classifier_activation: of the head; None gives logits.
        pooling: how the last map is summarised, after the last norm; None keeps it,
            without classes.
        dropout: rate before the head, in training.
        drop_path: rate of dropped branches at the last block, growing linearly.
        features_only: give the map of each stage, {"stride_4": ...}, and no head.
    """
    check_stages(depths=depths, hidden_sizes=hidden_sizes)
    inputs = x = image_input(image_size, num_channels)
    rates = iter(drop_path_rates(drop_path, sum(depths)))
    maps = {}
    for stage, (depth, width) in enumerate(zip(depths, hidden_sizes, strict=True), 1):
        size, strides, padding = (7, 4, 2) if stage == 1 else (3, 2, 1)
        x = patch_conv(x, width, size, strides, padding, name=f"stage{stage}_patches")
        for i in range(1, depth + 1):
            name = f"stage{stage}_block{i}"
            x = _block(x, pool_size, mlp_ratio, layer_scale, next(rates), name)
        maps[2 ** (stage + 1)] = x
    if features_only:
        return EdificeModel(inputs, stage_maps(maps), name="poolformer")
    x = global_pool(_norm("norm")(x), pooling, num_classes)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    if num_classes is not None:
        start = matrix_initializer("truncated")
        x = class_scores(
            x, num_classes, classifier_activation, kernel_initializer=start
        )
    return EdificeModel(inputs, x, name="poolformer")
