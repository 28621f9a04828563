"""All steps of a GRU.

    [a_z a_r a_n] = x_t W + b
    [p_z p_r p_n] = h_{t-1} U + b'
    z = σ(a_z + p_z),    r = σ(a_r + p_r),    n = tanh(a_n + r ⊙ p_n)
    h_t = z ⊙ h_{t-1} + (1 - z) ⊙ n

with the reset after the matrix. Read `lstm_scan.py` first; here all gradients of a step
are multiples of that in h_t, so that the loop back needs no more.
"""

from keras import ops

from keras_edifice.ops.lstm_scan import UNROLL, before, halves, product
from keras_edifice.ops.precision import exact_dtype


def gru_scan(x, kernel, recurrent, bias, recurrent_bias, h):
    """All states of a GRU, differentiable; twice too, but on PyTorch.

    Args:
        x: inputs of all steps, (time, batch, features).
        kernel: W, (features, 3 units), in the order z, r, n.
        recurrent: U, (units, 3 units).
        bias: b, (3 units,).
        recurrent_bias: b', (3 units,).
        h: (batch, units), the state before the first step.

    Returns:
        All h, (time, batch, units), and the last, (batch, units), in the dtype of `x`.
        They are computed in float32 (float64 for float64).
    """
    dtype, exact = x.dtype, exact_dtype(x)
    arguments = (x, kernel, recurrent, bias, recurrent_bias, h)
    states = _gru_scan(*(ops.cast(z, exact) for z in arguments))
    states = ops.cast(states, dtype)
    return states, states[-1]


@ops.custom_gradient
def _gru_scan(x, kernel, recurrent, bias, recurrent_bias, h):
    """The same in one dtype -> all h."""
    units, two = h.shape[-1], 2 * h.shape[-1]
    matrices = halves(recurrent)
    driven = ops.matmul(x, kernel)

    def forward(state, driven):
        h, *_ = state
        p = product(h, matrices) + recurrent_bias
        (a_zr, a_n), (p_zr, p_n) = (
            ops.split(part, [two], axis=-1) for part in (driven + bias, p)
        )
        gates = 0.5 * ops.tanh(0.5 * (a_zr + p_zr)) + 0.5  # their sigmoid
        z, r = ops.split(gates, 2, axis=-1)
        n = ops.tanh(a_n + r * p_n)
        state = [n + z * (h - n), gates, n, p_n]
        return state, state

    # All but h are in the carry for TensorFlow, which wants it like the outputs.
    state = [h, ops.zeros_like(driven[0, :, :two]), h, h]
    _, (hs, gates, n, p_n) = ops.scan(forward, state, driven, unroll=UNROLL)

    def gradient(*args, upstream=None):
        upstream = args[0] if upstream is None else upstream
        transposed = halves(ops.transpose(recurrent))
        h_before = before(hs, h)
        z, r = ops.split(gates, 2, axis=-1)
        n_slope = (1 - z) * (1 - n * n)
        slopes = [
            z * (1 - z) * (h_before - n),
            r * (1 - r) * p_n * n_slope,
            r * n_slope,
        ]
        # One array, for TensorFlow scans several only where the length is known.
        now = ops.concatenate([upstream, *slopes, z], axis=-1)

        def backward(state, now):
            by_h, slopes, z = ops.split(now, [units, 4 * units], axis=-1)
            by_h = by_h + state[0]
            by_p = ops.concatenate([by_h, by_h, by_h], axis=-1) * slopes
            state = [by_h * z + product(by_p, transposed), by_h]
            return state, state

        zero = ops.zeros_like(h)
        (by_first, _), (_, by_h) = ops.scan(
            backward, [zero, zero], now, reverse=True, unroll=UNROLL
        )
        by_zr = ops.concatenate([by_h * slope for slope in slopes[:2]], axis=-1)
        by_a = ops.concatenate([by_zr, by_h * n_slope], axis=-1)
        by_p = ops.concatenate([by_zr, by_h * slopes[2]], axis=-1)
        over_steps = [[0, 1], [0, 1]]
        return (
            ops.matmul(by_a, ops.transpose(kernel)),
            ops.tensordot(x, by_a, axes=over_steps),
            ops.tensordot(h_before, by_p, axes=over_steps),
            ops.sum(by_a, axis=(0, 1)),
            ops.sum(by_p, axis=(0, 1)),
            by_first,
        )

    return hs, gradient
