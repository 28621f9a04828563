import numpy as np

from keras_edifice.blocks.layer_scale import LayerScale
from tests.support.close import assert_close

rng = np.random.default_rng(0)


def test_each_channel_has_its_factor():
    x = rng.normal(size=(2, 3, 4)).astype("float32")
    layer = LayerScale(0.1)
    assert_close(layer(x), 0.1 * x, 1e-6)
    gamma = rng.normal(size=4).astype("float32")
    layer.set_weights([gamma])
    assert_close(layer(x), gamma * x, 1e-6)
    assert len(layer.trainable_variables) == 1
