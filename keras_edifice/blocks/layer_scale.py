"""A small learned factor for each channel of a residual branch.

    y = γ ⊙ x

Touvron et al. 2021, Going deeper with Image Transformers, arXiv:2103.17239, eq. 4.
"""

import keras
from keras import layers, ops


@keras.saving.register_keras_serializable("keras_edifice")
class LayerScale(layers.Layer):
    """(..., features) -> the same.

    Args:
        initial: γ at the start; the paper has 0.1 up to 18 layers, 1e-5 up to 24 and
            1e-6 for more.
    """

    per_step = True

    def __init__(self, initial=1e-5, **kwargs):
        super().__init__(**kwargs)
        self.initial = initial
        self.supports_masking = True

    def build(self, input_shape):
        start = keras.initializers.Constant(self.initial)
        self.gamma = self.add_weight((input_shape[-1],), start, name="gamma")

    def call(self, x):
        return x * ops.cast(self.gamma, x.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape
