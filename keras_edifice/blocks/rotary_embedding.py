"""Rotary position embedding: queries and keys are turned by their position.

    θ_i = base^(-2i/d),    (x_a, x_b) → (x_a cos pθ_i - x_b sin pθ_i,
                                         x_b cos pθ_i + x_a sin pθ_i)

Su et al. 2021, RoFormer, arXiv:2104.09864, eq. 34. The product of a turned query and a
turned key depends on the difference of their positions. The angles are scaled for
longer contexts by Chen et al. 2023 (linear, arXiv:2306.15595), by a larger base (NTK),
by Peng et al. 2023 (YaRN, arXiv:2309.00071) or as in Llama 3 (arXiv:2407.21783).
"""

import math

import keras
import numpy as np
from keras import layers, ops

from keras_edifice.ops.positions import positions as positions_along

SCALINGS = {
    "linear": ("factor",),
    "ntk": ("factor",),
    "dynamic": ("factor", "original_length"),
    "yarn": ("factor", "original_length"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_length"),
}
"""Type of scaling -> the numbers that it needs."""


@keras.saving.register_keras_serializable("keras_edifice")
class RotaryEmbedding(layers.Layer):
    """(batch, time, heads, features) -> the same, turned by the position in time.

    Keeps the norm of each head's vector, but for the factor of YaRN.

    Args:
        base: of the frequencies; a larger one turns the slow pairs less.
        layout: which features are a pair: "half", i and i + d/2 (Llama), or
            "interleaved", 2i and 2i + 1 (RoFormer, GPT-J). The two differ by a fixed
            permutation of the features.
        rotary_fraction: part of the features that is turned, from the first on.
        scaling: None, or a dict of its `type` and the numbers it needs: "linear" and
            "ntk" `factor`; "dynamic" and "yarn" `factor` and `original_length`, the
            length of the training; "llama3" these and `low_freq_factor` and
            `high_freq_factor`. "yarn" also takes `beta_fast` (32), `beta_slow` (1) and
            `attention_factor` (0.1 ln factor + 1).

    Raises:
        ValueError: unknown layout or scaling, a number that is missing, or an odd
            number of features to turn.
    """

    def __init__(
        self, base=10000.0, layout="half", rotary_fraction=1.0, scaling=None, **kwargs
    ):
        super().__init__(**kwargs)
        if layout not in ("half", "interleaved"):
            raise ValueError(
                f"layout must be one of 'half', 'interleaved', received {layout!r}"
            )
        _check_scaling(scaling)
        self.base, self.layout = base, layout
        self.rotary_fraction, self.scaling = rotary_fraction, scaling
        self.supports_masking = True

    def build(self, input_shape):
        self.width = int(self.rotary_fraction * input_shape[-1])
        if not self.width or self.width % 2:
            raise ValueError(
                "the number of features to turn must be even, received "
                f"{self.width} of {input_shape[-1]}; change rotary_fraction or the "
                "width of the heads"
            )
        self.frequencies, self.factor = rotary_frequencies(
            self.width, self.base, self.scaling
        )

    def call(self, x, positions=None, offset=0):
        """Turns x.

        Args:
            x: (batch, time, heads, features).
            positions: (time,) or (batch, time); None for 0, 1, 2, ...
            offset: added to the positions, a number or (batch,): the steps before.
        """
        dtype = x.dtype
        if positions is None:
            positions = positions_along(x)
        angles = self._angles(ops.cast(positions, "float32"), offset)
        # (1 or b, t, 1, width / 2)
        cos, sin = (self.factor * f(angles) for f in (ops.cos, ops.sin))
        turned = ops.cast(x[..., : self.width], "float32")
        if self.layout == "half":
            a, b = ops.split(turned, 2, axis=-1)
            turned = ops.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        else:
            shape = ops.shape(turned)
            pairs = ops.reshape(turned, (*shape[:-1], self.width // 2, 2))
            a, b = pairs[..., 0], pairs[..., 1]
            pairs = ops.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
            turned = ops.reshape(pairs, shape)
        turned = ops.cast(turned, dtype)
        if self.width == x.shape[-1]:
            return turned
        return ops.concatenate([turned, x[..., self.width :]], axis=-1)

    def _angles(self, positions, offset):
        """(1 or batch, time, 1, width / 2)."""
        if len(positions.shape) == 1:
            positions = ops.expand_dims(positions, 0)
        offset = ops.cast(ops.convert_to_tensor(offset), "float32")
        positions = positions + ops.reshape(offset, (-1, 1))
        frequencies = ops.convert_to_tensor(self.frequencies, "float32")
        if (self.scaling or {}).get("type") == "dynamic":
            frequencies = self._dynamic(frequencies, ops.max(positions) + 1.0)
        return ops.expand_dims(ops.expand_dims(positions, -1) * frequencies, 2)

    def _dynamic(self, frequencies, length):
        """Base · (factor · L / L₀ - (factor - 1))^(d / (d - 2)), L at least L₀."""
        factor, original = self.scaling["factor"], self.scaling["original_length"]
        ratio = ops.maximum(length / original, 1.0)
        stretch = ops.log(factor * ratio - (factor - 1.0)) / (self.width - 2)
        index = ops.convert_to_tensor(
            np.arange(0, self.width, 2, dtype="float32")
        )  # base^(-2i/d) times stretch^(-2i/(d-2))
        return frequencies * ops.exp(-index * stretch)

    def compute_output_shape(self, input_shape):
        return input_shape


def _check_scaling(scaling):
    if scaling is None:
        return
    if scaling.get("type") not in SCALINGS:
        raise ValueError(
            f"the type of scaling must be one of {', '.join(map(repr, SCALINGS))}, "
            f"received {scaling.get('type')!r}"
        )
    for name in SCALINGS[scaling["type"]]:
        if name not in scaling:
            raise ValueError(
                f"scaling {scaling['type']!r} needs {name!r}, received {dict(scaling)}"
            )


def rotary_frequencies(width, base=10000.0, scaling=None):
    """The angles per position of the pairs, and the factor of cosine and sine.

    Args:
        width: features that are turned, even.
        base: of the frequencies.
        scaling: as in `RotaryEmbedding`; "dynamic" changes with the length and gives
            the unscaled ones here.

    Returns:
        (array (width / 2,) in float64, a number).
    """
    scaling = dict(scaling or {})
    kind, factor = scaling.get("type"), scaling.get("factor", 1.0)
    if kind == "ntk":
        base = base * factor ** (width / (width - 2))
    theta = base ** (-np.arange(0, width, 2) / width)
    if kind == "linear":
        return theta / factor, 1.0
    if kind == "yarn":
        return _yarn(theta, width, base, scaling)
    if kind == "llama3":
        return _llama3(theta, scaling), 1.0
    return theta, 1.0


def _yarn(theta, width, base, scaling):
    """Fast pairs stay, slow ones are interpolated, with a ramp in between; sec. 3.4."""
    factor, length = scaling["factor"], scaling["original_length"]

    def pair(turns):  # the pair that makes so many turns in the original length
        return width * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))

    low = max(math.floor(pair(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(pair(scaling.get("beta_slow", 1))), width - 1)
    high = high if high > low else low + 0.001
    ramp = np.clip((np.arange(width // 2) - low) / (high - low), 0.0, 1.0)
    default = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    scaled = ramp * theta / factor + (1.0 - ramp) * theta
    return scaled, scaling.get("attention_factor", default)


def _llama3(theta, scaling):
    """Wavelengths above the original length are stretched, short ones are not."""
    factor, length = scaling["factor"], scaling["original_length"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = length * theta / (2 * np.pi)  # in the original length
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 - smooth) * theta / factor + smooth * theta
