import keras
import numpy as np
import pytest

from keras_edifice.blocks.global_pool import global_pool
from tests.support.close import assert_close

rng = np.random.default_rng(0)


@pytest.mark.parametrize(("pooling", "summary"), [("avg", np.mean), ("max", np.max)])
def test_it_is_the_mean_or_the_maximum_of_the_map(pooling, summary):
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, global_pool(inputs, pooling, 5))
    x = rng.normal(size=(2, 4, 6, 3)).astype("float32")
    assert_close(model(x), summary(x, axis=(1, 2)), 1e-6)


def test_without_pooling_it_is_the_map_and_classes_are_refused():
    inputs = keras.Input((4, 6, 3))
    assert global_pool(inputs, None, None) is inputs
    with pytest.raises(ValueError, match="when there are classes, received None"):
        global_pool(inputs, None, 5)
