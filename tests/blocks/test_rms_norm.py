import keras
import numpy as np

from keras_edifice.blocks.rms_norm import RMSNorm
from tests.support.close import assert_close, to_numpy

rng = np.random.default_rng(0)


def test_equals_the_formula_with_epsilon_inside_the_root():
    x = rng.normal(size=(2, 3, 5)).astype("float32") * 1e-4
    layer = RMSNorm(1e-6)
    layer.build(x.shape)
    gamma = rng.normal(size=5)
    layer.set_weights([gamma])
    wide = x.astype("float64")
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * gamma
    assert_close(layer(x), expected)


def test_scale_of_the_input_does_not_matter():
    x = rng.normal(size=(2, 8)).astype("float32") * 100
    layer = RMSNorm()
    assert_close(layer(x), layer(10 * x))
    assert_close((to_numpy(layer(x)) ** 2).mean(-1), np.ones(2))


def test_mean_is_not_subtracted():
    assert_close(RMSNorm(scale=False)(np.full((1, 4), 3.0, "float32")), np.ones((1, 4)))


def test_large_half_precision_inputs_stay_finite():
    x = np.full((1, 16), 3e4, "float32")
    layer = RMSNorm(dtype="mixed_float16")
    y = layer(x)
    assert keras.backend.standardize_dtype(y.dtype) == "float16"
    assert_close(y, np.ones((1, 16)), 1e-3)  # three digits of float16


def test_zero_centred_scale_is_one_plus_the_weight():
    x = rng.normal(size=(2, 5)).astype("float32")
    centred, plain = RMSNorm(zero_centered=True), RMSNorm()
    assert_close(centred(x), plain(x), 1e-6)
    assert_close(centred.gamma, np.zeros(5), 0)
    gamma = rng.normal(size=5)
    centred.set_weights([gamma])
    plain.set_weights([1 + gamma])
    assert_close(centred(x), plain(x), 1e-6)
