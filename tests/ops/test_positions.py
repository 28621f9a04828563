import keras
import numpy as np

from keras_edifice.ops.positions import positions
from tests.support.close import assert_close


def test_positions_count_along_the_axis():
    x = np.ones((2, 3, 4), "int32")
    for axis, length in enumerate(x.shape):
        found = positions(keras.ops.convert_to_tensor(x), axis)
        assert keras.backend.standardize_dtype(found.dtype) == "float32"
        assert_close(found, np.arange(length), 0)
