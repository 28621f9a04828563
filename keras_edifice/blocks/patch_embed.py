"""Patches of an image as tokens: a linear map of each patch.

    z_n = E vec(patch_n) + b

Dosovitskiy et al. 2020, arXiv:2010.11929, eq. 1, as a convolution: with the kernel
(p, p, c, d) read as a (p·p·c, d) matrix, the two are the same. Sequences and videos
(Arnab et al. 2021, ViViT, arXiv:2103.15691, tubelets) are cut along their axes alike.
"""

import keras
from keras import layers, ops

from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.convolution import Conv2D
from keras_edifice.blocks.initializers import matrix_initializer
from keras_edifice.blocks.layer_norm import LayerNorm

CONVOLUTIONS = {1: layers.Conv1D, 2: Conv2D, 3: layers.Conv3D}


@keras.saving.register_keras_serializable("keras_edifice")
class PatchEmbed(Composite):
    """(batch, height, width, channels) -> (batch, patches, embed_size), row by row.

    Sequences (batch, time, channels) and videos (batch, time, height, width, channels)
    become (batch, patches, embed_size) too.

    Args:
        embed_size: width of a token.
        patch_size: side of a patch, or one for each axis.
        use_bias: whether there is a bias.
        initializer: of the kernel, "truncated" as in `matrix_initializer`, or the
            name of a Keras initialiser.
        flatten: False gives the grid, (batch, rows, columns, embed_size).
        stride: distance of the patches, or one for each axis; None for their size.
            Below it they overlap.
        pad: zeros after the end of each axis that the patches do not cover, whose size
            must be known; False raises there.
        norm: whether the tokens are normalised, by LayerNorm.

    Raises:
        ValueError: the patches do not cover the image, a size to pad is unknown, or
            the input has another rank.
    """

    def __init__(
        self,
        embed_size,
        patch_size,
        use_bias=True,
        initializer="lecun_normal",
        flatten=True,
        stride=None,
        pad=False,
        norm=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.embed_size, self.patch_size = embed_size, patch_size
        self.use_bias, self.initializer = use_bias, initializer
        self.flatten, self.stride = flatten, stride
        self.pad, self.norm = pad, norm

    def build(self, input_shape):
        rank = len(input_shape) - 2
        if rank not in CONVOLUTIONS:
            raise ValueError(
                "patches are cut from (batch, one to three axes, channels), received "
                f"shape {tuple(input_shape)}"
            )
        self.sizes = _for_each_axis(self.patch_size, rank, "patch_size")
        self.strides = _for_each_axis(self.stride or self.sizes, rank, "stride")
        if self.pad and None in input_shape[1:-1]:
            raise ValueError(
                f"pad=True needs images of a known size, received {tuple(input_shape)}"
            )
        if not self.pad:
            self._check_cover(input_shape[1:-1])
        start = self.initializer
        if start == "truncated":
            start = matrix_initializer(start)
        self.projection = CONVOLUTIONS[rank](
            self.embed_size,
            self.sizes,
            self.strides,
            use_bias=self.use_bias,
            kernel_initializer=start,
            dtype=self.dtype_policy,
            name="projection",
        )
        self.projection.build(input_shape)
        if self.norm:
            self.layer_norm = LayerNorm(dtype=self.dtype_policy, name="layer_norm")
            self.layer_norm.build((None, self.embed_size))

    def _check_cover(self, sides):
        for side, size, stride in zip(sides, self.sizes, self.strides, strict=True):
            if side is not None and (side < size or (side - size) % stride):
                raise ValueError(
                    f"the image's sides must be multiples of patch_size, received "
                    f"{tuple(sides)} and {self.patch_size}; resize the images or set "
                    "pad=True"
                )

    def _missing(self, sides):
        """Zeros that each axis needs at its end."""
        return [
            max(size - side, 0) or -(side - size) % stride
            for side, size, stride in zip(sides, self.sizes, self.strides, strict=True)
        ]

    def call(self, x):
        if self.pad:
            missing = self._missing(x.shape[1:-1])
            x = ops.pad(x, [(0, 0), *((0, n) for n in missing), (0, 0)])
        grid = self.projection(x)  # (b, rows, columns, d)
        if self.norm:
            grid = self.layer_norm(grid)
        if not self.flatten:
            return grid
        batch, *counts, features = ops.shape(grid)
        patches = counts[0]
        for count in counts[1:]:
            patches = patches * count
        return ops.reshape(grid, (batch, patches, features))

    def compute_output_shape(self, input_shape):
        batch, *sides, _ = input_shape
        rank = len(sides)
        sizes = _for_each_axis(self.patch_size, rank, "patch_size")
        strides = _for_each_axis(self.stride or sizes, rank, "stride")
        counts = []
        for side, size, stride in zip(sides, sizes, strides, strict=True):
            whole = None if side is None else max(side - size, 0)
            if whole is not None and self.pad:
                whole += -whole % stride
            counts.append(None if whole is None else whole // stride + 1)
        if not self.flatten:
            return (batch, *counts, self.embed_size)
        patches = 1
        for count in counts:
            patches = None if None in (patches, count) else patches * count
        return (batch, patches, self.embed_size)


def _for_each_axis(value, rank, name):
    values = [value] * rank if isinstance(value, int) else list(value)
    if len(values) != rank:
        raise ValueError(
            f"{name} must be a number or one for each of the {rank} axes, received "
            f"{value!r}"
        )
    return tuple(values)
