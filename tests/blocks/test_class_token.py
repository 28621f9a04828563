import numpy as np

from keras_edifice.blocks.class_token import ClassToken
from tests.support.close import assert_close, to_numpy
from tests.support.shaking import shake

x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype("float32")


def test_the_same_tokens_come_before_those_of_each_example():
    layer = ClassToken(count=2)
    layer.build(x.shape)
    y = to_numpy(shake(layer)(x))
    assert_close(y[:, 2:], x, 0)
    assert_close(y[:, :2], np.repeat(to_numpy(layer.token), 3, axis=0), 0)
    assert y.shape == layer.compute_output_shape(x.shape) == (3, 6, 5)


def test_tokens_start_at_zero_or_as_asked():
    assert_close(ClassToken()(x)[:, 0], np.zeros((3, 5)), 0)
    assert np.all(to_numpy(ClassToken(stddev=0.1)(x))[:, 0] != 0)


def test_config_keeps_the_arguments():
    layer = ClassToken.from_config(ClassToken(2, 0.1).get_config())
    assert (layer.count, layer.stddev) == (2, 0.1)
