"""A summary of a set that no order of its elements changes."""

import keras
from keras import layers, ops

LOWEST = -3e38  # below every feature, and still finite in float32


@keras.saving.register_keras_serializable("keras_edifice")
class SetPooling(layers.Layer):
    """(batch, elements, features), mask (batch, elements) -> (batch, features).

    Elements whose mask is 0 have no influence, and a set without elements gives zeros.
    Computes in float32.

    Args:
        pool: "sum", "mean" or "max".
        keepdims: whether to keep the axis of the elements, with size one.
    """

    def __init__(self, pool="mean", keepdims=False, **kwargs):
        super().__init__(**kwargs)
        self.pool, self.keepdims = pool, keepdims

    def call(self, x, set_mask=None):
        dtype, x = x.dtype, ops.cast(x, "float32")
        present = ops.ones_like(x[..., :1])  # (batch, elements, 1)
        if set_mask is not None:
            present = ops.cast(ops.expand_dims(set_mask > 0.5, -1), "float32")
        count = ops.sum(present, axis=1, keepdims=True)
        if self.pool == "max":
            x = ops.where(present > 0.5, x, LOWEST)
            y = ops.max(x, axis=1, keepdims=True)
            y = ops.where(count > 0.5, y, 0.0)
        else:
            y = ops.sum(ops.where(present > 0.5, x, 0.0), axis=1, keepdims=True)
            if self.pool == "mean":
                y = y / ops.maximum(count, 1.0)
        return ops.cast(y if self.keepdims else y[:, 0], dtype)

    def compute_output_shape(self, x_shape, set_mask_shape=None):
        batch, _, features = x_shape
        return (batch, 1, features) if self.keepdims else (batch, features)
