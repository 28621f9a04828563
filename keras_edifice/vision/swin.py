"""Swin Transformer: attention inside windows, which are shifted in every second block.

    z' = z + W-MSA(LN(z)),    z = z' + MLP(LN(z'))               (eq. 3)
    W-MSA: softmax(Q Kᵀ / √d + B) V for the M² tokens of a window (eq. 4)

B depends on the two tokens' distance alone; it is read from a learned table. Between
the stages each 2×2 pixels become one. `ops/windows.py` cuts and shifts the windows.
"""

from typing import Literal

import keras
from keras import layers, ops

from keras_edifice.blocks.channel_mlp import ChannelMLP
from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.drop_path import drop_path_rates
from keras_edifice.blocks.global_pool import global_pool
from keras_edifice.blocks.heads import class_scores
from keras_edifice.blocks.images import image_input, stage_maps
from keras_edifice.blocks.initializers import matrix_initializer
from keras_edifice.blocks.layer_norm import LayerNorm
from keras_edifice.blocks.patch_embed import PatchEmbed
from keras_edifice.blocks.pre_norm import pre_norm_residual
from keras_edifice.blocks.self_attention import SelfAttention
from keras_edifice.blocks.stages import check_stages
from keras_edifice.model import EdificeModel
from keras_edifice.ops.attention import sdpa
from keras_edifice.ops.windows import (
    crop,
    cyclic_shift,
    fit_window,
    pad_to_windows,
    padded_size,
    relative_position_bias,
    relative_position_index,
    repeat_for_images,
    shifted_window_mask,
    window_partition,
    window_reverse,
)
from keras_edifice.options import Activation, Positive, Rate, Size
from keras_edifice.registry import architecture


@keras.saving.register_keras_serializable("keras_edifice")
class WindowAttention(SelfAttention):
    """(batch, height, width, features) -> the same. Each window by itself.

    A map that is not in whole windows is padded with zeros, below and to the right. A
    shift brings pixels of opposite edges into one window; they do not see each other.

    Args:
        num_heads: heads, which share the features equally.
        window_size: side M of a window; the map's own side if that is not larger.
        shift: rows and columns by which the windows are shifted.
        initializer: "xavier" or "truncated", of the matrices.
    """

    def __init__(
        self, num_heads, window_size=7, shift=0, initializer="truncated", **kwargs
    ):
        super().__init__(num_heads, initializer=initializer, **kwargs)
        self.window_size, self.shift = window_size, shift

    def build(self, input_shape):
        super().build(input_shape)
        sides = input_shape[1:3]
        self.window, self.shifts = fit_window(*sides, self.window_size, self.shift)
        self.padded = padded_size(*sides, self.window)
        self.index = relative_position_index(self.window)
        self.mask = shifted_window_mask(*self.padded, self.window, self.shifts)
        distances = int(self.index.max()) + 1  # (2M - 1)²
        self.bias_table = self.add_weight(
            (distances, self.num_heads),
            matrix_initializer("truncated"),
            name="bias_table",
        )

    def call(self, x):
        _, height, width, _ = x.shape
        windows = self._windows(x)  # (b · n, M², c)
        y = sdpa(*self._heads(windows), **self._bias_and_mask(windows))
        y = self.out(ops.reshape(y, ops.shape(windows)))
        y = window_reverse(y, self.window, *self.padded)
        y = cyclic_shift(y, [-s for s in self.shifts])
        return crop(y, height, width)

    def attention_weights(self, x):
        """How much a window's tokens look at each other: (b · n, heads, M², M²)."""
        windows = self._windows(ops.convert_to_tensor(x))
        options = self._bias_and_mask(windows)
        return sdpa(*self._heads(windows), return_weights=True, **options)[1]

    def _windows(self, x):
        x = cyclic_shift(pad_to_windows(x, self.window), self.shifts)
        return window_partition(x, self.window)

    def _bias_and_mask(self, windows):
        bias = relative_position_bias(self.bias_table, self.index)
        if self.mask is None:
            return dict(bias=bias)
        return dict(bias=bias, mask=repeat_for_images(self.mask, windows))


@keras.saving.register_keras_serializable("keras_edifice")
class PatchMerging(Composite):
    """(b, h, w, c) -> (b, ⌈h / 2⌉, ⌈w / 2⌉, 2c): each 2×2 pixels become one.

    Zeros are added below and to the right of a map of odd sides.
    """

    def build(self, input_shape):
        features = input_shape[-1]
        self.norm = LayerNorm(dtype=self.dtype_policy, name="norm")
        self.reduction = Dense(
            2 * features,
            use_bias=False,
            kernel_initializer=matrix_initializer("truncated"),
            dtype=self.dtype_policy,
            name="reduction",
        )
        self.norm.build((None, 4 * features))
        self.reduction.build((None, 4 * features))

    def call(self, x):
        x = pad_to_windows(x, 2)
        pixels = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(ops.concatenate(pixels, axis=-1)))

    def compute_output_shape(self, input_shape):
        batch, height, width, features = input_shape
        return (batch, -(-height // 2), -(-width // 2), 2 * features)


def _size(embed_size, depths, num_heads, drop_path, image_size=224, window_size=7):
    """The options of a published size, with ImageNet's classes."""
    return {**locals(), "num_classes": 1000}


_DEEP = [2, 2, 18, 2]
_VARIANTS = {  # section 3.3, and the authors' configurations
    "tiny": _size(96, [2, 2, 6, 2], [3, 6, 12, 24], 0.2),
    "small": _size(96, _DEEP, [3, 6, 12, 24], 0.3),
    "base": _size(128, _DEEP, [4, 8, 16, 32], 0.5),
    "base_384": _size(128, _DEEP, [4, 8, 16, 32], 0.5, 384, 12),
    "large": _size(192, _DEEP, [6, 12, 24, 48], 0.2),
    "large_384": _size(192, _DEEP, [6, 12, 24, 48], 0.2, 384, 12),
}


def _block(x, num_heads, window_size, shift, mlp_ratio, dropout, drop_path, name):
    """Equation 3: (b, h, w, c) -> the same."""
    attention = WindowAttention(num_heads, window_size, shift, name=f"{name}_attention")
    mlp_size = int(mlp_ratio * x.shape[-1])
    mlp = ChannelMLP(mlp_size, dropout, "truncated", name=f"{name}_mlp")
    for branch in (attention, mlp):
        x = pre_norm_residual(
            x, branch, epsilon=1e-5, dropout=dropout, drop_path=drop_path
        )
    return x


@architecture(
    paper="Liu et al. 2021, Swin Transformer: Hierarchical Vision Transformer using "
    "Shifted Windows, arXiv:2103.14030",
    kind="image",
    inputs="(batch, image_size, image_size, num_channels)",
    outputs="(batch, num_classes | features)",
    tiny=dict(
        image_size=14,
        patch_size=2,
        num_channels=2,
        embed_size=4,
        depths=[2, 1],
        num_heads=[1, 2],
        window_size=3,
        num_classes=3,
    ),
    multiples={"image_size": "patch_size"},
    variants=_VARIANTS,
)
def swin(
    *,
    image_size: Size = 224,
    patch_size: Size = 4,
    num_channels: Size = 3,
    embed_size: Size = 96,
    depths: list[Size] = [2, 2, 6, 2],
    num_heads: list[Size] = [3, 6, 12, 24],
    window_size: Size = 7,
    mlp_ratio: Positive = 4.0,
    num_classes: Size | None = None,
    classifier_activation: Activation | None = "softmax",
    pooling: Literal["avg", "max"] | None = "avg",
    dropout: Rate = 0.0,
    drop_path: Rate = 0.2,
    features_only: bool = False,
) -> EdificeModel:
    """Stages of window attention; each stage halves the map and doubles the width.

    Weights fit every image size whose maps are at least as large as the windows.

    Args:
        image_size: height and width of the image.
        patch_size: side of a patch, which is a token of the first stage.
        num_channels: channels of the image.
        embed_size: width of the first stage.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        window_size: side of a window, in tokens; maps that are not whole windows are
            padded with zeros.
        mlp_ratio: width of the MLP's hidden layer, in widths of its stage.
        num_classes: classes of the head; None gives the features.
        classifier_activation: of the head; None gives logits.
        pooling: how the last map is summarised, after the last norm; None keeps it,
            without classes.
        dropout: rate after the patches, each branch and each MLP activation.
        drop_path: rate of dropped branches at the last block, growing linearly.
        features_only: give the map of each stage, {"stride_4": ...}, and no head.
    """
    check_stages(depths=depths, num_heads=num_heads)
    inputs = image_input(image_size, num_channels)
    rates = iter(drop_path_rates(drop_path, sum(depths)))
    x = PatchEmbed(
        embed_size,
        patch_size,
        initializer="truncated",
        flatten=False,
        norm=True,
        name="patches",
    )(inputs)
    if dropout:
        x = layers.Dropout(dropout, name="patches_dropout")(x)
    maps = {}
    for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
        if stage:
            x = PatchMerging(name=f"stage{stage + 1}_merging")(x)
        for i in range(depth):
            x = _block(
                x,
                heads,
                window_size,
                shift=window_size // 2 if i % 2 else 0,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                drop_path=next(rates),
                name=f"stage{stage + 1}_block{i + 1}",
            )
        maps[patch_size * 2**stage] = x
    if features_only:
        return EdificeModel(inputs, stage_maps(maps), name="swin")
    x = LayerNorm(name="norm")(x)
    x = global_pool(x, pooling, num_classes)
    if num_classes is not None:
        start = matrix_initializer("truncated")
        x = class_scores(
            x, num_classes, classifier_activation, kernel_initializer=start
        )
    return EdificeModel(inputs, x, name="swin")
