import keras
import numpy as np
import pytest

from keras_edifice.blocks.token_pool import patch_map, token_pool
from tests.support.close import assert_close

rng = np.random.default_rng(0)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_the_map_has_the_last_tokens_row_by_row(prefix):
    x = rng.normal(size=(2, prefix + 9, 4)).astype("float32")
    inputs = keras.Input(x.shape[1:])
    model = keras.Model(inputs, patch_map(inputs, 3))
    assert_close(model(x), x[:, prefix:].reshape(2, 3, 3, 4), 0)


def test_summary_is_the_class_token_or_that_of_the_patches():
    x = rng.normal(size=(2, 6, 3)).astype("float32")
    inputs = keras.Input(x.shape[1:])
    patches = x[:, 2:]
    expected = {
        "cls": x[:, 0],
        "mean": patches.mean(1),
        "max": patches.max(1),
        None: patches.reshape(2, 2, 2, 3),
    }
    for pool, y in expected.items():
        model = keras.Model(inputs, token_pool(inputs, 2, pool, None))
        assert_close(model(x), y, 1e-6)


def test_classes_need_a_summary():
    with pytest.raises(ValueError, match="when there are classes, received None"):
        token_pool(keras.Input((5, 3)), 2, None, 4)
