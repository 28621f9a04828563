import math

import numpy as np

from keras_edifice.blocks.channel_mlp import ChannelMLP
from tests.support.close import assert_close, to_numpy
from tests.support.shaking import shake

rng = np.random.default_rng(0)


def mlp(**options):
    layer = ChannelMLP(7, **options)
    layer.build((None, None, 4))
    return shake(layer)


def test_output_is_the_equation():
    layer, x = mlp(), rng.normal(size=(2, 3, 4)).astype("float32")
    w1, b1, w2, b2 = (to_numpy(w) for w in layer.weights)
    h = x.astype("float64") @ w1 + b1
    h = h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2
    assert_close(layer(x), h @ w2 + b2)


def test_each_position_is_by_itself():
    layer, x = mlp(), rng.normal(size=(2, 3, 4)).astype("float32")
    assert_close(layer(x[:, 1:2]), to_numpy(layer(x))[:, 1:2], 1e-6)


def test_dropout_is_on_in_training_alone():
    layer, x = mlp(dropout=0.5), np.ones((2, 3, 4), "float32")
    assert_close(layer(x), layer(x), 0)
    assert np.any(to_numpy(layer(x, training=True)) != to_numpy(layer(x)))


def test_config_keeps_the_arguments():
    layer = ChannelMLP(7, dropout=0.2, initializer="truncated")
    layer = ChannelMLP.from_config(layer.get_config())
    assert (layer.hidden_size, layer.dropout) == (7, 0.2)
    assert layer.initializer == "truncated"
