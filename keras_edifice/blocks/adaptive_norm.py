"""Layer normalisation whose shift, scale and gate come from a condition.

    [β, γ, α] = W SiLU(c) + b,    y = (1 + γ) ⊙ LN(x) + β

Peebles & Xie 2022, DiT, arXiv:2212.09748, section 3.2. LN has no weights. With the
gate (adaLN-Zero) the caller adds x + α ⊙ f(y); since W and b start at zero, such a
residual block starts as the identity.
"""

import keras
from keras import ops

from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.layer_norm import LayerNorm


@keras.saving.register_keras_serializable("keras_edifice")
class AdaptiveNorm(Composite):
    """x (batch, time, features), condition (batch, c) or (batch, time, c) -> like x.

    With `gate` the result is (y, α), α of a shape that broadcasts to x.

    Args:
        gate: whether a gate α is given too (adaLN-Zero).
        epsilon: added to the variance.
    """

    def __init__(self, gate=False, epsilon=1e-6, **kwargs):
        super().__init__(**kwargs)
        self.gate, self.epsilon = gate, epsilon
        self.supports_masking = True

    def build(self, x_shape, condition_shape):
        self.norm = LayerNorm(
            self.epsilon,
            center=False,
            scale=False,
            dtype=self.dtype_policy,
            name="norm",
        )
        self.norm.build(x_shape)
        self.modulation = Dense(
            (3 if self.gate else 2) * x_shape[-1],
            kernel_initializer="zeros",
            dtype=self.dtype_policy,
            name="modulation",
        )
        self.modulation.build(condition_shape)

    def call(self, x, condition):
        parts = self.modulation(ops.silu(condition))
        if len(parts.shape) == 2:
            parts = ops.expand_dims(parts, 1)  # the same for all steps
        shift, scale, *gate = ops.split(parts, 3 if self.gate else 2, axis=-1)
        y = self.norm(x) * (1.0 + scale) + shift
        return (y, gate[0]) if self.gate else y

    def compute_mask(self, x, mask=None):
        mask = mask[0] if isinstance(mask, list | tuple) else mask
        return (mask, None) if self.gate else mask

    def compute_output_shape(self, x_shape, condition_shape):
        if not self.gate:
            return x_shape
        steps = condition_shape[1] if len(condition_shape) == 3 else 1
        return x_shape, (x_shape[0], steps, x_shape[-1])
