"""The inverted residual: wide inside, narrow where it is added.

    y = [x +] BN ∘ C1×1 ∘ [SE] ∘ a ∘ BN ∘ D_k×k ∘ a ∘ BN ∘ C1×1(x)

The first 1×1 convolution expands the channels, the depthwise D filters each of them,
the last projects them, without activation. Sandler et al. 2018, arXiv:1801.04381,
section 3.3; SE as Tan et al. 2018 (MnasNet), arXiv:1807.11626.
"""

from keras import layers

from keras_edifice.blocks.conv_unit import conv_unit
from keras_edifice.blocks.drop_path import DropPath


def rounded_width(channels):
    """The multiple of 8 nearest to `channels`, not below 8 nor 0.9 of them."""
    width = max(8, int(channels + 4) // 8 * 8)
    return width + 8 if width < 0.9 * channels else width


def inverted_residual(
    x,
    filters,
    expanded,
    kernel_size=3,
    strides=1,
    activation="relu6",
    *,
    squeeze=None,
    drop_path=0.0,
    unit=conv_unit,
    name,
):
    """(b, h, w, c) -> (b, ⌈h / strides⌉, ⌈w / strides⌉, filters), symbolic.

    Args:
        x: a symbolic tensor; it is added where the output has its shape.
        filters: channels of the output.
        expanded: channels of the depthwise convolution; as many as x has leave out
            the expansion.
        kernel_size: side of the depthwise kernel.
        strides: of the depthwise convolution.
        activation: after expansion and depthwise convolution.
        squeeze: a layer of squeeze and excitation, or None.
        drop_path: rate of dropped branches.
        unit: `conv_unit`, with arguments of its own where they differ.
        name: prefix of the layers' names.
    """
    y = x
    if expanded != x.shape[-1]:
        y = unit(y, expanded, 1, 1, activation, name=f"{name}_expand")
    y = unit(y, None, kernel_size, strides, activation, name=f"{name}_depthwise")
    if squeeze is not None:
        y = squeeze(y)
    y = unit(y, filters, 1, 1, None, name=f"{name}_project")
    if strides > 1 or filters != x.shape[-1]:
        return y
    if drop_path:
        y = DropPath(drop_path, name=f"{name}_drop_path")(y)
    return layers.Add(name=f"{name}_add")([x, y])
