"""Root-mean-square normalisation with a gate, the last step of many linear mixers.

    y = RMSNorm(x) ⊙ φ(g)    or, gated before,    y = RMSNorm(x ⊙ φ(g))

Yang et al. 2023, Gated Linear Attention, arXiv:2312.06635; Dao & Gu 2024, Mamba-2,
arXiv:2405.21060, takes the second form.
"""

import keras
from keras import activations, layers, ops


@keras.saving.register_keras_serializable("keras_edifice")
class GatedRMSNorm(layers.Layer):
    """x (..., features) and gate of the same shape -> the same. Computes in float32.

    Args:
        epsilon: added to the mean square, inside the root.
        activation: φ, the name of a Keras activation.
        norm_before_gate: False normalises the gated x.
        group_size: features that are normalised together; None for all.
        scale: whether there is a learned scale for each feature.

    Raises:
        ValueError: group_size does not divide the features.
    """

    def __init__(
        self,
        epsilon=1e-5,
        activation="silu",
        norm_before_gate=True,
        group_size=None,
        scale=True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.epsilon, self.activation = epsilon, activation
        self.norm_before_gate, self.group_size = norm_before_gate, group_size
        self.scale = scale
        self.supports_masking = True

    def build(self, x_shape, gate_shape=None):
        if self.group_size and x_shape[-1] % self.group_size:
            raise ValueError(
                "the features must be a multiple of group_size, received "
                f"{x_shape[-1]} and {self.group_size}"
            )
        self.gamma = None
        if self.scale:
            self.gamma = self.add_weight((x_shape[-1],), "ones", name="gamma")

    def call(self, x, gate):
        dtype = x.dtype
        x, gate = ops.cast(x, "float32"), ops.cast(gate, "float32")
        gate = activations.get(self.activation)(gate)
        y = self._normalised(x if self.norm_before_gate else x * gate)
        return ops.cast(y * gate if self.norm_before_gate else y, dtype)

    def _normalised(self, x):
        shape = ops.shape(x)
        if self.group_size:
            groups = x.shape[-1] // self.group_size
            x = ops.reshape(x, (*shape[:-1], groups, self.group_size))
        mean_square = ops.mean(ops.square(x), axis=-1, keepdims=True)
        x = ops.reshape(x * ops.rsqrt(mean_square + self.epsilon), shape)
        return x * ops.cast(self.gamma, "float32") if self.scale else x

    def compute_mask(self, x, mask=None):
        return mask[0] if isinstance(mask, list | tuple) else mask

    def compute_output_shape(self, x_shape, gate_shape=None):
        return x_shape
