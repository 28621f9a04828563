"""The steps of a GRU, whose inputs have met their matrix before.

    p = h_{t-1} U + b,    z = σ(a_z + p_z),    r = σ(a_r + p_r)
    n = tanh(a_n + r ⊙ p_n)
    h_t = z ⊙ h_{t-1} + (1 - z) ⊙ n

with the reset after the matrix. Read `lstm_scan.py` first; here all gradients of a step
are multiples of that in h_t, so that the loop back needs no more.
"""

import numpy as np
from keras import ops

from keras_edifice.backends.traits import MULTIPLIES_BY_PARTS
from keras_edifice.ops.precision import exact_dtype

PARTS = 3 if MULTIPLIES_BY_PARTS else 1


def gru_scan(driven, recurrent, bias, h):
    """All states of a GRU, differentiable; twice too, but on PyTorch.

    Args:
        driven: x W + b of all steps, (batch, time, 3 units), in the order z, r, n.
        recurrent: U, (units, 3 units).
        bias: that of the product with U, (3 units,).
        h: (batch, units), the state before the first step.

    Returns:
        All h, (batch, time, units), and the last, (batch, units), in the dtype of
        `driven`. They are computed in float32 (float64 for float64).
    """
    dtype, exact = driven.dtype, exact_dtype(driven)
    arguments = [ops.cast(z, exact) for z in (driven, recurrent, bias, h)]
    arguments[0] = ops.swapaxes(arguments[0], 0, 1)
    states = ops.cast(_gru_scan(*arguments), dtype)
    return ops.swapaxes(states, 0, 1), states[-1]


@ops.custom_gradient
def _gru_scan(driven, recurrent, bias, h):
    """`gru_scan` with time on axis 0 -> all h."""
    units, two = h.shape[-1], 2 * h.shape[-1]
    # σ(a) = tanh(a / 2) / 2 + 1 / 2 for z and r, whose bias joins the inputs.
    scale = ops.convert_to_tensor(np.repeat([0.5, 0.5, 1.0], units), h.dtype)
    first_bias = ops.concatenate([bias[:two], ops.zeros_like(bias[two:])])
    U_zr, U_n = 0.5 * recurrent[:, :two], recurrent[:, two:]

    def forward(state, driven):
        h, *_ = state
        a_zr, a_n = ops.split(driven, [two], axis=-1)
        gates = 0.5 * ops.tanh(a_zr + ops.matmul(h, U_zr)) + 0.5
        z, r = ops.split(gates, 2, axis=-1)
        p_n = ops.matmul(h, U_n) + bias[two:]
        n = ops.tanh(a_n + r * p_n)
        state = [n + z * (h - n), gates, n, p_n]
        return state, state

    # All but h are in the carry for TensorFlow, which wants it like the outputs.
    state = [h, ops.zeros_like(driven[0, :, :two]), h, h]
    _, (hs, gates, n, p_n) = ops.scan(forward, state, (driven + first_bias) * scale)

    def gradient(*args, upstream=None):
        upstream = args[0] if upstream is None else upstream
        transposed = ops.split(ops.transpose(recurrent), PARTS, axis=0)
        before = ops.concatenate([ops.expand_dims(h, 0), hs[:-1]], axis=0)
        z, r = ops.split(gates, 2, axis=-1)
        n_slope = (1 - z) * (1 - n * n)
        slopes = [z * (1 - z) * (before - n), r * (1 - r) * p_n * n_slope, r * n_slope]
        # One array, for TensorFlow scans several only where the length is known.
        now = ops.concatenate([upstream, *slopes, z], axis=-1)

        def backward(state, now):
            by_h, slopes, z = ops.split(now, [units, 4 * units], axis=-1)
            by_h = by_h + state[0]
            by_p = ops.concatenate([by_h, by_h, by_h], axis=-1) * slopes
            parts = zip(ops.split(by_p, PARTS, axis=-1), transposed, strict=True)
            by_before = by_h * z + sum(ops.matmul(part, U) for part, U in parts)
            return [by_before, by_h], [by_before, by_h]

        zero = ops.zeros_like(h)
        (by_first, _), (_, by_h) = ops.scan(backward, [zero, zero], now, reverse=True)
        by_p = ops.concatenate([by_h * slope for slope in slopes], axis=-1)
        by_driven = ops.concatenate([by_p[..., :two], by_h * n_slope], axis=-1)
        by_recurrent = ops.tensordot(before, by_p, axes=[[0, 1], [0, 1]])
        return by_driven, by_recurrent, ops.sum(by_p, axis=(0, 1)), by_first

    return hs, gradient
