"""Positions as sines and cosines of falling frequencies: nothing is learned.

    PE[t, 2i] = sin(t ω_i),    PE[t, 2i+1] = cos(t ω_i),    ω_i = 10000^(-2i/d)

Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762, section 3.5; for
images Carion et al. 2020, DETR, arXiv:2005.12872; for the steps of diffusion models Ho
et al. 2020, arXiv:2006.11239, and Peebles & Xie 2022, arXiv:2212.09748.
"""

import math

import keras
import numpy as np
from keras import layers, ops

from keras_edifice.ops.positions import positions


def frequencies(count, largest_period=10000.0, closed=False):
    """(count,): largest_period^(-i/count), or ^(-i/(count - 1)) if closed, float64."""
    return largest_period ** (-np.arange(count) / max(count - closed, 1))


@keras.saving.register_keras_serializable("keras_edifice")
class SinusoidalPositions(layers.Layer):
    """(batch, time, features) -> the same, positions added. Any number of features.

    Args:
        layout: "interleaved", sine and cosine in turn, or "split", all sines first.
        closed: frequencies to 1/10000 exactly, as tensor2tensor has them.
        input_scale: what the input is multiplied by before; √features in the paper.
        learned_scale: whether the positions are multiplied by a learned number, one at
            the start.

    Raises:
        ValueError: unknown layout.
    """

    def __init__(
        self,
        layout="interleaved",
        closed=False,
        input_scale=1.0,
        learned_scale=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if layout not in ("interleaved", "split"):
            raise ValueError(
                f"layout must be one of 'interleaved', 'split', received {layout!r}"
            )
        self.layout, self.closed = layout, closed
        self.input_scale, self.learned_scale = input_scale, learned_scale
        self.supports_masking = True

    def build(self, input_shape):
        half = -(-input_shape[-1] // 2)
        omega = frequencies(half, closed=self.closed)
        if not self.closed:  # for an odd number of features as well: d, not 2 · half
            omega = 10000.0 ** (-2.0 * np.arange(half) / input_shape[-1])
        self.omega = omega
        if self.learned_scale:
            self.scale = self.add_weight((), "ones", name="scale")

    def call(self, x, offset=0):
        """Adds positions to x; `offset` is the number of steps before, or (batch,)."""
        steps = ops.expand_dims(positions(x), 0)
        offset = ops.cast(ops.convert_to_tensor(offset), "float32")
        angles = ops.expand_dims(steps + ops.reshape(offset, (-1, 1)), -1)
        angles = angles * ops.convert_to_tensor(self.omega, "float32")
        sines, cosines = ops.sin(angles), ops.cos(angles)  # (1 or b, t, half)
        features = x.shape[-1]
        if self.layout == "split":
            table = ops.concatenate([sines, cosines[..., : features // 2]], axis=-1)
        else:
            pairs = ops.stack([sines, cosines], axis=-1)
            shape = (*ops.shape(sines)[:-1], 2 * sines.shape[-1])
            table = ops.reshape(pairs, shape)[..., :features]
        if self.learned_scale:
            table = table * ops.cast(self.scale, "float32")
        return x * self.input_scale + ops.cast(table, x.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable("keras_edifice")
class SinusoidalPositions2D(layers.Layer):
    """(batch, rows, columns, features) -> the same, positions of both axes added.

    Half of the features belong to each axis.

    Args:
        order: "wh", the columns' half first (MAE, DiT), or "hw", the rows' (DETR).
        interleaved: sine and cosine in turn, not all sines first.
        normalize: positions from 1/n to 1 times 2π (DETR), not 0 to n - 1.

    Raises:
        ValueError: unknown order, or features that are no multiple of four.
    """

    def __init__(self, order="wh", interleaved=False, normalize=False, **kwargs):
        super().__init__(**kwargs)
        if order not in ("wh", "hw"):
            raise ValueError(f"order must be one of 'wh', 'hw', received {order!r}")
        self.order, self.interleaved = order, interleaved
        self.normalize = normalize

    def build(self, input_shape):
        if input_shape[-1] % 4:
            raise ValueError(
                "sines and cosines of two axes need features in multiples of 4, "
                f"received {input_shape[-1]}"
            )

    def call(self, x):
        rows = ops.expand_dims(self._waves(x, 1), 1)  # (h, 1, d / 2)
        columns = ops.expand_dims(self._waves(x, 2), 0)  # (1, w, d / 2)
        rows, columns = (z + ops.zeros_like(rows + columns) for z in (rows, columns))
        axes = [columns, rows] if self.order == "wh" else [rows, columns]
        return x + ops.cast(ops.concatenate(axes, axis=-1), x.dtype)

    def _waves(self, x, axis):
        """(length, features / 2): sines and cosines along one axis."""
        place = positions(x, axis)
        if self.normalize:  # the epsilon is that of the released code
            place = (place + 1.0) / (ops.max(place) + 1.0 + 1e-6) * (2.0 * math.pi)
        omega = ops.convert_to_tensor(frequencies(x.shape[-1] // 4), "float32")
        angles = ops.expand_dims(place, -1) * omega
        waves = [ops.sin(angles), ops.cos(angles)]
        if not self.interleaved:
            return ops.concatenate(waves, axis=-1)
        return ops.reshape(ops.stack(waves, axis=-1), (-1, x.shape[-1] // 2))

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable("keras_edifice")
class TimestepEmbedding(layers.Layer):
    """Times (batch,) on the scale of 0 to 1000 -> (batch, features), in float32.

    Args:
        features: width, even.
        layout: "cos_sin", frequencies 10000^(-i/half) (DiT, ADM), or "sin_cos",
            10000^(-i/(half - 1)) (DDPM).
        time_scale: what the times are multiplied by; 1000 for times of 0 to 1, whose
            waves would hardly move otherwise.

    Raises:
        ValueError: unknown layout or odd features.
    """

    def __init__(self, features, layout="cos_sin", time_scale=1.0, **kwargs):
        super().__init__(**kwargs)
        if layout not in ("cos_sin", "sin_cos"):
            raise ValueError(
                f"layout must be one of 'cos_sin', 'sin_cos', received {layout!r}"
            )
        if features % 2:
            raise ValueError(f"features must be even, received {features}")
        self.features, self.layout, self.time_scale = features, layout, time_scale

    def build(self, input_shape):
        """No weights."""

    def call(self, times):
        closed = self.layout == "sin_cos"
        omega = frequencies(self.features // 2, closed=closed)
        angles = ops.expand_dims(ops.cast(times, "float32") * self.time_scale, -1)
        angles = angles * ops.convert_to_tensor(omega, "float32")
        waves = [ops.sin(angles), ops.cos(angles)]
        waves = waves if closed else waves[::-1]
        return ops.cast(ops.concatenate(waves, axis=-1), self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return (*input_shape, self.features)
