import keras
import numpy as np
import pytest

from keras_edifice.blocks.layer_norm import LayerNorm
from tests.support.close import assert_close, to_numpy

rng = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("center", "scale"), [(True, True), (False, True), (True, False)]
)
def test_equals_the_layer_of_keras(center, scale):
    x = rng.normal(size=(2, 3, 5)).astype("float32") * 3 + 2
    ours = LayerNorm(1e-3, center=center, scale=scale)
    theirs = keras.layers.LayerNormalization(epsilon=1e-3, center=center, scale=scale)
    ours.build(x.shape)
    theirs.build(x.shape)
    weights = [rng.normal(size=w.shape) for w in ours.weights]
    ours.set_weights(weights)
    theirs.set_weights(weights)
    assert_close(ours(x), theirs(x))


def test_epsilon_is_added_to_the_variance():
    x = np.array([[1e-3, -1e-3]], "float32")
    layer = LayerNorm(1e-6)
    expected = x / np.sqrt(1e-6 + 1e-6)
    assert_close(layer(x), expected)


def test_half_precision_keeps_its_statistics_in_float32():
    x = (rng.normal(size=(4, 64)) + 300).astype("float32")
    layer = LayerNorm(dtype="mixed_float16")
    y = layer(x)
    assert keras.backend.standardize_dtype(y.dtype) == "float16"
    half = x.astype("float16").astype("float64")
    expected = (half - half.mean(-1, keepdims=True)) / half.std(-1, keepdims=True)
    assert np.abs(to_numpy(y) - expected).max() < 5e-3  # three digits of float16
