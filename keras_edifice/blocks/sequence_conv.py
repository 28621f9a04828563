"""Convolution along a sequence that may be padded, and that streams if it is causal.

    y_t = b + Σ_j x_{st + jd - p} W_j,    j = 0 .. k-1

s are the strides, d is the dilation, and x is zero outside of the sequence. p is
(k-1)d with padding "causal", half of it, rounded down, with "same" and 0 with "valid".
For one filter per channel take `causal_conv.py`.
"""

import keras
from keras import layers, ops


@keras.saving.register_keras_serializable("keras_edifice")
class SequenceConv(layers.Conv1D):
    """(batch, time, channels) -> (batch, ⌈time / strides⌉, filters).

    With "valid" the (kernel_size - 1) · dilation_rate steps are missing that would look
    beyond the sequence. Masked steps count as zeros, so that padding changes nothing;
    with strides or "valid", padding at the end. With "causal" and strides of one the
    state is the last (kernel_size - 1) · dilation_rate inputs, (batch, ·, channels).

    Args:
        *args: those of `keras.layers.Conv1D`, without groups.
        **kwargs: the same, by name.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "data_format": "channels_last"})
        self.supports_masking = True

    @property
    def kept(self):
        """How many steps the first and the last tap lie apart."""
        return (self.kernel_size[0] - 1) * self.dilation_rate[0]

    def call(self, x, mask=None, initial_state=None, return_state=False):
        if mask is not None:
            if return_state:
                raise ValueError(
                    f"{self.name} gives the state of whole sequences alone, received a "
                    "mask and return_state=True; give each sequence without padding"
                )
            x = ops.where(ops.expand_dims(mask, -1), x, ops.zeros_like(x))
        if initial_state is None:
            seen = ops.pad(x, [(0, 0), self._zeros(), (0, 0)])
        else:
            seen = ops.concatenate([ops.cast(initial_state, x.dtype), x], axis=1)
        y = self._convolve(seen)
        return (y, self._last(seen)) if return_state else y

    def _zeros(self):
        """Zeros before and after the sequence."""
        if self.padding == "causal":
            return self.kept, 0
        if self.padding == "same":
            return self.kept // 2, self.kept - self.kept // 2
        return 0, 0

    def _convolve(self, seen):
        kernel = ops.cast(self.kernel, seen.dtype)
        y = ops.conv(
            seen,
            kernel,
            self.strides,
            padding="valid",
            data_format="channels_last",
            dilation_rate=self.dilation_rate,
        )
        if self.use_bias:
            y = y + ops.cast(self.bias, y.dtype)
        return y if self.activation is None else self.activation(y)

    def _last(self, seen):
        return seen[:, -self.kept :] if self.kept else seen[:, :0]

    def compute_mask(self, x, mask=None):
        """Which outputs rest on real steps: their own, or with "valid" all taps."""
        if mask is None:
            return None
        if self.padding == "valid" and self.kept:
            mask = ops.logical_and(mask[:, : -self.kept], mask[:, self.kept :])
        return mask[:, :: self.strides[0]]

    def initial_state(self, batch_size):
        """What was seen before the first step: zeros.

        Raises:
            ValueError: the layer looks ahead or leaves steps out.
        """
        if self.padding != "causal" or self.strides != (1,):
            raise ValueError(
                f"{self.name} cannot run step by step with padding={self.padding!r} "
                f"and strides={self.strides[0]}; build it with 'causal' and 1"
            )
        shape = (batch_size, self.kept, self._kernel.shape[1])
        return ops.zeros(shape, dtype=self.compute_dtype)

    def step(self, x_t, state):
        """One step: (batch, channels) and the state -> the output and the new state."""
        x_t = ops.cast(ops.convert_to_tensor(x_t), self.compute_dtype)
        seen = ops.concatenate([state, ops.expand_dims(x_t, 1)], axis=1)
        return self._convolve(seen)[:, 0], seen[:, 1:]
