"""Squeeze and excitation: each channel is scaled by what the whole map holds.

    z = mean of x over the pixels                                   (eq. 2)
    s = gate(W_2 δ(W_1 z + b_1) + b_2),    y = s ⊙ x                (eq. 3 and 4)

Hu et al. 2017, Squeeze-and-Excitation Networks, arXiv:1709.01507: δ is a ReLU and the
gate a sigmoid; others take other activations.
"""

import keras
from keras import ops

from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.conv_unit import he_fan_out
from keras_edifice.blocks.dense import Dense


@keras.saving.register_keras_serializable("keras_edifice")
class SqueezeExcite(Composite):
    """(batch, height, width, channels) -> the same.

    Args:
        squeezed_size: width between the two matrices.
        activation: name of δ.
        gate: name of the activation that gives the scales.
    """

    def __init__(self, squeezed_size, activation="relu", gate="sigmoid", **kwargs):
        super().__init__(**kwargs)
        self.squeezed_size = squeezed_size
        self.activation, self.gate = activation, gate

    def build(self, input_shape):
        channels = input_shape[-1]
        self.reduce = self._dense(self.squeezed_size, self.activation, "reduce")
        self.expand = self._dense(channels, self.gate, "expand")
        self.reduce.build((None, channels))
        self.expand.build((None, self.squeezed_size))

    def _dense(self, units, activation, name):
        return Dense(
            units,
            activation=activation,
            kernel_initializer=he_fan_out(),
            dtype=self.dtype_policy,
            name=name,
        )

    def scales(self, x):
        """The scale s of each channel: (b, h, w, c) -> (b, 1, 1, c)."""
        squeezed = ops.mean(ops.cast(x, "float32"), axis=(1, 2))  # (b, c)
        scales = self.expand(self.reduce(ops.cast(squeezed, x.dtype)))
        return scales[:, None, None]

    def call(self, x):
        return x * self.scales(x)

    def compute_output_shape(self, input_shape):
        return input_shape
