"""Patches of an image as tokens: a linear map of each patch.

    z_n = E vec(patch_n) + b

Dosovitskiy et al. 2020, arXiv:2010.11929, eq. 1, as a convolution whose stride is its
kernel: with the kernel (p, p, c, d) read as a (p·p·c, d) matrix, the two are the same.
"""

import keras
from keras import layers, ops

from keras_edifice.blocks.composite import Composite


@keras.saving.register_keras_serializable("keras_edifice")
class PatchEmbed(Composite):
    """(batch, height, width, channels) -> (batch, patches, embed_size), row by row.

    Args:
        embed_size: width of a token.
        patch_size: side of a patch; it divides height and width.
        use_bias: whether there is a bias.
        initializer: of the kernel, the name of a Keras initialiser.
        flatten: False gives the grid (batch, rows, columns, embed_size).

    Raises:
        ValueError: the patches do not cover the image.
    """

    def __init__(
        self,
        embed_size,
        patch_size,
        use_bias=True,
        initializer="lecun_normal",
        flatten=True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.embed_size, self.patch_size = embed_size, patch_size
        self.use_bias, self.initializer = use_bias, initializer
        self.flatten = flatten

    def build(self, input_shape):
        for side in input_shape[1:3]:
            if side is not None and side % self.patch_size:
                raise ValueError(
                    "the image's sides must be multiples of patch_size, received "
                    f"{tuple(input_shape[1:3])} and {self.patch_size}; resize or pad "
                    "the images"
                )
        self.projection = layers.Conv2D(
            self.embed_size,
            self.patch_size,
            self.patch_size,
            use_bias=self.use_bias,
            kernel_initializer=self.initializer,
            dtype=self.dtype_policy,
            name="projection",
        )
        self.projection.build(input_shape)

    def call(self, x):
        grid = self.projection(x)  # (b, rows, columns, d)
        if not self.flatten:
            return grid
        batch, rows, columns, features = ops.shape(grid)
        return ops.reshape(grid, (batch, rows * columns, features))

    def compute_output_shape(self, input_shape):
        batch, *sides, _ = input_shape
        rows, columns = (s if s is None else s // self.patch_size for s in sides)
        if not self.flatten:
            return (batch, rows, columns, self.embed_size)
        patches = None if None in (rows, columns) else rows * columns
        return (batch, patches, self.embed_size)
