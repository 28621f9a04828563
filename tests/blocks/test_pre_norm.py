import keras
import numpy as np

from keras_edifice.blocks.pre_norm import pre_norm_residual
from tests.support.close import assert_close, to_numpy
from tests.support.shaking import shake

x = np.random.default_rng(0).normal(size=(8, 3, 4)).astype("float32")


def model(**options):
    inputs = keras.Input((3, 4))
    branch = keras.layers.Dense(4, name="branch")
    return keras.Model(inputs, pre_norm_residual(inputs, branch, **options))


def test_branch_sees_the_normalised_input_and_is_added():
    block = shake(model(epsilon=1e-3))
    gamma, beta, kernel, bias = (to_numpy(w) for w in block.weights)
    z = x.astype("float64")
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-3)
    assert_close(block(x), x + (z * gamma + beta) @ kernel + bias)


def test_dropped_branches_leave_the_input():
    block = model(drop_path=0.5)
    y = to_numpy(block(x, training=True))
    kept = [not np.array_equal(a, b) for a, b in zip(y, x, strict=True)]
    expected = np.where(np.reshape(kept, (8, 1, 1)), 2 * to_numpy(block(x)) - x, x)
    assert 0 < sum(kept) < 8
    assert_close(y, expected)


def test_dropout_is_on_single_values():
    block = model(dropout=0.5)
    assert block.get_layer("branch_dropout").rate == 0.5
    assert not any("drop_path" in layer.name for layer in block.layers)


def test_another_norm_and_a_factor_may_be_asked_for():
    norm = keras.layers.GroupNormalization(1, name="other")
    block = model(norm=norm, layer_scale=0.5)
    assert "branch_norm" not in {layer.name for layer in block.layers}
    assert_close(block.get_layer("branch_scale").gamma, np.full(4, 0.5), 0)
    shake(block)
    kernel, bias = (to_numpy(w) for w in block.get_layer("branch").weights)
    gamma = to_numpy(block.get_layer("branch_scale").gamma)
    assert_close(block(x), x + (to_numpy(norm(x)) @ kernel + bias) * gamma)
