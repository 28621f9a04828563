import numpy as np
import pytest
from keras import ops

from keras_edifice.ops import fourier
from keras_edifice.ops.fourier import has_fft, irfft, waves
from keras_edifice.ops.tracing import export_scope
from tests.support.close import assert_close

rng = np.random.default_rng(0)


@pytest.mark.parametrize("period", [1, 7, 4095, 65536])
def test_waves_hold_large_products(period):
    # t f reaches 2^30, where float32 counts in steps of 64.
    t, f = rng.integers(0, (period + 1) // 2, size=(2, 40))
    t[0] = f[0] = (period - 1) // 2
    found = waves(
        ops.convert_to_tensor(t.astype("float32")),
        ops.convert_to_tensor(f.astype("float32")),
        float(period),
    )
    angle = 2 * np.pi * (np.outer(t.astype("int64"), f) % period) / period
    assert_close(found[0], np.cos(angle), 2e-6)
    assert_close(found[1], np.sin(angle), 2e-6)


@pytest.mark.parametrize("size", [1, 2, 7, 40])
@pytest.mark.parametrize("format", [None, "onnx"])
def test_inverse_transform_is_that_of_numpy(format, size):
    spectrum = rng.normal(size=(2, 3, size // 2 + 1)).astype("float32")
    with export_scope(format):
        x = irfft(tuple(ops.convert_to_tensor(part) for part in spectrum), size)
    assert_close(x, np.fft.irfft(spectrum[0] + 1j * spectrum[1], size))


def test_matrices_take_the_place_of_the_fft_in_onnx(monkeypatch):
    x = ops.ones((2, 5))
    assert has_fft(x)
    monkeypatch.setattr(fourier.ops, "irfft", None)
    with export_scope("onnx"):
        assert not has_fft(x)
        assert_close(irfft((ops.ones((1, 2)), ops.zeros((1, 2))), 3), [[1.0, 0, 0]])
    with export_scope("saved_model"):
        assert has_fft(x)
