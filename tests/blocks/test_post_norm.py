import keras
import numpy as np

from keras_edifice.blocks.post_norm import post_norm_residual
from keras_edifice.blocks.rms_norm import RMSNorm
from tests.support.close import assert_close, to_numpy
from tests.support.shaking import shake

x = np.random.default_rng(0).normal(size=(8, 3, 4)).astype("float32")


def model(**options):
    inputs = keras.Input((3, 4))
    branch = keras.layers.Dense(4, name="branch")
    return keras.Model(inputs, post_norm_residual(inputs, branch, **options))


def test_the_sum_is_normalised():
    block = shake(model(epsilon=1e-3))
    kernel, bias, gamma, beta = (to_numpy(w) for w in block.weights)
    z = x + x.astype("float64") @ kernel + bias
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-3)
    assert_close(block(x), z * gamma + beta)


def test_the_norm_may_be_another_and_dropout_comes_before_the_sum():
    block = model(norm=RMSNorm, dropout=0.5)
    names = [layer.name for layer in block.layers[1:]]
    assert names == ["branch", "branch_dropout", "branch_add", "branch_norm"]
    assert isinstance(block.get_layer("branch_norm"), RMSNorm)
    assert block.get_layer("branch_dropout").rate == 0.5
