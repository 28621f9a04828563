"""U-Net: a map is condensed, expanded again, and joined to what it was on the way.

    down:  s_l = C(x_l),    x_{l+1} = max pool 2×2 (s_l)
    up:    x_l = C([s_l, U(x_{l+1})]),    from the narrowest map x_L = C(max pool)

C is twice a 3×3 convolution with ReLU, U doubles the sides and halves the channels;
F 2^l channels are on level l. Without padding, s_l is cropped to what U gives.
"""

from typing import Literal

import keras
from keras import layers, ops
from keras.initializers import RandomNormal

from keras_edifice.blocks.batch_norm import BatchNorm
from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.convolution import Conv2D
from keras_edifice.blocks.images import image_input
from keras_edifice.blocks.layer_norm import LayerNorm
from keras_edifice.blocks.max_pooling import MaxPooling
from keras_edifice.blocks.self_attention import SelfAttention
from keras_edifice.model import EdificeModel
from keras_edifice.options import Rate, Size
from keras_edifice.registry import architecture


@keras.saving.register_keras_serializable("keras_edifice")
class PixelAttention(Composite):
    """(batch, height, width, channels) -> the same. Every pixel looks at every other.

    x + SelfAttention(LN(x)), with one head, on the pixels as a sequence.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = LayerNorm(dtype=self.dtype_policy, name="norm")
        self.attention = SelfAttention(1, dtype=self.dtype_policy, name="attention")

    def build(self, input_shape):
        tokens = (input_shape[0], None, input_shape[-1])
        self.norm.build(tokens)
        self.attention.build(tokens)

    def call(self, x):
        shape = ops.shape(x)
        tokens = ops.reshape(x, (shape[0], shape[1] * shape[2], shape[3]))
        return x + ops.reshape(self.attention(self.norm(tokens)), shape)

    def compute_output_shape(self, input_shape):
        return input_shape


def _start(incoming):
    """Normal with variance 2 / N, N the incoming nodes of a neuron (section 3)."""
    return RandomNormal(stddev=(2 / incoming) ** 0.5)


def _convolutions(x, filters, padding, norm, name):
    """C of the module's equation: two 3×3 convolutions, each with norm and ReLU."""
    for i in (1, 2):
        x = Conv2D(
            filters,
            3,
            padding=padding,
            use_bias=norm is None,
            kernel_initializer=_start(9 * x.shape[-1]),
            name=f"{name}_conv{i}",
        )(x)
        if norm == "batch":
            x = BatchNorm(momentum=0.9, epsilon=1e-5, name=f"{name}_norm{i}")(x)
        x = layers.Activation("relu", name=f"{name}_relu{i}")(x)
    return x


def _up(x, filters, kind, name):
    """U of the module's equation: (b, h, w, c) -> (b, 2 h, 2 w, filters)."""
    channels = x.shape[-1]
    if kind == "transpose":  # each new pixel comes from one pixel
        return layers.Conv2DTranspose(
            filters, 2, 2, kernel_initializer=_start(channels), name=f"{name}_up"
        )(x)
    x = layers.UpSampling2D(2, name=f"{name}_repeat")(x)
    start = _start(4 * channels)
    return Conv2D(
        filters, 2, padding="same", kernel_initializer=start, name=f"{name}_up"
    )(x)


def _cropped(skip, borders, name):
    """The middle of a skip, without `borders` rows and columns on each side."""
    return layers.Cropping2D(borders, name=f"{name}_crop")(skip) if borders else skip


def _borders(num_levels, padding):
    """Level -> rows that a skip loses on each side.

    A convolution without padding costs one row on each side, and a row of a level is
    two of the level above: 4 at the lowest skip, then twice as many and 8.
    """
    borders = {}
    for level in reversed(range(num_levels)):
        below = borders.get(level + 1)
        borders[level] = 4 if below is None else 2 * below + 8
    return borders if padding == "valid" else dict.fromkeys(borders, 0)


def _check_size(image_size, num_levels, padding):
    """Every map that is pooled must have even sides, and none may be empty."""
    if image_size is None:
        return
    side, lost = image_size, 4 if padding == "valid" else 0
    for level in range(1, num_levels + 1):
        side -= lost
        if side < 2 or side % 2:
            raise ValueError(
                f"image_size must leave an even side before each of {num_levels} "
                f"poolings, received {image_size}, which leaves {side} on level "
                f"{level}; with padding='same' take a multiple of {2**num_levels}"
            )
        side //= 2
    side -= lost
    for _ in range(num_levels):
        side = 2 * side - lost
    if side < 1:
        raise ValueError(
            f"image_size={image_size} leaves no pixels after {num_levels} levels of "
            "convolutions without padding; take larger images or fewer levels"
        )


@architecture(
    paper="Ronneberger et al. 2015, U-Net: Convolutional Networks for Biomedical Image "
    "Segmentation, arXiv:1505.04597",
    kind="image",
    inputs="(batch, image_size, image_size, num_channels)",
    outputs="(batch, height, width, out_channels)",
    tiny=dict(
        image_size=8,
        num_channels=2,
        out_channels=3,
        base_features=2,
        num_levels=2,
        use_attention=True,
    ),
    variants={
        "original": dict(
            image_size=572,
            num_channels=1,
            out_channels=2,
            padding="valid",
            norm=None,
            dropout=0.5,
        )
    },
)
def unet(
    *,
    image_size: Size | None = 256,
    num_channels: Size = 3,
    out_channels: Size = 1,
    base_features: Size = 64,
    num_levels: Size = 4,
    padding: Literal["same", "valid"] = "same",
    norm: Literal["batch"] | None = "batch",
    up: Literal["transpose", "nearest"] = "transpose",
    dropout: Rate = 0.0,
    use_attention: bool = False,
) -> EdificeModel:
    """Encoder and decoder for images, joined level by level; logits for each pixel.

    Args:
        image_size: height and width, None for any that are even wherever they are
            halved; exported models need a number.
        num_channels: channels of the image.
        out_channels: logits of each pixel.
        base_features: channels of the first level; each level has twice as many.
        num_levels: number of poolings, and of skips.
        padding: "same" keeps the size; "valid" convolves without padding as the paper
            and gives the middle of the map: 388 pixels of 572.
        norm: batch normalisation after each 3x3 convolution; None as the paper, which
            came before it.
        up: a transposed 2x2 convolution, or repeated pixels and a 2x2 convolution.
        dropout: rate at the end of the contracting path, in training.
        use_attention: whether the pixels of the narrowest map look at one another.
    """
    _check_size(image_size, num_levels, padding)
    inputs = x = image_input(image_size, num_channels)
    skips = []
    for level in range(num_levels):
        name = f"down{level + 1}"
        x = _convolutions(x, base_features * 2**level, padding, norm, name)
        skips.append(x)
        x = MaxPooling(2, 2, name=f"{name}_pool")(x)
    x = _convolutions(x, base_features * 2**num_levels, padding, norm, "middle")
    if use_attention:
        x = PixelAttention(name="middle_attention")(x)
    if dropout:
        x = layers.Dropout(dropout, name="middle_dropout")(x)
    borders = _borders(num_levels, padding)
    for level in reversed(range(num_levels)):
        name, filters = f"up{level + 1}", base_features * 2**level
        x = _up(x, filters, up, name)
        skip = _cropped(skips[level], borders[level], name)
        x = layers.Concatenate(name=f"{name}_concatenate")([skip, x])
        x = _convolutions(x, filters, padding, norm, name)
    start = _start(base_features)
    x = Conv2D(
        out_channels, 1, kernel_initializer=start, dtype="float32", name="logits"
    )(x)
    return EdificeModel(inputs, x, name="unet")
