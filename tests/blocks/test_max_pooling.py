import numpy as np

from keras_edifice.blocks.max_pooling import MaxPooling
from tests.support.close import assert_close


def test_symmetric_padding_centres_the_windows():
    x = np.arange(6, dtype="float32").reshape(1, 6, 1, 1) - 9
    y = MaxPooling(3, 2, padding=1)(np.concatenate([x, x - 1], axis=2))
    assert_close(y[0, :, 0, 0], [-8, -6, -4], 0)


def test_shape_is_known_without_a_call():
    layer = MaxPooling(3, 2, padding=1)
    assert layer.compute_output_shape((None, 7, None, 5)) == (None, 4, None, 5)
    assert tuple(layer(np.zeros((2, 7, 8, 5), "float32")).shape) == (2, 4, 4, 5)


def test_config_keeps_the_arguments():
    layer = MaxPooling.from_config(MaxPooling(3, 1, padding=2).get_config())
    assert (layer.pool_size, layer.strides, layer.padding) == (3, 1, 2)
