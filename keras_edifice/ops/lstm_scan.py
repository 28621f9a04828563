"""The steps of an LSTM, whose inputs have met their matrix before.

    [i f g o] = a_t + h_{t-1} U
    c_t = σ(f) ⊙ c_{t-1} + σ(i) ⊙ tanh(g),    h_t = σ(o) ⊙ tanh(c_t)

σ(z) = 1/2 + tanh(z / 2) / 2, so that one tanh serves all gates. The gradient is written
by hand: what the later steps do not change is computed for all steps at once, before
the loop back, and the gradient of U after it, as one product. Appleyard et al. 2016,
Optimizing Performance of Recurrent Neural Networks on GPUs, arXiv:1604.01946, take the
same products out of the loops.
"""

import numpy as np
from keras import ops

from keras_edifice.backends.traits import MULTIPLIES_BY_PARTS
from keras_edifice.ops.precision import exact_dtype

PARTS = 4 if MULTIPLIES_BY_PARTS else 1


def lstm_scan(driven, recurrent, h, c):
    """All states of an LSTM, differentiable; twice too, but on PyTorch.

    Args:
        driven: x W + b of all steps, (batch, time, 4 units), gates in the order i, f,
            g, o.
        recurrent: U, (units, 4 units).
        h: (batch, units), the output before the first step.
        c: (batch, units), the cell before the first step.

    Returns:
        All h, (batch, time, units), the last h and the last c, (batch, units), in the
        dtype of `driven`. They are computed in float32 (float64 for float64).
    """
    dtype, exact = driven.dtype, exact_dtype(driven)
    arguments = [ops.cast(z, exact) for z in (driven, recurrent, h, c)]
    arguments[0] = ops.swapaxes(arguments[0], 0, 1)
    states = ops.cast(_lstm_scan(*arguments), dtype)
    return ops.swapaxes(states[:-1], 0, 1), states[-2], states[-1]


@ops.custom_gradient
def _lstm_scan(driven, recurrent, h, c):
    """`lstm_scan` with time on axis 0 -> all h and the last c, (time + 1, b, units)."""
    units = h.shape[-1]
    # (1/2, 1/2, 1, 1/2) for the four gates: σ(z) = scale tanh(scale z) + 1 - scale
    scale = ops.convert_to_tensor(np.repeat([0.5, 0.5, 1.0, 0.5], units), h.dtype)
    matrices = ops.split(recurrent * scale, PARTS, axis=1)

    def forward(state, driven):
        h, c, _ = state
        z = driven + ops.concatenate([ops.matmul(h, U) for U in matrices], axis=-1)
        gates = scale * ops.tanh(z) + (1 - scale)
        i, f, g, o = ops.split(gates, 4, axis=-1)
        c = f * c + i * g
        state = [o * ops.tanh(c), c, gates]
        return state, state

    # The gates are in the carry for TensorFlow, which wants it to be like the outputs.
    state = [h, c, ops.zeros_like(driven[0])]
    (_, last, _), (hs, cs, gates) = ops.scan(forward, state, driven * scale)

    def gradient(*args, upstream=None):
        upstream = args[0] if upstream is None else upstream
        transposed = ops.split(ops.transpose(recurrent), PARTS, axis=0)
        # One array, for TensorFlow scans several only where the length is known.
        now = _joined(upstream[:-1], gates, cs, _before(cs, c))
        ends = [units, 5 * units, 6 * units]

        def through_gates(by_z):
            parts = zip(ops.split(by_z, PARTS, axis=-1), transposed, strict=True)
            return sum(ops.matmul(part, U) for part, U in parts)

        def backward(carry, now):
            by_z, by_c = carry
            by_h, z_slopes, c_slope, kept = ops.split(now, ends, axis=-1)
            by_h = by_h + through_gates(by_z)
            by_c = by_c + by_h * c_slope
            by_z = ops.concatenate([by_c, by_c, by_c, by_h], axis=-1) * z_slopes
            carry = [by_z, by_c * kept]
            return carry, carry

        carry = [ops.zeros_like(driven[0]), upstream[-1]]
        (by_first, by_c), (by_z, _) = ops.scan(backward, carry, now, reverse=True)
        by_recurrent = ops.tensordot(_before(hs, h), by_z, axes=[[0, 1], [0, 1]])
        return by_z, by_recurrent, through_gates(by_first), by_c

    return ops.concatenate([hs, ops.expand_dims(last, 0)], axis=0), gradient


def _joined(by_h, gates, c, c_before):
    """by_h, ∂c/∂i, ∂c/∂f, ∂c/∂g, ∂h/∂o, ∂h/∂c and ∂c/∂c_before, (time, b, 7 units)."""
    i, f, g, o = ops.split(gates, 4, axis=-1)
    y = ops.tanh(c)
    by_c = [i * (1 - i) * g, f * (1 - f) * c_before, i * (1 - g * g)]
    by_output = [o * (1 - o) * y, o * (1 - y * y)]
    return ops.concatenate([by_h, *by_c, *by_output, f], axis=-1)


def _before(states, first):
    """The state before each step, from that after each and the first."""
    return ops.concatenate([ops.expand_dims(first, 0), states[:-1]], axis=0)
