"""Networks in stages: their options, and the layer between two stages."""

from keras import layers

from keras_edifice.blocks.convolution import Conv2D
from keras_edifice.blocks.initializers import matrix_initializer


def check_stages(**options):
    """Raises unless the lists have one item for each stage.

    Args:
        **options: name -> list.

    Raises:
        ValueError: the lists differ in length.
    """
    counts = [len(values) for values in options.values()]
    if len(set(counts)) > 1:
        raise ValueError(
            f"{' and '.join(options)} must have one number for each stage, received "
            f"{' and '.join(map(str, counts))}; give both or change one"
        )


def patch_conv(x, filters, patch_size, strides, padding=0, *, name):
    """(b, h, w, c) -> (b, rows, columns, filters), symbolic: a map of each patch.

    Where the strides are smaller than the patches, these overlap.

    Args:
        x: a symbolic tensor.
        filters: channels of the output.
        patch_size: side of a patch.
        strides: distance between the patches.
        padding: rows and columns of zeros on each side.
        name: of the convolution.
    """
    if padding:
        x = layers.ZeroPadding2D(padding, name=f"{name}_pad")(x)
    start = matrix_initializer("truncated")
    return Conv2D(filters, patch_size, strides, kernel_initializer=start, name=name)(x)
