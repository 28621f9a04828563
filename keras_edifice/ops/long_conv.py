"""Causal convolution with a kernel as long as the sequence.

    y_t = Σ_{s<=t} k_{t-s} ⊙ x_s

By Fourier transforms it takes O(length log length) time and O(length) memory; the
direct sum takes O(length * taps) time, and its outputs are causal to the last bit.

Gu et al. 2021, S4, arXiv:2111.00396; Poli et al. 2023, Hyena, arXiv:2302.10866.
"""

import math

from keras import ops

from keras_edifice.ops.fourier import has_fft, waves
from keras_edifice.ops.pairs import add, conjugate, times
from keras_edifice.ops.positions import positions
from keras_edifice.ops.precision import exact_dtype
from keras_edifice.ops.tracing import static_length

MODES = ("fft", "direct")


def long_conv(
    x,
    kernel,
    initial_state=None,
    return_state=False,
    backward_kernel=None,
    mode="fft",
):
    """Convolves a sequence with a kernel of its own length, differentiable.

    Args:
        x: (batch, time, ...).
        kernel: (taps, ...), tap j for the input of j steps ago; its other sizes are
            those of x or 1. Taps beyond the sequence are not used.
        initial_state: (batch, taps - 1, ...), the inputs before the first step, the
            newest last; zero if None.
        return_state: whether to give the last taps - 1 inputs as well.
        backward_kernel: (taps, ...), tap j for the input j steps ahead, added to the
            causal sum; then there is no state.
        mode: "fft" or "direct". Where an FFT cannot be traced or exported, and where
            the number of taps is unknown, the Fourier transforms are matrices.

    Returns:
        (batch, time, ...) in the dtype of x; the state has that dtype too.

    Raises:
        ValueError: unknown mode; a state together with a backward kernel or with an
            unknown number of taps.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be 'fft' or 'direct', received {mode!r}")
    stateful = initial_state is not None or return_state
    if stateful and backward_kernel is not None:
        raise ValueError("a convolution with a backward_kernel has no state; drop one")
    if stateful and static_length(kernel, 0) is None:
        raise ValueError("the state is taps - 1 inputs: give a kernel of known length")
    seen, kept, exact = x, 0, exact_dtype(x)
    if initial_state is not None:
        kept = initial_state.shape[1]
        seen = ops.concatenate([ops.cast(initial_state, x.dtype), x], axis=1)
    kernels = [k for k in (kernel, backward_kernel) if k is not None]
    kernels = [ops.cast(k, exact) for k in kernels]
    y = _convolved(ops.cast(seen, exact), kernels, kept, mode)
    y = ops.cast(y[:, kept:], x.dtype)
    return (y, _last(seen, kernel.shape[0] - 1)) if return_state else y


def long_conv_step(x, kernel, state):
    """One step of `long_conv`, in O(taps) time and memory.

    Args:
        x: (batch, ...).
        kernel: (taps, ...).
        state: (batch, taps - 1, ...), the inputs before, the newest last.

    Returns:
        (batch, ...) in the dtype of x, and the new state.
    """
    exact, now = exact_dtype(x), ops.expand_dims(x, 1)
    seen = ops.concatenate([ops.cast(state, x.dtype), now], axis=1)  # (b, taps, ...)
    kernel = ops.flip(ops.cast(kernel, exact), axis=0)
    y = ops.sum(ops.cast(seen, exact) * kernel, axis=1)
    return ops.cast(y, x.dtype), seen[:, 1:]


def _last(x, count):
    """The last `count` steps of x, and zeros before it where it is shorter."""
    x = ops.pad(x, [(0, 0), (count, 0)] + [(0, 0)] * (len(x.shape) - 2))
    return x[:, -count:] if count else x[:, :0]


def _convolved(x, kernels, kept, mode):
    """The causal sum and, given two kernels, the other; the first `kept` are wrong."""
    taps = [static_length(k, 0) for k in kernels]
    if mode == "direct" and None not in taps:
        y = _direct(x, kernels[0])
        if len(kernels) > 1:
            later = _direct(ops.flip(x, axis=1), kernels[1])
            y = y + ops.flip(later, axis=1)
        return y
    if not has_fft(x, 1):
        return _by_matrices(x, kernels)
    length = static_length(x, 1)
    if length is None:  # in TensorFlow
        length = ops.shape(x)[1]
        size = 2 * length
    else:
        longest = max(length if n is None else min(n, length) for n in taps)
        size = _fast_size(max(length, length + longest - 1 - kept))
    spectra = [ops.rfft(_time_last(k[:length], 0), size) for k in kernels]
    spectrum = _filtered(ops.rfft(_time_last(x, 1), size), *spectra)
    return _time_second(ops.irfft(spectrum, size)[..., :length])


def _by_matrices(x, kernels):
    """The same with Fourier transforms of 2 time - 1 steps, for any length.

    Of so many, as many frequencies as steps make up the whole spectrum.
    """
    position = ops.cast(positions(x), x.dtype)
    size = 2.0 * ops.sum(ops.ones_like(position)) - 1.0
    cos, sin = waves(position, position, size)

    def transform(z):
        return ops.matmul(z, cos), -ops.matmul(z, sin)

    spectra = [transform(_time_last(_as_long(k, position), 0)) for k in kernels]
    re, im = _filtered(transform(_time_last(x, 1)), *spectra)
    weight = (2.0 - ops.cast(position < 0.5, x.dtype)) / size
    y = ops.matmul(weight * re, cos) - ops.matmul(weight * im, sin)
    return _time_second(y)


def _filtered(x, response, backward=None):
    """The product of spectra; a kernel reversed in time has the conjugate one."""
    if backward is not None:
        response = add(response, conjugate(backward))
    return times(x, response)


def _direct(x, kernel):
    """The sum itself, as a depthwise convolution of the flattened features."""
    kernel = kernel[: static_length(x, 1)]
    taps, features = kernel.shape[0], tuple(x.shape[2:])
    kernel = ops.flip(ops.broadcast_to(kernel, (taps, *features)), axis=0)
    batch, width = ops.shape(x)[0], math.prod(features)
    flat = x if len(features) == 1 else ops.reshape(x, (batch, -1, width))
    y = ops.depthwise_conv(
        ops.pad(flat, [(0, 0), (taps - 1, 0), (0, 0)]),
        ops.reshape(kernel, (taps, width, 1)),
        padding="valid",
        data_format="channels_last",
    )
    return y if len(features) == 1 else ops.reshape(y, (batch, -1, *features))


def _as_long(kernel, position):
    """As many taps as there are positions, by zeros or without the last."""
    taps = ops.cast(1.0 + ops.max(positions(kernel, axis=0)), position.dtype)
    index = ops.cast(ops.minimum(position, taps - 1.0), "int32")
    known = ops.cast(position < taps, kernel.dtype)
    known = ops.reshape(known, (-1,) + (1,) * (len(kernel.shape) - 1))
    return known * ops.take(kernel, index, axis=0)


def _fast_size(least):
    """The smallest even size >= `least` among some without large factors."""
    sizes = (m * 2 ** max(1, math.ceil(math.log2(least / m))) for m in (1, 3, 5, 9, 15))
    return min(sizes)


def _time_last(x, axis):
    return ops.moveaxis(x, axis, len(x.shape) - 1)  # TorchScript's exporter takes no -1


def _time_second(x):
    return ops.moveaxis(x, len(x.shape) - 1, 1)
