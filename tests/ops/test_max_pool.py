import keras
import numpy as np
import pytest

from keras_edifice.blocks.max_pooling import MaxPooling
from keras_edifice.ops.max_pool import max_pool, sliced_max_pool
from tests.support.close import assert_close
from tests.support.gradients import gradients

rng = np.random.default_rng(0)
CASES = [(3, 2, 1), (2, 2, 0), (3, 1, 1), (3, 3, 0), (5, 2, 2)]


def reference(x, size, strides, padding):
    edge = (padding, padding)
    x = np.pad(x, [(0, 0), edge, edge, (0, 0)], constant_values=-np.inf)
    rows, columns = ((n - size) // strides + 1 for n in x.shape[1:3])
    y = np.zeros((x.shape[0], rows, columns, x.shape[3]))
    for i in range(rows):
        for j in range(columns):
            window = x[:, i * strides :, j * strides :][:, :size, :size]
            y[:, i, j] = window.max(axis=(1, 2))
    return y


@pytest.mark.parametrize(("size", "strides", "padding"), CASES)
def test_each_value_is_the_largest_of_its_window(size, strides, padding):
    x = rng.normal(size=(2, 9, 8, 3)).astype("float32") - 5  # below the zero of a pad
    y = max_pool(keras.ops.convert_to_tensor(x), size, strides, padding)
    assert_close(y, reference(x, size, strides, padding), 0)


@pytest.mark.parametrize(("size", "strides"), [(3, 2), (2, 2), (3, 1)])
def test_slices_give_the_same(size, strides):
    x = rng.normal(size=(2, 9, 8, 3)).astype("float32")
    y = sliced_max_pool(keras.ops.convert_to_tensor(x), size, strides)
    assert_close(y, reference(x, size, strides, 0), 0)


def test_gradient_goes_to_the_largest_alone():
    x = rng.permutation(7 * 7).reshape(1, 7, 7, 1).astype("float32")
    inputs = keras.Input((7, 7, 1))
    model = keras.Model(inputs, MaxPooling(3, 3)(inputs))
    _, by_input = gradients(model, x, keras.ops.sum)
    expected = np.zeros((7, 7))
    for i in (0, 3):
        for j in (0, 3):
            window = x[0, i : i + 3, j : j + 3, 0]
            row, column = np.unravel_index(window.argmax(), window.shape)
            expected[i + row, j + column] = 1
    assert_close(by_input[0, ..., 0], expected, 0)
