"""Temporal Convolutional Network: dilated causal convolutions with shortcuts.

    y = φ(F(x) + S(x)),    F = D ∘ φ ∘ C_d ∘ D ∘ φ ∘ C_d            (eq. 3)
    C_d(x)_t = b + Σ_j x_{t - jd} W_j,    j = 0 .. k-1              (eq. 2)
    W = g v / ‖v‖                                                   (section 3.3)

D is dropout; S is the identity, or a linear map where the width changes. The dilation
d doubles from block to block, so that n blocks see 1 + 2(k-1)(2^n - 1) steps. The
convolution, with the taps in the other order, is in `blocks/sequence_conv.py`.
"""

from typing import Literal

import keras
from keras import initializers, layers, ops

from keras_edifice.blocks.batch_norm import BatchNorm
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.heads import class_scores
from keras_edifice.blocks.recurrence_initializers import fan_in_uniform
from keras_edifice.blocks.sequence import read_out, sequence_input
from keras_edifice.blocks.sequence_conv import SequenceConv
from keras_edifice.model import EdificeModel
from keras_edifice.options import Activation, Rate, Size
from keras_edifice.registry import architecture


@keras.saving.register_keras_serializable("keras_edifice")
class WeightNormConv(SequenceConv):
    """(batch, time, channels) -> (batch, ⌈time / strides⌉, filters), W = g v / ‖v‖.

    A `SequenceConv` that learns the length and the direction of each filter apart:
    Salimans & Kingma 2016, Weight Normalization, arXiv:1602.07868, eq. 2. v is of the
    kernel's shape; g is one number for each filter, at the start ‖v‖.

    Args:
        *args: those of `SequenceConv`.
        **kwargs: the same, by name.
    """

    def build(self, input_shape):
        super().build(input_shape)

        def initial(shape, dtype=None):
            return ops.cast(self._lengths(self._kernel), dtype)

        self.gain = self.add_weight((self.filters,), initial, name="gain")

    @staticmethod
    def _lengths(v):
        """‖v‖ of each filter, in float32."""
        return ops.sqrt(ops.sum(ops.square(ops.cast(v, "float32")), axis=(0, 1)))

    @property
    def kernel(self):
        """The kernel that the inputs meet."""
        v = ops.cast(super().kernel, "float32")
        return v * (ops.cast(self.gain, "float32") / self._lengths(v))

    # Conv1D saves `kernel` and the bias alone.
    def save_own_variables(self, store):
        layers.Layer.save_own_variables(self, store)

    def load_own_variables(self, store):
        layers.Layer.load_own_variables(self, store)


def _bias(inputs):
    """U(±1/√inputs), as PyTorch has it, which the paper's code leaves as it is."""
    return initializers.RandomUniform(-(inputs**-0.5), inputs**-0.5)


def _convolution(x, filters, kernel_size, dilation, norm, name):
    """C_d of the module, normalised."""
    kind = WeightNormConv if norm == "weight" else SequenceConv
    x = kind(
        filters,
        kernel_size,
        padding="causal",
        dilation_rate=dilation,
        use_bias=norm != "batch",
        kernel_initializer=fan_in_uniform(),
        bias_initializer=_bias(kernel_size * x.shape[-1]),
        name=f"{name}_conv",
    )(x)
    if norm == "batch":
        x = BatchNorm(momentum=0.9, epsilon=1e-5, name=f"{name}_norm")(x)
    return x


def _block(x, filters, kernel_size, dilation, norm, activation, dropout, name):
    """One block of the module's equation."""
    y = x
    for part in (f"{name}_1", f"{name}_2"):
        y = _convolution(y, filters, kernel_size, dilation, norm, part)
        y = layers.Activation(activation, name=f"{part}_activation")(y)
        if dropout:
            y = layers.Dropout(dropout, name=f"{part}_dropout")(y)
    if x.shape[-1] != filters:
        x = Dense(
            filters,
            kernel_initializer=initializers.RandomNormal(stddev=0.01),
            bias_initializer=_bias(x.shape[-1]),
            name=f"{name}_shortcut",
        )(x)
    y = layers.Add(name=f"{name}_add")([y, x])
    return layers.Activation(activation, name=f"{name}_activation")(y)


def _check_sizes(hidden_sizes, dilations, vocab_size, num_classes):
    if len(dilations) != len(hidden_sizes):
        raise ValueError(
            f"dilations must be {len(hidden_sizes)} numbers, one for each block, "
            f"received {dilations}"
        )
    if vocab_size is not None and num_classes is not None:
        raise ValueError(
            "the output is either logits of tokens or scores of classes: pass "
            f"vocab_size or num_classes, received {vocab_size} and {num_classes}"
        )


def _task(embed_size, hidden_size, kernel_size, num_classes, **options):
    """The options of a task: eight blocks, and logits."""
    sizes = dict(embed_size=embed_size, hidden_size=hidden_size, num_layers=8)
    head = dict(num_classes=num_classes, classifier_activation=None)
    return {**sizes, "kernel_size": kernel_size, **head, **options}


_VARIANTS = {  # the defaults of the authors' code
    "pixel_mnist": _task(1, 25, 7, 10, dropout=0.05),
    "adding": _task(2, 30, 7, 1, dropout=0.0),
    "copy_memory": _task(1, 10, 8, 10, dropout=0.0, return_sequences=True),
}


@architecture(
    paper="Bai et al. 2018, An Empirical Evaluation of Generic Convolutional and "
    "Recurrent Networks for Sequence Modeling, arXiv:1803.01271",
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, num_classes | features)",
    causal=True,
    streaming=True,
    tiny=dict(
        embed_size=3,
        hidden_size=4,
        num_layers=2,
        kernel_size=2,
        activation="silu",
        window_size=7,
    ),
    variants=_VARIANTS,
)
def tcn(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 128,
    num_layers: Size = 4,
    hidden_sizes: list[Size] | None = None,
    kernel_size: Size = 3,
    dilations: list[Size] | None = None,
    norm: Literal["weight", "batch"] | None = "weight",
    activation: Activation = "relu",
    dropout: Rate = 0.2,
    num_classes: Size | None = None,
    classifier_activation: Activation | None = "softmax",
    return_sequences: bool = False,
    pool: Literal["last", "mean"] = "last",
    vocab_size: Size | None = None,
    tie_embeddings: bool = True,
    window_size: Size | None = None,
) -> EdificeModel:
    """Residual blocks of two causal convolutions, each block dilated more.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of every block.
        num_layers: number of blocks.
        hidden_sizes: width of each block, instead of hidden_size and num_layers.
        kernel_size: k, taps of each convolution.
        dilations: distance of the taps in each block; None for 1, 2, 4, ...
        norm: "weight" for kernels g v / ‖v‖, as the paper, "batch" for batch
            normalisation after each convolution, None for plain kernels.
        activation: φ; the paper has ReLU.
        dropout: rate after each convolution's activation, in training.
        num_classes: classes of the head; None gives the features.
        classifier_activation: of the head; None gives logits.
        return_sequences: give every step, (batch, window_size, ...).
        pool: how the steps become one vector, by the last or by their mean.
        vocab_size: number of tokens, where the input is their numbers, (batch,
            window_size), instead of features; they are embedded into the width of the
            last block. The output is then the logits of the next token at every step,
            (batch, window_size, vocab_size).
        tie_embeddings: those logits use the matrix that embeds the tokens.
        window_size: steps of the input, None for any number.
    """
    sizes = hidden_sizes or [hidden_size] * num_layers
    dilations = dilations or [2**i for i in range(len(sizes))]
    _check_sizes(sizes, dilations, vocab_size, num_classes)
    width = sizes[-1] if vocab_size else None
    inputs, x = sequence_input(
        window_size, embed_size, width, vocab_size, tie_embeddings
    )
    for i, (size, dilation) in enumerate(zip(sizes, dilations, strict=True)):
        x = _block(
            x, size, kernel_size, dilation, norm, activation, dropout, f"block_{i}"
        )
    x = read_out(inputs, x, return_sequences, pool)
    if num_classes is not None:
        x = class_scores(x, num_classes, classifier_activation)
    return EdificeModel(inputs, x, name="tcn")
