"""What a transformer does to each token by itself: two matrices, or three with a gate.

    FFN(x) = W_2 φ(W_1 x)            gated:  FFN(x) = W_d (φ(W_g x) ⊙ W_u x)

The gated forms are those of Shazeer 2020, GLU Variants Improve Transformer,
arXiv:2002.05202, eq. 6: SwiGLU (φ = silu), GeGLU (gelu) and ReGLU (relu).
"""

import math

import keras
from keras import activations, layers, ops

from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.ops.gelu import gelu


def activation(name):
    """The function of a name: Keras', or one of the forms that transformers use.

    "gelu" is the exact one, "gelu_tanh" its approximation, "squared_relu" relu(x)² of
    So et al. 2021, Primer, arXiv:2109.08668.
    """
    own = {
        "gelu": gelu,
        "gelu_tanh": lambda x: ops.gelu(x, approximate=True),
        "squared_relu": lambda x: ops.square(ops.relu(x)),
    }
    return own.get(name) or activations.get(name)


@keras.saving.register_keras_serializable("keras_edifice")
class FeedForward(Composite):
    """(..., features) -> the same. Each position by itself.

    Args:
        hidden_size: width between the matrices; None for four times the features.
        activation: φ, a name of Keras, "gelu_tanh" or "squared_relu".
        use_bias: whether there are biases.
        dropout: rate after the activation, in training.
        stddev: of the normal distribution that the matrices start from; None for
            Glorot's uniform one.
    """

    per_step = True

    def __init__(
        self,
        hidden_size=None,
        activation="gelu",
        use_bias=True,
        dropout=0.0,
        stddev=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.hidden_size, self.activation = hidden_size, activation
        self.use_bias, self.dropout, self.stddev = use_bias, dropout, stddev
        self.supports_masking = True

    def build(self, input_shape):
        features = input_shape[-1]
        self.width = self.hidden_size or self._default_width(features)
        self.drop = layers.Dropout(self.dropout, dtype=self.dtype_policy, name="drop")
        for name, units in self._matrices(features).items():
            layer = Dense(
                units,
                use_bias=self.use_bias,
                kernel_initializer=self._start(name),
                dtype=self.dtype_policy,
                name=name,
            )
            layer.build((None, self.width if name == "down" else features))
            setattr(self, name, layer)

    def _start(self, name):
        if self.stddev is None:
            return "glorot_uniform"
        return keras.initializers.RandomNormal(stddev=self.stddev)

    def _default_width(self, features):
        return 4 * features

    def _matrices(self, features):
        """Name -> outputs; "down" leads back to the features."""
        return {"up": self.width, "down": features}

    def call(self, x, training=False):
        return self.down(self.drop(self._hidden(x), training=training))

    def _hidden(self, x):
        return activation(self.activation)(self.up(x))

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable("keras_edifice")
class GatedFFN(FeedForward):
    """(..., features) -> the same. Each position by itself; no bias by default.

    Args:
        hidden_size: width between the matrices; None for two thirds of `expansion`
            times the features, rounded up to a multiple of `multiple_of`, which costs
            as much as an ungated one of that expansion.
        activation: φ, a name of Keras or "gelu_tanh".
        expansion: of the default width.
        multiple_of: of the default width.
        use_bias: whether there are biases.
        dropout: rate after the product, in training.
        fused: one matrix for gate and up, the gate first.
        stddev: as in `FeedForward`.
    """

    def __init__(
        self,
        hidden_size=None,
        activation="silu",
        expansion=4.0,
        multiple_of=1,
        use_bias=False,
        dropout=0.0,
        fused=False,
        stddev=None,
        **kwargs,
    ):
        super().__init__(hidden_size, activation, use_bias, dropout, stddev, **kwargs)
        self.expansion, self.multiple_of, self.fused = expansion, multiple_of, fused

    def _default_width(self, features):
        size = int(2 * self.expansion * features / 3)
        return self.multiple_of * math.ceil(size / self.multiple_of)

    def _matrices(self, features):
        if self.fused:
            return {"gate_up": 2 * self.width, "down": features}
        return {"gate": self.width, "up": self.width, "down": features}

    def _hidden(self, x):
        if self.fused:
            gate, up = ops.split(self.gate_up(x), 2, axis=-1)
        else:
            gate, up = self.gate(x), self.up(x)
        return activation(self.activation)(gate) * up
