import keras
import numpy as np

from keras_edifice.blocks.scale_norm import ScaleNorm
from tests.support.close import assert_close, to_numpy

rng = np.random.default_rng(0)


def test_every_vector_has_the_learned_length():
    x = rng.normal(size=(2, 3, 5)).astype("float32")
    layer = ScaleNorm()
    assert_close(np.linalg.norm(to_numpy(layer(x)), axis=-1), np.full((2, 3), 5**0.5))
    layer.g.assign(3.0)
    wide = x.astype("float64")
    expected = 3.0 * wide / np.linalg.norm(wide, axis=-1, keepdims=True)
    assert_close(layer(x), expected)


def test_zeros_stay_zeros():
    assert_close(ScaleNorm(initial_scale=2.0)(np.zeros((1, 4), "float32")), [[0.0] * 4])


def test_half_precision_is_computed_in_float32():
    x = np.full((1, 16), 3e4, "float32")
    y = ScaleNorm(dtype="mixed_float16")(x)
    assert keras.backend.standardize_dtype(y.dtype) == "float16"
    assert_close(y, np.ones((1, 16)), 1e-3)  # three digits of float16
