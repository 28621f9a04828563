"""Images as windows of tokens, shifted windows, and their relative positions.

A window of M x M pixels becomes a sequence of M² tokens, row by row; the windows of an
image lie beside each other on the batch axis, row by row as well. Liu et al. 2021,
Swin Transformer, arXiv:2103.14030.

Heights and widths are known numbers. What does not depend on the image is computed
here once, in NumPy.
"""

import numpy as np
from keras import ops


def fit_window(height, width, window, shift=0):
    """The window and the shift that an image has room for.

    Along an axis that is not longer than the window, the window is the axis and
    nothing is shifted.

    Args:
        height: of the image.
        width: of the image.
        window: side of a window, or (rows, columns).
        shift: number of pixels, or (rows, columns).

    Returns:
        ((rows, columns) of a window, (rows, columns) of the shift).
    """
    sides = zip((height, width), _pair(window), _pair(shift), strict=True)
    fitted = [(side, 0) if side <= m else (m, s) for side, m, s in sides]
    return tuple(m for m, _ in fitted), tuple(s for _, s in fitted)


def padded_size(height, width, window):
    """Height and width after `pad_to_windows`."""
    rows, columns = _pair(window)
    return height + -height % rows, width + -width % columns


def pad_to_windows(x, window):
    """Zeros below and to the right, up to whole windows: (b, h, w, c) -> the same."""
    _, height, width, _ = x.shape
    tall, wide = padded_size(height, width, window)
    if (tall, wide) == (height, width):
        return x
    return ops.pad(x, [[0, 0], [0, tall - height], [0, wide - width], [0, 0]])


def crop(x, height, width):
    """Undoes `pad_to_windows`: the first rows and columns of (b, h, w, c)."""
    return x[:, :height, :width]


def cyclic_shift(x, shift):
    """Pixel (i, j) goes to (i - shift, j - shift), around the edges of (b, h, w, c).

    Args:
        x: (b, h, w, c).
        shift: number of pixels, or (rows, columns); negative undoes a positive one.
    """
    for axis, by in zip((1, 2), _pair(shift), strict=True):
        if by:
            x = ops.roll(x, -by, axis=axis)
    return x


def window_partition(x, window):
    """(b, h, w, c) -> (b · windows, M², c), in whole windows.

    Args:
        x: (b, h, w, c), h and w multiples of the window's sides.
        window: side M of a window, or (rows, columns).

    Raises:
        ValueError: a side is not a multiple.
    """
    _, height, width, channels = x.shape
    rows, columns = _pair(window)
    if height % rows or width % columns:
        raise ValueError(
            f"an image of whole windows of {rows} x {columns} is needed, received "
            f"{height} x {width}; call pad_to_windows first"
        )
    x = ops.reshape(x, (-1, height // rows, rows, width // columns, columns, channels))
    x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
    return ops.reshape(x, (-1, rows * columns, channels))


def window_reverse(windows, window, height, width):
    """Undoes `window_partition`: (b · windows, M², c) -> (b, height, width, c).

    Args:
        windows: (b · windows, M², c).
        window: side M of a window, or (rows, columns).
        height: of the image, padding included.
        width: of the image, padding included.
    """
    rows, columns = _pair(window)
    channels = windows.shape[-1]
    x = ops.reshape(
        windows, (-1, height // rows, width // columns, rows, columns, channels)
    )
    x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
    return ops.reshape(x, (-1, height, width, channels))


def shifted_window_mask(height, width, window, shift):
    """Which tokens of a window were neighbours before `cyclic_shift`.

    Along each axis of length L the pixels i < L - M, L - M <= i < L - s and L - s <= i
    are three regions; a token sees those of its own region. The paper adds -100 to the
    other scores, of which softmax makes zero in float32 all the same.

    Args:
        height: of the image, padding included.
        width: of the image, padding included.
        window: side M of a window, or (rows, columns).
        shift: s, number of pixels, or (rows, columns).

    Returns:
        NumPy array (windows, M², M²), True where a query (axis 1) sees a key; None if
        nothing is shifted.
    """
    window, shift = _pair(window), _pair(shift)
    if not any(shift):
        return None
    row, column = (
        (np.arange(side) >= side - m).astype(int) + (np.arange(side) >= side - s)
        for side, m, s in zip((height, width), window, shift, strict=True)
    )
    regions = 3 * row[:, None] + column
    rows, columns = window
    regions = regions.reshape(height // rows, rows, width // columns, columns)
    regions = regions.transpose(0, 2, 1, 3).reshape(-1, rows * columns)
    return regions[:, :, None] == regions[:, None, :]


def repeat_for_images(mask, windows):
    """The mask of an image's windows, for the windows of a batch of images.

    Args:
        mask: (n, M², M²), of `shifted_window_mask`.
        windows: (b · n, M², c), of `window_partition`.

    Returns:
        Boolean (b · n, 1, M², M²), as attention takes it.
    """
    count, tokens, _ = mask.shape
    mask = ops.convert_to_tensor(mask, dtype="bool")
    images = ops.reshape(windows[:, :, :1], (-1, count, tokens, 1))
    mask = ops.logical_and(mask, ops.ones_like(images, dtype="bool"))
    return ops.reshape(mask, (-1, 1, tokens, tokens))


def relative_position_index(window):
    """The row of the table of biases for each pair of tokens of a window.

    With Δr and Δc the query's row and column less the key's: (Δr + M - 1) (2M - 1) +
    Δc + M - 1.

    Args:
        window: side M of a window, or (rows, columns).

    Returns:
        NumPy array (M², M²), int32, from 0 to (2M - 1)² - 1.
    """
    rows, columns = _pair(window)
    row, column = (z.ravel() for z in np.indices((rows, columns)))
    by_row = row[:, None] - row + rows - 1
    by_column = column[:, None] - column + columns - 1
    return (by_row * (2 * columns - 1) + by_column).astype("int32")


def relative_position_bias(table, index):
    """Looks the biases up: ((2M - 1)², heads), (M², M²) -> (1, heads, M², M²)."""
    tokens = index.shape[0]
    flat = ops.convert_to_tensor(np.reshape(index, (-1,)), dtype="int32")
    biases = ops.take(ops.convert_to_tensor(table), flat, axis=0)
    return ops.reshape(ops.transpose(biases), (1, table.shape[-1], tokens, tokens))


def _pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)
