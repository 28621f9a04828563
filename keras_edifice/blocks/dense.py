"""Dense layers whose bias costs no pass of its own on PyTorch."""

import keras
from keras import layers

from keras_edifice.backends.fused_layers import FusedDense


@keras.saving.register_keras_serializable("keras_edifice")
class Dense(FusedDense, layers.Dense):
    """(..., features) -> (..., units): φ(x W + b).

    Args:
        **kwargs: those of `keras.layers.Dense`.
    """
