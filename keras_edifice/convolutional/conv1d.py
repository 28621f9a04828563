"""Convolutional network for sequences: the same few filters at every step.

    h = φ(norm(Σ_j x_{st + jd - p} W_j)),    y = pool(dropout(h))

One such block after another; without a norm, which has a bias of its own, there is a
bias after the sum. `conv2d.py` is the same for images, `tcn.py` adds residual
connections; the convolution is in `blocks/sequence_conv.py`.
"""

from typing import Literal

import keras
from keras import layers, ops

from keras_edifice.blocks.batch_norm import BatchNorm
from keras_edifice.blocks.dense_stack import kernel_initializer
from keras_edifice.blocks.heads import class_scores
from keras_edifice.blocks.layer_norm import LayerNorm
from keras_edifice.blocks.sequence import read_out, sequence_input
from keras_edifice.blocks.sequence_conv import SequenceConv
from keras_edifice.model import EdificeModel
from keras_edifice.options import Activation, Rate, Size
from keras_edifice.registry import architecture

_NORMS = {"batch": BatchNorm, "layer": LayerNorm}


@keras.saving.register_keras_serializable("keras_edifice")
class PairPooling(layers.Layer):
    """(batch, time, features) -> (batch, ⌊time / 2⌋, features): one step of each two.

    The last step of an odd number is left out, and a pair with a masked step is masked.

    Args:
        pooling: "max" or "avg" of the two.
    """

    def __init__(self, pooling="max", **kwargs):
        super().__init__(**kwargs)
        self.pooling = pooling
        self.supports_masking = True

    def call(self, x):
        first, second = x[:, :-1:2], x[:, 1::2]
        if self.pooling == "max":
            return ops.maximum(first, second)
        return (first + second) / 2

    def compute_mask(self, x, mask=None):
        return None if mask is None else ops.logical_and(mask[:, :-1:2], mask[:, 1::2])

    def compute_output_shape(self, input_shape):
        batch, time, features = input_shape
        return batch, None if time is None else time // 2, features


def one_per_block(kernel_size, hidden_sizes):
    """The kernel of each block.

    Args:
        kernel_size: one for all of them, or a list of one for each.
        hidden_sizes: the width of each block.

    Raises:
        ValueError: the lists have other lengths.
    """
    if isinstance(kernel_size, int):
        return [kernel_size] * len(hidden_sizes)
    if len(kernel_size) != len(hidden_sizes):
        raise ValueError(
            f"kernel_size must be one number or {len(hidden_sizes)}, one for each of "
            f"hidden_sizes, received {kernel_size}"
        )
    return kernel_size


def check_dilation(strides, dilation):
    """Raises a ValueError where both are above one, which TensorFlow does not have."""
    if strides > 1 and dilation > 1:
        raise ValueError(
            "strides or dilation must be 1, received "
            f"strides={strides} and dilation={dilation}"
        )


def _block(x, activation, norm, dropout, pooling, name, *, filters, **convolution):
    """One block of the module's equation."""
    x = SequenceConv(
        filters,
        use_bias=norm is None,
        kernel_initializer=kernel_initializer(activation),
        name=f"{name}_conv",
        **convolution,
    )(x)
    if norm is not None:
        x = _NORMS[norm](name=f"{name}_norm")(x)
    x = layers.Activation(activation, name=f"{name}_activation")(x)
    if dropout:
        x = layers.Dropout(dropout, name=f"{name}_dropout")(x)
    if pooling is not None:
        x = PairPooling(pooling, name=f"{name}_pool")(x)
    return x


@architecture(
    paper="LeCun et al. 1989, Backpropagation Applied to Handwritten Zip Code "
    "Recognition, Neural Computation 1(4)",
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, num_classes | hidden_sizes[-1])",
    streaming=True,
    tiny=dict(
        embed_size=3,
        hidden_sizes=[4, 5],
        kernel_size=[3, 2],
        dilation=2,
        padding="causal",
        window_size=7,
    ),
)
def conv1d(
    *,
    embed_size: Size,
    hidden_sizes: list[Size] = [64, 128, 256],
    kernel_size: Size | list[Size] = 3,
    strides: Size = 1,
    dilation: Size = 1,
    padding: Literal["same", "valid", "causal"] = "same",
    activation: Activation = "relu",
    norm: Literal["batch", "layer"] | None = "batch",
    dropout: Rate = 0.1,
    pooling: Literal["max", "avg"] | None = None,
    num_classes: Size | None = None,
    classifier_activation: Activation | None = "softmax",
    return_sequences: bool = False,
    pool: Literal["last", "mean"] = "mean",
    window_size: Size | None = None,
) -> EdificeModel:
    """Blocks of convolution, normalisation, activation and pooling along the steps.

    Args:
        embed_size: features of each step.
        hidden_sizes: filters of each block.
        kernel_size: steps that a filter sees, one number or one for each block.
        strides: distance between the steps at which the filters are applied.
        dilation: distance between the steps that a filter sees.
        padding: zeros on both sides, so that no step is lost; no zeros; or zeros before
            the sequence alone, so that no step sees those ahead of it. That one streams
            token by token, if strides is 1 and there is no pooling.
        activation: after each convolution and its norm.
        norm: over the batch and the steps, over the features, or None, with a bias.
        dropout: rate after each activation, in training.
        pooling: of each two steps after each block, their maximum or mean; the last of
            an odd number of steps is left out.
        num_classes: classes of the head; None gives the features.
        classifier_activation: of the head; None gives logits.
        return_sequences: give every step, (batch, steps, ...), instead of one vector.
        pool: how the steps become one vector, by the last or by their mean.
        window_size: steps of the input, None for any number.
    """
    check_dilation(strides, dilation)
    inputs, x = sequence_input(window_size, embed_size)
    kernels = one_per_block(kernel_size, hidden_sizes)
    for i, (filters, kernel) in enumerate(zip(hidden_sizes, kernels, strict=True)):
        x = _block(
            x,
            activation,
            norm,
            dropout,
            pooling,
            name=f"block_{i}",
            filters=filters,
            kernel_size=kernel,
            strides=strides,
            padding=padding,
            dilation_rate=dilation,
        )
    x = read_out(inputs, x, return_sequences, pool)
    if num_classes is not None:
        x = class_scores(x, num_classes, classifier_activation)
    return EdificeModel(inputs, x, name="conv1d")
