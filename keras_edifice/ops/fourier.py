"""Fourier transforms of real sequences as matrices, for where an FFT cannot be.

    X_f = Σ_t x_t e^{-2πi f t / n},    x_t = 1/n Σ_f c_f Re(X_f e^{2πi f t / n})

over the frequencies f = 0 .. ⌊n/2⌋, with c_f = 1 where f is 0 or n/2 and 2 elsewhere.
No ONNX file holds an FFT that every backend writes and reads, and an FFT of unknown
length is TensorFlow's alone.
"""

from keras import backend, ops

from keras_edifice.ops.tracing import exporting, static_length

_HIGH = 64.0


def has_fft(x, axis=-1):
    """Whether `ops.rfft` may be called along `axis` of x while it is traced."""
    known = static_length(x, axis) is not None
    return exporting() != "onnx" and (known or backend.backend() == "tensorflow")


def waves(times, frequencies, period):
    """Cosine and sine of 2π t f / period, (times, frequencies) each.

    Args:
        times: (times,) whole numbers as floats, not negative.
        frequencies: (frequencies,) of the same kind; t f may reach 2^30.
        period: number or scalar, up to 2^16.
    """
    t, f = ops.expand_dims(times, 1), ops.expand_dims(frequencies, 0)
    # t f may have more digits than float32 holds; the products below have fewer.
    high = ops.floor(f / _HIGH)
    turns = _HIGH * _modulo(t * high, period) + t * (f - _HIGH * high)
    angle = _modulo(turns, period) * (6.283185307179586 / period)
    return ops.cos(angle), ops.sin(angle)


def irfft(spectrum, size):
    """Real sequences of a static length from their spectra, also where FFTs cannot be.

    Args:
        spectrum: pair (re, im) of (..., size // 2 + 1).
        size: length of the result.

    Returns:
        (..., size).
    """
    if exporting() != "onnx":
        return ops.irfft(spectrum, size)
    dtype = spectrum[0].dtype
    f, t = ops.arange(0, size // 2 + 1, dtype=dtype), ops.arange(0, size, dtype=dtype)
    twice = ops.cast(ops.logical_and(f > 0, f < size / 2), dtype)
    weight = (1.0 + twice) / size
    cos, sin = waves(f, t, float(size))
    return ops.matmul(weight * spectrum[0], cos) - ops.matmul(weight * spectrum[1], sin)


def _modulo(x, period):
    return x - period * ops.floor(x / period)
