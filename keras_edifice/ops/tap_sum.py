"""The sum over the taps of a depthwise filter along time.

    y_t = Σ_j w_j ⊙ x_{t + jr},    j = 0 .. k-1
    ∂x_s = Σ_j w_j ⊙ ∂y_{s - jr},    ∂w_j = Σ_bt ∂y_t ⊙ x_{t + jr}

The gradient in x is a sum over taps again, of the padded ∂y. TensorFlow is told so, for
its own way, through the gradients of slices, takes four times as long.
"""

from keras import ops

from keras_edifice.backends.traits import SLICES_BACK_SLOWLY
from keras_edifice.ops.tracing import static_length


def tap_sum(x, kernel, dilation=1):
    """(batch, time + (k - 1) r, channels) -> (batch, time, channels).

    Args:
        x: the inputs, of the steps before the first output as well.
        kernel: w, (k, channels).
        dilation: r, distance of the taps from each other.
    """
    if SLICES_BACK_SLOWLY and static_length(x) is not None:
        return _with_gradient(dilation)(x, kernel)
    return _tap_sum(x, kernel, dilation)


def _tap_sum(x, kernel, dilation):
    taps = _taps(x, kernel.shape[0], dilation)
    return sum(kernel[j] * tap for j, tap in enumerate(taps))


def _taps(x, count, dilation):
    """What each of the taps sees."""
    kept = (count - 1) * dilation
    return [x[:, j : j - kept or None] for j in range(0, kept + 1, dilation)]


def _with_gradient(dilation):
    """The function (x, kernel) -> outputs that brings its gradient."""

    @ops.custom_gradient
    def run(x, kernel):
        count = kernel.shape[0]
        kept = (count - 1) * dilation

        def gradient(*args, upstream=None):
            by_y = args[0] if upstream is None else upstream
            padded = ops.pad(by_y, [(0, 0), (kept, kept), (0, 0)])
            by_x = _tap_sum(padded, ops.flip(kernel, axis=0), dilation)
            taps = _taps(x, count, dilation)
            return by_x, ops.stack([ops.sum(by_y * tap, axis=(0, 1)) for tap in taps])

        return _tap_sum(x, kernel, dilation), gradient

    return run
