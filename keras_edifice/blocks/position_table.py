"""Tables of positions for tokens that lie on a grid: learned, or sines and cosines.

A table can be carried to another grid by bicubic interpolation, which is how a model
for small images is fine-tuned on large ones (Dosovitskiy et al. 2020, section 3.2).
"""

import math

import keras
import numpy as np
from keras import layers, ops


@keras.saving.register_keras_serializable("keras_edifice")
class PositionTable(layers.Layer):
    """(batch, num_prefix + rows·columns, features) -> the same, positions added.

    Weights saved for another square grid are interpolated when they are loaded.

    Args:
        grid: [rows, columns] of the tokens.
        num_prefix: tokens before those of the grid.
        learned: whether the table is learned; else it is `sincos_2d`, and zero for
            the tokens before.
        stddev: of the normal distribution that a learned table starts from.
    """

    def __init__(self, grid, num_prefix=1, learned=True, stddev=0.02, **kwargs):
        super().__init__(**kwargs)
        self.grid, self.num_prefix = grid, num_prefix
        self.learned, self.stddev = learned, stddev
        self.supports_masking = True

    def build(self, input_shape):
        if self.learned:
            start = keras.initializers.RandomNormal(stddev=self.stddev)
        else:
            start = self._fixed
        tokens = self.num_prefix + math.prod(self.grid)
        self.table = self.add_weight(
            (1, tokens, input_shape[-1]), start, trainable=self.learned, name="table"
        )

    def _fixed(self, shape, dtype=None):
        table = np.zeros(shape, "float32")
        table[0, self.num_prefix :] = sincos_2d(shape[-1], self.grid)
        return ops.convert_to_tensor(table, dtype)

    def call(self, x):
        return x + ops.cast(ops.convert_to_tensor(self.table), x.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def load_own_variables(self, store):
        """Keras calls this to load the table."""
        table = np.array(store["0"])
        if table.shape != tuple(self.table.shape):
            table = resize_position_table(table, self.grid, self.num_prefix)
        self.table.assign(table)


def resize_position_table(table, grid, num_prefix=1):
    """A table for another grid, by bicubic interpolation; prefix rows are kept.

    Args:
        table: array (1, num_prefix + n·n, features) of a square grid.
        grid: (rows, columns) of the new grid.
        num_prefix: rows of the table before those of the grid.

    Returns:
        Array (1, num_prefix + rows·columns, features).

    Raises:
        ValueError: the old grid is not square.
    """
    table = np.asarray(table)
    prefix, old = table[:, :num_prefix], table[:, num_prefix:]
    side = math.isqrt(old.shape[1])
    if side * side != old.shape[1]:
        raise ValueError(
            f"the table must have num_prefix + n·n rows, received {table.shape[1]} "
            f"with num_prefix {num_prefix}; give the num_prefix it was made with"
        )
    rows, columns = (cubic_matrix(side, new) for new in grid)
    old = old.reshape(side, side, -1)
    new = np.einsum("ri,cj,ijd->rcd", rows, columns, old)
    new = new.reshape(1, math.prod(grid), -1).astype(table.dtype)
    return np.concatenate([prefix, new], axis=1)


def cubic_matrix(old, new):
    """The (new, old) matrix of cubic convolution, a = -0.75, edges repeated.

    Pixel centres lie at halves, so that both grids span the same square. Keys 1981,
    Cubic convolution interpolation for digital image processing, eq. 4 for any a.
    """
    places = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(places).astype(int)
    matrix = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        weights = _cubic(np.abs(places - first - offset))
        sources = np.clip(first + offset, 0, old - 1)
        np.add.at(matrix, (np.arange(new), sources), weights)
    return matrix


def _cubic(s, a=-0.75):
    near = (a + 2) * s**3 - (a + 3) * s**2 + 1
    far = a * (s**3 - 5 * s**2 + 8 * s - 4)
    return np.where(s <= 1, near, np.where(s < 2, far, 0.0))


def sincos_2d(features, grid):
    """(rows·columns, features): sine and cosine of the column, then of the row.

    [sin(c ω) | cos(c ω) | sin(r ω) | cos(r ω)],  ω_i = 10000^(-i / (features / 4))

    He et al. 2021, Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377,
    as its code: the column comes first.

    Raises:
        ValueError: the features are not a multiple of four.
    """
    if features % 4:
        raise ValueError(
            f"sines and cosines of two axes need features in multiples of 4, received "
            f"{features}; change the width or learn the positions"
        )
    quarter = features // 4
    omega = 10000.0 ** (-np.arange(quarter) / quarter)
    rows, columns = np.meshgrid(*map(np.arange, grid), indexing="ij")
    angles = [places.reshape(-1, 1) * omega for places in (columns, rows)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=-1)
