"""Focal Modulation Network: each pixel is multiplied by a summary of its surroundings.

    z^l = gelu(D_l(z^(l-1))),    z^0 = W_z x,   l = 1 ... L        (eq. 4)
    z^(L+1) = gelu(mean of z^L over all pixels)
    y = W_p (q ⊙ h(Σ_l g_l z^l)),    [q, z^0, g] = W_f x           (eq. 5 and 6)

The D_l are depthwise convolutions of growing kernels. A pixel has one gate g_l for each
level, a number without a bound. The modulation stands where Swin has its attention.
"""

from typing import Literal

import keras
from keras import layers, ops

from keras_edifice.blocks.channel_mlp import ChannelMLP
from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.convolution import DepthwiseConv2D
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.drop_path import DropPath, drop_path_rates
from keras_edifice.blocks.global_pool import global_pool
from keras_edifice.blocks.heads import class_scores
from keras_edifice.blocks.images import image_input, stage_maps
from keras_edifice.blocks.initializers import matrix_initializer
from keras_edifice.blocks.layer_norm import LayerNorm
from keras_edifice.blocks.layer_scale import LayerScale
from keras_edifice.blocks.stages import check_stages, patch_conv
from keras_edifice.model import EdificeModel
from keras_edifice.ops.gelu import gelu
from keras_edifice.options import Activation, NonNegative, Positive, Rate, Size
from keras_edifice.registry import architecture


@keras.saving.register_keras_serializable("keras_edifice")
class FocalModulation(Composite):
    """(b, h, w, c) -> the same: the module's equations.

    Args:
        focal_levels: L, number of convolutions.
        focal_window: side of the first kernel.
        focal_factor: by which the side grows from one level to the next.
        normalize_modulator: divide the sum of eq. 5 by its L + 1 terms.
        post_norm_in_modulation: normalise before W_p.

    Raises:
        ValueError: a kernel's side is even.
    """

    def __init__(
        self,
        focal_levels=2,
        focal_window=3,
        focal_factor=2,
        normalize_modulator=False,
        post_norm_in_modulation=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.focal_levels, self.focal_window = focal_levels, focal_window
        self.focal_factor = focal_factor
        self.normalize_modulator = normalize_modulator
        self.post_norm_in_modulation = post_norm_in_modulation
        sides = [focal_window + focal_factor * level for level in range(focal_levels)]
        if any(side % 2 == 0 for side in sides):
            raise ValueError(
                "focal_window + focal_factor * level must be odd at each level, "
                f"received {', '.join(map(str, sides))}; change one of them"
            )
        self.kernel_sizes = sides

    def build(self, input_shape):
        features = input_shape[-1]
        self.projection = self._dense(
            2 * features + self.focal_levels + 1, "projection"
        )
        self.contexts = [
            DepthwiseConv2D(
                side,
                padding="same",
                use_bias=False,
                depthwise_initializer=matrix_initializer("truncated"),
                dtype=self.dtype_policy,
                name=f"context{level}",
            )
            for level, side in enumerate(self.kernel_sizes, 1)
        ]
        self.modulator = self._dense(features, "modulator")
        self.out = self._dense(features, "out")
        for layer in (self.projection, *self.contexts, self.modulator, self.out):
            layer.build(input_shape)
        if self.post_norm_in_modulation:
            self.norm = LayerNorm(dtype=self.dtype_policy, name="norm")
            self.norm.build(input_shape)

    def _dense(self, units, name):
        start = matrix_initializer("truncated")
        return Dense(
            units, kernel_initializer=start, dtype=self.dtype_policy, name=name
        )

    def call(self, x):
        features = x.shape[-1]
        q, z, gates = ops.split(self.projection(x), [features, 2 * features], axis=-1)
        total = ops.zeros_like(z)
        for level, context in enumerate(self.contexts):
            z = gelu(context(z))  # eq. 4
            total = total + z * gates[..., level : level + 1]
        whole = gelu(ops.mean(z, axis=(1, 2), keepdims=True))
        total = total + whole * gates[..., self.focal_levels :]  # eq. 5
        if self.normalize_modulator:
            total = total / (self.focal_levels + 1)
        y = q * self.modulator(total)  # eq. 6
        if self.post_norm_in_modulation:
            y = self.norm(y)
        return self.out(y)

    def compute_output_shape(self, input_shape):
        return input_shape


def _residual(x, branch, post_norm, layer_scale, drop_path):
    """Gives x + γ ⊙ branch(LN(x)), or x + γ ⊙ LN(branch(x)) with `post_norm`."""
    norm = LayerNorm(name=f"{branch.name}_norm")
    y = norm(branch(x)) if post_norm else branch(norm(x))
    if layer_scale is not None:
        y = LayerScale(layer_scale, name=f"{branch.name}_scale")(y)
    if drop_path:
        y = DropPath(drop_path, name=f"{branch.name}_drop_path")(y)
    return layers.Add(name=f"{branch.name}_add")([x, y])


def _patches(x, width, size, overlap, name):
    """The map in patches of `size`, which is their distance as well, normalised."""
    side, padding = (2 * size - 1, size // 2) if overlap else (size, 0)
    x = patch_conv(x, width, side, size, padding, name=name)
    return LayerNorm(name=f"{name}_norm")(x)


def _for_each_stage(value, depths):
    return [value] * len(depths) if isinstance(value, int) else value


def _size(embed_size, depths, focal_levels, focal_window=3, **options):
    """The options of a published size, with ImageNet's classes."""
    return dict(
        embed_size=embed_size,
        depths=depths,
        focal_levels=focal_levels,
        focal_window=focal_window,
        num_classes=1000,
        **options,
    )


_DEEP = [2, 2, 18, 2]
_LARGE = dict(post_norm=True, overlap_down=True, layer_scale=1e-4)
_HUGE = dict(_LARGE, post_norm_in_modulation=True)
_VARIANTS = {  # table 2 and the authors' models: small or large receptive field
    "tiny_srf": _size(96, [2, 2, 6, 2], 2, drop_path=0.2),
    "tiny_lrf": _size(96, [2, 2, 6, 2], 3, drop_path=0.2),
    "small_srf": _size(96, _DEEP, 2, drop_path=0.3),
    "small_lrf": _size(96, _DEEP, 3, drop_path=0.3),
    "base_srf": _size(128, _DEEP, 2, drop_path=0.5),
    "base_lrf": _size(128, _DEEP, 3, drop_path=0.5),
    "large_fl3": _size(192, _DEEP, 3, 5, **_LARGE),
    "large_fl4": _size(192, _DEEP, 4, **_LARGE),
    "xlarge_fl3": _size(256, _DEEP, 3, 5, **_LARGE),
    "xlarge_fl4": _size(256, _DEEP, 4, **_LARGE),
    "huge_fl3": _size(352, _DEEP, 3, **_HUGE),
    "huge_fl4": _size(352, _DEEP, 4, **_HUGE),
}


@architecture(
    paper="Yang et al. 2022, Focal Modulation Networks, arXiv:2203.11926",
    kind="image",
    inputs="(batch, image_size, image_size, num_channels)",
    outputs="(batch, num_classes | features)",
    tiny=dict(
        image_size=8,
        patch_size=2,
        num_channels=2,
        embed_size=4,
        depths=[1, 1],
        focal_levels=[2, 1],
        layer_scale=0.5,
        num_classes=3,
    ),
    variants=_VARIANTS,
)
def focalnet(
    *,
    image_size: Size | None = None,
    patch_size: Size = 4,
    num_channels: Size = 3,
    embed_size: Size = 96,
    depths: list[Size] = [2, 2, 6, 2],
    focal_levels: Size | list[Size] = 2,
    focal_window: Size | list[Size] = 3,
    focal_factor: Size = 2,
    mlp_ratio: Positive = 4.0,
    layer_scale: NonNegative | None = None,
    post_norm: bool = False,
    overlap_down: bool = False,
    post_norm_in_modulation: bool = False,
    normalize_modulator: bool = False,
    num_classes: Size | None = None,
    classifier_activation: Activation | None = "softmax",
    pooling: Literal["avg", "max"] | None = "avg",
    dropout: Rate = 0.0,
    drop_path: Rate = 0.1,
    features_only: bool = False,
) -> EdificeModel:
    """Stages of focal modulation and MLP; each halves the map and doubles the width.

    Args:
        image_size: height and width, None for any; exported models need a number.
        patch_size: side of a patch, which is a pixel of the first stage.
        num_channels: channels of the image.
        embed_size: width of the first stage.
        depths: blocks of each stage.
        focal_levels: convolutions of a modulation, one number or one for each stage.
        focal_window: side of the first kernel, one number or one for each stage.
        focal_factor: by which the kernels' sides grow from level to level.
        mlp_ratio: width of the MLP's hidden layer, in widths of its stage.
        layer_scale: the factor of each branch at the start; None for no factor.
        post_norm: normalise after each branch, not before.
        overlap_down: patches that overlap, nearly twice as wide, in every stage.
        post_norm_in_modulation: normalise once more before a modulation's last matrix.
        normalize_modulator: divide the sum over the levels by their number.
        num_classes: classes of the head; None gives the features.
        classifier_activation: of the head; None gives logits.
        pooling: how the last map is summarised, after the last norm; None keeps it,
            without classes.
        dropout: rate before the head, in training.
        drop_path: rate of dropped branches at the last block, growing linearly.
        features_only: give the map of each stage, {"stride_4": ...}, and no head.
    """
    levels = _for_each_stage(focal_levels, depths)
    windows = _for_each_stage(focal_window, depths)
    check_stages(depths=depths, focal_levels=levels, focal_window=windows)
    inputs = x = image_input(image_size, num_channels)
    rates = iter(drop_path_rates(drop_path, sum(depths)))
    maps = {}
    for stage, depth in enumerate(depths):
        width, size = embed_size * 2**stage, 2 if stage else patch_size
        x = _patches(x, width, size, overlap_down, f"stage{stage + 1}_patches")
        for i in range(1, depth + 1):
            name, rate = f"stage{stage + 1}_block{i}", next(rates)
            modulation = FocalModulation(
                levels[stage],
                windows[stage],
                focal_factor,
                normalize_modulator,
                post_norm_in_modulation,
                name=f"{name}_modulation",
            )
            mlp_size = int(mlp_ratio * width)
            mlp = ChannelMLP(mlp_size, initializer="truncated", name=f"{name}_mlp")
            for branch in (modulation, mlp):
                x = _residual(x, branch, post_norm, layer_scale, rate)
        maps[patch_size * 2**stage] = x
    if features_only:
        return EdificeModel(inputs, stage_maps(maps), name="focalnet")
    x = LayerNorm(name="norm")(x)
    x = global_pool(x, pooling, num_classes)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    if num_classes is not None:
        start = matrix_initializer("truncated")
        x = class_scores(
            x, num_classes, classifier_activation, kernel_initializer=start
        )
    return EdificeModel(inputs, x, name="focalnet")
