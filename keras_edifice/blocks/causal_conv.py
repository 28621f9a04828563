"""Causal depthwise convolution, the short filter of most recurrent mixers.

    y_t = activation(Σ_j w_j ⊙ x_{t-(k-1-j)r} + b),    j = 0 .. k-1

The last tap, j = k-1, is that of the present step; r is the dilation. For a filter that
also looks ahead take Keras' DepthwiseConv1D with padding "same".
"""

import keras
from keras import activations, layers, ops

from keras_edifice.ops.tap_sum import tap_sum


@keras.saving.register_keras_serializable("keras_edifice")
class CausalConv(layers.Layer):
    """(batch, time, channels) -> the same. Causal; each channel by itself.

    The state is the last (kernel_size - 1) · dilation inputs, (batch, ·, channels).
    Masked steps count as zeros and do not enter the state, so that sequences may be
    padded on either side.

    Args:
        kernel_size: taps of the filter.
        use_bias: whether there is a learned shift.
        activation: name of the function after the filter; None for none.
        dilation: distance of the taps from each other, in steps.
    """

    def __init__(
        self, kernel_size, use_bias=True, activation=None, dilation=1, **kwargs
    ):
        super().__init__(**kwargs)
        self.kernel_size, self.use_bias = kernel_size, use_bias
        self.activation, self.dilation = activation, dilation
        self.supports_masking = True

    @property
    def kept(self):
        """Number of inputs in the state."""
        return (self.kernel_size - 1) * self.dilation

    def build(self, input_shape):
        channels = input_shape[-1]
        bound = self.kernel_size**-0.5
        self.kernel = self.add_weight(
            (self.kernel_size, channels),
            keras.initializers.RandomUniform(-bound, bound),
            name="kernel",
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight((channels,), "zeros", name="bias")

    def call(self, x, mask=None, initial_state=None, return_state=False):
        if mask is not None:
            x = ops.where(ops.expand_dims(mask, -1), x, ops.zeros_like(x))
        kept = self.kept
        if initial_state is None:
            seen = ops.pad(x, [(0, 0), (kept, 0), (0, 0)])
        else:
            seen = ops.concatenate([ops.cast(initial_state, x.dtype), x], axis=1)
        y = self._filter(seen)
        return (y, self._last(seen, mask)) if return_state else y

    def _filter(self, seen):
        """(batch, time + kept, channels) -> (batch, time, channels)."""
        y = tap_sum(seen, ops.cast(self.kernel, seen.dtype), self.dilation)
        if self.use_bias:
            y = y + ops.cast(self.bias, y.dtype)
        return activations.get(self.activation)(y)

    def _last(self, seen, mask):
        """The last inputs, the oldest first, of those that are not masked."""
        kept = self.kept
        if mask is None or not kept:
            return seen[:, -kept:] if kept else seen[:, :0]
        valid = ops.pad(ops.cast(mask, "float32"), [(0, 0), (kept, 0)])
        valid = valid + ops.cast(ops.cumsum(ops.ones_like(valid), 1) <= kept, "float32")
        # 1 at the last valid input, 2 at the one before it and so on.
        from_end = ops.sum(valid, 1, keepdims=True) - ops.cumsum(valid, 1) + 1.0
        from_end = ops.where(valid > 0, from_end, 0.0)

        def nth(n):
            chosen = ops.expand_dims(ops.equal(from_end, float(n)), -1)
            return ops.sum(ops.where(chosen, seen, ops.zeros_like(seen)), axis=1)

        return ops.stack([nth(n) for n in range(kept, 0, -1)], axis=1)

    def initial_state(self, batch_size):
        """What was seen before the first step: zeros."""
        shape = (batch_size, self.kept, self.kernel.shape[-1])
        return ops.zeros(shape, dtype=self.compute_dtype)

    def step(self, x_t, state):
        """One step: (batch, channels) and the state -> the output and the new state."""
        x_t = ops.cast(ops.convert_to_tensor(x_t), self.compute_dtype)
        seen = ops.concatenate([state, ops.expand_dims(x_t, 1)], axis=1)
        return self._filter(seen)[:, 0], seen[:, 1:]

    def compute_output_shape(self, input_shape):
        return input_shape
