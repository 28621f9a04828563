"""All steps of an LSTM.

    [i f g o] = x_t W + h_{t-1} U + b
    c_t = σ(f) ⊙ c_{t-1} + σ(i) ⊙ tanh(g),    h_t = σ(o) ⊙ tanh(c_t)

The inputs meet W all at once, before the loop. σ(z) = 1/2 + tanh(z / 2) / 2, so that
one tanh serves all gates. The gradient is written by hand: what the later steps do not
change is computed for all steps at once, before the loop back, and the gradients of W
and U after it, as one product. Appleyard et al. 2016, Optimizing Performance of
Recurrent Neural Networks on GPUs, arXiv:1604.01946, take the same products out of the
loops.
"""

import numpy as np
from keras import ops

from keras_edifice.ops.precision import exact_dtype

UNROLL = 4
"""Steps of the loop on JAX; the others have no use for it."""


def lstm_scan(x, kernel, recurrent, bias, h, c):
    """All states of an LSTM, differentiable; twice too, but on PyTorch.

    Args:
        x: inputs of all steps, (time, batch, features).
        kernel: W, (features, 4 units), gates in the order i, f, g, o.
        recurrent: U, (units, 4 units).
        bias: b, (4 units,).
        h: (batch, units), the output before the first step.
        c: (batch, units), the cell before the first step.

    Returns:
        All h, (time, batch, units), the last h and the last c, (batch, units), in the
        dtype of `x`. They are computed in float32 (float64 for float64).
    """
    dtype, exact = x.dtype, exact_dtype(x)
    arguments = [ops.cast(z, exact) for z in (x, kernel, recurrent, bias, h, c)]
    states = ops.cast(_lstm_scan(*arguments), dtype)
    return states[:-1], states[-2], states[-1]


@ops.custom_gradient
def _lstm_scan(x, kernel, recurrent, bias, h, c):
    """The same in one dtype -> all h and the last c, (time + 1, batch, units)."""
    features, units = x.shape[-1], h.shape[-1]
    # (1/2, 1/2, 1, 1/2) for the four gates: σ(z) = scale tanh(scale z) + 1 - scale
    scale = ops.convert_to_tensor(np.repeat([0.5, 0.5, 1.0, 0.5], units), h.dtype)
    matrices = halves(recurrent)
    driven = ops.matmul(x, kernel)

    def forward(state, driven):
        h, c, _ = state
        z = driven + product(h, matrices) + bias
        gates = scale * ops.tanh(scale * z) + (1 - scale)
        i, f, g, o = ops.split(gates, 4, axis=-1)
        c = f * c + i * g
        state = [o * ops.tanh(c), c, gates]
        return state, state

    # The gates are in the carry for TensorFlow, which wants it to be like the outputs.
    state = [h, c, ops.zeros_like(driven[0])]
    (_, last, _), (hs, cs, gates) = ops.scan(forward, state, driven, unroll=UNROLL)

    def gradient(*args, upstream=None):
        upstream = args[0] if upstream is None else upstream
        transposed = halves(ops.transpose(recurrent))
        # One array, for TensorFlow scans several only where the length is known.
        now = _joined(upstream[:-1], gates, cs, before(cs, c))
        ends = [units, 5 * units, 6 * units]

        def backward(carry, now):
            by_z, by_c = carry
            by_h, z_slopes, c_slope, kept = ops.split(now, ends, axis=-1)
            by_h = by_h + product(by_z, transposed)
            by_c = by_c + by_h * c_slope
            by_z = ops.concatenate([by_c, by_c, by_c, by_h], axis=-1) * z_slopes
            carry = [by_z, by_c * kept]
            return carry, carry

        carry = [ops.zeros_like(driven[0]), upstream[-1]]
        (by_first, by_c), (by_z, _) = ops.scan(
            backward, carry, now, reverse=True, unroll=UNROLL
        )
        met = ops.concatenate([x, before(hs, h)], axis=-1)
        by_matrices = ops.tensordot(met, by_z, axes=[[0, 1], [0, 1]])
        return (
            ops.matmul(by_z, ops.transpose(kernel)),
            *ops.split(by_matrices, [features], axis=0),
            ops.sum(by_z, axis=(0, 1)),
            product(by_first, transposed),
            by_c,
        )

    return ops.concatenate([hs, ops.expand_dims(last, 0)], axis=0), gradient


def halves(matrix):
    """The columns of a matrix in two parts, for `product`.

    A product of few rows with two small matrices takes half the time of that with one
    large matrix on TensorFlow, and waits less for the threads on JAX, on CPUs.
    """
    return ops.split(matrix, [matrix.shape[1] // 2], axis=1)


def product(x, matrices):
    """The product of x with a matrix whose columns are in parts."""
    return ops.concatenate([ops.matmul(x, part) for part in matrices], axis=-1)


def _joined(by_h, gates, c, c_before):
    """by_h, ∂c/∂i, ∂c/∂f, ∂c/∂g, ∂h/∂o, ∂h/∂c and ∂c/∂c_before, (time, b, 7 units)."""
    i, f, g, o = ops.split(gates, 4, axis=-1)
    y = ops.tanh(c)
    by_c = [i * (1 - i) * g, f * (1 - f) * c_before, i * (1 - g * g)]
    by_output = [o * (1 - o) * y, o * (1 - y * y)]
    return ops.concatenate([by_h, *by_c, *by_output, f], axis=-1)


def before(states, first):
    """The state before each step, from that after each and the first."""
    return ops.concatenate([ops.expand_dims(first, 0), states[:-1]], axis=0)
