import keras
import numpy as np
import pytest

from keras_edifice.blocks.adaptive_norm import AdaptiveNorm
from tests.support.close import assert_close, to_numpy
from tests.support.shaking import shake

rng = np.random.default_rng(0)


def layer_norm(x):
    x = x.astype("float64")
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def data(condition_shape):
    x = rng.normal(size=(2, 3, 4)).astype("float32")
    return x, rng.normal(size=condition_shape).astype("float32")


@pytest.mark.parametrize("condition_shape", [(2, 5), (2, 3, 5)])
def test_equals_the_formula(condition_shape):
    x, condition = data(condition_shape)
    layer = AdaptiveNorm(gate=True)
    layer.build(x.shape, condition.shape)
    kernel, bias = (to_numpy(w) for w in shake(layer).weights)
    c = condition.astype("float64")
    parts = (c / (1.0 + np.exp(-c))) @ kernel + bias
    parts = parts[:, None] if parts.ndim == 2 else parts
    shift, scale, gate = np.split(parts, 3, axis=-1)
    y, alpha = layer(x, condition)
    assert_close(y, (1.0 + scale) * layer_norm(x) + shift)
    assert_close(alpha, gate)
    shapes = layer.compute_output_shape(x.shape, condition.shape)
    assert shapes == (tuple(y.shape), tuple(alpha.shape))


def test_starts_as_layer_norm_with_a_closed_gate():
    x, condition = data((2, 5))
    y, alpha = AdaptiveNorm(gate=True)(x, condition)
    assert_close(y, layer_norm(x))
    assert_close(alpha, np.zeros((2, 1, 4)), 0)
    assert_close(AdaptiveNorm()(x, condition), layer_norm(x))


def test_examples_do_not_see_each_others_condition():
    x, condition = data((2, 5))
    layer = AdaptiveNorm()
    layer.build(x.shape, condition.shape)
    shake(layer)
    changed = condition.copy()
    changed[1] += 1.0
    before, after = (to_numpy(layer(x, c)) for c in (condition, changed))
    assert_close(before[0], after[0], 0)
    assert np.abs(before[1] - after[1]).max() > 1e-3


def test_works_in_a_model_that_is_saved(tmp_path):
    x, condition = data((2, 5))
    inputs = [keras.Input((3, 4)), keras.Input((5,))]
    y, gate = AdaptiveNorm(gate=True)(*inputs)
    model = shake(keras.Model(inputs, keras.layers.Multiply()([y, gate])))
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert_close(loaded([x, condition]), model([x, condition]), 1e-6)
